// The CUDA ops of the log-space sample and of the density: tensors in, launches out.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <vector>

#include "../concrete_density.h"
#include "concrete_density_params.h"
#include "log_softmax_params.h"
#include "rows_builder.h"

namespace gumbel_ext {
namespace cuda {
namespace {

void* current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

// What the kernels read must outlive the launch; the stream orders its memory's next use.
using Kept = std::vector<at::Tensor>;

// ---- the log-space sample -----------------------------------------------------------------------

// Rows are numbered over two dimensions, which the kernels know: those before `split`, those after.
struct SampleRows {
  at::Tensor rows;
  int64_t split, outer_stride, inner_stride;

  // The split at dim gives positions two strides, the others do for logits that are expanded.
  SampleRows(const at::Tensor& logits, int64_t dim) : rows(rows_of(logits, dim)), split(dim) {
    if (rows.size(-1) > 1 && rows.stride(-1) != 1) rows = rows.contiguous();
    if (strides_at(dim)) return;
    for (split = 0; split < rows.dim(); ++split) {
      if (strides_at(split)) return;
    }
    rows = rows.contiguous();
    split = dim;
    strides_at(split);
  }

  int64_t outer() const { return c10::multiply_integers(rows.sizes().slice(0, size_of(split))); }
  int64_t inner() const {
    return c10::multiply_integers(
        rows.sizes().slice(size_of(split), size_of(rows.dim() - 1 - split)));
  }

 private:
  static size_t size_of(int64_t dims) { return static_cast<size_t>(dims); }
  bool strides_at(int64_t at) {
    return merges(rows, 0, at, &outer_stride) && merges(rows, at, rows.dim() - 1, &inner_stride);
  }
};

void set_mask(Params& p, const at::Tensor& mask, int64_t split, Kept& kept) {
  at::Tensor rows = mask;
  if (!merges(rows, 0, split, &p.mask_outer_stride) ||
      !merges(rows, split, rows.dim() - 1, &p.mask_inner_stride)) {
    rows = rows.contiguous();
    merges(rows, 0, split, &p.mask_outer_stride);
    merges(rows, split, rows.dim() - 1, &p.mask_inner_stride);
  }
  p.mask_class_stride = rows.stride(-1);
  p.mask = static_cast<const std::uint8_t*>(rows.const_data_ptr());
  kept.push_back(rows);
}

void set_sample_positions(Params& p, const char* op, const at::Tensor& logits, int64_t dim,
                          int64_t split, at::OptionalSymIntArrayRef positions, Kept& kept) {
  const Positions places(logits.sizes(), positions);
  // The classes at the split; the order of the rows stays.
  at::DimVector sizes(logits.sizes()), strides(places.strides);
  if (split != dim) {
    const int64_t classes = sizes[dim], stride = strides[dim];
    sizes.erase(sizes.begin() + dim);
    strides.erase(strides.begin() + dim);
    sizes.insert(sizes.begin() + split, classes);
    strides.insert(strides.begin() + split, stride);
  }
  PositionGrid grid{};
  if (!set_positions(p, static_cast<uint64_t>(places.base), static_cast<int>(sizes.size()),
                     sizes.data(), strides.data(), static_cast<int>(split), &grid)) {
    return;
  }
  const int64_t rows = p.outer * p.inner;
  kept.push_back(at::empty({rows}, logits.options().dtype(at::kLong)));
  int64_t* table = kept.back().mutable_data_ptr<int64_t>();
  p.row_positions = table;
  check_launch(op, launch_positions(grid, rows, table, current_stream()));
}

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
  RowsOutput log_y(at::empty_like(logits), dim);
  const at::Tensor used = at::empty({2}, integers);
  Kept kept;
  at::Tensor on_device;

  LogSampleParams params{};
  Params& p = params.rows;
  p.random = random_source(generator, rng_state, on_device);
  p.used_state = used.mutable_data_ptr<int64_t>();
  const SampleRows given(logits, dim);
  p.logits = given.rows.const_data_ptr();
  p.outer = given.outer();
  p.inner = given.inner();
  p.classes = given.rows.size(-1);
  check_classes(op, p.classes);
  p.outer_stride = given.outer_stride;
  p.inner_stride = given.inner_stride;
  p.class_stride = 1;
  if (mask) set_mask(p, classes_last(mask->expand(logits.sizes()), dim), given.split, kept);
  set_sample_positions(p, op, logits, dim, given.split, positions, kept);
  kept.push_back(set_tau(p, tau, tau_tensor, logits, dim));
  params.log_y = log_y.data();
  check_launch(op, launch_log_sample(element_type(logits.scalar_type()), params, current_stream()));
  log_y.settle();
  return {log_y.tensor, used};
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
