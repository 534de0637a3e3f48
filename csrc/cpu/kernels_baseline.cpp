// Kernels for whatever the compiler targets by default: SSE2 on x86-64, NEON on AArch64.
#define GUMBEL_EXT_ISA baseline
#include "kernels.inc"

namespace gumbel_ext {
namespace cpu {
const KernelTable kBaselineKernels = {
#if defined(__aarch64__)
    "neon",
#else
    "generic",
#endif
    baseline::run,   baseline::split_step,      baseline::split_settle,
    baseline::noise, baseline::noise_from_words};
}  // namespace cpu
}  // namespace gumbel_ext
