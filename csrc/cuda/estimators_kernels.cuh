// Gradients of hard samples in closed form: ZGR, ReinMax and the gapped straight-through. A team of
// threads a row; estimators.cpp has the formulas and their sources.
#pragma once

#include "estimators_params.h"
#include "row_operands.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

using cuda::Estimator;
using cuda::EstimatorParams;

// A row of logits l, its chosen class i, and gradients d = g - g_i. A class that cannot be chosen
// has l = -inf and d = 0, and so does what lies past the row.
template <class Scalar>
struct EstimatorRow {
  OperandRows<Scalar> place;
  OperandRow<Scalar> logits, grads;
  const std::uint8_t* mask;
  std::int64_t mask_stride;
  int index;
  bool forbidden;  // by the mask, all of it
  Scalar chosen_grad, chosen_logit;

  GUMBEL_EXT_DEVICE static EstimatorRow of(const EstimatorParams& p, std::int64_t number) {
    EstimatorRow r;
    r.place = OperandRows<Scalar>::of(p, number);
    r.logits = OperandRow<Scalar>::of(p, p.logits, p.type, r.place.row);
    r.grads = OperandRow<Scalar>::of(p, p.grad, p.type, r.place.row);
    r.mask = nullptr;
    r.mask_stride = p.mask.class_stride;
    if (p.mask.data != nullptr) {
      const auto of_mask = OperandRow<Scalar>::of(p, p.mask, p.type, r.place.row);
      r.mask = static_cast<const std::uint8_t*>(p.mask.data) + of_mask.offset;
    }
    const std::int64_t index = p.index[r.place.row];
    r.forbidden = index < 0;
    // An index that is none of a forward's makes its row NaN.
    const bool known = index >= 0 && index < r.place.classes;
    r.index = known ? static_cast<int>(index) : -1;
    r.chosen_grad = r.chosen_logit = quiet_nan<Scalar>();
    if (known) {
      r.chosen_grad = r.grads.at(r.index);
      r.chosen_logit = r.allowed(r.index) ? r.logits.at(r.index) : -infinity<Scalar>();
    }
    return r;
  }

  GUMBEL_EXT_DEVICE bool allowed(int c) const {
    return mask == nullptr || mask[c * mask_stride] != 0;
  }
  GUMBEL_EXT_DEVICE void load(int c, Scalar (&l)[kRowGroup], Scalar (&d)[kRowGroup]) const {
    logits.load(c, place.classes, -infinity<Scalar>(), l);
    grads.load(c, place.classes, Scalar(0), d);
    if (mask != nullptr) {
#pragma unroll
      for (int v = 0; v < kRowGroup; ++v) {
        if (v < place.classes - c && !allowed(c + v)) l[v] = -infinity<Scalar>();
      }
    }
#pragma unroll
    for (int v = 0; v < kRowGroup; ++v) {
      d[v] = l[v] == -infinity<Scalar>() ? Scalar(0) : add(d[v], -chosen_grad);
    }
  }
};

// The groups of a row that are a thread's: held in registers, kGroups at most, or, with none, read
// again each time.
template <class Scalar, class Team, int kGroups>
class RowGroups {
 public:
  GUMBEL_EXT_DEVICE RowGroups(const Team& team, const EstimatorRow<Scalar>& row)
      : rank_(team.rank()), threads_(team.threads()), row_(row) {
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      if (rank_ + k * threads_ < row.place.groups) {
        row.load((rank_ + k * threads_) * kRowGroup, l_[k], d_[k]);
      }
    }
  }
  // Calls take(k, c, l, d): held group k, whose first class is c.
  template <class Take>
  GUMBEL_EXT_DEVICE void each(Take take) const {
    if constexpr (kGroups > 0) {
#pragma unroll
      for (int k = 0; k < kGroups; ++k) {
        if (rank_ + k * threads_ < row_.place.groups) {
          take(k, (rank_ + k * threads_) * kRowGroup, l_[k], d_[k]);
        }
      }
    } else {
      for (int g = rank_; g < row_.place.groups; g += threads_) {
        Scalar l[kRowGroup], d[kRowGroup];
        row_.load(g * kRowGroup, l, d);
        take(0, g * kRowGroup, l, d);
      }
    }
  }

 private:
  int rank_, threads_;
  const EstimatorRow<Scalar>& row_;
  Scalar l_[kGroups > 0 ? kGroups : 1][kRowGroup], d_[kGroups > 0 ? kGroups : 1][kRowGroup];
};

