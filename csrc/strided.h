// Operands of several strides as one walk through few dimensions.
#pragma once

#include <ATen/ATen.h>

namespace gumbel_ext {

// The dimensions that rows are numbered over: those of `shape` but `classes`, without those of size
// 1, and neighbours merged where every operand goes on evenly from one to the other. strides[i] are
// the strides of operand i over all of `shape`; its merged ones go to operands[i]->stride, the
// sizes to `sizes`. Returns the number of dimensions, or -1 where there are more than `most`.
template <class Operand>
int merge_dimensions(at::IntArrayRef shape, int64_t classes, const at::IntArrayRef* strides,
                     Operand* const* operands, size_t count, int64_t* sizes, int most) {
  int dims = 0;
  for (int64_t d = 0; d < static_cast<int64_t>(shape.size()); ++d) {
    if (d == classes || shape[d] == 1) continue;
    bool merges = dims > 0;
    for (size_t i = 0; i < count && merges; ++i) {
      merges = operands[i]->stride[dims - 1] == strides[i][d] * shape[d];
    }
    if (merges) {
      sizes[--dims] *= shape[d];
    } else if (dims == most) {
      return -1;
    } else {
      sizes[dims] = shape[d];
    }
    for (size_t i = 0; i < count; ++i) operands[i]->stride[dims] = strides[i][d];
    ++dims;
  }
  return dims;
}

}  // namespace gumbel_ext
