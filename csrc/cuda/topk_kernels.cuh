// gumbel_topk: a team of threads a row. Each thread keeps its classes' noisy logits in memory of
// its own and offers the best; the team takes the best of those, k times, and only the thread whose
// class it was looks for its next.
#pragma once

#include "row_view.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

// The noisy logits of a group, as they lie in scratch memory.
template <class T>
union ScoredGroup {
  using Scalar = typename Element<T>::Scalar;
  static constexpr int kGroup = Element<T>::kGroup;
  static constexpr int kVectors = kGroup * static_cast<int>(sizeof(Scalar)) / 16;
  uint4 vector[kVectors];
  Scalar z[kGroup];

  GUMBEL_EXT_DEVICE ScoredGroup() {}
  GUMBEL_EXT_DEVICE void load(const Scalar* address) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      vector[i] = load_vector(reinterpret_cast<const uint4*>(address) + i);
    }
  }
  GUMBEL_EXT_DEVICE void store(Scalar* address) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      store_vector(reinterpret_cast<uint4*>(address) + i, vector[i]);
    }
  }
};

// A class that is never chosen: forbidden, -inf, or outside the row.
template <class Scalar>
GUMBEL_EXT_DEVICE bool is_out(Scalar z) {
  return z == -infinity<Scalar>();
}

// The best of the calling thread's groups that comes after `last`.
template <class T, class Team>
GUMBEL_EXT_DEVICE Best<typename Element<T>::Scalar> best_after(
    const Team& team, const RowView& row, const typename Element<T>::Scalar* scores,
    const Best<typename Element<T>::Scalar>& last) {
  using Scalar = typename Element<T>::Scalar;
  constexpr int kGroup = Element<T>::kGroup;
  Best<Scalar> best = Best<Scalar>::none();
  for (int g = team.rank(); g < row.groups; g += team.threads()) {
    ScoredGroup<T> group;
    group.load(scores + static_cast<std::int64_t>(g) * kGroup);
    const int c = GroupSpan::of<T>(row, g).c;
#pragma unroll
    for (int v = 0; v < kGroup; ++v) {
      const Best<Scalar> candidate{group.z[v], c + v};
      const bool taken = BetterOf()(last, candidate).index == candidate.index;
      if (is_out(candidate.value) || taken) continue;
      best = BetterOf()(best, candidate);
    }
  }
  return best;
}

template <class T, class Team>
GUMBEL_EXT_KERNEL(Team::kBlockThreads, resident_threads<T>(2 * Element<T>::kGroup))
topk_rows_kernel(const GUMBEL_EXT_CONSTANT Params p) {
  using Scalar = typename Element<T>::Scalar;
  constexpr int kGroup = Element<T>::kGroup;
  Team team;
  NoiseSource noise(read_state(p.random));
  const std::int64_t rows = p.outer * p.inner;
  // The scores are this team's alone, for one row after the other: a group always has the same
  // thread.
  const std::int64_t slot =
      static_cast<std::int64_t>(blockIdx.x) * Team::kRowsPerBlock + team.row_in_block();
  Scalar* scores = static_cast<Scalar*>(p.partials) + slot * p.chunk_classes;
  for (std::int64_t first = team.first_row(); first < rows; first += team.row_step()) {
    const RowView row = RowView::of<T>(p, first + team.row_in_block());
    Best<Scalar> own = Best<Scalar>::none();
    for_noisy_groups<T, 1>(team, p, row, 0, row.groups, noise,
                           [&](const GroupSpan& span, const Scalar(&z)[kGroup]) {
                             ScoredGroup<T> group;
                             Scalar top = z[0];
#pragma unroll
                             for (int v = 0; v < kGroup; ++v) {
                               group.z[v] = z[v];
                               top = larger_or_nan(top, z[v]);
                             }
                             group.store(scores + (span.c + row.lead));
                             // A class of -inf is never better than the group's largest.
                             if (top <= own.value || own.is_nan()) return;
#pragma unroll
                             for (int v = 0; v < kGroup; ++v) {
                               own = BetterOf()(own, Best<Scalar>{z[v], span.c + v});
                             }
                           });
    for (std::int64_t j = 0; j < p.k; ++j) {
      const Best<Scalar> best = team.reduce(own, BetterOf());
      const bool found = best.index != kNoIndex;
      if (team.rank() == 0 && row.classes > 0) {
        p.index[row.row * p.k + j] = found ? best.index : -1;
      }
      if (found && own.index == best.index) own = best_after<T>(team, row, scores, best);
    }
  }
}

// scores[row, class] = logits + noise, for a k so large that sorting them takes less time.
template <class T>
GUMBEL_EXT_KERNEL(256, resident_threads<T>(Element<T>::kGroup))
topk_scores_kernel(const GUMBEL_EXT_CONSTANT Params p) {
  using Scalar = typename Element<T>::Scalar;
  constexpr int kGroup = Element<T>::kGroup;
  BlockTeam<256> team;
  NoiseSource noise(read_state(p.random));
  const std::int64_t rows = p.outer * p.inner;
  for (std::int64_t r = team.first_row(); r < rows; r += team.row_step()) {
    const RowView row = RowView::of<T>(p, r);
    Scalar* scores = static_cast<Scalar*>(p.partials) + r * p.classes;
    for_noisy_groups<T, 1>(team, p, row, 0, row.groups, noise,
                           [&](const GroupSpan& span, const Scalar(&z)[kGroup]) {
#pragma unroll
                             for (int v = 0; v < kGroup; ++v) {
                               if (span.holds(v)) scores[span.c + v] = z[v];
                             }
                           });
  }
}

template <class T, class Team>
void launch_topk_rows(const Params& p, const cuda::TopKPlan& plan, void* stream) {
  GUMBEL_EXT_LAUNCH((topk_rows_kernel<T, Team>), plan.blocks, Team::kBlockThreads, stream, p);
}

template <class T>
void launch_topk_of(Params p, const cuda::TopKPlan& plan, void* stream) {
  p.chunk_classes = plan.slot;
  if (plan.sorts) {
    GUMBEL_EXT_LAUNCH((topk_scores_kernel<T>), plan.blocks, 256, stream, p);
  } else if (plan.team == 8) {
    launch_topk_rows<T, LaneTeam<8>>(p, plan, stream);
  } else if (plan.team == 32) {
    launch_topk_rows<T, LaneTeam<32>>(p, plan, stream);
  } else {
    launch_topk_rows<T, BlockTeam<256>>(p, plan, stream);
  }
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
