// Regimes kStream and kSplit: rows too long to hold. They are read twice and their noise is made
// twice; a split row's blocks meet in between, in a second launch.
#pragma once

#include "row_view.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

// Which part of the work a launch does.
enum class Phase { kWhole, kPartial, kFinish };

constexpr int kStreamThreads = 256;

// Blocks are numbered (chunk, row): blockIdx.x counts rows, blockIdx.y chunks, which are few.
struct ChunkView {
  int first_class, last_class;  // [first, last)
  int first_group, last_group;

  template <class T>
  GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY static ChunkView of(const Params& p,
                                                               const RowView& row) {
    constexpr int kGroup = Element<T>::kGroup;
    ChunkView v;
    const std::int64_t first = static_cast<std::int64_t>(blockIdx.y) * p.chunk_classes;
    const std::int64_t last = first + p.chunk_classes;
    // Chunks are cut between groups: by classes of the group grid, which starts at -lead.
    v.first_group = static_cast<int>(first / kGroup);
    v.last_group = static_cast<int>(last / kGroup < row.groups ? last / kGroup : row.groups);
    v.first_class = v.first_group * kGroup - row.lead;
    v.last_class = v.last_group * kGroup - row.lead;
    if (v.first_class < 0) v.first_class = 0;
    if (v.last_class > row.classes) v.last_class = row.classes;
    return v;
  }
};

template <class V>
GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY V* partials_of_row(const Params& p, std::int64_t row) {
  return static_cast<V*>(p.partials) + row * p.chunks;
}

// Combines the partial results of a row, in the order of its chunks, and gives all threads the
// result.
template <class V, class Op>
GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY V merge_partials(BlockTeam<kStreamThreads>& team,
                                                          const Params& p, std::int64_t row,
                                                          V nothing, Op op) {
  const V* part = partials_of_row<V>(p, row);
  V own = nothing;
  for (std::int64_t k = team.rank(); k < p.chunks; k += team.threads()) own = op(own, part[k]);
  return team.reduce(own, op);
}

template <class T, Phase phase>
GUMBEL_EXT_KERNEL(kStreamThreads)
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
      for (int g = chunk.first_group + team.rank(); g < chunk.last_group; g += team.threads()) {
        const GroupSpan span = GroupSpan::of<T>(row, g, row.classes);
        Scalar z[kGroup];
        noisy_group<T>(p, row, span, noise, z);
        Best<Scalar> best = total.best;
#pragma unroll
        for (int v = 0; v < kGroup; ++v) {
          if (!(z[v] <= best.value) && !best.is_nan()) best = {z[v], span.c + v};
        }
        total.sum = merge.rescaled(total, best.value);
        total.best = best;
        // With nothing above -inf yet the differences would be NaN.
        if (best.value == -infinity<Scalar>()) continue;
#pragma unroll
        for (int v = 0; v < kGroup; ++v) {
          total.sum =
              add(total.sum, power_of_two(multiply(add(z[v], -best.value), tau.exponent_scale)));
        }
      }
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
    Scalar factor = 1 / total.sum;
    const Scalar top = total.best.value;
    // NaN or +inf among the logits, or nothing above -inf.
    const bool special = total.best.is_nan() || top == infinity<Scalar>() || index == kNoIndex;
    if (special) {
      const RowKind kind = settle_row(team, p, row, index != kNoIndex, &index);
      factor = kind == RowKind::kForbidden ? 0 : quiet_nan<Scalar>();
    }
    if (p.index != nullptr && team.rank() == 0 && blockIdx.y == 0) p.index[r] = index;
    for (int g = chunk.first_group + team.rank(); g < chunk.last_group; g += team.threads()) {
      const GroupSpan span = GroupSpan::of<T>(row, g, row.classes);
      Scalar z[kGroup];
      if (!special) noisy_group<T>(p, row, span, noise, z);
#pragma unroll
      for (int v = 0; v < kGroup; ++v) {
        z[v] = special
                   ? factor
                   : multiply(power_of_two(multiply(add(z[v], -top), tau.exponent_scale)), factor);
      }
      store_group(element_of<T>(p.y, p, row, span.c), p.class_stride, span, z);
    }
  }
}

// Hard samples and indices of split rows.
template <class T>
GUMBEL_EXT_KERNEL(kStreamThreads)
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
    for (int g = chunk.first_group + team.rank(); g < chunk.last_group; g += team.threads()) {
      const GroupSpan span = GroupSpan::of<T>(row, g, row.classes);
      Scalar z[kGroup];
      noisy_group<T>(p, row, span, noise, z);
#pragma unroll
      for (int v = 0; v < kGroup; ++v) {
        if (!(z[v] <= best.value) && !best.is_nan()) best = {z[v], span.c + v};
      }
      if (p.y != nullptr) {
        const Scalar zeros[kGroup] = {};
        store_group(element_of<T>(p.y, p, row, span.c), p.class_stride, span, zeros);
      }
    }
    best = team.reduce(best, BetterOf());
    if (team.rank() == 0) partials_of_row<Best<Scalar>>(p, r)[blockIdx.y] = best;
  }
}

