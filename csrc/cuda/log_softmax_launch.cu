// The kernels of the log-space sample, of every type.
#include "log_softmax_kernels.cuh"
#include "row_launch.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

template <class T, class Team, int kGroups>
void launch_log_sample_rows(const LogSampleParams& p, void* stream) {
  const int grid = rows_grid<Team>(p.rows.outer * p.rows.inner);
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
    GUMBEL_EXT_LAUNCH((log_sample_stream_kernel<T>), rows_grid<BlockTeam<256>>(r.outer * r.inner),
                      256, stream, p);
  }
}

}  // namespace GUMBEL_EXT_ISA

namespace cuda {

const char* launch_log_sample(ElementType type, const LogSampleParams& params, void* stream) {
  with_type(type, [&](auto element) { launch_log_sample_of<decltype(element)>(params, stream); });
  return launch_error();
}
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
