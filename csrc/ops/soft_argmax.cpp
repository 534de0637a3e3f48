// The expected position under a softmax: its arguments, results and derivatives, and the ops in
// PyTorch's own for devices without kernels.
#include "soft_argmax.h"

#include <limits>

#include "../autograd.h"

namespace gumbel_ext {

using TwoTensors = std::tuple<at::Tensor, at::Tensor>;

// ---- arguments and results ----------------------------------------------------------------------

namespace {

// The shape of logits without dim, and a last dimension.
c10::SymDimVector shape_of_rows(const at::Tensor& logits, int64_t dim, const c10::SymInt& width) {
  c10::SymDimVector shape = shape_without(logits, dim);
  shape.push_back(width);
  return shape;
}

// The arguments that the op and its backward have in common.
template <class Op>
void check_soft_argmax(Op& a) {
  constexpr const char* op = name_of<Op>();
  const at::Tensor &logits = a.logits, &positions = a.positions;
  check_logits(op, logits);
  a.dim = wrapped_dim(op, logits, a.dim);
  check_beta(op, a.beta, a.beta_tensor, logits, a.dim);
  const c10::SymInt classes = logits.dim() == 0 ? c10::SymInt(1) : logits.sym_size(a.dim);
  TORCH_CHECK_VALUE(classes != 0, op, ": logits must have at least one class along dim, got shape ",
                    logits.sym_sizes());
  TORCH_CHECK_TYPE(positions.is_floating_point() ||
                       c10::isIntegralType(positions.scalar_type(), /*includeBool=*/false),
                   op, ": positions must have an integer or floating-point dtype, got ",
                   c10::toString(positions.scalar_type()));
  TORCH_CHECK_VALUE(positions.device() == logits.device(), op,
                    ": positions must be on the device of logits (", logits.device(), "), got ",
                    positions.device());
  TORCH_CHECK_VALUE(positions.dim() == 2 && positions.sym_size(0) >= 1 &&
                        positions.sym_size(0) <= kMaxCoordinates &&
                        positions.sym_size(1) == classes,
                    op, ": positions must be of shape [1 to ", kMaxCoordinates, ", ", classes,
                    "], got ", positions.sym_sizes());
}

}  // namespace

void SoftArgmax::check() { check_soft_argmax(*this); }

TwoTensors SoftArgmax::prepare() {
  check();
  const c10::SymInt coordinates = positions.sym_size(0);
  const auto options = logits.options();
  return {
      at::empty_symint(shape_of_rows(logits, dim, coordinates),
                       options.dtype(compute_dtype(logits.scalar_type()))),
      at::empty_symint(shape_of_rows(logits, dim, coordinates + 3), options.dtype(at::kDouble))};
}

void SoftArgmaxBackward::check() {
  check_soft_argmax(*this);
  constexpr const char* op = name_of<SoftArgmaxBackward>();
  const c10::SymInt coordinates = positions.sym_size(0);
  check_grad(op, grad, compute_dtype(logits.scalar_type()), shape_of_rows(logits, dim, coordinates),
             logits.device());
  const c10::SymDimVector shape = shape_of_rows(logits, dim, coordinates + 3);
  TORCH_CHECK_VALUE(
      row_state.scalar_type() == at::kDouble && row_state.sym_sizes() == c10::SymIntArrayRef(shape),
      op, ": row_state must be float64 of shape ", c10::SymIntArrayRef(shape), ", got ",
      c10::toString(row_state.scalar_type()), " of shape ", row_state.sym_sizes());
}

TwoTensors SoftArgmaxBackward::prepare() {
  check();
  return {at::empty_like(logits), empty_grad_tau(logits, dim, beta_grad)};
}

namespace {

// ---- in PyTorch's ops, differentiable any number of times ---------------------------------------

// The parts of the formula, in the accumulate type and with the classes last.
struct Expectation {
  at::Tensor beta;                   // [rows..., 1]
  at::Tensor index, peak;            // of the largest beta l, and its logit
  at::Tensor distance;               // l - peak; 0 where y is 0 for being infinitely far
  at::Tensor y;                      // softmax(beta l)
  std::vector<at::Tensor> origin;    // for each coordinate: the position at the index,
  std::vector<at::Tensor> offset;    // positions less it,
  std::vector<at::Tensor> expected;  // and sum y offset

