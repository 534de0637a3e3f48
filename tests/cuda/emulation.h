// Enough of CUDA for the kernels of csrc/cuda to compile with g++ and run on a CPU, checked.
//
// Every CUDA thread is a fiber. The fibers of a block, or of a cluster of blocks, take turns on one
// operating system thread; blocks that are not of one cluster run one after the other. A thread
// gives up its turn at barriers and warp operations only, in an order that Options choose. What it
// catches:
//
//   - threads that wait at different barriers, or at one that others will never reach;
//   - warp operations with a mask that leaves out a caller, or names a lane that is gone or
//   elsewhere;
//   - reads of shared memory that was never written: it starts as NaN;
//   - overruns of shared memory (a heap block for each array) and of global memory, under ASan or,
//   for
//     memory beside what forbid() was told of, by the hooks that find races;
//   - misaligned vector accesses;
//   - races, where the kernels are compiled with -fsanitize=thread (and libtsan is not linked: the
//     hooks are emulation.cpp's): two threads touch a byte, one of them writes, no barrier between.
//
// What it does not model: nvcc's own code, the accuracy of fast intrinsics, weak memory, spin-waits
// between blocks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace gumbel_ext {
namespace emulation {

enum class Order {
  kInOrder,
  kReverse,
  kRandom,
  // Random priorities; the highest runs as far as it can. Finds a buffer that is written again
  // before all have read it.
  kGreedy,
};

struct Options {
  Order order = Order::kInOrder;
  std::uint64_t seed = 1;
};
Options& options();

// Memory beside an allocation, that no kernel may touch; and no longer. Seen where the kernels are
// compiled with -fsanitize=thread.
void forbid(const void* address, std::size_t bytes);
void allow(const void* address);
// The number of the bug that planted_bugs.py wants switched on, from GUMBEL_EXT_PLANTED; -1: none.
extern const int planted;

// What a launch throws: the bug, and where.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Coordinates {
  uint3 thread, block;
  dim3 block_size, grid_size;
};
extern Coordinates coordinates;

// Where in the source a thread waits.
struct Site {
  const char* file;
  int line;
};

enum class WarpOp { kShuffleXor, kAny, kMin, kMax };

void expect_aligned(const void* address, std::size_t bytes);
void launch(dim3 grid, int threads, int cluster, const std::function<void()>& kernel);
void block_barrier(Site site);
void cluster_barrier(Site site);
// The value that lane source_lane gave; for kAny, whether any lane gave one that is not 0; for kMin
// and kMax, the extreme of all as signed numbers.
unsigned warp_operation(WarpOp op, unsigned mask, unsigned value, int source_lane, Site site);
// This block's copy of the shared array that is declared at `declaration`.
void* shared_array(const void* declaration, std::size_t bytes);
// The same place in the copy of another block of the cluster.
const void* shared_array_of(const void* own, unsigned block_rank);
unsigned cluster_blocks();
unsigned cluster_rank();
int lane();

}  // namespace emulation

inline unsigned cluster_blocks() { return emulation::cluster_blocks(); }
inline unsigned cluster_rank() { return emulation::cluster_rank(); }
inline void cluster_barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::cluster_barrier({file, line});
}
template <class V>
V read_cluster_shared(const V* own, unsigned rank) {
  return *static_cast<const V*>(emulation::shared_array_of(own, rank));
}
template <class Vector>
Vector load_vector(const Vector* address) {
  emulation::expect_aligned(address, sizeof(Vector));
  return *address;
}
template <class Vector>
void store_vector(Vector* address, Vector v) {
  emulation::expect_aligned(address, sizeof(Vector));
  *address = v;
}
inline std::int64_t load_read_only(const std::int64_t* address) { return *address; }
inline const char* launch_error() { return nullptr; }
constexpr bool kWarpReduces = true;
inline int warp_min(int v, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  using namespace emulation;
  return static_cast<int>(
      warp_operation(WarpOp::kMin, 0xFFFFFFFFu, static_cast<unsigned>(v), 0, {file, line}));
}
inline int warp_max(int v, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  using namespace emulation;
  return static_cast<int>(
      warp_operation(WarpOp::kMax, 0xFFFFFFFFu, static_cast<unsigned>(v), 0, {file, line}));
}

}  // namespace gumbel_ext

#define threadIdx (::gumbel_ext::emulation::coordinates.thread)
#define blockIdx (::gumbel_ext::emulation::coordinates.block)
#define blockDim (::gumbel_ext::emulation::coordinates.block_size)
#define gridDim (::gumbel_ext::emulation::coordinates.grid_size)

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  gumbel_ext::emulation::block_barrier({file, line});
}
inline unsigned __shfl_xor_sync(unsigned mask, unsigned value, int distance,
                                const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  using namespace gumbel_ext::emulation;
  return warp_operation(WarpOp::kShuffleXor, mask, value, lane() ^ distance, {file, line});
}
inline bool __any_sync(unsigned mask, bool flag, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  using namespace gumbel_ext::emulation;
  return warp_operation(WarpOp::kAny, mask, flag, 0, {file, line}) != 0;
}
#define GUMBEL_EXT_DEVICE inline __attribute__((always_inline))
#define GUMBEL_EXT_KERNEL(threads, resident) void
#define GUMBEL_EXT_CONSTANT
#define GUMBEL_EXT_SHARED(Type, name, count) \
  static const char name##_declaration = 0;  \
  Type* const name = static_cast<Type*>(     \
      ::gumbel_ext::emulation::shared_array(&name##_declaration, sizeof(Type) * (count)))

#define GUMBEL_EXT_LAUNCH(kernel, grid, threads, stream, ...) \
  GUMBEL_EXT_LAUNCH_CLUSTER(kernel, grid, threads, 1, stream, __VA_ARGS__)
#define GUMBEL_EXT_LAUNCH_CLUSTER(kernel, grid, threads, cluster, stream, ...)               \
  (static_cast<void>(stream),                                                                \
   ::gumbel_ext::emulation::launch(::gumbel_ext::emulation::as_grid(grid), threads, cluster, \
                                   [&] { (kernel)(__VA_ARGS__); }))

namespace gumbel_ext {
namespace emulation {
inline dim3 as_grid(int blocks) { return dim3(static_cast<unsigned>(blocks)); }
inline dim3 as_grid(dim3 grid) { return grid; }
}  // namespace emulation
}  // namespace gumbel_ext
