// The log-space sample on CUDA.
#include <c10/cuda/CUDAGuard.h>

#include "../ops/log_softmax.h"
#include "gumbel_softmax_cuda.h"
#include "log_softmax_params.h"
#include "rows_builder.h"

namespace gumbel_ext {
namespace cuda {
namespace {

using TwoTensors = std::tuple<at::Tensor, at::Tensor>;

TwoTensors gumbel_log_softmax_cuda(GumbelLogSoftmax& a) {
  constexpr const char* op = name_of<GumbelLogSoftmax>();
  const auto [log_y, used] = a.prepare();
  const at::Tensor& logits = a.logits;
  check_tau_on_host(a);
  if (logits.numel() == 0) return {log_y, used.zero_()};
  const c10::cuda::CUDAGuard guard(logits.device());
  at::Tensor on_device;
  const RandomSource random = random_source(a.generator, a.rng_state, on_device);
  forward_into(op, Op::kLogSoft, logits, a.tau, a.tau_tensor, a.dim, a.mask, &random, a.positions,
               log_y, std::nullopt, used);
  return {log_y, used};
}

TwoTensors gumbel_log_softmax_backward_cuda(GumbelLogSoftmaxBackward& a) {
  constexpr const char* op = name_of<GumbelLogSoftmaxBackward>();
  const auto [grad_logits, grad_tau] = a.prepare();
  if (a.grad.numel() == 0) return {grad_logits, grad_tau.zero_()};
  const c10::cuda::CUDAGuard guard(a.grad.device());
  RowsOutput out(grad_logits, a.dim);

  LogGradientParams p{};
  RowsBuilder builder(p, op, a.grad, a.dim, a.tau, a.tau_tensor);
  builder.add(p.grad, a.grad);
  builder.add(p.log_y, a.log_y);
  builder.finish();
  p.grad_logits = out.data();
  if (a.tau_grad) p.grad_tau = grad_tau.mutable_data_ptr();
  check_launch(op, launch_log_gradient(p, current_stream()));
  out.finish();
  return {grad_logits, grad_tau};
}

}  // namespace
}  // namespace cuda
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CUDA, m) {
  using namespace gumbel_ext::cuda;
  using gumbel_ext::implement;
  implement<&gumbel_log_softmax_cuda>(m);
  implement<&gumbel_log_softmax_backward_cuda>(m);
}