  Expectation(const at::Tensor& logits, double beta_value, const OptionalTensor& beta_tensor,
              int64_t dim, const at::Tensor& positions) {
    const at::ScalarType type = compute_dtype(logits.scalar_type());
    const bool scalar = logits.dim() == 0;
    const at::Tensor x = (scalar ? logits.unsqueeze(0) : logits).movedim(dim, -1).to(type);
    beta = temperature(beta_value, beta_tensor, logits);
    if (scalar) {
      beta = beta.reshape({1});
    } else {
      beta = beta.expand_symint(shape_reduced(logits, dim)).movedim(dim, -1);
    }
    constexpr double infinity = std::numeric_limits<double>::infinity();
    // A negative beta looks for the smallest logit.
    const at::Tensor directed = x.detach() * beta.detach().sign();
    index = directed.argmax(-1);
    peak = x.detach().gather(-1, index.unsqueeze(-1));
    const at::Tensor absent =
        directed.eq(-infinity).logical_and(directed.gather(-1, index.unsqueeze(-1)).ne(-infinity));
    const at::Tensor farthest = beta.detach().abs().reciprocal() * kFar;
    distance = (x.masked_fill(absent, 0) - peak).masked_fill(absent, 0);
    distance = at::minimum(at::maximum(distance, -farthest), farthest);
    y = (beta * distance).masked_fill(absent, -infinity).softmax(-1);
    // Centred in float64, so that coordinates that are all large lose nothing in float32.
    const at::Tensor exact = positions.to(at::kDouble);
    const at::Tensor middle = ((exact.amax(1, true) + exact.amin(1, true)) / 2).detach();
    const int64_t coordinates = positions.sym_size(0).guard_int(__FILE__, __LINE__);
    for (int64_t k = 0; k < coordinates; ++k) {
      const at::Tensor places = exact[k] - middle[k];
      const at::Tensor at_index =
          places.index_select(0, index.flatten()).view_symint(index.sym_sizes());
      origin.push_back(at_index + middle[k]);
      offset.push_back(places.to(type) - at_index.to(type).unsqueeze(-1));
      expected.push_back((y * offset.back()).sum(-1).to(at::kDouble));
    }
  }

  at::Tensor result() const {
    std::vector<at::Tensor> of_coordinates;
    for (size_t k = 0; k < origin.size(); ++k) of_coordinates.push_back(origin[k] + expected[k]);
    return at::stack(of_coordinates, -1).to(y.scalar_type());
  }

  at::Tensor row_state() const {
    std::vector<at::Tensor> parts{index.to(at::kDouble), peak.squeeze(-1).to(at::kDouble),
                                  (beta * distance)
                                      .masked_fill(y.eq(0), 0)
                                      .exp()
                                      .masked_fill(y.eq(0), 0)
                                      .sum(-1)
                                      .to(at::kDouble)};
    parts.insert(parts.end(), expected.begin(), expected.end());
    return at::stack(parts, -1);
  }

