// Gradients. A backward runs one fused op; a backward that must itself be differentiable is written
// in PyTorch's ops.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <limits>

#include "arguments.h"
#include "gumbel_ext.h"

namespace gumbel_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// dl = y (h - sum h y) / tau, h = dy - dy[index]
// dtau = -(1 / tau) sum log(y) (tau dl), from the same y
// as differentiable functions of dy, y and tau.
variable_list differentiable_backward(const at::Tensor& grad, const at::Tensor& y,
                                      const at::Tensor& index, const at::Tensor& tau, int64_t dim,
                                      bool tau_grad) {
  const at::ScalarType type = compute_dtype(y.scalar_type());
  const at::Tensor dy = grad.to(type), p = y.to(type), t = tau.to(tau.device(), type);
  at::Tensor h = dy;
  if (y.dim() > 0 && y.numel() > 0) h = dy - dy.gather(dim, index.clamp_min(0).unsqueeze(dim));
  const at::Tensor scaled =
      y.dim() > 0 ? p * (h - (h * p).sum(dim, /*keepdim=*/true)) : at::zeros_like(p) * dy;
  at::Tensor grad_tau;
  if (tau_grad) {
    const double tiny = type == at::kDouble ? std::numeric_limits<double>::min()
                                            : std::numeric_limits<float>::min();
    const at::Tensor terms = p.clamp_min(tiny).log() * scaled;
    grad_tau = -(y.dim() > 0 ? terms.sum(dim, /*keepdim=*/true) : terms) / t;
  }
  return {(scaled / t).to(y.scalar_type()), grad_tau};
}

class GumbelSoftmax : public torch::autograd::Function<GumbelSoftmax> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& logits, double tau,
                               const OptionalTensor& tau_tensor, bool hard, int64_t dim,
                               const OptionalTensor& mask, bool return_index,
                               const std::optional<at::Generator>& generator,
                               const OptionalTensor& rng_state,
                               at::OptionalSymIntArrayRef positions) {
    const at::AutoDispatchBelowADInplaceOrView below;
    // The backward shifts the incoming gradient by its value at the index.
    auto [y, index, state] = gumbel_softmax(logits, tau, tau_tensor, hard, dim, mask,
                                            /*return_index=*/true, generator, rng_state, positions);
    ctx->mark_non_differentiable({index, state});
    ctx->saved_data["tau"] = tau;
    ctx->saved_data["hard"] = hard;
    ctx->saved_data["dim"] = logits.dim() == 0 ? 0 : (dim < 0 ? dim + logits.dim() : dim);
    if (positions) ctx->saved_data["positions"] = *positions;
    ctx->saved_data["tau_grad"] = tau_tensor && tau_tensor->requires_grad();
    // The straight-through sample keeps nothing of size N but its input: y is recomputed from the
    // noise.
    ctx->save_for_backward({hard ? logits : y, index, tau_tensor.value_or(at::Tensor()),
                            hard ? mask.value_or(at::Tensor()) : at::Tensor(),
                            hard ? state : at::Tensor()});
    return {y, index, state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list out(10);
    const at::Tensor& grad = grads[0];
    if (!grad.defined()) return out;
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &logits_or_y = saved[0], &index = saved[1], &tau_tensor = saved[2],
                     &mask = saved[3], &rng_state = saved[4];
    const double tau = ctx->saved_data["tau"].toDouble();
    const int64_t dim = ctx->saved_data["dim"].toInt();
    const bool hard = ctx->saved_data["hard"].toBool(),
               tau_grad = ctx->saved_data["tau_grad"].toBool();
    std::vector<c10::SymInt> positions_saved;
    at::OptionalSymIntArrayRef positions;
    if (ctx->saved_data.count("positions") > 0) {
      positions_saved = ctx->saved_data["positions"].toSymIntVector();
      positions = positions_saved;
    }
    const auto optional = [](const at::Tensor& t) {
      return t.defined() ? OptionalTensor(t) : std::nullopt;
    };

    at::Tensor grad_tau;
    if (at::GradMode::is_enabled()) {
      at::Tensor y = logits_or_y;
      if (hard) {
        y = std::get<0>(gumbel_softmax(logits_or_y, tau, optional(tau_tensor), /*hard=*/false, dim,
                                       optional(mask),
                                       /*return_index=*/false, std::nullopt, rng_state, positions));
      }
      const at::Tensor t =
          tau_tensor.defined()
              ? tau_tensor
              : at::full({}, tau, grad.options().dtype(compute_dtype(grad.scalar_type())));
      const variable_list both = differentiable_backward(grad, y, index, t, dim, tau_grad);
      out[0] = both[0];
      grad_tau = both[1];
    } else if (hard) {
      std::tie(out[0], grad_tau) =
          gumbel_softmax_hard_backward(grad, logits_or_y, index, tau, optional(tau_tensor), dim,
                                       optional(mask), rng_state, tau_grad, positions);
    } else {
      std::tie(out[0], grad_tau) = gumbel_softmax_backward(grad, logits_or_y, index, tau,
                                                           optional(tau_tensor), dim, tau_grad);
    }
    if (tau_grad) {
      out[2] = at::sum_to(grad_tau, tau_tensor.sym_sizes())
                   .to(tau_tensor.device(), tau_tensor.scalar_type());
    }
    return out;
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> gumbel_softmax_autograd(
    const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor, bool hard, int64_t dim,
    const OptionalTensor& mask, bool return_index, std::optional<at::Generator> generator,
    const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions) {
  const bool needs_grad = at::GradMode::is_enabled() &&
                          (logits.requires_grad() || (tau_tensor && tau_tensor->requires_grad()));
  if (!needs_grad) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return gumbel_softmax(logits, tau, tau_tensor, hard, dim, mask, return_index, generator,
                          rng_state, positions);
  }
  const variable_list out = GumbelSoftmax::apply(logits, tau, tau_tensor, hard, dim, mask,
                                                 return_index, generator, rng_state, positions);
  return {out[0], return_index ? out[1] : at::empty({0}, out[1].options()), out[2]};
}

at::Tensor gumbel_argmax_autograd(const at::Tensor& logits, int64_t dim, bool keepdim,
                                  const OptionalTensor& mask,
                                  std::optional<at::Generator> generator,
                                  const OptionalTensor& rng_state,
                                  at::OptionalSymIntArrayRef positions) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return gumbel_argmax(logits, dim, keepdim, mask, generator, rng_state, positions);
}

}  // namespace
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, Autograd, m) {
  using namespace gumbel_ext;
  m.impl("gumbel_softmax", &gumbel_softmax_autograd);
  // An index has no gradient.
  m.impl("gumbel_argmax", &gumbel_argmax_autograd);
  m.impl("gumbel_noise", torch::CppFunction::makeFallthrough());
  // Second derivatives are taken through differentiable_backward(), never through the fused ops.
  m.impl("gumbel_softmax_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("gumbel_softmax_hard_backward", torch::autograd::autogradNotImplementedFallback());
}
