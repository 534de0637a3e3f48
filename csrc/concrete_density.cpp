// The log density of the Concrete distribution: its arguments, its shapes, its derivatives, and the
// op in PyTorch's ops for devices without a kernel of their own.
#include "concrete_density.h"

#include <ATen/ExpandUtils.h>
#include <torch/library.h>

#include <limits>

#include "autograd_levels.h"
#include "autograd_node.h"
#include "gumbel_ext.h"

namespace gumbel_ext {

// ---- arguments ----------------------------------------------------------------------------------

namespace {

constexpr const char* kForward = "concrete_log_prob";
constexpr const char* kBackward = "concrete_log_prob_backward";

c10::SymDimVector common_shape(const char* op, const at::Tensor& value, const at::Tensor& logits) {
  const c10::SymIntArrayRef a = value.sym_sizes(), b = logits.sym_sizes();
  c10::SymDimVector shape(std::max(a.size(), b.size()), 1);
  for (size_t i = 1; i <= shape.size(); ++i) {
    const c10::SymInt m = i <= a.size() ? a[a.size() - i] : c10::SymInt(1),
                      n = i <= b.size() ? b[b.size() - i] : c10::SymInt(1);
    const bool m_is_one = m == 1;
    TORCH_CHECK_VALUE(m_is_one || n == 1 || m == n, op,
                      ": value and logits must broadcast together, got shapes ", a, " and ", b);
    shape[shape.size() - i] = m_is_one ? n : m;
  }
  return shape;
}

}  // namespace

DensityArguments::DensityArguments(const char* op, const at::Tensor& given_value,
                                   const at::Tensor& given_logits, double tau,
                                   const OptionalTensor& tau_tensor, int64_t given_dim) {
  check_logits(op, given_logits);
  TORCH_CHECK_TYPE(given_value.layout() == at::kStrided, op,
                   ": value must be a dense (strided) tensor, got layout ", given_value.layout());
  TORCH_CHECK_TYPE(given_value.scalar_type() == given_logits.scalar_type(), op,
                   ": value must have the dtype of logits, ",
                   c10::toString(given_logits.scalar_type()), ", got ",
                   c10::toString(given_value.scalar_type()));
  TORCH_CHECK_VALUE(given_value.device() == given_logits.device(), op,
                    ": value must be on the device of logits (", given_logits.device(), "), got ",
                    given_value.device());
  const c10::SymDimVector shape = common_shape(op, given_value, given_logits);
  value_expanded = given_value.sym_sizes() != c10::SymIntArrayRef(shape);
  logits_expanded = given_logits.sym_sizes() != c10::SymIntArrayRef(shape);
  value = value_expanded ? given_value.expand_symint(shape) : given_value;
  logits = logits_expanded ? given_logits.expand_symint(shape) : given_logits;
  dim = wrapped_dim(op, logits, given_dim);
  check_tau(op, tau, tau_tensor, logits, dim);
}

DensityArguments::DensityArguments(const char* op, const at::Tensor& grad, const at::Tensor& value,
                                   const at::Tensor& logits, double tau,
                                   const OptionalTensor& tau_tensor, int64_t dim)
    : DensityArguments(op, value, logits, tau, tau_tensor, dim) {
  const c10::SymDimVector shape = shape_without(this->logits, this->dim);
  TORCH_CHECK_TYPE(grad.scalar_type() == compute_type(), op, ": grad must have dtype ",
                   c10::toString(compute_type()), ", got ", c10::toString(grad.scalar_type()));
  TORCH_CHECK_VALUE(
      grad.sym_sizes() == c10::SymIntArrayRef(shape) && grad.device() == logits.device(), op,
      ": grad must have shape ", c10::SymIntArrayRef(shape), " on ", logits.device(), ", got ",
      grad.sym_sizes(), " on ", grad.device());
}

at::Tensor DensityArguments::empty_density() const {
  return at::empty_symint(shape_without(logits, dim), logits.options().dtype(compute_type()));
}

namespace {

at::Tensor empty_gradient(const at::Tensor& operand, bool expanded, bool wanted,
                          at::ScalarType compute_type) {
  if (!wanted) return at::empty({0}, operand.options());
  if (!expanded) return at::empty_like(operand);
  return at::empty_symint(operand.sym_sizes(), operand.options().dtype(compute_type));
}

}  // namespace

at::Tensor DensityArguments::empty_grad_value(bool wanted) const {
  return empty_gradient(value, value_expanded, wanted, compute_type());
}
at::Tensor DensityArguments::empty_grad_logits(bool wanted) const {
  return empty_gradient(logits, logits_expanded, wanted, compute_type());
}

namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// ---- formulas, differentiable in all their arguments --------------------------------------------

// What a row is made of. With x = log(value), l the logits, u_i = l_i - tau x_i, and
// p = softmax(u):
//     log density = lgamma(n) + (n - 1) log(tau) + sum_i u_i - n logsumexp(u)  [ - sum_i x_i ]
// Towards the boundary, m of the x fall to -inf together: p is then the softmax of the logits of
// those classes alone, and x has the coefficient (n - m) tau  [ - m ].
struct Rows {
  at::Tensor x, u;           // finite: 0 where a class is dropped, x 0 and u = l at the boundary
  at::Tensor dropped, zero;  // impossible classes of value 0; possible classes of value 0
  at::Tensor impossible;     // impossible classes with a value
  at::Tensor n, m;           // of a row, dim kept: classes, those at the boundary
  at::Tensor p, peak, sum;   // softmax, over the zeros alone if there are any; its terms' sum
  at::Tensor bad;            // of a row, dim kept: without a density
  at::Tensor coefficient;    // of x, where m > 0
  at::Tensor tau;

