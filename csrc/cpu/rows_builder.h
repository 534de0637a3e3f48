// Tensors -> the operands of a RowShape.
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "../strided.h"
#include "row_problems.h"
#include "tensors.h"

namespace gumbel_ext {
namespace cpu {

// Collects the operands of a RowShape, then merges the dimensions that rows are numbered over.
class RowsBuilder {
 public:
  // `rows`: of the shape that all operands have, classes last.
  RowsBuilder(RowShape& shape, const at::Tensor& rows, at::ScalarType type, double tau)
      : shape_(shape), sizes_(rows.sizes()) {
    shape.type = element_type(type);
    shape.classes = sizes_.back();
    shape.rows = shape.classes == 0 ? 0 : rows.numel() / shape.classes;
    shape.tau_value = tau;
  }

  // `tensor`: of that shape, or with one class.
  void add(Operand& operand, const at::Tensor& tensor) {
    kept_.push_back(tensor);
    operand.data = const_cast<void*>(tensor.const_data_ptr());
    add_strides(operand, kept_.back().strides(), tensor.is_contiguous());
    operand.class_stride = tensor.size(-1) == 1 ? 1 : tensor.stride(-1);
  }

  // The strides of the row dimensions; what they point to must outlive this.
  void add_strides(Strides& operand, at::IntArrayRef strides, bool contiguous) {
    operand.contiguous = contiguous;
    operands_.push_back(&operand);
    strides_.push_back(strides);
  }

  void finish() {
    shape_.dims = merge_dimensions(sizes_, static_cast<int64_t>(sizes_.size()) - 1, strides_.data(),
                                   operands_.data(), operands_.size(), shape_.size, kMaxDims);
  }

  // `passes`: the number of passes over a row.
  template <class Run>
  void run(Run run, int64_t passes = 1) {
    finish();
    const int64_t grain = 8192 / shape_.classes / std::min<int64_t>(passes, 8192);
    at::parallel_for(0, shape_.rows, std::max<int64_t>(1, grain), run);
  }

 private:
  RowShape& shape_;
  at::IntArrayRef sizes_;
  std::vector<at::Tensor> kept_;
  std::vector<Strides*> operands_;
  std::vector<at::IntArrayRef> strides_;
};

}  // namespace cpu
}  // namespace gumbel_ext
