// The Gumbel-Rao gradient of hard samples: the mean over K conditional draws, a team of threads a
// row. estimators.cpp has the formulas and their source.
//
// In a draw with exponentials E, where i is the chosen class,
//     1 / r_j = (1 + E_j / (p_j E_i))^(1 / tau),    r_i = 1,    y = r / sum r
// and log(1 + X) is log(E_i + E_j / p_j) - log E_i: no division, and E_i is the same for all. In
// float32 both logarithms and the power are the hardware's. An error of 2^-22 of a logarithm, or
// absolutely of one below 1, is one of r of 2^-22 (1 + |log2(1 + X)| + |log2 E_i|) / tau, which is
// what the rounding of the noise itself comes to.
#pragma once

#include "estimators_kernels.cuh"
#include "noise.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

using cuda::GumbelRaoParams;

// The logarithm that costs least, for normal x > 0 and infinity; what makes it one to base 2.
GUMBEL_EXT_DEVICE float some_log(float x) { return log2_approximate(x); }
GUMBEL_EXT_DEVICE double some_log(double x) { return x < infinity<double>() ? natural_log(x) : x; }
template <class Scalar>
constexpr Scalar kSomeLogOf2 = sizeof(Scalar) == 4 ? Scalar(1) : Scalar(0.693147180559945309417);

// What a row's draws have in common.
template <class Scalar>
struct GumbelRaoRow {
  Scalar top, total, minus_scale, inverse_tau;
  std::uint64_t position;  // of class 0 in the first draw
  bool bad;

  // Where the reciprocal of a class's probability is no number, even times the largest E. (e^60 and
  // 2^31 classes make one of float32, e^600 of float64.)
  GUMBEL_EXT_DEVICE bool any_far(const Scalar (&l)[kRowGroup]) const {
    constexpr Scalar most = sizeof(Scalar) == 4 ? 60 : 600;
    bool far = false;
#pragma unroll
    for (int v = 0; v < kRowGroup; ++v) {
      far = far || (add(l[v], -top) < -most && l[v] != -infinity<Scalar>());
    }
    return far;
  }
  // The reciprocals of probabilities, or their logarithms if `far`; 0 for the chosen class, whose r
  // is 1 then.
  GUMBEL_EXT_DEVICE void weights(const EstimatorRow<Scalar>& row, int c,
                                 const Scalar (&l)[kRowGroup], bool far,
                                 Scalar (&w)[kRowGroup]) const {
#pragma unroll
    for (int v = 0; v < kRowGroup; ++v) {
      const Scalar distance = add(l[v], -top);
      if (far) {
        w[v] = add(some_log(total),
                   -multiply(distance, multiply(kLog2E<Scalar>, kSomeLogOf2<Scalar>)));
      } else {
        w[v] = multiply(total, reciprocal(power(distance, kLog2E<Scalar>)));
      }
      if (c + v == row.index) w[v] = far ? -infinity<Scalar>() : Scalar(0);
    }
  }

  // E becomes r.
  GUMBEL_EXT_DEVICE void turn(const Scalar (&w)[kRowGroup], bool far, Scalar chosen,
                              Scalar log_chosen, Scalar (&e)[kRowGroup]) const {
    if (far) {
#pragma unroll
      for (int v = 0; v < kRowGroup; ++v) {
        const Scalar x = add(add(w[v], some_log(e[v])), -log_chosen);
        const Scalar size = x < 0 ? x : -x;
        e[v] = add(larger_or_nan(x, Scalar(0)),
                   some_log(add(Scalar(1), power_of_two(multiply(size, 1 / kSomeLogOf2<Scalar>)))));
      }
    } else {
#pragma unroll
      for (int v = 0; v < kRowGroup; ++v) {
        // The hardware may give neighbouring numbers logarithms in the wrong order.
        e[v] =
            larger_or_nan(add(some_log(multiply_add(w[v], e[v], chosen)), -log_chosen), Scalar(0));
      }
    }
#pragma unroll
    for (int v = 0; v < kRowGroup; ++v) e[v] = power_of_two(multiply(e[v], minus_scale));
  }

  template <class Team, int kGroups>
  GUMBEL_EXT_DEVICE static GumbelRaoRow of(Team& team, const GumbelRaoParams& p,
                                           const EstimatorRow<Scalar>& row,
                                           const RowGroups<Scalar, Team, kGroups>& groups) {
    const auto sums = sums_of_row<false>(team, row, groups, Scalar(0));
    GumbelRaoRow r;
    r.top = sums.top;
    r.total = add(sums.p.sum, power(add(row.chosen_logit, -sums.top), kLog2E<Scalar>));
    r.minus_scale = -clamped(Scalar(1) / (kSomeLogOf2<Scalar> * row.place.tau));
    r.inverse_tau = clamped(Scalar(1) / row.place.tau);
    r.position = static_cast<std::uint64_t>(p.rows * p.classes + row.place.row * p.classes);
    r.bad = !(r.total < infinity<Scalar>());
    return r;
  }
};

