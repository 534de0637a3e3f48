// Noise positions that no few strides give: of a part cut out of a larger tensor.
#pragma once

#include "device_math.cuh"
#include "params.h"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

// The noise position of element n, counted row-major.
GUMBEL_EXT_DEVICE std::uint64_t position_of(const cuda::PositionGrid& grid, std::int64_t n) {
  if (grid.table != nullptr) return static_cast<std::uint64_t>(grid.table[n]);
  std::uint64_t position = grid.first;
  for (int d = grid.dims - 1; d >= 0; --d) {
    position +=
        static_cast<std::uint64_t>(n % grid.size[d]) * static_cast<std::uint64_t>(grid.stride[d]);
    n /= grid.size[d];
  }
  return position;
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
