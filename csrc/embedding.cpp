// The codebook lookup on any device: arguments, shapes and derivatives.
#include "embedding.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <limits>

#include "autograd_levels.h"
#include "embedding_tiles.h"
#include "gumbel_ext.h"

namespace gumbel_ext {

int64_t check_lookup(const char* op, const at::Tensor& logits, const at::Tensor& weight, double tau,
                     const OptionalTensor& tau_tensor, int64_t dim, const OptionalTensor& mask,
                     const std::optional<at::Generator>& generator, const OptionalTensor& rng_state,
                     at::OptionalSymIntArrayRef positions) {
  dim = check_forward(op, logits, tau, tau_tensor, dim, mask, generator, rng_state, positions);
  TORCH_CHECK_VALUE(logits.dim() > 0, op, ": logits must have a dimension, got shape []");
  const at::ScalarType type = weight.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, op,
      ": weight must have dtype float16, bfloat16, float32 or float64, got ", c10::toString(type));
  TORCH_CHECK_TYPE(weight.layout() == at::kStrided, op,
                   ": weight must be a dense (strided) tensor, got layout ", weight.layout());
  TORCH_CHECK_VALUE(weight.device() == logits.device(), op,
                    ": weight must be on the device of logits (", logits.device(), "), got ",
                    weight.device());
  TORCH_CHECK_VALUE(weight.dim() == 2 || weight.dim() == 3, op,
                    ": weight must be of shape [classes, D] or [groups, classes of a group, D], "
                    "got shape ",
                    weight.sym_sizes());
  const c10::SymInt classes =
      weight.dim() == 2 ? weight.sym_size(0) : weight.sym_size(0) * weight.sym_size(1);
  TORCH_CHECK_VALUE(classes == logits.sym_size(dim), op, ": weight must have ",
                    logits.sym_size(dim), " rows, one for each class of logits along dim ", dim,
                    ", got ", classes, " in shape ", weight.sym_sizes());
  return dim;
}

c10::SymInt lookup_groups(const at::Tensor& weight) {
  return weight.dim() == 3 ? weight.sym_size(0) : c10::SymInt(1);
}

c10::SymDimVector lookup_shape(const at::Tensor& logits, const at::Tensor& weight, int64_t dim) {
  return shape_with(logits, dim, lookup_groups(weight) * weight.sym_size(-1));
}

c10::SymDimVector lookup_index_shape(const at::Tensor& logits, const at::Tensor& weight,
                                     int64_t dim) {
  return weight.dim() == 3 ? shape_with(logits, dim, weight.sym_size(0))
                           : shape_without(logits, dim);
}

int64_t check_lookup_backward(const at::Tensor& grad, const at::Tensor& logits,
                              const at::Tensor& weight, const at::Tensor& index, double tau,
                              const OptionalTensor& tau_tensor, int64_t dim,
                              const OptionalTensor& mask, const at::Tensor& rng_state,
                              at::OptionalSymIntArrayRef positions) {
  dim = check_lookup(kLookupBackward, logits, weight, tau, tau_tensor, dim, mask, std::nullopt,
                     rng_state, positions);
  const c10::SymDimVector shape = lookup_shape(logits, weight, dim),
                          of_index = lookup_index_shape(logits, weight, dim);
  TORCH_CHECK_TYPE(grad.scalar_type() == weight.scalar_type(), kLookupBackward,
                   ": grad must have dtype ", c10::toString(weight.scalar_type()), ", got ",
                   c10::toString(grad.scalar_type()));
  TORCH_CHECK_VALUE(
      grad.sym_sizes() == c10::SymIntArrayRef(shape) && grad.device() == logits.device(),
      kLookupBackward, ": grad must have shape ", c10::SymIntArrayRef(shape), " on ",
      logits.device(), ", got ", grad.sym_sizes(), " on ", grad.device());
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, kLookupBackward,
                   ": index must have dtype int64, got ", c10::toString(index.scalar_type()));
  TORCH_CHECK_VALUE(index.sym_sizes() == c10::SymIntArrayRef(of_index), kLookupBackward,
                    ": index must have shape ", c10::SymIntArrayRef(of_index), ", got ",
                    index.sym_sizes());
  return dim;
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Lookup = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Lookup gumbel_embedding_meta(const at::Tensor& logits, const at::Tensor& weight, double tau,
                             const OptionalTensor& tau_tensor, bool /*hard*/, int64_t dim,
                             const OptionalTensor& mask, std::optional<at::Generator> generator,
                             const OptionalTensor& rng_state,
                             at::OptionalSymIntArrayRef positions) {
  dim = check_lookup(kLookup, logits, weight, tau, tau_tensor, dim, mask, generator, rng_state,
                     positions);
  const auto integers = logits.options().dtype(at::kLong);
  return {at::empty_symint(lookup_shape(logits, weight, dim), weight.options()),
          at::empty_symint(lookup_index_shape(logits, weight, dim), integers),
          at::empty({2}, integers)};
}

