// The density of the Concrete distribution on CUDA.
#include <c10/cuda/CUDAGuard.h>

#include <limits>

#include "../ops/concrete_density.h"
#include "concrete_density_params.h"
#include "rows_builder.h"

namespace gumbel_ext {
namespace cuda {
namespace {

at::Tensor concrete_log_prob_cuda(ConcreteLogProb& a) {
  constexpr const char* op = name_of<ConcreteLogProb>();
  const DensityOperands operands(a);
  const c10::cuda::CUDAGuard guard(a.logits.device());
  const at::Tensor density = operands.empty_density();
  DensityParams p{};
  RowsBuilder builder(p, op, operands.logits, operands.dim, a.tau, a.tau_tensor);
  if (operands.logits.numel() == 0) return density.fill_(std::numeric_limits<double>::quiet_NaN());
  builder.add(p.value, operands.value);
  builder.add(p.logits, operands.logits);
  builder.finish();
  p.log_space = a.log_space;
  p.density = density.mutable_data_ptr();
  check_launch(op, launch_density(p, current_stream()));
  return density;
}

ConcreteLogProbBackward::Result concrete_log_prob_backward_cuda(ConcreteLogProbBackward& a) {
  constexpr const char* op = name_of<ConcreteLogProbBackward>();
  const DensityOperands operands(a);
  const c10::cuda::CUDAGuard guard(a.logits.device());
  const auto [grad_value, grad_logits, grad_tau] = operands.empty_gradients(a);
  DensityParams p{};
  RowsBuilder builder(p, op, operands.logits, operands.dim, a.tau, a.tau_tensor);
  if (operands.logits.numel() == 0) {
    return {grad_value, grad_logits, grad_tau.fill_(std::numeric_limits<double>::quiet_NaN())};
  }
  RowsOutput of_value(grad_value, operands.dim, a.value_grad),
      of_logits(grad_logits, operands.dim, a.logits_grad);
  builder.add(p.value, operands.value);
  builder.add(p.logits, operands.logits);
  builder.finish();
  const at::Tensor of_rows = a.grad.contiguous();
  p.log_space = a.log_space;
  p.grad = of_rows.const_data_ptr();
  p.grad_value = of_value.data();
  p.grad_logits = of_logits.data();
  if (a.tau_grad) p.grad_tau = grad_tau.mutable_data_ptr();
  p.wide_grad_value = operands.value_expanded;
  p.wide_grad_logits = operands.logits_expanded;
  check_launch(op, launch_density(p, current_stream()));
  of_value.finish();
  of_logits.finish();
  return {grad_value, grad_logits, grad_tau};
}

}  // namespace
}  // namespace cuda
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CUDA, m) {
  using namespace gumbel_ext::cuda;
  using gumbel_ext::implement;
  implement<&concrete_log_prob_cuda>(m);
  implement<&concrete_log_prob_backward_cuda>(m);
}
