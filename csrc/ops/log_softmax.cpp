// The logarithm of a Gumbel-softmax sample: its arguments, results and derivatives.
#include "log_softmax.h"

#include "../autograd.h"
#include "../gumbel_ext.h"

namespace gumbel_ext {

using TwoTensors = std::tuple<at::Tensor, at::Tensor>;

TwoTensors gumbel_log_softmax(const at::Tensor& logits, double tau,
                              const OptionalTensor& tau_tensor, int64_t dim,
                              const OptionalTensor& mask, std::optional<at::Generator> generator,
                              const OptionalTensor& rng_state,
                              at::OptionalSymIntArrayRef positions) {
  return call(
      GumbelLogSoftmax{logits, tau, tau_tensor, dim, mask, generator, rng_state, positions});
}

TwoTensors gumbel_log_softmax_backward(const at::Tensor& grad, const at::Tensor& log_y, double tau,
                                       const OptionalTensor& tau_tensor, int64_t dim,
                                       bool tau_grad) {
  return call(GumbelLogSoftmaxBackward{grad, log_y, tau, tau_tensor, dim, tau_grad});
}

// ---- arguments and results ----------------------------------------------------------------------

TwoTensors GumbelLogSoftmax::prepare() {
  check_rows(*this);
  return {at::empty_like(logits), empty_rng_state(logits)};
}

void GumbelLogSoftmaxBackward::check() {
  constexpr const char* op = name_of<GumbelLogSoftmaxBackward>();
  check_logits(op, grad);
  dim = wrapped_dim(op, grad, dim);
  TORCH_CHECK_TYPE(log_y.scalar_type() == compute_dtype(grad.scalar_type()), op,
                   ": log_y must have the dtype that grad is computed in, got ",
                   c10::toString(log_y.scalar_type()), " for grad of ",
                   c10::toString(grad.scalar_type()));
  TORCH_CHECK_VALUE(log_y.sym_sizes() == grad.sym_sizes() && log_y.device() == grad.device(), op,
                    ": log_y must have the shape and device of grad, got shape ", log_y.sym_sizes(),
                    " on ", log_y.device());
  check_tau(op, tau, tau_tensor, grad, dim);
}

TwoTensors GumbelLogSoftmaxBackward::prepare() {
  check();
  return {at::empty_like(log_y, log_y.options().dtype(grad.scalar_type())),
          empty_grad_tau(log_y, dim, tau_grad)};
}

namespace {

// ---- formulas, differentiable in all their arguments --------------------------------------------

// With z = (l + g) / tau, k the likeliest class and sums over the others only,
//     dz_i = dy_i - y_i sum_j dy_j,    dz_k = dy_k sum y_j - y_k sum dy_j
// equal in exact arithmetic to dy - y sum(dy), and 1 - y_k does not cancel to nothing as y_k nears
// 1. Classes that cannot occur have no gradient.
struct Distances {
  at::Tensor dz, log_y;  // log_y with 0 in the place of -inf

