// The emulation's own tests: small kernels, each with one bug that it must report, and beside it
// the same without. Compiled with -fsanitize=thread, whose hooks the race detector is.
#include <cstdio>
#include <string>
#include <vector>

#include "emulation.h"

namespace {

using namespace gumbel_ext;
using emulation::Order;

constexpr unsigned kAll = 0xFFFFFFFFu;
int failed = 0;

// What a launch of one block of 64 threads, or a cluster of such, throws in the given order.
template <class Kernel>
std::string outcome(Kernel kernel, Order order, int blocks, int cluster, int threads) {
  emulation::options().order = order;
  try {
    emulation::launch(dim3(static_cast<unsigned>(blocks)), threads, cluster, kernel);
  } catch (const emulation::Error& error) {
    return error.what();
  }
  return "";
}

// `says` must be part of the report; an empty one stands for no report.
template <class Kernel>
void expect(const char* name, const std::string& says, Kernel kernel, int blocks = 1,
            int cluster = 1, int threads = 64) {
  for (const Order order : {Order::kInOrder, Order::kReverse, Order::kRandom, Order::kGreedy}) {
    const std::string got = outcome(kernel, order, blocks, cluster, threads);
    const bool right = says.empty() ? got.empty() : got.find(says) != std::string::npos;
    if (right) continue;
    ++failed;
    std::printf("FAILED %s, order %d: wanted \"%s\", got \"%s\"\n", name, static_cast<int>(order),
                says.c_str(), got.c_str());
  }
}

}  // namespace

int main() {
  std::vector<int> memory(1024);
  int* const out = memory.data();

  expect("neighbours' shared values, with a barrier", "", [=] {
    GUMBEL_EXT_SHARED(int, shared, 64);
    shared[threadIdx.x] = static_cast<int>(threadIdx.x);
    __syncthreads();
    out[threadIdx.x] = shared[63 - threadIdx.x];
  });
  expect("the same without", "race", [=] {
    GUMBEL_EXT_SHARED(int, shared, 64);
    shared[threadIdx.x] = static_cast<int>(threadIdx.x);
    out[threadIdx.x] = shared[63 - threadIdx.x];
  });
  expect("shared memory written again while others may still read it", "race", [=] {
    GUMBEL_EXT_SHARED(int, shared, 1);
    for (int i = 0; i < 2; ++i) {
      if (threadIdx.x == 0) shared[0] = i;
      __syncthreads();
      out[threadIdx.x] = shared[0];
    }
  });
  expect("with a barrier in between", "", [=] {
    GUMBEL_EXT_SHARED(int, shared, 1);
    for (int i = 0; i < 2; ++i) {
      if (threadIdx.x == 0) shared[0] = i;
      __syncthreads();
      out[threadIdx.x] = shared[0];
      __syncthreads();
    }
  });
  expect("a shuffle orders no memory", "race", [=] {
    GUMBEL_EXT_SHARED(int, shared, 64);
    shared[threadIdx.x] = 1;
    __shfl_xor_sync(kAll, 0, 1);
    out[threadIdx.x] = shared[threadIdx.x ^ 1];
  });
  expect("two blocks write one place", "race", [=] { out[threadIdx.x] = 1; }, 2);
  expect("one place each", "", [=] { out[64 * blockIdx.x + threadIdx.x] = 1; }, 2);
  expect(
      "one block writes what another reads", "race",
      [=] { out[64 * blockIdx.x + threadIdx.x] = out[threadIdx.x] + 1; }, 2);

  expect("a barrier that half the block reaches", "deadlock", [] {
    if (threadIdx.x < 32) __syncthreads();
  });
  expect("two barriers for one", "divergent barrier", [] {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  });
  expect("a shuffle that half the warp reaches", "which has ended", [] {
    if (threadIdx.x % 2 == 0) __shfl_xor_sync(kAll, 0, 2);
  });
  expect("lanes in different operations", "divergent warp operations", [] {
    if (threadIdx.x % 2 == 0) {
      __shfl_xor_sync(kAll, 0, 2);
    } else {
      __any_sync(kAll, true);
    }
  });
  expect("a caller outside its own mask", "not in the mask",
         [] { __shfl_xor_sync(0x0000FFFFu, 0, 1); });
  expect(
      "a mask that names lanes a small block has not", "does not exist",
      [] { __shfl_xor_sync(kAll, 0, 1); }, 1, 1, 16);
  expect("a source lane outside the mask", "takes no part", [] {
    if (threadIdx.x % 32 < 16) __shfl_xor_sync(0x0000FFFFu, 0, 16);
  });
  expect("what warp operations return", "", [=] {
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (__shfl_xor_sync(kAll, static_cast<unsigned>(lane), 5) != static_cast<unsigned>(lane ^ 5) ||
        __any_sync(kAll, lane == 7) != true || __any_sync(kAll, false) != false ||
        warp_min(lane - 9) != -9 || warp_max(lane - 9) != 22) {
      throw emulation::Error("a warp operation returned something else");
    }
  });

  expect(
      "a cluster's exchange", "",
      [=] {
        GUMBEL_EXT_SHARED(int, shared, 1);
        if (threadIdx.x == 0) shared[0] = static_cast<int>(cluster_rank());
        cluster_barrier();
        out[64 * blockIdx.x + threadIdx.x] =
            read_cluster_shared(shared, (cluster_rank() + 1) % cluster_blocks());
        cluster_barrier();
      },
      4, 2);
  const auto no_first_barrier = [=] {
    GUMBEL_EXT_SHARED(int, shared, 1);
    if (threadIdx.x == 0) shared[0] = static_cast<int>(cluster_rank());
    __syncthreads();
    out[64 * blockIdx.x + threadIdx.x] =
        read_cluster_shared(shared, (cluster_rank() + 1) % cluster_blocks());
    cluster_barrier();
  };
  const auto no_last_barrier = [=] {
    GUMBEL_EXT_SHARED(int, shared, 1);
    if (threadIdx.x == 0) shared[0] = static_cast<int>(cluster_rank());
    cluster_barrier();
    out[64 * blockIdx.x + threadIdx.x] =
        read_cluster_shared(shared, (cluster_rank() + 1) % cluster_blocks());
  };
  // What is reported depends on who comes first; that something is, does not.
  for (const Order order : {Order::kInOrder, Order::kReverse, Order::kRandom, Order::kGreedy}) {
    if (outcome(no_first_barrier, order, 4, 2, 64).empty()) {
      ++failed;
      std::printf("FAILED a cluster's exchange without its first barrier\n");
    }
  }
  if (outcome(no_last_barrier, Order::kGreedy, 4, 2, 64).empty()) {
    ++failed;
    std::printf("FAILED a cluster's exchange without its last barrier\n");
  }
  expect("shared memory begins as NaN", "", [=] {
    GUMBEL_EXT_SHARED(float, shared, 1);
    if (shared[0] == shared[0]) throw emulation::Error("it is a number");
  });

  std::printf(failed == 0 ? "all reported\n" : "%d failed\n", failed);
  return failed == 0 ? 0 : 1;
}
