// Vectors of 16 lanes on every machine, made of as many registers as that takes.
//
// 16 lanes everywhere is what makes results independent of the instruction set: lane i of an
// accumulator sums the same classes, in the same order, whether it lives in one AVX-512 register,
// two of AVX2 or four of NEON.
//
// A register header (simd_avx512.h, simd_avx2.h, simd_generic.h) offers, beside what gumbel.h asks
// of a real type:
//   a / b                 rounded once
//   maximum(a, b)         b where either is NaN
//   either_nan(a, b)      mask of lanes where a or b is NaN
//   not_at_most(a, b)     mask of lanes where a > b, or a or b is NaN; float32 only
//   add_lanes(a)          lanes i and i + half first, then halves of that: a fixed tree
//   lane_bits(mask)       lane i in bit i
//   nonzero_bytes(p, F)   mask of lanes i with p[i] != 0
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "../float16.h"
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
// Philox words of 16 blocks: enough registers in flight to hide the latency of the multiplications
// and to share the loads of the round keys (12 % fewer nanoseconds a word than two registers of
// AVX2, for all that some spill).
using Words = Pack<RegWord, 16 / RegWord::lanes>;
// And of as few as there are, for the end of a run.
using FewWords = Pack<RegWord, 1>;

// Every operation on a Pack is the operation on its registers, spelled as an initialiser list so
// that the compiler never sees a loop over an array in memory.
template <class Out, class Op, std::size_t... i>
GUMBEL_EXT_INLINE Out each_register(Op op, std::index_sequence<i...>) {
  return {{op(i)...}};
}

#define GUMBEL_EXT_EACH(Out, expression)                                                       \
  each_register<Out>([&](std::size_t i) __attribute__((always_inline)) { return expression; }, \
                     std::make_index_sequence<sizeof(Out::r) / sizeof(Out::r[0])>())

#define GUMBEL_EXT_UNARY(name, In, Out)                               \
  template <int count>                                                \
  GUMBEL_EXT_INLINE Pack<Out, count> name(const Pack<In, count>& a) { \
    using Result = Pack<Out, count>;                                  \
    return GUMBEL_EXT_EACH(Result, name(a.r[i]));                     \
  }
#define GUMBEL_EXT_BINARY(name, In, Out)                                                        \
  template <int count>                                                                          \
  GUMBEL_EXT_INLINE Pack<Out, count> name(const Pack<In, count>& a, const Pack<In, count>& b) { \
    using Result = Pack<Out, count>;                                                            \
    return GUMBEL_EXT_EACH(Result, name(a.r[i], b.r[i]));                                       \
  }
#define GUMBEL_EXT_SHIFT(name, Reg)                                               \
  template <int n, int count>                                                     \
  GUMBEL_EXT_INLINE Pack<Reg, count> name(const Pack<Reg, count>& a, Int<n> by) { \
    using Result = Pack<Reg, count>;                                              \
    return GUMBEL_EXT_EACH(Result, name(a.r[i], by));                             \
  }
#define GUMBEL_EXT_FUSED(Reg)                                                                  \
  template <int count>                                                                         \
  GUMBEL_EXT_INLINE Pack<Reg, count> fma(const Pack<Reg, count>& a, const Pack<Reg, count>& b, \
                                         const Pack<Reg, count>& c) {                          \
    using Result = Pack<Reg, count>;                                                           \
    return GUMBEL_EXT_EACH(Result, fma(a.r[i], b.r[i], c.r[i]));                               \
  }
#define GUMBEL_EXT_SELECT(Mask, Reg)                                                               \
  template <int count>                                                                             \
  GUMBEL_EXT_INLINE Pack<Reg, count> select(const Pack<Mask, count>& m, const Pack<Reg, count>& a, \
                                            const Pack<Reg, count>& b) {                           \
    using Result = Pack<Reg, count>;                                                               \
    return GUMBEL_EXT_EACH(Result, select(m.r[i], a.r[i], b.r[i]));                                \
  }
