// The logarithm of a Gumbel-softmax sample: its derivatives, its shapes, and the op in PyTorch's
// ops for devices without a kernel of their own.
#include <torch/library.h>

#include <limits>

#include "autograd_levels.h"
#include "autograd_node.h"
#include "gumbel_ext.h"

namespace gumbel_ext {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using Sample = std::tuple<at::Tensor, at::Tensor>;

constexpr const char* kForward = "gumbel_log_softmax";
constexpr const char* kBackward = "gumbel_log_softmax_backward";

// ---- on every device ----------------------------------------------------------------------------

// A temperature that does not divide as 0 or infinity.
at::Tensor divisor(double tau, const OptionalTensor& tau_tensor, const at::Tensor& like) {
  const at::Tensor t = temperature(tau, tau_tensor, like);
  return t.scalar_type() == at::kDouble ? t.clamp_min(std::numeric_limits<double>::min())
                                        : t.clamp_min(std::numeric_limits<float>::min());
}

Sample log_softmax_of_ops(const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor,
                          int64_t dim, const OptionalTensor& mask,
                          std::optional<at::Generator> generator, const OptionalTensor& rng_state,
                          at::OptionalSymIntArrayRef positions) {
  dim =
      check_forward(kForward, logits, tau, tau_tensor, dim, mask, generator, rng_state, positions);
  if (tau_tensor && tau_tensor->is_cpu()) check_tau_values(kForward, tau_tensor->to(at::kDouble));
  const auto integers = logits.options().dtype(at::kLong);
  if (logits.numel() == 0) return {at::empty_like(logits), at::zeros({2}, integers)};
  at::Tensor state;
  if (rng_state) {
    state = rng_state->to(logits.device(), at::kLong, /*non_blocking=*/false, /*copy=*/true);
  } else {
    state = draw_rng_state(logits, generator);
  }
  const at::Tensor wide = logits.to(compute_dtype(logits.scalar_type()));
  at::Tensor scores =
      wide +
      gumbel_noise(wide, logits.sizes(), std::nullopt, state, positions).view(logits.sizes());
  if (mask) scores = scores.masked_fill(mask->logical_not(), -INFINITY);
  if (logits.dim() == 0) {
    scores =
        (scores - scores)
            .masked_fill(mask ? mask->logical_not() : at::zeros_like(scores, at::kBool), -INFINITY);
  } else {
    const at::Tensor distance =
        (scores - scores.amax(dim, /*keepdim=*/true)) / divisor(tau, tau_tensor, wide);
    scores = distance - distance.exp().sum(dim, /*keepdim=*/true).log();
    if (mask) {
      const at::Tensor forbidden =
          mask->expand(logits.sizes()).any(dim, /*keepdim=*/true).logical_not();
      scores = scores.masked_fill(forbidden, -INFINITY);
    }
  }
  return {at::empty_like(logits).copy_(scores), state};
}

at::Tensor sum_classes(const at::Tensor& v, int64_t dim) {
  return v.dim() == 0 ? v : v.sum(dim, /*keepdim=*/true);
}

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

std::tuple<at::Tensor, at::Tensor> log_backward_of_ops(const at::Tensor& grad,
                                                       const at::Tensor& log_y, double tau,
                                                       const OptionalTensor& tau_tensor,
                                                       int64_t dim, bool tau_grad) {
  dim = check_log_backward(kBackward, grad, log_y, tau, tau_tensor, dim);
  auto [grad_logits, grad_tau] =
      differentiable_backward(grad, log_y, divisor(tau, tau_tensor, log_y), dim, tau_grad);
  return {at::empty_like(log_y, log_y.options().dtype(grad.scalar_type())).copy_(grad_logits),
          grad_tau};
}

// ---- shapes -------------------------------------------------------------------------------------

Sample log_softmax_meta(const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor,
                        int64_t dim, const OptionalTensor& mask,
                        std::optional<at::Generator> generator, const OptionalTensor& rng_state,
                        at::OptionalSymIntArrayRef positions) {
  check_forward(kForward, logits, tau, tau_tensor, dim, mask, generator, rng_state, positions);
  return {at::empty_like(logits), at::empty({2}, logits.options().dtype(at::kLong))};
}

std::tuple<at::Tensor, at::Tensor> log_backward_meta(const at::Tensor& grad,
                                                     const at::Tensor& log_y, double tau,
                                                     const OptionalTensor& tau_tensor, int64_t dim,
                                                     bool tau_grad) {
  dim = check_log_backward(kBackward, grad, log_y, tau, tau_tensor, dim);
  return {at::empty_like(log_y, log_y.options().dtype(grad.scalar_type())),
          empty_grad_tau(log_y, dim, tau_grad)};
}

// ---- derivatives --------------------------------------------------------------------------------

struct LogSampleNode : torch::autograd::Node {
  std::string name() const override { return "GumbelLogSoftmaxBackward"; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list out(2);
    if (!grads[0].defined()) return out;
    const auto [log_y, tau_tensor] = unchanged(kForward, "the sample or tau", [&] {
      return std::tuple{saved_log_y.unpack(pointer_to(this)), saved_tau.unpack()};
    });
    const bool tau_grad = should_compute_output(1);
    at::Tensor grad_tau;
    std::tie(out[0], grad_tau) =
        gumbel_log_softmax_backward(grads[0], log_y, tau, optional(tau_tensor), dim, tau_grad);
    if (tau_grad) out[1] = reduced_to(grad_tau, tau_tensor);
    return out;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    saved_log_y.reset_data();
    saved_tau.reset_data();
  }

