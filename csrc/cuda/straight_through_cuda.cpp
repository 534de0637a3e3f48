// The straight-through softmax on CUDA.
#include <c10/cuda/CUDAGuard.h>

#include "../ops/straight_through.h"
#include "gumbel_softmax_cuda.h"
#include "rows_builder.h"
#include "straight_through_params.h"

namespace gumbel_ext {
namespace cuda {
namespace {

using TwoTensors = std::tuple<at::Tensor, at::Tensor>;

TwoTensors straight_through_softmax_cuda(StraightThroughSoftmax& a) {
  constexpr const char* op = name_of<StraightThroughSoftmax>();
  const auto [y, index] = a.prepare();
  check_tau_on_host(a);
  if (a.logits.numel() == 0) return {y, index.fill_(-1)};
  const c10::cuda::CUDAGuard guard(a.logits.device());
  forward_into(op, Op::kHard, a.logits, 1.0, std::nullopt, a.dim, a.mask, /*random=*/nullptr,
               std::nullopt, y, a.return_index ? OptionalTensor(index) : std::nullopt,
               std::nullopt);
  return {y, index};
}

TwoTensors straight_through_softmax_backward_cuda(StraightThroughSoftmaxBackward& a) {
  constexpr const char* op = name_of<StraightThroughSoftmaxBackward>();
  const auto [grad_logits, grad_tau] = a.prepare();
  if (a.logits.numel() == 0) return {grad_logits, grad_tau.zero_()};
  const c10::cuda::CUDAGuard guard(a.logits.device());
  RowsOutput out(grad_logits, a.dim);
  const at::Tensor of_rows = a.index.contiguous();

  StraightThroughParams p{};
  RowsBuilder builder(p, op, a.logits, a.dim, a.tau, a.tau_tensor);
  builder.add(p.logits, a.logits);
  if (a.mask) builder.add(p.mask, a.mask->expand(a.logits.sizes()));
  builder.add(p.grad, a.grad);
  builder.finish();
  p.index = of_rows.const_data_ptr<int64_t>();
  p.grad_logits = out.data();
  if (a.tau_grad) p.grad_tau = grad_tau.mutable_data_ptr();
  check_launch(op, launch_straight_through_backward(p, current_stream()));
  out.finish();
  return {grad_logits, grad_tau};
}

}  // namespace
}  // namespace cuda
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CUDA, m) {
  using namespace gumbel_ext::cuda;
  using gumbel_ext::implement;
  implement<&straight_through_softmax_cuda>(m);
  implement<&straight_through_softmax_backward_cuda>(m);
}
