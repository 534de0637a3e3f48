// Vectors of 16 lanes on every machine, made of as many registers as that takes.
//
// 16 lanes everywhere is what makes results independent of the instruction set: lane i of an accumulator sums the same
// classes, in the same order, whether it lives in one AVX-512 register, two of AVX2 or four of NEON.
//
// A register header (simd_avx512.h, simd_avx2.h, simd_generic.h) offers, beside what gumbel.h asks of a real type:
//   maximum(a, b)         b where either is NaN
//   either_nan(a, b)      mask of lanes where a or b is NaN
//   add_lanes(a)          lanes i and i + half first, then halves of that: a fixed tree
//   lane_bits(mask)       lane i in bit i
//   nonzero_bytes(p, F)   mask of lanes i with p[i] != 0
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "../gumbel.h"

#if defined(GUMBEL_EXT_USE_AVX512)
#include "simd_avx512.h"
#elif defined(GUMBEL_EXT_USE_AVX2)
#include "simd_avx2.h"
#else
#include "simd_generic.h"
#endif

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

constexpr int kLanes = 16;

template <class Reg, int count>
struct Pack {
  Reg r[count];
};

using F32 = Pack<RegF32, kLanes / RegF32::lanes>;
using F64 = Pack<RegF64, kLanes / RegF64::lanes>;
using U32 = Pack<RegU32, kLanes / RegU32::lanes>;
using U64 = Pack<RegU64, kLanes / RegU64::lanes>;
using M32 = Pack<RegM32, kLanes / RegF32::lanes>;
using M64 = Pack<RegM64, kLanes / RegF64::lanes>;
// Philox words of 16 blocks: enough registers in flight to hide the latency of the multiplications and to share the loads
// of the round keys (12 % fewer nanoseconds a word than two registers of AVX2, for all that some spill).
using Words = Pack<RegWord, 16 / RegWord::lanes>;
// And of as few as there are, for the end of a run.
using FewWords = Pack<RegWord, 1>;

// Every operation on a Pack is the operation on its registers, spelled as an initialiser list so that the compiler never
// sees a loop over an array in memory.
template <class Out, class Op, std::size_t... i>
GUMBEL_EXT_INLINE Out each_register(Op op, std::index_sequence<i...>) {
  return {{op(i)...}};
}

#define GUMBEL_EXT_EACH(Out, expression)                                                                    \
  each_register<Out>([&](std::size_t i) __attribute__((always_inline)) { return expression; },              \
                     std::make_index_sequence<sizeof(Out::r) / sizeof(Out::r[0])>())

#define GUMBEL_EXT_BINARY(name, In, Out) \
  GUMBEL_EXT_INLINE Out name(const In& a, const In& b) { return GUMBEL_EXT_EACH(Out, name(a.r[i], b.r[i])); }

GUMBEL_EXT_BINARY(operator+, F32, F32)
GUMBEL_EXT_BINARY(operator-, F32, F32)
GUMBEL_EXT_BINARY(operator*, F32, F32)
GUMBEL_EXT_BINARY(maximum, F32, F32)
GUMBEL_EXT_BINARY(less, F32, M32)
GUMBEL_EXT_BINARY(equal, F32, M32)
GUMBEL_EXT_BINARY(either_nan, F32, M32)
GUMBEL_EXT_BINARY(operator+, F64, F64)
GUMBEL_EXT_BINARY(operator-, F64, F64)
GUMBEL_EXT_BINARY(operator*, F64, F64)
GUMBEL_EXT_BINARY(maximum, F64, F64)
GUMBEL_EXT_BINARY(less, F64, M64)
GUMBEL_EXT_BINARY(equal, F64, M64)
GUMBEL_EXT_BINARY(either_nan, F64, M64)
GUMBEL_EXT_BINARY(operator+, U32, U32)
GUMBEL_EXT_BINARY(operator-, U32, U32)
GUMBEL_EXT_BINARY(operator&, U32, U32)
GUMBEL_EXT_BINARY(operator|, U32, U32)
GUMBEL_EXT_BINARY(operator^, U32, U32)
GUMBEL_EXT_BINARY(operator+, U64, U64)
GUMBEL_EXT_BINARY(operator&, U64, U64)
GUMBEL_EXT_BINARY(operator|, U64, U64)
GUMBEL_EXT_BINARY(operator|, M32, M32)
GUMBEL_EXT_BINARY(operator|, M64, M64)