// acc += y (d - <y, d>) of a draw.
template <class Scalar>
struct DrawTerms {
  Scalar inverse, shift;

  GUMBEL_EXT_DEVICE static DrawTerms of(const SoftmaxSums<Scalar>& sums) {
    const Scalar inverse = reciprocal(sums.sum);
    return {inverse, multiply(multiply(sums.dot, inverse), inverse)};
  }
  GUMBEL_EXT_DEVICE Scalar added(Scalar acc, Scalar r, Scalar d) const {
    return multiply_add(r, multiply_add(d, inverse, -shift), acc);
  }
};

template <class Scalar>
GUMBEL_EXT_DEVICE void write_means(const GumbelRaoParams& p, const EstimatorRow<Scalar>& row,
                                   const GumbelRaoRow<Scalar>& result, int c,
                                   Scalar (&acc)[kRowGroup]) {
  const Scalar share = Scalar(1) / static_cast<Scalar>(p.draws);
#pragma unroll
  for (int v = 0; v < kRowGroup; ++v) {
    acc[v] = multiply(multiply(acc[v], share), result.inverse_tau);
  }
  fill_group(row, result.bad, acc);
  store_results(p.grad_logits, p.type, row.place.row * p.classes, c, row.place.classes, acc);
}

// Rows that stay in registers for all draws: of a class 1 / p, d, the sum so far, and r of the
// draw. E_i of as many draws as the team has threads is made at once, one a thread.
template <class Scalar, class Team, int kGroups>
GUMBEL_EXT_KERNEL(Team::kBlockThreads, 384)
gumbel_rao_rows_kernel(const GUMBEL_EXT_CONSTANT GumbelRaoParams p) {
  GUMBEL_EXT_SHARED(Scalar, of_chosen, Team::kBlockThreads);
  Team team;
  ExponentialSource noise(read_state(p.random));
  const std::uint64_t step = static_cast<std::uint64_t>(p.rows * p.classes);
  const bool aligned = p.classes % 4 == 0;
  const Scalar* const of_team = of_chosen + (static_cast<int>(threadIdx.x) - team.rank());
  for (std::int64_t first = team.first_row(); first < p.rows; first += team.row_step()) {
    const auto row = EstimatorRow<Scalar>::of(p, first + team.row_in_block());
    Scalar w[kGroups][kRowGroup], d[kGroups][kRowGroup], acc[kGroups][kRowGroup];
    bool far = false;
    GumbelRaoRow<Scalar> result;
    {
      const RowGroups<Scalar, Team, kGroups> groups(team, row);
      result = GumbelRaoRow<Scalar>::of(team, p, row, groups);
      // All of a thread's classes alike.
      groups.each([&](int, int, const Scalar(&l)[kRowGroup], const Scalar(&)[kRowGroup]) {
        far = far || result.any_far(l);
      });
      groups.each([&](int k, int c, const Scalar(&l)[kRowGroup], const Scalar(&of_l)[kRowGroup]) {
        result.weights(row, c, l, far, w[k]);
#pragma unroll
        for (int v = 0; v < kRowGroup; ++v) d[k][v] = of_l[v], acc[k][v] = 0;
      });
    }
    const auto has = [&](int k) { return team.rank() + k * team.threads() < row.place.groups; };
    for (std::int64_t done = 0; done < p.draws; done += team.threads()) {
      const int many =
          static_cast<int>(p.draws - done < team.threads() ? p.draws - done : team.threads());
      std::uint64_t position = result.position + static_cast<std::uint64_t>(done) * step;
      if (team.rank() < many && row.index >= 0) {
        noise.make_one(position + static_cast<std::uint64_t>(team.rank()) * step +
                           static_cast<std::uint64_t>(row.index),
                       of_chosen[threadIdx.x]);
      } else {
        of_chosen[threadIdx.x] = 1;
      }
      __syncthreads();
#pragma unroll 1
      for (int n = 0; n < many; ++n, position += step) {
        const Scalar chosen = of_team[n], log_chosen = some_log(chosen);
        SoftmaxSums<Scalar> sums{0, 0};
        Scalar r[kGroups][kRowGroup];
#pragma unroll
        for (int k = 0; k < kGroups; ++k) {
          if (!has(k)) continue;
          const int c = (team.rank() + k * team.threads()) * kRowGroup;
          noise.make_four(position + static_cast<std::uint64_t>(c), aligned, r[k]);
          result.turn(w[k], far, chosen, log_chosen, r[k]);
#pragma unroll
          for (int v = 0; v < kRowGroup; ++v) sums.take(r[k][v], d[k][v]);
        }
        const auto draw = DrawTerms<Scalar>::of(team.reduce(sums, AddSums()));
#pragma unroll
        for (int k = 0; k < kGroups; ++k) {
          if (!has(k)) continue;
#pragma unroll
          for (int v = 0; v < kRowGroup; ++v) acc[k][v] = draw.added(acc[k][v], r[k][v], d[k][v]);
        }
      }
      // of_chosen is written again.
      __syncthreads();
    }
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      if (!has(k)) continue;
      write_means(p, row, result, (team.rank() + k * team.threads()) * kRowGroup, acc[k]);
    }
  }
}

