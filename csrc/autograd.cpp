// Derivatives. The Autograd kernels run once for each level of differentiation: that of
// torch.autograd, and that of each functorch transform around it. Like PyTorch's own they record a
// node, or set a forward-mode tangent, and call the same operator for the levels below.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <limits>

#include "autograd_levels.h"
#include "autograd_node.h"
#include "gumbel_ext.h"

namespace gumbel_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ---- formulas, differentiable in all their arguments --------------------------------------------

at::Tensor shifted(const at::Tensor& v, const at::Tensor& index, int64_t dim) {
  if (v.dim() == 0 || v.sym_size(dim) == 0) return v;
  return v - v.gather(dim, index.clamp_min(0).unsqueeze(dim));
}

at::Tensor sum_classes(const at::Tensor& v, int64_t dim) {
  return v.dim() == 0 ? v : v.sum(dim, /*keepdim=*/true);
}

// (diag(p) - p p^T) v, tau times the Jacobian of y = p in the logits. v enters as v - v[index]:
// equal in exact arithmetic, and the entry that may be close to 1 does not cancel.
at::Tensor jacobian_product(const at::Tensor& v, const at::Tensor& p, const at::Tensor& index,
                            int64_t dim) {
  if (p.dim() == 0) return at::zeros_like(p) * v;
  const at::Tensor h = shifted(v, index, dim);
  return p * (h - sum_classes(h * p, dim));
}

// log y, which is z = (l + g) / tau up to a number of the row; for y = 0 a finite number, times 0.
at::Tensor log_y(const at::Tensor& p) {
  const double tiny = p.scalar_type() == at::kDouble ? std::numeric_limits<double>::min()
                                                     : std::numeric_limits<float>::min();
  return p.clamp_min(tiny).log();
}

// dl = y (h - sum h y) / tau, h = dy - dy[index]
// dtau = -(1 / tau) sum log(y) (tau dl)
variable_list differentiable_backward(const at::Tensor& grad, const at::Tensor& y,
                                      const at::Tensor& index, const at::Tensor& t, int64_t dim,
                                      bool tau_grad) {
  const at::Tensor p = y.to(t.scalar_type());
  const at::Tensor scaled = jacobian_product(grad.to(t.scalar_type()), p, index, dim);
  return {(scaled / t).to(y.scalar_type()),
          tau_grad ? -sum_classes(log_y(p) * scaled, dim) / t : at::empty({0}, t.options())};
}

// y' = (diag(y) - y y^T) (l' - log(y) tau') / tau
at::Tensor differentiable_tangent(const at::Tensor& logits_tangent, const at::Tensor& tau_tangent,
                                  const at::Tensor& y, const at::Tensor& index, const at::Tensor& t,
                                  int64_t dim) {
  const at::Tensor p = y.to(t.scalar_type());
  at::Tensor v;
  if (logits_tangent.defined()) v = logits_tangent.to(t.scalar_type());
  if (tau_tangent.defined()) {
    const at::Tensor term = log_y(p) * tau_tangent.to(t.device(), t.scalar_type());
    v = v.defined() ? v - term : -term;
  }
  return (jacobian_product(v, p, index, dim) / t).to(y.scalar_type());
}

