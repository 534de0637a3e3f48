// What the emulated device is: its number of multiprocessors and its compute capability decide
// which regimes of csrc/cuda/plan.cpp run.
#pragma once

#include <cstdlib>

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };

#define C10_CUDA_CHECK(call) call

namespace gumbel_ext {
namespace emulation {
inline int from_environment(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::atoi(value);
}
}  // namespace emulation
}  // namespace gumbel_ext

inline void cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  using gumbel_ext::emulation::from_environment;
  *value = attribute == cudaDevAttrMultiProcessorCount
               ? from_environment("GUMBEL_EXT_EMULATED_MULTIPROCESSORS", 132)
               : from_environment("GUMBEL_EXT_EMULATED_CAPABILITY", 9);
}
