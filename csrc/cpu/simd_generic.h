// Registers of 16 bytes by GCC and Clang's vector extensions: SSE2 on x86-64, NEON on AArch64, and
// whatever another machine has. See simd.h for what each operation means.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../float16.h"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

using VectorF32 = float __attribute__((vector_size(16)));
using VectorF64 = double __attribute__((vector_size(16)));
using VectorU32 = std::uint32_t __attribute__((vector_size(16)));
using VectorI32 = std::int32_t __attribute__((vector_size(16)));
using VectorU64 = std::uint64_t __attribute__((vector_size(16)));
using VectorI64 = std::int64_t __attribute__((vector_size(16)));

template <class V, class P>
GUMBEL_EXT_INLINE V load_vector(const P* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

struct RegM32 {
  VectorU32 v;
};
struct RegM64 {
  VectorU64 v;
};

struct RegU32 {
  static constexpr int lanes = 4;
  VectorU32 v;
  static GUMBEL_EXT_INLINE RegU32 splat(std::uint32_t c) { return {VectorU32{c, c, c, c}}; }
  static GUMBEL_EXT_INLINE RegU32 load(const std::uint32_t* p) {
    return {load_vector<VectorU32>(p)};
  }
};
struct RegU64 {
  static constexpr int lanes = 2;
  VectorU64 v;
  static GUMBEL_EXT_INLINE RegU64 splat(std::uint64_t c) { return {VectorU64{c, c}}; }
};
struct RegF32 {
  static constexpr int lanes = 4;
  using Scalar = float;
  using Bits = RegU32;
  VectorF32 v;
  static GUMBEL_EXT_INLINE RegF32 splat(float c) { return {VectorF32{c, c, c, c}}; }
  static GUMBEL_EXT_INLINE RegF32 load(const float* p) { return {load_vector<VectorF32>(p)}; }
  static GUMBEL_EXT_INLINE RegF32 load_bfloat16(const std::uint16_t* p) {
    const VectorU32 w{p[0], p[1], p[2], p[3]};
    return {reinterpret_cast<VectorF32>(w << 16)};
  }
  static GUMBEL_EXT_INLINE RegF32 load_half(const std::uint16_t* p) {
    return {VectorF32{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]),
                      half_to_float(p[3])}};
  }
};
struct RegF64 {
  static constexpr int lanes = 2;
  using Scalar = double;
  using Bits = RegU64;
  VectorF64 v;
  static GUMBEL_EXT_INLINE RegF64 splat(double c) { return {VectorF64{c, c}}; }
  static GUMBEL_EXT_INLINE RegF64 load(const double* p) { return {load_vector<VectorF64>(p)}; }
  static GUMBEL_EXT_INLINE RegF64 load_words(const std::uint32_t* p) {
    return {VectorF64{static_cast<double>(p[0]), static_cast<double>(p[1])}};
  }
};

