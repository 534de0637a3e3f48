// Regimes kRows and kClusters: a team of threads holds a row in registers from the logits to the
// result, so that memory is touched once.
#pragma once

#include "row_view.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

// A row, kGroups groups a thread: group k of the thread is group rank + k * threads of the row.
template <class T, class Team, int kGroups>
struct HeldRow {
  using Scalar = typename Element<T>::Scalar;
  static constexpr int kGroup = Element<T>::kGroup;

  GUMBEL_EXT_DEVICE static GroupSpan span(const Team& team, const RowView& row, int k) {
    return GroupSpan::of<T>(row, team.rank() + k * team.threads());
  }
  GUMBEL_EXT_DEVICE static void load(const Team& team, const RowView& row, const void* base,
                                     T outside, RawGroup<T> (&raw)[kGroups]) {
#pragma unroll
    for (int k = 0; k < kGroups; ++k) raw[k].load(base, row, span(team, row, k), outside);
  }

  Scalar value[kGroups][kGroup];
};

// e[c] = 2^((z[c] - top) * scale), in place if kInPlace; returns their sum.
template <bool kInPlace, class T, class Team, int kGroups, class Scalar>
GUMBEL_EXT_DEVICE Scalar exponentiate(Team& team, HeldRow<T, Team, kGroups>& held, Scalar top,
                                      Scalar scale) {
  Scalar sum = 0;
#pragma unroll
  for (int k = 0; k < kGroups; ++k) {
#pragma unroll
    for (int v = 0; v < Element<T>::kGroup; ++v) {
      const Scalar e = power_of_two(multiply(add(held.value[k][v], -top), scale));
      if (kInPlace) held.value[k][v] = e;
      sum = add(sum, e);
    }
  }
  return team.reduce(sum, Sum());
}

// Writes y or, if kLog, log y, which has no index.
template <class T, class Team, int kGroups, bool kLog>
GUMBEL_EXT_KERNEL(Team::kBlockThreads, resident_threads<T>(kGroups* Element<T>::kGroup))
soft_rows_kernel(const GUMBEL_EXT_CONSTANT Params p) {
  using Scalar = typename Element<T>::Scalar;
  using Held = HeldRow<T, Team, kGroups>;
  constexpr int kGroup = Element<T>::kGroup;
  Team team;
  const RandomState state = read_state(p.random);
  record_state(state, p.used_state);
  NoiseSource noise(state);
  const std::int64_t rows = p.outer * p.inner;
  for (std::int64_t first = team.first_row(); first < rows; first += team.row_step()) {
    const RowView row = RowView::of<T>(p, first + team.row_in_block());
    RawGroup<T> logits[kGroups];
    Held::load(team, row, p.logits, narrowed<T>(-infinity<Scalar>()), logits);

    Held held;
    Scalar group_top[kGroups], top = -infinity<Scalar>();
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      noisy_group(p, row, Held::span(team, row, k), logits[k], noise, held.value[k]);
      // A NaN is never larger. It comes to light in the sum.
      group_top[k] = -infinity<Scalar>();
#pragma unroll
      for (int v = 0; v < kGroup; ++v) group_top[k] = Larger()(group_top[k], held.value[k][v]);
      top = Larger()(top, group_top[k]);
    }
    top = team.reduce(top, Larger());

    int index = kNoIndex;
    if constexpr (!kLog) {
#pragma unroll
      for (int k = kGroups - 1; k >= 0; --k) {
        if (group_top[k] != top) continue;
        const int c = Held::span(team, row, k).c;
#pragma unroll
        for (int v = kGroup - 1; v >= 0; --v) {
          if (held.value[k][v] == top) index = c + v;
        }
      }
      index = team.reduce(index, Smaller());
    }

    const InverseTau<Scalar> tau = inverse_tau<Scalar>(p, row.row);
    const Scalar sum = exponentiate</*kInPlace=*/!kLog>(team, held, top, tau.exponent_scale);
    Scalar share = share_of<kLog>(sum);
    bool settled = false;
    if (team.any(sum != sum)) {
      int settled_index = top > -infinity<Scalar>() ? index : kNoIndex;
      const RowKind kind = settle_row<T>(team, p, row, &settled_index);
      if (sum != sum) {
        settled = true;
        index = settled_index;
        share = fill_of<kLog, Scalar>(kind);
      }
    }
    if (!kLog && p.index != nullptr && team.rank() == 0 && row.classes > 0) {
      p.index[row.row] = index;
    }
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      Scalar y[kGroup];
#pragma unroll
      for (int v = 0; v < kGroup; ++v) {
        const Scalar z_or_e = held.value[k][v];
        y[v] = kLog ? result_of<kLog>(z_or_e, top, tau, share) : multiply(z_or_e, share);
      }
      if (settled) {
#pragma unroll
        for (int v = 0; v < kGroup; ++v) y[v] = share;
      }
      store_group<T>(p.y, row, Held::span(team, row, k), y);
    }
  }
}

