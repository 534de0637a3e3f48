// Numbers as gumbel.h wants them: one real number a thread.
//
// Sums and products are spelled as intrinsics because nvcc would contract a * b + c into an fma,
// and the noise would no longer be the CPU's to the bit.
#pragma once

#if !defined(GUMBEL_EXT_ISA)
#define GUMBEL_EXT_ISA cuda_device
#endif

#include "../float16.h"
#include "../gumbel.h"
#include "platform.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

struct DeviceMask {
  bool v;
};
struct DeviceU32 {
  std::uint32_t v;
};
struct DeviceU64 {
  std::uint64_t v;
};
struct DeviceF32 {
  float v;
};
struct DeviceF64 {
  double v;
};

#if defined(__CUDA_ARCH__)
GUMBEL_EXT_INLINE float add(float a, float b) { return __fadd_rn(a, b); }
GUMBEL_EXT_INLINE float multiply(float a, float b) { return __fmul_rn(a, b); }
GUMBEL_EXT_INLINE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
GUMBEL_EXT_INLINE double add(double a, double b) { return __dadd_rn(a, b); }
GUMBEL_EXT_INLINE double multiply(double a, double b) { return __dmul_rn(a, b); }
GUMBEL_EXT_INLINE double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }
GUMBEL_EXT_INLINE std::uint32_t bits_of(float a) { return __float_as_uint(a); }
GUMBEL_EXT_INLINE float real_of(std::uint32_t a) { return __uint_as_float(a); }
GUMBEL_EXT_INLINE std::uint64_t bits_of(double a) {
  return static_cast<std::uint64_t>(__double_as_longlong(a));
}
GUMBEL_EXT_INLINE double real_of(std::uint64_t a) {
  return __longlong_as_double(static_cast<long long>(a));
}
// Hides from the compiler how a value came about, so that it will not compute it again.
GUMBEL_EXT_INLINE void keep_in_register(std::uint32_t& a) { asm volatile("" : "+r"(a)); }
GUMBEL_EXT_INLINE void keep_in_register(int& a) { asm volatile("" : "+r"(a)); }
// The larger, or NaN if either is.
GUMBEL_EXT_INLINE float larger_or_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a != a || a > b ? a : b;
#endif
}
// 2^x, to 2^-22 of the value; 0 below the smallest normal number.
GUMBEL_EXT_INLINE float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x to 2^-23 of the value.
GUMBEL_EXT_INLINE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// log2 x for normal x > 0: to 2^-22 of the value, absolutely for x in (1/2, 2).
GUMBEL_EXT_INLINE float log2_approximate(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
GUMBEL_EXT_INLINE float widen(Half a) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(a.bits));
  return y;
}
GUMBEL_EXT_INLINE void narrow(float a, Half* out) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(a));
}
GUMBEL_EXT_INLINE void narrow(float a, BFloat16* out) {
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->bits) : "f"(a));
#else
  out->bits = float_to_bfloat16(a);
