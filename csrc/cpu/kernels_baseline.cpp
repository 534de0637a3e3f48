// Kernels for whatever the compiler targets by default: SSE2 on x86-64, NEON on AArch64.
#define GUMBEL_EXT_ISA baseline
#include "kernels.inc"

namespace gumbel_ext {
namespace cpu {
#if defined(__aarch64__)
const KernelTable kBaselineKernels = baseline::kernel_table("neon");
#else
const KernelTable kBaselineKernels = baseline::kernel_table("generic");
#endif
}  // namespace cpu
}  // namespace gumbel_ext
