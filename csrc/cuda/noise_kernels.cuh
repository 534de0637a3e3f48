// The noise alone.
#pragma once

#include "launch.cuh"
#include "noise.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

// y[j] = noise of position first + j.
template <class T>
GUMBEL_EXT_KERNEL(256, sizeof(T) == 8 ? 512 : 768)
noise_kernel(const GUMBEL_EXT_CONSTANT cuda::RandomSource random, std::uint64_t first,
             std::int64_t count, T* y) {
  using Scalar = typename Element<T>::Scalar;
  NoiseSource noise(read_state(random));
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  const int lead = static_cast<int>(first % 4);
  for (std::int64_t k = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       4 * k < count + lead; k += step) {
    Scalar g[4] = {};
    const std::int64_t n = 4 * k - lead;
    noise.add_blocks((first + static_cast<std::uint64_t>(n)) >> 2, g);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (n + j >= 0 && n + j < count) narrow(g[j], &y[n + j]);
    }
  }
}

// y[n] = noise of the position of element n.
template <class T>
GUMBEL_EXT_KERNEL(256, sizeof(T) == 8 ? 512 : 768)
scattered_noise_kernel(const GUMBEL_EXT_CONSTANT cuda::RandomSource random,
                       const GUMBEL_EXT_CONSTANT cuda::PositionGrid positions, std::int64_t count,
                       T* y) {
  using Scalar = typename Element<T>::Scalar;
  NoiseSource noise(read_state(random));
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t n = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; n < count;
       n += step) {
    Scalar g = 0;
    noise.add_one(position_of(positions, n), g);
    narrow(g, &y[n]);
  }
}

template <class T>
void launch_noise_of(const cuda::RandomSource& random, const cuda::PositionGrid& positions,
                     std::int64_t count, T* y, void* stream) {
  const bool consecutive =
      positions.table == nullptr &&
      (positions.dims == 0 || (positions.dims == 1 && positions.stride[0] == 1));
  // Four elements a thread, which may begin inside a Philox block; or one.
  const int grid = elements_grid(consecutive ? (count + 3 + 3) / 4 : count);
  if (consecutive) {
    GUMBEL_EXT_LAUNCH((noise_kernel<T>), grid, 256, stream, random, positions.first, count, y);
  } else {
    GUMBEL_EXT_LAUNCH((scattered_noise_kernel<T>), grid, 256, stream, random, positions, count, y);
  }
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