  // dl = beta s and dbeta = sum s (l - peak), with s = y (h - sum y h) and h = sum_k offset_k dE_k.
  std::tuple<at::Tensor, at::Tensor> gradient(const at::Tensor& grad, const at::Tensor& logits,
                                              int64_t dim, bool beta_grad) const {
    at::Tensor h;
    for (size_t k = 0; k < origin.size(); ++k) {
      const at::Tensor term = offset[k] * grad.select(-1, static_cast<int64_t>(k)).unsqueeze(-1);
      h = h.defined() ? h + term : term;
    }
    const at::Tensor s = y * (h - (y * h).sum(-1, true));
    at::Tensor grad_logits = beta * s, grad_beta = at::empty({0}, y.options());
    if (beta_grad) grad_beta = (s * distance).sum(-1, true);
    if (logits.dim() == 0) {
      grad_logits = grad_logits.squeeze(0);
      if (beta_grad) grad_beta = grad_beta.squeeze(0);
    } else {
      grad_logits = grad_logits.movedim(-1, dim);
      if (beta_grad) grad_beta = grad_beta.movedim(-1, dim);
    }
    return {grad_logits.to(logits.scalar_type()), grad_beta};
  }
};

TwoTensors soft_argmax_composite(SoftArgmax& a) {
  a.check();
  const Expectation e(a.logits, a.beta, a.beta_tensor, a.dim, a.positions);
  return {e.result(), e.row_state()};
}

TwoTensors differentiable_gradients(const SoftArgmaxBackward& a) {
  return Expectation(a.logits, a.beta, a.beta_tensor, a.dim, a.positions)
      .gradient(a.grad, a.logits, a.dim, a.beta_grad);
}

TwoTensors soft_argmax_backward_composite(SoftArgmaxBackward& a) {
  const at::Tensor grad_logits = std::get<0>(a.prepare());
  const auto [of_logits, of_beta] = differentiable_gradients(a);
  return {grad_logits.copy_(of_logits), of_beta.contiguous()};
}

// ---- derivatives --------------------------------------------------------------------------------

class SoftArgmaxFunction : public torch::autograd::Function<SoftArgmaxFunction> {
 public:
  template <class... Field>
  static variable_list forward(AutogradContext* ctx, const Field&... field) {
    const SoftArgmax a{field...};
    auto [expected, row_state] = call_below(a);
    ctx->mark_non_differentiable({row_state});
    ctx->set_materialize_grads(false);
    ctx->saved_data["beta_grad"] = requires_grad(a.beta_tensor);
    keep(ctx, a, {row_state});
    return {expected, row_state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list out(count_arguments(SoftArgmax::schema));
    if (!grads[0].defined()) return out;
    const Kept<SoftArgmax> kept(ctx, "logits, beta or positions");
    const SoftArgmax& a = kept.op;
    const bool beta_grad = ctx->saved_data["beta_grad"].toBool();
    const auto [grad_logits, grad_beta] = call(SoftArgmaxBackward{
        grads[0], a.logits, kept.results[0], a.beta, a.beta_tensor, a.dim, a.positions, beta_grad});
    out[place_of<SoftArgmax>("logits")] = grad_logits;
    if (beta_grad) out[place_of<SoftArgmax>("beta_tensor")] = reduced_to(grad_beta, *a.beta_tensor);
    return out;
  }
};

TwoTensors soft_argmax_autograd(SoftArgmax& a) {
  const bool recorded = records(a.logits, a.beta_tensor, a.positions),
             tangent = has_tangent(a.logits, a.beta_tensor, a.positions);
  if (!recorded && !tangent) return call_below(a);
  a.beta_tensor = unchanging(a.beta_tensor);
  if (tangent || under_transform() || requires_grad(a.positions)) {
    const auto [expected, row_state] = soft_argmax_composite(a);
    return {expected, row_state.detach()};
  }
  a.logits = unchanging(a.logits);
  const variable_list out = apply_function<SoftArgmaxFunction>(a);
  return {out[0], out[1]};
}

TwoTensors soft_argmax_backward_autograd(SoftArgmaxBackward& a) {
  if (!records(a.grad, a.logits, a.beta_tensor, a.positions) &&
      !has_tangent(a.grad, a.logits, a.beta_tensor, a.positions)) {
    return call_below(a);
  }
  a.dim = wrapped_dim(name_of<SoftArgmaxBackward>(), a.logits, a.dim);
  return differentiable_gradients(a);
}

}  // namespace
}  // namespace gumbel_ext

TORCH_LIBRARY_FRAGMENT(gumbel_ext, m) {
  using namespace gumbel_ext;
  define<SoftArgmax>(m);
  define<SoftArgmaxBackward>(m);
}

TORCH_LIBRARY_IMPL(gumbel_ext, CompositeExplicitAutograd, m) {
  using namespace gumbel_ext;
  implement<&soft_argmax_composite>(m);
  implement<&soft_argmax_backward_composite>(m);
}

TORCH_LIBRARY_IMPL(gumbel_ext, Autograd, m) {
  using namespace gumbel_ext;
  implement<&soft_argmax_autograd>(m);
  implement<&soft_argmax_backward_autograd>(m);
}
