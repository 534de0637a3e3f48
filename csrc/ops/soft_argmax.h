// The expected position under softmax(beta logits).
#pragma once

#include "../arguments.h"
#include "../op.h"

namespace gumbel_ext {

// Coordinates that a class may have.
constexpr int64_t kMaxCoordinates = 3;

// `positions` are [coordinates, classes]. row_state has for each row, in float64: the likeliest
// class, its logit, the sum of the weights relative to it, and for each coordinate the expected
// position less that of the class.
struct SoftArgmax {
  static constexpr const char* schema =
      "soft_argmax(Tensor logits, float beta, Tensor? beta_tensor, int dim, Tensor positions) "
      "-> (Tensor expected, Tensor row_state)";
  static constexpr bool draws = false;
  static constexpr Autocast autocast = Autocast::kNone;
  using Result = std::tuple<at::Tensor, at::Tensor>;
  void check();
  Result prepare();

  at::Tensor logits;
  double beta;
  OptionalTensor beta_tensor;
  int64_t dim;
  at::Tensor positions;
};

struct SoftArgmaxBackward {
  static constexpr const char* schema =
      "soft_argmax_backward(Tensor grad, Tensor logits, Tensor row_state, float beta, "
      "Tensor? beta_tensor, int dim, Tensor positions, bool beta_grad) "
      "-> (Tensor grad_logits, Tensor grad_beta)";
  static constexpr bool draws = false;
  static constexpr Autocast autocast = Autocast::kNone;
  using Result = std::tuple<at::Tensor, at::Tensor>;
  void check();
  Result prepare();

  at::Tensor grad, logits, row_state;
  double beta;
  OptionalTensor beta_tensor;
  int64_t dim;
  at::Tensor positions;
  bool beta_grad;
};

}  // namespace gumbel_ext
