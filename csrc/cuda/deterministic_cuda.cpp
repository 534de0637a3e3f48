// The CUDA ops of the straight-through softmax and of the soft-argmax: tensors in, launches out.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "backward_into.h"
#include "rows_builder.h"
#include "soft_argmax_params.h"
#include "straight_through_params.h"

namespace gumbel_ext {
namespace cuda {
namespace {

static_assert(kMaxCoordinates == gumbel_ext::kMaxCoordinates, "the ops check what kernels can");

void* current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

// ---- the straight-through softmax ---------------------------------------------------------------

std::tuple<at::Tensor, at::Tensor> straight_through_softmax_cuda(
    const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor, int64_t dim,
    const OptionalTensor& mask, bool return_index) {
  constexpr const char* op = "straight_through_softmax";
  dim = check_forward(op, logits, tau, tau_tensor, dim, mask, std::nullopt, std::nullopt,
                      std::nullopt);
  if (tau_tensor && tau_tensor->is_cpu()) check_tau_values(op, tau_tensor->to(at::kDouble));
  const c10::cuda::CUDAGuard guard(logits.device());
  const auto integers = logits.options().dtype(at::kLong);
  const at::Tensor index = return_index ? at::empty_symint(shape_without(logits, dim), integers)
                                        : at::empty({0}, integers);
  if (logits.numel() == 0) return {at::empty_like(logits), index.fill_(-1)};
  const at::Tensor y = at::empty_like(logits);
  forward_into(op, Op::kHard, logits, 1.0, std::nullopt, dim, mask, /*random=*/nullptr,
               std::nullopt, y, return_index ? OptionalTensor(index) : std::nullopt, std::nullopt);
  return {y, index};
}

std::tuple<at::Tensor, at::Tensor> straight_through_softmax_backward_cuda(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& index, double tau,
    const OptionalTensor& tau_tensor, int64_t dim, const OptionalTensor& mask, bool tau_grad) {
  constexpr const char* op = "straight_through_softmax_backward";
  dim = check_backward(op, grad, logits, index, tau, tau_tensor, dim, mask, std::nullopt,
                       std::nullopt);
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor grad_tau = empty_grad_tau(logits, dim, tau_grad);
  if (logits.numel() == 0) return {at::empty_like(logits), grad_tau.zero_()};
  RowsOutput out(at::empty_like(logits), dim);
  const at::Tensor of_rows = index.contiguous();

  StraightThroughParams p{};
  RowsBuilder builder(p, op, logits, dim, tau, tau_tensor);
  builder.add(p.logits, logits);
  if (mask) builder.add(p.mask, mask->expand(logits.sizes()));
  builder.add(p.grad, grad);
  builder.finish();
  p.index = of_rows.const_data_ptr<int64_t>();
  p.grad_logits = out.data();
  if (tau_grad) p.grad_tau = grad_tau.mutable_data_ptr();
  check_launch(op, launch_straight_through_backward(p, current_stream()));
  out.settle();
  return {out.tensor, grad_tau};
}

// ---- the soft-argmax ----------------------------------------------------------------------------

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

std::tuple<at::Tensor, at::Tensor> soft_argmax_cuda(const at::Tensor& logits, double beta,
                                                    const OptionalTensor& beta_tensor, int64_t dim,
                                                    const at::Tensor& positions) {
  constexpr const char* op = "soft_argmax";
  dim = check_soft_argmax(op, logits, beta, beta_tensor, dim, positions);
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::ScalarType computed = compute_dtype(logits.scalar_type());
  c10::SymDimVector shape = shape_without(logits, dim);
  shape.push_back(positions.size(0));
  const at::Tensor expected = at::empty_symint(shape, logits.options().dtype(computed));
  shape.back() += 3;
  const at::Tensor state = at::empty_symint(shape, logits.options().dtype(at::kDouble));

  SoftArgmaxParams p{};
  RowsBuilder builder(p, op, logits, dim, beta, beta_tensor, &check_beta_values);
  if (logits.numel() == 0) return {expected, state};
  const CentredPositions places(positions, computed);
  builder.add(p.logits, logits);
  builder.finish();
  places.tell(p);
  p.expected = expected.mutable_data_ptr();
  p.state = state.mutable_data_ptr<double>();
  check_launch(op, launch_soft_argmax(p, current_stream()));
  return {expected, state};
}

std::tuple<at::Tensor, at::Tensor> soft_argmax_backward_cuda(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& row_state, double beta,
    const OptionalTensor& beta_tensor, int64_t dim, const at::Tensor& positions, bool beta_grad) {
  constexpr const char* op = "soft_argmax_backward";
  dim = check_soft_argmax_backward(op, grad, logits, row_state, beta, beta_tensor, dim, positions);
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor grad_beta = empty_grad_tau(logits, dim, beta_grad);
  SoftArgmaxParams p{};
  RowsBuilder builder(p, op, logits, dim, beta, beta_tensor, &check_beta_values);
  if (logits.numel() == 0) return {at::empty_like(logits), grad_beta};
  RowsOutput out(at::empty_like(logits), dim);
  const at::Tensor of_rows = grad.contiguous(), state = row_state.contiguous();
  const CentredPositions places(positions, compute_dtype(logits.scalar_type()));
  builder.add(p.logits, logits);
  builder.finish();
  places.tell(p);
  p.state = const_cast<double*>(state.const_data_ptr<double>());
  p.grad = of_rows.const_data_ptr();
  p.grad_logits = out.data();
  if (beta_grad) p.grad_beta = grad_beta.mutable_data_ptr();
  check_launch(op, launch_soft_argmax(p, current_stream()));
  out.settle();
  return {out.tensor, grad_beta};
}

}  // namespace
}  // namespace cuda
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CUDA, m) {
  using namespace gumbel_ext::cuda;
  m.impl("straight_through_softmax", &straight_through_softmax_cuda);
  m.impl("straight_through_softmax_backward", &straight_through_softmax_backward_cuda);
  m.impl("soft_argmax", &soft_argmax_cuda);
  m.impl("soft_argmax_backward", &soft_argmax_backward_cuda);
}
