// What a CPU kernel is told: pointers, sizes and strides, no tensors.
#pragma once

#include <cstdint>

namespace gumbel_ext {
namespace cpu {

constexpr int kMaxDims = 64;

enum class ElementType { kFloat64, kFloat32, kBFloat16, kFloat16 };

// How the elements of a tensor lie, seen as rows of classes: a row is what the softmax normalises.
struct Strides {
  std::int64_t class_stride = 0;
  // The order is the logical order [outer, classes, inner], without gaps.
  bool contiguous = false;
  // Strides over Problem::size; only the first Problem::dims are set.
  std::int64_t stride[kMaxDims];
};

struct Operand : Strides {
  void* data = nullptr;

  explicit operator bool() const { return data != nullptr; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// Logits of logical shape [outer, classes, inner]; rows are numbered over (outer, inner),
// row-major.
struct Problem {
  ElementType type;
  std::int64_t outer, classes, inner;
  // The dimensions that rows are numbered over, adjacent ones merged where all operands allow.
  int dims;
  std::int64_t size[kMaxDims];

  // Without it the logits are taken as they are.
  bool noise = true;
  std::uint64_t seed, offset;
  // Noise positions: of the first element, and their strides, which those of memory say nothing
  // about. They are contiguous unless the logits are part of a larger tensor.
  std::uint64_t first_position;
  Strides positions;
  double tau_value;  // used where tau has no data
  bool hard;
  std::int64_t k;  // classes that gumbel_topk chooses of a row

  Operand logits;
  Operand mask;    // bytes, optional
  Operand tau;     // double, optional
  Operand output;  // y: written by a forward, read by a backward from y
  Operand grad;    // of y
  Operand grad_logits;
  // [rows], [outer, k, inner] of gumbel_topk: written by a forward if not null, read by a backward.
  std::int64_t* index;
  void* grad_tau;  // [rows] of the accumulate type, optional

  std::int64_t rows() const { return outer * inner; }
};

// How the work of one call is cut. Every way gives the same bits; see plan.cpp for the rules.
enum class Regime {
  kRows,      // tiles of whole rows, vectorised along the classes
  kSplitRow,  // few long rows: one row at a time, its chunks shared among threads
  kSlabs,    // a few interleaved rows (1 < inner < 16) of contiguous positions: noise drawn for all
             // of them in one run, then rows
  kColumns,  // vectorised across up to 64 neighbouring rows, classes in sequence
};

struct Plan {
  Regime regime;
  std::int64_t tasks;  // independent pieces: tiles of rows or columns, slabs, or rows
  std::int64_t grain;  // pieces worth a thread of their own
  std::int64_t tile;   // rows or columns in a piece
};

// Sums over a row are taken in chunks of this many classes: 16 lanes within a chunk, chunk sums
// added in double. The order is fixed, and part of what is promised for sharded rows.
constexpr std::int64_t kChunk = 1024;
// Elements of a tile of rows: noise, logits and output of a tile stay in the first-level cache.
constexpr std::int64_t kTile = 2048;
// Rows that are vectorised across.
constexpr std::int64_t kColumns = 64;

enum class Op { kForward, kIndexOnly, kBackward, kBackwardRecompute };

Plan make_plan(Op op, const Problem& problem, int threads);

// Distance of a row's first element from that of row 0.
std::int64_t row_offset(const Problem& problem, const Strides& strides, std::int64_t row);

inline std::uint64_t noise_position(const Problem& p, std::int64_t row, std::int64_t c) {
  return p.first_position + static_cast<std::uint64_t>(row_offset(p, p.positions, row)) +
         static_cast<std::uint64_t>(c) * static_cast<std::uint64_t>(p.positions.class_stride);
}

// Partial results of the chunks of one row, for Regime::kSplitRow.
struct ChunkState {
  double largest;      // of logits + noise
  std::int64_t index;  // of its first occurrence, where that could be the row's
  bool nan;
  double sum;
};

// A class that may be among the best, with its noisy logit.
struct ScoredClass {
  double value;
  std::int64_t index;
};

// The steps of a split row. Between steps the caller combines what the chunks left in ChunkState.
enum class Step { kNoise, kExponentiate, kNormalize, kDot, kLogDot, kGradient };

struct SplitRow {
  std::int64_t row;
  void* work;  // classes elements of the accumulate type: logits + noise, then y
  ChunkState* chunks;
  double largest, sum, dot, log_dot;
};

// The expected position under the softmax of a row; see soft_argmax.h.
constexpr int kMaxCoordinates = 3;

struct PositionRow {
  const void* positions;  // [coordinates, classes] of the accumulate type
  int coordinates;
  std::int64_t classes;
  double beta;
};

// What one chunk of a row adds to it.
struct PositionChunk {
  double largest;      // NaN where there is one
  std::int64_t index;  // of it, or of the first NaN
  double total, moment[kMaxCoordinates];
};

}  // namespace cpu
}  // namespace gumbel_ext
