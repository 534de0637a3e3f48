// What the kernels of the straight-through softmax and of the soft-argmax are told.
#pragma once

#include "concrete_params.h"

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

// Coordinates that a class may have.
constexpr int kMostCoordinates = 3;

// A forward where there is no gradient to write. The temperature of the rows is beta, its inverse.
struct SoftArgmaxParams : RowsParams {
  RowOperand logits;
  int coordinates;
  const void* positions;  // [coordinates, classes] of the type computed in, around 0
  const double* middle;   // [coordinates]: what was taken off them
  void* expected;         // [rows, coordinates] of the type computed in: written by a forward
  // [rows, 3 + coordinates]: the likeliest class, its logit, the sum of the weights relative to it,
  // and for each coordinate the expected position less that of the class. Written by a forward,
  // read by a backward.
  double* state;
  const void* grad;  // of expected
  void* grad_logits;
  void* grad_beta;  // [rows] of the type computed in, optional
};

// Launch on `stream`; return the name of the first CUDA error, or null.
const char* launch_straight_through(const StraightThroughParams& params, void* stream);
const char* launch_soft_argmax(const SoftArgmaxParams& params, void* stream);

}  // namespace cuda
}  // namespace gumbel_ext
