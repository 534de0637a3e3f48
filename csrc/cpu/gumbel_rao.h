// The Gumbel-Rao gradient: the straight-through gradient averaged over draws of the noise given the
// sample i. With E_c ~ Exp(1) and p = softmax(l) the perturbed logits of a draw, less that of the
// sample, are -log(1 + X_j), X_j = E_j / (p_j E_i) (Maddison, Tarlow, Minka, arXiv 1411.0030), so
// that with r_j = (1 + X_j)^(-1/tau), r_i = 1 and d = grad - grad[i]
//     y = r / sum(r),    out = 1 / (tau draws) sum over draws of y (d - y.d)
//
// Draws are added one after the other to the gradient of a tile of rows whose noise is made in one
// run; a long row has its noise made piece by piece.
#pragma once

#include "estimator_rows.h"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

template <class T>
class GumbelRaoWorker {
 public:
  using A = typename ComputeType<T>::type;
  using F = Vector<A>;

  explicit GumbelRaoWorker(const EstimatorProblem& problem)
      : p_(problem), rows_(problem), noise_(problem.seed, problem.offset_of_state) {}

  void run(std::int64_t begin, std::int64_t end) {
    const std::int64_t classes = p_.classes;
    if (classes > kRun) {
      pitch_ = padded(classes);
      tile_ = 1;
    } else {
      pitch_ = classes <= kLanes / 2 ? kHalfLanes : padded(classes);
      tile_ = std::max<std::int64_t>(1, std::min(kRun / classes, kTileElements / pitch_));
    }
    const std::int64_t room = padded(tile_ * pitch_ + padded(classes));
    weight_ = buffer_.reserve(4 * room);
    d_ = weight_ + room;
    total_ = d_ + room;
    r_ = total_ + room;
    states_ = state_buffer_.reserve(tile_);
    for (std::int64_t row = begin; row < end; row += tile_) {
      const std::int64_t rows = std::min(tile_, end - row);
      for (std::int64_t r = 0; r < rows; ++r) start(row + r, r);
      for (std::int64_t draw = 0; draw < p_.draws; ++draw) add_draw(row, rows, draw);
      for (std::int64_t r = 0; r < rows; ++r) finish(row + r, r, end);
    }
  }

 private:
  using N = std::numeric_limits<A>;
  using Half = typename HalfOf<F>::type;
  static constexpr std::int64_t kHalfLanes = RealTraits<Half>::lanes;
  static constexpr std::int64_t kRun = ExponentialSpan<A>::kCapacity - 3;
  static constexpr std::int64_t kTileElements = 1024;
  // Up to this weight 1 / p neither weight times noise nor 1 / noise overflow: noise is at least
  // 2^-65 and below 2^6.
  static constexpr A kLargestWeight =
      std::is_same_v<A, float> ? static_cast<A>(0x1p50) : static_cast<A>(0x1p900);

  // How r is made of X: (1 + X)^(-1/tau) where 1/tau is 1 or 2, where it is another number, and
  // where the weights are logarithms.
  enum class Form { kReciprocal, kSquaredReciprocal, kPower, kLogarithms };

  struct RowState {
    RowKind kind;
    std::int64_t index;
    Form form;
    A exponent;  // -log2(e) / tau
    A scale;     // 1 / (tau draws)
    A at_index;  // what the draws so far add to the gradient at the sample
  };

  // The weights 1 / p of a row, or where one of them is too large their logarithms. Those of the
  // sample and of impossible classes, and the padding, are 0 and inf: their r is 0.
  void start(std::int64_t row, std::int64_t r) {
    A* weight = weight_ + r * pitch_;
    A* total = total_ + r * pitch_;
    RowState& state = states_[r];
    const bool ordinary = rows_.read(row, weight, d_ + r * pitch_);
    state.kind = rows_.kind;
    state.index = rows_.index;
    if (!ordinary) {
      // Draws go over it all the same.
      std::fill(weight, weight + pitch_, A(0));
      std::fill(d_ + r * pitch_, d_ + (r + 1) * pitch_, A(0));
      state.form = Form::kPower;
      state.index = 0;
      state.exponent = state.scale = state.at_index = 0;
      std::fill(total, total + pitch_, A(0));
      return;
    }
    const double tau = p_.tau_of(row);
    state.exponent = -InverseTau<A>(tau).exponent_scale;
    state.scale = clamped<A>(1 / (tau * static_cast<double>(p_.draws)));
    state.at_index = 0;
    // total serves for the exponentials.
    const double sum_e = rows_.exponentiate(weight, static_cast<A>(kLog2E), total);
    const F sum = RealTraits<F>::splat(static_cast<A>(sum_e)), nothing = RealTraits<F>::splat(0),
            lowest = RealTraits<F>::splat(-N::infinity()),
            least =
                RealTraits<F>::splat(static_cast<A>(sum_e / static_cast<double>(kLargestWeight)));
    auto wide = either_nan(nothing, nothing);
    for (std::int64_t j = 0; j < p_.classes; j += kLanes) {
      const F l = load(weight + j), e = load(total + j);
      wide = wide | less(select(equal(l, lowest), sum, e), least);
    }
    const double inverse = 1 / tau;
    state.form = any(wide)      ? Form::kLogarithms
                 : inverse == 1 ? Form::kReciprocal
                 : inverse == 2 ? Form::kSquaredReciprocal
                                : Form::kPower;
    const bool logarithms = state.form == Form::kLogarithms;
    const F shift = RealTraits<F>::splat(rows_.top),
            log_sum = RealTraits<F>::splat(static_cast<A>(log_of(sum_e)));
    for (std::int64_t j = 0; j < p_.classes; j += kLanes) {
      const F l = load(weight + j);
      const auto never = equal(l, lowest);
      if (logarithms) {
        store(weight + j, log_sum - (l - shift));
      } else {
        store(weight + j, select(never, nothing, sum / select(never, sum, load(total + j))));
      }
      store(total + j, nothing);
    }
    weight[rows_.index] = logarithms ? N::infinity() : A(0);
  }

