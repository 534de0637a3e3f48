// What the kernel of the density of the Concrete distribution is told.
#pragma once

#include "rows_params.h"

namespace gumbel_ext {
namespace cuda {

struct DensityParams : RowsParams {
  bool log_space;
  RowOperand value, logits;
  void* density;  // [rows] of the type computed in: written by a forward
  // Those of a backward. Gradients are of the type computed in where `wide`, else of the inputs'.
  const void* grad;   // [rows] of the type computed in
  void* grad_value;   // optional
  void* grad_logits;  // optional
  void* grad_tau;     // [rows] of the type computed in, optional
  bool wide_grad_value, wide_grad_logits;
};

// Launches on `stream`; returns the name of the first CUDA error, or null.
const char* launch_density(const DensityParams& params, void* stream);

}  // namespace cuda
}  // namespace gumbel_ext