// The gradient dl = y (h - sum h y) / tau with h = dy - dy[index]: shifting dy changes nothing in
// exact arithmetic, but at low tau the entry at the argmax is the one that would cancel.
template <class T, class Team, int kGroups>
GUMBEL_EXT_DEVICE void gradient_of_held(Team& team, const Params& p, const RowView& row,
                                        const HeldRow<T, Team, kGroups>& y,
                                        const RawGroup<T> (&grad)[kGroups], std::int64_t index,
                                        const InverseTau<typename Element<T>::Scalar>& tau) {
  using Scalar = typename Element<T>::Scalar;
  using Held = HeldRow<T, Team, kGroups>;
  constexpr int kGroup = Element<T>::kGroup;
  const bool forbidden = index < 0;
  const Scalar shift = chosen_gradient<T>(p, row, index);
  Scalar dot = 0;
#pragma unroll
  for (int k = 0; k < kGroups; ++k) {
    Scalar h[kGroup];
    grad[k].widen_to(h);
#pragma unroll
    for (int v = 0; v < kGroup; ++v) {
      dot = multiply_add(add(h[v], -shift), y.value[k][v], dot);
    }
  }
  dot = team.reduce(dot, Sum());
  if (p.grad_tau != nullptr) {
    // -(1 / tau) sum log(y) (tau dl). The logarithm of 0 is a finite number here, which makes 0 log
    // 0 = 0; so is that of a subnormal y, whose term is nothing at any rate.
    Scalar log_dot = 0;
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      Scalar h[kGroup];
      grad[k].widen_to(h);
#pragma unroll
      for (int v = 0; v < kGroup; ++v) {
        const Scalar probability = y.value[k][v];
        const Scalar weight = multiply(probability, add(add(h[v], -shift), -dot));
        log_dot = multiply_add(natural_log(probability), weight, log_dot);
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
    Scalar h[kGroup];
    grad[k].widen_to(h);
#pragma unroll
    for (int v = 0; v < kGroup; ++v) {
      h[v] = multiply(multiply(y.value[k][v], add(add(h[v], -shift), -dot)), tau.inverse);
    }
    if (forbidden) {
#pragma unroll
      for (int v = 0; v < kGroup; ++v) h[v] = 0;
    }
    store_group<T>(p.grad_logits, row, Held::span(team, row, k), h);
  }
}

template <class T, class Team, int kGroups>
GUMBEL_EXT_KERNEL(Team::kBlockThreads, resident_threads<T>(kGroups* Element<T>::kGroup))
backward_rows_kernel(const GUMBEL_EXT_CONSTANT Params p) {
  using Scalar = typename Element<T>::Scalar;
  using Held = HeldRow<T, Team, kGroups>;
  Team team;
  const std::int64_t rows = p.outer * p.inner;
  for (std::int64_t first = team.first_row(); first < rows; first += team.row_step()) {
    const RowView row = RowView::of<T, false>(p, first + team.row_in_block());
    const std::int64_t index = row.classes > 0 ? p.index[row.row] : -1;
    RawGroup<T> y[kGroups], grad[kGroups];
    Held::load(team, row, p.y, narrowed<T>(0), y);
    Held::load(team, row, p.grad, narrowed<T>(0), grad);
    Held held;
#pragma unroll
    for (int k = 0; k < kGroups; ++k) y[k].widen_to(held.value[k]);
    gradient_of_held(team, p, row, held, grad, index, inverse_tau<Scalar>(p, row.row));
  }
}

template <class T, class Team, int kGroups>
GUMBEL_EXT_KERNEL(Team::kBlockThreads, resident_threads<T>(2 * kGroups * Element<T>::kGroup))
backward_recompute_rows_kernel(const GUMBEL_EXT_CONSTANT Params p) {
  using Scalar = typename Element<T>::Scalar;
  using Held = HeldRow<T, Team, kGroups>;
  constexpr int kGroup = Element<T>::kGroup;
  Team team;
  NoiseSource noise(read_state(p.random));
  const std::int64_t rows = p.outer * p.inner;
  for (std::int64_t first = team.first_row(); first < rows; first += team.row_step()) {
    RowView row = RowView::of<T>(p, first + team.row_in_block());
    const std::int64_t index = row.classes > 0 ? p.index[row.row] : -1;
    RawGroup<T> logits[kGroups], grad[kGroups];
    Held::load(team, row, p.logits, narrowed<T>(-infinity<Scalar>()), logits);
    // The forward left the index of the largest: no search, but one more logarithm.
    Scalar top = 0;
    if (index >= 0 && index < row.classes) {
      top = noisy_logit<T, Scalar>(p, row, static_cast<int>(index), noise);
    }
    Held held;
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      noisy_group(p, row, Held::span(team, row, k), logits[k], noise, held.value[k]);
    }
    // Gradients are loaded only here, because the noise needs the registers. Larger teams have none
    // left for where the row's groups lie either, which is therefore worked out again.
    if constexpr (kGroups * kGroup > 8) keep_in_register(row.lead);
    Held::load(team, row, p.grad, narrowed<T>(0), grad);
    const InverseTau<Scalar> tau = inverse_tau<Scalar>(p, row.row);
    const Scalar factor =
        refined_reciprocal(exponentiate</*kInPlace=*/true>(team, held, top, tau.exponent_scale));
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
#pragma unroll
      for (int v = 0; v < kGroup; ++v) held.value[k][v] = multiply(held.value[k][v], factor);
    }
    gradient_of_held(team, p, row, held, grad, index, tau);
  }
}

