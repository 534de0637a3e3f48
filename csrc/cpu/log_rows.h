// The log-space sample and its gradient, row by row; vectorised along the classes.
#pragma once

#include "operands.h"
#include "row_problems.h"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

using cpu::LogGradientProblem;
using cpu::LogSampleProblem;
using cpu::RowShape;

// log x of one normal double, in the arithmetic of the vectors.
inline double log_of(double x) {
  using One = Pack<RegF64, 1>;
  double out[RegF64::lanes];
  store(out, log_positive(RealTraits<One>::splat(x)));
  return out[0];
}

constexpr double kLog2E = 1.4426950408889634074;

// e^x for x <= 0.
template <class F>
GUMBEL_EXT_INLINE F exp_nonpositive(F x) {
  using T = RealTraits<F>;
  return exp2_nonpositive(x * T::splat(static_cast<typename T::Scalar>(kLog2E)));
}

// A row in one run of memory: in place, or gathered into `buffer`.
template <class E>
inline Run<const E> row_run(const RowShape& p, const Operand& operand, std::int64_t row,
                            E* buffer) {
  const E* start = operand.as<const E>() + p.offset(operand, row);
  if (operand.contiguous) return {start, operand.as<const E>() + p.rows * p.classes};
  if (operand.class_stride == 1) return {start, start + p.classes};
  for (std::int64_t c = 0; c < p.classes; ++c) buffer[c] = start[c * operand.class_stride];
  return {buffer, buffer + p.classes};
}

template <class T>
class LogSampleWorker {
 public:
  using A = typename ComputeType<T>::type;
  using F = Vector<A>;

  explicit LogSampleWorker(const LogSampleProblem& problem)
      : p_(problem), noise_(problem.seed, problem.offset_of_state) {}

  void run(std::int64_t begin, std::int64_t end) {
    const std::int64_t classes = p_.classes;
    // Rows whose logits and positions follow each other share the making of noise.
    const bool together = !p_.noise && p_.positions.contiguous && p_.logits.contiguous &&
                          (!p_.mask || p_.mask.contiguous);
    const std::int64_t tile = together ? std::max<std::int64_t>(1, kTile / classes) : 1;
    A* z = z_.reserve(tile * classes + kLanes);
    const A* z_end = z + tile * classes + kLanes;
    T* out = static_cast<T*>(p_.log_y);
    for (std::int64_t row = begin; row < end; row += tile) {
      const std::int64_t rows = std::min(tile, end - row);
      fill(row, rows, z, z_end);
      for (std::int64_t r = 0; r < rows; ++r) {
        normalize(row + r, z + r * classes, z_end, out + (row + r) * classes, out + end * classes);
      }
    }
  }

 private:
  void fill(std::int64_t row, std::int64_t rows, A* z, const A* z_end) {
    const Run<const T> x = row_run(p_, p_.logits, row, buffer(x_, p_.logits));
    Run<const std::uint8_t> allowed{nullptr, nullptr};
    if (p_.mask) allowed = row_run(p_, p_.mask, row, buffer(mask_, p_.mask));
    if (!p_.noise) {
      const std::uint64_t n =
          p_.first_position + static_cast<std::uint64_t>(p_.offset(p_.positions, row));
      const std::int64_t count = rows * p_.classes;
      add_gumbel_noise(noise_, n, count, x.data, x.data + count, allowed.data,
                       allowed.data ? allowed.data + count : nullptr, z, z_end);
      return;
    }
    const Run<const A> g = row_run(p_, p_.noise, row, buffer(g_, p_.noise));
    for (std::int64_t c = 0; c < p_.classes; c += kLanes) {
      const std::int64_t left = p_.classes - c;
      F sum = load_run(x.data + c, left, x.end) + load_run(g.data + c, left, g.end);
      if (allowed.data) sum = forbid<A>(allowed.data + c, left, allowed.end, sum);
      store_run(z + c, sum, left, z_end);
    }
  }

  template <class E>
  E* buffer(Scratch<E>& scratch, const Operand& operand) {
    return operand.class_stride == 1 ? nullptr : scratch.reserve(p_.classes);
  }

  void normalize(std::int64_t row, const A* z, const A* z_end, T* out, const T* out_end) {
    const std::int64_t classes = p_.classes;
    Best<A> best;
    update_best(best, z, classes, z_end, 0);
    const RowKind kind = classify_row(best, classes, [&](std::int64_t c) {
      return !p_.mask || p_.mask.template as<const std::uint8_t>()[p_.offset(p_.mask, row) +
                                                                   c * p_.mask.class_stride];
    });
    if (__builtin_expect(kind != RowKind::kOrdinary, 0)) {
      std::fill(
          out, out + classes,
          kind == RowKind::kNaN ? nan_of<T>() : rounded<T, A>(-std::numeric_limits<A>::infinity()));
      return;
    }
    const InverseTau<A> tau(p_.tau_of(row));
    const F top = RealTraits<F>::splat(best.value), zero = RealTraits<F>::splat(0);
    const F scale = RealTraits<F>::splat(tau.exponent_scale);
    double total = 0;
    for (std::int64_t c = 0; c < classes; c += kChunk) {
      const std::int64_t end = std::min(c + kChunk, classes);
      F sums = zero;
      for (std::int64_t j = c; j < end; j += kLanes) {
        const F e = exp2_nonpositive((load_run(z + j, end - j, z_end) - top) * scale);
        sums = sums +
               (j + kLanes <= end ? e : select(first_lanes<F>(static_cast<int>(end - j)), e, zero));
      }
      total += sum(sums);
    }
    const F inverse = RealTraits<F>::splat(tau.inverse);
    // A row of one +inf is NaN, as softmax has it.
    const F log_total = RealTraits<F>::splat(total == total ? static_cast<A>(log_of(total))
                                                            : std::numeric_limits<A>::quiet_NaN());
    for (std::int64_t j = 0; j < classes; j += kLanes) {
      const F d = (load_run(z + j, classes - j, z_end) - top) * inverse - log_total;
      store_run(out + j, d, classes - j, out_end);
    }
  }

