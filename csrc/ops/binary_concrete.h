// The binary concrete: elementwise relaxed Bernoulli samples, and their noise.
#pragma once

#include "../arguments.h"
#include "../op.h"

namespace gumbel_ext {

struct BinaryConcrete {
  static constexpr const char* schema =
      "binary_concrete(Tensor logits, float tau, Tensor? tau_tensor, bool hard, "
      "Generator? generator, Tensor? rng_state, SymInt[]? positions=None) "
      "-> (Tensor y, Tensor used_rng_state)";
  static constexpr bool draws = true;
  static constexpr Autocast autocast = Autocast::kNone;
  using Result = std::tuple<at::Tensor, at::Tensor>;
  void check() const;
  Result prepare();

  at::Tensor logits;
  double tau;
  OptionalTensor tau_tensor;
  bool hard;
  std::optional<at::Generator> generator;
  OptionalTensor rng_state;
  at::OptionalSymIntArrayRef positions;
};

// The gradient of the soft sample, also for a hard one. grad_tau is what each element adds to the
// gradient of tau.
struct BinaryConcreteBackward {
  static constexpr const char* schema =
      "binary_concrete_backward(Tensor grad, Tensor logits, float tau, Tensor? tau_tensor, "
      "Tensor rng_state, bool tau_grad, SymInt[]? positions=None) "
      "-> (Tensor grad_logits, Tensor grad_tau)";
  static constexpr bool draws = false;
  static constexpr Autocast autocast = Autocast::kNone;
  using Result = std::tuple<at::Tensor, at::Tensor>;
  void check() const;
  Result prepare();

  at::Tensor grad, logits;
  double tau;
  OptionalTensor tau_tensor;
  at::Tensor rng_state;
  bool tau_grad;
  at::OptionalSymIntArrayRef positions;
};

struct LogisticNoise {
  static constexpr const char* schema =
      "logistic_noise(Tensor like, SymInt[] size, Generator? generator, Tensor? rng_state, "
      "SymInt[]? positions=None) -> (Tensor noise, Tensor used_rng_state)";
  static constexpr bool draws = true;
  static constexpr Autocast autocast = Autocast::kNone;
  using Result = std::tuple<at::Tensor, at::Tensor>;
  Result prepare();

  at::Tensor like;
  c10::SymIntArrayRef size;
  std::optional<at::Generator> generator;
  OptionalTensor rng_state;
  at::OptionalSymIntArrayRef positions;
};

}  // namespace gumbel_ext
