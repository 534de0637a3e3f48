// The expected position under softmax(beta l): a team of threads a row. A negative beta makes the
// smallest logit the likeliest.
//
// Weights and positions are taken relative to the likeliest class, b: e_i = 2^(beta (l_i - l_b)
// log2(e)) and the moments sum e_i (x_i - x_b). Shifted so, terms keep their relative precision
// where almost all weight lies on one class. The sums keep what their rounding loses, because
// positions of a hundred thousand would cost a float32 sum the last digits of the result.
#pragma once

#include "row_operands.cuh"
#include "soft_argmax_params.h"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

using cuda::SoftArgmaxParams;

// 2^x for x <= 0, by the series: the hardware's error of 2^-22, times positions of a hundred
// thousand, would be more than a unit in the last place of the result. Not for NaN: the
// series shifts bits, and makes a number of one that has any at its low end, as CUDA's have.
GUMBEL_EXT_DEVICE float position_weight(float x) { return exp2_nonpositive(DeviceF32{x}).v; }
GUMBEL_EXT_DEVICE double position_weight(double x) { return exp2_nonpositive(DeviceF64{x}).v; }

// A sum and what its rounding lost (Knuth's TwoSum), as good as twice the precision.
template <class Scalar>
struct LongSum {
  Scalar sum, lost;

  GUMBEL_EXT_DEVICE void take(Scalar term, Scalar lost_of_term) {
    const Scalar total = add(sum, term), of_term = add(total, -sum), of_sum = add(total, -of_term);
    const Scalar error = add(add(sum, -of_sum), add(term, -of_term));
    lost = add(add(lost, lost_of_term), error);
    sum = total;
  }
};

template <class Scalar, int kCoordinates>
struct PositionSums {
  LongSum<Scalar> total, moment[kCoordinates];
};
struct AddPositionSums {
  template <class Scalar, int kCoordinates>
  GUMBEL_EXT_DEVICE PositionSums<Scalar, kCoordinates> operator()(
      const PositionSums<Scalar, kCoordinates>& a,
      const PositionSums<Scalar, kCoordinates>& b) const {
    PositionSums<Scalar, kCoordinates> out = a;
    out.total.take(b.total.sum, b.total.lost);
#pragma unroll
    for (int k = 0; k < kCoordinates; ++k) out.moment[k].take(b.moment[k].sum, b.moment[k].lost);
    return out;
  }
};

// The positions of one coordinate.
template <class Scalar>
GUMBEL_EXT_DEVICE OperandRow<Scalar> position_row(const SoftArgmaxParams& p, int k) {
  return {p.positions, k * p.classes, 1, kTypeOf<Scalar>};
}

// log2(e) beta, which may be above the largest number: times a distance of 0 it must stay 0.
template <class Scalar>
GUMBEL_EXT_DEVICE Scalar position_scale(Scalar beta, Scalar sign) {
  return multiply(sign, clamped(multiply(Scalar(1.4426950408889634074), multiply(sign, beta))));
}

// A row is read twice, the second time from cache where it fits.
template <class Scalar, class Team, int kCoordinates>
GUMBEL_EXT_KERNEL(Team::kBlockThreads, resident_threads<Scalar>(2 * kRowGroup))
soft_argmax_kernel(const GUMBEL_EXT_CONSTANT SoftArgmaxParams p) {
  Team team;
  for (std::int64_t first = team.first_row(); first < p.rows; first += team.row_step()) {
    const OperandRows<Scalar> row =
        OperandRows<Scalar>::template of</*kSigned=*/true>(p, first + team.row_in_block());
    const auto logits = OperandRow<Scalar>::of(p, p.logits, p.type, row.row);
    const Scalar sign = row.tau < 0 ? Scalar(-1) : Scalar(1),
                 least = multiply(sign, -infinity<Scalar>());
    Best<Scalar> best = Best<Scalar>::none();
    for (int g = team.rank(); g < row.groups; g += team.threads()) {
      Scalar z[kRowGroup];
      logits.load(g * kRowGroup, row.classes, least, z);
#pragma unroll
      for (int v = 0; v < kRowGroup; ++v) z[v] = multiply(sign, z[v]);
      take_first_best(z, g * kRowGroup, best);
    }
    best = team.reduce(best, BetterOf());
    const int index = best.index == kNoIndex ? 0 : best.index;
    Scalar origin[kCoordinates];
#pragma unroll
    for (int k = 0; k < kCoordinates; ++k) origin[k] = position_row<Scalar>(p, k).at(index);
    const Scalar scale = position_scale(row.tau, sign), top = multiply(sign, best.value);

    PositionSums<Scalar, kCoordinates> sums{};
    for (int g = team.rank(); g < row.groups; g += team.threads()) {
      Scalar e[kRowGroup];
      logits.load(g * kRowGroup, row.classes, least, e);
#pragma unroll
      for (int v = 0; v < kRowGroup; ++v) {
        e[v] = position_weight(multiply(add(e[v], -top), scale));
        sums.total.take(e[v], Scalar(0));
      }
#pragma unroll
      for (int k = 0; k < kCoordinates; ++k) {
        Scalar x[kRowGroup];
        position_row<Scalar>(p, k).load(g * kRowGroup, row.classes, origin[k], x);
#pragma unroll
        for (int v = 0; v < kRowGroup; ++v) {
          sums.moment[k].take(multiply(e[v], add(x[v], -origin[k])), Scalar(0));
        }
      }
    }
    sums = team.reduce(sums, AddPositionSums());
    if (team.rank() != 0 || !row.exists) continue;
    // The few numbers of a row, in float64: what is added to them is.
    const auto whole = [](const LongSum<Scalar>& s) {
      return static_cast<double>(s.sum) + static_cast<double>(s.lost);
    };
    const bool ordinary = add(best.value, -best.value) == 0 && scale == scale;
    double* state = p.state + row.row * (3 + kCoordinates);
    state[0] = index;
    state[1] = top;
    state[2] = ordinary ? whole(sums.total) : quiet_nan<double>();
#pragma unroll
    for (int k = 0; k < kCoordinates; ++k) {
      const double apart =
          ordinary ? whole(sums.moment[k]) / whole(sums.total) : quiet_nan<double>();
      state[3 + k] = apart;
      static_cast<Scalar*>(p.expected)[row.row * kCoordinates + k] =
          static_cast<Scalar>(static_cast<double>(origin[k]) + apart + p.middle[k]);
    }
  }
}