#define GUMBEL_EXT_ZERO_UNLESS(Mask, Reg)                                     \
  template <int count>                                                        \
  GUMBEL_EXT_INLINE Pack<Reg, count> zero_unless(const Pack<Mask, count>& m,  \
                                                 const Pack<Reg, count>& a) { \
    using Result = Pack<Reg, count>;                                          \
    return GUMBEL_EXT_EACH(Result, zero_unless(m.r[i], a.r[i]));              \
  }
#define GUMBEL_EXT_REAL(Reg, Mask)         \
  GUMBEL_EXT_BINARY(operator+, Reg, Reg)   \
  GUMBEL_EXT_BINARY(operator-, Reg, Reg)   \
  GUMBEL_EXT_BINARY(operator*, Reg, Reg)   \
  GUMBEL_EXT_BINARY(operator/, Reg, Reg)   \
  GUMBEL_EXT_BINARY(maximum, Reg, Reg)     \
  GUMBEL_EXT_BINARY(less, Reg, Mask)       \
  GUMBEL_EXT_BINARY(equal, Reg, Mask)      \
  GUMBEL_EXT_BINARY(either_nan, Reg, Mask) \
  GUMBEL_EXT_BINARY(operator|, Mask, Mask) \
  GUMBEL_EXT_FUSED(Reg)                    \
  GUMBEL_EXT_SELECT(Mask, Reg)             \
  GUMBEL_EXT_ZERO_UNLESS(Mask, Reg)
#define GUMBEL_EXT_INTEGER(Reg)          \
  GUMBEL_EXT_BINARY(operator+, Reg, Reg) \
  GUMBEL_EXT_BINARY(operator&, Reg, Reg) \
  GUMBEL_EXT_BINARY(operator|, Reg, Reg) \
  GUMBEL_EXT_SHIFT(shift_left, Reg)      \
  GUMBEL_EXT_SHIFT(shift_right, Reg)

GUMBEL_EXT_REAL(RegF32, RegM32)
GUMBEL_EXT_REAL(RegF64, RegM64)
GUMBEL_EXT_INTEGER(RegU32)
GUMBEL_EXT_INTEGER(RegU64)
GUMBEL_EXT_BINARY(not_at_most, RegF32, RegM32)
GUMBEL_EXT_BINARY(operator-, RegU32, RegU32)
GUMBEL_EXT_BINARY(operator^, RegU32, RegU32)
GUMBEL_EXT_SELECT(RegM32, RegU32)
GUMBEL_EXT_UNARY(bits, RegF32, RegU32)
GUMBEL_EXT_UNARY(real, RegU32, RegF32)
GUMBEL_EXT_UNARY(to_real, RegU32, RegF32)
GUMBEL_EXT_UNARY(spread_top_bit, RegU32, RegU32)
GUMBEL_EXT_UNARY(top_bit, RegU32, RegM32)
GUMBEL_EXT_UNARY(as_mask, RegU32, RegM32)
GUMBEL_EXT_UNARY(bits, RegF64, RegU64)
GUMBEL_EXT_UNARY(real, RegU64, RegF64)

GUMBEL_EXT_BINARY(operator^, RegWord, RegWord)
GUMBEL_EXT_UNARY(high_word, RegProduct, RegWord)
GUMBEL_EXT_UNARY(low_word, RegProduct, RegWord)
template <int count>
GUMBEL_EXT_INLINE Pack<RegWord, count> operator^(const Pack<RegWord, count>& a, RegWord constant) {
  using Result = Pack<RegWord, count>;
  return GUMBEL_EXT_EACH(Result, a.r[i] ^ constant);
}
template <int count>
GUMBEL_EXT_INLINE Pack<RegProduct, count> wide_multiply(const Pack<RegWord, count>& a,
                                                        std::uint32_t multiplier) {
  using Result = Pack<RegProduct, count>;
  const RegWord m = RegWord::splat(multiplier);
  return GUMBEL_EXT_EACH(Result, wide_multiply(a.r[i], m));
}

