// What a CUDA kernel is told: pointers, sizes and strides; no tensors, and nothing of CUDA's
// either.
#pragma once

#include <cstdint>
#include <limits>

namespace gumbel_ext {
namespace cuda {

enum class ElementType { kFloat64, kFloat32, kBFloat16, kFloat16 };

// Where seed and offset come from. While a CUDA graph is captured they are addresses, which the
// kernel reads each time that the graph is replayed; so does an rng_state that lies on the device.
struct RandomSource {
  bool in_memory;
  bool offset_in_words;  // as CUDA generators count; the noise contract counts blocks of four words
  std::uint64_t seed, offset;
  const std::int64_t* seed_address;
  const std::int64_t* offset_address;
  std::uint64_t offset_more;  // to add to what lies at offset_address
};

constexpr int kMaxDims = 64;

// Noise positions of the elements of a tensor, or of class 0 of its rows: of the element with
// indices i, first + sum(i[d] * stride[d]), modulo 2^64.
struct PositionGrid {
  std::uint64_t first;
  int dims;
  std::int64_t size[kMaxDims], stride[kMaxDims];
  const std::int64_t* table;  // optional: the positions themselves, and nothing of the above
};

// The position_class_stride of a forward whose logits are taken as they are.
constexpr std::int64_t kNoNoise = std::numeric_limits<std::int64_t>::min();

// Logits of logical shape [outer, classes, inner]. Rows are numbered over (outer, inner),
// row-major. Logits, y and their gradients lie in memory alike; noise positions say nothing about
// that.
struct Params {
  const void* logits;
  const std::uint8_t* mask;  // optional
  const void* tau;           // [rows] of the accumulate type, optional
  const void* grad;          // of y
  void* y;                   // written by a forward, read by a backward from y
  void* grad_logits;
  void* grad_tau;  // [rows] of the accumulate type, optional
  // [rows], [rows, k] of gumbel_topk: written by a forward if not null, read by a backward.
  std::int64_t* index;
  std::int64_t k;  // classes that gumbel_topk chooses of a row
  std::int64_t*
      used_state;  // [2], optional: where a forward leaves (seed, offset) for the backward
  void* partials;  // [rows, chunks] of what split rows' chunks found, see partial_bytes()
  std::int64_t chunks, chunk_classes;  // of a row, kStream and kSplit

  std::int64_t outer, classes, inner;
  std::int64_t outer_stride, class_stride, inner_stride;
  std::int64_t mask_outer_stride, mask_class_stride, mask_inner_stride;
  // The noise position of class c of row (o, i) is first_position + o * position_outer_stride
  // + c * position_class_stride + i * position_inner_stride, modulo 2^64. Where two strides cannot
  // describe the rows, row_positions has that of class 0 of each.
  std::uint64_t first_position;
  std::int64_t position_outer_stride, position_class_stride, position_inner_stride;
  const std::int64_t* row_positions;  // [rows], optional
  // log2(e) / tau and 1 / tau, clamped to the normal numbers of the accumulate type; unless tau is
  // set. Rounded here, so that no kernel but those of float64 touches a double.
  double exponent_scale, inverse_tau;
  float exponent_scale_float32, inverse_tau_float32;
  RandomSource random;
};

enum class Op { kSoft, kLogSoft, kHard, kIndexOnly, kBackward, kBackwardRecompute };

// How one call is cut; plan.cpp has the rules.
enum class Regime {
  kRows,      // a team of threads a row, which stays in registers: part of a warp up to a block
  kClusters,  // likewise a cluster of blocks, that exchange through distributed shared memory
  kStream,    // a block a row, which is read twice and its noise made twice
  kSplit,     // a row shared among blocks that meet in a second kernel
  kColumns,   // threads across neighbouring rows: the classes are not adjacent in memory
};

struct Plan {
  Regime regime;
  int team;                    // threads a row
  int groups;                  // groups of 16 bytes of logits (32 of float64) that a thread holds
  int cluster;                 // blocks a row, kClusters
  std::int64_t chunks;         // blocks a row, kSplit
  std::int64_t chunk_classes;  // classes of a chunk
  int repeats = 1;             // rows that a team takes one after the other, kRows
};

// How gumbel_topk is cut. Its logits are rows of adjacent classes.
struct TopKPlan {
  bool sorts;          // k is so large that all scores are written, [rows, classes], to be sorted
  int team, blocks;    // threads a row, and blocks of them
  std::int64_t slot;   // scores that a team has room for
  std::int64_t bytes;  // of all scores, of the accumulate type: Params::partials
};

struct Device {
  int multiprocessors;
  bool clusters;  // compute capability 9.0 or later
};

// Elements that a thread loads at once.
constexpr int group_elements(ElementType type) {
  return type == ElementType::kBFloat16 || type == ElementType::kFloat16 ? 8 : 4;
}
// Groups of a row that a thread holds at most: more numbers would not fit its registers together
// with a gradient.
constexpr int held_groups(int element_bytes) {
  return element_bytes == 8 ? 2 : (element_bytes == 4 ? 6 : 3);
}
constexpr int element_bytes(ElementType type) {
  return type == ElementType::kFloat64 ? 8 : (type == ElementType::kFloat32 ? 4 : 2);
}

// Positions of a tensor whose dimensions have these sizes and strides of positions; with
// dimensions merged where that changes nothing.
PositionGrid merged_positions(std::uint64_t first, int dims, const std::int64_t* size,
                              const std::int64_t* stride);
// Sets the positions of logits, the classes of which are dimension `dim`. Returns whether rows need
// a table of them, Params::row_positions, which is then *rows written out by launch_positions().
bool set_positions(Params& params, std::uint64_t first, int dims, const std::int64_t* size,
                   const std::int64_t* stride, int dim, PositionGrid* rows);
// In place of positions: no noise is added.
void set_no_noise(Params& params);

// Soft forwards and both backwards of one shape and the same positions are cut alike, so that
// straight-through gradients are those of soft samples to the bit. A backward from y is not told
// positions: in those of a part it may differ by rounding.
Plan make_plan(Op op, ElementType type, const Params& params, const Device& device);
TopKPlan make_topk_plan(ElementType type, const Params& params, const Device& device);
// Bytes that Params::partials must point to.
std::int64_t partial_bytes(const Plan& plan, const Params& params);

// Launch the kernels of one call on `stream` (a cudaStream_t). Return the name of the first CUDA
// error, or null.
#define GUMBEL_EXT_DECLARE_LAUNCH(type) \
  const char* launch_##type(Op op, const Params& params, const Plan& plan, void* stream);
GUMBEL_EXT_DECLARE_LAUNCH(float64)
GUMBEL_EXT_DECLARE_LAUNCH(float32)
GUMBEL_EXT_DECLARE_LAUNCH(bfloat16)
GUMBEL_EXT_DECLARE_LAUNCH(float16)
#undef GUMBEL_EXT_DECLARE_LAUNCH
const char* launch_noise(ElementType type, const RandomSource& random,
                         const PositionGrid& positions, std::int64_t count, void* y, void* stream);
const char* launch_topk(ElementType type, const Params& params, const TopKPlan& plan, void* stream);
const char* launch_positions(const PositionGrid& positions, std::int64_t rows, std::int64_t* out,
                             void* stream);

}  // namespace cuda
}  // namespace gumbel_ext