// ---- forward ------------------------------------------------------------------------------------

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
    ctx->set_materialize_grads(false);
    ctx->saved_data["tau"] = tau;
    ctx->saved_data["hard"] = hard;
    ctx->saved_data["dim"] = logits.dim() == 0 ? 0 : (dim < 0 ? dim + logits.dim() : dim);
    if (positions) ctx->saved_data["positions"] = *positions;
    ctx->saved_data["tau_grad"] = requires_grad(tau_tensor);
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
    const bool hard = ctx->saved_data["hard"].toBool();
    const variable_list saved =
        unchanged("gumbel_softmax", hard ? "logits, tau or mask" : "the sample or tau",
                  [&] { return ctx->get_saved_variables(); });
    const at::Tensor &logits_or_y = saved[0], &index = saved[1], &tau_tensor = saved[2],
                     &mask = saved[3], &rng_state = saved[4];
    const double tau = ctx->saved_data["tau"].toDouble();
    const int64_t dim = ctx->saved_data["dim"].toInt();
    const bool tau_grad = ctx->saved_data["tau_grad"].toBool();
    at::Tensor grad_tau;
    if (hard) {
      std::vector<c10::SymInt> positions_saved;
      at::OptionalSymIntArrayRef positions;
      if (ctx->saved_data.count("positions") > 0) {
        positions_saved = ctx->saved_data["positions"].toSymIntVector();
        positions = positions_saved;
      }
      std::tie(out[0], grad_tau) =
          gumbel_softmax_hard_backward(grad, logits_or_y, index, tau, optional(tau_tensor), dim,
                                       optional(mask), rng_state, tau_grad, positions);
    } else {
      std::tie(out[0], grad_tau) = gumbel_softmax_backward(grad, logits_or_y, index, tau,
                                                           optional(tau_tensor), dim, tau_grad);
    }
    if (tau_grad) out[2] = reduced_to(grad_tau, tau_tensor);
    return out;
  }
};

// The soft sample alone, for levels that a Function does not serve.
struct SampleNode : torch::autograd::Node {
  std::string name() const override { return "GumbelSoftmaxBackward"; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list out(2);
    if (!grads[0].defined()) return out;
    const auto [y, index, tau_tensor] = unchanged("gumbel_softmax", "the sample or tau", [&] {
      return std::tuple{saved_y.unpack(pointer_to(this)), saved_index.unpack(), saved_tau.unpack()};
    });
    const bool tau_grad = should_compute_output(1);
    at::Tensor grad_tau;
    std::tie(out[0], grad_tau) =
        gumbel_softmax_backward(grads[0], y, index, tau, optional(tau_tensor), dim, tau_grad);
    if (tau_grad) out[1] = reduced_to(grad_tau, tau_tensor);
    return out;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    saved_y.reset_data();
    saved_index.reset_data();
    saved_tau.reset_data();
  }

  torch::autograd::SavedVariable saved_y, saved_index, saved_tau;
  double tau = 1;
  int64_t dim = 0;
};

using Sample = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// The soft sample of this level, with its index, recorded and with its tangent.
Sample differentiable_sample(const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor,
                             int64_t dim, const OptionalTensor& mask,
                             const std::optional<at::Generator>& generator,
                             const OptionalTensor& rng_state,
                             at::OptionalSymIntArrayRef positions) {
  Sample sample;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    sample = gumbel_softmax(logits, tau, tau_tensor, /*hard=*/false, dim, mask,
                            /*return_index=*/true, generator, rng_state, positions);
  }
  const auto& [y, index, state] = sample;
  dim = wrapped_dim("gumbel_softmax", logits, dim);
  decltype(make_node<SampleNode>()) node;
  if (records(logits, tau_tensor)) {
    node = make_node<SampleNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(logits, tau_tensor));
    node->tau = tau;
    node->dim = dim;
    torch::autograd::set_history(y, node);
  }
  if (has_tangent(logits, tau_tensor)) {
    const at::Tensor logits_tangent = logits._fw_grad(/*level=*/0),
                     tau_tangent = tau_tensor ? tau_tensor->_fw_grad(/*level=*/0) : at::Tensor();
    const OptionalTensor primal =
        tau_tensor ? OptionalTensor(tau_tensor->_fw_primal(/*level=*/0)) : std::nullopt;
    const at::Tensor tangent = differentiable_tangent(logits_tangent, tau_tangent, y, index,
                                                      temperature(tau, primal, y), dim);
    y._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
  }
  if (node) {
    // With its tangent, from which that of the gradient is made.
    node->saved_y = torch::autograd::SavedVariable(y, /*is_output=*/true);
    node->saved_index = torch::autograd::SavedVariable(index, /*is_output=*/false);
    node->saved_tau = torch::autograd::SavedVariable(tau_tensor, /*is_output=*/false);
  }
  return sample;
}

