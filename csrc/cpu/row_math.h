// What is done to one row, or one chunk of it, once its noisy logits z are there. Everything here
// is vectorised along the classes; columns.h has the same arithmetic across rows, in the same
// order.
#pragma once

#include "noise_span.h"
#include "problem.h"
#include "search.h"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

using cpu::kChunk;

template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};

template <class T, class A>
inline T rounded(A value) {
  T out[kLanes];
  store(out, RealTraits<Vector<A>>::splat(value));
  return out[0];
}
template <class A, class T>
inline A widened(T value) {
  T in[kLanes] = {};
  A out[kLanes];
  in[0] = value;
  store(out, load(in));
  return out[0];
}
template <>
inline float widened<float, float>(float value) {
  return value;
}
template <>
inline double widened<double, double>(double value) {
  return value;
}
template <>
inline float widened<float, BFloat16>(BFloat16 value) {
  const std::uint32_t high = static_cast<std::uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &high, sizeof out);
  return out;
}

// log2(e) / tau, and 1 / tau, kept inside the normal range: an infinite or zero factor would turn 0
// * inf and -inf * 0 into NaN where the limit (one-hot, uniform) is well defined.
template <class A>
inline A clamped(double value) {
  return static_cast<A>(std::min<double>(std::max<double>(value, std::numeric_limits<A>::min()),
                                         std::numeric_limits<A>::max()));
}

// e[j] = 2^((z[j] - largest) * scale); returns their sum. At most kChunk classes.
template <class A>
inline A exponentiate_chunk(const A* z, std::int64_t count, const A* z_end, A largest, A scale,
                            A* e, const A* e_end) {
  using F = Vector<A>;
  const F m = RealTraits<F>::splat(largest), s = RealTraits<F>::splat(scale);
  F total = RealTraits<F>::splat(0);
  std::int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    const F v = exp2_nonpositive((load(z + j) - m) * s);
    total = total + v;
    store(e + j, v);
  }
  if (j < count) {
    const F v = select(first_lanes<F>(static_cast<int>(count - j)),
                       exp2_nonpositive((load_run(z + j, count - j, z_end) - m) * s),
                       RealTraits<F>::splat(0));
    total = total + v;
    store_run(e + j, v, count - j, e_end);
  }
  return sum(total);
}

template <class A, class Out>
inline void normalize_chunk(const A* e, std::int64_t count, const A* e_end, A factor, Out* y,
                            const Out* y_end) {
  using F = Vector<A>;
  const F f = RealTraits<F>::splat(factor);
  std::int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) store(y + j, load(e + j) * f);
  if (j < count) store_run(y + j, load_run(e + j, count - j, e_end) * f, count - j, y_end);
}

// dl = y (h - sum h y) / tau with h = dy - dy[index]: shifting dy changes nothing in exact
// arithmetic, but at low tau the entry at the argmax is the one that would cancel.
template <class A, class Y, class G>
inline A dot_chunk(const Y* y, const Y* y_end, const G* grad, const G* grad_end, std::int64_t count,
                   A grad_at_index) {
  using F = Vector<A>;
  const F shift = RealTraits<F>::splat(grad_at_index);
  F total = RealTraits<F>::splat(0);
  std::int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) total = fma(load(grad + j) - shift, load(y + j), total);
  if (j < count) {
    const F term = (load_run(grad + j, count - j, grad_end) - shift);
    total = select(first_lanes<F>(static_cast<int>(count - j)),
                   fma(term, load_run(y + j, count - j, y_end), total), total);
  }
  return sum(total);
}

template <class A, class Y, class G>
inline void gradient_chunk(const Y* y, const Y* y_end, const G* grad, const G* grad_end,
                           std::int64_t count, A grad_at_index, A dot, A inverse_tau, G* out,
                           const G* out_end) {
  using F = Vector<A>;
  const F shift = RealTraits<F>::splat(grad_at_index), d = RealTraits<F>::splat(dot),
          scale = RealTraits<F>::splat(inverse_tau);
  std::int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    store(out + j, load(y + j) * ((load(grad + j) - shift) - d) * scale);
  }
  if (j < count) {
    const F v = load_run(y + j, count - j, y_end) *
                ((load_run(grad + j, count - j, grad_end) - shift) - d) * scale;
    store_run(out + j, v, count - j, out_end);
  }
}

// log(y) * tau dl, the term of dtau, with 0 log 0 = 0: what is not positive is 0, or NaN.
template <class F>
GUMBEL_EXT_INLINE F log_dot_term(F y, F h, F dot) {
  using T = RealTraits<F>;
  using N = std::numeric_limits<typename T::Scalar>;
  const auto positive = less(T::splat(0), y);
  // log_positive() knows no subnormal numbers; at that size the term is nothing anyway.
  const F log_y = log_positive(maximum(y, T::splat(N::min())));
  return select(positive, log_y * (y * (h - dot)), y);
}

template <class A, class Y, class G>
inline A log_dot_chunk(const Y* y, const Y* y_end, const G* grad, const G* grad_end,
                       std::int64_t count, A grad_at_index, A dot) {
  using F = Vector<A>;
  const F shift = RealTraits<F>::splat(grad_at_index), d = RealTraits<F>::splat(dot);
  F total = RealTraits<F>::splat(0);
  for (std::int64_t j = 0; j < count; j += kLanes) {
    const F term = log_dot_term(load_run(y + j, count - j, y_end),
                                load_run(grad + j, count - j, grad_end) - shift, d);
    total =
        total + select(first_lanes<F>(static_cast<int>(std::min<std::int64_t>(count - j, kLanes))),
                       term, RealTraits<F>::splat(0));
  }
  return sum(total);
}

template <class T>
inline T nan_of() {
  using A = typename ComputeType<T>::type;
  return rounded<T, A>(std::numeric_limits<A>::quiet_NaN());
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