// 2^(distance * scale), for distances from the largest.
template <class Scalar>
GUMBEL_EXT_DEVICE Scalar power(Scalar distance, Scalar scale) {
  return power_of_two(multiply(distance, scale));
}
template <class Scalar>
constexpr Scalar kLog2E = Scalar(1.4426950408889634074);

// The softmax of a row, p, and if need be the one with a temperature, q; `top` may rise on the way.
template <class Scalar, bool kWithQ>
struct RowSums {
  Scalar top;
  SoftmaxSums<Scalar> p, q;

  GUMBEL_EXT_DEVICE void add_class(Scalar l, Scalar d, Scalar scale) {
    p.take(power(add(l, -top), kLog2E<Scalar>), d);
    if constexpr (kWithQ) q.take(power(add(l, -top), scale), d);
  }
  GUMBEL_EXT_DEVICE RowSums rescaled(Scalar larger, Scalar scale) const {
    if (top == larger) return *this;
    const Scalar apart = add(top, -larger);
    return {larger, p.times(power(apart, kLog2E<Scalar>)),
            kWithQ ? q.times(power(apart, scale)) : q};
  }
};
template <class Scalar>
struct MergeRowSums {
  Scalar scale;

  template <bool kWithQ>
  GUMBEL_EXT_DEVICE RowSums<Scalar, kWithQ> operator()(const RowSums<Scalar, kWithQ>& a,
                                                       const RowSums<Scalar, kWithQ>& b) const {
    const Scalar top = Larger()(a.top, b.top);
    const RowSums<Scalar, kWithQ> x = a.rescaled(top, scale), y = b.rescaled(top, scale);
    return {top, AddSums()(x.p, y.p), AddSums()(x.q, y.q)};
  }
};

template <class Scalar, class Team, int kGroups>
GUMBEL_EXT_DEVICE Scalar top_of_row(Team& team, const RowGroups<Scalar, Team, kGroups>& groups) {
  Scalar top = -infinity<Scalar>();
  // A NaN is never larger. It comes to light in the sums.
  groups.each([&](int, int, const Scalar(&l)[kRowGroup], const Scalar(&)[kRowGroup]) {
#pragma unroll
    for (int v = 0; v < kRowGroup; ++v) top = Larger()(top, l[v]);
  });
  return team.reduce(top, Larger());
}

// Calls take(l, d) for the classes that can be chosen, but not for the one that was.
template <class Scalar, class Team, int kGroups, class Take>
GUMBEL_EXT_DEVICE void each_other(const EstimatorRow<Scalar>& row,
                                  const RowGroups<Scalar, Team, kGroups>& groups, Take take) {
  groups.each([&](int, int c, const Scalar(&l)[kRowGroup], const Scalar(&d)[kRowGroup]) {
#pragma unroll
    for (int v = 0; v < kRowGroup; ++v) {
      if (l[v] != -infinity<Scalar>() && c + v != row.index) take(l[v], d[v]);
    }
  });
}

// Rows in registers are looked through for their largest first, which costs less than to rescale.
template <bool kWithQ, class Scalar, class Team, int kGroups>
GUMBEL_EXT_DEVICE RowSums<Scalar, kWithQ> sums_of_row(
    Team& team, const EstimatorRow<Scalar>& row, const RowGroups<Scalar, Team, kGroups>& groups,
    Scalar scale) {
  RowSums<Scalar, kWithQ> sums{-infinity<Scalar>(), {0, 0}, {0, 0}};
  if constexpr (kGroups > 0) {
    sums.top = top_of_row(team, groups);
    each_other(row, groups, [&](Scalar l, Scalar d) { sums.add_class(l, d, scale); });
    sums.p = team.reduce(sums.p, AddSums());
    if constexpr (kWithQ) sums.q = team.reduce(sums.q, AddSums());
    return sums;
  } else {
    groups.each([&](int, int c, const Scalar(&l)[kRowGroup], const Scalar(&d)[kRowGroup]) {
#pragma unroll
      for (int v = 0; v < kRowGroup; ++v) {
        // Nothing less nothing would be NaN.
        if (l[v] == -infinity<Scalar>()) continue;
        if (l[v] > sums.top) sums = sums.rescaled(l[v], scale);
        if (c + v != row.index) sums.add_class(l[v], d[v], scale);
      }
    });
    return team.reduce(sums, MergeRowSums<Scalar>{scale});
  }
}