GUMBEL_EXT_INLINE RegF32 operator+(RegF32 a, RegF32 b) { return {a.v + b.v}; }
GUMBEL_EXT_INLINE RegF32 operator-(RegF32 a, RegF32 b) { return {a.v - b.v}; }
GUMBEL_EXT_INLINE RegF32 operator*(RegF32 a, RegF32 b) { return {a.v * b.v}; }
GUMBEL_EXT_INLINE RegF32 operator/(RegF32 a, RegF32 b) { return {a.v / b.v}; }
GUMBEL_EXT_INLINE RegM32 less(RegF32 a, RegF32 b) {
  return {reinterpret_cast<VectorU32>(a.v < b.v)};
}
GUMBEL_EXT_INLINE RegM32 equal(RegF32 a, RegF32 b) {
  return {reinterpret_cast<VectorU32>(a.v == b.v)};
}
GUMBEL_EXT_INLINE RegM32 not_at_most(RegF32 a, RegF32 b) {
  return {~reinterpret_cast<VectorU32>(a.v <= b.v)};
}
GUMBEL_EXT_INLINE RegM32 either_nan(RegF32 a, RegF32 b) {
  return {reinterpret_cast<VectorU32>(a.v != a.v) | reinterpret_cast<VectorU32>(b.v != b.v)};
}
GUMBEL_EXT_INLINE RegU32 select(RegM32 m, RegU32 a, RegU32 b) {
  return {(m.v & a.v) | (~m.v & b.v)};
}
GUMBEL_EXT_INLINE RegU32 bits(RegF32 a) { return {reinterpret_cast<VectorU32>(a.v)}; }
GUMBEL_EXT_INLINE RegF32 real(RegU32 a) { return {reinterpret_cast<VectorF32>(a.v)}; }
GUMBEL_EXT_INLINE RegF32 select(RegM32 m, RegF32 a, RegF32 b) {
  return real(select(m, bits(a), bits(b)));
}
GUMBEL_EXT_INLINE RegF32 maximum(RegF32 a, RegF32 b) { return select(less(b, a), a, b); }
GUMBEL_EXT_INLINE RegF32 to_real(RegU32 a) {
  return {__builtin_convertvector(reinterpret_cast<VectorI32>(a.v), VectorF32)};
}
GUMBEL_EXT_INLINE void store(float* p, RegF32 a) { std::memcpy(p, &a.v, sizeof a.v); }
GUMBEL_EXT_INLINE void store_half(std::uint16_t* p, RegF32 a) {
  for (int i = 0; i < 4; ++i) p[i] = float_to_half(a.v[i]);
}
GUMBEL_EXT_INLINE void store_low_halves(std::uint16_t* p, RegU32 a) {
  for (int i = 0; i < 4; ++i) p[i] = static_cast<std::uint16_t>(a.v[i]);
}
GUMBEL_EXT_INLINE float add_lanes(RegF32 a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
GUMBEL_EXT_INLINE float max_lanes(RegF32 a) {
  const float even = a.v[0] > a.v[2] ? a.v[0] : a.v[2], odd = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return even > odd ? even : odd;
}

GUMBEL_EXT_INLINE RegF64 operator+(RegF64 a, RegF64 b) { return {a.v + b.v}; }
GUMBEL_EXT_INLINE RegF64 operator-(RegF64 a, RegF64 b) { return {a.v - b.v}; }
GUMBEL_EXT_INLINE RegF64 operator*(RegF64 a, RegF64 b) { return {a.v * b.v}; }
GUMBEL_EXT_INLINE RegF64 operator/(RegF64 a, RegF64 b) { return {a.v / b.v}; }
GUMBEL_EXT_INLINE RegM64 less(RegF64 a, RegF64 b) {
  return {reinterpret_cast<VectorU64>(a.v < b.v)};
}
GUMBEL_EXT_INLINE RegM64 equal(RegF64 a, RegF64 b) {
  return {reinterpret_cast<VectorU64>(a.v == b.v)};
}
GUMBEL_EXT_INLINE RegM64 either_nan(RegF64 a, RegF64 b) {
  return {reinterpret_cast<VectorU64>(a.v != a.v) | reinterpret_cast<VectorU64>(b.v != b.v)};
}
GUMBEL_EXT_INLINE RegU64 bits(RegF64 a) { return {reinterpret_cast<VectorU64>(a.v)}; }
GUMBEL_EXT_INLINE RegF64 real(RegU64 a) { return {reinterpret_cast<VectorF64>(a.v)}; }
GUMBEL_EXT_INLINE RegF64 select(RegM64 m, RegF64 a, RegF64 b) {
  return real(RegU64{(m.v & bits(a).v) | (~m.v & bits(b).v)});
}
GUMBEL_EXT_INLINE RegF64 maximum(RegF64 a, RegF64 b) { return select(less(b, a), a, b); }
GUMBEL_EXT_INLINE void store(double* p, RegF64 a) { std::memcpy(p, &a.v, sizeof a.v); }
GUMBEL_EXT_INLINE double add_lanes(RegF64 a) { return a.v[0] + a.v[1]; }
GUMBEL_EXT_INLINE double max_lanes(RegF64 a) { return a.v[0] > a.v[1] ? a.v[0] : a.v[1]; }

#if defined(__aarch64__)
GUMBEL_EXT_INLINE RegF32 fma(RegF32 a, RegF32 b, RegF32 c) {
  return {reinterpret_cast<VectorF32>(vfmaq_f32(reinterpret_cast<float32x4_t>(c.v),
                                                reinterpret_cast<float32x4_t>(a.v),
                                                reinterpret_cast<float32x4_t>(b.v)))};
}
GUMBEL_EXT_INLINE RegF64 fma(RegF64 a, RegF64 b, RegF64 c) {
  return {reinterpret_cast<VectorF64>(vfmaq_f64(reinterpret_cast<float64x2_t>(c.v),
                                                reinterpret_cast<float64x2_t>(a.v),
                                                reinterpret_cast<float64x2_t>(b.v)))};
}
#else
// A call into libm for every element would be slower than PyTorch's own path; this build rounds
// twice instead, and is therefore the one whose last bits may differ from the others'.
GUMBEL_EXT_INLINE RegF32 fma(RegF32 a, RegF32 b, RegF32 c) { return {a.v * b.v + c.v}; }
GUMBEL_EXT_INLINE RegF64 fma(RegF64 a, RegF64 b, RegF64 c) { return {a.v * b.v + c.v}; }
#endif

GUMBEL_EXT_INLINE RegU32 operator+(RegU32 a, RegU32 b) { return {a.v + b.v}; }
GUMBEL_EXT_INLINE RegU32 operator-(RegU32 a, RegU32 b) { return {a.v - b.v}; }
GUMBEL_EXT_INLINE RegU32 operator&(RegU32 a, RegU32 b) { return {a.v & b.v}; }
GUMBEL_EXT_INLINE RegU32 operator|(RegU32 a, RegU32 b) { return {a.v | b.v}; }
GUMBEL_EXT_INLINE RegU32 operator^(RegU32 a, RegU32 b) { return {a.v ^ b.v}; }
template <int n>
GUMBEL_EXT_INLINE RegU32 shift_left(RegU32 a, Int<n>) {
  return {a.v << n};
}
template <int n>
GUMBEL_EXT_INLINE RegU32 shift_right(RegU32 a, Int<n>) {
  return {a.v >> n};
}
GUMBEL_EXT_INLINE RegU32 spread_top_bit(RegU32 a) {
  return {reinterpret_cast<VectorU32>(reinterpret_cast<VectorI32>(a.v) >> 31)};
}
GUMBEL_EXT_INLINE RegM32 top_bit(RegU32 a) { return {spread_top_bit(a).v}; }
GUMBEL_EXT_INLINE RegM32 as_mask(RegU32 a) { return {a.v}; }
GUMBEL_EXT_INLINE RegF32 zero_unless(RegM32 m, RegF32 a) { return real(RegU32{m.v & bits(a).v}); }
GUMBEL_EXT_INLINE RegF64 zero_unless(RegM64 m, RegF64 a) { return real(RegU64{m.v & bits(a).v}); }
GUMBEL_EXT_INLINE void store(std::uint32_t* p, RegU32 a) { std::memcpy(p, &a.v, sizeof a.v); }

GUMBEL_EXT_INLINE RegU64 operator+(RegU64 a, RegU64 b) { return {a.v + b.v}; }
GUMBEL_EXT_INLINE RegU64 operator&(RegU64 a, RegU64 b) { return {a.v & b.v}; }
GUMBEL_EXT_INLINE RegU64 operator|(RegU64 a, RegU64 b) { return {a.v | b.v}; }
GUMBEL_EXT_INLINE RegU64 operator^(RegU64 a, RegU64 b) { return {a.v ^ b.v}; }
template <int n>
GUMBEL_EXT_INLINE RegU64 shift_left(RegU64 a, Int<n>) {
  return {a.v << n};
}
template <int n>
GUMBEL_EXT_INLINE RegU64 shift_right(RegU64 a, Int<n>) {
  return {a.v >> n};
}

GUMBEL_EXT_INLINE RegM32 operator|(RegM32 a, RegM32 b) { return {a.v | b.v}; }
GUMBEL_EXT_INLINE RegM64 operator|(RegM64 a, RegM64 b) { return {a.v | b.v}; }
GUMBEL_EXT_INLINE unsigned lane_bits(RegM32 m) {
  return (m.v[0] & 1u) | (m.v[1] & 2u) | (m.v[2] & 4u) | (m.v[3] & 8u);
}
GUMBEL_EXT_INLINE unsigned lane_bits(RegM64 m) {
  return static_cast<unsigned>((m.v[0] & 1u) | (m.v[1] & 2u));
}
GUMBEL_EXT_INLINE RegM32 nonzero_bytes(const std::uint8_t* p, RegF32) {
  const VectorU32 w{p[0], p[1], p[2], p[3]};
  return {reinterpret_cast<VectorU32>(w != VectorU32{})};
}
GUMBEL_EXT_INLINE RegM64 nonzero_bytes(const std::uint8_t* p, RegF64) {
  const VectorU64 w{p[0], p[1]};
  return {reinterpret_cast<VectorU64>(w != VectorU64{})};
}

// Philox works on 64-bit lanes that hold one 32-bit word each, with junk above it.
struct RegWord {
  static constexpr int lanes = 2;
  VectorU64 v;
  static GUMBEL_EXT_INLINE RegWord splat(std::uint32_t c) { return {VectorU64{c, c}}; }
  static GUMBEL_EXT_INLINE RegWord lane_blocks() { return {VectorU64{0, 1}}; }
};
struct RegProduct {
  VectorU64 v;
};
GUMBEL_EXT_INLINE RegWord operator+(RegWord a, RegWord b) { return {a.v + b.v}; }
GUMBEL_EXT_INLINE RegWord operator^(RegWord a, RegWord b) { return {a.v ^ b.v}; }
GUMBEL_EXT_INLINE RegProduct wide_multiply(RegWord a, RegWord multiplier) {
#if defined(__aarch64__)
  return {reinterpret_cast<VectorU64>(
      vmull_u32(vmovn_u64(reinterpret_cast<uint64x2_t>(a.v)),
                vmovn_u64(reinterpret_cast<uint64x2_t>(multiplier.v))))};
#else
  const VectorU64 low{0xFFFFFFFFu, 0xFFFFFFFFu};
  return {(a.v & low) * (multiplier.v & low)};
#endif
}
GUMBEL_EXT_INLINE RegWord high_word(RegProduct p) { return {p.v >> 32}; }
GUMBEL_EXT_INLINE RegWord low_word(RegProduct p) { return {p.v}; }
// Writes c0 c1 c2 c3 of block 0, of block 1, ...
GUMBEL_EXT_INLINE void interleave_words(std::uint32_t* out, RegWord c0, RegWord c1, RegWord c2,
                                        RegWord c3) {
  for (int i = 0; i < 2; ++i) {
    out[4 * i + 0] = static_cast<std::uint32_t>(c0.v[i]);
    out[4 * i + 1] = static_cast<std::uint32_t>(c1.v[i]);
    out[4 * i + 2] = static_cast<std::uint32_t>(c2.v[i]);
    out[4 * i + 3] = static_cast<std::uint32_t>(c3.v[i]);
  }
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
