// Tensors -> rows of the log-space sample and of the density, shared among PyTorch's threads.
#include <torch/library.h>

#include "../concrete_density.h"
#include "../gumbel_ext.h"
#include "../row_tensors.h"
#include "kernels.h"
#include "rows_builder.h"
#include "tensors.h"

namespace gumbel_ext {
namespace cpu {
namespace {

// ---- the log-space sample -----------------------------------------------------------------------

std::tuple<at::Tensor, at::Tensor> gumbel_log_softmax_cpu(const at::Tensor& logits, double tau,
                                                          const OptionalTensor& tau_tensor,
                                                          int64_t dim, const OptionalTensor& mask,
                                                          std::optional<at::Generator> generator,
                                                          const OptionalTensor& rng_state,
                                                          at::OptionalSymIntArrayRef positions) {
  constexpr const char* op = "gumbel_log_softmax";
  dim = check_forward(op, logits, tau, tau_tensor, dim, mask, generator, rng_state, positions);
  const at::Tensor temperatures = row_temperatures(op, tau_tensor, logits, dim);
  RowsOutput log_y(at::empty_like(logits), dim);
  if (logits.numel() == 0) return {log_y.tensor, at::zeros({2}, at::kLong)};
  const RngState state = reserve_randomness(generator, rng_state);
  const at::Tensor used = to_tensor(state);

  LogSampleProblem p{};
  const at::Tensor rows = rows_of(logits, dim);
  RowsBuilder builder(p, rows, logits.scalar_type(), tau);
  builder.add(p.logits, rows);
  if (mask) builder.add(p.mask, rows_of(mask->expand(logits.sizes()), dim));
  if (tau_tensor) builder.add(p.tau, classes_last(temperatures, dim));
  const Positions places(logits.sizes(), positions);
  at::DimVector row_positions(places.strides.begin(), places.strides.end());
  if (logits.dim() > 0) row_positions.erase(row_positions.begin() + dim);
  if (logits.dim() == 0 || logits.size(dim) == 1 || places.strides[dim] == 1) {
    p.seed = state.seed;
    p.offset_of_state = state.offset;
    p.first_position = static_cast<uint64_t>(places.base);
    int64_t inner = 1;
    for (int64_t d = dim + 1; d < logits.dim(); ++d) inner *= logits.size(d);
    builder.add_strides(p.positions, row_positions, places.contiguous && inner == 1);
  } else {
    const at::Tensor like =
        at::empty({0}, logits.options().dtype(compute_dtype(logits.scalar_type())));
    builder.add(p.noise,
                rows_of(gumbel_noise(like, logits.sizes(), std::nullopt, used, positions), dim));
  }
  p.log_y = log_y.data();
  builder.run([&](int64_t begin, int64_t end) { kernels().log_sample(p, begin, end); });
  log_y.settle();
  return {log_y.tensor, used};
}

std::tuple<at::Tensor, at::Tensor> gumbel_log_softmax_backward_cpu(const at::Tensor& grad,
                                                                   const at::Tensor& log_y,
                                                                   double tau,
                                                                   const OptionalTensor& tau_tensor,
                                                                   int64_t dim, bool tau_grad) {
  constexpr const char* op = "gumbel_log_softmax_backward";
  dim = check_log_backward(op, grad, log_y, tau, tau_tensor, dim);
  const at::Tensor temperatures = row_temperatures(op, tau_tensor, grad, dim);
  RowsOutput out(at::empty_like(log_y, log_y.options().dtype(grad.scalar_type())), dim);
  at::Tensor grad_tau = empty_grad_tau(log_y, dim, tau_grad).zero_();
  if (grad.numel() == 0) return {out.tensor, grad_tau};

  LogGradientProblem p{};
  const at::Tensor rows = rows_of(grad, dim);
  RowsBuilder builder(p, rows, grad.scalar_type(), tau);
  builder.add(p.grad, rows);
  builder.add(p.log_y, rows_of(log_y, dim));
  if (tau_tensor) builder.add(p.tau, classes_last(temperatures, dim));
  p.grad_logits = out.data();
  if (tau_grad) p.grad_tau = grad_tau.mutable_data_ptr();
  builder.run([&](int64_t begin, int64_t end) { kernels().log_gradient(p, begin, end); });
  out.settle();
  return {out.tensor, grad_tau};
}

// ---- the density --------------------------------------------------------------------------------

// The operands of a forward and of a backward.
struct DensityCall {
  DensityProblem p{};
  at::Tensor value, logits;
  RowsBuilder builder;

