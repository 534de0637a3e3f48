// The log density of the Concrete distribution and its gradients, row by row; vectorised along the
// classes. concrete_density.cpp has the formulas, and what they become at the boundary.
#pragma once

#include "log_rows.h"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

using cpu::DensityProblem;

// log Gamma(n) for a whole number n >= 1.
inline double log_gamma(double n) {
  double shift = 0;
  // Stirling's series, whose first term left out is below 1e-15 from 16 on.
  while (n < 16) {
    shift += log_of(n);
    n += 1;
  }
  const double r = 1 / n, r2 = r * r;
  const double series =
      r * (1.0 / 12 - r2 * (1.0 / 360 - r2 * (1.0 / 1260 - r2 * (1.0 / 1680 - r2 / 1188))));
  return ((n - 0.5) * log_of(n) - n + 0.91893853320467274178) + series - shift;
}

template <class T>
class DensityWorker {
 public:
  using A = typename ComputeType<T>::type;
  using F = Vector<A>;

  explicit DensityWorker(const DensityProblem& problem) : p_(problem) {}

  void run(std::int64_t begin, std::int64_t end) {
    last_ = end;
    for (std::int64_t row = begin; row < end; ++row) {
      value_ = row_run(p_, p_.value, row, value_buffer_.reserve(p_.classes));
      logits_ = row_run(p_, p_.logits, row, logits_buffer_.reserve(p_.classes));
      tau_ = p_.tau_of(row);
      // As the type computed in has it, in all of the arithmetic.
      t_ = clamped<A>(tau_);
      survey();
      if (p_.density) {
        static_cast<A*>(p_.density)[row] = static_cast<A>(density());
      } else {
        gradients(row);
      }
    }
  }

 private:
  using N = std::numeric_limits<A>;

  // Classes j, j + 1, ... of the row; past its end there are impossible ones of value 0.
  struct Classes {
    F value, logits;
    typename RealTraits<F>::Mask none, never;  // of value 0; impossible

    F zero() const { return select(none, select(never, splat(0), splat(1)), splat(0)); }
    F dropped() const { return select(none, select(never, splat(1), splat(0)), splat(0)); }
  };

  static GUMBEL_EXT_INLINE F splat(A x) { return RealTraits<F>::splat(x); }

  GUMBEL_EXT_INLINE Classes classes_at(std::int64_t j) const {
    const F lowest = splat(-N::infinity()), nothing = p_.log_space ? lowest : splat(0);
    const std::int64_t left = p_.classes - j;
    Classes c{load_run(value_.data + j, left, value_.end),
              load_run(logits_.data + j, left, logits_.end),
              {},
              {}};
    if (left < kLanes) {
      const auto used = first_lanes<F>(static_cast<int>(left));
      c.value = select(used, c.value, nothing);
      c.logits = select(used, c.logits, lowest);
    }
    c.none = equal(c.value, nothing);
    c.never = equal(c.logits, lowest);
    return c;
  }

  // x = log(value), 0 where value is 0. Subnormal numbers, which log_positive() does not know, are
  // made larger first.
  GUMBEL_EXT_INLINE F logarithm(const Classes& c) const {
    if (p_.log_space) return select(c.none, splat(0), c.value);
    constexpr int kShift = N::digits;
    constexpr A factor = static_cast<A>(std::int64_t{1} << kShift);
    const F v = select(c.none, splat(1), c.value);
    const auto small = less(v, splat(N::min()));
    const F scaled = select(small, v * splat(factor), v);
    const F shift = select(small, splat(static_cast<A>(kShift * Numerics<A>::ln2)), splat(0));
    return log_positive(scaled) - shift;
  }

