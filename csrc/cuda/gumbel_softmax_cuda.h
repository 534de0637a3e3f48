// Samples and their backward on CUDA, as other ops call them: their arguments need no check.
#pragma once

#include "../ops/gumbel_softmax.h"
#include "params.h"

namespace gumbel_ext {
namespace cuda {

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
