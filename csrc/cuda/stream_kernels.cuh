// Regimes kStream and kSplit: rows too long to hold. They are read twice and their noise is made
// twice; a split row's blocks meet in between, in a second launch.
#pragma once

#include "row_view.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

// The part of the work that a launch does.
enum class Phase { kWhole, kPartial, kFinish };

constexpr int kStreamThreads = 256;
// Groups that a thread has under way.
template <class T>
constexpr int kStreamBatch = sizeof(T) == 8 ? 1 : 2;

// Blocks are numbered (chunk, row): blockIdx.x counts rows, blockIdx.y chunks, which are few.
struct ChunkView {
  int first_group, last_group;  // [first, last)

  template <class T>
  GUMBEL_EXT_DEVICE static ChunkView of(const Params& p, const RowView& row) {
    constexpr int kGroup = Element<T>::kGroup;
    ChunkView v;
    const std::int64_t first = static_cast<std::int64_t>(blockIdx.y) * p.chunk_classes;
    const std::int64_t last = first + p.chunk_classes;
    // Chunks are cut between groups.
    v.first_group = static_cast<int>(first / kGroup);
    v.last_group = static_cast<int>(last / kGroup < row.groups ? last / kGroup : row.groups);
    return v;
  }
};

template <class V>
GUMBEL_EXT_DEVICE V* partials_of_row(const Params& p, std::int64_t row) {
  return static_cast<V*>(p.partials) + row * p.chunks;
}

// Combines the partial results of a row, in the order of its chunks, and gives all threads the
// result.
template <class V, class Op>
GUMBEL_EXT_DEVICE V merge_partials(BlockTeam<kStreamThreads>& team, const Params& p,
                                   std::int64_t row, V nothing, Op op) {
  const V* part = partials_of_row<V>(p, row);
  V own = nothing;
  for (std::int64_t k = team.rank(); k < p.chunks; k += team.threads()) own = op(own, part[k]);
  return team.reduce(own, op);
}

// Writes y or, if kLog, log y, which has no index.
template <class T, Phase phase, bool kLog>
GUMBEL_EXT_KERNEL(kStreamThreads, resident_threads<T>(kStreamBatch<T>* Element<T>::kGroup))
soft_stream_kernel(const GUMBEL_EXT_CONSTANT Params p) {
  using Scalar = typename Element<T>::Scalar;
  constexpr int kGroup = Element<T>::kGroup;
  BlockTeam<kStreamThreads> team;
  const RandomState state = read_state(p.random);
  record_state(state, p.used_state);
  NoiseSource noise(state);
  const std::int64_t rows = p.outer * p.inner;
  for (std::int64_t r = team.first_row(); r < rows; r += team.row_step()) {
    const RowView row = RowView::of<T>(p, r);
    const ChunkView chunk = ChunkView::of<T>(p, row);
    const InverseTau<Scalar> tau = inverse_tau<Scalar>(p, r);
    const MergeSums<Scalar> merge{tau.exponent_scale};
    RunningSum<Scalar> total{Best<Scalar>::none(), Scalar(0)};
    if (phase != Phase::kFinish) {
      for_noisy_groups<T, kStreamBatch<T>>(
          team, p, row, chunk.first_group, chunk.last_group, noise,
          [&](const GroupSpan& span, const Scalar(&z)[kGroup]) {
            const RunningSum<Scalar> before = total;
            take_group(z, span.c, total.best);
            if (total.best.index != before.best.index) {
              total.sum = merge.rescaled(before, total.best.value);
            }
            // With nothing above -inf yet the differences would be NaN.
            if (total.best.value == -infinity<Scalar>()) return;
#pragma unroll
            for (int v = 0; v < kGroup; ++v) {
              total.sum =
                  add(total.sum,
                      power_of_two(multiply(add(z[v], -total.best.value), tau.exponent_scale)));
            }
          });
      total = team.reduce(total, merge);
    }
    if (phase == Phase::kPartial) {
      if (team.rank() == 0) partials_of_row<RunningSum<Scalar>>(p, r)[blockIdx.y] = total;
      continue;
    }
    if (phase == Phase::kFinish) {
      total =
          merge_partials(team, p, r, RunningSum<Scalar>{Best<Scalar>::none(), Scalar(0)}, merge);
    }
    int index = total.best.index;
    Scalar share = share_of<kLog>(total.sum);
    const Scalar top = total.best.value;
    // NaN or +inf among the logits, a tau that is none, or nothing above -inf.
    const bool special = !(total.sum < infinity<Scalar>()) || index == kNoIndex;
    if (special) {
      const RowKind kind = settle_row<T>(team, p, row, &index);
      share = fill_of<kLog, Scalar>(kind);
    }
    if (!kLog && p.index != nullptr && team.rank() == 0 && blockIdx.y == 0) p.index[r] = index;
    if (special) {
      fill_groups<T>(team, p.y, row, chunk.first_group, chunk.last_group, share);
      continue;
    }
    for_noisy_groups<T, kStreamBatch<T>>(team, p, row, chunk.first_group, chunk.last_group, noise,
                                         [&](const GroupSpan& span, const Scalar(&z)[kGroup]) {
                                           Scalar y[kGroup];
#pragma unroll
                                           for (int v = 0; v < kGroup; ++v)
                                             y[v] = result_of<kLog>(z[v], top, tau, share);
                                           store_group<T>(p.y, row, span, y);
                                         });
  }
}