  void add_draw(std::int64_t row, std::int64_t rows, std::int64_t draw) {
    const std::int64_t classes = p_.classes;
    const std::uint64_t n = static_cast<std::uint64_t>((1 + draw) * p_.rows + row) *
                            static_cast<std::uint64_t>(classes);
    if (classes > kRun) {
      add_long_row(n);
      return;
    }
    span_.prepare(noise_, n, rows * classes);
    if (classes <= kLanes / 2) {
      for (std::int64_t r = 0; r < rows; ++r) add_short_row<Half>(r);
    } else if (classes <= kLanes) {
      for (std::int64_t r = 0; r < rows; ++r) add_short_row<F>(r);
    } else {
      for (std::int64_t r = 0; r < rows; ++r) add_row(r);
    }
  }

  // r_j of classes j, ...; `of_index` is 1 / E_i, or its logarithm.
  template <Form form, class V>
  static GUMBEL_EXT_INLINE V relative(const V& e, const V& weight, const V& of_index,
                                      const V& exponent) {
    using R = RealTraits<V>;
    const V zero = R::splat(0), one = R::splat(1);
    if constexpr (form == Form::kLogarithms) {
      // log(1 + e^v)
      const V v = log_positive(e) + (weight + of_index);
      const V away = select(less(v, zero), v, zero - v);
      const V power = exp_nonpositive(away);
      return exp2_nonpositive((maximum(v, zero) + log_positive(one + power)) * exponent);
    } else {
      const V u = fma(e * weight, of_index, one);
      V r;
      if constexpr (form == Form::kReciprocal) {
        r = one / u;
      } else if constexpr (form == Form::kSquaredReciprocal) {
        r = one / (u * u);  // 0 where the square is infinite
      } else {
        r = exp2_nonpositive(log_positive(u) * exponent);
      }
      return select(equal(weight, zero), zero, r);
    }
  }

  static A factor_of_index(const RowState& state, A e) {
    if (state.form != Form::kLogarithms) return A(1) / e;
    A out[kLanes];
    store(out, log_positive(RealTraits<F>::splat(e)));
    return -out[0];
  }

  // A row that fits one vector.
  template <class V>
  GUMBEL_EXT_INLINE void add_short_row(std::int64_t r) {
    using R = RealTraits<V>;
    RowState& state = states_[r];
    const std::int64_t at = r * p_.classes;
    const V of_index = R::splat(factor_of_index(state, span_.one_at(at + state.index)));
    const V e = span_.template at_as<V>(at), weight = load_as<V>(weight_ + r * pitch_),
            d = load_as<V>(d_ + r * pitch_), exponent = R::splat(state.exponent);
    V v;
    switch (state.form) {
      case Form::kReciprocal:
        v = relative<Form::kReciprocal>(e, weight, of_index, exponent);
        break;
      case Form::kSquaredReciprocal:
        v = relative<Form::kSquaredReciprocal>(e, weight, of_index, exponent);
        break;
      case Form::kPower:
        v = relative<Form::kPower>(e, weight, of_index, exponent);
        break;
      case Form::kLogarithms:
        v = relative<Form::kLogarithms>(e, weight, of_index, exponent);
        break;
    }
    const A inverse = A(1) / (A(1) + sum(v));
    const A mean = sum(v * d) * inverse;
    A* total = total_ + r * pitch_;
    store(total, fma(v * R::splat(inverse), d - R::splat(mean), load_as<V>(total)));
    state.at_index = state.at_index - mean * inverse;
  }

