// Regimes kRows and kClusters: a team of threads holds a row in registers from the logits to the
// result, so that memory is touched once.
#pragma once

#include "row_view.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

// z of a row, kGroups groups a thread: group k of the thread is group rank + k * threads of the
// row.
template <class T, int kGroups>
struct HeldRow {
  using Scalar = typename Element<T>::Scalar;
  static constexpr int kGroup = Element<T>::kGroup;
  Scalar value[kGroups][kGroup];
};

template <class T, class Team>
GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY GroupSpan held_span(const Team& team, const RowView& row,
                                                             int k) {
  return GroupSpan::of<T>(row, team.rank() + k * team.threads(), row.classes);
}

// e[c] = 2^((z[c] - top) * scale) in place; returns their sum.
template <class T, int kGroups, class Team, class Scalar>
GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY Scalar exponentiate(Team& team, HeldRow<T, kGroups>& held,
                                                             Scalar top, Scalar scale) {
  Scalar sum = 0;
#pragma unroll
  for (int k = 0; k < kGroups; ++k) {
#pragma unroll
    for (int v = 0; v < HeldRow<T, kGroups>::kGroup; ++v) {
      const Scalar e = power_of_two(multiply(add(held.value[k][v], -top), scale));
      held.value[k][v] = e;
      sum = add(sum, e);
    }
  }
  return team.reduce(sum, Sum());
}

template <class T, class Team, int kGroups>
GUMBEL_EXT_KERNEL(Team::kBlockThreads)
soft_rows_kernel(const GUMBEL_EXT_CONSTANT Params p) {
  using Scalar = typename Element<T>::Scalar;
  constexpr int kGroup = Element<T>::kGroup;
  Team team;
  const RandomState state = read_state(p.random);
  record_state(state, p.used_state);
  NoiseSource noise(state);
  const std::int64_t rows = p.outer * p.inner;
  for (std::int64_t first = team.first_row(); first < rows; first += team.row_step()) {
    const RowView row = RowView::of<T>(p, first + team.row_in_block());
    HeldRow<T, kGroups> held;
    Scalar top = -infinity<Scalar>();
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      noisy_group<T>(p, row, held_span<T>(team, row, k), noise, held.value[k]);
      // A NaN is never larger. It comes to light in the sum.
#pragma unroll
      for (int v = 0; v < kGroup; ++v) top = Larger()(top, held.value[k][v]);
    }
    top = team.reduce(top, Larger());

    int index = kNoIndex, first_nan = kNoIndex;
#pragma unroll
    for (int k = kGroups - 1; k >= 0; --k) {
      const int c = held_span<T>(team, row, k).c;
#pragma unroll
      for (int v = kGroup - 1; v >= 0; --v) {
        if (held.value[k][v] == top) index = c + v;
        if (held.value[k][v] != held.value[k][v]) first_nan = c + v;
      }
    }
    index = team.reduce(index, Smaller());

    const InverseTau<Scalar> tau = inverse_tau<Scalar>(p, row.row);
    const Scalar sum = exponentiate<T>(team, held, top, tau.exponent_scale);
    Scalar factor = 1 / sum;
    bool settled = false;
    if (team.any(sum != sum)) {
      first_nan = team.reduce(first_nan, Smaller());
      int settled_index = first_nan != kNoIndex ? first_nan : index;
      const RowKind kind = settle_row(
          team, p, row, first_nan != kNoIndex || top > -infinity<Scalar>(), &settled_index);
      if (sum != sum) {
        settled = true;
        index = settled_index;
        factor = kind == RowKind::kForbidden ? 0 : quiet_nan<Scalar>();
      }
    }
    if (p.index != nullptr && team.rank() == 0 && row.classes > 0) p.index[row.row] = index;
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      const GroupSpan span = held_span<T>(team, row, k);
      Scalar y[kGroup];
#pragma unroll
      for (int v = 0; v < kGroup; ++v) {
        y[v] = settled ? factor : multiply(held.value[k][v], factor);
      }
      store_group(element_of<T>(p.y, p, row, span.c), p.class_stride, span, y);
    }
  }
}

