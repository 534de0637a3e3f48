// The log-space sample on the CPU.
#include "../ops/log_softmax.h"
#include "../row_tensors.h"
#include "kernels.h"
#include "rows_builder.h"
#include "tensors.h"

namespace gumbel_ext {
namespace cpu {
namespace {

using TwoTensors = std::tuple<at::Tensor, at::Tensor>;

TwoTensors gumbel_log_softmax_cpu(GumbelLogSoftmax& a) {
  const auto [log_y, used] = a.prepare();
  const at::Tensor& logits = a.logits;
  const at::Tensor temperatures =
      row_temperatures(name_of<GumbelLogSoftmax>(), a.tau_tensor, logits, a.dim);
  if (logits.numel() == 0) return {log_y, used.zero_()};
  const RngState state = reserve_randomness(a.generator, a.rng_state);
  write_state(state, used);
  RowsOutput out(log_y, a.dim);

  LogSampleProblem p{};
  const at::Tensor rows = rows_of(logits, a.dim);
  RowsBuilder builder(p, rows, logits.scalar_type(), a.tau);
  builder.add(p.logits, rows);
  if (a.mask) builder.add(p.mask, rows_of(a.mask->expand(logits.sizes()), a.dim));
  if (a.tau_tensor) builder.add(p.tau, classes_last(temperatures, a.dim));
  const Positions places(logits.sizes(), a.positions);
  at::DimVector row_positions(places.strides.begin(), places.strides.end());
  if (logits.dim() > 0) row_positions.erase(row_positions.begin() + a.dim);
  if (logits.dim() == 0 || logits.size(a.dim) == 1 || places.strides[a.dim] == 1) {
    p.seed = state.seed;
    p.offset_of_state = state.offset;
    p.first_position = static_cast<uint64_t>(places.base);
    int64_t inner = 1;
    for (int64_t d = a.dim + 1; d < logits.dim(); ++d) inner *= logits.size(d);
    builder.add_strides(p.positions, row_positions, places.contiguous && inner == 1);
  } else {
    const at::Tensor noise =
        at::empty(logits.sizes(), logits.options().dtype(compute_dtype(logits.scalar_type())));
    fill_noise(noise, state, a.positions, kernels().noise);
    builder.add(p.noise, rows_of(noise, a.dim));
  }
  p.log_y = out.data();
  builder.run([&](int64_t begin, int64_t end) { kernels().log_sample(p, begin, end); });
  out.finish();
  return {log_y, used};
}

TwoTensors gumbel_log_softmax_backward_cpu(GumbelLogSoftmaxBackward& a) {
  const auto [grad_logits, grad_tau] = a.prepare();
  const at::Tensor temperatures =
      row_temperatures(name_of<GumbelLogSoftmaxBackward>(), a.tau_tensor, a.grad, a.dim);
  grad_tau.zero_();
  if (a.grad.numel() == 0) return {grad_logits, grad_tau};
  RowsOutput out(grad_logits, a.dim);

  LogGradientProblem p{};
  const at::Tensor rows = rows_of(a.grad, a.dim);
  RowsBuilder builder(p, rows, a.grad.scalar_type(), a.tau);
  builder.add(p.grad, rows);
  builder.add(p.log_y, rows_of(a.log_y, a.dim));
  if (a.tau_tensor) builder.add(p.tau, classes_last(temperatures, a.dim));
  p.grad_logits = out.data();
  if (a.tau_grad) p.grad_tau = grad_tau.mutable_data_ptr();
  builder.run([&](int64_t begin, int64_t end) { kernels().log_gradient(p, begin, end); });
  out.finish();
  return {grad_logits, grad_tau};
}

}  // namespace
}  // namespace cpu
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CPU, m) {
  using namespace gumbel_ext::cpu;
  using gumbel_ext::implement;
  implement<&gumbel_log_softmax_cpu>(m);
  implement<&gumbel_log_softmax_backward_cpu>(m);
}
