// Samples and their backward on the CPU, as other ops call them: their arguments need no check.
#pragma once

#include "../ops/gumbel_softmax.h"
#include "problem.h"

namespace gumbel_ext {
namespace cpu {

GumbelSoftmax::Result sample(const GumbelSoftmax& a);
void sample_into(const GumbelSoftmax& a, const GumbelSoftmax::Result& out);
at::Tensor argmax(const GumbelArgmax& a);

// Op::kBackward reads y in the place of logits, Op::kBackwardRecompute the logits; without an
// rng_state there is no noise. `name`: of the op, for messages.
void backward_into(const char* name, Op op, const GumbelSoftmaxHardBackward& a,
                   const at::Tensor& grad_logits, const at::Tensor& grad_tau);

}  // namespace cpu
}  // namespace gumbel_ext
