// Registers of AVX-512 F + BW + DQ + VL. See simd.h for what each operation means.
#pragma once

#include <immintrin.h>

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

struct RegM32 {
  __mmask16 v;
};
struct RegM64 {
  __mmask8 v;
};

struct RegU32 {
  static constexpr int lanes = 16;
  __m512i v;
  static GUMBEL_EXT_INLINE RegU32 splat(std::uint32_t c) {
    return {_mm512_set1_epi32(static_cast<int>(c))};
  }
  static GUMBEL_EXT_INLINE RegU32 load(const std::uint32_t* p) { return {_mm512_loadu_si512(p)}; }
};
struct RegU64 {
  static constexpr int lanes = 8;
  __m512i v;
  static GUMBEL_EXT_INLINE RegU64 splat(std::uint64_t c) {
    return {_mm512_set1_epi64(static_cast<long long>(c))};
  }
};
struct RegF32 {
  static constexpr int lanes = 16;
  using Scalar = float;
  using Bits = RegU32;
  __m512 v;
  static GUMBEL_EXT_INLINE RegF32 splat(float c) { return {_mm512_set1_ps(c)}; }
  static GUMBEL_EXT_INLINE RegF32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static GUMBEL_EXT_INLINE RegF32 load_bfloat16(const std::uint16_t* p) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
  }
  static GUMBEL_EXT_INLINE RegF32 load_half(const std::uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
};
struct RegF64 {
  static constexpr int lanes = 8;
  using Scalar = double;
  using Bits = RegU64;
  __m512d v;
  static GUMBEL_EXT_INLINE RegF64 splat(double c) { return {_mm512_set1_pd(c)}; }
  static GUMBEL_EXT_INLINE RegF64 load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static GUMBEL_EXT_INLINE RegF64 load_words(const std::uint32_t* p) {
    return {_mm512_cvtepu32_pd(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
};

GUMBEL_EXT_INLINE RegF32 operator+(RegF32 a, RegF32 b) { return {_mm512_add_ps(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegF32 operator-(RegF32 a, RegF32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegF32 operator*(RegF32 a, RegF32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegF32 operator/(RegF32 a, RegF32 b) { return {_mm512_div_ps(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegF32 fma(RegF32 a, RegF32 b, RegF32 c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
GUMBEL_EXT_INLINE RegF32 maximum(RegF32 a, RegF32 b) { return {_mm512_max_ps(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegM32 less(RegF32 a, RegF32 b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)};
}
GUMBEL_EXT_INLINE RegM32 equal(RegF32 a, RegF32 b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)};
}
GUMBEL_EXT_INLINE RegM32 not_at_most(RegF32 a, RegF32 b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ)};
}
GUMBEL_EXT_INLINE RegM32 either_nan(RegF32 a, RegF32 b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q)};
}
GUMBEL_EXT_INLINE RegF32 select(RegM32 m, RegF32 a, RegF32 b) {
  return {_mm512_mask_blend_ps(m.v, b.v, a.v)};
}
GUMBEL_EXT_INLINE RegU32 select(RegM32 m, RegU32 a, RegU32 b) {
  return {_mm512_mask_blend_epi32(m.v, b.v, a.v)};
}
GUMBEL_EXT_INLINE RegU32 bits(RegF32 a) { return {_mm512_castps_si512(a.v)}; }
GUMBEL_EXT_INLINE RegF32 real(RegU32 a) { return {_mm512_castsi512_ps(a.v)}; }
GUMBEL_EXT_INLINE RegF32 to_real(RegU32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
GUMBEL_EXT_INLINE void store(float* p, RegF32 a) { _mm512_storeu_ps(p, a.v); }
GUMBEL_EXT_INLINE void store_half(std::uint16_t* p, RegF32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
GUMBEL_EXT_INLINE void store_low_halves(std::uint16_t* p, RegU32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.v));
}
// Written out rather than _mm512_reduce_*: the order of the sum is part of what is promised.
GUMBEL_EXT_INLINE float add_lanes(RegF32 a) {
  const __m256 high = _mm512_extractf32x8_ps(a.v, 1);
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
GUMBEL_EXT_INLINE float max_lanes(RegF32 a) { return _mm512_reduce_max_ps(a.v); }

GUMBEL_EXT_INLINE RegF64 operator+(RegF64 a, RegF64 b) { return {_mm512_add_pd(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegF64 operator-(RegF64 a, RegF64 b) { return {_mm512_sub_pd(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegF64 operator*(RegF64 a, RegF64 b) { return {_mm512_mul_pd(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegF64 operator/(RegF64 a, RegF64 b) { return {_mm512_div_pd(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegF64 fma(RegF64 a, RegF64 b, RegF64 c) {
  return {_mm512_fmadd_pd(a.v, b.v, c.v)};
}
GUMBEL_EXT_INLINE RegF64 maximum(RegF64 a, RegF64 b) { return {_mm512_max_pd(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegM64 less(RegF64 a, RegF64 b) {
  return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ)};
}
GUMBEL_EXT_INLINE RegM64 equal(RegF64 a, RegF64 b) {
  return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_EQ_OQ)};
}
GUMBEL_EXT_INLINE RegM64 either_nan(RegF64 a, RegF64 b) {
  return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_UNORD_Q)};
}
GUMBEL_EXT_INLINE RegF64 select(RegM64 m, RegF64 a, RegF64 b) {
  return {_mm512_mask_blend_pd(m.v, b.v, a.v)};
}
GUMBEL_EXT_INLINE RegU64 bits(RegF64 a) { return {_mm512_castpd_si512(a.v)}; }
GUMBEL_EXT_INLINE RegF64 real(RegU64 a) { return {_mm512_castsi512_pd(a.v)}; }
GUMBEL_EXT_INLINE void store(double* p, RegF64 a) { _mm512_storeu_pd(p, a.v); }
GUMBEL_EXT_INLINE double add_lanes(RegF64 a) {
  const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(a.v), _mm512_extractf64x4_pd(a.v, 1));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
GUMBEL_EXT_INLINE double max_lanes(RegF64 a) { return _mm512_reduce_max_pd(a.v); }

GUMBEL_EXT_INLINE RegU32 operator+(RegU32 a, RegU32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegU32 operator-(RegU32 a, RegU32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegU32 operator&(RegU32 a, RegU32 b) { return {_mm512_and_si512(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegU32 operator|(RegU32 a, RegU32 b) { return {_mm512_or_si512(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegU32 operator^(RegU32 a, RegU32 b) { return {_mm512_xor_si512(a.v, b.v)}; }
template <int n>
GUMBEL_EXT_INLINE RegU32 shift_left(RegU32 a, Int<n>) {
  return {_mm512_slli_epi32(a.v, n)};
}
template <int n>
GUMBEL_EXT_INLINE RegU32 shift_right(RegU32 a, Int<n>) {
  return {_mm512_srli_epi32(a.v, n)};
}
GUMBEL_EXT_INLINE RegU32 spread_top_bit(RegU32 a) { return {_mm512_srai_epi32(a.v, 31)}; }
GUMBEL_EXT_INLINE RegM32 top_bit(RegU32 a) { return {_mm512_movepi32_mask(a.v)}; }
GUMBEL_EXT_INLINE RegM32 as_mask(RegU32 a) { return top_bit(a); }
GUMBEL_EXT_INLINE RegF32 zero_unless(RegM32 m, RegF32 a) { return {_mm512_maskz_mov_ps(m.v, a.v)}; }
GUMBEL_EXT_INLINE RegF64 zero_unless(RegM64 m, RegF64 a) { return {_mm512_maskz_mov_pd(m.v, a.v)}; }
GUMBEL_EXT_INLINE void store(std::uint32_t* p, RegU32 a) { _mm512_storeu_si512(p, a.v); }

GUMBEL_EXT_INLINE RegU64 operator+(RegU64 a, RegU64 b) { return {_mm512_add_epi64(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegU64 operator&(RegU64 a, RegU64 b) { return {_mm512_and_si512(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegU64 operator|(RegU64 a, RegU64 b) { return {_mm512_or_si512(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegU64 operator^(RegU64 a, RegU64 b) { return {_mm512_xor_si512(a.v, b.v)}; }
template <int n>
GUMBEL_EXT_INLINE RegU64 shift_left(RegU64 a, Int<n>) {
  return {_mm512_slli_epi64(a.v, n)};
}
template <int n>
GUMBEL_EXT_INLINE RegU64 shift_right(RegU64 a, Int<n>) {
  return {_mm512_srli_epi64(a.v, n)};
}

GUMBEL_EXT_INLINE RegM32 operator|(RegM32 a, RegM32 b) {
  return {static_cast<__mmask16>(a.v | b.v)};
}
GUMBEL_EXT_INLINE RegM64 operator|(RegM64 a, RegM64 b) {
  return {static_cast<__mmask8>(a.v | b.v)};
}
GUMBEL_EXT_INLINE unsigned lane_bits(RegM32 m) { return m.v; }
GUMBEL_EXT_INLINE unsigned lane_bits(RegM64 m) { return m.v; }
GUMBEL_EXT_INLINE RegM32 nonzero_bytes(const std::uint8_t* p, RegF32) {
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm_test_epi8_mask(b, b)};
}
GUMBEL_EXT_INLINE RegM64 nonzero_bytes(const std::uint8_t* p, RegF64) {
  const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return {static_cast<__mmask8>(_mm_test_epi8_mask(b, b))};
}

// Philox works on 64-bit lanes that hold one 32-bit word each, with junk above it.
struct RegWord {
  static constexpr int lanes = 8;
  __m512i v;
  static GUMBEL_EXT_INLINE RegWord splat(std::uint32_t c) { return {_mm512_set1_epi64(c)}; }
  // The block that each lane computes, in the order that makes interleave_words() two unpacks.
  static GUMBEL_EXT_INLINE RegWord lane_blocks() {
    return {_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7)};
  }
};
struct RegProduct {
  __m512i v;
};
GUMBEL_EXT_INLINE RegWord operator+(RegWord a, RegWord b) { return {_mm512_add_epi64(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegWord operator^(RegWord a, RegWord b) { return {_mm512_xor_si512(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegProduct wide_multiply(RegWord a, RegWord multiplier) {
  return {_mm512_mul_epu32(a.v, multiplier.v)};
}
GUMBEL_EXT_INLINE RegWord high_word(RegProduct p) { return {_mm512_srli_epi64(p.v, 32)}; }
GUMBEL_EXT_INLINE RegWord low_word(RegProduct p) { return {p.v}; }
// Writes c0 c1 c2 c3 of block 0, of block 1, ...
GUMBEL_EXT_INLINE void interleave_words(std::uint32_t* out, RegWord c0, RegWord c1, RegWord c2,
                                        RegWord c3) {
  const __m512i first = _mm512_mask_blend_epi32(0xAAAA, c0.v, _mm512_slli_epi64(c1.v, 32));
  const __m512i second = _mm512_mask_blend_epi32(0xAAAA, c2.v, _mm512_slli_epi64(c3.v, 32));
  _mm512_storeu_si512(out, _mm512_unpacklo_epi64(first, second));
  _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(first, second));
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
