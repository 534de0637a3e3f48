// The binary concrete on any device: its functions, the shapes of its results, its derivatives.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <limits>

#include "autograd_levels.h"
#include "gumbel_ext.h"

namespace gumbel_ext {

std::tuple<at::Tensor, at::Tensor> binary_concrete(const at::Tensor& logits, double tau,
                                                   const OptionalTensor& tau_tensor, bool hard,
                                                   std::optional<at::Generator> generator,
                                                   const OptionalTensor& rng_state,
                                                   at::OptionalSymIntArrayRef positions) {
  using Function = std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, double, const OptionalTensor&, bool, std::optional<at::Generator>,
      const OptionalTensor&, at::OptionalSymIntArrayRef);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gumbel_ext::binary_concrete", "")
                             .typed<Function>();
  return op.call(logits, tau, tau_tensor, hard, generator, rng_state, positions);
}

std::tuple<at::Tensor, at::Tensor> logistic_noise(const at::Tensor& like, c10::SymIntArrayRef size,
                                                  std::optional<at::Generator> generator,
                                                  const OptionalTensor& rng_state,
                                                  at::OptionalSymIntArrayRef positions) {
  using Function = std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, c10::SymIntArrayRef, std::optional<at::Generator>, const OptionalTensor&,
      at::OptionalSymIntArrayRef);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gumbel_ext::logistic_noise", "")
                             .typed<Function>();
  return op.call(like, size, generator, rng_state, positions);
}

std::tuple<at::Tensor, at::Tensor> binary_concrete_backward(
    const at::Tensor& grad, const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor,
    const at::Tensor& rng_state, bool tau_grad, at::OptionalSymIntArrayRef positions) {
  using Function = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, double,
                                                      const OptionalTensor&, const at::Tensor&,
                                                      bool, at::OptionalSymIntArrayRef);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gumbel_ext::binary_concrete_backward", "")
                             .typed<Function>();
  return op.call(grad, logits, tau, tau_tensor, rng_state, tau_grad, positions);
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using TwoTensors = std::tuple<at::Tensor, at::Tensor>;

// ---- shapes -------------------------------------------------------------------------------------

TwoTensors binary_concrete_meta(const at::Tensor& logits, double tau,
                                const OptionalTensor& tau_tensor, bool /*hard*/,
                                std::optional<at::Generator> generator,
                                const OptionalTensor& rng_state,
                                at::OptionalSymIntArrayRef positions) {
  check_binary("binary_concrete", logits, tau, tau_tensor, generator, rng_state, positions);
  return {at::empty_like(logits), at::empty({2}, logits.options().dtype(at::kLong))};
}

TwoTensors logistic_noise_meta(const at::Tensor& like, c10::SymIntArrayRef size,
                               std::optional<at::Generator> generator,
                               const OptionalTensor& rng_state,
                               at::OptionalSymIntArrayRef positions) {
  check_noise("logistic_noise", like, size, generator, rng_state, positions);
  return {at::empty_symint(size, like.options()), at::empty({2}, like.options().dtype(at::kLong))};
}

TwoTensors binary_concrete_backward_meta(const at::Tensor& grad, const at::Tensor& logits,
                                         double tau, const OptionalTensor& tau_tensor,
                                         const at::Tensor& rng_state, bool tau_grad,
                                         at::OptionalSymIntArrayRef positions) {
  constexpr const char* op = "binary_concrete_backward";
  check_binary(op, logits, tau, tau_tensor, std::nullopt, rng_state, positions);
  check_grad(op, grad, logits);
  return {at::empty_like(logits), empty_tau_terms(logits, tau_grad)};
}

// ---- formulas, differentiable in all their arguments --------------------------------------------

// z = (l + L) / tau and sigmoid(-|z|), the smaller of y and 1 - y, which keeps its relative
// accuracy where y has rounded to 1. Where |z| is so large that nothing is left of it, infinite
// logits included, z is 0 and a constant: 0 * inf in a derivative would be NaN.
struct DifferentiableCurve {
  at::Tensor score, far, z, smaller;

  DifferentiableCurve(const at::Tensor& logits, const at::Tensor& noise, const at::Tensor& t) {
    score = logits.to(t.scalar_type()) + noise;
    far = score.abs().ge(t * kFar);
    z = score.masked_fill(far, 0) / t;
    // Not -abs(), whose derivative at 0 is 0.
    smaller = at::where(z.lt(0), z, -z).sigmoid();
  }

  at::Tensor sigmoid() const {
    const at::Tensor y = at::where(z.lt(0), smaller, 1 - smaller);
    return at::where(far, score.gt(0).to(y.scalar_type()), y);
  }
  at::Tensor slope() const { return (smaller * (1 - smaller)).masked_fill(far, 0); }
};

at::Tensor safe_temperature(double tau, const OptionalTensor& tau_tensor,
                            const at::Tensor& logits) {
  const at::Tensor t = temperature(tau, tau_tensor, logits);
  return t.clamp_min(t.scalar_type() == at::kDouble ? std::numeric_limits<double>::min()
                                                    : std::numeric_limits<float>::min());
}

// Noise of the type computed in, and the state it was made of.
TwoTensors noise_for(const at::Tensor& logits, const std::optional<at::Generator>& generator,
                     const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const at::Tensor like =
      at::empty({0}, logits.options().dtype(compute_dtype(logits.scalar_type())));
  return logistic_noise(like, logits.sym_sizes(), generator, rng_state, positions);
}