template <int count>
struct RealTraits<Pack<RegF32, count>> {
  using Scalar = float;
  using Bits = Pack<RegU32, count>;
  using Mask = Pack<RegM32, count>;
  using F = Pack<RegF32, count>;
  static constexpr int lanes = count * RegF32::lanes;
  static GUMBEL_EXT_INLINE F splat(float c) {
    return GUMBEL_EXT_EACH(F, (static_cast<void>(i), RegF32::splat(c)));
  }
  static GUMBEL_EXT_INLINE Bits splat_bits(std::uint32_t c) {
    return GUMBEL_EXT_EACH(Bits, (static_cast<void>(i), RegU32::splat(c)));
  }
};
template <int count>
struct RealTraits<Pack<RegF64, count>> {
  using Scalar = double;
  using Bits = Pack<RegU64, count>;
  using Mask = Pack<RegM64, count>;
  using F = Pack<RegF64, count>;
  static constexpr int lanes = count * RegF64::lanes;
  static GUMBEL_EXT_INLINE F splat(double c) {
    return GUMBEL_EXT_EACH(F, (static_cast<void>(i), RegF64::splat(c)));
  }
  static GUMBEL_EXT_INLINE Bits splat_bits(std::uint64_t c) {
    return GUMBEL_EXT_EACH(Bits, (static_cast<void>(i), RegU64::splat(c)));
  }
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

// As few registers as hold 8 lanes, for rows that short.
template <class F>
struct HalfOf;
template <class Reg, int count>
struct HalfOf<Pack<Reg, count>> {
  using type = Pack<Reg, (count > 1 ? count / 2 : 1)>;
};

// The first lanes of a vector: those that a smaller one has.
template <class Small, class Reg, int count>
GUMBEL_EXT_INLINE Small first_registers(const Pack<Reg, count>& a) {
  return GUMBEL_EXT_EACH(Small, a.r[i]);
}

GUMBEL_EXT_INLINE U32 load_words(const std::uint32_t* p) {
  return GUMBEL_EXT_EACH(U32, RegU32::load(p + i * RegU32::lanes));
}
GUMBEL_EXT_INLINE F64 load_real_words(const std::uint32_t* p) {
  return GUMBEL_EXT_EACH(F64, RegF64::load_words(p + i * RegF64::lanes));
}
GUMBEL_EXT_INLINE void store_words(std::uint32_t* p, const U32& a) {
  for (int i = 0; i < kLanes / RegU32::lanes; ++i) store(p + i * RegU32::lanes, a.r[i]);
}

// ---- element types in memory --------------------------------------------------------------------

GUMBEL_EXT_INLINE RegF32 load_register(const float* p, RegF32) { return RegF32::load(p); }
GUMBEL_EXT_INLINE RegF64 load_register(const double* p, RegF64) { return RegF64::load(p); }
GUMBEL_EXT_INLINE RegF32 load_register(const BFloat16* p, RegF32) {
  return RegF32::load_bfloat16(&p->bits);
}
GUMBEL_EXT_INLINE RegF32 load_register(const Half* p, RegF32) {
  return RegF32::load_half(&p->bits);
}

GUMBEL_EXT_INLINE void store_register(float* p, RegF32 a) { store(p, a); }
GUMBEL_EXT_INLINE void store_register(double* p, RegF64 a) { store(p, a); }
GUMBEL_EXT_INLINE void store_register(Half* p, RegF32 a) { store_half(&p->bits, a); }
GUMBEL_EXT_INLINE void store_register(BFloat16* p, RegF32 a) {
  const RegU32 u = bits(a);
  const RegU32 odd = shift_right(u, Int<16>()) & RegU32::splat(1);
  const RegU32 nearest_even = u + RegU32::splat(0x7FFF) + odd;
  // Rounding would carry a NaN with a full mantissa over into zero.
  const RegU32 rounded = select(either_nan(a, a), RegU32::splat(0x7FC00000u), nearest_even);
  store_low_halves(&p->bits, shift_right(rounded, Int<16>()));
}

// As many elements from p on as F has lanes.
template <class F, class T>
GUMBEL_EXT_INLINE F load_as(const T* p) {
  using Reg = std::remove_reference_t<decltype(F::r[0])>;
  return GUMBEL_EXT_EACH(F, load_register(p + i * Reg::lanes, Reg()));
}
GUMBEL_EXT_INLINE F32 load(const float* p) { return load_as<F32>(p); }
GUMBEL_EXT_INLINE F64 load(const double* p) { return load_as<F64>(p); }
GUMBEL_EXT_INLINE F32 load(const BFloat16* p) { return load_as<F32>(p); }
GUMBEL_EXT_INLINE F32 load(const Half* p) { return load_as<F32>(p); }

template <class T, class Reg, int count>
GUMBEL_EXT_INLINE void store(T* p, const Pack<Reg, count>& a) {
  for (int i = 0; i < count; ++i) store_register(p + i * Reg::lanes, a.r[i]);
}

// ---- lanes --------------------------------------------------------------------------------------

constexpr int lanes_of(RegM32) { return RegF32::lanes; }
constexpr int lanes_of(RegM64) { return RegF64::lanes; }

template <class Mask, int count>
GUMBEL_EXT_INLINE unsigned lane_bits(const Pack<Mask, count>& m) {
  unsigned out = 0;
  for (int i = 0; i < count; ++i) out |= lane_bits(m.r[i]) << (i * lanes_of(m.r[i]));
  return out;
}
template <class Mask, int count>
GUMBEL_EXT_INLINE bool any(const Pack<Mask, count>& m) {
  Mask folded = m.r[0];
  for (int i = 1; i < count; ++i) folded = folded | m.r[i];
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
  return add_lanes(
      Halve<count>::fold(a.r, [](Reg x, Reg y) __attribute__((always_inline)) { return x + y; }));
}
// The largest lane; no lane may be NaN.
template <class Reg, int count>
GUMBEL_EXT_INLINE auto largest(const Pack<Reg, count>& a) {
  return max_lanes(Halve<count>::fold(
      a.r, [](Reg x, Reg y) __attribute__((always_inline)) { return maximum(x, y); }));
}

// Mask of lanes whose byte is not zero.
GUMBEL_EXT_INLINE M32 allowed_lanes(const std::uint8_t* p, const F32&) {
  return GUMBEL_EXT_EACH(M32, nonzero_bytes(p + i * RegF32::lanes, RegF32()));
}
GUMBEL_EXT_INLINE M64 allowed_lanes(const std::uint8_t* p, const F64&) {
  return GUMBEL_EXT_EACH(M64, nonzero_bytes(p + i * RegF64::lanes, RegF64()));
}

// Mask of the first n lanes.
template <class F>
GUMBEL_EXT_INLINE typename RealTraits<F>::Mask first_lanes(int n) {
  using Scalar = typename RealTraits<F>::Scalar;
  alignas(64) static constexpr Scalar lane[kLanes] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                      8, 9, 10, 11, 12, 13, 14, 15};
  return less(load_as<F>(lane), RealTraits<F>::splat(static_cast<Scalar>(n)));
}

#undef GUMBEL_EXT_EACH
#undef GUMBEL_EXT_UNARY
#undef GUMBEL_EXT_BINARY
#undef GUMBEL_EXT_SHIFT
#undef GUMBEL_EXT_FUSED
#undef GUMBEL_EXT_SELECT
#undef GUMBEL_EXT_ZERO_UNLESS
#undef GUMBEL_EXT_REAL
#undef GUMBEL_EXT_INTEGER

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