  DensityCall(const char* op, const DensityArguments& a, double tau,
              const OptionalTensor& tau_tensor, bool log_space)
      : value(rows_of(a.value, a.dim)),
        logits(rows_of(a.logits, a.dim)),
        builder(p, value, a.logits.scalar_type(), tau) {
    p.log_space = log_space;
    builder.add(p.value, value);
    builder.add(p.logits, logits);
    const at::Tensor temperatures = row_temperatures(op, tau_tensor, a.logits, a.dim);
    if (tau_tensor) builder.add(p.tau, classes_last(temperatures, a.dim));
  }

  void run() {
    builder.run([this](int64_t begin, int64_t end) { kernels().density(p, begin, end); });
  }
};

at::Tensor concrete_log_prob_cpu(const at::Tensor& value, const at::Tensor& logits, double tau,
                                 const OptionalTensor& tau_tensor, int64_t dim, bool log_space) {
  constexpr const char* op = "concrete_log_prob";
  const DensityArguments a(op, value, logits, tau, tau_tensor, dim);
  const at::Tensor density = a.empty_density();
  DensityCall call(op, a, tau, tau_tensor, log_space);
  if (a.logits.numel() == 0) return density.fill_(std::numeric_limits<double>::quiet_NaN());
  call.p.density = density.mutable_data_ptr();
  call.run();
  return density;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> concrete_log_prob_backward_cpu(
    const at::Tensor& grad, const at::Tensor& value, const at::Tensor& logits, double tau,
    const OptionalTensor& tau_tensor, int64_t dim, bool log_space, bool value_grad,
    bool logits_grad, bool tau_grad) {
  constexpr const char* op = "concrete_log_prob_backward";
  const DensityArguments a(op, grad, value, logits, tau, tau_tensor, dim);
  DensityCall call(op, a, tau, tau_tensor, log_space);
  RowsOutput of_value(a.empty_grad_value(value_grad), a.dim, value_grad),
      of_logits(a.empty_grad_logits(logits_grad), a.dim, logits_grad);
  const at::Tensor of_tau = empty_grad_tau(a.logits, a.dim, tau_grad);
  if (a.logits.numel() == 0) {
    return {of_value.tensor, of_logits.tensor,
            of_tau.fill_(std::numeric_limits<double>::quiet_NaN())};
  }
  call.builder.add(call.p.grad, grad.unsqueeze(-1));
  call.p.grad_value = of_value.data();
  call.p.grad_logits = of_logits.data();
  if (tau_grad) call.p.grad_tau = of_tau.mutable_data_ptr();
  call.p.wide_grad_value = a.value_expanded;
  call.p.wide_grad_logits = a.logits_expanded;
  call.run();
  of_value.settle();
  of_logits.settle();
  return {of_value.tensor, of_logits.tensor, of_tau};
}

}  // namespace
}  // namespace cpu
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CPU, m) {
  using namespace gumbel_ext::cpu;
  m.impl("gumbel_log_softmax", &gumbel_log_softmax_cpu);
  m.impl("gumbel_log_softmax_backward", &gumbel_log_softmax_backward_cpu);
  m.impl("concrete_log_prob", &concrete_log_prob_cpu);
  m.impl("concrete_log_prob_backward", &concrete_log_prob_backward_cpu);
}
