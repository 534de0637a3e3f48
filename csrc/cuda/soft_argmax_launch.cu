// The kernels of the soft-argmax, of both accumulate types.
#include "row_launch.cuh"
#include "soft_argmax_kernels.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

template <int kCoordinates>
void launch_soft_argmax_in(const SoftArgmaxParams& p, void* stream) {
  with_row_kernel(p, [&](auto scalar, auto team) {
    using Scalar = decltype(scalar);
    using Team = decltype(team);
    const int grid = rows_grid<Team>(p.rows);
    if (p.grad_logits == nullptr) {
      GUMBEL_EXT_LAUNCH((soft_argmax_kernel<Scalar, Team, kCoordinates>), grid, Team::kBlockThreads,
                        stream, p);
    } else {
      GUMBEL_EXT_LAUNCH((soft_argmax_backward_kernel<Scalar, Team, kCoordinates>), grid,
                        Team::kBlockThreads, stream, p);
    }
  });
}

}  // namespace GUMBEL_EXT_ISA

namespace cuda {

const char* launch_soft_argmax(const SoftArgmaxParams& params, void* stream) {
  if (params.coordinates == 1) {
    launch_soft_argmax_in<1>(params, stream);
  } else if (params.coordinates == 2) {
    launch_soft_argmax_in<2>(params, stream);
  } else {
    launch_soft_argmax_in<3>(params, stream);
  }
  return launch_error();
}

}  // namespace cuda
}  // namespace gumbel_ext