#define GUMBEL_EXT_UNARY(name, In, Out) \
  GUMBEL_EXT_INLINE Out name(const In& a) { return GUMBEL_EXT_EACH(Out, name(a.r[i])); }

GUMBEL_EXT_UNARY(bits, F32, U32)
GUMBEL_EXT_UNARY(real, U32, F32)
GUMBEL_EXT_UNARY(to_real, U32, F32)
GUMBEL_EXT_UNARY(spread_top_bit, U32, U32)
GUMBEL_EXT_UNARY(top_bit, U32, M32)
GUMBEL_EXT_UNARY(as_mask, U32, M32)
GUMBEL_EXT_UNARY(bits, F64, U64)
GUMBEL_EXT_UNARY(real, U64, F64)

#define GUMBEL_EXT_SHIFT(name, T)                                  \
  template <int n>                                                 \
  GUMBEL_EXT_INLINE T name(const T& a, Int<n> by) { return GUMBEL_EXT_EACH(T, name(a.r[i], by)); }

GUMBEL_EXT_SHIFT(shift_left, U32)
GUMBEL_EXT_SHIFT(shift_right, U32)
GUMBEL_EXT_SHIFT(shift_left, U64)
GUMBEL_EXT_SHIFT(shift_right, U64)

GUMBEL_EXT_INLINE F32 fma(const F32& a, const F32& b, const F32& c) {
  return GUMBEL_EXT_EACH(F32, fma(a.r[i], b.r[i], c.r[i]));
}
GUMBEL_EXT_INLINE F64 fma(const F64& a, const F64& b, const F64& c) {
  return GUMBEL_EXT_EACH(F64, fma(a.r[i], b.r[i], c.r[i]));
}
GUMBEL_EXT_INLINE F32 select(const M32& m, const F32& a, const F32& b) {
  return GUMBEL_EXT_EACH(F32, select(m.r[i], a.r[i], b.r[i]));
}
GUMBEL_EXT_INLINE F32 zero_unless(const M32& m, const F32& a) {
  return GUMBEL_EXT_EACH(F32, zero_unless(m.r[i], a.r[i]));
}
GUMBEL_EXT_INLINE F64 zero_unless(const M64& m, const F64& a) {
  return GUMBEL_EXT_EACH(F64, zero_unless(m.r[i], a.r[i]));
}
GUMBEL_EXT_INLINE F64 select(const M64& m, const F64& a, const F64& b) {
  return GUMBEL_EXT_EACH(F64, select(m.r[i], a.r[i], b.r[i]));
}
GUMBEL_EXT_INLINE U32 select(const M32& m, const U32& a, const U32& b) {
  return GUMBEL_EXT_EACH(U32, select(m.r[i], a.r[i], b.r[i]));
}
template <int count>
GUMBEL_EXT_INLINE Pack<RegWord, count> operator^(const Pack<RegWord, count>& a, const Pack<RegWord, count>& b) {
  using Out = Pack<RegWord, count>;
  return GUMBEL_EXT_EACH(Out, a.r[i] ^ b.r[i]);
}
template <int count>
GUMBEL_EXT_INLINE Pack<RegWord, count> operator^(const Pack<RegWord, count>& a, RegWord constant) {
  using Out = Pack<RegWord, count>;
  return GUMBEL_EXT_EACH(Out, a.r[i] ^ constant);
}
template <int count>
GUMBEL_EXT_INLINE Pack<RegProduct, count> wide_multiply(const Pack<RegWord, count>& a, std::uint32_t multiplier) {
  using Out = Pack<RegProduct, count>;
  const RegWord m = RegWord::splat(multiplier);
  return GUMBEL_EXT_EACH(Out, wide_multiply(a.r[i], m));
}
template <int count>
GUMBEL_EXT_INLINE Pack<RegWord, count> high_word(const Pack<RegProduct, count>& a) {
  using Out = Pack<RegWord, count>;
  return GUMBEL_EXT_EACH(Out, high_word(a.r[i]));
}
template <int count>
GUMBEL_EXT_INLINE Pack<RegWord, count> low_word(const Pack<RegProduct, count>& a) {
  using Out = Pack<RegWord, count>;
  return GUMBEL_EXT_EACH(Out, low_word(a.r[i]));
}

