// Chooses the instruction set at run time.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace gumbel_ext {
namespace cpu {

int available_kernels(const KernelTable* (&tables)[kMaxCapabilities]) {
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    tables[count++] = &kAvx512Kernels;
  }
  if (avx2) tables[count++] = &kAvx2Kernels;
#endif
  tables[count++] = &kBaselineKernels;
  return count;
}

namespace {

const KernelTable& choose() {
  const KernelTable* tables[kMaxCapabilities];
  const int count = available_kernels(tables);
  const char* wanted = std::getenv("GUMBEL_EXT_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return *tables[0];
  std::string names;
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(wanted, tables[i]->capability) == 0) return *tables[i];
    names += std::string(i ? ", " : "") + tables[i]->capability;
  }
  throw std::invalid_argument("GUMBEL_EXT_CPU_CAPABILITY must be one of " + names +
                              " on this machine, got '" + wanted + "'");
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& table = choose();
  return table;
}

}  // namespace cpu
}  // namespace gumbel_ext
