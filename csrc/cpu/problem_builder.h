// Tensors -> Problem, and its plan carried out on PyTorch's threads.
#pragma once

#include <ATen/Parallel.h>

#include "../strided.h"
#include "execute.h"
#include "tensors.h"

namespace gumbel_ext {
namespace cpu {

// Collects the operands of a Problem, then merges the dimensions that rows are numbered over. The
// tensors and positions passed in must outlive it.
class ProblemBuilder {
 public:
  ProblemBuilder(const at::Tensor& logits, int64_t dim, const Positions& positions)
      : dim_(dim), shape_(logits.sizes()) {
    problem_.type = element_type(logits.scalar_type());
    problem_.outer = problem_.classes = problem_.inner = 1;
    for (int64_t d = 0; d < logits.dim(); ++d) {
      (d < dim ? problem_.outer : d == dim ? problem_.classes : problem_.inner) *= logits.size(d);
    }
    problem_.tau_value = 1;
    problem_.noise = true;
    problem_.seed = problem_.offset = 0;
    problem_.hard = false;
    problem_.k = 1;
    problem_.index = nullptr;
    problem_.grad_tau = nullptr;
    problem_.first_position = static_cast<uint64_t>(positions.base);
    add_strides(problem_.positions, positions.strides, positions.contiguous);
  }

  Problem& problem() { return problem_; }

  // `tensor` has the shape of logits, or that shape with dim reduced to 1.
  void add(Operand& operand, const at::Tensor& tensor) {
    operand.data = const_cast<void*>(tensor.const_data_ptr());
    add_strides(operand, tensor.strides(), tensor.is_contiguous());
    if (tensor.dim() > 0 && tensor.size(dim_) == 1) operand.class_stride = 1;
  }

  const Problem& finish() {
    problem_.dims = merge_dimensions(shape_, dim_, strides_, operands_, static_cast<size_t>(count_),
                                     problem_.size, kMaxDims);
    return problem_;
  }

 private:
  void add_strides(Strides& operand, at::IntArrayRef strides, bool contiguous) {
    operand.class_stride = shape_.empty() || shape_[dim_] == 1 ? 1 : strides[dim_];
    operand.contiguous = contiguous;
    operands_[count_] = &operand;
    strides_[count_++] = strides;
  }

  Problem problem_;
  int64_t dim_;
  at::IntArrayRef shape_;
  int count_ = 0;
  Strides* operands_[7];
  at::IntArrayRef strides_[7];
};

// Whether the rows of a tensor are scattered so that the classes of neighbouring rows, not those of
// one row, share cache lines: the transposed layouts. PyTorch's own copy turns such a tensor over
// better than row by row gathering does.
inline bool rows_are_scattered(const at::Tensor& t, int64_t dim) {
  int64_t inner = 1;
  for (int64_t d = dim + 1; d < t.dim(); ++d) inner *= t.size(d);
  return inner == 1 && t.dim() > 1 && t.size(dim) > 1 && t.stride(dim) > 1 &&
         t.is_non_overlapping_and_dense();
}

inline at::Tensor with_rows_together(const at::Tensor& t, int64_t dim) {
  return rows_are_scattered(t, dim) ? t.contiguous() : t;
}

// An output, and where kernels write it: the same tensor unless its rows are scattered.
struct Output {
  at::Tensor tensor, rows;

  Output(const at::Tensor& out, int64_t dim)
      : tensor(out),
        rows(rows_are_scattered(out, dim) ? at::empty(out.sizes(), out.options()) : out) {}

  void finish() {
    if (!rows.is_same(tensor)) tensor.copy_(rows);
  }
};

inline at::Tensor broadcast_mask(const OptionalTensor& mask, const at::Tensor& logits) {
  return mask ? mask->expand(logits.sizes()) : at::Tensor();
}

inline int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

constexpr auto parallel_for = [](int64_t count, int64_t grain, const auto& body) {
  at::parallel_for(0, count, grain, body);
};

inline void run_problem(Op op, const Problem& p) {
  execute(kernels(), op, p, threads(), parallel_for);
}

}  // namespace cpu
}  // namespace gumbel_ext
