// What the kernels of the log-space sample and of its gradient are told.
#pragma once

#include "rows_params.h"

namespace gumbel_ext {
namespace cuda {

// The log-space sample. `rows` has logits by its strides, and no y: log_y is [rows, classes].
struct LogSampleParams {
  Params rows;
  void* log_y;
};

struct LogGradientParams : RowsParams {
  RowOperand grad;
  RowOperand log_y;  // of the type computed in
  void* grad_logits;
  void* grad_tau;  // [rows] of the type computed in, optional
};

// Launch on `stream`; return the name of the first CUDA error, or null.
const char* launch_log_sample(ElementType type, const LogSampleParams& params, void* stream);
const char* launch_log_gradient(const LogGradientParams& params, void* stream);

}  // namespace cuda
}  // namespace gumbel_ext
