// A codebook lookup: rows of a codebook chosen by Gumbel-softmax samples, without the samples.
//
//     logits [*A, G * V, *B], codebook [V, D] or [G, V, D]
//     -> out [*A, G * D, *B], index [*A, *B] or [*A, G, *B]
//
// embedding_lookup.cpp walks through the logits in tiles of rows, so that no call needs more than a
// tile besides what it returns; what it asks of a device is in LookupKernels.
#pragma once

#include <algorithm>

#include "gumbel_softmax.h"

namespace gumbel_ext {

struct GumbelEmbedding {
  static constexpr const char* schema =
      "gumbel_embedding(Tensor logits, Tensor weight, float tau, Tensor? tau_tensor, bool hard, "
      "int dim, Tensor? mask, Generator? generator, Tensor? rng_state, SymInt[]? positions=None) "
      "-> (Tensor out, Tensor index, Tensor used_rng_state)";
  static constexpr bool draws = true;
  static constexpr Autocast autocast = Autocast::kNone;
  using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
  void check();
  Result prepare();

  at::Tensor logits, weight;
  double tau;
  OptionalTensor tau_tensor;
  bool hard;
  int64_t dim;
  OptionalTensor mask;
  std::optional<at::Generator> generator;
  OptionalTensor rng_state;
  at::OptionalSymIntArrayRef positions;
};

// Gradients that are not wanted are empty.
struct GumbelEmbeddingBackward {
  static constexpr const char* schema =
      "gumbel_embedding_backward(Tensor grad, Tensor logits, Tensor weight, Tensor index, "
      "float tau, Tensor? tau_tensor, bool hard, int dim, Tensor? mask, Tensor rng_state, "
      "bool logits_grad, bool weight_grad, bool tau_grad, SymInt[]? positions=None) "
      "-> (Tensor grad_logits, Tensor grad_weight, Tensor grad_tau)";
  static constexpr bool draws = false;
  static constexpr Autocast autocast = Autocast::kNone;
  using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
  void check();
  Result prepare();

  at::Tensor grad, logits, weight, index;
  double tau;
  OptionalTensor tau_tensor;
  bool hard;
  int64_t dim;
  OptionalTensor mask;
  at::Tensor rng_state;
  bool logits_grad, weight_grad, tau_grad;
  at::OptionalSymIntArrayRef positions;
};

struct LookupKernels {
  // Rows of the codebook [G, V, D] for codes [N, G], contiguous: [N, G, D]. Code -1 gives zeros,
  // code -2 NaN.
  at::Tensor (*gather)(const at::Tensor& codebook, const at::Tensor& codes);
  // Rows [N, G, D] added up by code: [G, V, D] in the accumulate type. Negative codes add nothing.
  // The bits depend on the arguments alone.
  at::Tensor (*sum_by_code)(const at::Tensor& rows, const at::Tensor& codes, int64_t classes);
  // The rng_state of a call, on the device of logits.
  at::Tensor (*draw_rng_state)(const at::Tensor& logits,
                               const std::optional<at::Generator>& generator);
  // Ops on arguments that need no check.
  GumbelSoftmax::Result (*sample)(const GumbelSoftmax& a);
  at::Tensor (*argmax)(const GumbelArgmax& a);
  // The backward of a sample into `grad_logits`; returns the gradient of tau. `from_y`: a.logits is
  // y, and the state is not read.
  at::Tensor (*backward_into)(bool from_y, const GumbelSoftmaxHardBackward& a,
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

// The compute type of what both are promoted to.
at::ScalarType widest_type(at::ScalarType logits, at::ScalarType codebook);

// The ops by the kernels of a device.
GumbelEmbedding::Result lookup(const LookupKernels& kernels, GumbelEmbedding& a);
GumbelEmbeddingBackward::Result lookup_backward(const LookupKernels& kernels,
                                                GumbelEmbeddingBackward& a);

}  // namespace gumbel_ext
