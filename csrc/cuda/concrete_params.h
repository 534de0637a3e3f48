// What the kernels of the log-space sample and of the density are told: rows whose operands may lie
// anywhere, stride 0 included, and results whose rows follow each other.
#pragma once

#include "params.h"

namespace gumbel_ext {
namespace cuda {

// Dimensions that rows may be numbered over, neighbours merged; more are made contiguous first.
constexpr int kRowDims = 6;

// Strides of the dimensions that rows are numbered over, and of the classes.
struct RowOperand {
  const void* data;
  std::int64_t stride[kRowDims], class_stride;
};

struct RowsParams {
  ElementType type;  // of the inputs, where they are not said to be of the type computed in
  std::int64_t rows, classes;
  int dims;
  std::int64_t size[kRowDims];
  const void* tau;   // [rows] of the type computed in, optional; positive and finite, else its row
                     // is NaN
  double tau_value;  // used without it
  float tau_float32;
};

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

// Launch on `stream`; return the name of the first CUDA error, or null.
const char* launch_log_sample(ElementType type, const LogSampleParams& params, void* stream);
const char* launch_log_gradient(const LogGradientParams& params, void* stream);
const char* launch_density(const DensityParams& params, void* stream);

}  // namespace cuda
}  // namespace gumbel_ext
