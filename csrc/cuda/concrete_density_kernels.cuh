// The log density of the Concrete distribution and its gradients: a team of threads a row.
// concrete_density.cpp has the formulas, and what they become at the boundary.
#pragma once

#include "concrete_density_params.h"
#include "row_operands.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

using cuda::DensityParams;

// Classes of a row on one side of the boundary, with u = l - tau x. Impossible ones, u = -inf, only
// count.
template <class Scalar>
struct Side {
  Scalar top, sum, distance;  // largest u, sum of e^(u - top), sum of u - top
  int count;

  GUMBEL_EXT_DEVICE static Side none() { return {-infinity<Scalar>(), 0, 0, 0}; }
  GUMBEL_EXT_DEVICE void take(Scalar u) {
    if (u != -infinity<Scalar>()) {
      const bool larger = u > top;
      const Scalar apart = larger ? add(top, -u) : add(u, -top), e = exp_nonpositive(apart);
      sum = larger ? multiply_add(sum, e, Scalar(1)) : add(sum, e);
      // The first class has nothing below it.
      const Scalar below = top == -infinity<Scalar>() ? Scalar(0) : apart;
      distance = add(distance, larger ? multiply(static_cast<Scalar>(count), below) : apart);
      top = larger ? u : top;
    }
    ++count;
  }
  GUMBEL_EXT_DEVICE Side rescaled(Scalar largest) const {
    if (top == largest || top == -infinity<Scalar>()) return {largest, sum, distance, count};
    const Scalar apart = add(top, -largest);
    return {largest, multiply(sum, exp_nonpositive(apart)),
            multiply_add(static_cast<Scalar>(count), apart, distance), count};
  }
};
template <class Scalar>
GUMBEL_EXT_DEVICE Side<Scalar> merged(const Side<Scalar>& a, const Side<Scalar>& b) {
  const Scalar top = Larger()(a.top, b.top);
  const Side<Scalar> x = a.rescaled(top), y = b.rescaled(top);
  return {top, add(x.sum, y.sum), add(x.distance, y.distance), x.count + y.count};
}

// Flags of a row.
constexpr int kWithoutDensity = 1, kImpossible = 2;

template <class Scalar>
struct DensitySums {
  Side<Scalar> inside, zeros;
  Scalar sum_x;
  int flags;
};
struct MergeDensities {
  template <class Scalar>
  GUMBEL_EXT_DEVICE DensitySums<Scalar> operator()(const DensitySums<Scalar>& a,
                                                   const DensitySums<Scalar>& b) const {
    return {merged(a.inside, b.inside), merged(a.zeros, b.zeros), add(a.sum_x, b.sum_x),
            a.flags | b.flags};
  }
};

// log x for x > 0. natural_log() does not know subnormal numbers, which are made larger first.
template <class Scalar>
GUMBEL_EXT_DEVICE Scalar log_of(Scalar x) {
  constexpr int kShift = sizeof(Scalar) == 4 ? 24 : 53;
  constexpr Scalar factor = static_cast<Scalar>(std::int64_t{1} << kShift);
  const bool small = x < smallest_normal<Scalar>;
  const Scalar log = natural_log(small ? multiply(x, factor) : x);
  return small ? add(log, static_cast<Scalar>(-kShift * 0.693147180559945309417)) : log;
}

// A class of a row.
template <class Scalar>
struct DensityClass {
  Scalar value, x, u;
  bool none, never;  // of value 0; impossible

  GUMBEL_EXT_DEVICE DensityClass(Scalar value, Scalar logit, Scalar tau, bool log_space)
      : value(value),
        x(value),
        none(value == (log_space ? -infinity<Scalar>() : Scalar(0))),
        never(logit == -infinity<Scalar>()) {
    if (!log_space) x = log_of(none ? Scalar(1) : value);
    if (none) x = 0;
    u = never ? logit : multiply_add(-tau, x, logit);
  }
  GUMBEL_EXT_DEVICE bool dropped() const { return none && never; }
};

// log Gamma(n) - n log n, for n >= 1. Its size is that of n; n log n cancels from the density, and
// would take float32's last digits with it.
template <class Scalar>
GUMBEL_EXT_DEVICE Scalar log_gamma_less_n_log_n(int count) {
  const Scalar n = static_cast<Scalar>(count), log_n = natural_log(n);
  if (count <= 13) {
    // A number of float32 up to 13!.
    Scalar factorial = 1;
    for (int i = 2; i < count; ++i) factorial = multiply(factorial, static_cast<Scalar>(i));
    return add(natural_log(factorial), -multiply(n, log_n));
  }
  // Stirling's series, whose first term left out is below 1e-15 here.
  const Scalar r = 1 / n, r2 = multiply(r, r);
  Scalar series = Scalar(1.0 / 1188);
  series = multiply_add(-r2, series, Scalar(1.0 / 1680));
  series = multiply_add(-r2, series, Scalar(1.0 / 1260));
  series = multiply_add(-r2, series, Scalar(1.0 / 360));
  series = multiply_add(-r2, series, Scalar(1.0 / 12));
  return add(multiply_add(Scalar(-0.5), log_n, Scalar(0.91893853320467274178)),
             add(multiply(r, series), -n));
}

