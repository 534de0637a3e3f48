// The expected position under a softmax: derivatives, and the ops in PyTorch's own for devices that
// have no kernel of theirs.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <limits>

#include "autograd_levels.h"

namespace gumbel_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::tuple<at::Tensor, at::Tensor> soft_argmax(const at::Tensor& logits, double beta,
                                               const OptionalTensor& beta_tensor, int64_t dim,
                                               const at::Tensor& positions) {
  using Function = std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, double, const OptionalTensor&, int64_t, const at::Tensor&);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gumbel_ext::soft_argmax", "")
                             .typed<Function>();
  return op.call(logits, beta, beta_tensor, dim, positions);
}

std::tuple<at::Tensor, at::Tensor> soft_argmax_backward(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& row_state, double beta,
    const OptionalTensor& beta_tensor, int64_t dim, const at::Tensor& positions, bool beta_grad) {
  using Function = std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, double, const OptionalTensor&,
      int64_t, const at::Tensor&, bool);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gumbel_ext::soft_argmax_backward", "")
                             .typed<Function>();
  return op.call(grad, logits, row_state, beta, beta_tensor, dim, positions, beta_grad);
}

// ---- in PyTorch's ops, differentiable any number of times
// ----------------------------------------

// The parts of the formula, in the type computed in and with the classes last.
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

std::tuple<at::Tensor, at::Tensor> soft_argmax_composite(const at::Tensor& logits, double beta,
                                                         const OptionalTensor& beta_tensor,
                                                         int64_t dim, const at::Tensor& positions) {
  dim = check_soft_argmax("soft_argmax", logits, beta, beta_tensor, dim, positions);
  const Expectation e(logits, beta, beta_tensor, dim, positions);
  return {e.result(), e.row_state()};
}

std::tuple<at::Tensor, at::Tensor> soft_argmax_backward_composite(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& row_state, double beta,
    const OptionalTensor& beta_tensor, int64_t dim, const at::Tensor& positions, bool beta_grad) {
  dim = check_soft_argmax_backward("soft_argmax_backward", grad, logits, row_state, beta,
                                   beta_tensor, dim, positions);
  const auto [grad_logits, grad_beta] =
      Expectation(logits, beta, beta_tensor, dim, positions).gradient(grad, logits, dim, beta_grad);
  return {at::empty_like(logits).copy_(grad_logits), grad_beta.contiguous()};
}

// ---- derivatives --------------------------------------------------------------------------------

class SoftArgmax : public torch::autograd::Function<SoftArgmax> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& logits, double beta,
                               const OptionalTensor& beta_tensor, int64_t dim,
                               const at::Tensor& positions) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [expected, row_state] = soft_argmax(logits, beta, beta_tensor, dim, positions);
    ctx->mark_non_differentiable({row_state});
    ctx->set_materialize_grads(false);
    ctx->saved_data["beta"] = beta;
    ctx->saved_data["dim"] = dim;
    ctx->saved_data["beta_grad"] = requires_grad(beta_tensor);
    ctx->save_for_backward({logits, row_state, beta_tensor.value_or(at::Tensor()), positions});
    return {expected, row_state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list out(5);
    if (!grads[0].defined()) return out;
    const variable_list saved = unchanged("soft_argmax", "logits, beta or positions",
                                          [&] { return ctx->get_saved_variables(); });
    const bool beta_grad = ctx->saved_data["beta_grad"].toBool();
    at::Tensor grad_beta;
    std::tie(out[0], grad_beta) = soft_argmax_backward(
        grads[0], saved[0], saved[1], ctx->saved_data["beta"].toDouble(), optional(saved[2]),
        ctx->saved_data["dim"].toInt(), saved[3], beta_grad);
    if (beta_grad) out[2] = reduced_to(grad_beta, saved[2]);
    return out;
  }
};

std::tuple<at::Tensor, at::Tensor> soft_argmax_autograd(const at::Tensor& logits, double beta,
                                                        const OptionalTensor& beta_tensor,
                                                        int64_t dim, const at::Tensor& positions) {
  const bool recorded = records(logits, beta_tensor, positions),
             tangent = has_tangent(logits, beta_tensor, positions);
  if (!recorded && !tangent) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return soft_argmax(logits, beta, beta_tensor, dim, positions);
  }
  if (tangent || under_transform() || requires_grad(positions)) {
    const auto [expected, row_state] =
        soft_argmax_composite(logits, beta, unchanging(beta_tensor), dim, positions);
    return {expected, row_state.detach()};
  }
  const variable_list out =
      SoftArgmax::apply(unchanging(logits), beta, unchanging(beta_tensor), dim, positions);
  return {out[0], out[1]};
}

std::tuple<at::Tensor, at::Tensor> soft_argmax_backward_autograd(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& row_state, double beta,
    const OptionalTensor& beta_tensor, int64_t dim, const at::Tensor& positions, bool beta_grad) {
  if (records(grad, logits, beta_tensor, positions) ||
      has_tangent(grad, logits, beta_tensor, positions)) {
    dim = wrapped_dim("soft_argmax_backward", logits, dim);
    return Expectation(logits, beta, beta_tensor, dim, positions)
        .gradient(grad, logits, dim, beta_grad);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return soft_argmax_backward(grad, logits, row_state, beta, beta_tensor, dim, positions,
                              beta_grad);
}

}  // namespace
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CompositeExplicitAutograd, m) {
  m.impl("soft_argmax", &gumbel_ext::soft_argmax_composite);
  m.impl("soft_argmax_backward", &gumbel_ext::soft_argmax_backward_composite);
}

TORCH_LIBRARY_IMPL(gumbel_ext, Autograd, m) {
  m.impl("soft_argmax", &gumbel_ext::soft_argmax_autograd);
  m.impl("soft_argmax_backward", &gumbel_ext::soft_argmax_backward_autograd);
}