// A softmax: the probability of the chosen class, sum y d, and what turns an exponential into y.
template <class Scalar>
struct Softmax {
  Scalar chosen, dot, factor;

  GUMBEL_EXT_DEVICE static Softmax of(const SoftmaxSums<Scalar>& others, Scalar chosen) {
    const Scalar factor = reciprocal(add(others.sum, chosen));
    return {multiply(chosen, factor), multiply(others.dot, factor), factor};
  }
};

// -log(1 - p) / p with p the chosen class's probability, a little below it: finite at 1. `others`
// is 1 less the probability itself.
template <class Scalar>
GUMBEL_EXT_DEVICE Scalar gap_of(Scalar probability, Scalar others) {
  using F = std::conditional_t<sizeof(Scalar) == 4, DeviceF32, DeviceF64>;
  using N = Numerics<Scalar>;
  constexpr Scalar kLess = Scalar(1e-5);
  const Scalar p = multiply(probability, Scalar(1) - kLess);
  if (p > Scalar(0.5)) return -natural_log(multiply_add(probability, kLess, others)) / p;
  const Scalar series = polynomial(F{p}, F{multiply(p, p)}, Int<N::log1m_terms>(), [](int i) {
                          return N::log1m(i);
                        }).v;
  return multiply_add(p, series, Scalar(1));
}

// The estimators: what each sums over a row, and what it makes of a class.

// out_j = p_j d_j / 2,  out_i = -<p, d> / 2
template <class Scalar>
struct Zgr {
  Softmax<Scalar> p;
  Scalar top;

  template <class Team, int kGroups>
  GUMBEL_EXT_DEVICE static Zgr of(Team& team, const EstimatorParams&,
                                  const EstimatorRow<Scalar>& row,
                                  const RowGroups<Scalar, Team, kGroups>& groups) {
    const auto sums = sums_of_row<false>(team, row, groups, Scalar(0));
    const Scalar chosen = power(add(row.chosen_logit, -sums.top), kLog2E<Scalar>);
    return {Softmax<Scalar>::of(sums.p, chosen), sums.top};
  }
  GUMBEL_EXT_DEVICE Scalar check() const { return p.factor; }
  GUMBEL_EXT_DEVICE Scalar other(Scalar l, Scalar d) const {
    const Scalar e = power(add(l, -top), kLog2E<Scalar>);
    return multiply(multiply(e, multiply(p.factor, Scalar(0.5))), d);
  }
  GUMBEL_EXT_DEVICE Scalar chosen() const { return multiply(Scalar(-0.5), p.dot); }
};

// With s = <q, d> and t = <p, d>:
// out_j = q_j (d_j - s / 2) - p_j (d_j - t) / 2,  out_i = -(1 + q_i) s / 2 + p_i t / 2
template <class Scalar>
struct ReinMax {
  Softmax<Scalar> p, q;
  Scalar top, scale;

  template <class Team, int kGroups>
  GUMBEL_EXT_DEVICE static ReinMax of(Team& team, const EstimatorParams&,
                                      const EstimatorRow<Scalar>& row,
                                      const RowGroups<Scalar, Team, kGroups>& groups) {
    const Scalar scale = clamped(kLog2E<Scalar> / row.place.tau);
    const auto sums = sums_of_row<true>(team, row, groups, scale);
    const Scalar distance = add(row.chosen_logit, -sums.top);
    return {Softmax<Scalar>::of(sums.p, power(distance, kLog2E<Scalar>)),
            Softmax<Scalar>::of(sums.q, power(distance, scale)), sums.top, scale};
  }
  GUMBEL_EXT_DEVICE Scalar check() const { return add(p.factor, q.factor); }
  GUMBEL_EXT_DEVICE Scalar other(Scalar l, Scalar d) const {
    const Scalar distance = add(l, -top);
    const Scalar of_q = multiply(power(distance, scale), q.factor),
                 of_p = multiply(power(distance, kLog2E<Scalar>), p.factor);
    return multiply_add(of_q, multiply_add(Scalar(-0.5), q.dot, d),
                        -multiply(multiply(Scalar(0.5), of_p), add(d, -p.dot)));
  }
  GUMBEL_EXT_DEVICE Scalar chosen() const {
    return multiply(Scalar(0.5),
                    add(multiply(p.chosen, p.dot), -multiply_add(q.chosen, q.dot, q.dot)));
  }
};

