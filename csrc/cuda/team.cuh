// The threads that share a row, and how they agree: reductions whose order does not depend on
// timing, so that every run gives the same bits.
#pragma once

#include "device_math.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

constexpr unsigned kWholeWarp = 0xFFFFFFFFu;
constexpr int kNoIndex = 0x7FFFFFFF;

struct Larger {
  template <class V>
  GUMBEL_EXT_DEVICE V operator()(V a, V b) const {
    return b > a ? b : a;
  }
};
struct Smaller {
  template <class V>
  GUMBEL_EXT_DEVICE V operator()(V a, V b) const {
    return b < a ? b : a;
  }
};
struct Sum {
  template <class V>
  GUMBEL_EXT_DEVICE V operator()(V a, V b) const {
    return a + b;
  }
};

// The best class so far. A NaN beats every number, and among equals the lower index wins.
template <class Scalar>
struct Best {
  Scalar value;
  int index;

  GUMBEL_EXT_DEVICE static Best none() { return {-infinity<Scalar>(), kNoIndex}; }
  GUMBEL_EXT_DEVICE bool is_nan() const { return value != value; }
};
struct BetterOf {
  template <class Scalar>
  GUMBEL_EXT_DEVICE Best<Scalar> operator()(const Best<Scalar>& a, const Best<Scalar>& b) const {
    const bool level = a.value == b.value || (a.is_nan() && b.is_nan());
    const bool b_wins = level ? b.index < a.index : b.is_nan() || b.value > a.value;
    return b_wins ? b : a;
  }
};

// Largest noisy logit so far, where, and the sum of 2^((z - largest) * scale) so far.
template <class Scalar>
struct RunningSum {
  Best<Scalar> best;
  Scalar sum;
};
template <class Scalar>
struct MergeSums {
  Scalar scale;

  GUMBEL_EXT_DEVICE Scalar rescaled(const RunningSum<Scalar>& part, Scalar largest) const {
    // An empty part has sum 0 and largest -inf, whose difference from -inf would be NaN.
    return part.best.value == largest
               ? part.sum
               : part.sum * power_of_two((part.best.value - largest) * scale);
  }
  GUMBEL_EXT_DEVICE RunningSum<Scalar> operator()(const RunningSum<Scalar>& a,
                                                  const RunningSum<Scalar>& b) const {
    const Best<Scalar> best = BetterOf()(a.best, b.best);
    return {best, rescaled(a, best.value) + rescaled(b, best.value)};
  }
};

template <class V>
GUMBEL_EXT_DEVICE V shuffle_xor(V v, int distance) {
  static_assert(sizeof(V) % 4 == 0);
  union Words {
    V value;
    unsigned word[sizeof(V) / 4];
    GUMBEL_EXT_DEVICE Words() {}
  } in, out;
  in.value = v;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(V) / 4); ++i) {
    out.word[i] = __shfl_xor_sync(kWholeWarp, in.word[i], distance);
  }
  return out.value;
}

// All operations here commute to the bit, so that all lanes arrive at the same one.
template <class V, class Op>
GUMBEL_EXT_DEVICE V reduce_lanes(V v, int lanes, Op op) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    if (distance < lanes) v = op(v, shuffle_xor(v, distance));
  }
  return v;
}
// Whole warps have an instruction for whole numbers; of which the bits of a float that is not NaN
// become one, in the same order.
GUMBEL_EXT_DEVICE int reduce_lanes(int v, int lanes, Smaller) {
  if (lanes == 32 && kWarpReduces) return warp_min(v);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    if (distance < lanes) v = Smaller()(v, shuffle_xor(v, distance));
  }
  return v;
}
GUMBEL_EXT_DEVICE float reduce_lanes(float v, int lanes, Larger) {
  if (lanes == 32 && kWarpReduces) {
    const auto ordered = [](std::int32_t b) { return b ^ ((b >> 31) & 0x7FFFFFFF); };
    const std::int32_t largest = warp_max(ordered(static_cast<std::int32_t>(bits_of(v))));
    return real_of(static_cast<std::uint32_t>(ordered(largest)));
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    if (distance < lanes) v = Larger()(v, shuffle_xor(v, distance));
  }
  return v;
}

