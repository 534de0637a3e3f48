// The binary concrete sample y = sigmoid((l + L) / tau) of runs of elements, and its gradient, for
// which the noise L is made again.
#pragma once

#include "binary_problem.h"
#include "noise_span.h"
#include "row_math.h"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

using cpu::BinaryProblem;
using cpu::RunOperand;

// With z = (l + L) / tau: e = exp(-|z|) and r = 1 / (1 + e), of which everything is made without
// cancelling, however close to 0 or 1 the sample lies.
template <class F>
struct LogisticCurve {
  F z, e, r;

  GUMBEL_EXT_INLINE LogisticCurve(const F& score, const F& inverse_tau) {
    using T = RealTraits<F>;
    const F zero = T::splat(0);
    z = score * inverse_tau;
    const F distance = select(less(z, zero), z, zero - z);
    e = exp2_nonpositive(distance *
                         T::splat(static_cast<typename T::Scalar>(1.4426950408889634074)));
    r = T::splat(1) / (T::splat(1) + e);
  }
  GUMBEL_EXT_INLINE F sigmoid() const { return select(less(z, RealTraits<F>::splat(0)), e * r, r); }
  GUMBEL_EXT_INLINE F slope() const { return (e * r) * r; }
};

// NaN where the score is, whose bits exp2_nonpositive() does not keep.
template <class F>
GUMBEL_EXT_INLINE F nan_with(const F& score, const F& value) {
  return select(either_nan(score, score), score, value);
}

// An operand of a run: a pointer that moves, or one that stays on copies of one value. (Not a
// choice between a register and a load, which compilers make in memory, in pieces that no load
// forwards.)
template <class T, class F>
class RunReader {
 public:
  RunReader(const RunOperand& operand, std::int64_t offset, std::int64_t count)
      : at_(static_cast<const T*>(operand.data) + offset), end_(at_ + count), step_(!operand.one) {
    if (operand.one) {
      for (int i = 0; i < kLanes; ++i) copies_[i] = *at_;
      at_ = copies_;
      end_ = copies_ + kLanes;
    }
  }
  RunReader(const RunReader&) = delete;

  GUMBEL_EXT_INLINE F get(std::int64_t j, std::int64_t count) const {
    return load_run_as<F>(at_ + j * step_, count, end_);
  }

 private:
  const T* at_;
  const T* end_;
  std::int64_t step_;
  T copies_[kLanes];
};

// `count` elements whose noise positions begin at n. Kept out of line: the loop wants all registers
// for itself.
template <class T, bool backward>
__attribute__((noinline)) void binary_run(NoiseSource& source, std::uint64_t n, std::int64_t count,
                                          const BinaryProblem& p, std::int64_t logits_offset,
                                          std::int64_t tau_offset, std::int64_t grad_offset, T* out,
                                          typename ComputeType<T>::type* tau_terms) {
  using A = typename ComputeType<T>::type;
  using F = Vector<A>;
  using R = RealTraits<F>;
  const RunReader<T, F> logits(p.logits, logits_offset, count);
  const RunReader<A, F> inverse_tau(p.inverse_tau, tau_offset, count);
  const RunReader<T, F> grad(backward ? p.grad : p.logits, backward ? grad_offset : logits_offset,
                             count);
  const T* out_end = out + count;
  const A* terms_end = tau_terms ? tau_terms + count : nullptr;
  const bool hard = p.hard;
  LogisticSpan<A> span;
  for (std::int64_t begin = 0; begin < count;) {
    const std::int64_t take =
        std::min<std::int64_t>(count - begin, LogisticSpan<A>::kCapacity - static_cast<int>(n & 3));
    span.prepare(source, n, take);
    for (std::int64_t k = 0; k < take; k += kLanes) {
      const std::int64_t j = begin + k, here = take - k;
      // The next span writes what a vector writes past the end of this one.
      const F score = logits.get(j, count - j) + span.at(k);
      if (!backward && hard) {
        const F one = select(less(R::splat(0), score), R::splat(1), R::splat(0));
        store_run(out + j, nan_with(score, one), here, out_end);
        continue;
      }
      const F inverse = inverse_tau.get(j, count - j);
      const LogisticCurve<F> curve(score, inverse);
      if (!backward) {
        store_run(out + j, nan_with(score, curve.sigmoid()), here, out_end);
        continue;
      }
      const F gradient = nan_with(score, grad.get(j, count - j) * curve.slope() * inverse);
      store_run(out + j, gradient, here, out_end);
      if (tau_terms) {
        // z may be infinite where the slope is 0.
        const F term =
            select(equal(curve.e, R::splat(0)), R::splat(0), R::splat(0) - gradient * curve.z);
        store_run(tau_terms + j, term, here, terms_end);
      }
    }
    n += static_cast<std::uint64_t>(take);
    begin += take;
  }
}

// Elements [begin, end).
template <class T>
void binary_typed(const BinaryProblem& p, std::int64_t begin, std::int64_t end) {
  using A = typename ComputeType<T>::type;
  NoiseSource source(p.seed, p.offset);
  while (begin < end) {
    std::int64_t rest = begin / p.run;
    const std::int64_t within = begin - rest * p.run, count = std::min(p.run - within, end - begin);
    std::uint64_t position = p.first_position + static_cast<std::uint64_t>(within);
    std::int64_t logits = p.logits.one ? 0 : within, tau = p.inverse_tau.one ? 0 : within,
                 grad = p.grad.one ? 0 : within;
    for (int d = p.dims - 1; d >= 0; --d) {
      const std::int64_t i = rest % p.size[d];
      rest /= p.size[d];
      position += static_cast<std::uint64_t>(i) * static_cast<std::uint64_t>(p.position_stride[d]);
      logits += i * p.logits.stride[d];
      tau += i * p.inverse_tau.stride[d];
      if (p.grad) grad += i * p.grad.stride[d];
    }
    T* out = static_cast<T*>(p.out) + begin;
    A* terms = p.tau_terms ? static_cast<A*>(p.tau_terms) + begin : nullptr;
    if (p.grad) {
      binary_run<T, true>(source, position, count, p, logits, tau, grad, out, terms);
    } else {
      binary_run<T, false>(source, position, count, p, logits, tau, grad, out, terms);
    }
    begin += count;
  }
}

template <class T>
void logistic_noise_typed(std::uint64_t seed, std::uint64_t offset, std::uint64_t first,
                          std::int64_t count, T* out) {
  using A = typename ComputeType<T>::type;
  NoiseSource source(seed, offset);
  LogisticSpan<A> span;
  const T* end = out + count;
  while (count > 0) {
    const std::int64_t take =
        std::min<std::int64_t>(count, LogisticSpan<A>::kCapacity - static_cast<int>(first & 3));
    span.prepare(source, first, take);
    for (std::int64_t k = 0; k < take; k += kLanes) store_run(out + k, span.at(k), take - k, end);
    first += static_cast<std::uint64_t>(take);
    out += take;
    count -= take;
  }
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