  // Reads the row: u = l - tau x, -inf where a class is dropped, and what there is of each kind.
  void survey() {
    const std::int64_t classes = p_.classes;
    u_ = u_buffer_.reserve(classes + kLanes);
    x_ = x_buffer_.reserve(classes + kLanes);
    const F lowest = splat(-N::infinity()), minus_t = splat(-t_), largest_number = splat(N::max());
    F top = lowest, top_zero = lowest, impossible = splat(0);
    auto bad = either_nan(lowest, lowest);
    double zeros = 0, dropped = 0;
    sum_x_ = 0;
    for (std::int64_t from = 0; from < classes; from += kChunk) {
      const std::int64_t to = std::min(from + kChunk, classes);
      F of_x = splat(0), of_zeros = splat(0), of_dropped = splat(0);
      for (std::int64_t j = from; j < to; j += kLanes) {
        const Classes c = classes_at(j);
        const F x = logarithm(c);
        bad = bad | either_nan(c.value, c.logits) | less(largest_number, c.value) |
              less(largest_number, c.logits);
        if (!p_.log_space) bad = bad | less(c.value, splat(0));
        impossible = impossible + select(c.never, select(c.none, splat(0), splat(1)), splat(0));
        const F u = fma(minus_t, x, c.logits);
        store(u_ + j, u);
        store(x_ + j, x);
        top_zero = maximum(select(c.none, u, lowest), top_zero);
        top = maximum(select(c.none, lowest, u), top);
        of_x = of_x + x;
        of_zeros = of_zeros + c.zero();
        of_dropped = of_dropped + c.dropped();
      }
      sum_x_ += sum(of_x);
      zeros += sum(of_zeros);
      dropped += sum(of_dropped);
    }
    const std::int64_t padding = (classes + kLanes - 1) / kLanes * kLanes - classes;
    n_ = static_cast<double>(classes) + static_cast<double>(padding) - dropped;
    m_ = zeros;
    boundary_ = zeros > 0;
    top_inside_ = any(bad) ? N::quiet_NaN() : largest(top);
    peak_ = any(bad) ? N::quiet_NaN() : (boundary_ ? largest(top_zero) : top_inside_);
    bad_ = any(bad) || n_ == m_ || peak_ == -N::infinity();
    impossible_ = sum(impossible) > 0;
  }

  // Terms of the softmax at classes j, ...: over the zeros alone if there are any.
  GUMBEL_EXT_INLINE F exponentials(std::int64_t j, const F& u) const {
    const F lowest = splat(-N::infinity());
    const F active = boundary_ ? select(classes_at(j).none, u, lowest) : u;
    return exp_nonpositive(active - splat(peak_));
  }

  double density() {
    if (bad_) return std::numeric_limits<double>::quiet_NaN();
    if (impossible_) return -std::numeric_limits<double>::infinity();
    if (boundary_) {
      const A coefficient =
          static_cast<A>(n_ - m_) * t_ - (p_.log_space ? A(0) : static_cast<A>(m_));
      if (coefficient > 0) return -std::numeric_limits<double>::infinity();
      if (coefficient < 0) return std::numeric_limits<double>::infinity();
    }
    const F lowest = splat(-N::infinity()), peak = splat(peak_);
    double total = 0, distance = 0;
    for (std::int64_t from = 0; from < p_.classes; from += kChunk) {
      const std::int64_t to = std::min(from + kChunk, p_.classes);
      F e = splat(0), d = splat(0);
      for (std::int64_t j = from; j < to; j += kLanes) {
        const F u = load(u_ + j);
        e = e + exponentials(j, u);
        d = d + select(less(lowest, u), u - peak, splat(0));
      }
      total += sum(e);
      distance += sum(d);
    }
    return constant() + distance - n_ * log_of(total) - (p_.log_space ? 0 : sum_x_);
  }

  // log Gamma(n) + (n - 1) log(tau), mostly the same from row to row.
  double constant() {
    if (n_ != constant_n_ || tau_ != constant_tau_) {
      constant_n_ = n_;
      constant_tau_ = tau_;
      const double tau = std::max(tau_, std::numeric_limits<double>::min());
      constant_ = log_gamma(n_) + (n_ - 1) * log_of(tau);
    }
    return constant_;
  }

  void gradients(std::int64_t row) {
    const A g = p_.grad.template as<const A>()[p_.offset(p_.grad, row)];
    if (p_.wide_grad_value) {
      gradients_into(row, g, rows_of<A>(p_.grad_value, row), rows_of<A>(p_.grad_value, last_));
    } else {
      gradients_into(row, g, rows_of<T>(p_.grad_value, row), rows_of<T>(p_.grad_value, last_));
    }
  }

  template <class E>
  E* rows_of(void* data, std::int64_t row) const {
    return data ? static_cast<E*>(data) + row * p_.classes : nullptr;
  }

  template <class V>
  void gradients_into(std::int64_t row, A g, V* of_value, V* value_end) {
    if (p_.wide_grad_logits) {
      gradients_into(row, g, of_value, value_end, rows_of<A>(p_.grad_logits, row),
                     rows_of<A>(p_.grad_logits, last_));
    } else {
      gradients_into(row, g, of_value, value_end, rows_of<T>(p_.grad_logits, row),
                     rows_of<T>(p_.grad_logits, last_));
    }
  }

