// What the kernel of the log-space sample's gradient is told.
#pragma once

#include "rows_params.h"

namespace gumbel_ext {
namespace cuda {

struct LogGradientParams : RowsParams {
  RowOperand grad;
  RowOperand log_y;  // of the accumulate type
  void* grad_logits;
  void* grad_tau;  // [rows] of the accumulate type, optional
};

// Launches on `stream`; returns the name of the first CUDA error, or null.
const char* launch_log_gradient(const LogGradientParams& params, void* stream);

}  // namespace cuda
}  // namespace gumbel_ext
