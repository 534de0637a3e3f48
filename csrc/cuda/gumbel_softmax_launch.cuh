// From a plan to launches, for one element type; gumbel_softmax_*_launch.cu instantiate it.
#pragma once

#include "column_kernels.cuh"
#include "launch.cuh"
#include "row_kernels.cuh"
#include "stream_kernels.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

using cuda::Op;
using cuda::Plan;
using cuda::Regime;

template <class T, class Team, int kGroups>
void launch_rows(Op op, const Params& p, const Plan& plan, void* stream) {
  const int grid = rows_grid<Team>(p.outer * p.inner, plan.repeats);
  constexpr int kThreads = Team::kBlockThreads;
  switch (op) {
    case Op::kSoft:
      GUMBEL_EXT_LAUNCH((soft_rows_kernel<T, Team, kGroups, false>), grid, kThreads, stream, p);
      break;
    case Op::kLogSoft:
      GUMBEL_EXT_LAUNCH((soft_rows_kernel<T, Team, kGroups, true>), grid, kThreads, stream, p);
      break;
    case Op::kBackward:
      GUMBEL_EXT_LAUNCH((backward_rows_kernel<T, Team, kGroups>), grid, kThreads, stream, p);
      break;
    default:
      GUMBEL_EXT_LAUNCH((backward_recompute_rows_kernel<T, Team, kGroups>), grid, kThreads, stream,
                        p);
  }
}

template <class T, class Team, int kBatch>
void launch_pick(const Params& p, const Plan& plan, void* stream) {
  const int grid = rows_grid<Team>(p.outer * p.inner, plan.repeats);
  GUMBEL_EXT_LAUNCH((pick_rows_kernel<T, Team, kBatch>), grid, Team::kBlockThreads, stream, p);
}

template <class T>
void launch_rows_of(Op op, const Params& p, const Plan& plan, void* stream) {
  if (op == Op::kHard || op == Op::kIndexOnly) {
    switch (plan.team) {
      case 1:
        return launch_pick<T, LaneTeam<1>, 1>(p, plan, stream);
      case 2:
        return launch_pick<T, LaneTeam<2>, 1>(p, plan, stream);
      case 4:
        return launch_pick<T, LaneTeam<4>, 1>(p, plan, stream);
      case 8:
        return launch_pick<T, LaneTeam<8>, 1>(p, plan, stream);
      case 32:
        if (plan.groups == 1) return launch_pick<T, LaneTeam<32>, 1>(p, plan, stream);
        return launch_pick<T, LaneTeam<32>, kStreamBatch<T>>(p, plan, stream);
      default:
        return launch_pick<T, BlockTeam<256>, kStreamBatch<T>>(p, plan, stream);
    }
  }
  constexpr int kMax = cuda::held_groups(sizeof(T));
  switch (plan.team) {
    case 1:
      return launch_rows<T, LaneTeam<1>, 1>(op, p, plan, stream);
    case 2:
      return launch_rows<T, LaneTeam<2>, 1>(op, p, plan, stream);
    case 4:
      return launch_rows<T, LaneTeam<4>, 1>(op, p, plan, stream);
    case 8:
      return launch_rows<T, LaneTeam<8>, 1>(op, p, plan, stream);
    case 32:
      if (plan.groups == 1) return launch_rows<T, LaneTeam<32>, 1>(op, p, plan, stream);
      if (plan.groups == 2) return launch_rows<T, LaneTeam<32>, 2>(op, p, plan, stream);
      return launch_rows<T, LaneTeam<32>, kMax>(op, p, plan, stream);
    case 128:
      return launch_rows<T, BlockTeam<128>, kMax>(op, p, plan, stream);
    case 256:
      return launch_rows<T, BlockTeam<256>, kMax>(op, p, plan, stream);
    default:
      if constexpr (sizeof(T) < 8) launch_rows<T, BlockTeam<480>, kMax>(op, p, plan, stream);
  }
}

template <class T, class Team>
void launch_clusters(Op op, const Params& p, const Plan& plan, void* stream) {
  constexpr int kMax = cuda::held_groups(sizeof(T));
  const int most_rows = (1 << 30) / plan.cluster;
  const std::int64_t rows = p.outer * p.inner;
  const int grid = static_cast<int>(rows < most_rows ? rows : most_rows) * plan.cluster;
  switch (op) {
    case Op::kSoft:
      GUMBEL_EXT_LAUNCH_CLUSTER((soft_rows_kernel<T, Team, kMax, false>), grid, Team::kBlockThreads,
                                plan.cluster, stream, p);
      break;
    case Op::kLogSoft:
      GUMBEL_EXT_LAUNCH_CLUSTER((soft_rows_kernel<T, Team, kMax, true>), grid, Team::kBlockThreads,
                                plan.cluster, stream, p);
      break;
    case Op::kBackward:
      GUMBEL_EXT_LAUNCH_CLUSTER((backward_rows_kernel<T, Team, kMax>), grid, Team::kBlockThreads,
                                plan.cluster, stream, p);
      break;
    default:
      GUMBEL_EXT_LAUNCH_CLUSTER((backward_recompute_rows_kernel<T, Team, kMax>), grid,
                                Team::kBlockThreads, plan.cluster, stream, p);
  }
}

