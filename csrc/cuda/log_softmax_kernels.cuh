// The log-space sample and its gradient: a team of threads a row.
#pragma once

#include "log_softmax_params.h"
#include "row_operands.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

using cuda::LogGradientParams;
using cuda::LogSampleParams;

// Where the logits of a row lie, and where its results go: two views of the same groups.
struct LogSampleRow {
  RowView logits, log_y;

  template <class T>
  GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY static LogSampleRow of(const LogSampleParams& p,
                                                                  std::int64_t row) {
    LogSampleRow r;
    r.logits = RowView::of<T>(p.rows, row);
    r.log_y = r.logits;
    r.log_y.offset = r.logits.row * p.rows.classes;
    const T* first = static_cast<const T*>(p.log_y) + (r.log_y.offset - r.log_y.lead);
    r.log_y.vector = reinterpret_cast<std::uintptr_t>(first) % 16 == 0;
    return r;
  }
};

// log y = distance - shift, `distance` from the largest and over tau; or `fill` in a row that has
// no such values.
template <class Scalar>
struct LogSampleResult {
  Scalar top, inverse_tau, shift, fill;
  bool filled;

  template <int count>
  GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY void turn(Scalar (&z)[count]) const {
#pragma unroll
    for (int v = 0; v < count; ++v) {
      z[v] = filled ? fill : add(multiply(add(z[v], -top), inverse_tau), -shift);
    }
  }
};

template <class Scalar>
GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY Scalar fill_of(RowKind kind) {
  return kind == RowKind::kForbidden ? -infinity<Scalar>() : quiet_nan<Scalar>();
}

// Rows that stay in registers: noise is made once.
template <class T, class Team, int kGroups>
GUMBEL_EXT_KERNEL(Team::kBlockThreads, resident_threads<T>(kGroups* Element<T>::kGroup))
log_sample_rows_kernel(const GUMBEL_EXT_CONSTANT LogSampleParams p) {
  using Scalar = typename Element<T>::Scalar;
  constexpr int kGroup = Element<T>::kGroup;
  Team team;
  const RandomState state = read_state(p.rows.random);
  record_state(state, p.rows.used_state);
  NoiseSource noise(state);
  const std::int64_t rows = p.rows.outer * p.rows.inner;
  for (std::int64_t first = team.first_row(); first < rows; first += team.row_step()) {
    const LogSampleRow row = LogSampleRow::of<T>(p, first + team.row_in_block());
    RawGroup<T> logits[kGroups];
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      logits[k].load(p.rows.logits, row.logits,
                     GroupSpan::of<T>(row.logits, team.rank() + k * team.threads()),
                     narrowed<T>(-infinity<Scalar>()));
    }
    Scalar z[kGroups][kGroup], top = -infinity<Scalar>();
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      noisy_group(p.rows, row.logits,
                  GroupSpan::of<T>(row.logits, team.rank() + k * team.threads()), logits[k], noise,
                  z[k]);
      // A NaN is never larger. It comes to light in the sum.
#pragma unroll
      for (int v = 0; v < kGroup; ++v) top = Larger()(top, z[k][v]);
    }
    top = team.reduce(top, Larger());
    const InverseTau<Scalar> tau = inverse_tau<Scalar>(p.rows, row.logits.row);
    Scalar sum = 0;
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
#pragma unroll
      for (int v = 0; v < kGroup; ++v) {
        sum = add(sum, power_of_two(multiply(add(z[k][v], -top), tau.exponent_scale)));
      }
    }
    sum = team.reduce(sum, Sum());
    LogSampleResult<Scalar> result{top, tau.inverse, natural_log(sum), 0, sum != sum};
    if (team.any(result.filled)) {
      int ignored = kNoIndex;
      result.fill = fill_of<Scalar>(settle_row<T>(team, p.rows, row.logits, &ignored));
    }
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      result.turn(z[k]);
      store_group<T>(p.log_y, row.log_y,
                     GroupSpan::of<T>(row.log_y, team.rank() + k * team.threads()), z[k]);
    }
  }
}

// Rows of any length: read twice, and their noise made twice.
template <class T>
GUMBEL_EXT_KERNEL(256, resident_threads<T>(Element<T>::kGroup))
log_sample_stream_kernel(const GUMBEL_EXT_CONSTANT LogSampleParams p) {
  using Scalar = typename Element<T>::Scalar;
  constexpr int kGroup = Element<T>::kGroup;
  BlockTeam<256> team;
  const RandomState state = read_state(p.rows.random);
  record_state(state, p.rows.used_state);
  NoiseSource noise(state);
  const std::int64_t rows = p.rows.outer * p.rows.inner;
  for (std::int64_t r = team.first_row(); r < rows; r += team.row_step()) {
    const LogSampleRow row = LogSampleRow::of<T>(p, r);
    const InverseTau<Scalar> tau = inverse_tau<Scalar>(p.rows, r);
    const MergeSums<Scalar> merge{tau.exponent_scale};
    RunningSum<Scalar> total{Best<Scalar>::none(), Scalar(0)};
    for_noisy_groups<T, 1>(
        team, p.rows, row.logits, 0, row.logits.groups, noise,
        [&](const GroupSpan& span, const Scalar(&z)[kGroup]) {
          const RunningSum<Scalar> before = total;
          take_group(z, span.c, total.best);
          if (total.best.index != before.best.index) {
            total.sum = merge.rescaled(before, total.best.value);
          }
          // With nothing above -inf yet the differences would be NaN.
          if (total.best.value == -infinity<Scalar>()) return;
#pragma unroll
          for (int v = 0; v < kGroup; ++v) {
            total.sum =
                add(total.sum,
                    power_of_two(multiply(add(z[v], -total.best.value), tau.exponent_scale)));
          }
        });
    total = team.reduce(total, merge);
    LogSampleResult<Scalar> result{
        total.best.value, tau.inverse, natural_log(total.sum), 0,
        !(total.sum < infinity<Scalar>()) || total.best.index == kNoIndex};
    if (result.filled) {
      int ignored = kNoIndex;
      result.fill = fill_of<Scalar>(settle_row<T>(team, p.rows, row.logits, &ignored));
    }
    for_noisy_groups<T, 1>(team, p.rows, row.logits, 0, row.logits.groups, noise,
                           [&](const GroupSpan& span, Scalar(&z)[kGroup]) {
                             GroupSpan there = span;
                             there.vector =
                                 row.log_y.vector && span.c >= 0 && span.c <= span.classes - kGroup;
                             result.turn(z);
                             store_group<T>(p.log_y, row.log_y, there, z);
                           });
  }
}

