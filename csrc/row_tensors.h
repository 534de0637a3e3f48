// Tensors as rows of adjacent classes, on any device.
#pragma once

#include "arguments.h"

namespace gumbel_ext {

// The classes as the last dimension of at least one.
inline at::Tensor classes_last(const at::Tensor& t, int64_t dim) {
  return t.dim() == 0 ? t.unsqueeze(0) : t.movedim(dim, -1);
}

// The same with the classes of a row adjacent: copied if need be, but not what is expanded.
inline at::Tensor rows_of(const at::Tensor& t, int64_t dim) {
  const at::Tensor rows = classes_last(t, dim);
  if (rows.size(-1) <= 1 || rows.stride(-1) <= 1) return rows;
  at::Tensor once = rows;
  for (int64_t d = 0; d < rows.dim(); ++d) {
    if (rows.stride(d) == 0 && rows.size(d) > 1) once = once.narrow(d, 0, 1);
  }
  return once.contiguous().expand(rows.sizes());
}

// A result, and where kernels write its rows, one after the other.
struct RowsOutput {
  at::Tensor view, rows;

  RowsOutput(const at::Tensor& out, int64_t dim, bool wanted = true) {
    if (!wanted) return;
    view = classes_last(out, dim);
    rows = view.is_contiguous() ? view : at::empty(view.sizes(), view.options());
  }
  void* data() { return rows.defined() ? rows.mutable_data_ptr() : nullptr; }
  void finish() {
    if (rows.defined() && !rows.is_same(view)) view.copy_(rows);
  }
};

// A result, and where kernels write it in row-major order.
struct RowMajorOutput {
  at::Tensor tensor, row_major;

  explicit RowMajorOutput(const at::Tensor& out)
      : tensor(out), row_major(out.is_contiguous() ? out : at::empty(out.sizes(), out.options())) {}
  void* data() { return row_major.mutable_data_ptr(); }
  void finish() {
    if (!row_major.is_same(tensor)) tensor.copy_(row_major);
  }
};

}  // namespace gumbel_ext
