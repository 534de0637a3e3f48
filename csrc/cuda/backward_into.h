// Samples and their backwards into memory of the caller's: what the ops of the family share, and
// what the codebook lookup calls for each of its tiles.
#pragma once

#include "../arguments.h"
#include "params.h"

namespace gumbel_ext {
namespace cuda {

// Without `random`, hard samples have no noise. kHard and kIndexOnly do not look at tau; kLogSoft
// has no index.
void forward_into(const char* name, Op op, const at::Tensor& logits, double tau,
                  const OptionalTensor& tau_tensor, int64_t dim, const OptionalTensor& mask,
                  const RandomSource* random, at::OptionalSymIntArrayRef positions,
                  const OptionalTensor& y, const OptionalTensor& index,
                  const OptionalTensor& used_state);

// Op::kBackward reads y, Op::kBackwardRecompute the logits. Returns the gradient of tau.
at::Tensor backward_into(const char* name, Op op, const at::Tensor& grad,
                         const at::Tensor& logits_or_y, const at::Tensor& index, double tau,
                         const OptionalTensor& tau_tensor, int64_t dim, const OptionalTensor& mask,
                         const OptionalTensor& rng_state, bool tau_grad,
                         at::OptionalSymIntArrayRef positions, const at::Tensor& grad_logits);

}  // namespace cuda
}  // namespace gumbel_ext
