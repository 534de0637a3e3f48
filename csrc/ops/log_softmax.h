// The logarithm of the soft sample.
#pragma once

#include "../arguments.h"
#include "../op.h"

namespace gumbel_ext {

struct GumbelLogSoftmax {
  static constexpr const char* schema =
      "gumbel_log_softmax(Tensor logits, float tau, Tensor? tau_tensor, int dim, Tensor? mask, "
      "Generator? generator, Tensor? rng_state, SymInt[]? positions=None) "
      "-> (Tensor log_y, Tensor used_rng_state)";
  static constexpr bool draws = true;
  static constexpr Autocast autocast = Autocast::kFloat32;
  using Result = std::tuple<at::Tensor, at::Tensor>;
  Result prepare();

  at::Tensor logits;
  double tau;
  OptionalTensor tau_tensor;
  int64_t dim;
  OptionalTensor mask;
  std::optional<at::Generator> generator;
  OptionalTensor rng_state;
  at::OptionalSymIntArrayRef positions;
};

// log_y is of the accumulate type of grad.
struct GumbelLogSoftmaxBackward {
  static constexpr const char* schema =
      "gumbel_log_softmax_backward(Tensor grad, Tensor log_y, float tau, Tensor? tau_tensor, "
      "int dim, bool tau_grad) -> (Tensor grad_logits, Tensor grad_tau)";
  static constexpr bool draws = false;
  static constexpr Autocast autocast = Autocast::kNone;
  using Result = std::tuple<at::Tensor, at::Tensor>;
  void check();
  Result prepare();

  at::Tensor grad, log_y;
  double tau;
  OptionalTensor tau_tensor;
  int64_t dim;
  bool tau_grad;
};

}  // namespace gumbel_ext
