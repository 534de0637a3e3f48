// Gumbel noise by itself, and the state that it is a function of: arguments and results.
#include "noise.h"

#include "../gumbel_ext.h"

namespace gumbel_ext {

at::Tensor gumbel_noise(const at::Tensor& like, at::IntArrayRef size,
                        std::optional<at::Generator> generator, const OptionalTensor& rng_state,
                        at::OptionalSymIntArrayRef positions) {
  return call(GumbelNoise{like, c10::fromIntArrayRefSlow(size), generator, rng_state, positions});
}

at::Tensor draw_rng_state(const at::Tensor& like, std::optional<at::Generator> generator) {
  return call(DrawRngState{like, generator, /*after=*/std::nullopt});
}

at::Tensor GumbelNoise::prepare() {
  check_noise(*this);
  return at::empty_symint(size, like.options());
}

at::Tensor DrawRngState::prepare() { return empty_rng_state(like); }

at::Tensor NoiseAt::prepare() {
  constexpr const char* op = name_of<NoiseAt>();
  check_logits(op, like);
  check_randomness(op, like, std::nullopt, rng_state);
  TORCH_CHECK_TYPE(position.scalar_type() == at::kLong, op, ": position must be int64, got ",
                   c10::toString(position.scalar_type()));
  TORCH_CHECK_VALUE(position.device() == like.device(), op, ": position must be on ", like.device(),
                    ", got ", position.device());
  return at::empty_symint(position.sym_sizes(), like.options());
}

}  // namespace gumbel_ext

TORCH_LIBRARY_FRAGMENT(gumbel_ext, m) {
  using namespace gumbel_ext;
  define<GumbelNoise>(m);
  define<DrawRngState>(m);
  define<NoiseAt>(m);
}

TORCH_LIBRARY_IMPL(gumbel_ext, Autograd, m) {
  using namespace gumbel_ext;
  m.impl(name_of<GumbelNoise>(), torch::CppFunction::makeFallthrough());
  m.impl(name_of<DrawRngState>(), torch::CppFunction::makeFallthrough());
}
