// The backward of the samples into memory of the caller's: what the codebook lookup calls for each
// of its tiles.
#pragma once

#include "../arguments.h"
#include "params.h"

namespace gumbel_ext {
namespace cuda {

// Op::kBackward reads y, Op::kBackwardRecompute the logits. Returns the gradient of tau.
at::Tensor backward_into(const char* name, Op op, const at::Tensor& grad,
                         const at::Tensor& logits_or_y, const at::Tensor& index, double tau,
                         const OptionalTensor& tau_tensor, int64_t dim, const OptionalTensor& mask,
                         const OptionalTensor& rng_state, bool tau_grad,
                         at::OptionalSymIntArrayRef positions, const at::Tensor& grad_logits);

}  // namespace cuda
}  // namespace gumbel_ext
