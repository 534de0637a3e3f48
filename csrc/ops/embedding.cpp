// The codebook lookup on any device: arguments, results and derivatives.
#include "embedding.h"

#include "../autograd.h"
#include "embedding_tiles.h"

namespace gumbel_ext {

using Lookup = GumbelEmbedding::Result;
using LookupGradients = GumbelEmbeddingBackward::Result;

// ---- arguments and results ----------------------------------------------------------------------

namespace {

// The arguments that the op and its backward have in common.
template <class Op>
void check_lookup(Op& a) {
  constexpr const char* op = name_of<Op>();
  check_rows(a);
  const at::Tensor &logits = a.logits, &weight = a.weight;
  TORCH_CHECK_VALUE(logits.dim() > 0, op, ": logits must have a dimension, got shape []");
  check_floating(op, "weight", weight);
  TORCH_CHECK_VALUE(weight.device() == logits.device(), op,
                    ": weight must be on the device of logits (", logits.device(), "), got ",
                    weight.device());
  TORCH_CHECK_VALUE(weight.dim() == 2 || weight.dim() == 3, op,
                    ": weight must be of shape [classes, D] or [groups, classes of a group, D], "
                    "got shape ",
                    weight.sym_sizes());
  const c10::SymInt classes =
      weight.dim() == 2 ? weight.sym_size(0) : weight.sym_size(0) * weight.sym_size(1);
  TORCH_CHECK_VALUE(classes == logits.sym_size(a.dim), op, ": weight must have ",
                    logits.sym_size(a.dim), " rows, one for each class of logits along dim ", a.dim,
                    ", got ", classes, " in shape ", weight.sym_sizes());
}

c10::SymInt groups_of(const at::Tensor& weight) {
  return weight.dim() == 3 ? weight.sym_size(0) : c10::SymInt(1);
}

template <class Op>
c10::SymDimVector out_shape(const Op& a) {
  return shape_with(a.logits, a.dim, groups_of(a.weight) * a.weight.sym_size(-1));
}

template <class Op>
c10::SymDimVector index_shape(const Op& a) {
  return a.weight.dim() == 3 ? shape_with(a.logits, a.dim, a.weight.sym_size(0))
                             : shape_without(a.logits, a.dim);
}

}  // namespace

void GumbelEmbedding::check() { check_lookup(*this); }

Lookup GumbelEmbedding::prepare() {
  check();
  return {at::empty_symint(out_shape(*this), weight.options()),
          at::empty_symint(index_shape(*this), logits.options().dtype(at::kLong)),
          empty_rng_state(logits)};
}

void GumbelEmbeddingBackward::check() {
  check_lookup(*this);
  constexpr const char* op = name_of<GumbelEmbeddingBackward>();
  check_grad(op, grad, weight.scalar_type(), out_shape(*this), logits.device());
  check_index(op, index, index_shape(*this));
}

LookupGradients GumbelEmbeddingBackward::prepare() {
  check();
  const auto of_tau = logits.options().dtype(compute_dtype(logits.scalar_type()));
  return {logits_grad ? at::empty_like(logits) : at::empty({0}, logits.options()),
          weight_grad ? at::empty_symint(weight.sym_sizes(), weight.options())
                      : at::empty({0}, weight.options()),
          tau_grad ? at::empty_symint(shape_with(logits, dim, groups_of(weight)), of_tau)
                   : at::empty({0}, of_tau)};
}

namespace {

// ---- in PyTorch's ops, differentiable any number of times ---------------------------------------

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

// The sample of a lookup with its groups as a dimension, in a wider type.
GumbelSoftmax sample_of(const Grouped& call, double tau, bool hard, at::ScalarType type) {
  GumbelSoftmax sample{call.logits.to(type), tau, call.tau, hard, call.dim + 1, call.mask};
  sample.positions = call.given_positions();
  return sample;
}

Lookup differentiable_lookup(GumbelEmbedding& a) {
  a.check();
  const Grouped grouped(a);
  const at::ScalarType type = widest_type(a.logits.scalar_type(), a.weight.scalar_type());
  GumbelSoftmax sample = sample_of(grouped, a.tau, a.hard, type);
  sample.return_index = true;
  sample.generator = a.generator;
  sample.rng_state = a.rng_state;
  const auto [y, index, state] = call(sample);
  const at::Tensor rows = at::bmm(rows_of_groups(y, a.dim), grouped.weight.to(type));
  const at::Tensor out = from_rows_of_groups(rows, y, a.dim).reshape_symint(out_shape(a));
  return {out.to(a.weight.scalar_type()), grouped.has_groups ? index : index.squeeze(a.dim), state};
}

LookupGradients differentiable_gradients(GumbelEmbeddingBackward& a) {
  a.check();
  const Grouped grouped(a);
  const at::ScalarType type = widest_type(a.logits.scalar_type(), a.weight.scalar_type());
  GumbelSoftmax sample = sample_of(grouped, a.tau, a.hard, type);
  sample.rng_state = a.rng_state;
  const at::Tensor& z = sample.logits;
  const at::Tensor dout = rows_of_groups(grouped.grouped(a.grad), a.dim).to(type);
  at::Tensor of_logits = at::empty({0}, a.logits.options()),
             of_weight = at::empty({0}, a.weight.options()),
             of_tau =
                 at::empty({0}, a.logits.options().dtype(compute_dtype(a.logits.scalar_type())));
  if (a.logits_grad || a.tau_grad) {
    const at::Tensor dy =
        from_rows_of_groups(at::bmm(dout, grouped.weight.to(type).transpose(1, 2)), z, a.dim);
    const auto [dz, dtau] = call(GumbelSoftmaxHardBackward{
        dy, z, grouped.grouped_index(a.index), a.tau, grouped.tau, sample.dim, grouped.mask,
        a.rng_state, a.tau_grad, sample.positions});
    if (a.logits_grad) {
      of_logits = dz.to(a.logits.scalar_type()).reshape_symint(a.logits.sym_sizes());
    }
    if (a.tau_grad) of_tau = dtau.squeeze(sample.dim).to(of_tau.scalar_type());
  }
  if (a.weight_grad) {
    const at::Tensor y = std::get<0>(call(sample));
    of_weight = at::bmm(rows_of_groups(y, a.dim).transpose(1, 2), dout)
                    .to(a.weight.scalar_type())
                    .reshape_symint(a.weight.sym_sizes());
  }
  return {of_logits, of_weight, of_tau};
}

// ---- derivatives --------------------------------------------------------------------------------

class GumbelEmbeddingFunction : public torch::autograd::Function<GumbelEmbeddingFunction> {
 public:
  template <class... Field>
  static variable_list forward(AutogradContext* ctx, const Field&... field) {
    GumbelEmbedding a{field...};
    auto [out, index, state] = call_below(a);
    ctx->mark_non_differentiable({index, state});
    ctx->set_materialize_grads(false);
    ctx->saved_data["tau_grad"] = requires_grad(a.tau_tensor);
    a.dim = wrapped_dim(name_of<GumbelEmbedding>(), a.logits, a.dim);
    // The sample is recomputed from the noise. The codebook is saved as it is, as in the product
    // that this stands for.
    a.rng_state = state;
    keep(ctx, a, {index});
    return {out, index, state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list out(count_arguments(GumbelEmbedding::schema));
    if (!grads[0].defined()) return out;
    const Kept<GumbelEmbedding> kept(ctx, "logits, weight, tau or mask");
    const GumbelEmbedding& a = kept.op;
    const bool logits_grad = ctx->needs_input_grad(0), weight_grad = ctx->needs_input_grad(1),
               tau_grad = ctx->saved_data["tau_grad"].toBool();
    const auto [of_logits, of_weight, of_tau] = call(GumbelEmbeddingBackward{
        grads[0], a.logits, a.weight, kept.results[0], a.tau, a.tau_tensor, a.hard, a.dim, a.mask,
        *a.rng_state, logits_grad, weight_grad, tau_grad, a.positions});
    if (logits_grad) out[place_of<GumbelEmbedding>("logits")] = of_logits;
    if (weight_grad) out[place_of<GumbelEmbedding>("weight")] = of_weight;
    if (tau_grad) out[place_of<GumbelEmbedding>("tau_tensor")] = reduced_to(of_tau, *a.tau_tensor);
    return out;
  }
};

Lookup gumbel_embedding_autograd(GumbelEmbedding& a) {
  const bool recorded = records(a.logits, a.weight, a.tau_tensor),
             tangent = has_tangent(a.logits, a.weight, a.tau_tensor);
  if (!recorded && !tangent) return call_below(a);
  // Under a transform the sample is not recomputed from the noise: below this level a vmap may give
  // each example its own, which the one state that was drawn does not tell.
  if (tangent || under_transform()) return differentiable_lookup(a);
  a.logits = unchanging(a.logits);
  a.tau_tensor = unchanging(a.tau_tensor);
  const variable_list out = apply_function<GumbelEmbeddingFunction>(a);
  return {out[0], out[1], out[2]};
}

LookupGradients gumbel_embedding_backward_autograd(GumbelEmbeddingBackward& a) {
  if (records(a.grad, a.logits, a.weight, a.tau_tensor) ||
      has_tangent(a.grad, a.logits, a.weight, a.tau_tensor)) {
    return differentiable_gradients(a);
  }
  return call_below(a);
}

}  // namespace
}  // namespace gumbel_ext

TORCH_LIBRARY_FRAGMENT(gumbel_ext, m) {
  using namespace gumbel_ext;
  define<GumbelEmbedding>(m);
  define<GumbelEmbeddingBackward>(m);
}

TORCH_LIBRARY_IMPL(gumbel_ext, Autograd, m) {
  using namespace gumbel_ext;
  implement<&gumbel_embedding_autograd>(m);
  implement<&gumbel_embedding_backward_autograd>(m);
}