  Distances(const at::Tensor& grad, const at::Tensor& given, int64_t dim) {
    const at::Tensor absent = given.eq(-INFINITY);
    const at::Tensor g = grad.to(given.scalar_type()).masked_fill(absent, 0);
    const at::Tensor p = given.exp();
    log_y = given.masked_fill(absent, 0);
    if (given.dim() == 0 || given.sym_size(dim) == 0) {
      dz = g - p * g;
      return;
    }
    const at::Tensor likeliest = given.detach().argmax(dim, /*keepdim=*/true);
    const at::Tensor at_k = at::zeros_like(given, at::kBool).scatter(dim, likeliest, true);
    const at::Tensor others = sum_classes(g.masked_fill(at_k, 0), dim),
                     rest = sum_classes(p.masked_fill(at_k, 0), dim);
    const at::Tensor g_k = g.gather(dim, likeliest);
    dz = at::where(at_k, g * rest - p * others, g - p * (g_k + others));
  }
};

std::tuple<at::Tensor, at::Tensor> differentiable_backward(const at::Tensor& grad,
                                                           const at::Tensor& log_y,
                                                           const at::Tensor& t, int64_t dim,
                                                           bool tau_grad) {
  const Distances d(grad, log_y, dim);
  return {(d.dz / t).to(grad.scalar_type()),
          tau_grad ? -sum_classes(d.log_y * d.dz, dim) / t : at::empty({0}, t.options())};
}

// (log y)'_i = h_i - sum_j y_j h_j with h = v - v_k and v = z' = (l' - log(y) tau') / tau, up to a
// number of the row that cancels.
at::Tensor log_tangent(const at::Tensor& logits_tangent, const at::Tensor& tau_tangent,
                       const at::Tensor& log_y, const at::Tensor& t, int64_t dim) {
  const at::Tensor absent = log_y.eq(-INFINITY);
  at::Tensor v;
  if (logits_tangent.defined()) v = logits_tangent;
  if (tau_tangent.defined()) {
    const at::Tensor term =
        log_y.masked_fill(absent, 0) * tau_tangent.to(t.device(), t.scalar_type());
    v = v.defined() ? v - term : -term;
  }
  v = (v / t).masked_fill(absent, 0);
  if (log_y.dim() == 0 || log_y.sym_size(dim) == 0) return v - v + at::zeros_like(log_y);
  const at::Tensor h = v - v.gather(dim, log_y.detach().argmax(dim, /*keepdim=*/true));
  return (h - sum_classes(log_y.exp() * h, dim)).masked_fill(absent, 0);
}

// ---- derivatives --------------------------------------------------------------------------------

TwoTensors gumbel_log_softmax_autograd(GumbelLogSoftmax& a) {
  const bool recorded = records(a.logits, a.tau_tensor),
             tangent = has_tangent(a.logits, a.tau_tensor);
  const at::ScalarType dtype = a.logits.scalar_type(), type = compute_dtype(dtype);
  if ((recorded || tangent) && dtype != type) {
    // A log y of 16 bits does not say y well enough for a gradient: what is kept is the one of the
    // computation.
    a.logits = a.logits.to(type);
    auto [log_y, state] = call(a);
    return {log_y.to(dtype), state};
  }
  const auto sample = call_below(a);
  if (!recorded && !tangent) return sample;
  const at::Tensor& log_y = std::get<0>(sample);
  const int64_t dim = wrapped_dim(name_of<GumbelLogSoftmax>(), a.logits, a.dim);
  const auto set_tangents = [&] {
    if (!tangent) return;
    const OptionalTensor& tau = a.tau_tensor;
    const at::Tensor tau_tangent = tau ? tau->_fw_grad(/*level=*/0) : at::Tensor();
    const OptionalTensor primal = tau ? OptionalTensor(tau->_fw_primal(/*level=*/0)) : std::nullopt;
    log_y._set_fw_grad(log_tangent(a.logits._fw_grad(/*level=*/0), tau_tangent, log_y,
                                   temperature(a.tau, primal, log_y), dim),
                       /*level=*/0, /*is_inplace_op=*/false);
  };
  if (recorded) {
    const OptionalTensor kept_tau = unchanging(a.tau_tensor);
    record(
        {"GumbelLogSoftmaxBackward", name_of<GumbelLogSoftmax>(), "the sample or tau"}, {log_y},
        {a.logits, kept_tau.value_or(at::Tensor())}, {Saved(log_y, /*output=*/true), kept_tau},
        [tau = a.tau, dim](const NodeCall& node) {
          const at::Tensor &log_y = node.saved[0], &tau_tensor = node.saved[1];
          const bool tau_grad = node.wants(1);
          const auto [grad_logits, grad_tau] = call(GumbelLogSoftmaxBackward{
              node.grads[0], log_y, tau, optional(tau_tensor), dim, tau_grad});
          node.out[0] = grad_logits;
          if (tau_grad) node.out[1] = reduced_to(grad_tau, tau_tensor);
        },
        set_tangents);
  } else {
    set_tangents();
  }
  return sample;
}

TwoTensors gumbel_log_softmax_backward_autograd(GumbelLogSoftmaxBackward& a) {
  if (!records(a.grad, a.log_y, a.tau_tensor) && !has_tangent(a.grad, a.log_y, a.tau_tensor)) {
    return call_below(a);
  }
  a.check();
  return differentiable_backward(a.grad, a.log_y, temperature(a.tau, a.tau_tensor, a.log_y), a.dim,
                                 a.tau_grad);
}

}  // namespace
}  // namespace gumbel_ext

TORCH_LIBRARY_FRAGMENT(gumbel_ext, m) {
  using namespace gumbel_ext;
  define<GumbelLogSoftmax>(m);
  define<GumbelLogSoftmaxBackward>(m);
}

TORCH_LIBRARY_IMPL(gumbel_ext, Autograd, m) {
  using namespace gumbel_ext;
  implement<&gumbel_log_softmax_autograd>(m);
  implement<&gumbel_log_softmax_backward_autograd>(m);
}
