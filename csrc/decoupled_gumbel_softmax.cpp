// Samples at one temperature with the gradient of another, of the same noise. The op is made of the
// others above autograd, so that it needs no kernel, no vmap rule and no derivative of a higher
// order of its own.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <limits>

#include "autograd_levels.h"
#include "gumbel_ext.h"

namespace gumbel_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The soft sample at tau_forward; its backward regenerates the noise and recomputes the sample at
// tau_backward, so that nothing of the size of a sample is kept.
class DecoupledGumbelSoftmax : public torch::autograd::Function<DecoupledGumbelSoftmax> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& logits, double tau_forward,
                               const OptionalTensor& tau_forward_tensor, double tau_backward,
                               const OptionalTensor& tau_backward_tensor, int64_t dim,
                               const OptionalTensor& mask,
                               const std::optional<at::Generator>& generator,
                               const OptionalTensor& rng_state) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [y, index, state] = gumbel_softmax(logits, tau_forward, tau_forward_tensor, /*hard=*/false,
                                            dim, mask, /*return_index=*/true, generator, rng_state);
    ctx->mark_non_differentiable({index});
    ctx->set_materialize_grads(false);
    ctx->saved_data["tau"] = tau_backward;
    ctx->saved_data["dim"] = dim;
    ctx->saved_data["tau_grad"] = requires_grad(tau_backward_tensor);
    ctx->save_for_backward({logits, index, tau_backward_tensor.value_or(at::Tensor()),
                            mask.value_or(at::Tensor()), state});
    return {y, index};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list out(9);
    if (!grads[0].defined()) return out;
    const variable_list saved =
        unchanged("decoupled_gumbel_softmax", "logits, tau_backward or mask",
                  [&] { return ctx->get_saved_variables(); });
    const bool tau_grad = ctx->saved_data["tau_grad"].toBool();
    at::Tensor grad_tau;
    std::tie(out[0], grad_tau) = gumbel_softmax_hard_backward(
        grads[0], saved[0], saved[1], ctx->saved_data["tau"].toDouble(), optional(saved[2]),
        ctx->saved_data["dim"].toInt(), optional(saved[3]), saved[4], tau_grad);
    if (tau_grad) out[4] = reduced_to(grad_tau, saved[2]);
    return out;
  }
};

OptionalTensor detached(const OptionalTensor& t) {
  return t ? OptionalTensor(t->detach()) : std::nullopt;
}

std::tuple<at::Tensor, at::Tensor> decoupled_gumbel_softmax(
    const at::Tensor& logits, double tau_forward, const OptionalTensor& tau_forward_tensor,
    double tau_backward, const OptionalTensor& tau_backward_tensor, bool hard, int64_t dim,
    const OptionalTensor& mask, bool return_index, std::optional<at::Generator> generator,
    const OptionalTensor& rng_state) {
  constexpr const char* op = "decoupled_gumbel_softmax";
  check_logits(op, logits);
  dim = wrapped_dim(op, logits, dim);
  check_tau(op, tau_forward, tau_forward_tensor, logits, dim, "tau_forward");
  check_tau(op, tau_backward, tau_backward_tensor, logits, dim, "tau_backward");
  if (hard) {
    // One-hot at every forward temperature.
    auto [y, index, state] = gumbel_softmax(logits, tau_backward, tau_backward_tensor, hard, dim,
                                            mask, return_index, generator, rng_state);
    return {y, index};
  }
  // A vmap shows through none of its tensors here: under one the samples must be told apart by the
  // noise itself, which is then drawn once for both temperatures.
  const bool transformed =
      under_transform() || has_tangent(logits, tau_backward_tensor) ||
      c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchVmapMode);
  if (!transformed) {
    if (!records(logits, tau_backward_tensor)) {
      auto [y, index, state] = gumbel_softmax(logits, tau_forward, detached(tau_forward_tensor),
                                              hard, dim, mask, return_index, generator, rng_state);
      return {y, index};
    }
    const variable_list out = DecoupledGumbelSoftmax::apply(
        unchanging(logits), tau_forward, detached(tau_forward_tensor), tau_backward,
        unchanging(tau_backward_tensor), dim, mask, generator, rng_state);
    return {out[0], return_index ? out[1] : at::empty({0}, out[1].options())};
  }

  const at::ScalarType type = compute_dtype(logits.scalar_type());
  const at::Tensor like = at::empty({0}, logits.options().dtype(type));
  static const auto noise_op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("gumbel_ext::gumbel_noise", "")
          .typed<at::Tensor(const at::Tensor&, c10::SymIntArrayRef, std::optional<at::Generator>,
                            const OptionalTensor&, at::OptionalSymIntArrayRef)>();
  const at::Tensor noise =
      noise_op.call(like, logits.sym_sizes(), generator, rng_state, std::nullopt);
  const at::Tensor scores = logits.to(type) + noise;
  const auto [hard_sample, index] = straight_through_softmax(
      scores, tau_backward, tau_backward_tensor, dim, mask, /*return_index=*/true);
  at::Tensor z = scores.detach();
  if (mask) z = z.masked_fill(mask->logical_not(), -std::numeric_limits<double>::infinity());
  // The maximum goes before the division, so that no temperature makes inf - inf.
  const at::Tensor t = temperature(tau_forward, detached(tau_forward_tensor), logits);
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
  return {y.to(logits.scalar_type()), return_index ? index : at::empty({0}, index.options())};
}

}  // namespace
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CompositeImplicitAutograd, m) {
  m.impl("decoupled_gumbel_softmax", &gumbel_ext::decoupled_gumbel_softmax);
}
