// Shapes, dtypes and strides without data: what torch.compile and export see.
#include <torch/library.h>

#include "arguments.h"

namespace gumbel_ext {
namespace {

// A hard sample and its index.
std::tuple<at::Tensor, at::Tensor> empty_sample(const at::Tensor& logits, int64_t dim,
                                                bool return_index) {
  const auto integers = logits.options().dtype(at::kLong);
  return {at::empty_like(logits), return_index
                                      ? at::empty_symint(shape_without(logits, dim), integers)
                                      : at::empty({0}, integers)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> gumbel_softmax_meta(
    const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor, bool /*hard*/,
    int64_t dim, const OptionalTensor& mask, bool return_index,
    std::optional<at::Generator> generator, const OptionalTensor& rng_state,
    at::OptionalSymIntArrayRef positions) {
  constexpr const char* op = "gumbel_softmax";
  dim = check_forward(op, logits, tau, tau_tensor, dim, mask, generator, rng_state, positions);
  const auto integers = logits.options().dtype(at::kLong);
  at::Tensor index = return_index ? at::empty_symint(shape_without(logits, dim), integers)
                                  : at::empty({0}, integers);
  return {at::empty_like(logits), index, at::empty({2}, integers)};
}

at::Tensor gumbel_argmax_meta(const at::Tensor& logits, int64_t dim, bool keepdim,
                              const OptionalTensor& mask, std::optional<at::Generator> generator,
                              const OptionalTensor& rng_state,
                              at::OptionalSymIntArrayRef positions) {
  constexpr const char* op = "gumbel_argmax";
  dim = check_forward(op, logits, 1.0, std::nullopt, dim, mask, generator, rng_state, positions);
  return at::empty_symint(keepdim ? shape_reduced(logits, dim) : shape_without(logits, dim),
                          logits.options().dtype(at::kLong));
}

at::Tensor gumbel_topk_meta(const at::Tensor& logits, c10::SymInt k, int64_t dim,
                            const OptionalTensor& mask, std::optional<at::Generator> generator,
                            const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions) {
  dim = check_topk("gumbel_topk", logits, k, dim, mask, generator, rng_state, positions);
  return at::empty_symint(shape_with(logits, dim, k), logits.options().dtype(at::kLong));
}

at::Tensor gumbel_noise_meta(const at::Tensor& like, c10::SymIntArrayRef size,
                             std::optional<at::Generator> generator,
                             const OptionalTensor& rng_state,
                             at::OptionalSymIntArrayRef positions) {
  check_noise("gumbel_noise", like, size, generator, rng_state, positions);
  return at::empty_symint(size, like.options());
}

at::Tensor draw_rng_state_meta(const at::Tensor& like, std::optional<at::Generator> /*generator*/,
                               const OptionalTensor& /*after*/) {
  return at::empty({2}, like.options().dtype(at::kLong));
}

std::tuple<at::Tensor, at::Tensor> gumbel_softmax_backward_meta(const at::Tensor& grad,
                                                                const at::Tensor& y,
                                                                const at::Tensor& index, double tau,
                                                                const OptionalTensor& tau_tensor,
                                                                int64_t dim, bool tau_grad) {
  constexpr const char* op = "gumbel_softmax_backward";
  dim = check_backward(op, grad, y, index, tau, tau_tensor, dim, std::nullopt, std::nullopt,
                       std::nullopt);
  return {at::empty_like(y), empty_grad_tau(y, dim, tau_grad)};
}

std::tuple<at::Tensor, at::Tensor> gumbel_softmax_hard_backward_meta(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& index, double tau,
    const OptionalTensor& tau_tensor, int64_t dim, const OptionalTensor& mask,
    const at::Tensor& rng_state, bool tau_grad, at::OptionalSymIntArrayRef positions) {
  constexpr const char* op = "gumbel_softmax_hard_backward";
  dim = check_backward(op, grad, logits, index, tau, tau_tensor, dim, mask, rng_state, positions);
  return {at::empty_like(logits), empty_grad_tau(logits, dim, tau_grad)};
}

std::tuple<at::Tensor, at::Tensor> straight_through_softmax_meta(
    const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor, int64_t dim,
    const OptionalTensor& mask, bool return_index) {
  constexpr const char* op = "straight_through_softmax";
  dim = check_forward(op, logits, tau, tau_tensor, dim, mask, std::nullopt, std::nullopt,
                      std::nullopt);
  const auto integers = logits.options().dtype(at::kLong);
  return {at::empty_like(logits), return_index
                                      ? at::empty_symint(shape_without(logits, dim), integers)
                                      : at::empty({0}, integers)};
}

std::tuple<at::Tensor, at::Tensor> straight_through_softmax_backward_meta(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& index, double tau,
    const OptionalTensor& tau_tensor, int64_t dim, const OptionalTensor& mask, bool tau_grad) {
  constexpr const char* op = "straight_through_softmax_backward";
  dim = check_backward(op, grad, logits, index, tau, tau_tensor, dim, mask, std::nullopt,
                       std::nullopt);
  return {at::empty_like(logits), empty_grad_tau(logits, dim, tau_grad)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> gumbel_rao_meta(
    const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor, c10::SymInt k,
    int64_t dim, const OptionalTensor& mask, bool return_index,
    std::optional<at::Generator> generator, const OptionalTensor& rng_state) {
  constexpr const char* op = "gumbel_rao";
  check_conditional_draws(op, k);
  dim = check_forward(op, logits, tau, tau_tensor, dim, mask, generator, rng_state, std::nullopt);
  auto [y, index] = empty_sample(logits, dim, return_index);
  return {y, index, at::empty({2}, logits.options().dtype(at::kLong))};
}

at::Tensor gumbel_rao_backward_meta(const at::Tensor& grad, const at::Tensor& logits,
                                    const at::Tensor& index, double tau,
                                    const OptionalTensor& tau_tensor, c10::SymInt k, int64_t dim,
                                    const OptionalTensor& mask, const at::Tensor& rng_state) {
  constexpr const char* op = "gumbel_rao_backward";
  check_conditional_draws(op, k);
  check_backward(op, grad, logits, index, tau, tau_tensor, dim, mask, rng_state, std::nullopt);
  return at::empty_like(logits);
}

std::tuple<at::Tensor, at::Tensor> zgr_meta(const at::Tensor& logits, int64_t dim,
                                            const OptionalTensor& mask, bool return_index,
                                            std::optional<at::Generator> generator,
                                            const OptionalTensor& rng_state,
                                            at::OptionalSymIntArrayRef positions) {
  dim = check_forward("zgr", logits, 1.0, std::nullopt, dim, mask, generator, rng_state, positions);
  return empty_sample(logits, dim, return_index);
}

at::Tensor zgr_backward_meta(const at::Tensor& grad, const at::Tensor& logits,
                             const at::Tensor& index, int64_t dim, const OptionalTensor& mask) {
  check_backward("zgr_backward", grad, logits, index, 1.0, std::nullopt, dim, mask, std::nullopt,
                 std::nullopt);
  return at::empty_like(logits);
}

std::tuple<at::Tensor, at::Tensor> reinmax_meta(const at::Tensor& logits, double tau,
                                                const OptionalTensor& tau_tensor, int64_t dim,
                                                const OptionalTensor& mask, bool return_index,
                                                std::optional<at::Generator> generator,
                                                const OptionalTensor& rng_state,
                                                at::OptionalSymIntArrayRef positions) {
  dim =
      check_forward("reinmax", logits, tau, tau_tensor, dim, mask, generator, rng_state, positions);
  return empty_sample(logits, dim, return_index);
}

at::Tensor reinmax_backward_meta(const at::Tensor& grad, const at::Tensor& logits,
                                 const at::Tensor& index, double tau,
                                 const OptionalTensor& tau_tensor, int64_t dim,
                                 const OptionalTensor& mask) {
  check_backward("reinmax_backward", grad, logits, index, tau, tau_tensor, dim, mask, std::nullopt,
                 std::nullopt);
  return at::empty_like(logits);
}

std::tuple<at::Tensor, at::Tensor> gapped_straight_through_meta(
    const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor,
    std::optional<double> gap, int64_t dim, const OptionalTensor& mask, bool return_index,
    std::optional<at::Generator> generator, const OptionalTensor& rng_state,
    at::OptionalSymIntArrayRef positions, const OptionalTensor& gap_tensor) {
  constexpr const char* op = "gapped_straight_through";
  check_gap(op, gap, gap_tensor);
  dim = check_forward(op, logits, tau, tau_tensor, dim, mask, generator, rng_state, positions);
  return empty_sample(logits, dim, return_index);
}

at::Tensor gapped_straight_through_backward_meta(const at::Tensor& grad, const at::Tensor& logits,
                                                 const at::Tensor& index, double tau,
                                                 const OptionalTensor& tau_tensor,
                                                 std::optional<double> gap, int64_t dim,
                                                 const OptionalTensor& mask,
                                                 const OptionalTensor& gap_tensor) {
  constexpr const char* op = "gapped_straight_through_backward";
  check_gap(op, gap, gap_tensor);
  check_backward(op, grad, logits, index, tau, tau_tensor, dim, mask, std::nullopt, std::nullopt);
  return at::empty_like(logits);
}

std::tuple<at::Tensor, at::Tensor> soft_argmax_meta(const at::Tensor& logits, double beta,
                                                    const OptionalTensor& beta_tensor, int64_t dim,
                                                    const at::Tensor& positions) {
  dim = check_soft_argmax("soft_argmax", logits, beta, beta_tensor, dim, positions);
  c10::SymDimVector shape = shape_without(logits, dim);
  shape.push_back(positions.sym_size(0));
  const at::Tensor expected =
      at::empty_symint(shape, logits.options().dtype(compute_dtype(logits.scalar_type())));
  shape.back() += 3;
  return {expected, at::empty_symint(shape, logits.options().dtype(at::kDouble))};
}

std::tuple<at::Tensor, at::Tensor> soft_argmax_backward_meta(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& row_state, double beta,
    const OptionalTensor& beta_tensor, int64_t dim, const at::Tensor& positions, bool beta_grad) {
  dim = check_soft_argmax_backward("soft_argmax_backward", grad, logits, row_state, beta,
                                   beta_tensor, dim, positions);
  return {at::empty_like(logits), empty_grad_tau(logits, dim, beta_grad)};
}

}  // namespace
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, Meta, m) {
  using namespace gumbel_ext;
  m.impl("gumbel_softmax", &gumbel_softmax_meta);
  m.impl("gumbel_argmax", &gumbel_argmax_meta);
  m.impl("gumbel_topk", &gumbel_topk_meta);
  m.impl("gumbel_noise", &gumbel_noise_meta);
  m.impl("draw_rng_state", &draw_rng_state_meta);
  m.impl("gumbel_softmax_backward", &gumbel_softmax_backward_meta);
  m.impl("gumbel_softmax_hard_backward", &gumbel_softmax_hard_backward_meta);
  m.impl("straight_through_softmax", &straight_through_softmax_meta);
  m.impl("straight_through_softmax_backward", &straight_through_softmax_backward_meta);
  m.impl("gumbel_rao", &gumbel_rao_meta);
  m.impl("gumbel_rao_backward", &gumbel_rao_backward_meta);
  m.impl("zgr", &zgr_meta);
  m.impl("zgr_backward", &zgr_backward_meta);
  m.impl("reinmax", &reinmax_meta);
  m.impl("reinmax_backward", &reinmax_backward_meta);
  m.impl("gapped_straight_through", &gapped_straight_through_meta);
  m.impl("gapped_straight_through_backward", &gapped_straight_through_backward_meta);
  m.impl("soft_argmax", &soft_argmax_meta);
  m.impl("soft_argmax_backward", &soft_argmax_backward_meta);
}
