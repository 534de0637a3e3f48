// What rows whose classes are sharded over processes need besides the fused ops: chunks of them, in
// PyTorch's ops, for devices without kernels of their own. gumbel_ext/_sharded_rows.py says how the
// pieces come together.
#include <torch/library.h>

#include "arguments.h"
#include "cpu/problem.h"

namespace gumbel_ext {
namespace {

// Sums over each chunk of the last dimension, in float64.
at::Tensor chunk_sums(const at::Tensor& terms) {
  const c10::SymInt classes = terms.sym_size(-1),
                    chunks = (classes + (cpu::kChunk - 1)) / cpu::kChunk;
  c10::SymDimVector shape(terms.sym_sizes().begin(), terms.sym_sizes().end());
  shape.back() = chunks;
  shape.emplace_back(cpu::kChunk);
  const c10::SymInt padding[] = {0, chunks * cpu::kChunk - classes};
  return at::constant_pad_nd_symint(terms, padding, 0).view_symint(shape).sum(-1).to(at::kDouble);
}

std::tuple<at::Tensor, at::Tensor> exponentiate_chunks(const at::Tensor& scores,
                                                       const at::Tensor& largest, double tau,
                                                       const OptionalTensor& tau_tensor,
                                                       int64_t dim) {
  dim = check_exponentiate("exponentiate_chunks", scores, largest, tau, tau_tensor, dim);
  at::Tensor distance = scores - largest.to(scores.scalar_type()).unsqueeze(dim);
  distance = tau_tensor ? distance / tau_tensor->to(scores.scalar_type()) : distance / tau;
  const at::Tensor e = distance.exp();
  return {e, chunk_sums(e.movedim(dim, -1))};
}

at::Tensor dot_chunks(const at::Tensor& grad, const at::Tensor& y, const at::Tensor& shift,
                      const OptionalTensor& dot, int64_t dim) {
  dim = check_dot("dot_chunks", grad, y, shift, dot, dim);
  const at::ScalarType type = compute_dtype(grad.scalar_type());
  const at::Tensor p = y.to(type);
  at::Tensor terms = grad.to(type) - shift.to(type).unsqueeze(dim);
  if (dot) terms = (terms - dot->to(type).unsqueeze(dim)) * at::where(p > 0, p.log(), 0);
  return chunk_sums((terms * p).movedim(dim, -1));
}

at::Tensor noise_at_meta(const at::Tensor& like, const at::Tensor& position,
                         const at::Tensor& rng_state) {
  check_noise_at("noise_at", like, position, rng_state);
  return at::empty_symint(position.sym_sizes(), like.options());
}

}  // namespace
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CompositeExplicitAutograd, m) {
  m.impl("exponentiate_chunks", &gumbel_ext::exponentiate_chunks);
  m.impl("dot_chunks", &gumbel_ext::dot_chunks);
}

TORCH_LIBRARY_IMPL(gumbel_ext, Meta, m) { m.impl("noise_at", &gumbel_ext::noise_at_meta); }