// Hard samples and indices: nothing to hold, so any number of classes. Zeros are written on the
// way; the thread that wrote the winner's zero then makes it a one.
template <class T, class Team, int kBatch>
GUMBEL_EXT_KERNEL(Team::kBlockThreads, resident_threads<T>(2 * kBatch * Element<T>::kGroup))
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
    for_noisy_groups<T, kBatch>(team, p, row, 0, row.groups, noise,
                                [&](const GroupSpan& span, const Scalar(&z)[kGroup]) {
                                  take_group(z, span.c, own);
                                  if (p.y == nullptr) return;
                                  const Scalar zeros[kGroup] = {};
                                  store_group<T>(p.y, row, span, zeros);
                                });
    const Best<Scalar> best = team.reduce(own, BetterOf());
    int index = best.index;
    RowKind kind = RowKind::kOrdinary;
    const bool special = best.is_nan() || best.index == kNoIndex;
    if (team.any(special)) {
      int settled_index = kNoIndex;
      const RowKind settled = settle_row<T>(team, p, row, &settled_index);
      if (special) {
        kind = settled;
        index = settled_index;
      }
    }
    if (p.index != nullptr && team.rank() == 0 && row.classes > 0) p.index[row.row] = index;
    if (p.y == nullptr) continue;
    if (kind == RowKind::kOrdinary) {
      if (own.index == index) narrow(Scalar(1), element_of<T>(p.y, row, index));
    } else if (kind == RowKind::kNaN) {
      fill_groups<T>(team, p.y, row, 0, row.groups, quiet_nan<Scalar>());
    }
  }
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
