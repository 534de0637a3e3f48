// What launchers share: grids, and kernels by element type or by team.
#pragma once

#include "params.h"
#include "team.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

// Blocks along x; kernels of rows go on from there in steps of the whole grid.
inline int grid_size(std::int64_t blocks) {
  constexpr std::int64_t kMax = 1 << 30;
  return static_cast<int>(blocks < kMax ? (blocks > 0 ? blocks : 1) : kMax);
}

// Blocks of 256 threads that go over elements one by one.
inline int elements_grid(std::int64_t threads) {
  const std::int64_t blocks = (threads + 255) / 256;
  return grid_size(blocks < 65536 ? blocks : 65536);
}

// Blocks of teams that take that many rows each, one after the other.
template <class Team>
int rows_grid(std::int64_t rows, int repeats = 1) {
  const std::int64_t per_block = static_cast<std::int64_t>(Team::kRowsPerBlock) * repeats;
  return grid_size((rows + per_block - 1) / per_block);
}

// Calls launch(T()) with the type of a tensor's elements.
template <class Launch>
void with_type(cuda::ElementType type, Launch launch) {
  switch (type) {
    case cuda::ElementType::kFloat64:
      return launch(double());
    case cuda::ElementType::kFloat32:
      return launch(float());
    case cuda::ElementType::kBFloat16:
      return launch(BFloat16());
    case cuda::ElementType::kFloat16:
      return launch(Half());
  }
}
// Calls launch(Scalar()) with its accumulate type.
template <class Launch>
void with_accumulate_type(cuda::ElementType type, Launch launch) {
  type == cuda::ElementType::kFloat64 ? launch(double()) : launch(float());
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
