// From tensors to the rows of several operands that kernels are told: RowsParams.
#pragma once

#include <cmath>
#include <vector>

#include "../row_tensors.h"
#include "../strided.h"
#include "rows_params.h"
#include "tensors.h"

namespace gumbel_ext {
namespace cuda {

// Collects the operands, then merges the dimensions that rows are numbered over.
class RowsBuilder {
 public:
  // `like`: of the shape that all operands have, and of the inputs' dtype.
  RowsBuilder(RowsParams& params, const char* op, const at::Tensor& like, int64_t dim, double tau,
              const OptionalTensor& tau_tensor, decltype(&check_beta_values) check = &check_tau)
      : p_(params), dim_(dim), sizes_(classes_last(like, dim).sizes()) {
    if (tau_tensor && tau_tensor->is_cpu()) check(op, tau_tensor->to(at::kDouble));
    p_.type = element_type(like.scalar_type());
    p_.classes = sizes_.back();
    check_classes(op, p_.classes);
    p_.rows = p_.classes == 0 ? 0 : like.numel() / p_.classes;
    if (const std::optional<double> number = known_tau(tau, tau_tensor)) {
      const double size = clamped_factor(std::fabs(*number), like.scalar_type() == at::kDouble);
      p_.tau_value = std::copysign(size, *number);
      p_.tau_float32 = static_cast<float>(p_.tau_value);
    } else {
      tau_ = row_temperatures(*tau_tensor, like, dim);
      p_.tau = tau_.const_data_ptr();
    }
  }

  void add(RowOperand& operand, const at::Tensor& tensor) {
    tensors_.push_back(rows_of(tensor, dim_));
    operands_.push_back(&operand);
  }

  void finish() {
    if (!merge()) {
      for (at::Tensor& t : tensors_) t = t.contiguous();
      merge();
    }
    for (size_t i = 0; i < tensors_.size(); ++i) {
      operands_[i]->data = tensors_[i].const_data_ptr();
      operands_[i]->class_stride = tensors_[i].size(-1) == 1 ? 1 : tensors_[i].stride(-1);
    }
  }

 private:
  static void check_tau(const char* op, const at::Tensor& tau) { check_tau_values(op, tau); }

  // Whether the kernels know that many dimensions.
  bool merge() {
    std::vector<at::IntArrayRef> strides;
    for (const at::Tensor& t : tensors_) strides.push_back(t.strides());
    p_.dims = merge_dimensions(sizes_, static_cast<int64_t>(sizes_.size()) - 1, strides.data(),
                               operands_.data(), operands_.size(), p_.size, kRowDims);
    return p_.dims >= 0;
  }

  RowsParams& p_;
  const int64_t dim_;
  const at::DimVector sizes_;
  at::Tensor tau_;
  std::vector<at::Tensor> tensors_;
  std::vector<RowOperand*> operands_;
};

}  // namespace cuda
}  // namespace gumbel_ext