// Rows of any length. For some draws at a time: of each draw the sums, in a sweep over the
// row; then of each group the terms of all those draws, made again.
template <class Scalar>
GUMBEL_EXT_KERNEL(256, resident_threads<Scalar>(4 * kRowGroup))
gumbel_rao_stream_kernel(const GUMBEL_EXT_CONSTANT GumbelRaoParams p) {
  using Team = BlockTeam<256>;
  constexpr int kDraws = static_cast<int>(cuda::kDrawsAtOnce);
  GUMBEL_EXT_SHARED(Scalar, of_chosen, kDraws);
  GUMBEL_EXT_SHARED(DrawTerms<Scalar>, of_draw, kDraws);
  Team team;
  ExponentialSource noise(read_state(p.random));
  const std::uint64_t step = static_cast<std::uint64_t>(p.rows * p.classes);
  const bool aligned = p.classes % 4 == 0;
  for (std::int64_t number = team.first_row(); number < p.rows; number += team.row_step()) {
    const auto row = EstimatorRow<Scalar>::of(p, number);
    const RowGroups<Scalar, Team, 0> groups(team, row);
    const auto result = GumbelRaoRow<Scalar>::of(team, p, row, groups);
    Scalar* const sums_of_row =
        p.sums == nullptr ? nullptr : static_cast<Scalar*>(p.sums) + row.place.row * p.classes;
    for (std::int64_t done = 0; done < p.draws; done += p.draws_at_once) {
      const int many =
          static_cast<int>(p.draws - done < p.draws_at_once ? p.draws - done : p.draws_at_once);
      const bool last = done + many == p.draws;
      const std::uint64_t first = result.position + static_cast<std::uint64_t>(done) * step;
      for (int n = team.rank(); n < many; n += team.threads()) {
        of_chosen[n] = 1;
        if (row.index >= 0) {
          noise.make_one(
              first + static_cast<std::uint64_t>(n) * step + static_cast<std::uint64_t>(row.index),
              of_chosen[n]);
        }
      }
      __syncthreads();
      for (int n = 0; n < many; ++n) {
        const std::uint64_t position = first + static_cast<std::uint64_t>(n) * step;
        const Scalar chosen = of_chosen[n], log_chosen = some_log(chosen);
        SoftmaxSums<Scalar> sums{0, 0};
        groups.each([&](int, int c, const Scalar(&l)[kRowGroup], const Scalar(&d)[kRowGroup]) {
          Scalar w[kRowGroup], r[kRowGroup];
          const bool far = result.any_far(l);
          result.weights(row, c, l, far, w);
          noise.make_four(position + static_cast<std::uint64_t>(c), aligned, r);
          result.turn(w, far, chosen, log_chosen, r);
#pragma unroll
          for (int v = 0; v < kRowGroup; ++v) sums.take(r[v], d[v]);
        });
        sums = team.reduce(sums, AddSums());
        if (team.rank() == 0) of_draw[n] = DrawTerms<Scalar>::of(sums);
      }
      __syncthreads();
      groups.each([&](int, int c, const Scalar(&l)[kRowGroup], const Scalar(&d)[kRowGroup]) {
        Scalar w[kRowGroup], acc[kRowGroup];
        const bool far = result.any_far(l);
        result.weights(row, c, l, far, w);
#pragma unroll
        for (int v = 0; v < kRowGroup; ++v) {
          acc[v] = done > 0 && v < row.place.classes - c ? sums_of_row[c + v] : Scalar(0);
        }
#pragma unroll 1
        for (int n = 0; n < many; ++n) {
          Scalar r[kRowGroup];
          const Scalar chosen = of_chosen[n];
          const DrawTerms<Scalar> draw = of_draw[n];
          noise.make_four(
              first + static_cast<std::uint64_t>(n) * step + static_cast<std::uint64_t>(c), aligned,
              r);
          result.turn(w, far, chosen, some_log(chosen), r);
#pragma unroll
          for (int v = 0; v < kRowGroup; ++v) acc[v] = draw.added(acc[v], r[v], d[v]);
        }
        if (last) {
          write_means(p, row, result, c, acc);
        } else {
#pragma unroll
          for (int v = 0; v < kRowGroup; ++v) {
            if (v < row.place.classes - c) sums_of_row[c + v] = acc[v];
          }
        }
      });
      // Both arrays are written again.
      __syncthreads();
    }
  }
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