// The one-hot vector of the index with the derivative of the soft sample y; NaN where y is, but for
// a logit of +inf, which is certainly chosen.
at::Tensor straight_through(const at::Tensor& logits, const at::Tensor& y, const at::Tensor& index,
                            int64_t dim) {
  if (y.dim() > 0 && y.sym_size(dim) == 0) return y;
  const at::Tensor allowed = index.ge(0).to(y.scalar_type());
  at::Tensor one_hot = allowed, chosen_logit = logits.detach();
  if (y.dim() > 0) {
    const at::Tensor chosen = index.clamp_min(0).unsqueeze(dim);
    one_hot = at::zeros_like(y).scatter(dim, chosen, allowed.unsqueeze(dim));
    chosen_logit = chosen_logit.gather(dim, chosen);
  }
  return one_hot + (y - y.detach()).masked_fill(chosen_logit.isposinf(), 0);
}

Sample gumbel_softmax_autograd(const at::Tensor& logits, double tau,
                               const OptionalTensor& tau_tensor, bool hard, int64_t dim,
                               const OptionalTensor& mask, bool return_index,
                               std::optional<at::Generator> generator,
                               const OptionalTensor& rng_state,
                               at::OptionalSymIntArrayRef positions) {
  const bool recorded = records(logits, tau_tensor), tangent = has_tangent(logits, tau_tensor);
  if (!recorded && !tangent) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return gumbel_softmax(logits, tau, tau_tensor, hard, dim, mask, return_index, generator,
                          rng_state, positions);
  }
  at::Tensor y, index, state;
  if (!tangent && !under_transform()) {
    const variable_list out =
        GumbelSoftmax::apply(hard ? unchanging(logits) : logits, tau, unchanging(tau_tensor), hard,
                             dim, mask, return_index, generator, rng_state, positions);
    y = out[0], index = out[1], state = out[2];
  } else {
    // Under a transform y is not recomputed from the noise: below this level a vmap may give each
    // example its own, which the one state that was drawn does not tell.
    std::tie(y, index, state) = differentiable_sample(logits, tau, unchanging(tau_tensor), dim,
                                                      mask, generator, rng_state, positions);
    if (hard) y = straight_through(logits, y, index, wrapped_dim("gumbel_softmax", logits, dim));
  }
  return {y, return_index ? index : at::empty({0}, index.options()), state};
}

// ---- backward -----------------------------------------------------------------------------------

struct GradientNode : torch::autograd::Node {
  std::string name() const override { return "GumbelSoftmaxBackwardBackward"; }

  // With s = tau dl = y (h - sum h y), so that dl = s / tau and dtau = -sum log(y) s / tau, and
  // with the gradients a of dl and b of dtau: s receives r = (a - b log y) / tau.
  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list out(3);
    const at::Tensor a = grads[0], b = grads.size() > 1 ? grads[1] : at::Tensor();
    if (!a.defined() && !b.defined()) return out;
    const auto [grad, y, index, tau_tensor] =
        unchanged("gumbel_softmax_backward", "the incoming gradient, the sample or tau", [&] {
          return std::tuple{saved_grad.unpack(), saved_y.unpack(), saved_index.unpack(),
                            saved_tau.unpack()};
        });
    const at::Tensor t = temperature(tau, optional(tau_tensor), y);
    const at::ScalarType type = t.scalar_type();

    const at::Tensor p = y.to(type);
    at::Tensor r;
    if (a.defined()) r = a.to(type) / t;
    if (b.defined()) r = r.defined() ? r - b / t * log_y(p) : -(b / t) * log_y(p);
    if (should_compute_output(0)) {
      out[0] = jacobian_product(r, p, index, dim).to(grad.scalar_type());
    }
    const at::Tensor h = shifted(grad.to(type), index, dim);
    const at::Tensor centred = h - sum_classes(h * p, dim);
    if (should_compute_output(1)) {
      at::Tensor grad_y = r * centred - h * sum_classes(r * p, dim);
      if (b.defined()) grad_y = grad_y - b / t * centred;
      out[1] = grad_y.to(y.scalar_type());
    }
    if (should_compute_output(2)) {
      out[2] = reduced_to(-sum_classes(r * p * centred, dim) / t, tau_tensor);
    }
    return out;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    saved_grad.reset_data();
    saved_y.reset_data();
    saved_index.reset_data();
    saved_tau.reset_data();
  }

  torch::autograd::SavedVariable saved_grad, saved_y, saved_index, saved_tau;
  double tau = 1;
  int64_t dim = 0;
};