// The sums of a row, and what they come to.
template <class Scalar>
struct DensityRow {
  DensitySums<Scalar> sums;
  Scalar tau;
  bool log_space;

  GUMBEL_EXT_DEVICE int zeros() const { return sums.zeros.count; }
  GUMBEL_EXT_DEVICE int classes() const { return sums.inside.count + sums.zeros.count; }
  GUMBEL_EXT_DEVICE bool boundary() const { return zeros() > 0; }
  // The classes that the softmax is over: towards the boundary, those of value 0 alone.
  GUMBEL_EXT_DEVICE Scalar peak() const { return boundary() ? sums.zeros.top : sums.inside.top; }
  GUMBEL_EXT_DEVICE Scalar total() const { return boundary() ? sums.zeros.sum : sums.inside.sum; }
  GUMBEL_EXT_DEVICE bool bad() const {
    return (sums.flags & kWithoutDensity) != 0 || sums.inside.count == 0 ||
           peak() == -infinity<Scalar>() || tau != tau;
  }

  GUMBEL_EXT_DEVICE Scalar density() const {
    const Scalar n = static_cast<Scalar>(classes());
    if (bad()) return quiet_nan<Scalar>();
    if ((sums.flags & kImpossible) != 0) return -infinity<Scalar>();
    Scalar distance = sums.inside.distance;
    if (boundary()) {
      const Scalar m = static_cast<Scalar>(zeros());
      const Scalar coefficient =
          add(multiply(static_cast<Scalar>(sums.inside.count), tau), log_space ? Scalar(0) : -m);
      if (coefficient > 0) return -infinity<Scalar>();
      if (coefficient < 0) return infinity<Scalar>();
      distance = add(multiply_add(static_cast<Scalar>(sums.inside.count),
                                  add(sums.inside.top, -sums.zeros.top), distance),
                     sums.zeros.distance);
    }
    const Scalar log_mean = natural_log(total() / n);
    Scalar out = multiply_add(add(n, Scalar(-1)), natural_log(tau),
                              log_gamma_less_n_log_n<Scalar>(classes()));
    out = add(add(out, distance), -multiply(n, log_mean));
    return log_space ? out : add(out, -sums.sum_x);
  }

  // Where d log p / d x of a zero is 0: the next term of the expansion in value, divided by it, is
  // -tau (n p) (S / W) value^(tau - 1), W and S the sums over the zeros and over the others. This
  // is -tau (S / W) value^(tau - 1).
  GUMBEL_EXT_DEVICE Scalar next_term() const {
    if (tau < 1) return -infinity<Scalar>();
    if (tau > 1 || sums.inside.top == -infinity<Scalar>()) return 0;
    const Scalar distance = add(sums.inside.top, -sums.zeros.top);
    const Scalar power = exp_nonpositive(distance > 0 ? -distance : distance);
    const Scalar ratio = sums.inside.sum / sums.zeros.sum;
    return distance > 0 ? -(ratio / power) : -multiply(ratio, power);
  }
};

