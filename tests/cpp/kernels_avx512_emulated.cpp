// csrc/cpu/kernels_avx512.cpp for machines without AVX-512: the same kernels, with SIMDe's
// emulation of the intrinsics in place of the instructions. Compiled with -mavx2 -mfma -mf16c, so
// that an emulated fma is two real ones and rounds once, as the bits that are compared demand.
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#if !defined(SIMDE_X86_FMA_NATIVE) || !defined(SIMDE_X86_AVX2_NATIVE)
#error "compile with -mavx2 -mfma -mf16c"
#endif
#if defined(__AVX512F__)
#error "compile without -mavx512: the point is to emulate it"
#endif

namespace emulated {

// What kernels need and SIMDe 0.7.4 lacks, made of the halves.
inline __m512i join(__m256i low, __m256i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
inline __m512 join(__m256 low, __m256 high) {
  return _mm512_castsi512_ps(join(_mm256_castps_si256(low), _mm256_castps_si256(high)));
}
inline __m256i half(__m512i a, int which) {
  return which ? _mm512_extracti64x4_epi64(a, 1) : _mm512_castsi512_si256(a);
}
inline __m256 half(__m512 a, int which) {
  return _mm256_castsi256_ps(half(_mm512_castps_si512(a), which));
}

inline __m512 cvtepi32_ps(__m512i a) {
  return join(_mm256_cvtepi32_ps(half(a, 0)), _mm256_cvtepi32_ps(half(a, 1)));
}
inline __m512i cvtepu16_epi32(__m256i a) {
  return join(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)),
              _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1)));
}
inline __m256i cvtepi32_epi16(__m512i a) {
  std::uint32_t wide[16];
  std::uint16_t narrow[16];
  std::memcpy(wide, &a, sizeof wide);
  for (int i = 0; i < 16; ++i) narrow[i] = static_cast<std::uint16_t>(wide[i]);
  __m256i out;
  std::memcpy(&out, narrow, sizeof out);
  return out;
}
inline __m512d cvtepu32_pd(__m256i a) {
  std::uint32_t words[8];
  double reals[8];
  std::memcpy(words, &a, sizeof words);
  for (int i = 0; i < 8; ++i) reals[i] = words[i];
  __m512d out;
  std::memcpy(&out, reals, sizeof out);
  return out;
}
inline __m512 cvtph_ps(__m256i a) {
  return join(_mm256_cvtph_ps(_mm256_castsi256_si128(a)),
              _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}
inline __m256i cvtps_ph(__m512 a) {
  return _mm256_inserti128_si256(
      _mm256_castsi128_si256(_mm256_cvtps_ph(half(a, 0), _MM_FROUND_TO_NEAREST_INT)),
      _mm256_cvtps_ph(half(a, 1), _MM_FROUND_TO_NEAREST_INT), 1);
}
inline __m512i srai_epi32(__m512i a, unsigned count) {
  return join(_mm256_srai_epi32(half(a, 0), static_cast<int>(count)),
              _mm256_srai_epi32(half(a, 1), static_cast<int>(count)));
}
inline __mmask16 test_epi8_mask(__m128i a, __m128i b) {
  const __m128i zero = _mm_cmpeq_epi8(_mm_and_si128(a, b), _mm_setzero_si128());
  return static_cast<__mmask16>(~_mm_movemask_epi8(zero));
}
template <class Vector, class Scalar>
inline Scalar reduce_max(Vector a, Scalar first) {
  Scalar lanes[sizeof a / sizeof first];
  std::memcpy(lanes, &a, sizeof lanes);
  for (Scalar lane : lanes) first = lane > first ? lane : first;
  return first;
}

}  // namespace emulated

#define _mm512_cvtepi32_ps(a) emulated::cvtepi32_ps(a)
#define _mm512_cvtepu16_epi32(a) emulated::cvtepu16_epi32(a)
#define _mm512_cvtepi32_epi16(a) emulated::cvtepi32_epi16(a)
#define _mm512_cvtepu32_pd(a) emulated::cvtepu32_pd(a)
#define _mm512_cvtph_ps(a) emulated::cvtph_ps(a)
#define _mm512_cvtps_ph(a, rounding) emulated::cvtps_ph(a)
#define _mm512_srai_epi32(a, count) emulated::srai_epi32(a, count)
#define _mm512_extractf32x8_ps(a, which) emulated::half(a, which)
#define _mm_test_epi8_mask(a, b) emulated::test_epi8_mask(a, b)
#define _mm512_reduce_max_ps(a) emulated::reduce_max(a, -std::numeric_limits<float>::infinity())
#define _mm512_reduce_max_pd(a) emulated::reduce_max(a, -std::numeric_limits<double>::infinity())

#define GUMBEL_EXT_ISA avx512
#define GUMBEL_EXT_USE_AVX512
#include "cpu/kernels.inc"

namespace gumbel_ext {
namespace cpu {
const KernelTable kAvx512Kernels = avx512::kernel_table("avx512");
}  // namespace cpu
}  // namespace gumbel_ext