// ---- forward ------------------------------------------------------------------------------------

class BinaryConcrete : public torch::autograd::Function<BinaryConcrete> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& logits, double tau,
                               const OptionalTensor& tau_tensor, bool hard,
                               const std::optional<at::Generator>& generator,
                               const OptionalTensor& rng_state,
                               at::OptionalSymIntArrayRef positions) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [y, state] =
        binary_concrete(logits, tau, tau_tensor, hard, generator, rng_state, positions);
    ctx->mark_non_differentiable({state});
    ctx->set_materialize_grads(false);
    ctx->saved_data["tau"] = tau;
    ctx->saved_data["tau_grad"] = requires_grad(tau_tensor);
    if (positions) ctx->saved_data["positions"] = *positions;
    // Inputs alone, and y not even where it is at hand: one that has rounded to 0 or 1 no longer
    // says how steep the curve is there.
    ctx->save_for_backward({logits, tau_tensor.value_or(at::Tensor()), state});
    return {y, state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list out(7);
    if (!grads[0].defined()) return out;
    const variable_list saved =
        unchanged("binary_concrete", "logits or tau", [&] { return ctx->get_saved_variables(); });
    const at::Tensor &logits = saved[0], &tau_tensor = saved[1], &rng_state = saved[2];
    std::vector<c10::SymInt> positions_saved;
    at::OptionalSymIntArrayRef positions;
    if (ctx->saved_data.count("positions") > 0) {
      positions_saved = ctx->saved_data["positions"].toSymIntVector();
      positions = positions_saved;
    }
    const bool tau_grad = ctx->saved_data["tau_grad"].toBool();
    auto [grad_logits, tau_terms] =
        binary_concrete_backward(grads[0], logits, ctx->saved_data["tau"].toDouble(),
                                 optional(tau_tensor), rng_state, tau_grad, positions);
    out[0] = grad_logits;
    if (tau_grad) out[2] = reduced_to(tau_terms, tau_tensor);
    return out;
  }
};

TwoTensors binary_concrete_autograd(const at::Tensor& logits, double tau,
                                    const OptionalTensor& tau_tensor, bool hard,
                                    std::optional<at::Generator> generator,
                                    const OptionalTensor& rng_state,
                                    at::OptionalSymIntArrayRef positions) {
  const bool recorded = records(logits, tau_tensor), tangent = has_tangent(logits, tau_tensor);
  if (!recorded && !tangent) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return binary_concrete(logits, tau, tau_tensor, hard, generator, rng_state, positions);
  }
  if (!tangent && !under_transform()) {
    const variable_list out = BinaryConcrete::apply(unchanging(logits), tau, unchanging(tau_tensor),
                                                    hard, generator, rng_state, positions);
    return {out[0], out[1]};
  }
  // Under a transform the noise is kept, not the state: below this level a vmap may give each
  // example its own, which the one state that was drawn does not tell.
  check_binary("binary_concrete", logits, tau, tau_tensor, generator, rng_state, positions);
  const auto [noise, state] = noise_for(logits, generator, rng_state, positions);
  const DifferentiableCurve curve(logits, noise, safe_temperature(tau, tau_tensor, logits));
  at::Tensor y = curve.sigmoid();
  if (hard) y = curve.score.gt(0).to(y.scalar_type()) + (y - y.detach());
  return {y.to(logits.scalar_type()), state};
}

// ---- backward -----------------------------------------------------------------------------------

TwoTensors binary_concrete_backward_autograd(const at::Tensor& grad, const at::Tensor& logits,
                                             double tau, const OptionalTensor& tau_tensor,
                                             const at::Tensor& rng_state, bool tau_grad,
                                             at::OptionalSymIntArrayRef positions) {
  if (!records(grad, logits, tau_tensor) && !has_tangent(grad, logits, tau_tensor)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return binary_concrete_backward(grad, logits, tau, tau_tensor, rng_state, tau_grad, positions);
  }
  constexpr const char* op = "binary_concrete_backward";
  check_binary(op, logits, tau, tau_tensor, std::nullopt, rng_state, positions);
  check_grad(op, grad, logits);
  const at::Tensor noise = std::get<0>(noise_for(logits, std::nullopt, rng_state, positions)),
                   t = safe_temperature(tau, tau_tensor, logits);
  const DifferentiableCurve curve(logits, noise, t);
  const at::Tensor gradient = grad.to(t.scalar_type()) * curve.slope() / t;
  return {gradient.to(logits.scalar_type()),
          tau_grad ? -(gradient * curve.z) : at::empty({0}, t.options())};
}

}  // namespace
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, Meta, m) {
  using namespace gumbel_ext;
  m.impl("binary_concrete", &binary_concrete_meta);
  m.impl("logistic_noise", &logistic_noise_meta);
  m.impl("binary_concrete_backward", &binary_concrete_backward_meta);
}

TORCH_LIBRARY_IMPL(gumbel_ext, Autograd, m) {
  using namespace gumbel_ext;
  m.impl("binary_concrete", &binary_concrete_autograd);
  m.impl("logistic_noise", torch::CppFunction::makeFallthrough());
  m.impl("binary_concrete_backward", &binary_concrete_backward_autograd);
}
