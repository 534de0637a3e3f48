// Gumbel noise by itself, and the state that it is a function of, on CUDA.
#include <c10/cuda/CUDAGuard.h>

#include "../ops/noise.h"
#include "gumbel_softmax_cuda.h"
#include "tensors.h"

namespace gumbel_ext {
namespace cuda {
namespace {

void fill_noise(const char* op, const at::Tensor& noise, const RandomSource& random,
                const PositionGrid& positions) {
  check_launch(op, launch_noise(element_type(noise.scalar_type()), random, positions, noise.numel(),
                                noise.mutable_data_ptr(), current_stream()));
}

at::Tensor gumbel_noise_cuda(GumbelNoise& a) {
  const c10::cuda::CUDAGuard guard(a.like.device());
  const at::Tensor noise = a.prepare();
  if (noise.numel() == 0) return noise;
  at::Tensor on_device;
  const RandomSource random = random_source(a.generator, a.rng_state, on_device);
  const Positions places(noise.sizes(), a.positions);
  fill_noise(name_of<GumbelNoise>(), noise, random,
             merged_positions(static_cast<uint64_t>(places.base), static_cast<int>(noise.dim()),
                              noise.sizes().data(), places.strides.data()));
  return noise;
}

at::Tensor draw_rng_state_cuda(DrawRngState& a) { return draw_state(a.like, a.generator); }

at::Tensor noise_at_cuda(NoiseAt& a) {
  const c10::cuda::CUDAGuard guard(a.like.device());
  const at::Tensor noise = a.prepare(), table = a.position.contiguous();
  if (noise.numel() == 0) return noise;
  at::Tensor on_device;
  const RandomSource random = random_source(std::nullopt, a.rng_state, on_device);
  PositionGrid grid{};
  grid.table = table.const_data_ptr<int64_t>();
  fill_noise(name_of<NoiseAt>(), noise, random, grid);
  return noise;
}

}  // namespace
}  // namespace cuda
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CUDA, m) {
  using namespace gumbel_ext::cuda;
  using gumbel_ext::implement;
  implement<&gumbel_noise_cuda>(m);
  implement<&draw_rng_state_cuda>(m);
  implement<&noise_at_cuda>(m);
}
