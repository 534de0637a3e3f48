// The hard sample of gumbel_softmax with the gradients of other estimators. Each backward is a
// symmetric matrix of the row times grad.
#pragma once

#include "../arguments.h"
#include "gumbel_softmax.h"

namespace gumbel_ext {

struct GumbelRao {
  static constexpr const char* schema =
      "gumbel_rao(Tensor logits, float tau, Tensor? tau_tensor, SymInt k, int dim, Tensor? mask, "
      "bool return_index, Generator? generator, Tensor? rng_state) "
      "-> (Tensor y, Tensor index, Tensor used_rng_state)";
  static constexpr bool draws = true;
  static constexpr Autocast autocast = Autocast::kFloat32;
  using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
  Result prepare();

  at::Tensor logits;
  double tau;
  OptionalTensor tau_tensor;
  c10::SymInt k;
  int64_t dim;
  OptionalTensor mask;
  bool return_index;
  std::optional<at::Generator> generator;
  OptionalTensor rng_state;
};

// Conditional draw number n has the noise positions (1 + n) * numel + row * classes + class, rows
// counted with dim moved last.
struct GumbelRaoBackward {
  static constexpr const char* schema =
      "gumbel_rao_backward(Tensor grad, Tensor logits, Tensor index, float tau, "
      "Tensor? tau_tensor, SymInt k, int dim, Tensor? mask, Tensor rng_state) "
      "-> Tensor grad_logits";
  static constexpr bool draws = false;
  static constexpr Autocast autocast = Autocast::kNone;
  using Result = at::Tensor;
  Result prepare();

  at::Tensor grad, logits, index;
  double tau;
  OptionalTensor tau_tensor;
  c10::SymInt k;
  int64_t dim;
  OptionalTensor mask;
  at::Tensor rng_state;
};

struct Zgr {
  static constexpr const char* schema =
      "zgr(Tensor logits, int dim, Tensor? mask, bool return_index, Generator? generator, "
      "Tensor? rng_state, SymInt[]? positions=None) -> (Tensor y, Tensor index)";
  static constexpr bool draws = true;
  static constexpr Autocast autocast = Autocast::kFloat32;
  using Result = std::tuple<at::Tensor, at::Tensor>;
  Result prepare();

  at::Tensor logits;
  int64_t dim;
  OptionalTensor mask;
  bool return_index;
  std::optional<at::Generator> generator;
  OptionalTensor rng_state;
  at::OptionalSymIntArrayRef positions;
};

struct ZgrBackward {
  static constexpr const char* schema =
      "zgr_backward(Tensor grad, Tensor logits, Tensor index, int dim, Tensor? mask) "
      "-> Tensor grad_logits";
  static constexpr bool draws = false;
  static constexpr Autocast autocast = Autocast::kNone;
  using Result = at::Tensor;
  Result prepare();

  at::Tensor grad, logits, index;
  int64_t dim;
  OptionalTensor mask;
};

struct ReinMax {
  static constexpr const char* schema =
      "reinmax(Tensor logits, float tau, Tensor? tau_tensor, int dim, Tensor? mask, "
      "bool return_index, Generator? generator, Tensor? rng_state, SymInt[]? positions=None) "
      "-> (Tensor y, Tensor index)";
  static constexpr bool draws = true;
  static constexpr Autocast autocast = Autocast::kFloat32;
  using Result = std::tuple<at::Tensor, at::Tensor>;
  Result prepare();

  at::Tensor logits;
  double tau;
  OptionalTensor tau_tensor;
  int64_t dim;
  OptionalTensor mask;
  bool return_index;
  std::optional<at::Generator> generator;
  OptionalTensor rng_state;
  at::OptionalSymIntArrayRef positions;
};

struct ReinMaxBackward {
  static constexpr const char* schema =
      "reinmax_backward(Tensor grad, Tensor logits, Tensor index, float tau, "
      "Tensor? tau_tensor, int dim, Tensor? mask) -> Tensor grad_logits";
  static constexpr bool draws = false;
  static constexpr Autocast autocast = Autocast::kNone;
  using Result = at::Tensor;
  Result prepare();

  at::Tensor grad, logits, index;
  double tau;
  OptionalTensor tau_tensor;
  int64_t dim;
  OptionalTensor mask;
};

// Without a gap, that of the probability of the sample. A gap_tensor takes the place of gap.
struct GappedStraightThrough {
  static constexpr const char* schema =
      "gapped_straight_through(Tensor logits, float tau, Tensor? tau_tensor, float? gap, int dim, "
      "Tensor? mask, bool return_index, Generator? generator, Tensor? rng_state, "
      "SymInt[]? positions=None, Tensor? gap_tensor=None) -> (Tensor y, Tensor index)";
  static constexpr bool draws = true;
  static constexpr Autocast autocast = Autocast::kFloat32;
  using Result = std::tuple<at::Tensor, at::Tensor>;
  Result prepare();

  at::Tensor logits;
  double tau;
  OptionalTensor tau_tensor;
  std::optional<double> gap;
  int64_t dim;
  OptionalTensor mask;
  bool return_index;
  std::optional<at::Generator> generator;
  OptionalTensor rng_state;
  at::OptionalSymIntArrayRef positions;
  OptionalTensor gap_tensor;
};

struct GappedStraightThroughBackward {
  static constexpr const char* schema =
      "gapped_straight_through_backward(Tensor grad, Tensor logits, Tensor index, float tau, "
      "Tensor? tau_tensor, float? gap, int dim, Tensor? mask, Tensor? gap_tensor=None) "
      "-> Tensor grad_logits";
  static constexpr bool draws = false;
  static constexpr Autocast autocast = Autocast::kNone;
  using Result = at::Tensor;
  Result prepare();

  at::Tensor grad, logits, index;
  double tau;
  OptionalTensor tau_tensor;
  std::optional<double> gap;
  int64_t dim;
  OptionalTensor mask;
  OptionalTensor gap_tensor;
};

// The value of gap, read from gap_tensor if that is given: for kernels, as a device may have to be
// waited for.
template <class Op>
std::optional<double> gap_value(const Op& op) {
  return gap_value(name_of<Op>(), op.gap, op.gap_tensor);
}

// The sample that an estimator is a gradient of. It does not depend on the temperature.
template <class Estimator>
GumbelSoftmax hard_sample(const Estimator& e) {
  GumbelSoftmax sample;
  sample.logits = e.logits;
  sample.hard = true;
  sample.dim = e.dim;
  sample.mask = e.mask;
  sample.return_index = e.return_index;
  sample.generator = e.generator;
  sample.rng_state = e.rng_state;
  if constexpr (has_argument<Estimator>("positions")) sample.positions = e.positions;
  return sample;
}

}  // namespace gumbel_ext
