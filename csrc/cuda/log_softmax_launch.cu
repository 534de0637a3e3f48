// The kernel of the log-space sample's gradient, of both accumulate types.
#include "log_softmax_kernels.cuh"
#include "row_launch.cuh"

namespace gumbel_ext {
namespace cuda {

const char* launch_log_gradient(const LogGradientParams& params, void* stream) {
  with_row_kernel(params, [&](auto scalar, auto team) {
    using Team = decltype(team);
    GUMBEL_EXT_LAUNCH((log_gradient_kernel<decltype(scalar), Team>), rows_grid<Team>(params.rows),
                      Team::kBlockThreads, stream, params);
  });
  return launch_error();
}

}  // namespace cuda
}  // namespace gumbel_ext
