// The generator of the emulated device: the CPU's, drawn from as the CPU's operators do.
#pragma once

#include <ATen/CPUGeneratorImpl.h>

namespace at {

struct PhiloxCudaState {
  struct {
    std::uint64_t val;
    std::int64_t* ptr;
  } seed_, offset_;
  std::uint32_t offset_intragraph_;
  bool captured_;
};

// Adds no members: every generator of the CPU can be taken for one.
struct CUDAGeneratorImpl : CPUGeneratorImpl {
  PhiloxCudaState philox_cuda_state(std::uint64_t /*words*/) {
    return {{random64(), nullptr}, {0, nullptr}, 0, false};
  }
};
static_assert(sizeof(CUDAGeneratorImpl) == sizeof(CPUGeneratorImpl));

namespace cuda {
namespace detail {
inline const Generator& getDefaultCUDAGenerator() { return at::detail::getDefaultCPUGenerator(); }
}  // namespace detail
}  // namespace cuda
}  // namespace at
