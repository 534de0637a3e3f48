// What the kernel of the straight-through softmax's gradient is told.
#pragma once

#include "rows_params.h"

namespace gumbel_ext {
namespace cuda {

struct StraightThroughParams : RowsParams {
  RowOperand logits;
  RowOperand mask;            // of bytes; without data, every class is allowed
  const std::int64_t* index;  // [rows]: of the forward
  RowOperand grad;            // of y
  void* grad_logits;
  void* grad_tau;  // [rows] of the accumulate type, optional
};

// Launches on `stream`; returns the name of the first CUDA error, or null.
const char* launch_straight_through_backward(const StraightThroughParams& params, void* stream);

}  // namespace cuda
}  // namespace gumbel_ext
