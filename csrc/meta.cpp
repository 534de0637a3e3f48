// Shapes, dtypes and strides without data: what torch.compile and export see.
#include <torch/library.h>

#include "arguments.h"

namespace gumbel_ext {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> gumbel_softmax_meta(
    const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor, bool /*hard*/,
    int64_t dim, const OptionalTensor& mask, bool return_index,
    std::optional<at::Generator> generator, const OptionalTensor& rng_state) {
  constexpr const char* op = "gumbel_softmax";
  check_logits(op, logits);
  dim = wrapped_dim(op, logits, dim);
  check_tau(op, tau, tau_tensor, logits, dim);
  check_mask(op, mask, logits);
  check_randomness(op, logits, generator, rng_state);
  const auto integers = logits.options().dtype(at::kLong);
  at::Tensor index = return_index ? at::empty_symint(shape_without(logits, dim), integers)
                                  : at::empty({0}, integers);
  return {at::empty_like(logits), index, at::empty({2}, integers)};
}

at::Tensor gumbel_argmax_meta(const at::Tensor& logits, int64_t dim, bool keepdim,
                              const OptionalTensor& mask, std::optional<at::Generator> generator,
                              const OptionalTensor& rng_state) {
  constexpr const char* op = "gumbel_argmax";
  check_logits(op, logits);
  dim = wrapped_dim(op, logits, dim);
  check_mask(op, mask, logits);
  check_randomness(op, logits, generator, rng_state);
  return at::empty_symint(keepdim ? shape_reduced(logits, dim) : shape_without(logits, dim),
                          logits.options().dtype(at::kLong));
}

at::Tensor gumbel_noise_meta(const at::Tensor& like, c10::SymIntArrayRef size,
                             std::optional<at::Generator> generator,
                             const OptionalTensor& rng_state) {
  check_logits("gumbel_noise", like);
  check_randomness("gumbel_noise", like, generator, rng_state);
  return at::empty_symint(size, like.options());
}

at::Tensor grad_tau_like(const at::Tensor& logits, int64_t dim, bool tau_grad) {
  const auto options = logits.options().dtype(compute_dtype(logits.scalar_type()));
  return tau_grad ? at::empty_symint(shape_reduced(logits, dim), options) : at::empty({0}, options);
}

std::tuple<at::Tensor, at::Tensor> gumbel_softmax_backward_meta(const at::Tensor& grad,
                                                                const at::Tensor& y,
                                                                const at::Tensor& index, double tau,
                                                                const OptionalTensor& tau_tensor,
                                                                int64_t dim, bool tau_grad) {
  constexpr const char* op = "gumbel_softmax_backward";
  check_logits(op, y);
  dim = wrapped_dim(op, y, dim);
  check_tau(op, tau, tau_tensor, y, dim);
  check_grad(op, grad, y);
  check_index(op, index, y, dim);
  return {at::empty_like(y), grad_tau_like(y, dim, tau_grad)};
}

std::tuple<at::Tensor, at::Tensor> gumbel_softmax_hard_backward_meta(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& index, double tau,
    const OptionalTensor& tau_tensor, int64_t dim, const OptionalTensor& mask,
    const at::Tensor& rng_state, bool tau_grad) {
  constexpr const char* op = "gumbel_softmax_hard_backward";
  check_logits(op, logits);
  dim = wrapped_dim(op, logits, dim);
  check_tau(op, tau, tau_tensor, logits, dim);
  check_mask(op, mask, logits);
  check_randomness(op, logits, std::nullopt, rng_state);
  check_grad(op, grad, logits);
  check_index(op, index, logits, dim);
  return {at::empty_like(logits), grad_tau_like(logits, dim, tau_grad)};
}

}  // namespace
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, Meta, m) {
  using namespace gumbel_ext;
  m.impl("gumbel_softmax", &gumbel_softmax_meta);
  m.impl("gumbel_argmax", &gumbel_argmax_meta);
  m.impl("gumbel_noise", &gumbel_noise_meta);
  m.impl("gumbel_softmax_backward", &gumbel_softmax_backward_meta);
  m.impl("gumbel_softmax_hard_backward", &gumbel_softmax_hard_backward_meta);
}