  SavedVariable saved_log_y, saved_tau;
  double tau = 1;
  int64_t dim = 0;
};

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

Sample gumbel_log_softmax_autograd(const at::Tensor& logits, double tau,
                                   const OptionalTensor& tau_tensor, int64_t dim,
                                   const OptionalTensor& mask,
                                   std::optional<at::Generator> generator,
                                   const OptionalTensor& rng_state,
                                   at::OptionalSymIntArrayRef positions) {
  const bool recorded = records(logits, tau_tensor), tangent = has_tangent(logits, tau_tensor);
  const at::ScalarType type = compute_dtype(logits.scalar_type());
  if ((recorded || tangent) && logits.scalar_type() != type) {
    // A log y of 16 bits does not say y well enough for a gradient: what is kept is the one of the
    // computation.
    auto [log_y, state] = gumbel_log_softmax(logits.to(type), tau, tau_tensor, dim, mask, generator,
                                             rng_state, positions);
    return {log_y.to(logits.scalar_type()), state};
  }
  Sample sample;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    sample =
        gumbel_log_softmax(logits, tau, tau_tensor, dim, mask, generator, rng_state, positions);
  }
  if (!recorded && !tangent) return sample;
  const at::Tensor& log_y = std::get<0>(sample);
  dim = wrapped_dim(kForward, logits, dim);
  decltype(make_node<LogSampleNode>()) node;
  OptionalTensor kept_tau;
  if (recorded) {
    node = make_node<LogSampleNode>();
    kept_tau = unchanging(tau_tensor);
    node->set_next_edges(torch::autograd::collect_next_edges(logits, kept_tau));
    node->tau = tau;
    node->dim = dim;
    torch::autograd::set_history(log_y, node);
  }
  if (tangent) {
    const OptionalTensor primal =
        tau_tensor ? OptionalTensor(tau_tensor->_fw_primal(/*level=*/0)) : std::nullopt;
    const at::Tensor of_log_y = log_tangent(
        logits._fw_grad(/*level=*/0), tau_tensor ? tau_tensor->_fw_grad(/*level=*/0) : at::Tensor(),
        log_y, temperature(tau, primal, log_y), dim);
    log_y._set_fw_grad(of_log_y, /*level=*/0, /*is_inplace_op=*/false);
  }
  if (node) {
    // With its tangent, from which that of the gradient is made.
    node->saved_log_y = SavedVariable(log_y, /*is_output=*/true);
    node->saved_tau = SavedVariable(kept_tau, /*is_output=*/false);
  }
  return sample;
}

std::tuple<at::Tensor, at::Tensor> gumbel_log_softmax_backward_autograd(
    const at::Tensor& grad, const at::Tensor& log_y, double tau, const OptionalTensor& tau_tensor,
    int64_t dim, bool tau_grad) {
  if (records(grad, log_y, tau_tensor) || has_tangent(grad, log_y, tau_tensor)) {
    dim = check_log_backward(kBackward, grad, log_y, tau, tau_tensor, dim);
    return differentiable_backward(grad, log_y, temperature(tau, tau_tensor, log_y), dim, tau_grad);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return gumbel_log_softmax_backward(grad, log_y, tau, tau_tensor, dim, tau_grad);
}

}  // namespace
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CompositeExplicitAutograd, m) {
  m.impl("gumbel_log_softmax", &gumbel_ext::log_softmax_of_ops);
  m.impl("gumbel_log_softmax_backward", &gumbel_ext::log_backward_of_ops);
}

TORCH_LIBRARY_IMPL(gumbel_ext, Meta, m) {
  m.impl("gumbel_log_softmax", &gumbel_ext::log_softmax_meta);
  m.impl("gumbel_log_softmax_backward", &gumbel_ext::log_backward_meta);
}

TORCH_LIBRARY_IMPL(gumbel_ext, Autograd, m) {
  m.impl("gumbel_log_softmax", &gumbel_ext::gumbel_log_softmax_autograd);
  m.impl("gumbel_log_softmax_backward", &gumbel_ext::gumbel_log_softmax_backward_autograd);
}
