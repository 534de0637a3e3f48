// The kernels of the estimators' backwards, of every type.
#include "gumbel_rao_kernels.cuh"
#include "launch.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

// Calls launch(team, groups) with the groups that each thread of the team holds, or 0. Kernels that
// hold no row in blocks are compiled for parts of a warp alone.
template <class Scalar, bool kInBlocks, class Launch>
void with_held_row(const cuda::HeldRowPlan& plan, Launch launch) {
  constexpr cuda::ElementType kType = kTypeOf<Scalar>;
  using Held = std::integral_constant<int, cuda::held_row_groups(kType)>;
  if (plan.groups == 0) return launch(BlockTeam<256>(), std::integral_constant<int, 0>());
  if constexpr (sizeof(Scalar) == 4) {
    if (plan.team == 4) return launch(LaneTeam<4>(), Held());
  }
  if constexpr (kInBlocks) {
    if (plan.team == 256) return launch(BlockTeam<256>(), Held());
  }
  launch(LaneTeam<32>(), Held());
}

template <template <class> class Rule>
void launch_rule(const EstimatorParams& p, void* stream) {
  const auto plan = cuda::make_estimator_plan(p.type, p.classes);
  with_accumulate_type(p.type, [&](auto scalar) {
    using Scalar = decltype(scalar);
    with_held_row<Scalar, sizeof(Scalar) == 4>(plan, [&](auto team, auto groups) {
      using Team = decltype(team);
      GUMBEL_EXT_LAUNCH((estimator_kernel<Scalar, Team, Rule, decltype(groups)::value>),
                        rows_grid<Team>(p.rows), Team::kBlockThreads, stream, p);
    });
  });
}

}  // namespace GUMBEL_EXT_ISA

namespace cuda {

const char* launch_estimator(Estimator estimator, const EstimatorParams& params, void* stream) {
  switch (estimator) {
    case Estimator::kZgr:
      launch_rule<Zgr>(params, stream);
      break;
    case Estimator::kReinMax:
      launch_rule<ReinMax>(params, stream);
      break;
    case Estimator::kGapped:
      launch_rule<Gapped>(params, stream);
      break;
  }
  return launch_error();
}
const char* launch_gumbel_rao(const GumbelRaoParams& params, void* stream) {
  const auto plan = make_gumbel_rao_plan(params.type, params.classes);
  with_accumulate_type(params.type, [&](auto scalar) {
    using Scalar = decltype(scalar);
    with_held_row<Scalar, true>(plan, [&](auto team, auto groups) {
      using Team = decltype(team);
      constexpr int kGroups = decltype(groups)::value;
      const int grid = rows_grid<Team>(params.rows);
      if constexpr (kGroups > 0) {
        GUMBEL_EXT_LAUNCH((gumbel_rao_rows_kernel<Scalar, Team, kGroups>), grid,
                          Team::kBlockThreads, stream, params);
      } else {
        GUMBEL_EXT_LAUNCH((gumbel_rao_stream_kernel<Scalar>), grid, Team::kBlockThreads, stream,
                          params);
      }
    });
  });
  return launch_error();
}

}  // namespace cuda
}  // namespace gumbel_ext
