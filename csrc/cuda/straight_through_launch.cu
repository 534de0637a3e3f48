// The kernel of the straight-through softmax's gradient, of both accumulate types.
#include "row_launch.cuh"
#include "straight_through_kernels.cuh"

namespace gumbel_ext {
namespace cuda {

const char* launch_straight_through_backward(const StraightThroughParams& params, void* stream) {
  with_row_kernel(params, [&](auto scalar, auto team) {
    using Team = decltype(team);
    GUMBEL_EXT_LAUNCH((straight_through_backward_kernel<decltype(scalar), Team>),
                      rows_grid<Team>(params.rows), Team::kBlockThreads, stream, params);
  });
  return launch_error();
}

}  // namespace cuda
}  // namespace gumbel_ext