  Rows(const DensityArguments& a, const at::Tensor& t, bool log_space)
      : tau(a.logits.dim() == 0 ? t.view({1}) : t) {
    const int64_t dim = a.dim;
    const at::ScalarType type = a.compute_type();
    const auto at_least_1d = [](const at::Tensor& v) { return v.dim() == 0 ? v.unsqueeze(0) : v; };
    const at::Tensor given = at_least_1d(a.value).to(type), l = at_least_1d(a.logits).to(type);
    const at::Tensor none = log_space ? given.eq(-INFINITY) : given.eq(0), never = l.eq(-INFINITY);
    dropped = none.logical_and(never);
    impossible = never.logical_and(none.logical_not());
    zero = none.logical_and(never.logical_not());
    const at::Tensor inside = given.masked_fill(none, log_space ? 0 : 1);
    x = log_space ? inside : inside.log();
    u = at::where(dropped, 0, l) - tau * x;
    n = dropped.logical_not().sum(dim, /*keepdim=*/true);
    m = zero.sum(dim, /*keepdim=*/true);
    bad = x.isnan()
              .logical_or(x.eq(INFINITY))
              .logical_or(l.isnan())
              .logical_or(l.eq(INFINITY))
              .any(dim, /*keepdim=*/true)
              .logical_or(n.eq(m));
    const at::Tensor s =
        u.masked_fill(dropped.logical_or(m.gt(0).logical_and(zero.logical_not())), -INFINITY);
    const bool empty = l.sym_size(dim) == 0;
    peak = empty ? at::zeros_like(m, type) : s.detach().amax(dim, /*keepdim=*/true);
    bad = bad.logical_or(peak.eq(-INFINITY));
    peak = peak.masked_fill(bad, 0);
    const at::Tensor e = (s - peak).exp();
    sum = e.sum(dim, /*keepdim=*/true);
    p = e / sum;
    coefficient = n.sub(m).to(type) * tau;
    if (!log_space) coefficient = coefficient - m;
  }
};

at::Tensor differentiable_density(const DensityArguments& a, const at::Tensor& t, bool log_space) {
  const Rows r(a, t, log_space);
  const int64_t dim = a.dim;
  const at::ScalarType type = a.compute_type();
  const at::Tensor n = r.n.to(type);
  at::Tensor terms = (r.u - r.peak).masked_fill(r.dropped, 0);
  if (!log_space) terms = terms - r.x;
  at::Tensor out =
      n.lgamma() + (n - 1) * r.tau.log() + terms.sum(dim, /*keepdim=*/true) - n * r.sum.log();
  const at::Tensor boundary = r.m.gt(0);
  out = out.masked_fill(boundary.logical_and(r.coefficient.gt(0)), -INFINITY);
  out = out.masked_fill(boundary.logical_and(r.coefficient.lt(0)), INFINITY);
  out = out.masked_fill(r.impossible.any(dim, /*keepdim=*/true), -INFINITY);
  out = out.masked_fill(r.bad, std::numeric_limits<double>::quiet_NaN());
  return a.logits.dim() == 0 ? out.squeeze(0) : out.squeeze(dim);
}

// With w_i = 1 - n p_i:
//     dl_i = g w_i,    dx_i = -g (tau w_i  [ + 1 ]),    dtau = g ((n - 1) / tau - sum_i x_i w_i)
Gradients differentiable_gradients(const at::Tensor& grad, const DensityArguments& a,
                                   const at::Tensor& t, bool log_space, bool tau_grad) {
  const Rows r(a, t, log_space);
  const int64_t dim = a.dim;
  const at::ScalarType type = a.compute_type();
  const at::Tensor g = a.logits.dim() == 0 ? grad.unsqueeze(0) : grad.unsqueeze(dim);
  const at::Tensor n = r.n.to(type), w = (1 - n * r.p).masked_fill(r.dropped, 0);
  const at::Tensor boundary = r.m.gt(0);
  const at::Tensor nan = at::full({}, std::numeric_limits<double>::quiet_NaN(), g.options());
  // A gradient of 0 times an infinite factor is 0; where the factor is a number, the product keeps
  // its derivative in the gradient.
  const auto times_nothing = [&](const at::Tensor& v) {
    return g.eq(0).logical_and(v.isfinite().logical_not());
  };
  const auto settled = [&](const at::Tensor& v) {
    return at::where(r.bad, nan, v.masked_fill(times_nothing(v).logical_or(r.dropped), 0));
  };

  const at::Tensor grad_logits = settled(g * w);
  at::Tensor of_x = -(r.tau * w);
  if (!log_space) of_x = of_x - 1;
  at::Tensor grad_value = g * of_x;
  if (!log_space) {
    grad_value = grad_value / r.x.exp();
    // d log p / d value is of_x / 0; where of_x is 0 too, the next term of its expansion in value,
    // -n tau p (S / W) value^(tau - 1), W and S the sums over the zeros and over the others.
    // Constants all of them, and 0 inside, where a derivative would be 0 * inf.
    const at::Tensor outside =
        (r.u - r.peak).detach().masked_fill(r.zero.logical_or(r.dropped), -INFINITY);
    const at::Tensor ratio = outside.exp().sum(dim, /*keepdim=*/true) / r.sum.detach();
    const at::Tensor next =
        at::where(r.tau.detach().lt(1), -INFINITY,
                  at::where(r.tau.detach().gt(1), 0, -(n * r.tau * r.p).detach() * ratio));
    const at::Tensor limit = at::where(of_x.eq(0), next, of_x.detach() * INFINITY);
    const at::Tensor at_zero = g * limit.masked_fill(r.zero.logical_not(), 0);
    grad_value = at::where(r.zero, at_zero, grad_value);
  }
  grad_value = settled(grad_value);

  at::Tensor grad_tau = at::empty({0}, g.options());
  if (tau_grad) {
    const at::Tensor of_tau = (n - 1) / r.tau - (r.x * w).sum(dim, /*keepdim=*/true);
    grad_tau = g * of_tau.masked_fill(boundary, -INFINITY);
    grad_tau = at::where(r.bad, nan, grad_tau.masked_fill(times_nothing(grad_tau), 0));
  }
  const auto shaped = [&](const at::Tensor& v, bool expanded) {
    const at::Tensor of_shape = v.view_symint(a.logits.sym_sizes());
    return expanded ? of_shape : of_shape.to(a.logits.scalar_type());
  };
  return {shaped(grad_value, a.value_expanded), shaped(grad_logits, a.logits_expanded),
          tau_grad ? grad_tau.view_symint(shape_reduced(a.logits, dim)) : grad_tau};
}

// ---- on every device ----------------------------------------------------------------------------

at::Tensor density_of_ops(const at::Tensor& value, const at::Tensor& logits, double tau,
                          const OptionalTensor& tau_tensor, int64_t dim, bool log_space) {
  const DensityArguments a(kForward, value, logits, tau, tau_tensor, dim);
  if (tau_tensor && tau_tensor->is_cpu()) check_tau_values(kForward, tau_tensor->to(at::kDouble));
  return differentiable_density(a, temperature(tau, tau_tensor, logits), log_space).contiguous();
}

Gradients density_backward_of_ops(const at::Tensor& grad, const at::Tensor& value,
                                  const at::Tensor& logits, double tau,
                                  const OptionalTensor& tau_tensor, int64_t dim, bool log_space,
                                  bool value_grad, bool logits_grad, bool tau_grad) {
  const DensityArguments a(kBackward, grad, value, logits, tau, tau_tensor, dim);
  auto [of_value, of_logits, of_tau] =
      differentiable_gradients(grad, a, temperature(tau, tau_tensor, logits), log_space, tau_grad);
  const at::Tensor grad_value = a.empty_grad_value(value_grad),
                   grad_logits = a.empty_grad_logits(logits_grad);
  if (value_grad) grad_value.copy_(of_value);
  if (logits_grad) grad_logits.copy_(of_logits);
  return {grad_value, grad_logits, of_tau.contiguous()};
}

// ---- shapes -------------------------------------------------------------------------------------

at::Tensor density_meta(const at::Tensor& value, const at::Tensor& logits, double tau,
                        const OptionalTensor& tau_tensor, int64_t dim, bool /*log_space*/) {
  return DensityArguments(kForward, value, logits, tau, tau_tensor, dim).empty_density();
}

Gradients density_backward_meta(const at::Tensor& grad, const at::Tensor& value,
                                const at::Tensor& logits, double tau,
                                const OptionalTensor& tau_tensor, int64_t dim, bool /*log_space*/,
                                bool value_grad, bool logits_grad, bool tau_grad) {
  const DensityArguments a(kBackward, grad, value, logits, tau, tau_tensor, dim);
  return {a.empty_grad_value(value_grad), a.empty_grad_logits(logits_grad),
          empty_grad_tau(a.logits, a.dim, tau_grad)};
}

// ---- derivatives --------------------------------------------------------------------------------

struct DensityNode : torch::autograd::Node {
  std::string name() const override { return "ConcreteLogProbBackward"; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list out(3);
    if (!grads[0].defined()) return out;
    const auto [value, logits, tau_tensor] = unchanged(kForward, "value, logits or tau", [&] {
      return std::tuple{saved_value.unpack(), saved_logits.unpack(), saved_tau.unpack()};
    });
    const bool wanted[] = {should_compute_output(0), should_compute_output(1),
                           should_compute_output(2)};
    auto [grad_value, grad_logits, grad_tau] =
        concrete_log_prob_backward(grads[0], value, logits, tau, optional(tau_tensor), dim,
                                   log_space, wanted[0], wanted[1], wanted[2]);
    if (wanted[0]) out[0] = at::sum_to(grad_value, value.sym_sizes()).to(value.scalar_type());
    if (wanted[1]) out[1] = at::sum_to(grad_logits, logits.sym_sizes()).to(logits.scalar_type());
    if (wanted[2]) out[2] = reduced_to(grad_tau, tau_tensor);
    return out;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    saved_value.reset_data();
    saved_logits.reset_data();
    saved_tau.reset_data();
  }

