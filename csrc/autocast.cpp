// What torch.autocast does to the operators: what it does to softmax.
//
// On CUDA softmax is on the list of operations that compute in float32 and return it. On the CPU it
// is on no list and keeps its dtype; there, and for indices and noise everywhere, the fallthrough
// that PyTorch registers for every operator is right.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "arguments.h"
#include "gumbel_ext.h"

namespace gumbel_ext {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> gumbel_softmax_autocast_cuda(
    const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor, bool hard, int64_t dim,
    const OptionalTensor& mask, bool return_index, std::optional<at::Generator> generator,
    const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
  // Above autograd, so that the gradient comes back in the dtype of the logits.
  return gumbel_softmax(at::autocast::cached_cast(at::kFloat, logits, at::kCUDA), tau, tau_tensor,
                        hard, dim, mask, return_index, generator, rng_state, positions);
}

// Likewise log_softmax. The density computes in float32 and returns it anyway.
std::tuple<at::Tensor, at::Tensor> gumbel_log_softmax_autocast_cuda(
    const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor, int64_t dim,
    const OptionalTensor& mask, std::optional<at::Generator> generator,
    const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
  return gumbel_log_softmax(at::autocast::cached_cast(at::kFloat, logits, at::kCUDA), tau,
                            tau_tensor, dim, mask, generator, rng_state, positions);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> gumbel_rao_autocast_cuda(
    const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor, c10::SymInt k,
    int64_t dim, const OptionalTensor& mask, bool return_index,
    std::optional<at::Generator> generator, const OptionalTensor& rng_state) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
  return gumbel_rao(at::autocast::cached_cast(at::kFloat, logits, at::kCUDA), tau, tau_tensor,
                    std::move(k), dim, mask, return_index, generator, rng_state);
}

std::tuple<at::Tensor, at::Tensor> zgr_autocast_cuda(const at::Tensor& logits, int64_t dim,
                                                     const OptionalTensor& mask, bool return_index,
                                                     std::optional<at::Generator> generator,
                                                     const OptionalTensor& rng_state,
                                                     at::OptionalSymIntArrayRef positions) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
  return zgr(at::autocast::cached_cast(at::kFloat, logits, at::kCUDA), dim, mask, return_index,
             generator, rng_state, positions);
}

std::tuple<at::Tensor, at::Tensor> reinmax_autocast_cuda(
    const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor, int64_t dim,
    const OptionalTensor& mask, bool return_index, std::optional<at::Generator> generator,
    const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
  return reinmax(at::autocast::cached_cast(at::kFloat, logits, at::kCUDA), tau, tau_tensor, dim,
                 mask, return_index, generator, rng_state, positions);
}

std::tuple<at::Tensor, at::Tensor> gapped_straight_through_autocast_cuda(
    const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor,
    std::optional<double> gap, int64_t dim, const OptionalTensor& mask, bool return_index,
    std::optional<at::Generator> generator, const OptionalTensor& rng_state,
    at::OptionalSymIntArrayRef positions, const OptionalTensor& gap_tensor) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
  return gapped_straight_through(at::autocast::cached_cast(at::kFloat, logits, at::kCUDA), tau,
                                 tau_tensor, gap, dim, mask, return_index, generator, rng_state,
                                 positions, gap_tensor);
}

std::tuple<at::Tensor, at::Tensor> straight_through_softmax_autocast_cuda(
    const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor, int64_t dim,
    const OptionalTensor& mask, bool return_index) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
  return straight_through_softmax(at::autocast::cached_cast(at::kFloat, logits, at::kCUDA), tau,
                                  tau_tensor, dim, mask, return_index);
}

}  // namespace
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, AutocastCUDA, m) {
  m.impl("gumbel_softmax", &gumbel_ext::gumbel_softmax_autocast_cuda);
  m.impl("gumbel_log_softmax", &gumbel_ext::gumbel_log_softmax_autocast_cuda);
  m.impl("gumbel_rao", &gumbel_ext::gumbel_rao_autocast_cuda);
  m.impl("zgr", &gumbel_ext::zgr_autocast_cuda);
  m.impl("reinmax", &gumbel_ext::reinmax_autocast_cuda);
  m.impl("gapped_straight_through", &gumbel_ext::gapped_straight_through_autocast_cuda);
  m.impl("straight_through_softmax", &gumbel_ext::straight_through_softmax_autocast_cuda);
}
