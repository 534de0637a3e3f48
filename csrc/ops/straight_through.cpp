// The straight-through softmax without noise: its arguments, results and derivatives, and the ops
// in PyTorch's own for devices without kernels.
#include "straight_through.h"

#include <limits>

#include "../autograd.h"
#include "../gumbel_ext.h"
#include "gumbel_softmax.h"

namespace gumbel_ext {

using TwoTensors = std::tuple<at::Tensor, at::Tensor>;

TwoTensors straight_through_softmax(const at::Tensor& logits, double tau,
                                    const OptionalTensor& tau_tensor, int64_t dim,
                                    const OptionalTensor& mask, bool return_index) {
  return call(StraightThroughSoftmax{logits, tau, tau_tensor, dim, mask, return_index});
}

// ---- arguments and results ----------------------------------------------------------------------

TwoTensors StraightThroughSoftmax::prepare() {
  check_rows(*this);
  return {at::empty_like(logits), empty_index(logits, dim, return_index)};
}

TwoTensors StraightThroughSoftmaxBackward::prepare() {
  check_rows_backward(*this);
  return {at::empty_like(logits), empty_grad_tau(logits, dim, tau_grad)};
}

namespace {

// ---- in PyTorch's ops, differentiable any number of times ---------------------------------------

// Logits in the accumulate type, -inf where the mask forbids.
at::Tensor scores_of(const at::Tensor& logits, const OptionalTensor& mask) {
  const at::Tensor scores = logits.to(compute_dtype(logits.scalar_type()));
  return mask ? scores.masked_fill(mask->logical_not(), -std::numeric_limits<double>::infinity())
              : scores;
}

// softmax(logits / tau) in the accumulate type, with derivatives by the shifted formula: the
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

TwoTensors differentiable_gradients(const StraightThroughSoftmaxBackward& a) {
  const at::Tensor t = temperature(a.tau, a.tau_tensor, a.logits),
                   y = soft_vector(a.logits, t, a.index, a.dim, a.mask);
  const auto [grad_logits, grad_tau] =
      softmax_gradients(a.grad.to(y.scalar_type()), y, a.index, t, a.dim, a.tau_grad);
  return {grad_logits.to(a.logits.scalar_type()), grad_tau};
}

TwoTensors straight_through_softmax_composite(StraightThroughSoftmax& a) {
  auto [y, index] = a.prepare();
  if (a.tau_tensor && a.tau_tensor->is_cpu()) {
    check_tau_values(name_of<StraightThroughSoftmax>(), a.tau_tensor->to(at::kDouble));
  }
  if (a.logits.numel() == 0) return {y, index.fill_(-1)};
  const int64_t dim = a.dim;
  at::Tensor scores = scores_of(a.logits, a.mask), allowed;
  if (a.mask) allowed = a.mask->expand(a.logits.sizes());
  if (a.logits.dim() == 0) {
    scores = scores.unsqueeze(0);
    if (a.mask) allowed = allowed.unsqueeze(0);
  }
  at::Tensor largest = scores.argmax(dim);
  const at::Tensor best = scores.gather(dim, largest.unsqueeze(dim));
  at::Tensor lowest = best.eq(-std::numeric_limits<double>::infinity());
  if (a.mask) {
    // A row of -inf alone: the first class that the mask allows, if there is one.
    const at::Tensor any = allowed.any(dim);
    largest = at::where(lowest.squeeze(dim), allowed.to(at::kByte).argmax(dim), largest);
    largest = largest.masked_fill(any.logical_not(), -1);
    lowest = lowest.logical_and(any.unsqueeze(dim));
  }
  const at::Tensor one_hot =
      at::zeros_like(scores)
          .scatter(dim, largest.clamp_min(0).unsqueeze(dim),
                   largest.ge(0).to(scores.scalar_type()).unsqueeze(dim))
          .masked_fill(best.isnan().logical_or(lowest), std::numeric_limits<double>::quiet_NaN());
  y.copy_(one_hot.view(a.logits.sizes()));
  return {y, a.return_index ? largest : index};
}

TwoTensors straight_through_softmax_backward_composite(StraightThroughSoftmaxBackward& a) {
  const at::Tensor grad_logits = std::get<0>(a.prepare());
  const auto [of_logits, of_tau] = differentiable_gradients(a);
  return {grad_logits.copy_(of_logits), of_tau};
}

// ---- derivatives --------------------------------------------------------------------------------

class StraightThroughFunction : public torch::autograd::Function<StraightThroughFunction> {
 public:
  template <class... Field>
  static variable_list forward(AutogradContext* ctx, const Field&... field) {
    StraightThroughSoftmax a{field...};
    a.return_index = true;
    auto [y, index] = call_below(a);
    ctx->mark_non_differentiable({index});
    ctx->set_materialize_grads(false);
    ctx->saved_data["tau_grad"] = requires_grad(a.tau_tensor);
    keep(ctx, a, {index});
    return {y, index};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list out(count_arguments(StraightThroughSoftmax::schema));
    if (!grads[0].defined()) return out;
    const Kept<StraightThroughSoftmax> kept(ctx, "logits, tau or mask");
    const StraightThroughSoftmax& a = kept.op;
    const bool tau_grad = ctx->saved_data["tau_grad"].toBool();
    const auto [grad_logits, grad_tau] = call(StraightThroughSoftmaxBackward{
        grads[0], a.logits, kept.results[0], a.tau, a.tau_tensor, a.dim, a.mask, tau_grad});
    out[place_of<StraightThroughSoftmax>("logits")] = grad_logits;
    if (tau_grad) {
      out[place_of<StraightThroughSoftmax>("tau_tensor")] = reduced_to(grad_tau, *a.tau_tensor);
    }
    return out;
  }
};

TwoTensors straight_through_softmax_autograd(StraightThroughSoftmax& a) {
  const bool recorded = records(a.logits, a.tau_tensor),
             tangent = has_tangent(a.logits, a.tau_tensor);
  if (!recorded && !tangent) return call_below(a);
  const bool return_index = a.return_index;
  at::Tensor y, index;
  if (!tangent && !under_transform()) {
    a.logits = unchanging(a.logits);
    a.tau_tensor = unchanging(a.tau_tensor);
    const variable_list out = apply_function<StraightThroughFunction>(a);
    y = out[0], index = out[1];
  } else {
    a.return_index = true;
    std::tie(y, index) = call_below(a);
    if (a.logits.sym_numel() != 0) {
      const int64_t dim = wrapped_dim(name_of<StraightThroughSoftmax>(), a.logits, a.dim);
      const at::Tensor soft =
          soft_vector(a.logits, temperature(a.tau, a.tau_tensor, a.logits), index, dim, a.mask);
      // A logit of +inf is certainly chosen, but has no softmax.
      at::Tensor chosen = scores_of(a.logits.detach(), a.mask);
      if (a.logits.dim() > 0) chosen = chosen.gather(dim, index.clamp_min(0).unsqueeze(dim));
      const at::Tensor nothing = (soft - soft.detach()).masked_fill(chosen.isposinf(), 0);
      y = y + nothing.to(y.scalar_type());
    }
  }
  return {y, return_index ? index : at::empty({0}, index.options())};
}

TwoTensors straight_through_softmax_backward_autograd(StraightThroughSoftmaxBackward& a) {
  if (!records(a.grad, a.logits, a.tau_tensor) && !has_tangent(a.grad, a.logits, a.tau_tensor)) {
    return call_below(a);
  }
  a.dim = wrapped_dim(name_of<StraightThroughSoftmaxBackward>(), a.logits, a.dim);
  return differentiable_gradients(a);
}

}  // namespace
}  // namespace gumbel_ext

TORCH_LIBRARY_FRAGMENT(gumbel_ext, m) {
  using namespace gumbel_ext;
  define<StraightThroughSoftmax>(m);
  define<StraightThroughSoftmaxBackward>(m);
}

TORCH_LIBRARY_IMPL(gumbel_ext, CompositeExplicitAutograd, m) {
  using namespace gumbel_ext;
  implement<&straight_through_softmax_composite>(m);
  implement<&straight_through_softmax_backward_composite>(m);
}

TORCH_LIBRARY_IMPL(gumbel_ext, Autograd, m) {
  using namespace gumbel_ext;
  implement<&straight_through_softmax_autograd>(m);
  implement<&straight_through_softmax_backward_autograd>(m);
}