  const LogSampleProblem& p_;
  NoiseSource noise_;
  Scratch<A> z_, g_;
  Scratch<T> x_;
  Scratch<std::uint8_t> mask_;
};

// With k the likeliest class, and sums over the others only,
//     dz_i = dy_i - y_i (dy_k + sum_j dy_j),    dz_k = dy_k sum_j y_j - y_k sum_j dy_j
// equal in exact arithmetic to dy - y sum(dy), and 1 - y_k does not cancel to nothing as y_k nears
// 1. Classes of log y = -inf take no part.
template <class T>
class LogGradientWorker {
 public:
  using A = typename ComputeType<T>::type;
  using F = Vector<A>;

  explicit LogGradientWorker(const LogGradientProblem& problem) : p_(problem) {}

  void run(std::int64_t begin, std::int64_t end) {
    const std::int64_t classes = p_.classes;
    T* out = static_cast<T*>(p_.grad_logits);
    for (std::int64_t row = begin; row < end; ++row) {
      const Run<const T> grad = row_run(p_, p_.grad, row, grad_.reserve(classes));
      const Run<const A> log_y = row_run(p_, p_.log_y, row, log_y_.reserve(classes));
      gradient(row, log_y, grad, out + row * classes, out + end * classes);
    }
  }

 private:
  void gradient(std::int64_t row, const Run<const A>& log_y, const Run<const T>& grad, T* out,
                const T* out_end) {
    using N = std::numeric_limits<A>;
    const std::int64_t classes = p_.classes;
    Best<A> best;
    update_best(best, log_y.data, classes, log_y.end, 0);
    A* of_tau = p_.grad_tau ? static_cast<A*>(p_.grad_tau) + row : nullptr;
    if (__builtin_expect(best.nan || best.value == -N::infinity(), 0)) {
      std::fill(out, out + classes, best.nan ? nan_of<T>() : T{});
      if (of_tau) *of_tau = best.nan ? N::quiet_NaN() : A(0);
      return;
    }
    const F zero = RealTraits<F>::splat(0), lowest = RealTraits<F>::splat(-N::infinity());
    // The lanes of classes j, j + 1, ... that count: not past the end, possible, and not k.
    const auto others = [&](std::int64_t j, F x) {
      if (classes - j < kLanes) {
        x = select(first_lanes<F>(static_cast<int>(classes - j)), x, lowest);
      }
      if (best.index >= j && best.index < j + kLanes) {
        const int k = static_cast<int>(best.index - j);
        x = select(first_lanes<F>(k), x, select(first_lanes<F>(k + 1), lowest, x));
      }
      return x;
    };
    double rest = 0, grads = 0;
    for (std::int64_t c = 0; c < classes; c += kChunk) {
      const std::int64_t end = std::min(c + kChunk, classes);
      F y_sums = zero, grad_sums = zero;
      for (std::int64_t j = c; j < end; j += kLanes) {
        const F x = others(j, load_run(log_y.data + j, classes - j, log_y.end));
        y_sums = y_sums + exp_nonpositive(x);
        grad_sums = grad_sums +
                    select(less(lowest, x), load_run(grad.data + j, classes - j, grad.end), zero);
      }
      rest += sum(y_sums);
      grads += sum(grad_sums);
    }
    const A g_k = widened<A>(grad.data[best.index]);
    const F all = RealTraits<F>::splat(static_cast<A>(static_cast<double>(g_k) + grads));
    const A inverse_number = InverseTau<A>(p_.tau_of(row)).inverse;
    const F inverse = RealTraits<F>::splat(inverse_number);
    double log_total = 0;
    for (std::int64_t c = 0; c < classes; c += kChunk) {
      const std::int64_t end = std::min(c + kChunk, classes);
      F log_sums = zero;
      for (std::int64_t j = c; j < end; j += kLanes) {
        const F x = others(j, load_run(log_y.data + j, classes - j, log_y.end));
        const auto counts = less(lowest, x);
        const F dz =
            select(counts,
                   load_run(grad.data + j, classes - j, grad.end) - exp_nonpositive(x) * all, zero);
        if (of_tau) log_sums = log_sums + select(counts, x * dz, zero);
        store_run(out + j, dz * inverse, classes - j, out_end);
      }
      log_total += sum(log_sums);
    }
    A y_k[kLanes];
    store(y_k, exp_nonpositive(RealTraits<F>::splat(best.value)));
    const double dz_k = static_cast<double>(g_k) * rest - static_cast<double>(y_k[0]) * grads;
    out[best.index] = rounded<T, A>(static_cast<A>(dz_k) * inverse_number);
    if (of_tau) {
      log_total += static_cast<double>(best.value) * dz_k;
      *of_tau = static_cast<A>(-log_total) * inverse_number;
    }
  }

  const LogGradientProblem& p_;
  Scratch<T> grad_;
  Scratch<A> log_y_;
};

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
