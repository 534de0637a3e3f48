// Gradients in closed form, given the sample i: ZGR, ReinMax and the gapped straight-through, row
// by row. d = grad - grad[i], p = softmax(l), q = softmax(l / tau).
#pragma once

#include "estimator_rows.h"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

using cpu::EstimatorKind;

template <class T>
class EstimatorWorker {
 public:
  using A = typename ComputeType<T>::type;
  using F = Vector<A>;

  explicit EstimatorWorker(const EstimatorProblem& problem) : p_(problem), rows_(problem) {}

  void run(std::int64_t begin, std::int64_t end) {
    const std::int64_t room = padded(p_.classes);
    logits_ = buffer_.reserve(4 * room);
    d_ = logits_ + room;
    e_ = d_ + room;
    f_ = e_ + room;
    for (std::int64_t row = begin; row < end; ++row) {
      if (!rows_.read(row, logits_, d_)) {
        rows_.write_uniform(row);
        continue;
      }
      switch (p_.kind) {
        case EstimatorKind::kZgr:
          zgr(row, end);
          break;
        case EstimatorKind::kReinMax:
          reinmax(row, end);
          break;
        case EstimatorKind::kGapped:
          gapped(row, end);
          break;
      }
    }
  }

 private:
  static GUMBEL_EXT_INLINE F splat(double x) { return RealTraits<F>::splat(static_cast<A>(x)); }

  // out_j = p_j d_j / 2, out_i = -p.d / 2
  void zgr(std::int64_t row, std::int64_t end) {
    const double half = 0.5 / rows_.exponentiate(logits_, kNatural, e_);
    const double t = rows_.dot(e_, d_) * half;
    const F scale = splat(half);
    rows_.write(row, end, static_cast<A>(-t),
                [&](std::int64_t j) { return load(e_ + j) * scale * load(d_ + j); });
  }

  // With s = q.d and t = p.d: out_j = q_j (d_j - s / 2) - p_j (d_j - t) / 2, and
  // out_i = -(1 + q_i) s / 2 + p_i t / 2
  void reinmax(std::int64_t row, std::int64_t end) {
    const InverseTau<A> tau(p_.tau_of(row));
    const double p_sum = rows_.exponentiate(logits_, kNatural, e_),
                 q_sum = rows_.exponentiate(logits_, tau.exponent_scale, f_);
    const double s = rows_.dot(f_, d_) / q_sum, t = rows_.dot(e_, d_) / p_sum;
    const double q_i = static_cast<double>(f_[rows_.index]) / q_sum,
                 p_i = static_cast<double>(e_[rows_.index]) / p_sum;
    const F q_scale = splat(1 / q_sum), p_scale = splat(0.5 / p_sum), half_s = splat(0.5 * s),
            all_t = splat(t);
    rows_.write(row, end, static_cast<A>(0.5 * (p_i * t - (1 + q_i) * s)), [&](std::int64_t j) {
      const F d = load(d_ + j);
      return load(f_ + j) * q_scale * (d - half_s) - load(e_ + j) * p_scale * (d - all_t);
    });
  }

  // With M the largest logit: m_i = M, m_j = min(l_j, M - gap), y = softmax(m / tau) and
  // out = y (d - y.d) / tau
  void gapped(std::int64_t row, std::int64_t end) {
    const InverseTau<A> tau(p_.tau_of(row));
    const double gap = p_.gap > 0 ? p_.gap : gap_of_sample();
    const F top = RealTraits<F>::splat(rows_.top), limit = splat(-gap);
    for (std::int64_t j = 0; j < p_.classes; j += kLanes) {
      const F distance = load(logits_ + j) - top;
      store(logits_ + j, select(less(limit, distance), limit, distance));
    }
    logits_[rows_.index] = rows_.top = 0;
    const double total = rows_.exponentiate(logits_, tau.exponent_scale, e_);
    const double mean = rows_.dot(e_, d_) / total;
    const F scale = splat(1 / total), y_d = splat(mean),
            inverse = RealTraits<F>::splat(tau.inverse);
    const A y_i = static_cast<A>(static_cast<double>(e_[rows_.index]) / total);
    rows_.write(row, end, y_i * static_cast<A>(-mean) * tau.inverse, [&](std::int64_t j) {
      return load(e_ + j) * scale * (load(d_ + j) - y_d) * inverse;
    });
  }

  // -log(1 - p) / p with p the probability of the sample, a little below it: finite at p = 1.
  double gap_of_sample() {
    const double total = rows_.exponentiate(logits_, kNatural, e_);
    const double p = static_cast<double>(e_[rows_.index]) / total * (1 - 1e-5);
    if (p < 1e-3) return 1 + p * (1.0 / 2 + p * (1.0 / 3 + p * (1.0 / 4 + p / 5)));
    return -log_of(1 - p) / p;
  }

  static constexpr A kNatural = static_cast<A>(kLog2E);

  const EstimatorProblem& p_;
  EstimatorRows<T> rows_;
  Scratch<A> buffer_;
  A *logits_ = nullptr, *d_ = nullptr, *e_ = nullptr, *f_ = nullptr;
};

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