Lookup gumbel_embedding_backward_meta(const at::Tensor& grad, const at::Tensor& logits,
                                      const at::Tensor& weight, const at::Tensor& index, double tau,
                                      const OptionalTensor& tau_tensor, bool /*hard*/, int64_t dim,
                                      const OptionalTensor& mask, const at::Tensor& rng_state,
                                      bool logits_grad, bool weight_grad, bool tau_grad,
                                      at::OptionalSymIntArrayRef positions) {
  dim = check_lookup_backward(grad, logits, weight, index, tau, tau_tensor, dim, mask, rng_state,
                              positions);
  const auto of_tau = logits.options().dtype(compute_dtype(logits.scalar_type()));
  return {logits_grad ? at::empty_like(logits) : at::empty({0}, logits.options()),
          weight_grad ? at::empty_symint(weight.sym_sizes(), weight.options())
                      : at::empty({0}, weight.options()),
          tau_grad ? at::empty_symint(shape_with(logits, dim, lookup_groups(weight)), of_tau)
                   : at::empty({0}, of_tau)};
}

Lookup gumbel_embedding(const at::Tensor& logits, const at::Tensor& weight, double tau,
                        const OptionalTensor& tau_tensor, bool hard, int64_t dim,
                        const OptionalTensor& mask, const std::optional<at::Generator>& generator,
                        const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions) {
  using Function = Lookup(const at::Tensor&, const at::Tensor&, double, const OptionalTensor&, bool,
                          int64_t, const OptionalTensor&, std::optional<at::Generator>,
                          const OptionalTensor&, at::OptionalSymIntArrayRef);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gumbel_ext::gumbel_embedding", "")
                             .typed<Function>();
  return op.call(logits, weight, tau, tau_tensor, hard, dim, mask, generator, rng_state, positions);
}

Lookup gumbel_embedding_backward(const at::Tensor& grad, const at::Tensor& logits,
                                 const at::Tensor& weight, const at::Tensor& index, double tau,
                                 const OptionalTensor& tau_tensor, bool hard, int64_t dim,
                                 const OptionalTensor& mask, const at::Tensor& rng_state,
                                 bool logits_grad, bool weight_grad, bool tau_grad,
                                 at::OptionalSymIntArrayRef positions) {
  using Function =
      Lookup(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, double,
             const OptionalTensor&, bool, int64_t, const OptionalTensor&, const at::Tensor&, bool,
             bool, bool, at::OptionalSymIntArrayRef);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gumbel_ext::gumbel_embedding_backward", "")
                             .typed<Function>();
  return op.call(grad, logits, weight, index, tau, tau_tensor, hard, dim, mask, rng_state,
                 logits_grad, weight_grad, tau_grad, positions);
}

// [*A, G, X, *B] <-> [G, rows, X]
at::Tensor rows_of_groups(const at::Tensor& t, int64_t dim) {
  const at::Tensor last = t.movedim(at::IntArrayRef{dim, dim + 1}, {0, -1});
  const c10::SymInt rows = c10::multiply_integers(last.sym_sizes().slice(1, last.dim() - 2));
  const c10::SymInt shape[] = {last.sym_size(0), rows, last.sym_size(-1)};
  return last.reshape_symint(shape);
}

at::Tensor from_rows_of_groups(const at::Tensor& rows, const at::Tensor& like, int64_t dim) {
  c10::SymDimVector shape{rows.sym_size(0)};
  for (int64_t d = 0; d < like.dim(); ++d) {
    if (d != dim && d != dim + 1) shape.push_back(like.sym_size(d));
  }
  shape.push_back(rows.sym_size(2));
  return rows.reshape_symint(shape).movedim(at::IntArrayRef{0, -1}, {dim, dim + 1});
}

