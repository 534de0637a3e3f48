// What the kernels of the soft-argmax are told.
#pragma once

#include "rows_params.h"

namespace gumbel_ext {
namespace cuda {

// Coordinates that a class may have.
constexpr int kMaxCoordinates = 3;

// A forward where there is no gradient to write. The temperature of the rows is beta, its inverse.
struct SoftArgmaxParams : RowsParams {
  RowOperand logits;
  int coordinates;
  const void* positions;  // [coordinates, classes] of the accumulate type, around 0
  const double* middle;   // [coordinates]: what was taken off them
  void* expected;         // [rows, coordinates] of the accumulate type: written by a forward
  // [rows, 3 + coordinates]: the likeliest class, its logit, the sum of the weights relative to it,
  // and for each coordinate the expected position less that of the class. Written by a forward,
  // read by a backward.
  double* state;
  const void* grad;  // of expected
  void* grad_logits;
  void* grad_beta;  // [rows] of the accumulate type, optional
};

// Launches on `stream`; returns the name of the first CUDA error, or null.
const char* launch_soft_argmax(const SoftArgmaxParams& params, void* stream);

}  // namespace cuda
}  // namespace gumbel_ext