// Hard samples and indices of split rows.
template <class T>
GUMBEL_EXT_KERNEL(kStreamThreads, resident_threads<T>(kStreamBatch<T>* Element<T>::kGroup))
pick_partial_kernel(const GUMBEL_EXT_CONSTANT Params p) {
  using Scalar = typename Element<T>::Scalar;
  constexpr int kGroup = Element<T>::kGroup;
  BlockTeam<kStreamThreads> team;
  const RandomState state = read_state(p.random);
  record_state(state, p.used_state);
  NoiseSource noise(state);
  const std::int64_t rows = p.outer * p.inner;
  for (std::int64_t r = team.first_row(); r < rows; r += team.row_step()) {
    const RowView row = RowView::of<T>(p, r);
    const ChunkView chunk = ChunkView::of<T>(p, row);
    Best<Scalar> best = Best<Scalar>::none();
    for_noisy_groups<T, kStreamBatch<T>>(team, p, row, chunk.first_group, chunk.last_group, noise,
                                         [&](const GroupSpan& span, const Scalar(&z)[kGroup]) {
                                           take_group(z, span.c, best);
                                           if (p.y == nullptr) return;
                                           const Scalar zeros[kGroup] = {};
                                           store_group<T>(p.y, row, span, zeros);
                                         });
    best = team.reduce(best, BetterOf());
    if (team.rank() == 0) partials_of_row<Best<Scalar>>(p, r)[blockIdx.y] = best;
  }
}

template <class T>
GUMBEL_EXT_KERNEL(kStreamThreads, resident_threads<T>(kStreamBatch<T>* Element<T>::kGroup))
pick_finish_kernel(const GUMBEL_EXT_CONSTANT Params p) {
  using Scalar = typename Element<T>::Scalar;
  BlockTeam<kStreamThreads> team;
  const std::int64_t rows = p.outer * p.inner;
  for (std::int64_t r = team.first_row(); r < rows; r += team.row_step()) {
    const RowView row = RowView::of<T>(p, r);
    const Best<Scalar> best = merge_partials(team, p, r, Best<Scalar>::none(), BetterOf());
    int index = best.index;
    RowKind kind = RowKind::kOrdinary;
    if (best.is_nan() || index == kNoIndex) {
      index = kNoIndex;
      kind = settle_row<T>(team, p, row, &index);
    }
    if (p.index != nullptr && team.rank() == 0) p.index[r] = index;
    if (p.y == nullptr) continue;
    if (kind == RowKind::kOrdinary) {
      if (team.rank() == 0) narrow(Scalar(1), element_of<T>(p.y, row, index));
    } else if (kind == RowKind::kNaN) {
      fill_groups<T>(team, p.y, row, 0, row.groups, quiet_nan<Scalar>());
    }
  }
}

// What a backward sums over a row: h y, and for dtau log(y) y h and log(y) y, since
// sum log(y) y (h - dot) = log_h - dot * log.
template <class Scalar>
struct Dots {
  Scalar dot, log_h, log;

  GUMBEL_EXT_DEVICE void take(Scalar y, Scalar h, bool with_log) {
    dot = multiply_add(h, y, dot);
    if (!with_log) return;
    const Scalar term = multiply(natural_log(y), y);
    log_h = multiply_add(term, h, log_h);
    log = add(log, term);
  }
  // dtau of the row.
  GUMBEL_EXT_DEVICE Scalar grad_tau(Scalar inverse_tau) const {
    return multiply(multiply_add(dot, log, -log_h), inverse_tau);
  }
};
struct AddDots {
  template <class Scalar>
  GUMBEL_EXT_DEVICE Dots<Scalar> operator()(const Dots<Scalar>& a, const Dots<Scalar>& b) const {
    return {add(a.dot, b.dot), add(a.log_h, b.log_h), add(a.log, b.log)};
  }
};

