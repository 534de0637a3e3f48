// 16-bit numbers as they lie in memory, and their conversions where no instruction does them.
#pragma once

#include "philox.h"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

struct BFloat16 {
  std::uint16_t bits;
};
struct Half {
  std::uint16_t bits;
};

// IEEE binary16 without instructions for it: rebias the exponent by a multiplication, which also
// handles subnormals.
GUMBEL_EXT_INLINE float half_to_float(std::uint16_t h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
  const std::uint32_t rest = static_cast<std::uint32_t>(h & 0x7FFFu) << 13;
  float scaled;
  __builtin_memcpy(&scaled, &rest, sizeof scaled);
  scaled *= 0x1p112f;
  std::uint32_t out;
  __builtin_memcpy(&out, &scaled, sizeof out);
  if ((h & 0x7C00u) == 0x7C00u) out = rest | 0x7F800000u;
  out |= sign;
  __builtin_memcpy(&scaled, &out, sizeof scaled);
  return scaled;
}
// Round to nearest even. Values below the smallest normal half are aligned by adding 1/2, where one
// ulp is 2^-24, the spacing of subnormal halves.
GUMBEL_EXT_INLINE std::uint16_t float_to_half(float f) {
  std::uint32_t u;
  __builtin_memcpy(&u, &f, sizeof u);
  const std::uint16_t sign = static_cast<std::uint16_t>((u >> 16) & 0x8000u);
  u &= 0x7FFFFFFFu;
  if (u > 0x7F800000u) return static_cast<std::uint16_t>(sign | 0x7E00u);
  if (u >= 0x477FF000u) return static_cast<std::uint16_t>(sign | 0x7C00u);
  if (u < 0x38800000u) {
    float aligned;
    __builtin_memcpy(&aligned, &u, sizeof aligned);
    aligned += 0.5f;
    __builtin_memcpy(&u, &aligned, sizeof u);
    return static_cast<std::uint16_t>(sign | (u - 0x3F000000u));
  }
  u += 0xC8000FFFu + ((u >> 13) & 1u);  // exponent bias 127 -> 15, and half an ulp of the result
  return static_cast<std::uint16_t>(sign | (u >> 13));
}

// Round to nearest even; every NaN becomes the quiet one.
GUMBEL_EXT_INLINE std::uint16_t float_to_bfloat16(float f) {
  std::uint32_t u;
  __builtin_memcpy(&u, &f, sizeof u);
  if (f != f) return 0x7FC0u;
  return static_cast<std::uint16_t>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