// 1, 2, 4, ... 32 lanes of a warp; a block has kBlockThreads / kLanes such teams. All lanes of a
// warp must call reduce() together.
template <int kLanes>
struct LaneTeam {
  static constexpr int kBlockThreads = 128;
  static constexpr int kRowsPerBlock = kBlockThreads / kLanes;

  GUMBEL_EXT_DEVICE int rank() const { return threadIdx.x % kLanes; }
  GUMBEL_EXT_DEVICE int threads() const { return kLanes; }
  GUMBEL_EXT_DEVICE int row_in_block() const { return threadIdx.x / kLanes; }
  GUMBEL_EXT_DEVICE std::int64_t first_row() const {
    return static_cast<std::int64_t>(blockIdx.x) * kRowsPerBlock;
  }
  GUMBEL_EXT_DEVICE std::int64_t row_step() const {
    return static_cast<std::int64_t>(gridDim.x) * kRowsPerBlock;
  }
  template <class V, class Op>
  GUMBEL_EXT_DEVICE V reduce(V v, Op op) {
    return reduce_lanes(v, kLanes, op);
  }
  // Whether any team that has to take the same branch says so.
  GUMBEL_EXT_DEVICE bool any(bool flag) { return __any_sync(kWholeWarp, flag); }
};

// A block a row.
template <int kBlock>
struct BlockTeam {
  static constexpr int kBlockThreads = kBlock;
  static constexpr int kRowsPerBlock = 1;
  static constexpr int kWarps = kBlock / 32;

  GUMBEL_EXT_DEVICE int rank() const { return threadIdx.x; }
  GUMBEL_EXT_DEVICE int threads() const { return kBlock; }
  GUMBEL_EXT_DEVICE int row_in_block() const { return 0; }
  GUMBEL_EXT_DEVICE std::int64_t first_row() const { return blockIdx.x; }
  GUMBEL_EXT_DEVICE std::int64_t row_step() const { return gridDim.x; }
  template <class V, class Op>
  GUMBEL_EXT_DEVICE V reduce(V v, Op op) {
    GUMBEL_EXT_SHARED(V, of_warp, kWarps);
    v = reduce_lanes(v, 32, op);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v;
    __syncthreads();
    v = of_warp[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) v = op(v, of_warp[w]);
    // of_warp is written again by the next reduction.
    __syncthreads();
    return v;
  }
  GUMBEL_EXT_DEVICE bool any(bool flag) { return flag; }
};

// A cluster of blocks a row: each block reduces, then reads what the others found in their shared
// memory.
template <int kBlock>
struct ClusterTeam {
  static constexpr int kBlockThreads = kBlock;
  static constexpr int kRowsPerBlock = 1;

  GUMBEL_EXT_DEVICE int rank() const {
    return static_cast<int>(cluster_rank()) * kBlock + static_cast<int>(threadIdx.x);
  }
  GUMBEL_EXT_DEVICE int threads() const { return static_cast<int>(cluster_blocks()) * kBlock; }
  GUMBEL_EXT_DEVICE int row_in_block() const { return 0; }
  GUMBEL_EXT_DEVICE std::int64_t first_row() const { return blockIdx.x / cluster_blocks(); }
  GUMBEL_EXT_DEVICE std::int64_t row_step() const { return gridDim.x / cluster_blocks(); }
  template <class V, class Op>
  GUMBEL_EXT_DEVICE V reduce(V v, Op op) {
    GUMBEL_EXT_SHARED(V, of_block, 1);
    v = BlockTeam<kBlock>().reduce(v, op);
    if (threadIdx.x == 0) of_block[0] = v;
    cluster_barrier();
    v = read_cluster_shared(of_block, 0);
    for (unsigned b = 1; b < cluster_blocks(); ++b) v = op(v, read_cluster_shared(of_block, b));
    // No block may overwrite its part, or exit, while another still reads it.
    cluster_barrier();
    return v;
  }
  GUMBEL_EXT_DEVICE bool any(bool flag) { return flag; }
};

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
