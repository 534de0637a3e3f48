// The gradient of the straight-through softmax without noise: a team of threads a row. The sample
// itself is a hard one without noise.
#pragma once

#include "row_operands.cuh"
#include "straight_through_params.h"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

using cuda::StraightThroughParams;

// Logits of a row, -inf where the mask forbids.
template <class Scalar>
struct ScoreRow {
  OperandRow<Scalar> logits;
  const std::uint8_t* allowed;  // null: every class
  std::int64_t class_stride;

  GUMBEL_EXT_DEVICE static ScoreRow of(const StraightThroughParams& p, std::int64_t row) {
    ScoreRow s{OperandRow<Scalar>::of(p, p.logits, p.type, row), nullptr, 0};
    if (p.mask.data != nullptr) {
      const auto mask = OperandRow<Scalar>::of(p, p.mask, p.type, row);
      s.allowed = static_cast<const std::uint8_t*>(mask.data) + mask.offset;
      s.class_stride = mask.class_stride;
    }
    return s;
  }
  GUMBEL_EXT_DEVICE bool allows(int c) const {
    return allowed == nullptr || allowed[c * class_stride] != 0;
  }
  GUMBEL_EXT_DEVICE void load(int c, int classes, Scalar (&z)[kRowGroup]) const {
    logits.load(c, classes, -infinity<Scalar>(), z);
    if (allowed == nullptr) return;
#pragma unroll
    for (int v = 0; v < kRowGroup; ++v) {
      if (v < classes - c && !allows(c + v)) z[v] = -infinity<Scalar>();
    }
  }
};

// With h = dy - dy[index], d = l - l[index] and y = softmax(l / tau):
//     w = y (h - sum h y),    dl = w / tau,    dtau = -sum w d / tau^2
// in which h and d are shifts that change nothing in exact arithmetic, but at low tau the entries
// at the index are those that would cancel. The second read of a row is from cache.
template <class Scalar, class Team>
GUMBEL_EXT_KERNEL(Team::kBlockThreads, resident_threads<Scalar>(2 * kRowGroup))
straight_through_backward_kernel(const GUMBEL_EXT_CONSTANT StraightThroughParams p) {
  Team team;
  for (std::int64_t first = team.first_row(); first < p.rows; first += team.row_step()) {
    const OperandRows<Scalar> row = OperandRows<Scalar>::of(p, first + team.row_in_block());
    const auto scores = ScoreRow<Scalar>::of(p, row.row);
    const auto grads = OperandRow<Scalar>::of(p, p.grad, p.type, row.row);
    const std::int64_t index = p.index[row.row];
    const bool forbidden = index < 0;
    // An index that is none of a forward's makes its row NaN.
    Scalar top = forbidden ? Scalar(0) : quiet_nan<Scalar>(), shift = 0;
    if (!forbidden && index < row.classes) {
      top = scores.logits.at(static_cast<int>(index));
      shift = grads.at(static_cast<int>(index));
    }
    const Scalar scale = clamped(Scalar(1.4426950408889634074) / row.tau),
                 inverse = clamped(Scalar(1) / row.tau);
    SoftmaxSums<Scalar> sums{0, 0};
    for (int g = team.rank(); g < row.groups; g += team.threads()) {
      Scalar z[kRowGroup], h[kRowGroup];
      scores.load(g * kRowGroup, row.classes, z);
      grads.load(g * kRowGroup, row.classes, Scalar(0), h);
#pragma unroll
      for (int v = 0; v < kRowGroup; ++v) {
        const Scalar e = power_of_two(multiply(add(z[v], -top), scale));
        sums.take(e, add(h[v], -shift));
      }
    }
    sums = team.reduce(sums, AddSums());
    const Scalar factor = reciprocal(sums.sum), dot = multiply(sums.dot, factor);
    Scalar slope = 0;
    for (int g = team.rank(); g < row.groups; g += team.threads()) {
      Scalar z[kRowGroup], h[kRowGroup];
      scores.load(g * kRowGroup, row.classes, z);
      grads.load(g * kRowGroup, row.classes, Scalar(0), h);
#pragma unroll
      for (int v = 0; v < kRowGroup; ++v) {
        const Scalar distance = add(z[v], -top);
        const Scalar y = multiply(power_of_two(multiply(distance, scale)), factor);
        const Scalar w = multiply(y, add(add(h[v], -shift), -dot));
        // A class of probability 0 may be infinitely far.
        if (distance != -infinity<Scalar>()) slope = multiply_add(w, distance, slope);
        h[v] = forbidden ? Scalar(0) : multiply(w, inverse);
      }
      store_results(p.grad_logits, p.type, row.row * p.classes, g * kRowGroup, row.classes, h);
    }
    if (p.grad_tau == nullptr) continue;
    slope = team.reduce(slope, Sum());
    if (team.rank() == 0 && row.exists) {
      // In this order: at a low tau the sum is small and the inverse's square may be none.
      static_cast<Scalar*>(p.grad_tau)[row.row] =
          forbidden ? Scalar(0) : multiply(multiply(-slope, inverse), inverse);
    }
  }
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