template <>
struct RealTraits<F32> {
  using Scalar = float;
  using Bits = U32;
  using Mask = M32;
  static F32 splat(float c) { return GUMBEL_EXT_EACH(F32, (static_cast<void>(i), RegF32::splat(c))); }
  static U32 splat_bits(std::uint32_t c) { return GUMBEL_EXT_EACH(U32, (static_cast<void>(i), RegU32::splat(c))); }
};
template <>
struct RealTraits<F64> {
  using Scalar = double;
  using Bits = U64;
  using Mask = M64;
  static F64 splat(double c) { return GUMBEL_EXT_EACH(F64, (static_cast<void>(i), RegF64::splat(c))); }
  static U64 splat_bits(std::uint64_t c) { return GUMBEL_EXT_EACH(U64, (static_cast<void>(i), RegU64::splat(c))); }
};

// The vector type in which a stored type T is computed.
template <class Scalar>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = F32;
};
template <>
struct VectorOf<double> {
  using type = F64;
};
template <class Scalar>
using Vector = typename VectorOf<Scalar>::type;

GUMBEL_EXT_INLINE U32 load_words(const std::uint32_t* p) {
  return GUMBEL_EXT_EACH(U32, RegU32::load(p + i * RegU32::lanes));
}
GUMBEL_EXT_INLINE F64 load_real_words(const std::uint32_t* p) {
  return GUMBEL_EXT_EACH(F64, RegF64::load_words(p + i * RegF64::lanes));
}
GUMBEL_EXT_INLINE void store_words(std::uint32_t* p, const U32& a) {
  for (int i = 0; i < kLanes / RegU32::lanes; ++i) store(p + i * RegU32::lanes, a.r[i]);
}

// ---- element types in memory -----------------------------------------------------------------------------------------

struct BFloat16 {
  std::uint16_t bits;
};
struct Half {
  std::uint16_t bits;
};

GUMBEL_EXT_INLINE F32 load(const float* p) {
  return GUMBEL_EXT_EACH(F32, RegF32::load(p + i * RegF32::lanes));
}
GUMBEL_EXT_INLINE F64 load(const double* p) {
  return GUMBEL_EXT_EACH(F64, RegF64::load(p + i * RegF64::lanes));
}
GUMBEL_EXT_INLINE F32 load(const BFloat16* p) {
  return GUMBEL_EXT_EACH(F32, RegF32::load_bfloat16(&p[i * RegF32::lanes].bits));
}
GUMBEL_EXT_INLINE F32 load(const Half* p) {
  return GUMBEL_EXT_EACH(F32, RegF32::load_half(&p[i * RegF32::lanes].bits));
}

GUMBEL_EXT_INLINE void store(float* p, const F32& a) {
  for (int i = 0; i < kLanes / RegF32::lanes; ++i) store(p + i * RegF32::lanes, a.r[i]);
}
GUMBEL_EXT_INLINE void store(double* p, const F64& a) {
  for (int i = 0; i < kLanes / RegF64::lanes; ++i) store(p + i * RegF64::lanes, a.r[i]);
}
GUMBEL_EXT_INLINE void store(Half* p, const F32& a) {
  for (int i = 0; i < kLanes / RegF32::lanes; ++i) store_half(&p[i * RegF32::lanes].bits, a.r[i]);
}
GUMBEL_EXT_INLINE void store(BFloat16* p, const F32& a) {
  using T = RealTraits<F32>;
  const U32 u = bits(a);
  const U32 odd = shift_right(u, Int<16>()) & T::splat_bits(1);
  const U32 nearest_even = u + T::splat_bits(0x7FFF) + odd;
  // Rounding would carry a NaN with a full mantissa over into zero.
  const U32 rounded = select(either_nan(a, a), T::splat_bits(0x7FC00000u), nearest_even);
  const U32 high = shift_right(rounded, Int<16>());
  for (int i = 0; i < kLanes / RegU32::lanes; ++i) store_low_halves(&p[i * RegU32::lanes].bits, high.r[i]);
}