template <class T>
void launch_clusters_of(Op op, const Params& p, const Plan& plan, void* stream) {
  if (plan.team == 256) {
    launch_clusters<T, ClusterTeam<256>>(op, p, plan, stream);
  } else if constexpr (sizeof(T) < 8) {
    launch_clusters<T, ClusterTeam<480>>(op, p, plan, stream);
  }
}

template <class T>
void launch_stream_of(Op op, const Params& p, void* stream) {
  const int grid = grid_size(p.outer * p.inner);
  if (op == Op::kSoft) {
    GUMBEL_EXT_LAUNCH((soft_stream_kernel<T, Phase::kWhole, false>), grid, kStreamThreads, stream,
                      p);
  } else if (op == Op::kLogSoft) {
    GUMBEL_EXT_LAUNCH((soft_stream_kernel<T, Phase::kWhole, true>), grid, kStreamThreads, stream,
                      p);
  } else {
    GUMBEL_EXT_LAUNCH((backward_stream_kernel<T, Phase::kWhole>), grid, kStreamThreads, stream, p);
  }
}

template <class T>
void launch_split_of(Op op, const Params& p, void* stream) {
  const int rows = grid_size(p.outer * p.inner);
  const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(p.chunks));
  switch (op) {
    case Op::kSoft:
    case Op::kLogSoft:
      GUMBEL_EXT_LAUNCH((soft_stream_kernel<T, Phase::kPartial, false>), grid, kStreamThreads,
                        stream, p);
      if (op == Op::kSoft) {
        GUMBEL_EXT_LAUNCH((soft_stream_kernel<T, Phase::kFinish, false>), grid, kStreamThreads,
                          stream, p);
      } else {
        GUMBEL_EXT_LAUNCH((soft_stream_kernel<T, Phase::kFinish, true>), grid, kStreamThreads,
                          stream, p);
      }
      break;
    case Op::kBackward:
      GUMBEL_EXT_LAUNCH((backward_stream_kernel<T, Phase::kPartial>), grid, kStreamThreads, stream,
                        p);
      GUMBEL_EXT_LAUNCH((backward_stream_kernel<T, Phase::kFinish>), grid, kStreamThreads, stream,
                        p);
      break;
    default:
      GUMBEL_EXT_LAUNCH((pick_partial_kernel<T>), grid, kStreamThreads, stream, p);
      GUMBEL_EXT_LAUNCH((pick_finish_kernel<T>), rows, kStreamThreads, stream, p);
  }
}

template <class T, int kWarps>
void launch_columns_of(Op op, const Params& p, void* stream) {
  const std::int64_t lanes = p.outer * ((p.inner + kColumnsPerLane - 1) / kColumnsPerLane);
  const int grid = grid_size((lanes + 31) / 32);
  constexpr int kThreads = 32 * kWarps;
  switch (op) {
    case Op::kSoft:
      GUMBEL_EXT_LAUNCH((soft_columns_kernel<T, kWarps, false>), grid, kThreads, stream, p);
      break;
    case Op::kLogSoft:
      GUMBEL_EXT_LAUNCH((soft_columns_kernel<T, kWarps, true>), grid, kThreads, stream, p);
      break;
    case Op::kBackward:
      GUMBEL_EXT_LAUNCH((backward_columns_kernel<T, kWarps>), grid, kThreads, stream, p);
      break;
    default:
      GUMBEL_EXT_LAUNCH((pick_columns_kernel<T, kWarps>), grid, kThreads, stream, p);
  }
}

template <class T>
const char* launch_of(Op op, Params p, const Plan& plan, void* stream) {
  p.chunks = plan.chunks;
  p.chunk_classes = plan.chunk_classes;
  const bool held = plan.regime == Regime::kRows || plan.regime == Regime::kClusters;
  if (op == Op::kBackwardRecompute && !held) {
    // y goes where the gradient will be: nothing else of that size is needed, and the gradient is
    // the soft one by construction.
    Params forward = p;
    forward.y = p.grad_logits;
    forward.grad = nullptr;
    forward.grad_logits = nullptr;
    forward.index = nullptr;
    const char* error = launch_of<T>(Op::kSoft, forward, plan, stream);
    if (error != nullptr) return error;
    p.y = p.grad_logits;
    return launch_of<T>(Op::kBackward, p, plan, stream);
  }
  switch (plan.regime) {
    case Regime::kRows:
      launch_rows_of<T>(op, p, plan, stream);
      break;
    case Regime::kClusters:
      launch_clusters_of<T>(op, p, plan, stream);
      break;
    case Regime::kStream:
      launch_stream_of<T>(op, p, stream);
      break;
    case Regime::kSplit:
      launch_split_of<T>(op, p, stream);
      break;
    case Regime::kColumns:
      if (plan.team == 1) {
        launch_columns_of<T, 1>(op, p, stream);
      } else if (plan.team == 16) {
        if constexpr (sizeof(T) < 8) launch_columns_of<T, 16>(op, p, stream);
      } else {
        launch_columns_of<T, 8>(op, p, stream);
      }
      break;
  }
  return launch_error();
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
