// What the kernel of the density of the Concrete distribution is told.
#pragma once

#include "rows_params.h"

namespace gumbel_ext {
namespace cuda {

struct DensityParams : RowsParams {
  bool log_space;
  RowOperand value, logits;
  void* density;  // [rows] of the accumulate type: written by a forward
  // A backward's operands. Gradients are of the accumulate type where `wide`, else of the inputs'.
  const void* grad;   // [rows] of the accumulate type
  void* grad_value;   // optional
  void* grad_logits;  // optional
  void* grad_tau;     // [rows] of the accumulate type, optional
  bool wide_grad_value, wide_grad_logits;
};

// Launches on `stream`; returns the name of the first CUDA error, or null.
const char* launch_density(const DensityParams& params, void* stream);

}  // namespace cuda
}  // namespace gumbel_ext
