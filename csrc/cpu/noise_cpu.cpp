// Gumbel noise by itself, and the state that it is a function of, on the CPU.
#include <ATen/Parallel.h>

#include "../ops/noise.h"
#include "kernels.h"
#include "tensors.h"

namespace gumbel_ext {
namespace cpu {
namespace {

at::Tensor gumbel_noise_cpu(GumbelNoise& a) {
  const at::Tensor out = a.prepare();
  if (out.numel() > 0) {
    fill_noise(out, reserve_randomness(a.generator, a.rng_state), a.positions, kernels().noise);
  }
  return out;
}

at::Tensor draw_rng_state_cpu(DrawRngState& a) {
  const at::Tensor state = a.prepare();
  write_state(reserve_randomness(a.generator, std::nullopt), state);
  return state;
}

at::Tensor noise_at_cpu(NoiseAt& a) {
  const at::Tensor noise = a.prepare(), places = a.position.contiguous();
  const RngState state = reserve_randomness(std::nullopt, a.rng_state);
  const ElementType type = element_type(noise.scalar_type());
  const int64_t* place = places.const_data_ptr<int64_t>();
  char* data = static_cast<char*>(noise.mutable_data_ptr());
  const int64_t bytes = static_cast<int64_t>(noise.element_size());
  at::parallel_for(0, noise.numel(), 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels().noise(type, state.seed, state.offset, static_cast<uint64_t>(place[i]), 1,
                      data + i * bytes);
    }
  });
  return noise;
}

}  // namespace
}  // namespace cpu
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CPU, m) {
  using namespace gumbel_ext::cpu;
  using gumbel_ext::implement;
  implement<&gumbel_noise_cpu>(m);
  implement<&draw_rng_state_cpu>(m);
  implement<&noise_at_cpu>(m);
}