  SavedVariable saved_value, saved_logits, saved_tau;
  double tau = 1;
  int64_t dim = 0;
  bool log_space = false;
};

// Sum over the arguments of gradient * tangent.
at::Tensor density_tangent(const at::Tensor& density, const at::Tensor& value,
                           const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor,
                           int64_t dim, bool log_space) {
  const auto primal = [](const at::Tensor& t) { return t._fw_primal(/*level=*/0); };
  const at::Tensor tangents[] = {value._fw_grad(/*level=*/0), logits._fw_grad(/*level=*/0),
                                 tau_tensor ? tau_tensor->_fw_grad(/*level=*/0) : at::Tensor()};
  const OptionalTensor t = tau_tensor ? OptionalTensor(primal(*tau_tensor)) : std::nullopt;
  const auto [of_value, of_logits, of_tau] = concrete_log_prob_backward(
      at::ones_like(density), primal(value), primal(logits), tau, t, dim, log_space,
      tangents[0].defined(), tangents[1].defined(), tangents[2].defined());
  const int64_t dims = std::max(value.dim(), logits.dim());
  const int64_t classes = dim < 0 ? dim + std::max<int64_t>(dims, 1) : dim;
  at::Tensor out = at::zeros_like(density);
  const auto add = [&](const at::Tensor& gradient, const at::Tensor& tangent) {
    const at::Tensor product =
        gradient.to(density.scalar_type()) * tangent.to(gradient.device(), density.scalar_type());
    out = out + (dims == 0 ? product : product.sum(classes));
  };
  if (tangents[0].defined()) add(of_value, tangents[0]);
  if (tangents[1].defined()) add(of_logits, tangents[1]);
  if (tangents[2].defined()) add(of_tau, tangents[2]);
  return out;
}

at::Tensor concrete_log_prob_autograd(const at::Tensor& value, const at::Tensor& logits, double tau,
                                      const OptionalTensor& tau_tensor, int64_t dim,
                                      bool log_space) {
  at::Tensor density;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    density = concrete_log_prob(value, logits, tau, tau_tensor, dim, log_space);
  }
  if (records(value, logits, tau_tensor)) {
    auto node = make_node<DensityNode>();
    // The value is saved as it is, as by the logarithm in the formula.
    const at::Tensor kept_logits = unchanging(logits);
    const OptionalTensor kept_tau = unchanging(tau_tensor);
    node->set_next_edges(torch::autograd::collect_next_edges(value, kept_logits, kept_tau));
    node->tau = tau;
    node->dim = dim;
    node->log_space = log_space;
    node->saved_value = SavedVariable(value, /*is_output=*/false);
    node->saved_logits = SavedVariable(kept_logits, /*is_output=*/false);
    node->saved_tau = SavedVariable(kept_tau, /*is_output=*/false);
    torch::autograd::set_history(density, node);
  }
  if (has_tangent(value, logits, tau_tensor)) {
    density._set_fw_grad(density_tangent(density, value, logits, tau, tau_tensor, dim, log_space),
                         /*level=*/0,
                         /*is_inplace_op=*/false);
  }
  return density;
}

