// The expected position on CUDA.
#include <c10/cuda/CUDAGuard.h>

#include "../ops/soft_argmax.h"
#include "rows_builder.h"
#include "soft_argmax_params.h"

namespace gumbel_ext {
namespace cuda {
namespace {

static_assert(kMaxCoordinates == gumbel_ext::kMaxCoordinates, "the ops check what kernels can");

// Around their middle, so that coordinates that are all large lose nothing in float32.
struct CentredPositions {
  at::Tensor middle, centred;

  CentredPositions(const at::Tensor& positions, at::ScalarType type) {
    const at::Tensor exact = positions.detach().to(at::kDouble);
    middle = (exact.amax(1, /*keepdim=*/true) + exact.amin(1, /*keepdim=*/true)).div_(2);
    centred = (exact - middle).to(type).contiguous();
  }
  void tell(SoftArgmaxParams& p) const {
    p.coordinates = static_cast<int>(centred.size(0));
    p.positions = centred.const_data_ptr();
    p.middle = middle.const_data_ptr<double>();
  }
};

using TwoTensors = std::tuple<at::Tensor, at::Tensor>;

TwoTensors soft_argmax_cuda(SoftArgmax& a) {
  const auto [expected, state] = a.prepare();
  const c10::cuda::CUDAGuard guard(a.logits.device());
  SoftArgmaxParams p{};
  RowsBuilder builder(p, name_of<SoftArgmax>(), a.logits, a.dim, a.beta, a.beta_tensor,
                      &check_beta_values);
  if (a.logits.numel() == 0) return {expected, state};
  const CentredPositions places(a.positions, expected.scalar_type());
  builder.add(p.logits, a.logits);
  builder.finish();
  places.tell(p);
  p.expected = expected.mutable_data_ptr();
  p.state = state.mutable_data_ptr<double>();
  check_launch(name_of<SoftArgmax>(), launch_soft_argmax(p, current_stream()));
  return {expected, state};
}

TwoTensors soft_argmax_backward_cuda(SoftArgmaxBackward& a) {
  constexpr const char* op = name_of<SoftArgmaxBackward>();
  const auto [grad_logits, grad_beta] = a.prepare();
  const c10::cuda::CUDAGuard guard(a.logits.device());
  SoftArgmaxParams p{};
  RowsBuilder builder(p, op, a.logits, a.dim, a.beta, a.beta_tensor, &check_beta_values);
  if (a.logits.numel() == 0) return {grad_logits, grad_beta};
  RowsOutput out(grad_logits, a.dim);
  const at::Tensor of_rows = a.grad.contiguous(), state = a.row_state.contiguous();
  const CentredPositions places(a.positions, compute_dtype(a.logits.scalar_type()));
  builder.add(p.logits, a.logits);
  builder.finish();
  places.tell(p);
  p.state = const_cast<double*>(state.const_data_ptr<double>());
  p.grad = of_rows.const_data_ptr();
  p.grad_logits = out.data();
  if (a.beta_grad) p.grad_beta = grad_beta.mutable_data_ptr();
  check_launch(op, launch_soft_argmax(p, current_stream()));
  out.finish();
  return {grad_logits, grad_beta};
}

}  // namespace
}  // namespace cuda
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CUDA, m) {
  using namespace gumbel_ext::cuda;
  using gumbel_ext::implement;
  implement<&soft_argmax_cuda>(m);
  implement<&soft_argmax_backward_cuda>(m);
}