// dl = y (h - sum h y) / tau with h = dy - dy[index]: shifting dy changes nothing in exact
// arithmetic, but at low tau the entry at the argmax is the one that would cancel. In: y; out:
// done.
template <class T, class Team, int kGroups>
GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY void gradient_of_held(
    Team& team, const Params& p, const RowView& row, const HeldRow<T, kGroups>& y,
    const InverseTau<typename Element<T>::Scalar>& tau) {
  using Scalar = typename Element<T>::Scalar;
  constexpr int kGroup = Element<T>::kGroup;
  const int index = row.classes > 0 ? static_cast<int>(p.index[row.row]) : 0;
  const bool forbidden = index < 0;
  const Scalar shift = row.classes > 0 && !forbidden
                           ? static_cast<Scalar>(widen(*element_of<T>(p.grad, p, row, index)))
                           : Scalar(0);
  HeldRow<T, kGroups> h;
  Scalar dot = 0;
#pragma unroll
  for (int k = 0; k < kGroups; ++k) {
    const GroupSpan span = held_span<T>(team, row, k);
    load_group(element_of<T>(p.grad, p, row, span.c), p.class_stride, span, shift, h.value[k]);
#pragma unroll
    for (int v = 0; v < kGroup; ++v) {
      h.value[k][v] = add(h.value[k][v], -shift);
      dot = multiply_add(h.value[k][v], y.value[k][v], dot);
    }
  }
  dot = team.reduce(dot, Sum());
  if (p.grad_tau != nullptr) {
    // -(1 / tau) sum log(y) (tau dl), with 0 log 0 = 0. Where y is subnormal its log is taken as
    // that of the smallest normal number: at that size the term is nothing anyway.
    const Scalar smallest = clamped<Scalar>(0);
    Scalar log_dot = 0;
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
#pragma unroll
      for (int v = 0; v < kGroup; ++v) {
        const Scalar probability = y.value[k][v];
        const Scalar log_y = natural_log(probability < smallest ? smallest : probability);
        const Scalar term = multiply(log_y, multiply(probability, add(h.value[k][v], -dot)));
        log_dot = add(log_dot, probability == 0 ? Scalar(0) : term);
      }
    }
    log_dot = team.reduce(log_dot, Sum());
    if (team.rank() == 0 && row.classes > 0) {
      static_cast<Scalar*>(p.grad_tau)[row.row] =
          forbidden ? Scalar(0) : multiply(-log_dot, tau.inverse);
    }
  }
#pragma unroll
  for (int k = 0; k < kGroups; ++k) {
    const GroupSpan span = held_span<T>(team, row, k);
    Scalar out[kGroup];
#pragma unroll
    for (int v = 0; v < kGroup; ++v) {
      out[v] = forbidden ? Scalar(0)
                         : multiply(multiply(y.value[k][v], add(h.value[k][v], -dot)), tau.inverse);
    }
    store_group(element_of<T>(p.grad_logits, p, row, span.c), p.class_stride, span, out);
  }
}

template <class T, class Team, int kGroups>
GUMBEL_EXT_KERNEL(Team::kBlockThreads)
backward_rows_kernel(const GUMBEL_EXT_CONSTANT Params p) {
  using Scalar = typename Element<T>::Scalar;
  Team team;
  const std::int64_t rows = p.outer * p.inner;
  for (std::int64_t first = team.first_row(); first < rows; first += team.row_step()) {
    const RowView row = RowView::of<T>(p, first + team.row_in_block());
    HeldRow<T, kGroups> y;
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      const GroupSpan span = held_span<T>(team, row, k);
      load_group(element_of<T>(p.y, p, row, span.c), p.class_stride, span, Scalar(0), y.value[k]);
    }
    gradient_of_held<T>(team, p, row, y, inverse_tau<Scalar>(p, row.row));
  }
}