std::tuple<at::Tensor, at::Tensor> gumbel_softmax_backward_autograd(
    const at::Tensor& grad, const at::Tensor& y, const at::Tensor& index, double tau,
    const OptionalTensor& tau_tensor, int64_t dim, bool tau_grad) {
  if (has_tangent(grad, y, tau_tensor)) {
    dim = check_backward("gumbel_softmax_backward", grad, y, index, tau, tau_tensor, dim,
                         std::nullopt, std::nullopt, std::nullopt);
    const variable_list out =
        differentiable_backward(grad, y, index, temperature(tau, tau_tensor, y), dim, tau_grad);
    return {out[0], out[1]};
  }
  std::tuple<at::Tensor, at::Tensor> out;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    out = gumbel_softmax_backward(grad, y, index, tau, tau_tensor, dim, tau_grad);
  }
  if (records(grad, y, tau_tensor)) {
    using torch::autograd::SavedVariable;
    auto node = make_node<GradientNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(grad, y, tau_tensor));
    node->tau = tau;
    node->dim = wrapped_dim("gumbel_softmax_backward", y, dim);
    node->saved_grad = SavedVariable(grad, /*is_output=*/false);
    node->saved_y = SavedVariable(y, /*is_output=*/false);
    node->saved_index = SavedVariable(index, /*is_output=*/false);
    node->saved_tau = SavedVariable(tau_tensor, /*is_output=*/false);
    torch::autograd::set_history(std::get<0>(out), node);
    if (tau_grad) torch::autograd::set_history(std::get<1>(out), node);
  }
  return out;
}

std::tuple<at::Tensor, at::Tensor> gumbel_softmax_hard_backward_autograd(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& index, double tau,
    const OptionalTensor& tau_tensor, int64_t dim, const OptionalTensor& mask,
    const at::Tensor& rng_state, bool tau_grad, at::OptionalSymIntArrayRef positions) {
  if (records(grad, logits, tau_tensor) || has_tangent(grad, logits, tau_tensor)) {
    const at::Tensor y =
        std::get<0>(gumbel_softmax(logits, tau, tau_tensor, /*hard=*/false, dim, mask,
                                   /*return_index=*/false, std::nullopt, rng_state, positions));
    return gumbel_softmax_backward(grad, y, index, tau, tau_tensor, dim, tau_grad);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return gumbel_softmax_hard_backward(grad, logits, index, tau, tau_tensor, dim, mask, rng_state,
                                      tau_grad, positions);
}

// ---- the others ---------------------------------------------------------------------------------

at::Tensor gumbel_argmax_autograd(const at::Tensor& logits, int64_t dim, bool keepdim,
                                  const OptionalTensor& mask,
                                  std::optional<at::Generator> generator,
                                  const OptionalTensor& rng_state,
                                  at::OptionalSymIntArrayRef positions) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return gumbel_argmax(logits, dim, keepdim, mask, generator, rng_state, positions);
}

at::Tensor gumbel_topk_autograd(const at::Tensor& logits, c10::SymInt k, int64_t dim,
                                const OptionalTensor& mask, std::optional<at::Generator> generator,
                                const OptionalTensor& rng_state,
                                at::OptionalSymIntArrayRef positions) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return gumbel_topk(logits, std::move(k), dim, mask, generator, rng_state, positions);
}

}  // namespace
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, Autograd, m) {
  using namespace gumbel_ext;
  m.impl("gumbel_softmax", &gumbel_softmax_autograd);
  // An index has no gradient.
  m.impl("gumbel_argmax", &gumbel_argmax_autograd);
  m.impl("gumbel_topk", &gumbel_topk_autograd);
  m.impl("gumbel_noise", torch::CppFunction::makeFallthrough());
  m.impl("draw_rng_state", torch::CppFunction::makeFallthrough());
  m.impl("gumbel_softmax_backward", &gumbel_softmax_backward_autograd);
  m.impl("gumbel_softmax_hard_backward", &gumbel_softmax_hard_backward_autograd);
}
