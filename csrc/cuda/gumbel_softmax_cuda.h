// Samples and their backward on CUDA, as other ops call them: their arguments need no check.
#pragma once

#include "../ops/gumbel_softmax.h"
#include "params.h"

namespace gumbel_ext {
namespace cuda {

// A forward into y, index and used_state, those that are given. Without `random`, hard samples have
// no noise. kHard and kIndexOnly do not look at tau; kLogSoft has no index.
void forward_into(const char* name, Op op, const at::Tensor& logits, double tau,
                  const OptionalTensor& tau_tensor, int64_t dim, const OptionalTensor& mask,
                  const RandomSource* random, at::OptionalSymIntArrayRef positions,
                  const OptionalTensor& y, const OptionalTensor& index,
                  const OptionalTensor& used_state);

GumbelSoftmax::Result sample(const GumbelSoftmax& a);
void sample_into(const GumbelSoftmax& a, const GumbelSoftmax::Result& out);
at::Tensor argmax(const GumbelArgmax& a);

// The rng_state of one call, on the device of `like`.
at::Tensor draw_state(const at::Tensor& like, const std::optional<at::Generator>& generator);

// Op::kBackward reads y in the place of logits, Op::kBackwardRecompute the logits. `name`: of the
// op, for messages.
void backward_into(const char* name, Op op, const GumbelSoftmaxHardBackward& a,
                   const at::Tensor& grad_logits, const at::Tensor& grad_tau);

}  // namespace cuda
}  // namespace gumbel_ext
