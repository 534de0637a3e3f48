// A codebook lookup: rows of a codebook chosen by Gumbel-softmax samples, without the samples.
//
//     logits [*A, G * V, *B], codebook [V, D] or [G, V, D]
//     -> out [*A, G * D, *B], index [*A, *B] or [*A, G, *B]
//
// embedding_lookup.cpp walks through the logits in tiles of rows, so that no call needs more than a
// tile besides what it returns; what it asks of a device is in LookupKernels. embedding.cpp has
// what does not depend on the device: arguments, shapes and derivatives.
#pragma once

#include <algorithm>

#include "arguments.h"

namespace gumbel_ext {

inline constexpr const char* kLookup = "gumbel_embedding";
inline constexpr const char* kLookupBackward = "gumbel_embedding_backward";

struct LookupKernels {
  // Rows of the codebook [G, V, D] for codes [N, G], contiguous: [N, G, D]. Code -1 gives zeros,
  // code -2 NaN.
  at::Tensor (*gather)(const at::Tensor& codebook, const at::Tensor& codes);
  // Rows [N, G, D] added up by code: [G, V, D] in the type computed in. Negative codes add nothing.
  // The bits depend on the arguments alone.
  at::Tensor (*sum_by_code)(const at::Tensor& rows, const at::Tensor& codes, int64_t classes);
  // gumbel_softmax_hard_backward, or gumbel_softmax_backward if `from_y`, into `grad_logits`;
  // returns the gradient of tau.
  at::Tensor (*backward_into)(bool from_y, const at::Tensor& grad, const at::Tensor& logits_or_y,
                              const at::Tensor& index, double tau, const OptionalTensor& tau_tensor,
                              int64_t dim, const OptionalTensor& mask, const at::Tensor& rng_state,
                              bool tau_grad, at::OptionalSymIntArrayRef positions,
                              const at::Tensor& grad_logits);
  // The type that products with the codebook are taken in.
  at::ScalarType (*product_type)(at::ScalarType logits, at::ScalarType codebook);
  // Elements of logits in a tile: as many as stay in a cache, but rows enough for the product with
  // the codebook to be a good one, up to a limit.
  int64_t tile, tile_rows, most;

  int64_t rows_of_tile(int64_t classes) const {
    classes = std::max<int64_t>(1, classes);
    return std::max(tile / classes, std::min(tile_rows, most / classes));
  }
};

// The arguments of the op and of its backward; both return `dim` counted from the front.
int64_t check_lookup(const char* op, const at::Tensor& logits, const at::Tensor& weight, double tau,
                     const OptionalTensor& tau_tensor, int64_t dim, const OptionalTensor& mask,
                     const std::optional<at::Generator>& generator, const OptionalTensor& rng_state,
                     at::OptionalSymIntArrayRef positions);
int64_t check_lookup_backward(const at::Tensor& grad, const at::Tensor& logits,
                              const at::Tensor& weight, const at::Tensor& index, double tau,
                              const OptionalTensor& tau_tensor, int64_t dim,
                              const OptionalTensor& mask, const at::Tensor& rng_state,
                              at::OptionalSymIntArrayRef positions);

c10::SymInt lookup_groups(const at::Tensor& weight);
c10::SymDimVector lookup_shape(const at::Tensor& logits, const at::Tensor& weight, int64_t dim);
c10::SymDimVector lookup_index_shape(const at::Tensor& logits, const at::Tensor& weight,
                                     int64_t dim);

// In PyTorch's ops: LookupKernels::gather and ::sum_by_code on any device.
at::Tensor gather_of_ops(const at::Tensor& codebook, const at::Tensor& codes);
at::Tensor sum_by_code_of_ops(const at::Tensor& rows, const at::Tensor& codes, int64_t classes);

// The type computed in of what both are promoted to.
at::ScalarType widest_type(at::ScalarType logits, at::ScalarType codebook);

std::tuple<at::Tensor, at::Tensor, at::Tensor> lookup(
    const LookupKernels& kernels, const at::Tensor& logits, const at::Tensor& weight, double tau,
    const OptionalTensor& tau_tensor, bool hard, int64_t dim, const OptionalTensor& mask,
    const std::optional<at::Generator>& generator, const OptionalTensor& rng_state,
    at::OptionalSymIntArrayRef positions);

std::tuple<at::Tensor, at::Tensor, at::Tensor> lookup_backward(
    const LookupKernels& kernels, const at::Tensor& grad, const at::Tensor& logits,
    const at::Tensor& weight, const at::Tensor& index, double tau, const OptionalTensor& tau_tensor,
    bool hard, int64_t dim, const OptionalTensor& mask, const at::Tensor& rng_state,
    bool logits_grad, bool weight_grad, bool tau_grad, at::OptionalSymIntArrayRef positions);

}  // namespace gumbel_ext
