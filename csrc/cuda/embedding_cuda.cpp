// The codebook lookup on CUDA: the samples' kernels on tiles, the rest in PyTorch's ops.
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "../embedding.h"
#include "backward_into.h"

namespace gumbel_ext {
namespace cuda {
namespace {

at::Tensor tile_backward(bool from_y, const at::Tensor& grad, const at::Tensor& logits_or_y,
                         const at::Tensor& index, double tau, const OptionalTensor& tau_tensor,
                         int64_t dim, const OptionalTensor& mask, const at::Tensor& rng_state,
                         bool tau_grad, at::OptionalSymIntArrayRef positions,
                         const at::Tensor& grad_logits) {
  return backward_into("gumbel_embedding_backward", from_y ? Op::kBackward : Op::kBackwardRecompute,
                       grad, logits_or_y, index, tau, tau_tensor, dim, mask,
                       from_y ? std::nullopt : OptionalTensor(rng_state), tau_grad,
                       from_y ? std::nullopt : positions, grad_logits);
}

// The tensor cores take 16-bit codebooks as they are and add up in float32; their results are
// rounded to 16 bits, as they are in a product with the sample.
at::ScalarType product_type(at::ScalarType logits, at::ScalarType codebook) {
  const bool narrow = codebook == at::kHalf || codebook == at::kBFloat16;
  return narrow && logits != at::kDouble ? codebook
                                         : compute_dtype(at::promote_types(logits, codebook));
}

// Tiles that fill the device.
constexpr LookupKernels kKernels{
    &gather_of_ops, &sum_by_code_of_ops, &tile_backward, &product_type, int64_t{1} << 24, 1, 1};

std::tuple<at::Tensor, at::Tensor, at::Tensor> gumbel_embedding_cuda(
    const at::Tensor& logits, const at::Tensor& weight, double tau,
    const OptionalTensor& tau_tensor, bool hard, int64_t dim, const OptionalTensor& mask,
    std::optional<at::Generator> generator, const OptionalTensor& rng_state,
    at::OptionalSymIntArrayRef positions) {
  const c10::cuda::CUDAGuard guard(logits.device());
  return lookup(kKernels, logits, weight, tau, tau_tensor, hard, dim, mask, generator, rng_state,
                positions);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> gumbel_embedding_backward_cuda(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& weight,
    const at::Tensor& index, double tau, const OptionalTensor& tau_tensor, bool hard, int64_t dim,
    const OptionalTensor& mask, const at::Tensor& rng_state, bool logits_grad, bool weight_grad,
    bool tau_grad, at::OptionalSymIntArrayRef positions) {
  const c10::cuda::CUDAGuard guard(logits.device());
  return lookup_backward(kKernels, grad, logits, weight, index, tau, tau_tensor, hard, dim, mask,
                         rng_state, logits_grad, weight_grad, tau_grad, positions);
}

}  // namespace
}  // namespace cuda
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CUDA, m) {
  m.impl("gumbel_embedding", &gumbel_ext::cuda::gumbel_embedding_cuda);
  m.impl("gumbel_embedding_backward", &gumbel_ext::cuda::gumbel_embedding_backward_cuda);
}