// The products with the sample itself, differentiable any number of times.
Lookup lookup_of_sample(const at::Tensor& logits, const at::Tensor& weight, double tau,
                        const OptionalTensor& tau_tensor, bool hard, int64_t dim,
                        const OptionalTensor& mask, const std::optional<at::Generator>& generator,
                        const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions) {
  dim = check_lookup(kLookup, logits, weight, tau, tau_tensor, dim, mask, generator, rng_state,
                     positions);
  const Grouped call(logits, weight, tau_tensor, dim, mask, positions);
  const at::ScalarType type = widest_type(logits.scalar_type(), weight.scalar_type());
  const auto [y, index, state] =
      gumbel_softmax(call.logits.to(type), tau, call.tau, hard, dim + 1, call.mask,
                     /*return_index=*/true, generator, rng_state, call.given_positions());
  const at::Tensor rows = at::bmm(rows_of_groups(y, dim), call.weight.to(type));
  const at::Tensor out =
      from_rows_of_groups(rows, y, dim).reshape_symint(lookup_shape(logits, weight, dim));
  return {out.to(weight.scalar_type()), call.has_groups ? index : index.squeeze(dim), state};
}

Lookup backward_of_sample(const at::Tensor& grad, const at::Tensor& logits,
                          const at::Tensor& weight, const at::Tensor& index, double tau,
                          const OptionalTensor& tau_tensor, bool hard, int64_t dim,
                          const OptionalTensor& mask, const at::Tensor& rng_state, bool logits_grad,
                          bool weight_grad, bool tau_grad, at::OptionalSymIntArrayRef positions) {
  dim = check_lookup_backward(grad, logits, weight, index, tau, tau_tensor, dim, mask, rng_state,
                              positions);
  const Grouped call(logits, weight, tau_tensor, dim, mask, positions);
  const at::ScalarType type = widest_type(logits.scalar_type(), weight.scalar_type());
  const at::Tensor dout = rows_of_groups(call.grouped(grad), dim).to(type),
                   z = call.logits.to(type);
  at::Tensor of_logits = at::empty({0}, logits.options()),
             of_weight = at::empty({0}, weight.options()),
             of_tau = at::empty({0}, logits.options().dtype(compute_dtype(logits.scalar_type())));
  if (logits_grad || tau_grad) {
    const at::Tensor dy =
        from_rows_of_groups(at::bmm(dout, call.weight.to(type).transpose(1, 2)), z, dim);
    const auto [dz, dtau] =
        gumbel_softmax_hard_backward(dy, z, call.grouped_index(index), tau, call.tau, dim + 1,
                                     call.mask, rng_state, tau_grad, call.given_positions());
    if (logits_grad) of_logits = dz.to(logits.scalar_type()).reshape_symint(logits.sym_sizes());
    if (tau_grad) of_tau = dtau.squeeze(dim + 1).to(of_tau.scalar_type());
  }
  if (weight_grad) {
    const at::Tensor y = std::get<0>(gumbel_softmax(z, tau, call.tau, hard, dim + 1, call.mask,
                                                    /*return_index=*/false, std::nullopt, rng_state,
                                                    call.given_positions()));
    of_weight = at::bmm(rows_of_groups(y, dim).transpose(1, 2), dout)
                    .to(weight.scalar_type())
                    .reshape_symint(weight.sym_sizes());
  }
  return {of_logits, of_weight, of_tau};
}

