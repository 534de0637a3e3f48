// The log-space sample on CUDA.
#include <c10/cuda/CUDAGuard.h>

#include <vector>

#include "../ops/log_softmax.h"
#include "rows_builder.h"

namespace gumbel_ext {
namespace cuda {
namespace {

// What the kernels read must outlive the launch; the stream orders its memory's next use.
using Kept = std::vector<at::Tensor>;

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

using TwoTensors = std::tuple<at::Tensor, at::Tensor>;

TwoTensors gumbel_log_softmax_cuda(GumbelLogSoftmax& a) {
  constexpr const char* op = name_of<GumbelLogSoftmax>();
  const auto [log_y, used] = a.prepare();
  const at::Tensor& logits = a.logits;
  check_tau_on_host(a);
  if (logits.numel() == 0) return {log_y, used.zero_()};
  const c10::cuda::CUDAGuard guard(logits.device());
  RowsOutput out(log_y, a.dim);
  Kept kept;
  at::Tensor on_device;

  LogSampleParams params{};
  Params& p = params.rows;
  p.random = random_source(a.generator, a.rng_state, on_device);
  p.used_state = used.mutable_data_ptr<int64_t>();
  const SampleRows given(logits, a.dim);
  p.logits = given.rows.const_data_ptr();
  p.outer = given.outer();
  p.inner = given.inner();
  p.classes = given.rows.size(-1);
  check_classes(op, p.classes);
  p.outer_stride = given.outer_stride;
  p.inner_stride = given.inner_stride;
  p.class_stride = 1;
  if (a.mask) set_mask(p, classes_last(a.mask->expand(logits.sizes()), a.dim), given.split, kept);
  set_sample_positions(p, op, logits, a.dim, given.split, a.positions, kept);
  kept.push_back(set_tau(p, a.tau, a.tau_tensor, logits, a.dim));
  params.log_y = out.data();
  check_launch(op, launch_log_sample(element_type(logits.scalar_type()), params, current_stream()));
  out.finish();
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