#endif
}
#else
GUMBEL_EXT_INLINE float add(float a, float b) { return a + b; }
GUMBEL_EXT_INLINE float multiply(float a, float b) { return a * b; }
GUMBEL_EXT_INLINE float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
GUMBEL_EXT_INLINE double add(double a, double b) { return a + b; }
GUMBEL_EXT_INLINE double multiply(double a, double b) { return a * b; }
GUMBEL_EXT_INLINE double multiply_add(double a, double b, double c) {
  return __builtin_fma(a, b, c);
}
template <class To, class From>
GUMBEL_EXT_INLINE To same_bits(From a) {
  To out;
  static_assert(sizeof out == sizeof a);
  __builtin_memcpy(&out, &a, sizeof out);
  return out;
}
GUMBEL_EXT_INLINE std::uint32_t bits_of(float a) { return same_bits<std::uint32_t>(a); }
GUMBEL_EXT_INLINE float real_of(std::uint32_t a) { return same_bits<float>(a); }
GUMBEL_EXT_INLINE std::uint64_t bits_of(double a) { return same_bits<std::uint64_t>(a); }
GUMBEL_EXT_INLINE double real_of(std::uint64_t a) { return same_bits<double>(a); }
GUMBEL_EXT_INLINE void keep_in_register(std::uint32_t&) {}
GUMBEL_EXT_INLINE void keep_in_register(int&) {}
GUMBEL_EXT_INLINE float larger_or_nan(float a, float b) { return a != a || a > b ? a : b; }
// The hardware's functions as bad as they may be by their documentation: an error of 2^-22, up or
// down with no pattern.
GUMBEL_EXT_INLINE double documented_error(float x) {
  const std::uint32_t mixed = (bits_of(x) ^ 0x9E3779B9u) * 0x85EBCA6Bu;
  return mixed >> 31 ? 0x1p-22 : -0x1p-22;
}
GUMBEL_EXT_INLINE float power_of_two(float x) {
  const double exact = __builtin_exp2(static_cast<double>(x));
  const float y = static_cast<float>(x == 0 ? 1 : exact * (1 + documented_error(x)));
  return y < 0x1p-126f ? 0.0f : y;
}
GUMBEL_EXT_INLINE float reciprocal(float x) {
  return static_cast<float>((1 + documented_error(x) / 2) / x);
}
GUMBEL_EXT_INLINE float log2_approximate(float x) {
  const double exact = __builtin_log2(static_cast<double>(x));
  if (__builtin_isinf(exact)) return static_cast<float>(exact);
  const double scale = x > 0.5f && x < 2.0f ? 1 : exact;
  return static_cast<float>(exact + scale * documented_error(x));
}
GUMBEL_EXT_INLINE float widen(Half a) { return half_to_float(a.bits); }
GUMBEL_EXT_INLINE void narrow(float a, Half* out) { out->bits = float_to_half(a); }
GUMBEL_EXT_INLINE void narrow(float a, BFloat16* out) { out->bits = float_to_bfloat16(a); }
#endif
GUMBEL_EXT_INLINE double reciprocal(double x) { return 1 / x; }
// What the hardware gives may be off by a unit in the last place, for all that is promised at 1 and
// 2 too, where certainty and even chances must be exact. After a step of Newton's it is not.
GUMBEL_EXT_INLINE float refined_reciprocal(float x) {
  const float y = reciprocal(x);
  return multiply_add(y, multiply_add(-x, y, 1.0f), y);
}
GUMBEL_EXT_INLINE double refined_reciprocal(double x) { return reciprocal(x); }
GUMBEL_EXT_INLINE double larger_or_nan(double a, double b) { return a != a || a > b ? a : b; }
GUMBEL_EXT_INLINE float widen(BFloat16 a) {
  return real_of(static_cast<std::uint32_t>(a.bits) << 16);
}
GUMBEL_EXT_INLINE float widen(float a) { return a; }
GUMBEL_EXT_INLINE double widen(double a) { return a; }
GUMBEL_EXT_INLINE void narrow(float a, float* out) { *out = a; }
GUMBEL_EXT_INLINE void narrow(double a, double* out) { *out = a; }

// a below b in one word, as the type that the third argument points to.
#if __CUDA_ARCH__ >= 800
// One instruction where two conversions and their merging take three.
GUMBEL_EXT_INLINE std::uint32_t narrow_two(float a, float b, const Half*) {
  std::uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(b), "f"(a));
  return word;
}
GUMBEL_EXT_INLINE std::uint32_t narrow_two(float a, float b, const BFloat16*) {
  std::uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(b), "f"(a));
  return word;
}
#else
template <class T>
GUMBEL_EXT_INLINE std::uint32_t narrow_two(float a, float b, const T*) {
  T low, high;
  narrow(a, &low);
  narrow(b, &high);
  return low.bits | static_cast<std::uint32_t>(high.bits) << 16;
}
#endif

GUMBEL_EXT_INLINE DeviceU32 operator+(DeviceU32 a, DeviceU32 b) { return {a.v + b.v}; }
GUMBEL_EXT_INLINE DeviceU32 operator-(DeviceU32 a, DeviceU32 b) { return {a.v - b.v}; }
GUMBEL_EXT_INLINE DeviceU32 operator&(DeviceU32 a, DeviceU32 b) { return {a.v & b.v}; }
GUMBEL_EXT_INLINE DeviceU32 operator|(DeviceU32 a, DeviceU32 b) { return {a.v | b.v}; }
GUMBEL_EXT_INLINE DeviceU32 operator^(DeviceU32 a, DeviceU32 b) { return {a.v ^ b.v}; }
GUMBEL_EXT_INLINE DeviceU64 operator+(DeviceU64 a, DeviceU64 b) { return {a.v + b.v}; }
GUMBEL_EXT_INLINE DeviceU64 operator&(DeviceU64 a, DeviceU64 b) { return {a.v & b.v}; }
GUMBEL_EXT_INLINE DeviceU64 operator|(DeviceU64 a, DeviceU64 b) { return {a.v | b.v}; }
GUMBEL_EXT_INLINE DeviceU64 operator^(DeviceU64 a, DeviceU64 b) { return {a.v ^ b.v}; }
template <int n>
GUMBEL_EXT_INLINE DeviceU32 shift_left(DeviceU32 a, Int<n>) {
  return {a.v << n};
}
template <int n>
GUMBEL_EXT_INLINE DeviceU32 shift_right(DeviceU32 a, Int<n>) {
  return {a.v >> n};
}
template <int n>
GUMBEL_EXT_INLINE DeviceU64 shift_left(DeviceU64 a, Int<n>) {
  return {a.v << n};
}
template <int n>
GUMBEL_EXT_INLINE DeviceU64 shift_right(DeviceU64 a, Int<n>) {
  return {a.v >> n};
}
GUMBEL_EXT_INLINE DeviceU32 spread_top_bit(DeviceU32 a) {
  return {static_cast<std::uint32_t>(static_cast<std::int32_t>(a.v) >> 31)};
}
GUMBEL_EXT_INLINE DeviceMask as_mask(DeviceU32 a) { return {a.v != 0}; }
GUMBEL_EXT_INLINE DeviceMask top_bit(DeviceU32 a) { return {static_cast<std::int32_t>(a.v) < 0}; }
GUMBEL_EXT_INLINE DeviceF32 to_real(DeviceU32 a) {
  return {static_cast<float>(static_cast<std::int32_t>(a.v))};
}

