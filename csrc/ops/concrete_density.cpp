// The log density of the Concrete distribution: its arguments, results and derivatives, and the ops
// in PyTorch's own for devices without kernels.
#include "concrete_density.h"

#include <limits>

#include "../autograd.h"
#include "../gumbel_ext.h"

namespace gumbel_ext {

using Gradients = ConcreteLogProbBackward::Result;

at::Tensor concrete_log_prob(const at::Tensor& value, const at::Tensor& logits, double tau,
                             const OptionalTensor& tau_tensor, int64_t dim, bool log_space) {
  return call(ConcreteLogProb{value, logits, tau, tau_tensor, dim, log_space});
}

Gradients concrete_log_prob_backward(const at::Tensor& grad, const at::Tensor& value,
                                     const at::Tensor& logits, double tau,
                                     const OptionalTensor& tau_tensor, int64_t dim, bool log_space,
                                     bool value_grad, bool logits_grad, bool tau_grad) {
  return call(ConcreteLogProbBackward{grad, value, logits, tau, tau_tensor, dim, log_space,
                                      value_grad, logits_grad, tau_grad});
}

// ---- arguments and results ----------------------------------------------------------------------

namespace {

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

at::Tensor empty_gradient(const at::Tensor& operand, bool expanded, bool wanted,
                          at::ScalarType compute_type) {
  if (!wanted) return at::empty({0}, operand.options());
  if (!expanded) return at::empty_like(operand);
  return at::empty_symint(operand.sym_sizes(), operand.options().dtype(compute_type));
}

}  // namespace

template <class Op>
void DensityOperands::set(const Op& a) {
  constexpr const char* op = name_of<Op>();
  check_logits(op, a.logits);
  TORCH_CHECK_TYPE(a.value.layout() == at::kStrided, op,
                   ": value must be a dense (strided) tensor, got layout ", a.value.layout());
  TORCH_CHECK_TYPE(a.value.scalar_type() == a.logits.scalar_type(), op,
                   ": value must have the dtype of logits, ", c10::toString(a.logits.scalar_type()),
                   ", got ", c10::toString(a.value.scalar_type()));
  TORCH_CHECK_VALUE(a.value.device() == a.logits.device(), op,
                    ": value must be on the device of logits (", a.logits.device(), "), got ",
                    a.value.device());
  const c10::SymDimVector shape = common_shape(op, a.value, a.logits);
  value_expanded = a.value.sym_sizes() != c10::SymIntArrayRef(shape);
  logits_expanded = a.logits.sym_sizes() != c10::SymIntArrayRef(shape);
  value = value_expanded ? a.value.expand_symint(shape) : a.value;
  logits = logits_expanded ? a.logits.expand_symint(shape) : a.logits;
  dim = wrapped_dim(op, logits, a.dim);
  check_tau(op, a.tau, a.tau_tensor, logits, dim);
}

DensityOperands::DensityOperands(const ConcreteLogProb& a) { set(a); }

DensityOperands::DensityOperands(const ConcreteLogProbBackward& a) {
  set(a);
  check_grad(name_of<ConcreteLogProbBackward>(), a.grad, compute_type(), shape_without(logits, dim),
             logits.device());
}

at::Tensor DensityOperands::empty_density() const {
  return at::empty_symint(shape_without(logits, dim), logits.options().dtype(compute_type()));
}

Gradients DensityOperands::empty_gradients(const ConcreteLogProbBackward& a) const {
  return {empty_gradient(value, value_expanded, a.value_grad, compute_type()),
          empty_gradient(logits, logits_expanded, a.logits_grad, compute_type()),
          empty_grad_tau(logits, dim, a.tau_grad)};
}

at::Tensor ConcreteLogProb::prepare() { return DensityOperands(*this).empty_density(); }

Gradients ConcreteLogProbBackward::prepare() {
  return DensityOperands(*this).empty_gradients(*this);
}

namespace {

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

