// Gumbel noise by itself, and the state that it is a function of.
#pragma once

#include "../arguments.h"
#include "../op.h"

namespace gumbel_ext {

struct GumbelNoise {
  static constexpr const char* schema =
      "gumbel_noise(Tensor like, SymInt[] size, Generator? generator, Tensor? rng_state, "
      "SymInt[]? positions=None) -> Tensor";
  static constexpr bool draws = true;
  static constexpr Autocast autocast = Autocast::kNone;
  using Result = at::Tensor;
  Result prepare();

  at::Tensor like;
  c10::SymIntArrayRef size;
  std::optional<at::Generator> generator;
  OptionalTensor rng_state;
  at::OptionalSymIntArrayRef positions;
};

// The state of one call. In a traced graph `after` is the draw before it, which keeps their order
// and tells two draws apart; see gumbel_ext/_random_ops.py.
struct DrawRngState {
  static constexpr const char* schema =
      "draw_rng_state(Tensor like, Generator? generator, Tensor? after=None) -> Tensor rng_state";
  static constexpr bool draws = true;
  static constexpr Autocast autocast = Autocast::kNone;
  using Result = at::Tensor;
  Result prepare();

  at::Tensor like;
  std::optional<at::Generator> generator;
  OptionalTensor after;
};

// The noise of single elements, for rows that are sharded over processes.
struct NoiseAt {
  static constexpr const char* schema =
      "noise_at(Tensor like, Tensor position, Tensor rng_state) -> Tensor";
  static constexpr bool draws = false;
  static constexpr Autocast autocast = Autocast::kNone;
  using Result = at::Tensor;
  Result prepare();

  at::Tensor like, position, rng_state;
};

}  // namespace gumbel_ext