  template <class V, class L>
  void gradients_into(std::int64_t row, A g, V* of_value, V* value_end, L* of_logits,
                      L* logits_end) {
    const std::int64_t classes = p_.classes;
    A* of_tau = p_.grad_tau ? static_cast<A*>(p_.grad_tau) + row : nullptr;
    if (bad_ || g == 0) {
      if (of_value) std::fill(of_value, of_value + classes, bad_ ? nan_of<V>() : V{});
      if (of_logits) std::fill(of_logits, of_logits + classes, bad_ ? nan_of<L>() : L{});
      if (of_tau) *of_tau = bad_ ? N::quiet_NaN() : A(0);
      return;
    }
    double total = 0;
    for (std::int64_t from = 0; from < classes; from += kChunk) {
      const std::int64_t to = std::min(from + kChunk, classes);
      F e = splat(0);
      for (std::int64_t j = from; j < to; j += kLanes) e = e + exponentials(j, load(u_ + j));
      total += sum(e);
    }
    const F factor = splat(static_cast<A>(n_ / total)), grad = splat(g), t = splat(t_);
    const F one_more = splat(p_.log_space ? A(0) : A(1));
    const F next = splat(boundary_ ? g * next_term(total) : A(0));
    double sum_xw = 0;
    for (std::int64_t from = 0; from < classes; from += kChunk) {
      const std::int64_t to = std::min(from + kChunk, classes);
      F xw = splat(0);
      for (std::int64_t j = from; j < to; j += kLanes) {
        const Classes c = classes_at(j);
        const F np = exponentials(j, load(u_ + j)) * factor;
        F w = splat(1) - np;
        w = select(c.none, select(c.never, splat(0), w), w);
        if (of_logits) store_run(of_logits + j, grad * w, classes - j, logits_end);
        if (of_tau) xw = xw + load(x_ + j) * w;
        if (!of_value) continue;
        const F of_x = splat(0) - t * w - one_more;
        F out = grad * of_x;
        if (!p_.log_space) {
          const F limit =
              select(equal(of_x, splat(0)), next * np, grad * (of_x * splat(N::infinity())));
          out = select(c.none, limit, out / c.value);
        }
        out = select(c.none, select(c.never, splat(0), out), out);
        store_run(of_value + j, out, classes - j, value_end);
      }
      sum_xw += sum(xw);
    }
    if (!of_tau) return;
    const double of_density = (n_ - 1) / static_cast<double>(t_) - sum_xw;
    *of_tau = boundary_ ? g * -N::infinity() : static_cast<A>(static_cast<double>(g) * of_density);
  }

  // Where d log p / d x of a zero is 0: the next term of the expansion in value, divided by it, is
  // -tau (n p) (S / W) value^(tau - 1), W and S the sums over the zeros and over the others. This
  // is -tau (S / W) value^(tau - 1).
  A next_term(double zeros) const {
    if (t_ < 1) return -N::infinity();
    if (t_ > 1) return 0;
    if (top_inside_ == -N::infinity()) return 0;
    const F lowest = splat(-N::infinity());
    double others = 0;
    for (std::int64_t j = 0; j < p_.classes; j += kLanes) {
      const F u = select(classes_at(j).none, lowest, load(u_ + j));
      others += sum(exp_nonpositive(u - splat(top_inside_)));
    }
    const A distance = top_inside_ - peak_;
    A power[kLanes];
    store(power, exp_nonpositive(splat(distance > 0 ? -distance : distance)));
    const double ratio = others / zeros;
    return static_cast<A>(-(distance > 0 ? ratio / static_cast<double>(power[0])
                                         : ratio * static_cast<double>(power[0])));
  }

  const DensityProblem& p_;
  std::int64_t last_ = 0;
  Run<const T> value_{}, logits_{};
  double tau_ = 1, n_ = 0, m_ = 0, sum_x_ = 0;
  A t_ = 1, peak_ = 0, top_inside_ = 0;
  A *u_ = nullptr, *x_ = nullptr;
  bool boundary_ = false, bad_ = false, impossible_ = false;
  double constant_n_ = 0, constant_tau_ = 0, constant_ = 0;
  Scratch<T> value_buffer_, logits_buffer_;
  Scratch<A> u_buffer_, x_buffer_;
};

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