template <class T>
GUMBEL_EXT_KERNEL(kStreamThreads)
pick_finish_kernel(const GUMBEL_EXT_CONSTANT Params p) {
  using Scalar = typename Element<T>::Scalar;
  constexpr int kGroup = Element<T>::kGroup;
  BlockTeam<kStreamThreads> team;
  const std::int64_t rows = p.outer * p.inner;
  for (std::int64_t r = team.first_row(); r < rows; r += team.row_step()) {
    const RowView row = RowView::of<T>(p, r);
    const Best<Scalar> best = merge_partials(team, p, r, Best<Scalar>::none(), BetterOf());
    int index = best.index;
    RowKind kind = RowKind::kOrdinary;
    if (best.is_nan() || index == kNoIndex) {
      kind = settle_row(team, p, row, best.is_nan(), &index);
    }
    if (p.index != nullptr && team.rank() == 0) p.index[r] = index;
    if (p.y == nullptr) continue;
    if (kind == RowKind::kOrdinary) {
      if (team.rank() == 0) narrow(Scalar(1), element_of<T>(p.y, p, row, index));
    } else if (kind == RowKind::kNaN) {
      for (int g = team.rank(); g < row.groups; g += team.threads()) {
        const GroupSpan span = GroupSpan::of<T>(row, g, row.classes);
        Scalar nans[kGroup];
#pragma unroll
        for (int v = 0; v < kGroup; ++v) nans[v] = quiet_nan<Scalar>();
        store_group(element_of<T>(p.y, p, row, span.c), p.class_stride, span, nans);
      }
    }
  }
}

// What a backward sums over a row: h y, and for dtau log(y) y h and log(y) y, since
// sum log(y) y (h - dot) = log_h - dot * log.
template <class Scalar>
struct Dots {
  Scalar dot, log_h, log;

  GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY void take(Scalar y, Scalar h, bool with_log) {
    dot = multiply_add(h, y, dot);
    if (!with_log || y == 0) return;
    // At the size of a subnormal y the term is nothing anyway.
    const Scalar smallest = clamped<Scalar>(0);
    const Scalar term = multiply(natural_log(y < smallest ? smallest : y), y);
    log_h = multiply_add(term, h, log_h);
    log = add(log, term);
  }
  // dtau of the row.
  GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY Scalar grad_tau(Scalar inverse_tau) const {
    return multiply(multiply_add(dot, log, -log_h), inverse_tau);
  }
};
struct AddDots {
  template <class Scalar>
  GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY Dots<Scalar> operator()(const Dots<Scalar>& a,
                                                                   const Dots<Scalar>& b) const {
    return {add(a.dot, b.dot), add(a.log_h, b.log_h), add(a.log, b.log)};
  }
};

// y may lie where grad_logits is written: a thread reads every element before it writes it.
template <class T, Phase phase>
GUMBEL_EXT_KERNEL(kStreamThreads)
backward_stream_kernel(const GUMBEL_EXT_CONSTANT Params p) {
  using Scalar = typename Element<T>::Scalar;
  constexpr int kGroup = Element<T>::kGroup;
  BlockTeam<kStreamThreads> team;
  const std::int64_t rows = p.outer * p.inner;
  for (std::int64_t r = team.first_row(); r < rows; r += team.row_step()) {
    const RowView row = RowView::of<T>(p, r);
    const ChunkView chunk = ChunkView::of<T>(p, row);
    const int index = static_cast<int>(p.index[r]);
    const bool forbidden = index < 0;
    const Scalar shift =
        forbidden ? Scalar(0) : static_cast<Scalar>(widen(*element_of<T>(p.grad, p, row, index)));
    Dots<Scalar> total{0, 0, 0};
    if (phase != Phase::kFinish) {
      for (int g = chunk.first_group + team.rank(); g < chunk.last_group; g += team.threads()) {
        const GroupSpan span = GroupSpan::of<T>(row, g, row.classes);
        Scalar y[kGroup], h[kGroup];
        load_group(element_of<T>(p.y, p, row, span.c), p.class_stride, span, Scalar(0), y);
        load_group(element_of<T>(p.grad, p, row, span.c), p.class_stride, span, shift, h);
#pragma unroll
        for (int v = 0; v < kGroup; ++v) {
          total.take(y[v], add(h[v], -shift), p.grad_tau != nullptr);
        }
      }
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
    for (int g = chunk.first_group + team.rank(); g < chunk.last_group; g += team.threads()) {
      const GroupSpan span = GroupSpan::of<T>(row, g, row.classes);
      Scalar y[kGroup], h[kGroup];
      load_group(element_of<T>(p.y, p, row, span.c), p.class_stride, span, Scalar(0), y);
      load_group(element_of<T>(p.grad, p, row, span.c), p.class_stride, span, shift, h);
#pragma unroll
      for (int v = 0; v < kGroup; ++v) {
        y[v] = forbidden ? Scalar(0)
                         : multiply(multiply(y[v], add(add(h[v], -shift), -total.dot)), inverse);
      }
      store_group(element_of<T>(p.grad_logits, p, row, span.c), p.class_stride, span, y);
    }
  }
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
