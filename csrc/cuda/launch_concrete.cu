// The kernels of the log-space sample and of the density, of every type.
#include "density_kernels.cuh"
#include "log_sample_kernels.cuh"
#include "row_teams.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

template <class T, class Team, int kGroups>
void launch_log_sample_rows(const LogSampleParams& p, void* stream) {
  const int grid = teams_grid<Team>(p.rows.outer * p.rows.inner);
  GUMBEL_EXT_LAUNCH((log_sample_rows_kernel<T, Team, kGroups>), grid, Team::kBlockThreads, stream,
                    p);
}

template <class T>
void launch_log_sample_of(const LogSampleParams& p, void* stream) {
  constexpr int kGroup = Element<T>::kGroup;
  const Params& r = p.rows;
  // A row whose first class is amid a group of positions may touch one group more.
  const bool from_start =
      r.position_class_stride != 1 ||
      (r.row_positions == nullptr && r.first_position % kGroup == 0 &&
       r.position_outer_stride % kGroup == 0 && r.position_inner_stride % kGroup == 0);
  const std::int64_t groups = (r.classes + (from_start ? 0 : kGroup - 1) + kGroup - 1) / kGroup;
  if (groups <= 4) {
    launch_log_sample_rows<T, LaneTeam<4>, 1>(p, stream);
  } else if (groups <= 64) {
    launch_log_sample_rows<T, LaneTeam<32>, 2>(p, stream);
  } else if (groups <= 256) {
    launch_log_sample_rows<T, BlockTeam<256>, 1>(p, stream);
  } else {
    GUMBEL_EXT_LAUNCH((log_sample_stream_kernel<T>), teams_grid<BlockTeam<256>>(r.outer * r.inner),
                      256, stream, p);
  }
}

template <class Scalar>
void launch_log_gradient_of(const LogGradientParams& p, void* stream) {
  with_team(p.classes, [&](auto team) {
    using Team = decltype(team);
    GUMBEL_EXT_LAUNCH((log_gradient_kernel<Scalar, Team>), teams_grid<Team>(p.rows),
                      Team::kBlockThreads, stream, p);
  });
}

template <class Scalar>
void launch_density_of(const DensityParams& p, void* stream) {
  with_team(p.classes, [&](auto team) {
    using Team = decltype(team);
    GUMBEL_EXT_LAUNCH((density_kernel<Scalar, Team>), teams_grid<Team>(p.rows), Team::kBlockThreads,
                      stream, p);
  });
}

}  // namespace GUMBEL_EXT_ISA

namespace cuda {

const char* launch_log_sample(ElementType type, const LogSampleParams& params, void* stream) {
  switch (type) {
    case ElementType::kFloat64:
      launch_log_sample_of<double>(params, stream);
      break;
    case ElementType::kFloat32:
      launch_log_sample_of<float>(params, stream);
      break;
    case ElementType::kBFloat16:
      launch_log_sample_of<BFloat16>(params, stream);
      break;
    case ElementType::kFloat16:
      launch_log_sample_of<Half>(params, stream);
      break;
  }
  return launch_error();
}
const char* launch_log_gradient(const LogGradientParams& params, void* stream) {
  if (params.type == ElementType::kFloat64) {
    launch_log_gradient_of<double>(params, stream);
  } else {
    launch_log_gradient_of<float>(params, stream);
  }
  return launch_error();
}
const char* launch_density(const DensityParams& params, void* stream) {
  if (params.type == ElementType::kFloat64) {
    launch_density_of<double>(params, stream);
  } else {
    launch_density_of<float>(params, stream);
  }
  return launch_error();
}

}  // namespace cuda
}  // namespace gumbel_ext