// ---- lanes -----------------------------------------------------------------------------------------------------------

GUMBEL_EXT_INLINE unsigned lane_bits(const M32& m) {
  unsigned out = 0;
  for (int i = 0; i < kLanes / RegF32::lanes; ++i) out |= lane_bits(m.r[i]) << (i * RegF32::lanes);
  return out;
}
GUMBEL_EXT_INLINE unsigned lane_bits(const M64& m) {
  unsigned out = 0;
  for (int i = 0; i < kLanes / RegF64::lanes; ++i) out |= lane_bits(m.r[i]) << (i * RegF64::lanes);
  return out;
}
GUMBEL_EXT_INLINE bool any(const M32& m) {
  RegM32 folded = m.r[0];
  for (int i = 1; i < kLanes / RegF32::lanes; ++i) folded = folded | m.r[i];
  return lane_bits(folded) != 0;
}
GUMBEL_EXT_INLINE bool any(const M64& m) {
  RegM64 folded = m.r[0];
  for (int i = 1; i < kLanes / RegF64::lanes; ++i) folded = folded | m.r[i];
  return lane_bits(folded) != 0;
}

template <int count>
struct Halve {
  template <class Reg, class Op>
  static GUMBEL_EXT_INLINE Reg fold(const Reg* r, Op op) {
    Reg half[count / 2];
    for (int i = 0; i < count / 2; ++i) half[i] = op(r[i], r[i + count / 2]);
    return Halve<count / 2>::fold(half, op);
  }
};
template <>
struct Halve<1> {
  template <class Reg, class Op>
  static GUMBEL_EXT_INLINE Reg fold(const Reg* r, Op) {
    return r[0];
  }
};

// Lanes i and i + 8, then i and i + 4, 2, 1.
template <class Reg, int count>
GUMBEL_EXT_INLINE auto sum(const Pack<Reg, count>& a) {
  return add_lanes(Halve<count>::fold(a.r, [](Reg x, Reg y) __attribute__((always_inline)) { return x + y; }));
}
// The largest lane; no lane may be NaN.
template <class Reg, int count>
GUMBEL_EXT_INLINE auto largest(const Pack<Reg, count>& a) {
  return max_lanes(Halve<count>::fold(a.r, [](Reg x, Reg y) __attribute__((always_inline)) { return maximum(x, y); }));
}

// Mask of lanes whose byte is not zero.
GUMBEL_EXT_INLINE M32 allowed_lanes(const std::uint8_t* p, const F32&) {
  return GUMBEL_EXT_EACH(M32, nonzero_bytes(p + i * RegF32::lanes, RegF32()));
}
GUMBEL_EXT_INLINE M64 allowed_lanes(const std::uint8_t* p, const F64&) {
  return GUMBEL_EXT_EACH(M64, nonzero_bytes(p + i * RegF64::lanes, RegF64()));
}

// Mask of the first n lanes, 0 <= n <= 16.
template <class F>
GUMBEL_EXT_INLINE typename RealTraits<F>::Mask first_lanes(int n) {
  using Scalar = typename RealTraits<F>::Scalar;
  alignas(64) static constexpr Scalar lane[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return less(load(lane), RealTraits<F>::splat(static_cast<Scalar>(n)));
}

#undef GUMBEL_EXT_EACH
#undef GUMBEL_EXT_BINARY
#undef GUMBEL_EXT_UNARY
#undef GUMBEL_EXT_SHIFT

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
