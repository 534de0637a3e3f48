// Chunks of rows whose classes are sharded over processes: arguments and results, and the ops in
// PyTorch's own for devices without kernels.
#include "sharded_rows.h"

#include "../cpu/problem.h"

namespace gumbel_ext {
namespace {

c10::SymInt chunks_of(const c10::SymInt& classes) {
  return (classes + (cpu::kChunk - 1)) / cpu::kChunk;
}

// One number a chunk: the shape of t with the classes last, and their chunks in their place.
at::Tensor empty_sums(const at::Tensor& t, int64_t dim) {
  c10::SymDimVector shape = shape_without(t, dim);
  shape.push_back(chunks_of(t.sym_size(dim)));
  return at::empty_symint(shape, t.options().dtype(at::kDouble));
}

}  // namespace

// ---- arguments and results ----------------------------------------------------------------------

void ExponentiateChunks::check() {
  constexpr const char* op = name_of<ExponentiateChunks>();
  check_logits(op, scores);
  TORCH_CHECK_TYPE(scores.scalar_type() == compute_dtype(scores.scalar_type()), op,
                   ": scores must have dtype float32 or float64, got ",
                   c10::toString(scores.scalar_type()));
  TORCH_CHECK_VALUE(scores.dim() > 0, op, ": scores must have a dimension");
  dim = wrapped_dim(op, scores, dim);
  check_tau(op, tau, tau_tensor, scores, dim);
  check_row_values(op, "largest", largest, scores, dim);
}

std::tuple<at::Tensor, at::Tensor> ExponentiateChunks::prepare() {
  check();
  return {at::empty_symint(scores.movedim(dim, -1).sym_sizes(), scores.options()).movedim(-1, dim),
          empty_sums(scores, dim)};
}

void DotChunks::check() {
  constexpr const char* op = name_of<DotChunks>();
  check_logits(op, grad);
  TORCH_CHECK_VALUE(grad.dim() > 0, op, ": grad must have a dimension");
  dim = wrapped_dim(op, grad, dim);
  TORCH_CHECK_VALUE(
      y.sym_sizes() == grad.sym_sizes() && (y.scalar_type() == grad.scalar_type() ||
                                            y.scalar_type() == compute_dtype(grad.scalar_type())),
      op, ": y must have the shape of grad, and its dtype or the one computed in");
  check_row_values(op, "shift", shift, grad, dim);
  if (dot) check_row_values(op, "dot", *dot, grad, dim);
}

at::Tensor DotChunks::prepare() {
  check();
  return empty_sums(grad, dim);
}

namespace {

// ---- in PyTorch's ops ---------------------------------------------------------------------------

// Sums over each chunk of the last dimension, in float64.
at::Tensor chunk_sums(const at::Tensor& terms) {
  const c10::SymInt classes = terms.sym_size(-1), chunks = chunks_of(classes);
  c10::SymDimVector shape(terms.sym_sizes().begin(), terms.sym_sizes().end());
  shape.back() = chunks;
  shape.emplace_back(cpu::kChunk);
  const c10::SymInt padding[] = {0, chunks * cpu::kChunk - classes};
  return at::constant_pad_nd_symint(terms, padding, 0).view_symint(shape).sum(-1).to(at::kDouble);
}

std::tuple<at::Tensor, at::Tensor> exponentiate_chunks(ExponentiateChunks& a) {
  a.check();
  const at::ScalarType type = a.scores.scalar_type();
  at::Tensor distance = a.scores - a.largest.to(type).unsqueeze(a.dim);
  distance = a.tau_tensor ? distance / a.tau_tensor->to(type) : distance / a.tau;
  const at::Tensor e = distance.exp();
  return {e, chunk_sums(e.movedim(a.dim, -1))};
}

at::Tensor dot_chunks(DotChunks& a) {
  a.check();
  const at::ScalarType type = compute_dtype(a.grad.scalar_type());
  const at::Tensor p = a.y.to(type);
  at::Tensor terms = a.grad.to(type) - a.shift.to(type).unsqueeze(a.dim);
  if (a.dot) terms = (terms - a.dot->to(type).unsqueeze(a.dim)) * at::where(p > 0, p.log(), 0);
  return chunk_sums((terms * p).movedim(a.dim, -1));
}

}  // namespace
}  // namespace gumbel_ext

TORCH_LIBRARY_FRAGMENT(gumbel_ext, m) {
  using namespace gumbel_ext;
  define<ExponentiateChunks>(m);
  define<DotChunks>(m);
}

TORCH_LIBRARY_IMPL(gumbel_ext, CompositeExplicitAutograd, m) {
  using namespace gumbel_ext;
  implement<&exponentiate_chunks>(m);
  implement<&dot_chunks>(m);
}
