// Kernels for AVX-512 F + BW + DQ + VL. Nothing outside this file may be compiled with these
// instructions: the standard headers come before the pragma, and everything after it lives in a
// namespace of its own.
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

#define GUMBEL_EXT_ISA avx512
#define GUMBEL_EXT_USE_AVX512
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
// GCC 12 warns about the undefined operands of its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace gumbel_ext {
namespace cpu {
const KernelTable kAvx512Kernels = avx512::kernel_table("avx512");
}  // namespace cpu
}  // namespace gumbel_ext

#endif
