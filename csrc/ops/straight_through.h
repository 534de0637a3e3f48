// The one-hot vector of the largest logit, without noise, with the gradient of the softmax.
#pragma once

#include "../arguments.h"
#include "../op.h"
#include "gumbel_softmax.h"

namespace gumbel_ext {

struct StraightThroughSoftmax {
  static constexpr const char* schema =
      "straight_through_softmax(Tensor logits, float tau, Tensor? tau_tensor, int dim, "
      "Tensor? mask, bool return_index) -> (Tensor y, Tensor index)";
  static constexpr bool draws = false;
  static constexpr Autocast autocast = Autocast::kFloat32;
  using Result = std::tuple<at::Tensor, at::Tensor>;
  Result prepare();

  at::Tensor logits;
  double tau = 1;
  OptionalTensor tau_tensor;
  int64_t dim = -1;
  OptionalTensor mask;
  bool return_index = false;
};

struct StraightThroughSoftmaxBackward {
  static constexpr const char* schema =
      "straight_through_softmax_backward(Tensor grad, Tensor logits, Tensor index, float tau, "
      "Tensor? tau_tensor, int dim, Tensor? mask, bool tau_grad) "
      "-> (Tensor grad_logits, Tensor grad_tau)";
  static constexpr bool draws = false;
  static constexpr Autocast autocast = Autocast::kNone;
  using Result = std::tuple<at::Tensor, at::Tensor>;
  Result prepare();

  at::Tensor grad, logits, index;
  double tau;
  OptionalTensor tau_tensor;
  int64_t dim;
  OptionalTensor mask;
  bool tau_grad;
};

// A backward as the kernels of gumbel_softmax take it: without a state there is no noise.
inline GumbelSoftmaxHardBackward without_noise(const StraightThroughSoftmaxBackward& a) {
  return {a.grad, a.logits, a.index, a.tau, a.tau_tensor, a.dim, a.mask, at::Tensor(), a.tau_grad};
}

}  // namespace gumbel_ext
