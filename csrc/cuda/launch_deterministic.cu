// The kernels of the straight-through softmax and of the soft-argmax, of every type.
#include "row_teams.cuh"
#include "soft_argmax_kernels.cuh"
#include "straight_through_kernels.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

template <class Scalar>
void launch_straight_through_of(const StraightThroughParams& p, void* stream) {
  with_team(p.classes, [&](auto team) {
    using Team = decltype(team);
    const int grid = teams_grid<Team>(p.rows);
    if (p.grad_logits == nullptr) {
      GUMBEL_EXT_LAUNCH((straight_through_kernel<Scalar, Team>), grid, Team::kBlockThreads, stream,
                        p);
    } else {
      GUMBEL_EXT_LAUNCH((straight_through_backward_kernel<Scalar, Team>), grid, Team::kBlockThreads,
                        stream, p);
    }
  });
}

template <class Scalar, int kCoordinates>
void launch_soft_argmax_in(const SoftArgmaxParams& p, void* stream) {
  with_team(p.classes, [&](auto team) {
    using Team = decltype(team);
    const int grid = teams_grid<Team>(p.rows);
    if (p.grad_logits == nullptr) {
      GUMBEL_EXT_LAUNCH((soft_argmax_kernel<Scalar, Team, kCoordinates>), grid, Team::kBlockThreads,
                        stream, p);
    } else {
      GUMBEL_EXT_LAUNCH((soft_argmax_backward_kernel<Scalar, Team, kCoordinates>), grid,
                        Team::kBlockThreads, stream, p);
    }
  });
}

template <class Scalar>
void launch_soft_argmax_of(const SoftArgmaxParams& p, void* stream) {
  if (p.coordinates == 1) {
    launch_soft_argmax_in<Scalar, 1>(p, stream);
  } else if (p.coordinates == 2) {
    launch_soft_argmax_in<Scalar, 2>(p, stream);
  } else {
    launch_soft_argmax_in<Scalar, 3>(p, stream);
  }
}

}  // namespace GUMBEL_EXT_ISA

namespace cuda {

const char* launch_straight_through(const StraightThroughParams& params, void* stream) {
  if (params.type == ElementType::kFloat64) {
    launch_straight_through_of<double>(params, stream);
  } else {
    launch_straight_through_of<float>(params, stream);
  }
  return launch_error();
}
const char* launch_soft_argmax(const SoftArgmaxParams& params, void* stream) {
  if (params.type == ElementType::kFloat64) {
    launch_soft_argmax_of<double>(params, stream);
  } else {
    launch_soft_argmax_of<float>(params, stream);
  }
  return launch_error();
}

}  // namespace cuda
}  // namespace gumbel_ext