GUMBEL_EXT_INLINE DeviceU32 bits(DeviceF32 a) { return {bits_of(a.v)}; }
GUMBEL_EXT_INLINE DeviceU64 bits(DeviceF64 a) { return {bits_of(a.v)}; }
GUMBEL_EXT_INLINE DeviceF32 real(DeviceU32 a) { return {real_of(a.v)}; }
GUMBEL_EXT_INLINE DeviceF64 real(DeviceU64 a) { return {real_of(a.v)}; }

#define GUMBEL_EXT_DEVICE_REAL(F)                                                  \
  GUMBEL_EXT_INLINE F operator+(F a, F b) { return {add(a.v, b.v)}; }              \
  GUMBEL_EXT_INLINE F operator-(F a, F b) { return {add(a.v, -b.v)}; }             \
  GUMBEL_EXT_INLINE F operator*(F a, F b) { return {multiply(a.v, b.v)}; }         \
  GUMBEL_EXT_INLINE F fma(F a, F b, F c) { return {multiply_add(a.v, b.v, c.v)}; } \
  GUMBEL_EXT_INLINE DeviceMask less(F a, F b) { return {a.v < b.v}; }              \
  GUMBEL_EXT_INLINE F select(DeviceMask m, F a, F b) { return m.v ? a : b; }       \
  GUMBEL_EXT_INLINE F zero_unless(DeviceMask m, F a) { return m.v ? a : F{0}; }
GUMBEL_EXT_DEVICE_REAL(DeviceF32)
GUMBEL_EXT_DEVICE_REAL(DeviceF64)
#undef GUMBEL_EXT_DEVICE_REAL

template <>
struct RealTraits<DeviceF32> {
  using Scalar = float;
  using Bits = DeviceU32;
  static GUMBEL_EXT_INLINE DeviceF32 splat(float c) { return {c}; }
  static GUMBEL_EXT_INLINE DeviceU32 splat_bits(std::uint32_t c) { return {c}; }
};
template <>
struct RealTraits<DeviceF64> {
  using Scalar = double;
  using Bits = DeviceU64;
  static GUMBEL_EXT_INLINE DeviceF64 splat(double c) { return {c}; }
  static GUMBEL_EXT_INLINE DeviceU64 splat_bits(std::uint64_t c) { return {c}; }
};

GUMBEL_EXT_INLINE double power_of_two(double x) { return exp2_nonpositive(DeviceF64{x}).v; }
GUMBEL_EXT_INLINE float natural_log(float x) { return log_positive(DeviceF32{x}).v; }
GUMBEL_EXT_INLINE double natural_log(double x) { return log_positive(DeviceF64{x}).v; }

template <class Scalar>
GUMBEL_EXT_INLINE Scalar infinity();
template <>
GUMBEL_EXT_INLINE float infinity<float>() {
  return real_of(std::uint32_t{0x7F800000});
}
template <>
GUMBEL_EXT_INLINE double infinity<double>() {
  return real_of(std::uint64_t{0x7FF0000000000000});
}
template <class Scalar>
GUMBEL_EXT_INLINE Scalar quiet_nan();
// The NaN that CUDA's arithmetic makes, so that the emulation meets it too.
template <>
GUMBEL_EXT_INLINE float quiet_nan<float>() {
  return real_of(std::uint32_t{0x7FFFFFFF});
}
template <>
GUMBEL_EXT_INLINE double quiet_nan<double>() {
  return real_of(std::uint64_t{0x7FF8000000000000});
}

// The accumulate type of a stored type, and how many elements a thread loads at once: 16
// bytes, and never fewer than the four that share a Philox block.
template <class T>
struct Element {
  using Scalar = float;
  static constexpr int kGroup = 16 / sizeof(T);
};
template <>
struct Element<double> {
  using Scalar = double;
  static constexpr int kGroup = 4;
};

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
