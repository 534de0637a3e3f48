// Kernels for AVX2 + FMA + F16C. Nothing outside this file may be compiled with these instructions:
// the standard headers come before the pragma, and everything after it lives in a namespace of its
// own.
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#define GUMBEL_EXT_ISA avx2
#define GUMBEL_EXT_USE_AVX2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace gumbel_ext {
namespace cpu {
const KernelTable kAvx2Kernels = avx2::kernel_table("avx2");
}  // namespace cpu
}  // namespace gumbel_ext

#endif
