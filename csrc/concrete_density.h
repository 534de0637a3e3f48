// What the files about the density of the Concrete distribution share.
#pragma once

#include "arguments.h"

namespace gumbel_ext {

// value and logits as they meet: views of one shape that are not copied, and the dimension of the
// classes counted from the front.
struct DensityArguments {
  at::Tensor value, logits;  // of the broadcast shape
  int64_t dim;
  // Whether an operand is smaller than the shape they meet in. Its gradient is then summed, which
  // is done in the precision of the computation.
  bool value_expanded, logits_expanded;

  // Throws TypeError, ValueError or IndexError that name the argument.
  DensityArguments(const char* op, const at::Tensor& value, const at::Tensor& logits, double tau,
                   const OptionalTensor& tau_tensor, int64_t dim);
  // The same for a backward, whose `grad` is that of the density.
  DensityArguments(const char* op, const at::Tensor& grad, const at::Tensor& value,
                   const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor,
                   int64_t dim);

  at::ScalarType compute_type() const { return compute_dtype(value.scalar_type()); }
  // Not initialised; of no elements where not `wanted`.
  at::Tensor empty_density() const;
  at::Tensor empty_grad_value(bool wanted) const;
  at::Tensor empty_grad_logits(bool wanted) const;
};

}  // namespace gumbel_ext
