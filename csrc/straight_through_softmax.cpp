// The straight-through softmax without noise: derivatives, and the ops in PyTorch's own for devices
// that have no kernel of theirs.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <limits>

#include "autograd_levels.h"
#include "gumbel_ext.h"

namespace gumbel_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::tuple<at::Tensor, at::Tensor> straight_through_softmax_backward(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& index, double tau,
    const OptionalTensor& tau_tensor, int64_t dim, const OptionalTensor& mask, bool tau_grad) {
  using Function = std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, double, const OptionalTensor&,
      int64_t, const OptionalTensor&, bool);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gumbel_ext::straight_through_softmax_backward", "")
                             .typed<Function>();
  return op.call(grad, logits, index, tau, tau_tensor, dim, mask, tau_grad);
}

// ---- in PyTorch's ops, differentiable any number of times
// ----------------------------------------

// Logits in the type computed in, -inf where the mask forbids.
at::Tensor scores_of(const at::Tensor& logits, const OptionalTensor& mask) {
  const at::Tensor scores = logits.to(compute_dtype(logits.scalar_type()));
  return mask ? scores.masked_fill(mask->logical_not(), -std::numeric_limits<double>::infinity())
              : scores;
}

// softmax(logits / tau) in the type computed in, with derivatives by the shifted formula: the
// chosen entry keeps its value and is differentiated as 1 - (the others), so that softmax receives
// dy - dy[index].
at::Tensor soft_vector(const at::Tensor& logits, const at::Tensor& t, const at::Tensor& index,
                       int64_t dim, const OptionalTensor& mask) {
  if (logits.dim() == 0) {
    return soft_vector(logits.unsqueeze(0), t, index, 0, mask).squeeze(0);
  }
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const at::Tensor chosen = index.clamp_min(0).unsqueeze(dim),
                   forbidden = index.lt(0).unsqueeze(dim);
  at::Tensor x = scores_of(logits, mask);
  if (x.sym_numel() == 0) return x;
  x = x.masked_fill(forbidden, 0);
  // The maximum goes before the division, so that no temperature makes inf - inf; what is -inf is a
  // constant, because 0 * inf in the derivative is NaN.
  const at::Tensor peak = x.detach().gather(dim, chosen);
  const at::Tensor absent = x.eq(-infinity).logical_and(peak.ne(-infinity));
  const double tiny = x.scalar_type() == at::kDouble ? std::numeric_limits<double>::denorm_min()
                                                     : std::numeric_limits<float>::denorm_min();
  const at::Tensor divisor = t.clamp_min(tiny);
  const at::Tensor distance = at::maximum((x.masked_fill(absent, 0) - peak).masked_fill(absent, 0),
                                          divisor.detach() * -kFar);
  at::Tensor y = (distance / divisor).masked_fill(absent, -infinity).softmax(dim);
  const at::Tensor others = y.scatter(dim, chosen, 0).sum(dim, /*keepdim=*/true);
  y = y.scatter(dim, chosen, y.detach().gather(dim, chosen) + (others.detach() - others));
  return y.masked_fill(forbidden, 0);
}

std::tuple<at::Tensor, at::Tensor> straight_through_softmax_composite(
    const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor, int64_t dim,
    const OptionalTensor& mask, bool return_index) {
  constexpr const char* op = "straight_through_softmax";
  dim = check_forward(op, logits, tau, tau_tensor, dim, mask, std::nullopt, std::nullopt,
                      std::nullopt);
  if (tau_tensor && tau_tensor->is_cpu()) check_tau_values(op, tau_tensor->to(at::kDouble));
  at::Tensor y = at::empty_like(logits);
  if (logits.numel() == 0) {
    const auto integers = logits.options().dtype(at::kLong);
    return {y, return_index ? at::full_symint(shape_without(logits, dim), -1, integers)
                            : at::empty({0}, integers)};
  }
  at::Tensor scores = scores_of(logits, mask), allowed;
  if (mask) allowed = mask->expand(logits.sizes());
  if (logits.dim() == 0) {
    scores = scores.unsqueeze(0);
    if (mask) allowed = allowed.unsqueeze(0);
  }
  at::Tensor index = scores.argmax(dim);
  const at::Tensor best = scores.gather(dim, index.unsqueeze(dim));
  at::Tensor lowest = best.eq(-std::numeric_limits<double>::infinity());
  if (mask) {
    // A row of -inf alone: the first class that the mask allows, if there is one.
    const at::Tensor any = allowed.any(dim);
    index = at::where(lowest.squeeze(dim), allowed.to(at::kByte).argmax(dim), index);
    index = index.masked_fill(any.logical_not(), -1);
    lowest = lowest.logical_and(any.unsqueeze(dim));
  }
  const at::Tensor one_hot =
      at::zeros_like(scores)
          .scatter(dim, index.clamp_min(0).unsqueeze(dim),
                   index.ge(0).to(scores.scalar_type()).unsqueeze(dim))
          .masked_fill(best.isnan().logical_or(lowest), std::numeric_limits<double>::quiet_NaN());
  y.copy_(one_hot.view(logits.sizes()));
  return {y, return_index ? index : at::empty({0}, index.options())};
}

