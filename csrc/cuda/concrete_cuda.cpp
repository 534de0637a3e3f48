// The CUDA ops of the log-space sample and of the density: tensors in, launches out.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../concrete_density.h"
#include "backward_into.h"
#include "concrete_density_params.h"
#include "log_softmax_params.h"
#include "rows_builder.h"

namespace gumbel_ext {
namespace cuda {
namespace {

void* current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

// ---- the log-space sample -----------------------------------------------------------------------

std::tuple<at::Tensor, at::Tensor> gumbel_log_softmax_cuda(const at::Tensor& logits, double tau,
                                                           const OptionalTensor& tau_tensor,
                                                           int64_t dim, const OptionalTensor& mask,
                                                           std::optional<at::Generator> generator,
                                                           const OptionalTensor& rng_state,
                                                           at::OptionalSymIntArrayRef positions) {
  constexpr const char* op = "gumbel_log_softmax";
  dim = check_forward(op, logits, tau, tau_tensor, dim, mask, generator, rng_state, positions);
  if (tau_tensor && tau_tensor->is_cpu()) check_tau_values(op, tau_tensor->to(at::kDouble));
  const auto integers = logits.options().dtype(at::kLong);
  if (logits.numel() == 0) return {at::empty_like(logits), at::zeros({2}, integers)};
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor log_y = at::empty_like(logits), used = at::empty({2}, integers);
  at::Tensor on_device;
  const RandomSource random = random_source(generator, rng_state, on_device);
  forward_into(op, Op::kLogSoft, logits, tau, tau_tensor, dim, mask, &random, positions, log_y,
               std::nullopt, used);
  return {log_y, used};
}

// ---- its gradient -------------------------------------------------------------------------------

std::tuple<at::Tensor, at::Tensor> gumbel_log_softmax_backward_cuda(
    const at::Tensor& grad, const at::Tensor& log_y, double tau, const OptionalTensor& tau_tensor,
    int64_t dim, bool tau_grad) {
  constexpr const char* op = "gumbel_log_softmax_backward";
  dim = check_log_backward(op, grad, log_y, tau, tau_tensor, dim);
  const c10::cuda::CUDAGuard guard(grad.device());
  RowsOutput out(at::empty_like(log_y, log_y.options().dtype(grad.scalar_type())), dim);
  const at::Tensor grad_tau = empty_grad_tau(log_y, dim, tau_grad);
  if (grad.numel() == 0) return {out.tensor, grad_tau.zero_()};

  LogGradientParams p{};
  RowsBuilder builder(p, op, grad, dim, tau, tau_tensor);
  builder.add(p.grad, grad);
  builder.add(p.log_y, log_y);
  builder.finish();
  p.grad_logits = out.data();
  if (tau_grad) p.grad_tau = grad_tau.mutable_data_ptr();
  check_launch(op, launch_log_gradient(p, current_stream()));
  out.settle();
  return {out.tensor, grad_tau};
}

// ---- the density --------------------------------------------------------------------------------

at::Tensor concrete_log_prob_cuda(const at::Tensor& value, const at::Tensor& logits, double tau,
                                  const OptionalTensor& tau_tensor, int64_t dim, bool log_space) {
  constexpr const char* op = "concrete_log_prob";
  const DensityArguments a(op, value, logits, tau, tau_tensor, dim);
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor density = a.empty_density();
  DensityParams p{};
  RowsBuilder builder(p, op, a.logits, a.dim, tau, tau_tensor);
  if (a.logits.numel() == 0) return density.fill_(std::numeric_limits<double>::quiet_NaN());
  builder.add(p.value, a.value);
  builder.add(p.logits, a.logits);
  builder.finish();
  p.log_space = log_space;
  p.density = density.mutable_data_ptr();
  check_launch(op, launch_density(p, current_stream()));
  return density;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> concrete_log_prob_backward_cuda(
    const at::Tensor& grad, const at::Tensor& value, const at::Tensor& logits, double tau,
    const OptionalTensor& tau_tensor, int64_t dim, bool log_space, bool value_grad,
    bool logits_grad, bool tau_grad) {
  constexpr const char* op = "concrete_log_prob_backward";
  const DensityArguments a(op, grad, value, logits, tau, tau_tensor, dim);
  const c10::cuda::CUDAGuard guard(logits.device());
  RowsOutput of_value(a.empty_grad_value(value_grad), a.dim, value_grad),
      of_logits(a.empty_grad_logits(logits_grad), a.dim, logits_grad);
  const at::Tensor of_tau = empty_grad_tau(a.logits, a.dim, tau_grad);
  DensityParams p{};
  RowsBuilder builder(p, op, a.logits, a.dim, tau, tau_tensor);
  if (a.logits.numel() == 0) {
    return {of_value.tensor, of_logits.tensor,
            of_tau.fill_(std::numeric_limits<double>::quiet_NaN())};
  }
  builder.add(p.value, a.value);
  builder.add(p.logits, a.logits);
  builder.finish();
  const at::Tensor of_rows = grad.contiguous();
  p.log_space = log_space;
  p.grad = of_rows.const_data_ptr();
  p.grad_value = of_value.data();
  p.grad_logits = of_logits.data();
  if (tau_grad) p.grad_tau = of_tau.mutable_data_ptr();
  p.wide_grad_value = a.value_expanded;
  p.wide_grad_logits = a.logits_expanded;
  check_launch(op, launch_density(p, current_stream()));
  of_value.settle();
  of_logits.settle();
  return {of_value.tensor, of_logits.tensor, of_tau};
}

}  // namespace
}  // namespace cuda
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CUDA, m) {
  using namespace gumbel_ext::cuda;
  m.impl("gumbel_log_softmax", &gumbel_log_softmax_cuda);
  m.impl("gumbel_log_softmax_backward", &gumbel_log_softmax_backward_cuda);
  m.impl("concrete_log_prob", &concrete_log_prob_cuda);
  m.impl("concrete_log_prob_backward", &concrete_log_prob_backward_cuda);
}
