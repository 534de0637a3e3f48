// The density's kernel, of both accumulate types.
#include "concrete_density_kernels.cuh"
#include "row_launch.cuh"

namespace gumbel_ext {
namespace cuda {

const char* launch_density(const DensityParams& params, void* stream) {
  with_row_kernel(params, [&](auto scalar, auto team) {
    using Team = decltype(team);
    GUMBEL_EXT_LAUNCH((density_kernel<decltype(scalar), Team>), rows_grid<Team>(params.rows),
                      Team::kBlockThreads, stream, params);
  });
  return launch_error();
}

}  // namespace cuda
}  // namespace gumbel_ext
