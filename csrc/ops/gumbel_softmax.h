// The Gumbel-softmax sample, its index alone, and the backward ops.
#pragma once

#include "../arguments.h"
#include "../op.h"

namespace gumbel_ext {

struct GumbelSoftmax {
  static constexpr const char* schema =
      "gumbel_softmax(Tensor logits, float tau, Tensor? tau_tensor, bool hard, int dim, "
      "Tensor? mask, bool return_index, Generator? generator, Tensor? rng_state, "
      "SymInt[]? positions=None) -> (Tensor y, Tensor index, Tensor used_rng_state)";
  static constexpr bool draws = true;
  static constexpr Autocast autocast = Autocast::kFloat32;
  using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
  Result prepare();
  Result allocate() const;  // for arguments that were checked

  at::Tensor logits;
  double tau = 1;
  OptionalTensor tau_tensor;
  bool hard = false;
  int64_t dim = -1;
  OptionalTensor mask;
  bool return_index = false;
  std::optional<at::Generator> generator;
  OptionalTensor rng_state;
  at::OptionalSymIntArrayRef positions;
};

struct GumbelArgmax {
  static constexpr const char* schema =
      "gumbel_argmax(Tensor logits, int dim, bool keepdim, Tensor? mask, Generator? generator, "
      "Tensor? rng_state, SymInt[]? positions=None) -> Tensor";
  static constexpr bool draws = true;
  static constexpr Autocast autocast = Autocast::kNone;
  using Result = at::Tensor;
  Result prepare();
  Result allocate() const;

  at::Tensor logits;
  int64_t dim = -1;
  bool keepdim = false;
  OptionalTensor mask;
  std::optional<at::Generator> generator;
  OptionalTensor rng_state;
  at::OptionalSymIntArrayRef positions;
};

// From y as the soft forward returned it, and its index.
struct GumbelSoftmaxBackward {
  static constexpr const char* schema =
      "gumbel_softmax_backward(Tensor grad, Tensor y, Tensor index, float tau, "
      "Tensor? tau_tensor, int dim, bool tau_grad) -> (Tensor grad_logits, Tensor grad_tau)";
  static constexpr bool draws = false;
  static constexpr Autocast autocast = Autocast::kNone;
  using Result = std::tuple<at::Tensor, at::Tensor>;
  Result prepare();

  at::Tensor grad, y, index;
  double tau;
  OptionalTensor tau_tensor;
  int64_t dim;
  bool tau_grad;
};

// Without y: the noise is made again from rng_state, and y from it.
struct GumbelSoftmaxHardBackward {
  static constexpr const char* schema =
      "gumbel_softmax_hard_backward(Tensor grad, Tensor logits, Tensor index, float tau, "
      "Tensor? tau_tensor, int dim, Tensor? mask, Tensor rng_state, bool tau_grad, "
      "SymInt[]? positions=None) -> (Tensor grad_logits, Tensor grad_tau)";
  static constexpr bool draws = false;
  static constexpr Autocast autocast = Autocast::kNone;
  using Result = std::tuple<at::Tensor, at::Tensor>;
  Result prepare();

  at::Tensor grad, logits, index;
  double tau;
  OptionalTensor tau_tensor;
  int64_t dim;
  OptionalTensor mask;
  at::Tensor rng_state;
  bool tau_grad;
  at::OptionalSymIntArrayRef positions;
};

// A backward from y as the kernels of both take it: y in the place of logits.
inline GumbelSoftmaxHardBackward from_y(const GumbelSoftmaxBackward& a) {
  return {a.grad, a.y, a.index, a.tau, a.tau_tensor, a.dim, std::nullopt, at::Tensor(), a.tau_grad};
}

// The gradients of logits and of tau, of its value t, in PyTorch's ops: differentiable, and on any
// device.
std::tuple<at::Tensor, at::Tensor> softmax_gradients(const at::Tensor& grad, const at::Tensor& y,
                                                     const at::Tensor& index, const at::Tensor& t,
                                                     int64_t dim, bool tau_grad);

}  // namespace gumbel_ext