// What the gradient sums over a row, in one pass: the likeliest class, and sums over the others.
template <class Scalar>
struct LogGradientSums {
  Best<Scalar> best;   // of log y
  Scalar grad;         // of that class
  Scalar rest, grads;  // of the others: y, and their gradients

  GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY static LogGradientSums none() {
    return {Best<Scalar>::none(), 0, 0, 0};
  }
};
struct MergeLogGradients {
  template <class Scalar>
  GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY LogGradientSums<Scalar> operator()(
      const LogGradientSums<Scalar>& a, const LogGradientSums<Scalar>& b) const {
    const Best<Scalar> best = BetterOf()(a.best, b.best);
    const bool a_wins = best.index == a.best.index;
    const Scalar beaten = a_wins ? b.best.value : a.best.value;
    const Scalar its_grad = a_wins ? b.grad : a.grad;
    return {best, a_wins ? a.grad : b.grad, add(add(a.rest, b.rest), exp_nonpositive(beaten)),
            add(add(a.grads, b.grads), beaten == -infinity<Scalar>() ? Scalar(0) : its_grad)};
  }
};

// With k the likeliest class, and sums over the others only,
//     dz_i = dy_i - y_i (dy_k + sum_j dy_j),    dz_k = dy_k sum_j y_j - y_k sum_j dy_j
// equal in exact arithmetic to dy - y sum(dy), and 1 - y_k does not cancel to nothing as y_k nears
// 1. Classes of log y = -inf take no part. The second read of a row is from cache.
template <class Scalar, class Team>
GUMBEL_EXT_KERNEL(Team::kBlockThreads, resident_threads<Scalar>(kRowGroup))
log_gradient_kernel(const GUMBEL_EXT_CONSTANT LogGradientParams p) {
  const Scalar lowest = -infinity<Scalar>();
  Team team;
  for (std::int64_t first = team.first_row(); first < p.rows; first += team.row_step()) {
    const OperandRows<Scalar> row = OperandRows<Scalar>::of(p, first + team.row_in_block());
    const auto grads = OperandRow<Scalar>::of(p, p.grad, p.type, row.row);
    const auto log_ys = OperandRow<Scalar>::of(p, p.log_y, kTypeOf<Scalar>, row.row);
    LogGradientSums<Scalar> sums = LogGradientSums<Scalar>::none();
    for (int g = team.rank(); g < row.groups; g += team.threads()) {
      Scalar x[kRowGroup], grad[kRowGroup];
      log_ys.load(g * kRowGroup, row.classes, lowest, x);
      grads.load(g * kRowGroup, row.classes, Scalar(0), grad);
#pragma unroll
      for (int v = 0; v < kRowGroup; ++v) {
        if (x[v] == lowest) continue;
        sums = MergeLogGradients()(sums, {{x[v], g * kRowGroup + v}, grad[v], 0, 0});
      }
    }
    sums = team.reduce(sums, MergeLogGradients());
    const bool nan = sums.best.is_nan(), nothing = sums.best.index == kNoIndex;
    const Scalar all = add(sums.grad, sums.grads), inverse = clamped(Scalar(1) / row.tau);
    const Scalar of_best = add(multiply(sums.grad, sums.rest),
                               -multiply(exp_nonpositive(sums.best.value), sums.grads));
    Scalar log_sum = 0;
    for (int g = team.rank(); g < row.groups; g += team.threads()) {
      Scalar x[kRowGroup], dz[kRowGroup];
      log_ys.load(g * kRowGroup, row.classes, lowest, x);
      grads.load(g * kRowGroup, row.classes, Scalar(0), dz);
#pragma unroll
      for (int v = 0; v < kRowGroup; ++v) {
        const bool absent = x[v] == lowest;
        dz[v] = add(dz[v], -multiply(exp_nonpositive(x[v]), all));
        if (g * kRowGroup + v == sums.best.index) dz[v] = of_best;
        if (!absent) log_sum = multiply_add(x[v], dz[v], log_sum);
        dz[v] = absent ? Scalar(0) : multiply(dz[v], inverse);
        if (nan) dz[v] = quiet_nan<Scalar>();
      }
      store_results(p.grad_logits, p.type, row.row * p.classes, g * kRowGroup, row.classes, dz);
    }
    if (p.grad_tau == nullptr) continue;
    log_sum = team.reduce(log_sum, Sum());
    if (team.rank() == 0 && row.exists) {
      static_cast<Scalar*>(p.grad_tau)[row.row] =
          nan ? quiet_nan<Scalar>() : (nothing ? Scalar(0) : multiply(-log_sum, inverse));
    }
  }
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
