// The gradient of the log-space sample: a team of threads a row. The sample itself is a form of the
// soft one.
#pragma once

#include "log_softmax_params.h"
#include "row_operands.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

using cuda::LogGradientParams;

// What the gradient sums over a row, in one pass: the likeliest class, and sums over the others.
template <class Scalar>
struct LogGradientSums {
  Best<Scalar> best;   // of log y
  Scalar grad;         // of the likeliest class
  Scalar rest, grads;  // of the others: y, and their gradients

  GUMBEL_EXT_DEVICE static LogGradientSums none() { return {Best<Scalar>::none(), 0, 0, 0}; }
};
struct MergeLogGradients {
  template <class Scalar>
  GUMBEL_EXT_DEVICE LogGradientSums<Scalar> operator()(const LogGradientSums<Scalar>& a,
                                                       const LogGradientSums<Scalar>& b) const {
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