// y the softmax of m / tau, m_i = top and m_j = min(l_j, top - gap):  out = y o (d - <y, d>) / tau
template <class Scalar>
struct Gapped {
  Softmax<Scalar> y;
  Scalar top, gap, scale, inverse_tau;

  template <class Team, int kGroups>
  GUMBEL_EXT_DEVICE static Gapped of(Team& team, const EstimatorParams& params,
                                     const EstimatorRow<Scalar>& row,
                                     const RowGroups<Scalar, Team, kGroups>& groups) {
    Gapped g{};
    g.scale = clamped(kLog2E<Scalar> / row.place.tau);
    g.inverse_tau = clamped(Scalar(1) / row.place.tau);
    g.top = top_of_row(team, groups);
    // In a row without a softmax NaN, as is that of a class that is none.
    const Scalar chosen = power(add(row.chosen_logit, -g.top), kLog2E<Scalar>);
    if constexpr (sizeof(Scalar) == 4) {
      g.gap = params.gap_float32;
    } else {
      g.gap = params.gap;
    }
    SoftmaxSums<Scalar> sums{0, 0};
    if (g.gap == 0) {
      Scalar others = 0;
      each_other(row, groups, [&](Scalar l, Scalar) {
        others = add(others, power(add(l, -g.top), kLog2E<Scalar>));
      });
      others = team.reduce(others, Sum());
      const Scalar factor = reciprocal(add(others, chosen));
      g.gap = gap_of(multiply(chosen, factor), multiply(others, factor));
    }
    each_other(row, groups, [&](Scalar l, Scalar d) { sums.take(g.exponential(l), d); });
    g.y = Softmax<Scalar>::of(team.reduce(sums, AddSums()), Scalar(1));
    g.y.factor = add(g.y.factor, multiply(chosen, Scalar(0)));
    return g;
  }
  GUMBEL_EXT_DEVICE Scalar exponential(Scalar l) const {
    const Scalar distance = add(l, -top);
    return power(distance > -gap ? -gap : distance, scale);
  }
  GUMBEL_EXT_DEVICE Scalar check() const { return y.factor; }
  GUMBEL_EXT_DEVICE Scalar other(Scalar l, Scalar d) const {
    return multiply(multiply(multiply(exponential(l), y.factor), add(d, -y.dot)), inverse_tau);
  }
  GUMBEL_EXT_DEVICE Scalar chosen() const {
    return multiply(-multiply(y.chosen, y.dot), inverse_tau);
  }
};

// A row that the mask forbids has no gradient; one without a softmax, or a temperature, is NaN.
template <class Scalar>
GUMBEL_EXT_DEVICE void fill_group(const EstimatorRow<Scalar>& row, bool bad,
                                  Scalar (&out)[kRowGroup]) {
  if (!bad && !row.forbidden) return;
#pragma unroll
  for (int v = 0; v < kRowGroup; ++v) out[v] = row.forbidden ? Scalar(0) : quiet_nan<Scalar>();
}

template <class Scalar, class Team, template <class> class Rule, int kGroups>
GUMBEL_EXT_KERNEL(Team::kBlockThreads, resident_threads<Scalar>((2 * kGroups + 1) * kRowGroup))
estimator_kernel(const GUMBEL_EXT_CONSTANT EstimatorParams p) {
  Team team;
  for (std::int64_t first = team.first_row(); first < p.rows; first += team.row_step()) {
    const auto row = EstimatorRow<Scalar>::of(p, first + team.row_in_block());
    const RowGroups<Scalar, Team, kGroups> groups(team, row);
    const auto rule = Rule<Scalar>::of(team, p, row, groups);
    const bool bad = !(rule.check() < infinity<Scalar>());
    groups.each([&](int, int c, const Scalar(&l)[kRowGroup], const Scalar(&d)[kRowGroup]) {
      Scalar out[kRowGroup];
#pragma unroll
      for (int v = 0; v < kRowGroup; ++v) {
        out[v] = c + v == row.index ? rule.chosen() : rule.other(l[v], d[v]);
      }
      fill_group(row, bad, out);
      store_results(p.grad_logits, p.type, row.place.row * p.classes, c, row.place.classes, out);
    });
  }
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
