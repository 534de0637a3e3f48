// The kernels of the estimators' backwards, of every type.
#include "gumbel_rao_kernels.cuh"
#include "row_teams.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

// Calls launch(team, groups) with a team for rows of so many classes, and the groups that each of
// its threads holds; none of rows longer than `held`. Of float64 there are fewer teams.
template <class Scalar, std::int64_t held, class Launch>
void with_held_row(std::int64_t classes, Launch launch) {
  constexpr bool kSingle = sizeof(Scalar) == 4;
  using Held = std::integral_constant<int, kSingle ? 4 : 2>;
  constexpr int kOfThread = Held::value * kRowGroup;
  if constexpr (kSingle) {
    if (classes <= 4 * kOfThread) return launch(LaneTeam<4>(), Held());
  }
  if (classes <= 32 * kOfThread) return launch(LaneTeam<32>(), Held());
  static_assert(held == 32 * kOfThread || held == 256 * kOfThread);
  if constexpr (held == 256 * kOfThread) {
    if (classes <= held) return launch(BlockTeam<256>(), Held());
  }
  launch(BlockTeam<256>(), std::integral_constant<int, 0>());
}

template <template <class> class Rule>
void launch_rule(const EstimatorParams& p, void* stream) {
  const auto of = [&](auto scalar) {
    using Scalar = decltype(scalar);
    with_held_row<Scalar, sizeof(Scalar) == 4 ? 4096 : 256>(p.classes, [&](auto team, auto groups) {
      using Team = decltype(team);
      GUMBEL_EXT_LAUNCH((estimator_kernel<Scalar, Team, Rule, decltype(groups)::value>),
                        teams_grid<Team>(p.rows), Team::kBlockThreads, stream, p);
    });
  };
  if (p.type == cuda::ElementType::kFloat64) {
    of(double());
  } else {
    of(float());
  }
}

template <class Scalar>
void launch_gumbel_rao_of(const GumbelRaoParams& p, void* stream) {
  with_held_row<Scalar, cuda::gumbel_rao_held(kTypeOf<Scalar>)>(p.classes, [&](auto team,
                                                                               auto groups) {
    using Team = decltype(team);
    constexpr int kGroups = decltype(groups)::value;
    const int grid = teams_grid<Team>(p.rows);
    if constexpr (kGroups > 0) {
      GUMBEL_EXT_LAUNCH((gumbel_rao_rows_kernel<Scalar, Team, kGroups>), grid, Team::kBlockThreads,
                        stream, p);
    } else {
      GUMBEL_EXT_LAUNCH((gumbel_rao_stream_kernel<Scalar>), grid, Team::kBlockThreads, stream, p);
    }
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
  if (params.type == ElementType::kFloat64) {
    launch_gumbel_rao_of<double>(params, stream);
  } else {
    launch_gumbel_rao_of<float>(params, stream);
  }
  return launch_error();
}

}  // namespace cuda
}  // namespace gumbel_ext