  Rows(const DensityOperands& a, const at::Tensor& t, bool log_space)
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

at::Tensor differentiable_density(const DensityOperands& a, const at::Tensor& t, bool log_space) {
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
Gradients differentiable_gradients(const at::Tensor& grad, const DensityOperands& a,
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

// ---- in PyTorch's ops ---------------------------------------------------------------------------

at::Tensor concrete_log_prob_composite(ConcreteLogProb& a) {
  const DensityOperands operands(a);
  if (a.tau_tensor && a.tau_tensor->is_cpu()) {
    check_tau_values(name_of<ConcreteLogProb>(), a.tau_tensor->to(at::kDouble));
  }
  const at::Tensor t = temperature(a.tau, a.tau_tensor, a.logits);
  return differentiable_density(operands, t, a.log_space).contiguous();
}

Gradients concrete_log_prob_backward_composite(ConcreteLogProbBackward& a) {
  const DensityOperands operands(a);
  const at::Tensor t = temperature(a.tau, a.tau_tensor, a.logits);
  auto [of_value, of_logits, of_tau] =
      differentiable_gradients(a.grad, operands, t, a.log_space, a.tau_grad);
  const auto [grad_value, grad_logits, grad_tau] = operands.empty_gradients(a);
  if (a.value_grad) grad_value.copy_(of_value);
  if (a.logits_grad) grad_logits.copy_(of_logits);
  return {grad_value, grad_logits, of_tau.contiguous()};
}

// ---- derivatives --------------------------------------------------------------------------------

// Sum over the arguments of gradient * tangent.
at::Tensor density_tangent(const at::Tensor& density, const ConcreteLogProb& a) {
  const auto primal = [](const at::Tensor& t) { return t._fw_primal(/*level=*/0); };
  const at::Tensor tangents[] = {a.value._fw_grad(/*level=*/0), a.logits._fw_grad(/*level=*/0),
                                 a.tau_tensor ? a.tau_tensor->_fw_grad(/*level=*/0) : at::Tensor()};
  const OptionalTensor tau = a.tau_tensor ? OptionalTensor(primal(*a.tau_tensor)) : std::nullopt;
  const auto [of_value, of_logits, of_tau] = call(ConcreteLogProbBackward{
      at::ones_like(density), primal(a.value), primal(a.logits), a.tau, tau, a.dim, a.log_space,
      tangents[0].defined(), tangents[1].defined(), tangents[2].defined()});
  const int64_t dims = std::max(a.value.dim(), a.logits.dim());
  const int64_t classes = a.dim < 0 ? a.dim + std::max<int64_t>(dims, 1) : a.dim;
  at::Tensor out = at::zeros_like(density);
  const auto add = [&](const at::Tensor& gradient, const at::Tensor& tangent) {
    if (!tangent.defined()) return;
    const at::Tensor product =
        gradient.to(density.scalar_type()) * tangent.to(gradient.device(), density.scalar_type());
    out = out + (dims == 0 ? product : product.sum(classes));
  };
  add(of_value, tangents[0]);
  add(of_logits, tangents[1]);
  add(of_tau, tangents[2]);
  return out;
}

at::Tensor concrete_log_prob_autograd(ConcreteLogProb& a) {
  const at::Tensor density = call_below(a);
  if (records(a.value, a.logits, a.tau_tensor)) {
    // The value is saved as it is, as by the logarithm in the formula.
    const at::Tensor logits = unchanging(a.logits);
    const OptionalTensor tau = unchanging(a.tau_tensor);
    record({"ConcreteLogProbBackward", name_of<ConcreteLogProb>(), "value, logits or tau"},
           {density}, {a.value, logits, tau.value_or(at::Tensor())}, {a.value, logits, tau},
           [tau = a.tau, dim = a.dim, log_space = a.log_space](const NodeCall& node) {
             const at::Tensor &value = node.saved[0], &logits = node.saved[1],
                              &tau_tensor = node.saved[2];
             const bool value_grad = node.wants(0), logits_grad = node.wants(1),
                        tau_grad = node.wants(2);
             const auto [grad_value, grad_logits, grad_tau] = call(
                 ConcreteLogProbBackward{node.grads[0], value, logits, tau, optional(tau_tensor),
                                         dim, log_space, value_grad, logits_grad, tau_grad});
             const auto reduced = [](const at::Tensor& gradient, const at::Tensor& of) {
               return at::sum_to(gradient, of.sym_sizes()).to(of.scalar_type());
             };
             if (value_grad) node.out[0] = reduced(grad_value, value);
             if (logits_grad) node.out[1] = reduced(grad_logits, logits);
             if (tau_grad) node.out[2] = reduced_to(grad_tau, tau_tensor);
           });
  }
  if (has_tangent(a.value, a.logits, a.tau_tensor)) {
    density._set_fw_grad(density_tangent(density, a), /*level=*/0, /*is_inplace_op=*/false);
  }
  return density;
}

Gradients concrete_log_prob_backward_autograd(ConcreteLogProbBackward& a) {
  if (!records(a.grad, a.value, a.logits, a.tau_tensor) &&
      !has_tangent(a.grad, a.value, a.logits, a.tau_tensor)) {
    return call_below(a);
  }
  const DensityOperands operands(a);
  auto [of_value, of_logits, of_tau] = differentiable_gradients(
      a.grad, operands, temperature(a.tau, a.tau_tensor, a.logits), a.log_space, a.tau_grad);
  return {a.value_grad ? of_value : at::empty({0}, a.value.options()),
          a.logits_grad ? of_logits : at::empty({0}, a.logits.options()), of_tau};
}

}  // namespace
}  // namespace gumbel_ext

TORCH_LIBRARY_FRAGMENT(gumbel_ext, m) {
  using namespace gumbel_ext;
  define<ConcreteLogProb>(m);
  define<ConcreteLogProbBackward>(m);
}

TORCH_LIBRARY_IMPL(gumbel_ext, CompositeExplicitAutograd, m) {
  using namespace gumbel_ext;
  implement<&concrete_log_prob_composite>(m);
  implement<&concrete_log_prob_backward_composite>(m);
}

TORCH_LIBRARY_IMPL(gumbel_ext, Autograd, m) {
  using namespace gumbel_ext;
  implement<&concrete_log_prob_autograd>(m);
  implement<&concrete_log_prob_backward_autograd>(m);
}