// Calls take(span, y, grad) for the calling thread's groups of a chunk, kStreamBatch loads ahead.
template <class T, class Take>
GUMBEL_EXT_DEVICE void for_y_and_grad(const BlockTeam<kStreamThreads>& team, const Params& p,
                                      const RowView& row, const ChunkView& chunk, Take take) {
  using Scalar = typename Element<T>::Scalar;
  constexpr int kBatch = kStreamBatch<T>, kGroup = Element<T>::kGroup;
  for (int g = chunk.first_group + team.rank(); g < chunk.last_group;
       g += kBatch * team.threads()) {
    RawGroup<T> y[kBatch], grad[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int group = g + k * team.threads();
      // A group of the next chunk may not be touched, even in advance: y lies where that chunk
      // writes.
      if (group >= chunk.last_group) break;
      const GroupSpan span = GroupSpan::of<T>(row, group);
      y[k].load(p.y, row, span, narrowed<T>(0));
      grad[k].load(p.grad, row, span, narrowed<T>(0));
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int group = g + k * team.threads();
      if (group >= chunk.last_group) break;
      Scalar wide_y[kGroup], wide_grad[kGroup];
      y[k].widen_to(wide_y);
      grad[k].widen_to(wide_grad);
      take(GroupSpan::of<T>(row, group), wide_y, wide_grad);
    }
  }
}

// y may lie where grad_logits is written: a thread reads every element before it writes it.
template <class T, Phase phase>
GUMBEL_EXT_KERNEL(kStreamThreads, resident_threads<T>(kStreamBatch<T>* Element<T>::kGroup))
backward_stream_kernel(const GUMBEL_EXT_CONSTANT Params p) {
  using Scalar = typename Element<T>::Scalar;
  constexpr int kGroup = Element<T>::kGroup;
  BlockTeam<kStreamThreads> team;
  const std::int64_t rows = p.outer * p.inner;
  for (std::int64_t r = team.first_row(); r < rows; r += team.row_step()) {
    const RowView row = RowView::of<T, false>(p, r);
    const ChunkView chunk = ChunkView::of<T>(p, row);
    const std::int64_t index = p.index[r];
    const bool forbidden = index < 0;
    const Scalar shift = chosen_gradient<T>(p, row, index);
    Dots<Scalar> total{0, 0, 0};
    if (phase != Phase::kFinish) {
      for_y_and_grad<T>(
          team, p, row, chunk,
          [&](const GroupSpan&, const Scalar(&y)[kGroup], const Scalar(&grad)[kGroup]) {
#pragma unroll
            for (int v = 0; v < kGroup; ++v) {
              total.take(y[v], add(grad[v], -shift), p.grad_tau != nullptr);
            }
          });
      total = team.reduce(total, AddDots());
    }
    if (phase == Phase::kPartial) {
      if (team.rank() == 0) partials_of_row<Dots<Scalar>>(p, r)[blockIdx.y] = total;
      continue;
    }
    if (phase == Phase::kFinish) {
      total = merge_partials(team, p, r, Dots<Scalar>{0, 0, 0}, AddDots());
    }
    const Scalar inverse = inverse_tau<Scalar>(p, r).inverse;
    if (p.grad_tau != nullptr && team.rank() == 0 && blockIdx.y == 0) {
      static_cast<Scalar*>(p.grad_tau)[r] = forbidden ? Scalar(0) : total.grad_tau(inverse);
    }
    for_y_and_grad<T>(
        team, p, row, chunk,
        [&](const GroupSpan& span, const Scalar(&y)[kGroup], const Scalar(&grad)[kGroup]) {
          Scalar out[kGroup];
#pragma unroll
          for (int v = 0; v < kGroup; ++v) {
            out[v] = multiply(multiply(y[v], add(add(grad[v], -shift), -total.dot)), inverse);
          }
          if (forbidden) {
#pragma unroll
            for (int v = 0; v < kGroup; ++v) out[v] = 0;
          }
          store_group<T>(p.grad_logits, row, span, out);
        });
  }
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
