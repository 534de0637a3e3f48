// The density of the Concrete distribution on the CPU.
#include <limits>

#include "../ops/concrete_density.h"
#include "../row_tensors.h"
#include "kernels.h"
#include "rows_builder.h"
#include "tensors.h"

namespace gumbel_ext {
namespace cpu {
namespace {

// The operands of a forward and of a backward.
struct DensityCall {
  DensityProblem p{};
  at::Tensor value, logits;
  RowsBuilder builder;

  template <class Op>
  DensityCall(const Op& a, const DensityOperands& operands)
      : value(rows_of(operands.value, operands.dim)),
        logits(rows_of(operands.logits, operands.dim)),
        builder(p, value, operands.logits.scalar_type(), a.tau) {
    p.log_space = a.log_space;
    builder.add(p.value, value);
    builder.add(p.logits, logits);
    const at::Tensor temperatures =
        row_temperatures(name_of<Op>(), a.tau_tensor, operands.logits, operands.dim);
    if (a.tau_tensor) builder.add(p.tau, classes_last(temperatures, operands.dim));
  }

  void run() {
    builder.run([this](int64_t begin, int64_t end) { kernels().density(p, begin, end); });
  }
};

at::Tensor concrete_log_prob_cpu(ConcreteLogProb& a) {
  const DensityOperands operands(a);
  const at::Tensor density = operands.empty_density();
  DensityCall call(a, operands);
  if (operands.logits.numel() == 0) return density.fill_(std::numeric_limits<double>::quiet_NaN());
  call.p.density = density.mutable_data_ptr();
  call.run();
  return density;
}

ConcreteLogProbBackward::Result concrete_log_prob_backward_cpu(ConcreteLogProbBackward& a) {
  const DensityOperands operands(a);
  const auto [grad_value, grad_logits, grad_tau] = operands.empty_gradients(a);
  DensityCall call(a, operands);
  if (operands.logits.numel() == 0) {
    return {grad_value, grad_logits, grad_tau.fill_(std::numeric_limits<double>::quiet_NaN())};
  }
  RowsOutput of_value(grad_value, operands.dim, a.value_grad),
      of_logits(grad_logits, operands.dim, a.logits_grad);
  call.builder.add(call.p.grad, a.grad.unsqueeze(-1));
  call.p.grad_value = of_value.data();
  call.p.grad_logits = of_logits.data();
  if (a.tau_grad) call.p.grad_tau = grad_tau.mutable_data_ptr();
  call.p.wide_grad_value = operands.value_expanded;
  call.p.wide_grad_logits = operands.logits_expanded;
  call.run();
  of_value.finish();
  of_logits.finish();
  return {grad_value, grad_logits, grad_tau};
}

}  // namespace
}  // namespace cpu
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CPU, m) {
  using namespace gumbel_ext::cpu;
  using gumbel_ext::implement;
  implement<&concrete_log_prob_cpu>(m);
  implement<&concrete_log_prob_backward_cpu>(m);
}
