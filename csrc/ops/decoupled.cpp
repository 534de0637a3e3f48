// Samples at one temperature with the gradient of another, of the same noise. The op is made of the
// others above autograd, so that it needs no kernel, no vmap rule and no derivative of a higher
// order of its own.
#include <limits>

#include "../autograd.h"
#include "gumbel_softmax.h"
#include "noise.h"
#include "straight_through.h"

namespace gumbel_ext {
namespace {

struct DecoupledGumbelSoftmax {
  static constexpr const char* schema =
      "decoupled_gumbel_softmax(Tensor logits, float tau_forward, Tensor? tau_forward_tensor, "
      "float tau_backward, Tensor? tau_backward_tensor, bool hard, int dim, Tensor? mask, "
      "bool return_index, Generator? generator, Tensor? rng_state) -> (Tensor y, Tensor index)";
  static constexpr bool draws = true;
  static constexpr Autocast autocast = Autocast::kNone;  // that of the ops it is made of
  using Result = std::tuple<at::Tensor, at::Tensor>;

  at::Tensor logits;
  double tau_forward;
  OptionalTensor tau_forward_tensor;
  double tau_backward;
  OptionalTensor tau_backward_tensor;
  bool hard;
  int64_t dim;
  OptionalTensor mask;
  bool return_index;
  std::optional<at::Generator> generator;
  OptionalTensor rng_state;
};

GumbelSoftmax sample_at(const DecoupledGumbelSoftmax& a, double tau,
                        const OptionalTensor& tau_tensor) {
  return {a.logits,       tau,         tau_tensor, a.hard, a.dim, a.mask,
          a.return_index, a.generator, a.rng_state};
}

// The soft sample at tau_forward; its backward regenerates the noise and recomputes the sample at
// tau_backward, so that nothing of the size of a sample is kept.
class DecoupledFunction : public torch::autograd::Function<DecoupledFunction> {
 public:
  template <class... Field>
  static variable_list forward(AutogradContext* ctx, const Field&... field) {
    DecoupledGumbelSoftmax a{field...};
    a.return_index = true;
    auto [y, index, state] = call_below(sample_at(a, a.tau_forward, a.tau_forward_tensor));
    ctx->mark_non_differentiable({index});
    ctx->set_materialize_grads(false);
    ctx->saved_data["tau_grad"] = requires_grad(a.tau_backward_tensor);
    a.tau_forward_tensor = std::nullopt;
    a.rng_state = state;
    keep(ctx, a, {index});
    return {y, index};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list out(count_arguments(DecoupledGumbelSoftmax::schema));
    if (!grads[0].defined()) return out;
    const Kept<DecoupledGumbelSoftmax> kept(ctx, "logits, tau_backward or mask");
    const DecoupledGumbelSoftmax& a = kept.op;
    const bool tau_grad = ctx->saved_data["tau_grad"].toBool();
    const auto [grad_logits, grad_tau] = call(
        GumbelSoftmaxHardBackward{grads[0], a.logits, kept.results[0], a.tau_backward,
                                  a.tau_backward_tensor, a.dim, a.mask, *a.rng_state, tau_grad});
    out[place_of<DecoupledGumbelSoftmax>("logits")] = grad_logits;
    if (tau_grad) {
      out[place_of<DecoupledGumbelSoftmax>("tau_backward_tensor")] =
          reduced_to(grad_tau, *a.tau_backward_tensor);
    }
    return out;
  }
};

std::tuple<at::Tensor, at::Tensor> decoupled_gumbel_softmax(DecoupledGumbelSoftmax& a) {
  constexpr const char* op = name_of<DecoupledGumbelSoftmax>();
  const at::Tensor& logits = a.logits;
  check_logits(op, logits);
  a.dim = wrapped_dim(op, logits, a.dim);
  check_tau(op, a.tau_forward, a.tau_forward_tensor, logits, a.dim, "tau_forward");
  check_tau(op, a.tau_backward, a.tau_backward_tensor, logits, a.dim, "tau_backward");
  if (a.hard) {
    // One-hot at every forward temperature.
    auto [y, index, state] = call(sample_at(a, a.tau_backward, a.tau_backward_tensor));
    return {y, index};
  }
  // A vmap shows through none of its tensors here: under one the samples must be told apart by the
  // noise itself, which is then drawn once for both temperatures.
  const bool transformed =
      under_transform() || has_tangent(logits, a.tau_backward_tensor) ||
      c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchVmapMode);
  a.tau_forward_tensor = detached(a.tau_forward_tensor);
  if (!transformed) {
    if (!records(logits, a.tau_backward_tensor)) {
      auto [y, index, state] = call(sample_at(a, a.tau_forward, a.tau_forward_tensor));
      return {y, index};
    }
    a.logits = unchanging(a.logits);
    a.tau_backward_tensor = unchanging(a.tau_backward_tensor);
    const variable_list out = apply_function<DecoupledFunction>(a);
    return {out[0], a.return_index ? out[1] : at::empty({0}, out[1].options())};
  }

  const int64_t dim = a.dim;
  const at::ScalarType type = compute_dtype(logits.scalar_type());
  const at::Tensor like = at::empty({0}, logits.options().dtype(type));
  const at::Tensor noise = call(GumbelNoise{like, logits.sym_sizes(), a.generator, a.rng_state});
  const at::Tensor scores = logits.to(type) + noise;
  const auto [hard_sample, index] =
      call(StraightThroughSoftmax{scores, a.tau_backward, a.tau_backward_tensor, dim, a.mask,
                                  /*return_index=*/true});
  at::Tensor z = scores.detach();
  if (a.mask) z = z.masked_fill(a.mask->logical_not(), -std::numeric_limits<double>::infinity());
  // The maximum goes before the division, so that no temperature makes inf - inf.
  const at::Tensor t = temperature(a.tau_forward, a.tau_forward_tensor, logits);
  at::Tensor soft;
  if (logits.dim() == 0) {
    soft = (z - z) + 1;
  } else if (logits.sym_numel() == 0) {
    soft = z;
  } else {
    soft = ((z - z.amax(dim, /*keepdim=*/true)) / t).softmax(dim);
    soft = soft.masked_fill(index.lt(0).unsqueeze(dim), 0);
  }
  const at::Tensor y = soft + (hard_sample - hard_sample.detach());
  return {y.to(logits.scalar_type()), a.return_index ? index : at::empty({0}, index.options())};
}

}  // namespace
}  // namespace gumbel_ext

TORCH_LIBRARY_FRAGMENT(gumbel_ext, m) {
  using namespace gumbel_ext;
  declare<DecoupledGumbelSoftmax>(m);
}

TORCH_LIBRARY_IMPL(gumbel_ext, CompositeImplicitAutograd, m) {
  using namespace gumbel_ext;
  implement<&decoupled_gumbel_softmax>(m);
}
