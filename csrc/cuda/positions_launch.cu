// The table of rows' noise positions, Params::row_positions.
#include "launch.cuh"
#include "positions.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

GUMBEL_EXT_KERNEL(256, 1024)
positions_kernel(const GUMBEL_EXT_CONSTANT cuda::PositionGrid grid, std::int64_t rows,
                 std::int64_t* out) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t r = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; r < rows;
       r += step) {
    out[r] = static_cast<std::int64_t>(position_of(grid, r));
  }
}

}  // namespace GUMBEL_EXT_ISA

namespace cuda {

const char* launch_positions(const PositionGrid& positions, std::int64_t rows, std::int64_t* out,
                             void* stream) {
  GUMBEL_EXT_LAUNCH(positions_kernel, elements_grid(rows), 256, stream, positions, rows, out);
  return launch_error();
}

}  // namespace cuda
}  // namespace gumbel_ext