template <class T, class Team, int kGroups>
GUMBEL_EXT_KERNEL(Team::kBlockThreads)
backward_recompute_rows_kernel(const GUMBEL_EXT_CONSTANT Params p) {
  using Scalar = typename Element<T>::Scalar;
  constexpr int kGroup = Element<T>::kGroup;
  Team team;
  NoiseSource noise(read_state(p.random));
  const std::int64_t rows = p.outer * p.inner;
  for (std::int64_t first = team.first_row(); first < rows; first += team.row_step()) {
    const RowView row = RowView::of<T>(p, first + team.row_in_block());
    HeldRow<T, kGroups> held;
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      noisy_group<T>(p, row, held_span<T>(team, row, k), noise, held.value[k]);
    }
    // The forward left the index of the largest: no search, but one more logarithm.
    const int index = row.classes > 0 ? static_cast<int>(p.index[row.row]) : -1;
    const Scalar top = index < 0 ? Scalar(0) : noisy_logit<T, Scalar>(p, row, index, noise);
    const InverseTau<Scalar> tau = inverse_tau<Scalar>(p, row.row);
    const Scalar factor = 1 / exponentiate<T>(team, held, top, tau.exponent_scale);
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
#pragma unroll
      for (int v = 0; v < kGroup; ++v) held.value[k][v] = multiply(held.value[k][v], factor);
    }
    gradient_of_held<T>(team, p, row, held, tau);
  }
}

// Hard samples and indices: nothing to hold, so any number of classes. Zeros are written on the
// way; the thread that wrote the winner's zero then makes it a one.
template <class T, class Team>
GUMBEL_EXT_KERNEL(Team::kBlockThreads)
pick_rows_kernel(const GUMBEL_EXT_CONSTANT Params p) {
  using Scalar = typename Element<T>::Scalar;
  constexpr int kGroup = Element<T>::kGroup;
  Team team;
  const RandomState state = read_state(p.random);
  record_state(state, p.used_state);
  NoiseSource noise(state);
  const std::int64_t rows = p.outer * p.inner;
  for (std::int64_t first = team.first_row(); first < rows; first += team.row_step()) {
    const RowView row = RowView::of<T>(p, first + team.row_in_block());
    Best<Scalar> own = Best<Scalar>::none();
    for (int g = team.rank(); g < row.groups; g += team.threads()) {
      const GroupSpan span = GroupSpan::of<T>(row, g, row.classes);
      Scalar z[kGroup];
      noisy_group<T>(p, row, span, noise, z);
#pragma unroll
      for (int v = 0; v < kGroup; ++v) {
        // Not "larger": a NaN must win, and the first one stay.
        if (!(z[v] <= own.value) && !own.is_nan()) own = {z[v], span.c + v};
      }
      if (p.y != nullptr) {
        const Scalar zeros[kGroup] = {};
        store_group(element_of<T>(p.y, p, row, span.c), p.class_stride, span, zeros);
      }
    }
    const Best<Scalar> best = team.reduce(own, BetterOf());
    int index = best.index;
    RowKind kind = RowKind::kOrdinary;
    const bool special = best.is_nan() || best.index == kNoIndex;
    if (team.any(special)) {
      int settled_index = index;
      const RowKind settled = settle_row(team, p, row, best.is_nan(), &settled_index);
      if (special) {
        kind = settled;
        index = settled_index;
      }
    }
    if (p.index != nullptr && team.rank() == 0 && row.classes > 0) p.index[row.row] = index;
    if (p.y == nullptr) continue;
    if (kind == RowKind::kOrdinary && own.index == index && row.classes > 0) {
      narrow(Scalar(1), element_of<T>(p.y, p, row, index));
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

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
