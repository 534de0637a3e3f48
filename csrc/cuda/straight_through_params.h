// What the kernels of the straight-through softmax without noise are told.
#pragma once

#include "rows_params.h"

namespace gumbel_ext {
namespace cuda {

// A forward where there is no gradient to write; it does not look at tau.
struct StraightThroughParams : RowsParams {
  RowOperand logits;
  RowOperand mask;      // of bytes; without data, every class is allowed
  std::int64_t* index;  // [rows]: written by a forward if not null, read by a backward
  void* y;
  RowOperand grad;    // of y
  void* grad_logits;  // written by a backward
  void* grad_tau;     // [rows] of the type computed in, optional
};

// Launches on `stream`; returns the name of the first CUDA error, or null.
const char* launch_straight_through(const StraightThroughParams& params, void* stream);

}  // namespace cuda
}  // namespace gumbel_ext
