// The codebook lookup on CUDA: the samples' kernels on tiles, the rest in PyTorch's ops.
#include <c10/cuda/CUDAGuard.h>

#include <limits>

#include "../ops/embedding.h"
#include "gumbel_softmax_cuda.h"

namespace gumbel_ext {
namespace cuda {
namespace {

// Codes as rows of the codebooks of all groups one after the other.
at::Tensor flat_codes(const at::Tensor& codes, int64_t classes) {
  const at::Tensor group = at::arange(codes.size(1), codes.options());
  return (codes.clamp_min(0) + group * classes).view({-1});
}

at::Tensor gather(const at::Tensor& codebook, const at::Tensor& codes) {
  const int64_t groups = codebook.size(0), classes = codebook.size(1), width = codebook.size(2);
  const at::Tensor rows = codebook.reshape({groups * classes, width})
                              .index_select(0, flat_codes(codes, classes))
                              .view({codes.size(0), groups, width});
  const at::Tensor filling =
      at::where(codes.eq(-2), std::numeric_limits<double>::quiet_NaN(), 0.0).to(rows.scalar_type());
  return at::where(codes.lt(0).unsqueeze(-1), filling.unsqueeze(-1), rows);
}

// index_put_ with accumulate sorts on CUDA, and is deterministic there whatever the mode;
// index_add_ is not, nor the backward of embedding since it has a path with atomics.
at::Tensor sum_by_code(const at::Tensor& rows, const at::Tensor& codes, int64_t classes) {
  const int64_t groups = rows.size(1), width = rows.size(2);
  at::Tensor sums = at::zeros({groups * classes, width}, rows.options());
  const at::Tensor counted = rows.masked_fill(codes.lt(0).unsqueeze(-1), 0);
  sums.index_put_({flat_codes(codes, classes)}, counted.reshape({codes.numel(), width}),
                  /*accumulate=*/true);
  return sums.view({groups, classes, width});
}

at::Tensor tile_backward(bool from_y, const GumbelSoftmaxHardBackward& a,
                         const at::Tensor& grad_logits) {
  const at::Tensor grad_tau = empty_grad_tau(a.logits, a.dim, a.tau_grad);
  backward_into(name_of<GumbelEmbeddingBackward>(), from_y ? Op::kBackward : Op::kBackwardRecompute,
                a, grad_logits, grad_tau);
  return grad_tau;
}

// The tensor cores take 16-bit codebooks as they are and add up in float32; their results are
// rounded to 16 bits, as they are in a product with the sample.
at::ScalarType product_type(at::ScalarType logits, at::ScalarType codebook) {
  const bool narrow = codebook == at::kHalf || codebook == at::kBFloat16;
  return narrow && logits != at::kDouble ? codebook
                                         : compute_dtype(at::promote_types(logits, codebook));
}

// Tiles that fill the device.
constexpr LookupKernels kKernels{&gather,        &sum_by_code,  &draw_state,      &sample, &argmax,
                                 &tile_backward, &product_type, int64_t{1} << 24, 1,       1};

GumbelEmbedding::Result gumbel_embedding_cuda(GumbelEmbedding& a) {
  const c10::cuda::CUDAGuard guard(a.logits.device());
  return lookup(kKernels, a);
}

GumbelEmbeddingBackward::Result gumbel_embedding_backward_cuda(GumbelEmbeddingBackward& a) {
  const c10::cuda::CUDAGuard guard(a.logits.device());
  return lookup_backward(kKernels, a);
}

}  // namespace
}  // namespace cuda
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CUDA, m) {
  using namespace gumbel_ext::cuda;
  using gumbel_ext::implement;
  implement<&gumbel_embedding_cuda>(m);
  implement<&gumbel_embedding_backward_cuda>(m);
}
