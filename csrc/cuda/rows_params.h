// Rows of several operands, which may lie anywhere, stride 0 included; results of kernels on them
// are rows that follow each other.
#pragma once

#include "params.h"

namespace gumbel_ext {
namespace cuda {

// Dimensions that rows may be numbered over, neighbours merged; more are made contiguous first.
constexpr int kRowDims = 6;

// Elements that a thread takes at once: 16 bytes, 8 of a type of 16 bits, 32 of float64.
constexpr int kRowGroup = 4;

// Strides of the dimensions that rows are numbered over, and of the classes.
struct RowOperand {
  const void* data;
  std::int64_t stride[kRowDims], class_stride;
};

struct RowsParams {
  ElementType type;  // of inputs that are not said to be of the accumulate type
  std::int64_t rows, classes;
  int dims;
  std::int64_t size[kRowDims];
  const void* tau;   // [rows] of the accumulate type, optional; positive and finite, else its row
                     // is NaN
  double tau_value;  // used without it
  float tau_float32;
};

// Threads that take a row of so many classes, as many as have work: 4, 32 or 256.
int row_team(std::int64_t classes);

}  // namespace cuda
}  // namespace gumbel_ext