// With w_i = 1 - n p_i:
//     dl_i = g w_i,    dx_i = -g (tau w_i  [ + 1 ]),    dtau = g ((n - 1) / tau - sum_i x_i w_i)
// The second read of a row is from cache.
template <class Scalar, class Team>
GUMBEL_EXT_DEVICE void density_gradients(Team& team, const DensityParams& p,
                                         const OperandRows<Scalar>& row,
                                         const OperandRow<Scalar>& values,
                                         const OperandRow<Scalar>& logits,
                                         const DensityRow<Scalar>& result) {
  const Scalar g = static_cast<const Scalar*>(p.grad)[row.row];
  const bool bad = result.bad(), boundary = result.boundary();
  const bool filled = bad || g == 0;
  const Scalar fill = bad ? quiet_nan<Scalar>() : Scalar(0);
  const Scalar n = static_cast<Scalar>(result.classes()), factor = n / result.total(),
               peak = result.peak(),
               next = boundary && !p.log_space ? multiply(g, result.next_term()) : Scalar(0);
  Scalar sum_xw = 0;
  for (int group = team.rank(); group < row.groups; group += team.threads()) {
    Scalar value[kRowGroup], logit[kRowGroup];
    values.load(group * kRowGroup, row.classes, Scalar(0), value);
    logits.load(group * kRowGroup, row.classes, -infinity<Scalar>(), logit);
    Scalar of_value[kRowGroup], of_logits[kRowGroup];
#pragma unroll
    for (int v = 0; v < kRowGroup; ++v) {
      const DensityClass<Scalar> c(value[v], logit[v], row.tau, p.log_space);
      const Scalar np =
          !boundary || c.none ? multiply(exp_nonpositive(add(c.u, -peak)), factor) : Scalar(0);
      const Scalar w = add(Scalar(1), -np);
      const Scalar of_x = add(-multiply(row.tau, w), p.log_space ? Scalar(0) : Scalar(-1));
      of_logits[v] = multiply(g, w);
      of_value[v] = multiply(g, of_x);
      if (!p.log_space) {
        if (!c.none) {
          of_value[v] = of_value[v] / c.value;
        } else {
          of_value[v] =
              of_x == 0 ? multiply(next, np) : multiply(g, multiply(of_x, infinity<Scalar>()));
        }
      }
      if (c.dropped()) of_logits[v] = of_value[v] = 0;
      if (filled) of_logits[v] = of_value[v] = fill;
      const bool counts = group * kRowGroup + v < row.classes && !c.dropped();
      if (counts) sum_xw = multiply_add(c.x, w, sum_xw);
    }
    const std::int64_t offset = row.row * p.classes;
    if (p.grad_value != nullptr) {
      store_results(p.grad_value, p.wide_grad_value ? kTypeOf<Scalar> : p.type, offset,
                    group * kRowGroup, row.classes, of_value);
    }
    if (p.grad_logits != nullptr) {
      store_results(p.grad_logits, p.wide_grad_logits ? kTypeOf<Scalar> : p.type, offset,
                    group * kRowGroup, row.classes, of_logits);
    }
  }
  if (p.grad_tau == nullptr) return;
  sum_xw = team.reduce(sum_xw, Sum());
  if (team.rank() != 0 || !row.exists) return;
  const Scalar slope = boundary ? -infinity<Scalar>() : add(add(n, Scalar(-1)) / row.tau, -sum_xw);
  static_cast<Scalar*>(p.grad_tau)[row.row] = filled ? fill : multiply(g, slope);
}

// A forward where there is a density to write, else a backward.
template <class Scalar, class Team>
GUMBEL_EXT_KERNEL(Team::kBlockThreads, resident_threads<Scalar>(kRowGroup))
density_kernel(const GUMBEL_EXT_CONSTANT DensityParams p) {
  Team team;
  for (std::int64_t first = team.first_row(); first < p.rows; first += team.row_step()) {
    const OperandRows<Scalar> row = OperandRows<Scalar>::of(p, first + team.row_in_block());
    const auto values = OperandRow<Scalar>::of(p, p.value, p.type, row.row);
    const auto logits = OperandRow<Scalar>::of(p, p.logits, p.type, row.row);
    DensitySums<Scalar> sums{Side<Scalar>::none(), Side<Scalar>::none(), 0, 0};
    for (int g = team.rank(); g < row.groups; g += team.threads()) {
      Scalar value[kRowGroup], logit[kRowGroup];
      values.load(g * kRowGroup, row.classes, Scalar(0), value);
      logits.load(g * kRowGroup, row.classes, -infinity<Scalar>(), logit);
#pragma unroll
      for (int v = 0; v < kRowGroup; ++v) {
        if (g * kRowGroup + v >= row.classes) break;
        const DensityClass<Scalar> c(value[v], logit[v], row.tau, p.log_space);
        const bool finite = value[v] < infinity<Scalar>() && logit[v] < infinity<Scalar>();
        if (!finite || (!p.log_space && value[v] < 0)) sums.flags |= kWithoutDensity;
        if (c.never && !c.none) sums.flags |= kImpossible;
        sums.sum_x = add(sums.sum_x, c.x);
        if (c.dropped()) continue;
        if (c.none) {
          sums.zeros.take(c.u);
        } else {
          sums.inside.take(c.u);
        }
      }
    }
    sums = team.reduce(sums, MergeDensities());
    const DensityRow<Scalar> result{sums, row.tau, p.log_space};
    if (p.density == nullptr) {
      density_gradients(team, p, row, values, logits, result);
    } else if (team.rank() == 0 && row.exists) {
      static_cast<Scalar*>(p.density)[row.row] = result.density();
    }
  }
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
