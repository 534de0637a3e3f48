// The kernels of the straight-through softmax, of both accumulate types.
#include "row_launch.cuh"
#include "straight_through_kernels.cuh"

namespace gumbel_ext {
namespace cuda {

const char* launch_straight_through(const StraightThroughParams& params, void* stream) {
  with_row_kernel(params, [&](auto scalar, auto team) {
    using Scalar = decltype(scalar);
    using Team = decltype(team);
    const int grid = rows_grid<Team>(params.rows);
    if (params.grad_logits == nullptr) {
      GUMBEL_EXT_LAUNCH((straight_through_kernel<Scalar, Team>), grid, Team::kBlockThreads, stream,
                        params);
    } else {
      GUMBEL_EXT_LAUNCH((straight_through_backward_kernel<Scalar, Team>), grid, Team::kBlockThreads,
                        stream, params);
    }
  });
  return launch_error();
}

}  // namespace cuda
}  // namespace gumbel_ext
