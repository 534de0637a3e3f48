// Registers of AVX2 + FMA + F16C. See simd.h for what each operation means.
#pragma once

#include <immintrin.h>

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

struct RegM32 {
  __m256 v;
};
struct RegM64 {
  __m256d v;
};

struct RegU32 {
  static constexpr int lanes = 8;
  __m256i v;
  static GUMBEL_EXT_INLINE RegU32 splat(std::uint32_t c) {
    return {_mm256_set1_epi32(static_cast<int>(c))};
  }
  static GUMBEL_EXT_INLINE RegU32 load(const std::uint32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
};
struct RegU64 {
  static constexpr int lanes = 4;
  __m256i v;
  static GUMBEL_EXT_INLINE RegU64 splat(std::uint64_t c) {
    return {_mm256_set1_epi64x(static_cast<long long>(c))};
  }
};
struct RegF32 {
  static constexpr int lanes = 8;
  using Scalar = float;
  using Bits = RegU32;
  __m256 v;
  static GUMBEL_EXT_INLINE RegF32 splat(float c) { return {_mm256_set1_ps(c)}; }
  static GUMBEL_EXT_INLINE RegF32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static GUMBEL_EXT_INLINE RegF32 load_bfloat16(const std::uint16_t* p) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
  }
  static GUMBEL_EXT_INLINE RegF32 load_half(const std::uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
};
struct RegF64 {
  static constexpr int lanes = 4;
  using Scalar = double;
  using Bits = RegU64;
  __m256d v;
  static GUMBEL_EXT_INLINE RegF64 splat(double c) { return {_mm256_set1_pd(c)}; }
  static GUMBEL_EXT_INLINE RegF64 load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static GUMBEL_EXT_INLINE RegF64 load_words(const std::uint32_t* p) {
    const __m256i w = _mm256_cvtepu32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256d magic = _mm256_set1_pd(0x1p52);
    return {
        _mm256_sub_pd(_mm256_castsi256_pd(_mm256_or_si256(w, _mm256_castpd_si256(magic))), magic)};
  }
};

GUMBEL_EXT_INLINE RegF32 operator+(RegF32 a, RegF32 b) { return {_mm256_add_ps(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegF32 operator-(RegF32 a, RegF32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegF32 operator*(RegF32 a, RegF32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegF32 operator/(RegF32 a, RegF32 b) { return {_mm256_div_ps(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegF32 fma(RegF32 a, RegF32 b, RegF32 c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
GUMBEL_EXT_INLINE RegF32 maximum(RegF32 a, RegF32 b) { return {_mm256_max_ps(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegM32 less(RegF32 a, RegF32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
GUMBEL_EXT_INLINE RegM32 equal(RegF32 a, RegF32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
GUMBEL_EXT_INLINE RegM32 not_at_most(RegF32 a, RegF32 b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_NLE_UQ)};
}
GUMBEL_EXT_INLINE RegM32 either_nan(RegF32 a, RegF32 b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_UNORD_Q)};
}
GUMBEL_EXT_INLINE RegF32 select(RegM32 m, RegF32 a, RegF32 b) {
  return {_mm256_blendv_ps(b.v, a.v, m.v)};
}
GUMBEL_EXT_INLINE RegU32 select(RegM32 m, RegU32 a, RegU32 b) {
  return {_mm256_castps_si256(
      _mm256_blendv_ps(_mm256_castsi256_ps(b.v), _mm256_castsi256_ps(a.v), m.v))};
}
GUMBEL_EXT_INLINE RegU32 bits(RegF32 a) { return {_mm256_castps_si256(a.v)}; }
GUMBEL_EXT_INLINE RegF32 real(RegU32 a) { return {_mm256_castsi256_ps(a.v)}; }
GUMBEL_EXT_INLINE RegF32 to_real(RegU32 a) { return {_mm256_cvtepi32_ps(a.v)}; }
GUMBEL_EXT_INLINE void store(float* p, RegF32 a) { _mm256_storeu_ps(p, a.v); }
GUMBEL_EXT_INLINE void store_half(std::uint16_t* p, RegF32 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
GUMBEL_EXT_INLINE void store_low_halves(std::uint16_t* p, RegU32 a) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(a.v, a.v), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
GUMBEL_EXT_INLINE float add_lanes(RegF32 a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
GUMBEL_EXT_INLINE float max_lanes(RegF32 a) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

GUMBEL_EXT_INLINE RegF64 operator+(RegF64 a, RegF64 b) { return {_mm256_add_pd(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegF64 operator-(RegF64 a, RegF64 b) { return {_mm256_sub_pd(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegF64 operator*(RegF64 a, RegF64 b) { return {_mm256_mul_pd(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegF64 operator/(RegF64 a, RegF64 b) { return {_mm256_div_pd(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegF64 fma(RegF64 a, RegF64 b, RegF64 c) {
  return {_mm256_fmadd_pd(a.v, b.v, c.v)};
}
GUMBEL_EXT_INLINE RegF64 maximum(RegF64 a, RegF64 b) { return {_mm256_max_pd(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegM64 less(RegF64 a, RegF64 b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ)}; }
GUMBEL_EXT_INLINE RegM64 equal(RegF64 a, RegF64 b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_EQ_OQ)}; }
GUMBEL_EXT_INLINE RegM64 either_nan(RegF64 a, RegF64 b) {
  return {_mm256_cmp_pd(a.v, b.v, _CMP_UNORD_Q)};
}
GUMBEL_EXT_INLINE RegF64 select(RegM64 m, RegF64 a, RegF64 b) {
  return {_mm256_blendv_pd(b.v, a.v, m.v)};
}
GUMBEL_EXT_INLINE RegU64 bits(RegF64 a) { return {_mm256_castpd_si256(a.v)}; }
GUMBEL_EXT_INLINE RegF64 real(RegU64 a) { return {_mm256_castsi256_pd(a.v)}; }
GUMBEL_EXT_INLINE void store(double* p, RegF64 a) { _mm256_storeu_pd(p, a.v); }
GUMBEL_EXT_INLINE double add_lanes(RegF64 a) {
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
GUMBEL_EXT_INLINE double max_lanes(RegF64 a) {
  const __m128d two = _mm_max_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_max_sd(two, _mm_unpackhi_pd(two, two)));
}

GUMBEL_EXT_INLINE RegU32 operator+(RegU32 a, RegU32 b) { return {_mm256_add_epi32(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegU32 operator-(RegU32 a, RegU32 b) { return {_mm256_sub_epi32(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegU32 operator&(RegU32 a, RegU32 b) { return {_mm256_and_si256(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegU32 operator|(RegU32 a, RegU32 b) { return {_mm256_or_si256(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegU32 operator^(RegU32 a, RegU32 b) { return {_mm256_xor_si256(a.v, b.v)}; }
template <int n>
GUMBEL_EXT_INLINE RegU32 shift_left(RegU32 a, Int<n>) {
  return {_mm256_slli_epi32(a.v, n)};
}
template <int n>
GUMBEL_EXT_INLINE RegU32 shift_right(RegU32 a, Int<n>) {
  return {_mm256_srli_epi32(a.v, n)};
}
GUMBEL_EXT_INLINE RegU32 spread_top_bit(RegU32 a) { return {_mm256_srai_epi32(a.v, 31)}; }
GUMBEL_EXT_INLINE RegM32 top_bit(RegU32 a) { return {_mm256_castsi256_ps(a.v)}; }
GUMBEL_EXT_INLINE RegM32 as_mask(RegU32 a) { return {_mm256_castsi256_ps(a.v)}; }
GUMBEL_EXT_INLINE RegF32 zero_unless(RegM32 m, RegF32 a) { return {_mm256_and_ps(m.v, a.v)}; }
GUMBEL_EXT_INLINE RegF64 zero_unless(RegM64 m, RegF64 a) { return {_mm256_and_pd(m.v, a.v)}; }
GUMBEL_EXT_INLINE void store(std::uint32_t* p, RegU32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v);
}

GUMBEL_EXT_INLINE RegU64 operator+(RegU64 a, RegU64 b) { return {_mm256_add_epi64(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegU64 operator&(RegU64 a, RegU64 b) { return {_mm256_and_si256(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegU64 operator|(RegU64 a, RegU64 b) { return {_mm256_or_si256(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegU64 operator^(RegU64 a, RegU64 b) { return {_mm256_xor_si256(a.v, b.v)}; }
template <int n>
GUMBEL_EXT_INLINE RegU64 shift_left(RegU64 a, Int<n>) {
  return {_mm256_slli_epi64(a.v, n)};
}
template <int n>
GUMBEL_EXT_INLINE RegU64 shift_right(RegU64 a, Int<n>) {
  return {_mm256_srli_epi64(a.v, n)};
}

GUMBEL_EXT_INLINE RegM32 operator|(RegM32 a, RegM32 b) { return {_mm256_or_ps(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegM64 operator|(RegM64 a, RegM64 b) { return {_mm256_or_pd(a.v, b.v)}; }
GUMBEL_EXT_INLINE unsigned lane_bits(RegM32 m) {
  return static_cast<unsigned>(_mm256_movemask_ps(m.v));
}
GUMBEL_EXT_INLINE unsigned lane_bits(RegM64 m) {
  return static_cast<unsigned>(_mm256_movemask_pd(m.v));
}
GUMBEL_EXT_INLINE RegM32 nonzero_bytes(const std::uint8_t* p, RegF32) {
  const __m256i w = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(w, _mm256_setzero_si256()))};
}
GUMBEL_EXT_INLINE RegM64 nonzero_bytes(const std::uint8_t* p, RegF64) {
  std::int32_t four;
  std::memcpy(&four, p, sizeof four);
  const __m256i w = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
  return {_mm256_castsi256_pd(_mm256_cmpgt_epi64(w, _mm256_setzero_si256()))};
}

// Philox works on 64-bit lanes that hold one 32-bit word each, with junk above it.
struct RegWord {
  static constexpr int lanes = 4;
  __m256i v;
  static GUMBEL_EXT_INLINE RegWord splat(std::uint32_t c) { return {_mm256_set1_epi64x(c)}; }
  // The block that each lane computes, in the order that makes interleave_words() two unpacks.
  static GUMBEL_EXT_INLINE RegWord lane_blocks() { return {_mm256_setr_epi64x(0, 2, 1, 3)}; }
};
struct RegProduct {
  __m256i v;
};
GUMBEL_EXT_INLINE RegWord operator+(RegWord a, RegWord b) { return {_mm256_add_epi64(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegWord operator^(RegWord a, RegWord b) { return {_mm256_xor_si256(a.v, b.v)}; }
GUMBEL_EXT_INLINE RegProduct wide_multiply(RegWord a, RegWord multiplier) {
  return {_mm256_mul_epu32(a.v, multiplier.v)};
}
GUMBEL_EXT_INLINE RegWord high_word(RegProduct p) { return {_mm256_srli_epi64(p.v, 32)}; }
GUMBEL_EXT_INLINE RegWord low_word(RegProduct p) { return {p.v}; }
// Writes c0 c1 c2 c3 of block 0, of block 1, ...
GUMBEL_EXT_INLINE void interleave_words(std::uint32_t* out, RegWord c0, RegWord c1, RegWord c2,
                                        RegWord c3) {
  const __m256i first = _mm256_blend_epi32(c0.v, _mm256_slli_epi64(c1.v, 32), 0xAA);
  const __m256i second = _mm256_blend_epi32(c2.v, _mm256_slli_epi64(c3.v, 32), 0xAA);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi64(first, second));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out) + 1, _mm256_unpackhi_epi64(first, second));
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
