// The log density of the Concrete (Gumbel-softmax) distribution.
#pragma once

#include "../arguments.h"
#include "../op.h"

namespace gumbel_ext {

struct ConcreteLogProb {
  static constexpr const char* schema =
      "concrete_log_prob(Tensor value, Tensor logits, float tau, Tensor? tau_tensor, int dim, "
      "bool log_space) -> Tensor";
  static constexpr bool draws = false;
  // Computes in float32 and returns it anyway.
  static constexpr Autocast autocast = Autocast::kNone;
  using Result = at::Tensor;
  Result prepare();

  at::Tensor value, logits;
  double tau;
  OptionalTensor tau_tensor;
  int64_t dim;
  bool log_space;
};

// Gradients have the broadcast shape; those that are not wanted are empty.
struct ConcreteLogProbBackward {
  static constexpr const char* schema =
      "concrete_log_prob_backward(Tensor grad, Tensor value, Tensor logits, float tau, "
      "Tensor? tau_tensor, int dim, bool log_space, bool value_grad, bool logits_grad, "
      "bool tau_grad) -> (Tensor grad_value, Tensor grad_logits, Tensor grad_tau)";
  static constexpr bool draws = false;
  static constexpr Autocast autocast = Autocast::kNone;
  using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
  Result prepare();

  at::Tensor grad, value, logits;
  double tau;
  OptionalTensor tau_tensor;
  int64_t dim;
  bool log_space;
  bool value_grad, logits_grad, tau_grad;
};

// value and logits as they meet: views of one shape that are not copied, and the dimension of the
// classes counted from the front.
struct DensityOperands {
  at::Tensor value, logits;  // of the broadcast shape
  int64_t dim;
  // Whether an operand is smaller than the shape they meet in. Its gradient is then summed, which
  // is done in the accumulate type.
  bool value_expanded, logits_expanded;

  // Checks the arguments.
  explicit DensityOperands(const ConcreteLogProb& a);
  explicit DensityOperands(const ConcreteLogProbBackward& a);

  at::ScalarType compute_type() const { return compute_dtype(value.scalar_type()); }
  at::Tensor empty_density() const;
  std::tuple<at::Tensor, at::Tensor, at::Tensor> empty_gradients(
      const ConcreteLogProbBackward& a) const;

 private:
  template <class Op>
  void set(const Op& a);
};

}  // namespace gumbel_ext
