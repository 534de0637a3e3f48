// The Gumbel-softmax sample: its arguments, results and derivatives.
#include "gumbel_softmax.h"

#include <limits>

#include "../autograd.h"
#include "../gumbel_ext.h"

namespace gumbel_ext {

using Sample = GumbelSoftmax::Result;

Sample gumbel_softmax(const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor,
                      bool hard, int64_t dim, const OptionalTensor& mask, bool return_index,
                      std::optional<at::Generator> generator, const OptionalTensor& rng_state,
                      at::OptionalSymIntArrayRef positions) {
  return call(GumbelSoftmax{logits, tau, tau_tensor, hard, dim, mask, return_index, generator,
                            rng_state, positions});
}

at::Tensor gumbel_argmax(const at::Tensor& logits, int64_t dim, bool keepdim,
                         const OptionalTensor& mask, std::optional<at::Generator> generator,
                         const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions) {
  return call(GumbelArgmax{logits, dim, keepdim, mask, generator, rng_state, positions});
}

std::tuple<at::Tensor, at::Tensor> gumbel_softmax_backward(const at::Tensor& grad,
                                                           const at::Tensor& y,
                                                           const at::Tensor& index, double tau,
                                                           const OptionalTensor& tau_tensor,
                                                           int64_t dim, bool tau_grad) {
  return call(GumbelSoftmaxBackward{grad, y, index, tau, tau_tensor, dim, tau_grad});
}

std::tuple<at::Tensor, at::Tensor> gumbel_softmax_hard_backward(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& index, double tau,
    const OptionalTensor& tau_tensor, int64_t dim, const OptionalTensor& mask,
    const at::Tensor& rng_state, bool tau_grad, at::OptionalSymIntArrayRef positions) {
  return call(GumbelSoftmaxHardBackward{grad, logits, index, tau, tau_tensor, dim, mask, rng_state,
                                        tau_grad, positions});
}

// ---- arguments and results ----------------------------------------------------------------------

Sample GumbelSoftmax::allocate() const {
  return {at::empty_like(logits), empty_index(logits, dim, return_index), empty_rng_state(logits)};
}

Sample GumbelSoftmax::prepare() {
  check_rows(*this);
  return allocate();
}

at::Tensor GumbelArgmax::allocate() const {
  return at::empty_symint(keepdim ? shape_reduced(logits, dim) : shape_without(logits, dim),
                          logits.options().dtype(at::kLong));
}

at::Tensor GumbelArgmax::prepare() {
  check_rows(*this);
  return allocate();
}

std::tuple<at::Tensor, at::Tensor> GumbelSoftmaxBackward::prepare() {
  check_rows_backward(*this);
  return {at::empty_like(y), empty_grad_tau(y, dim, tau_grad)};
}

std::tuple<at::Tensor, at::Tensor> GumbelSoftmaxHardBackward::prepare() {
  check_rows_backward(*this);
  return {at::empty_like(logits), empty_grad_tau(logits, dim, tau_grad)};
}

namespace {

// ---- formulas, differentiable in all their arguments --------------------------------------------

at::Tensor shifted(const at::Tensor& v, const at::Tensor& index, int64_t dim) {
  if (v.dim() == 0 || v.sym_size(dim) == 0) return v;
  return v - v.gather(dim, index.clamp_min(0).unsqueeze(dim));
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

}  // namespace

// dl = y (h - sum h y) / tau, h = dy - dy[index]
// dtau = -(1 / tau) sum log(y) (tau dl)
std::tuple<at::Tensor, at::Tensor> softmax_gradients(const at::Tensor& grad, const at::Tensor& y,
                                                     const at::Tensor& index, const at::Tensor& t,
                                                     int64_t dim, bool tau_grad) {
  const at::Tensor p = y.to(t.scalar_type());
  const at::Tensor scaled = jacobian_product(grad.to(t.scalar_type()), p, index, dim);
  return {(scaled / t).to(y.scalar_type()),
          tau_grad ? -sum_classes(log_y(p) * scaled, dim) / t : at::empty({0}, t.options())};
}

namespace {

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

// ---- the sample ---------------------------------------------------------------------------------

class GumbelSoftmaxFunction : public torch::autograd::Function<GumbelSoftmaxFunction> {
 public:
  template <class... Field>
  static variable_list forward(AutogradContext* ctx, const Field&... field) {
    GumbelSoftmax a{field...};
    // The backward shifts the incoming gradient by its value at the index.
    a.return_index = true;
    auto [y, index, state] = call_below(a);
    ctx->mark_non_differentiable({index, state});
    ctx->set_materialize_grads(false);
    ctx->saved_data["tau_grad"] = requires_grad(a.tau_tensor);
    a.dim = wrapped_dim(name_of<GumbelSoftmax>(), a.logits, a.dim);
    // The straight-through sample keeps nothing of its size but its input: y is recomputed from the
    // noise.
    if (a.hard) {
      a.rng_state = state;
    } else {
      a.logits = y;
      a.mask = a.rng_state = std::nullopt;
    }
    keep(ctx, a, {index});
    return {y, index, state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list out(count_arguments(GumbelSoftmax::schema));
    const at::Tensor& grad = grads[0];
    if (!grad.defined()) return out;
    const Kept<GumbelSoftmax> kept(ctx, [](const GumbelSoftmax& op) {
      return op.hard ? "logits, tau or mask" : "the sample or tau";
    });
    const GumbelSoftmax& a = kept.op;
    const at::Tensor& index = kept.results[0];
    const bool tau_grad = ctx->saved_data["tau_grad"].toBool();
    const auto [grad_logits, grad_tau] =
        a.hard ? call(GumbelSoftmaxHardBackward{grad, a.logits, index, a.tau, a.tau_tensor, a.dim,
                                                a.mask, *a.rng_state, tau_grad, a.positions})
               : call(GumbelSoftmaxBackward{grad, a.logits, index, a.tau, a.tau_tensor, a.dim,
                                            tau_grad});
    out[place_of<GumbelSoftmax>("logits")] = grad_logits;
    if (tau_grad) {
      out[place_of<GumbelSoftmax>("tau_tensor")] = reduced_to(grad_tau, *a.tau_tensor);
    }
    return out;
  }
};

// The soft sample of this level, with its index, recorded and with its tangent.
Sample differentiable_sample(GumbelSoftmax a) {
  a.hard = false;
  a.return_index = true;
  const Sample sample = call_below(a);
  const auto& [y, index, state] = sample;
  a.dim = wrapped_dim(name_of<GumbelSoftmax>(), a.logits, a.dim);
  const auto set_tangents = [&] {
    if (!has_tangent(a.logits, a.tau_tensor)) return;
    const OptionalTensor& tau = a.tau_tensor;
    const at::Tensor tau_tangent = tau ? tau->_fw_grad(/*level=*/0) : at::Tensor();
    const OptionalTensor primal = tau ? OptionalTensor(tau->_fw_primal(/*level=*/0)) : std::nullopt;
    y._set_fw_grad(differentiable_tangent(a.logits._fw_grad(/*level=*/0), tau_tangent, y, index,
                                          temperature(a.tau, primal, y), a.dim),
                   /*level=*/0, /*is_inplace_op=*/false);
  };
  if (records(a.logits, a.tau_tensor)) {
    record(
        {"GumbelSoftmaxBackward", name_of<GumbelSoftmax>(), "the sample or tau"}, {y},
        {a.logits, a.tau_tensor.value_or(at::Tensor())},
        {Saved(y, /*output=*/true), index, a.tau_tensor},
        [tau = a.tau, dim = a.dim](const NodeCall& node) {
          const at::Tensor &y = node.saved[0], &index = node.saved[1], &tau_tensor = node.saved[2];
          const bool tau_grad = node.wants(1);
          const auto [grad_logits, grad_tau] = call(GumbelSoftmaxBackward{
              node.grads[0], y, index, tau, optional(tau_tensor), dim, tau_grad});
          node.out[0] = grad_logits;
          if (tau_grad) node.out[1] = reduced_to(grad_tau, tau_tensor);
        },
        set_tangents);
  } else {
    set_tangents();
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

Sample gumbel_softmax_autograd(GumbelSoftmax& a) {
  const bool recorded = records(a.logits, a.tau_tensor),
             tangent = has_tangent(a.logits, a.tau_tensor);
  if (!recorded && !tangent) return call_below(a);
  a.tau_tensor = unchanging(a.tau_tensor);
  at::Tensor y, index, state;
  if (!tangent && !under_transform()) {
    if (a.hard) a.logits = unchanging(a.logits);
    const variable_list out = apply_function<GumbelSoftmaxFunction>(a);
    y = out[0], index = out[1], state = out[2];
  } else {
    // Under a transform y is not recomputed from the noise: below this level a vmap may give each
    // example its own, which the one state that was drawn does not tell.
    std::tie(y, index, state) = differentiable_sample(a);
    const int64_t dim = wrapped_dim(name_of<GumbelSoftmax>(), a.logits, a.dim);
    if (a.hard) y = straight_through(a.logits, y, index, dim);
  }
  return {y, a.return_index ? index : at::empty({0}, index.options()), state};
}

// ---- its backward -------------------------------------------------------------------------------

// With s = tau dl = y (h - sum h y), so that dl = s / tau and dtau = -sum log(y) s / tau, and with
// the gradients a of dl and b of dtau: s receives r = (a - b log y) / tau.
void gradient_backward(const NodeCall& node, double tau, int64_t dim) {
  const at::Tensor a = node.grads[0], b = node.grads.size() > 1 ? node.grads[1] : at::Tensor();
  const at::Tensor &grad = node.saved[0], &y = node.saved[1], &index = node.saved[2],
                   &tau_tensor = node.saved[3];
  const at::Tensor t = temperature(tau, optional(tau_tensor), y);
  const at::ScalarType type = t.scalar_type();

  const at::Tensor p = y.to(type);
  at::Tensor r;
  if (a.defined()) r = a.to(type) / t;
  if (b.defined()) r = r.defined() ? r - b / t * log_y(p) : -(b / t) * log_y(p);
  if (node.wants(0)) node.out[0] = jacobian_product(r, p, index, dim).to(grad.scalar_type());
  const at::Tensor h = shifted(grad.to(type), index, dim);
  const at::Tensor centred = h - sum_classes(h * p, dim);
  if (node.wants(1)) {
    at::Tensor grad_y = r * centred - h * sum_classes(r * p, dim);
    if (b.defined()) grad_y = grad_y - b / t * centred;
    node.out[1] = grad_y.to(y.scalar_type());
  }
  if (node.wants(2)) {
    node.out[2] = reduced_to(-sum_classes(r * p * centred, dim) / t, tau_tensor);
  }
}

std::tuple<at::Tensor, at::Tensor> gumbel_softmax_backward_autograd(GumbelSoftmaxBackward& a) {
  if (has_tangent(a.grad, a.y, a.tau_tensor)) {
    check_rows_backward(a);
    return softmax_gradients(a.grad, a.y, a.index, temperature(a.tau, a.tau_tensor, a.y), a.dim,
                             a.tau_grad);
  }
  const auto out = call_below(a);
  if (records(a.grad, a.y, a.tau_tensor)) {
    const auto& [grad_logits, grad_tau] = out;
    const int64_t dim = wrapped_dim(name_of<GumbelSoftmaxBackward>(), a.y, a.dim);
    record({"GumbelSoftmaxBackwardBackward", name_of<GumbelSoftmaxBackward>(),
            "the incoming gradient, the sample or tau"},
           a.tau_grad ? variable_list{grad_logits, grad_tau} : variable_list{grad_logits},
           {a.grad, a.y, a.tau_tensor.value_or(at::Tensor())}, {a.grad, a.y, a.index, a.tau_tensor},
           [tau = a.tau, dim](const NodeCall& node) { gradient_backward(node, tau, dim); });
  }
  return out;
}

std::tuple<at::Tensor, at::Tensor> gumbel_softmax_hard_backward_autograd(
    GumbelSoftmaxHardBackward& a) {
  if (!records(a.grad, a.logits, a.tau_tensor) && !has_tangent(a.grad, a.logits, a.tau_tensor)) {
    return call_below(a);
  }
  GumbelSoftmax sample{a.logits, a.tau, a.tau_tensor, /*hard=*/false, a.dim, a.mask};
  sample.rng_state = a.rng_state;
  sample.positions = a.positions;
  const at::Tensor y = std::get<0>(call(sample));
  return call(GumbelSoftmaxBackward{a.grad, y, a.index, a.tau, a.tau_tensor, a.dim, a.tau_grad});
}

}  // namespace
}  // namespace gumbel_ext

TORCH_LIBRARY_FRAGMENT(gumbel_ext, m) {
  using namespace gumbel_ext;
  define<GumbelSoftmax>(m);
  define<GumbelArgmax>(m);
  define<GumbelSoftmaxBackward>(m);
  define<GumbelSoftmaxHardBackward>(m);
}

TORCH_LIBRARY_IMPL(gumbel_ext, Autograd, m) {
  using namespace gumbel_ext;
  implement<&gumbel_softmax_autograd>(m);
  implement<&without_derivative<GumbelArgmax>>(m);
  implement<&gumbel_softmax_backward_autograd>(m);
  implement<&gumbel_softmax_hard_backward_autograd>(m);
}
