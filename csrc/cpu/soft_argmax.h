// The expected position under softmax(beta l) of one row, a chunk of classes at a time. For a
// negative beta all that is called a logit below is -l, and beta its size.
//
// A chunk is taken relative to its own best class: e_i = exp(beta (l_i - l_b)) and the moments
// sum e_i (x_i - x_b). Shifted so, terms keep their relative precision where almost all weight lies
// on one class, and positions of a hundred thousand cost a chunk's sum no digits.
#pragma once

#include <cmath>

#include "row_math.h"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

using cpu::kMaxCoordinates;
using cpu::PositionChunk;
using cpu::PositionRow;

template <class A>
inline A exponent_scale(double beta) {
  return clamped<A>(1.4426950408889634074 * std::fabs(beta));
}

inline double sign_of(const PositionRow& row) { return row.beta < 0 ? -1.0 : 1.0; }

template <class T, class A>
inline const A* widen_run(const T* x, std::int64_t count, A* buffer) {
  const T* end = x + count;
  for (std::int64_t j = 0; j < count; j += kLanes) {
    store(buffer + j, load_run(x + j, count - j, end));
  }
  return buffer;
}
inline const float* widen_run(const float* x, std::int64_t, float*) { return x; }
inline const double* widen_run(const double* x, std::int64_t, double*) { return x; }

template <class T, class A>
inline const A* directed_run(const T* x, std::int64_t count, const PositionRow& row, A* buffer) {
  if (row.beta > 0) return widen_run(x, count, buffer);
  using R = RealTraits<Vector<A>>;
  const T* end = x + count;
  for (std::int64_t j = 0; j < count; j += kLanes) {
    store(buffer + j, R::splat(-1) * load_run(x + j, count - j, end));
  }
  return buffer;
}

// Classes first, ..., first + count - 1, of which x are the logits; at most kChunk.
template <class T>
void accumulate_positions(const T* x, std::int64_t first, std::int64_t count,
                          const PositionRow& row, PositionChunk& out) {
  using A = typename ComputeType<T>::type;
  alignas(64) A buffer[kChunk + kLanes], e[kChunk + kLanes];
  const A* z = directed_run(x, count, row, buffer);
  const A* z_end = z + count;
  Best<A> best;
  update_best(best, z, count, z_end, 0);
  out.index = first + best.index;
  out.largest = best.nan ? std::numeric_limits<A>::quiet_NaN() : best.value;
  out.total = 0;
  for (double& moment : out.moment) moment = 0;
  if (best.nan || best.value == -std::numeric_limits<A>::infinity()) return;
  const A* e_end = e + kChunk + kLanes;
  out.total = exponentiate_chunk(z, count, z_end, best.value, exponent_scale<A>(row.beta), e,
                                 static_cast<const A*>(e_end));
  for (int k = 0; k < row.coordinates; ++k) {
    const A* positions = static_cast<const A*>(row.positions) + k * row.classes;
    out.moment[k] = dot_chunk(static_cast<const A*>(e), e_end, positions + first,
                              positions + row.classes, count, positions[out.index]);
  }
}

// e^(beta (a - b)) for a <= b, the same on every machine.
inline double relative_weight(double a, double b, double beta) {
  double lanes[kLanes];
  store(lanes, exp2_nonpositive(RealTraits<F64>::splat((a - b) * exponent_scale<double>(beta))));
  return lanes[0];
}

// From the chunks of a row to its state: [best class, its logit, sum of e, and for each coordinate
// the expected position less that of the best class].
template <class T>
void settle_positions(const PositionChunk* chunks, std::int64_t count, const PositionRow& row,
                      double* state) {
  using A = typename ComputeType<T>::type;
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const PositionChunk* best = chunks;
  for (std::int64_t c = 0; c < count; ++c) {
    if (chunks[c].largest != chunks[c].largest) {
      best = chunks + c;
      break;
    }
    if (chunks[c].largest > best->largest) best = chunks + c;
  }
  state[0] = static_cast<double>(best->index);
  state[1] = sign_of(row) * best->largest;
  double total = 0, moment[kMaxCoordinates] = {};
  const bool ordinary = best->largest - best->largest == 0;
  for (std::int64_t c = 0; c < count && ordinary; ++c) {
    if (chunks[c].total == 0) continue;
    const double weight =
        chunks + c == best ? 1.0 : relative_weight(chunks[c].largest, best->largest, row.beta);
    total += weight * chunks[c].total;
    for (int k = 0; k < row.coordinates; ++k) {
      const A* positions = static_cast<const A*>(row.positions) + k * row.classes;
      const double apart = static_cast<double>(positions[chunks[c].index]) -
                           static_cast<double>(positions[best->index]);
      moment[k] += weight * (chunks[c].moment[k] + chunks[c].total * apart);
    }
  }
  state[2] = ordinary ? total : nan;
  for (int k = 0; k < row.coordinates; ++k) state[3 + k] = ordinary ? moment[k] / total : nan;
}

// dl_i = beta y_i sum_k (x_ki - E_k) dE_k; returns sum_i (dl_i / beta) (l_i - l_b), a part of
// dbeta, if asked for.
template <class T>
double position_gradient(const T* x, std::int64_t first, std::int64_t count, const PositionRow& row,
                         const double* state, const void* grad_expected, bool beta_grad, T* out) {
  using A = typename ComputeType<T>::type;
  using F = Vector<A>;
  using R = RealTraits<F>;
  const A* grad = static_cast<const A*>(grad_expected);
  const A* positions = static_cast<const A*>(row.positions);
  const std::int64_t best = static_cast<std::int64_t>(state[0]);
  double shift = 0;
  F weight[kMaxCoordinates], origin[kMaxCoordinates];
  for (int k = 0; k < row.coordinates; ++k) {
    weight[k] = R::splat(grad[k]);
    origin[k] = R::splat(positions[k * row.classes + best]);
    shift += static_cast<double>(grad[k]) * state[3 + k];
  }
  const A direction = static_cast<A>(sign_of(row));
  const F sign = R::splat(direction), peak = R::splat(direction * static_cast<A>(state[1])),
          scale = R::splat(exponent_scale<A>(row.beta)),
          inverse_total = R::splat(static_cast<A>(1.0 / state[2])),
          beta = R::splat(direction * clamped<A>(std::fabs(row.beta))),
          centre = R::splat(static_cast<A>(-shift));
  const A* positions_end = positions + row.coordinates * row.classes;
  const T* x_end = x + count;
  const T* out_end = out + count;
  F sums = R::splat(0);
  for (std::int64_t j = 0; j < count; j += kLanes) {
    const F distance = sign * load_run(x + j, count - j, x_end) - peak;
    const F y = exp2_nonpositive(distance * scale) * inverse_total;
    F h = centre;
    for (int k = 0; k < row.coordinates; ++k) {
      const F offset =
          load_run(positions + k * row.classes + first + j, count - j, positions_end) - origin[k];
      h = fma(weight[k], offset, h);
    }
    const F s = y * h;
    store_run(out + j, s * beta, count - j, out_end);
    if (beta_grad) {
      const auto used = first_lanes<F>(static_cast<int>(std::min<std::int64_t>(count - j, kLanes)));
      // A class of probability 0 may be infinitely far.
      const auto absent = less(distance, R::splat(-std::numeric_limits<A>::max()));
      const F term = select(absent, R::splat(0), s * distance);
      sums = sums + select(used, term, R::splat(0));
    }
  }
  return sign_of(row) * static_cast<double>(sum(sums));
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