  void add_row(std::int64_t r) {
    const std::int64_t at = r * p_.classes;
    const A of_index = factor_of_index(states_[r], span_.one_at(at + states_[r].index));
    A sum_r = 0, sum_rd = 0;
    fill(r, 0, p_.classes, at, of_index, sum_r, sum_rd);
    settle(r, static_cast<double>(sum_r), static_cast<double>(sum_rd));
  }

  // A row longer than a run of noise.
  void add_long_row(std::uint64_t n) {
    const std::int64_t classes = p_.classes;
    span_.prepare(noise_, n + static_cast<std::uint64_t>(states_[0].index), 1);
    const A of_index = factor_of_index(states_[0], span_.one_at(0));
    double sum_r = 0, sum_rd = 0;
    for (std::int64_t c = 0; c < classes; c += kPiece) {
      const std::int64_t count = std::min(kPiece, classes - c);
      A part_r = 0, part_rd = 0;
      span_.prepare(noise_, n + static_cast<std::uint64_t>(c), count);
      fill(0, c, count, 0, of_index, part_r, part_rd);
      sum_r += static_cast<double>(part_r);
      sum_rd += static_cast<double>(part_rd);
    }
    settle(0, sum_r, sum_rd);
  }

  // r of classes c, ..., c + count - 1, whose noise starts at `at` of the run.
  void fill(std::int64_t r, std::int64_t c, std::int64_t count, std::int64_t at, A of_index,
            A& sum_r, A& sum_rd) {
    switch (states_[r].form) {
      case Form::kReciprocal:
        return fill_as<Form::kReciprocal>(r, c, count, at, of_index, sum_r, sum_rd);
      case Form::kSquaredReciprocal:
        return fill_as<Form::kSquaredReciprocal>(r, c, count, at, of_index, sum_r, sum_rd);
      case Form::kPower:
        return fill_as<Form::kPower>(r, c, count, at, of_index, sum_r, sum_rd);
      case Form::kLogarithms:
        return fill_as<Form::kLogarithms>(r, c, count, at, of_index, sum_r, sum_rd);
    }
  }
  template <Form form>
  void fill_as(std::int64_t r, std::int64_t c, std::int64_t count, std::int64_t at, A of_index,
               A& sum_r, A& sum_rd) {
    using R = RealTraits<F>;
    const A *weight = weight_ + r * pitch_ + c, *d = d_ + r * pitch_ + c;
    A* out = r_ + c;
    const F factor = R::splat(of_index), exponent = R::splat(states_[r].exponent);
    F all = R::splat(0), with_d = R::splat(0);
    for (std::int64_t j = 0; j < count; j += kLanes) {
      const F v = relative<form>(span_.at(at + j), load(weight + j), factor, exponent);
      store(out + j, v);
      all = all + v;
      with_d = fma(v, load(d + j), with_d);
    }
    sum_r = sum(all);
    sum_rd = sum(with_d);
  }

  void settle(std::int64_t r, double sum_r, double sum_rd) {
    using R = RealTraits<F>;
    const A inverse = static_cast<A>(1 / (1 + sum_r)), mean = static_cast<A>(sum_rd / (1 + sum_r));
    const A* d = d_ + r * pitch_;
    A* total = total_ + r * pitch_;
    const F factor = R::splat(inverse), y_d = R::splat(mean);
    for (std::int64_t j = 0; j < p_.classes; j += kLanes) {
      store(total + j, fma(load(r_ + j) * factor, load(d + j) - y_d, load(total + j)));
    }
    states_[r].at_index = states_[r].at_index - mean * inverse;
  }

  void finish(std::int64_t row, std::int64_t r, std::int64_t end) {
    const RowState& state = states_[r];
    rows_.kind = state.kind;
    rows_.index = state.index;
    if (state.kind != RowKind::kOrdinary) {
      rows_.write_uniform(row);
      return;
    }
    const A* total = total_ + r * pitch_;
    const F scale = RealTraits<F>::splat(state.scale);
    rows_.write(row, end, state.at_index * state.scale,
                [&](std::int64_t j) { return load(total + j) * scale; });
  }

  // Of a multiple of 16 classes, so that the order of a sum does not depend on where a run starts.
  static constexpr std::int64_t kPiece = 496;

  const EstimatorProblem& p_;
  EstimatorRows<T> rows_;
  NoiseSource noise_;
  ExponentialSpan<A> span_;
  std::int64_t pitch_ = 0, tile_ = 1;
  Scratch<A> buffer_;
  A *weight_ = nullptr, *d_ = nullptr, *total_ = nullptr, *r_ = nullptr;
  Scratch<RowState> state_buffer_;
  RowState* states_ = nullptr;
};

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