class GumbelEmbedding : public torch::autograd::Function<GumbelEmbedding> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& logits,
                               const at::Tensor& weight, double tau,
                               const OptionalTensor& tau_tensor, bool hard, int64_t dim,
                               const OptionalTensor& mask,
                               const std::optional<at::Generator>& generator,
                               const OptionalTensor& rng_state,
                               at::OptionalSymIntArrayRef positions) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [out, index, state] = gumbel_embedding(logits, weight, tau, tau_tensor, hard, dim, mask,
                                                generator, rng_state, positions);
    ctx->mark_non_differentiable({index, state});
    ctx->set_materialize_grads(false);
    ctx->saved_data["tau"] = tau;
    ctx->saved_data["hard"] = hard;
    ctx->saved_data["dim"] = dim < 0 ? dim + logits.dim() : dim;
    if (positions) ctx->saved_data["positions"] = *positions;
    ctx->saved_data["tau_grad"] = requires_grad(tau_tensor);
    // The sample is recomputed from the noise. The codebook is saved as it is, as in the product
    // that this stands for.
    ctx->save_for_backward({logits, weight, index, state, tau_tensor.value_or(at::Tensor()),
                            mask.value_or(at::Tensor())});
    return {out, index, state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list out(10);
    if (!grads[0].defined()) return out;
    const variable_list saved = unchanged("gumbel_embedding", "logits, weight, tau or mask",
                                          [&] { return ctx->get_saved_variables(); });
    const bool logits_grad = ctx->needs_input_grad(0), weight_grad = ctx->needs_input_grad(1),
               tau_grad = ctx->saved_data["tau_grad"].toBool();
    std::vector<c10::SymInt> positions_saved;
    at::OptionalSymIntArrayRef positions;
    if (ctx->saved_data.count("positions") > 0) {
      positions_saved = ctx->saved_data["positions"].toSymIntVector();
      positions = positions_saved;
    }
    const auto [of_logits, of_weight, of_tau] = gumbel_embedding_backward(
        grads[0], saved[0], saved[1], saved[2], ctx->saved_data["tau"].toDouble(),
        optional(saved[4]), ctx->saved_data["hard"].toBool(), ctx->saved_data["dim"].toInt(),
        optional(saved[5]), saved[3], logits_grad, weight_grad, tau_grad, positions);
    if (logits_grad) out[0] = of_logits;
    if (weight_grad) out[1] = of_weight;
    if (tau_grad) out[3] = reduced_to(of_tau, saved[4]);
    return out;
  }
};

Lookup gumbel_embedding_autograd(const at::Tensor& logits, const at::Tensor& weight, double tau,
                                 const OptionalTensor& tau_tensor, bool hard, int64_t dim,
                                 const OptionalTensor& mask, std::optional<at::Generator> generator,
                                 const OptionalTensor& rng_state,
                                 at::OptionalSymIntArrayRef positions) {
  const bool recorded = records(logits, weight, tau_tensor),
             tangent = has_tangent(logits, weight, tau_tensor);
  if (!recorded && !tangent) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return gumbel_embedding(logits, weight, tau, tau_tensor, hard, dim, mask, generator, rng_state,
                            positions);
  }
  if (tangent || under_transform()) {
    // Under a transform the sample is not recomputed from the noise: below this level a vmap may
    // give each example its own, which the one state that was drawn does not tell.
    return lookup_of_sample(logits, weight, tau, tau_tensor, hard, dim, mask, generator, rng_state,
                            positions);
  }
  const variable_list out =
      GumbelEmbedding::apply(unchanging(logits), weight, tau, unchanging(tau_tensor), hard, dim,
                             mask, generator, rng_state, positions);
  return {out[0], out[1], out[2]};
}

Lookup gumbel_embedding_backward_autograd(const at::Tensor& grad, const at::Tensor& logits,
                                          const at::Tensor& weight, const at::Tensor& index,
                                          double tau, const OptionalTensor& tau_tensor, bool hard,
                                          int64_t dim, const OptionalTensor& mask,
                                          const at::Tensor& rng_state, bool logits_grad,
                                          bool weight_grad, bool tau_grad,
                                          at::OptionalSymIntArrayRef positions) {
  if (records(grad, logits, weight, tau_tensor) || has_tangent(grad, logits, weight, tau_tensor)) {
    return backward_of_sample(grad, logits, weight, index, tau, tau_tensor, hard, dim, mask,
                              rng_state, logits_grad, weight_grad, tau_grad, positions);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return gumbel_embedding_backward(grad, logits, weight, index, tau, tau_tensor, hard, dim, mask,
                                   rng_state, logits_grad, weight_grad, tau_grad, positions);
}

}  // namespace
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, Meta, m) {
  m.impl("gumbel_embedding", &gumbel_ext::gumbel_embedding_meta);
  m.impl("gumbel_embedding_backward", &gumbel_ext::gumbel_embedding_backward_meta);
}

TORCH_LIBRARY_IMPL(gumbel_ext, Autograd, m) {
  m.impl("gumbel_embedding", &gumbel_ext::gumbel_embedding_autograd);
  m.impl("gumbel_embedding_backward", &gumbel_ext::gumbel_embedding_backward_autograd);
}
