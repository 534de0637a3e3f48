// Samples without replacement.
#pragma once

#include "../arguments.h"
#include "../op.h"

namespace gumbel_ext {

struct GumbelTopk {
  static constexpr const char* schema =
      "gumbel_topk(Tensor logits, SymInt k, int dim, Tensor? mask, Generator? generator, "
      "Tensor? rng_state, SymInt[]? positions=None) -> Tensor index";
  static constexpr bool draws = true;
  static constexpr Autocast autocast = Autocast::kNone;
  using Result = at::Tensor;
  Result prepare();

  at::Tensor logits;
  c10::SymInt k;
  int64_t dim;
  OptionalTensor mask;
  std::optional<at::Generator> generator;
  OptionalTensor rng_state;
  at::OptionalSymIntArrayRef positions;
};

}  // namespace gumbel_ext