std::tuple<at::Tensor, at::Tensor> straight_through_softmax_backward_composite(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& index, double tau,
    const OptionalTensor& tau_tensor, int64_t dim, const OptionalTensor& mask, bool tau_grad) {
  dim = check_backward("straight_through_softmax_backward", grad, logits, index, tau, tau_tensor,
                       dim, mask, std::nullopt, std::nullopt);
  const at::Tensor y = soft_vector(logits, temperature(tau, tau_tensor, logits), index, dim, mask);
  const auto [grad_logits, grad_tau] =
      gumbel_softmax_backward(grad.to(y.scalar_type()), y, index, tau, tau_tensor, dim, tau_grad);
  return {at::empty_like(logits).copy_(grad_logits), grad_tau};
}

// ---- derivatives --------------------------------------------------------------------------------

class StraightThroughSoftmax : public torch::autograd::Function<StraightThroughSoftmax> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& logits, double tau,
                               const OptionalTensor& tau_tensor, int64_t dim,
                               const OptionalTensor& mask) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [y, index] =
        straight_through_softmax(logits, tau, tau_tensor, dim, mask, /*return_index=*/true);
    ctx->mark_non_differentiable({index});
    ctx->set_materialize_grads(false);
    ctx->saved_data["tau"] = tau;
    ctx->saved_data["dim"] = dim;
    ctx->saved_data["tau_grad"] = requires_grad(tau_tensor);
    ctx->save_for_backward(
        {logits, index, tau_tensor.value_or(at::Tensor()), mask.value_or(at::Tensor())});
    return {y, index};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list out(5);
    if (!grads[0].defined()) return out;
    const variable_list saved = unchanged("straight_through_softmax", "logits, tau or mask",
                                          [&] { return ctx->get_saved_variables(); });
    const bool tau_grad = ctx->saved_data["tau_grad"].toBool();
    at::Tensor grad_tau;
    std::tie(out[0], grad_tau) = straight_through_softmax_backward(
        grads[0], saved[0], saved[1], ctx->saved_data["tau"].toDouble(), optional(saved[2]),
        ctx->saved_data["dim"].toInt(), optional(saved[3]), tau_grad);
    if (tau_grad) out[2] = reduced_to(grad_tau, saved[2]);
    return out;
  }
};

std::tuple<at::Tensor, at::Tensor> straight_through_softmax_autograd(
    const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor, int64_t dim,
    const OptionalTensor& mask, bool return_index) {
  const bool recorded = records(logits, tau_tensor), tangent = has_tangent(logits, tau_tensor);
  if (recorded && !tangent && !under_transform()) {
    const variable_list out =
        StraightThroughSoftmax::apply(unchanging(logits), tau, unchanging(tau_tensor), dim, mask);
    return {out[0], return_index ? out[1] : at::empty({0}, out[1].options())};
  }
  at::Tensor y, index;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    std::tie(y, index) = straight_through_softmax(logits, tau, tau_tensor, dim, mask,
                                                  return_index || recorded || tangent);
  }
  if ((recorded || tangent) && logits.sym_numel() != 0) {
    dim = wrapped_dim("straight_through_softmax", logits, dim);
    const at::Tensor soft =
        soft_vector(logits, temperature(tau, tau_tensor, logits), index, dim, mask);
    // A logit of +inf is certainly chosen, but has no softmax.
    at::Tensor chosen = scores_of(logits.detach(), mask);
    if (logits.dim() > 0) chosen = chosen.gather(dim, index.clamp_min(0).unsqueeze(dim));
    const at::Tensor nothing = (soft - soft.detach()).masked_fill(chosen.isposinf(), 0);
    y = y + nothing.to(y.scalar_type());
    if (!return_index) index = at::empty({0}, index.options());
  }
  return {y, index};
}

std::tuple<at::Tensor, at::Tensor> straight_through_softmax_backward_autograd(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& index, double tau,
    const OptionalTensor& tau_tensor, int64_t dim, const OptionalTensor& mask, bool tau_grad) {
  if (records(grad, logits, tau_tensor) || has_tangent(grad, logits, tau_tensor)) {
    dim = wrapped_dim("straight_through_softmax_backward", logits, dim);
    const at::Tensor y =
        soft_vector(logits, temperature(tau, tau_tensor, logits), index, dim, mask);
    const auto [grad_logits, grad_tau] =
        gumbel_softmax_backward(grad.to(y.scalar_type()), y, index, tau, tau_tensor, dim, tau_grad);
    return {grad_logits.to(logits.scalar_type()), grad_tau};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return straight_through_softmax_backward(grad, logits, index, tau, tau_tensor, dim, mask,
                                           tau_grad);
}

}  // namespace
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CompositeExplicitAutograd, m) {
  m.impl("straight_through_softmax", &gumbel_ext::straight_through_softmax_composite);
  m.impl("straight_through_softmax_backward",
         &gumbel_ext::straight_through_softmax_backward_composite);
}

TORCH_LIBRARY_IMPL(gumbel_ext, Autograd, m) {
  m.impl("straight_through_softmax", &gumbel_ext::straight_through_softmax_autograd);
  m.impl("straight_through_softmax_backward",
         &gumbel_ext::straight_through_softmax_backward_autograd);
}