Gradients concrete_log_prob_backward_autograd(const at::Tensor& grad, const at::Tensor& value,
                                              const at::Tensor& logits, double tau,
                                              const OptionalTensor& tau_tensor, int64_t dim,
                                              bool log_space, bool value_grad, bool logits_grad,
                                              bool tau_grad) {
  if (records(grad, value, logits, tau_tensor) || has_tangent(grad, value, logits, tau_tensor)) {
    const DensityArguments a(kBackward, grad, value, logits, tau, tau_tensor, dim);
    auto [of_value, of_logits, of_tau] = differentiable_gradients(
        grad, a, temperature(tau, tau_tensor, logits), log_space, tau_grad);
    return {value_grad ? of_value : a.empty_grad_value(false),
            logits_grad ? of_logits : a.empty_grad_logits(false), of_tau};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return concrete_log_prob_backward(grad, value, logits, tau, tau_tensor, dim, log_space,
                                    value_grad, logits_grad, tau_grad);
}

}  // namespace
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CompositeExplicitAutograd, m) {
  m.impl("concrete_log_prob", &gumbel_ext::density_of_ops);
  m.impl("concrete_log_prob_backward", &gumbel_ext::density_backward_of_ops);
}

TORCH_LIBRARY_IMPL(gumbel_ext, Meta, m) {
  m.impl("concrete_log_prob", &gumbel_ext::density_meta);
  m.impl("concrete_log_prob_backward", &gumbel_ext::density_backward_meta);
}

TORCH_LIBRARY_IMPL(gumbel_ext, Autograd, m) {
  m.impl("concrete_log_prob", &gumbel_ext::concrete_log_prob_autograd);
  m.impl("concrete_log_prob_backward", &gumbel_ext::concrete_log_prob_backward_autograd);
}
