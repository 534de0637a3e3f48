// CUDA's own vocabulary; or the emulation's (tests/cuda), under which g++ compiles the same kernels
// to run on a CPU.
#pragma once

#if defined(GUMBEL_EXT_EMULATE_CUDA)

#include "emulation.h"

#else

#include <cuda_runtime.h>

#include <cstdint>

#define GUMBEL_EXT_DEVICE __device__ __forceinline__
// A kernel of blocks of that many threads, whose registers must let so many threads share a
// multiprocessor.
#define GUMBEL_EXT_KERNEL(threads, resident) \
  __global__ void __launch_bounds__(threads, \
                                    (resident) / (threads) > 0 ? (resident) / (threads) : 1)
#define GUMBEL_EXT_CONSTANT __grid_constant__
#define GUMBEL_EXT_SHARED(Type, name, count) __shared__ Type name[count]

// The least and the largest integer of a whole warp: kWarpReduces says where there is an
// instruction for it (compute capability 8.0). Below, the blocks of one cluster (compute
// capability 9.0): how many, which one this is, a barrier among them, and a look into another
// block's shared memory. Only kernels that are launched as clusters call these; elsewhere they are
// never reached.
namespace gumbel_ext {
#if __CUDA_ARCH__ >= 800
constexpr bool kWarpReduces = true;
__device__ __forceinline__ int warp_min(int v) { return __reduce_min_sync(0xFFFFFFFFu, v); }
__device__ __forceinline__ int warp_max(int v) { return __reduce_max_sync(0xFFFFFFFFu, v); }
#else
constexpr bool kWarpReduces = false;
__device__ __forceinline__ int warp_min(int v) { return v; }
__device__ __forceinline__ int warp_max(int v) { return v; }
#endif

__device__ __forceinline__ unsigned cluster_blocks() {
  unsigned n = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
#endif
  return n;
}
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#endif
}
template <class V>
__device__ __forceinline__ V read_cluster_shared(const V* own, unsigned rank) {
  static_assert(sizeof(V) % 4 == 0);
  union Words {
    V value;
    unsigned word[sizeof(V) / 4];
    __device__ __forceinline__ Words() {}
  } out;
#if __CUDA_ARCH__ >= 900
  unsigned theirs;
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(own));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(address), "r"(rank));
#pragma unroll
  for (unsigned i = 0; i < sizeof(V) / 4; ++i) {
    asm volatile("ld.shared::cluster.u32 %0, [%1];"
                 : "=r"(out.word[i])
                 : "r"(theirs + 4 * i)
                 : "memory");
  }
#else
  out.value = *own;
#endif
  return out.value;
}
}  // namespace gumbel_ext

// Loads and stores of 16 or 8 bytes at once, in assembler because the compiler takes vectors apart
// where it finds element-wise accesses on another branch to merge with, and then does not always
// put them together again.
namespace gumbel_ext {
__device__ __forceinline__ uint4 load_vector(const uint4* address) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ uint2 load_vector(const uint2* address) {
  uint2 v;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address) : "memory");
  return v;
}
__device__ __forceinline__ void store_vector(uint2* address, uint2 v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(v.x), "r"(v.y) : "memory");
}
__device__ __forceinline__ void store_vector(uint4* address, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}
// A load of what no running kernel writes.
__device__ __forceinline__ std::int64_t load_read_only(const std::int64_t* address) {
  return __ldg(reinterpret_cast<const long long*>(address));
}
}  // namespace gumbel_ext

#define GUMBEL_EXT_LAUNCH(kernel, grid, threads, stream, ...) \
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define GUMBEL_EXT_LAUNCH_CLUSTER(kernel, grid, threads, cluster, stream, ...) \
  ::gumbel_ext::launch_cluster(kernel, grid, threads, cluster, stream, __VA_ARGS__)

namespace gumbel_ext {

template <class Argument>
void launch_cluster(void (*kernel)(Argument), int grid, int threads, int cluster, void* stream,
                    const Argument& argument) {
  // More than 8 blocks a cluster is more than every device of compute capability 9.0 must offer.
  if (cluster > 8) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, argument);
}

// The error of the last launch, or null.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace gumbel_ext

#endif