// With h = sum_k dE_k (x_k - E_k):
//     s = y h,    dl = beta s,    dbeta = sum s (l - l_b)
template <class Scalar, class Team, int kCoordinates>
GUMBEL_EXT_KERNEL(Team::kBlockThreads, resident_threads<Scalar>(2 * kRowGroup))
soft_argmax_backward_kernel(const GUMBEL_EXT_CONSTANT SoftArgmaxParams p) {
  Team team;
  for (std::int64_t first = team.first_row(); first < p.rows; first += team.row_step()) {
    const OperandRows<Scalar> row =
        OperandRows<Scalar>::template of</*kSigned=*/true>(p, first + team.row_in_block());
    const auto logits = OperandRow<Scalar>::of(p, p.logits, p.type, row.row);
    const double* state = p.state + row.row * (3 + kCoordinates);
    // A class that is none of a forward's makes its row NaN.
    const bool valid = state[0] >= 0 && state[0] < static_cast<double>(p.classes);
    const int index = valid ? static_cast<int>(state[0]) : 0;
    const Scalar beta = row.tau, sign = beta < 0 ? Scalar(-1) : Scalar(1),
                 scale = position_scale(beta, sign), top = static_cast<Scalar>(state[1]);
    const Scalar inverse_total =
        valid && scale == scale ? Scalar(1) / static_cast<Scalar>(state[2]) : quiet_nan<Scalar>();
    Scalar weight[kCoordinates], origin[kCoordinates], centre = 0;
#pragma unroll
    for (int k = 0; k < kCoordinates; ++k) {
      weight[k] = static_cast<const Scalar*>(p.grad)[row.row * kCoordinates + k];
      origin[k] = position_row<Scalar>(p, k).at(index);
      centre = multiply_add(-weight[k], static_cast<Scalar>(state[3 + k]), centre);
    }
    Scalar slope = 0;
    for (int g = team.rank(); g < row.groups; g += team.threads()) {
      Scalar z[kRowGroup], h[kRowGroup] = {centre, centre, centre, centre};
      // What is outside is not stored, and adds nothing to the slope.
      logits.load(g * kRowGroup, row.classes, multiply(sign, -infinity<Scalar>()), z);
#pragma unroll
      for (int k = 0; k < kCoordinates; ++k) {
        Scalar x[kRowGroup];
        position_row<Scalar>(p, k).load(g * kRowGroup, row.classes, origin[k], x);
#pragma unroll
        for (int v = 0; v < kRowGroup; ++v) {
          h[v] = multiply_add(weight[k], add(x[v], -origin[k]), h[v]);
        }
      }
#pragma unroll
      for (int v = 0; v < kRowGroup; ++v) {
        const Scalar distance = add(z[v], -top), exponent = multiply(distance, scale);
        const Scalar y = multiply(position_weight(exponent), inverse_total);
        const Scalar s = multiply(y, h[v]);
        // A class of probability 0 may be infinitely far.
        if (exponent != -infinity<Scalar>()) slope = multiply_add(s, distance, slope);
        z[v] = multiply(s, beta);
      }
      store_results(p.grad_logits, p.type, row.row * p.classes, g * kRowGroup, row.classes, z);
    }
    if (p.grad_beta == nullptr) continue;
    slope = team.reduce(slope, Sum());
    if (team.rank() == 0 && row.exists) static_cast<Scalar*>(p.grad_beta)[row.row] = slope;
  }
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
