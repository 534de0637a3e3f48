// What a binary concrete kernel is told: elements that do not know of each other.
#pragma once

#include "params.h"

namespace gumbel_ext {
namespace cuda {

// Element n of a call, counted row-major, reads element (n / repeat) % period: all of a contiguous
// tensor, or one that is broadcast over leading and trailing dimensions. `data` may be null.
struct BroadcastOperand {
  const void* data;
  std::int64_t repeat, period;
};

enum class BinaryOp { kNoise, kSoft, kHard, kBackward };

struct BinaryParams {
  std::int64_t count;
  BroadcastOperand logits;       // null: 0
  BroadcastOperand inverse_tau;  // of the accumulate type, normal numbers; null: the number below
  BroadcastOperand grad;         // of y, kBackward
  double inverse_tau_value;
  float inverse_tau_float32;
  void* out;                 // noise, y, or the gradient of logits
  void* tau_terms;           // what each element adds to the gradient of tau, of the type computed
                             // in, optional
  std::int64_t* used_state;  // [2], optional: where a forward leaves (seed, offset)
  RandomSource random;
};

// Launches on `stream`; returns the name of the first CUDA error, or null.
const char* launch_binary(BinaryOp op, ElementType type, const BinaryParams& params,
                          const PositionGrid& positions, void* stream);

}  // namespace cuda
}  // namespace gumbel_ext
