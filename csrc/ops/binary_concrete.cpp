// The binary concrete: its arguments, results and derivatives.
#include "binary_concrete.h"

#include <limits>

#include "../autograd.h"
#include "../gumbel_ext.h"

namespace gumbel_ext {

using TwoTensors = std::tuple<at::Tensor, at::Tensor>;

TwoTensors binary_concrete(const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor,
                           bool hard, std::optional<at::Generator> generator,
                           const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions) {
  return call(BinaryConcrete{logits, tau, tau_tensor, hard, generator, rng_state, positions});
}

TwoTensors logistic_noise(const at::Tensor& like, c10::SymIntArrayRef size,
                          std::optional<at::Generator> generator, const OptionalTensor& rng_state,
                          at::OptionalSymIntArrayRef positions) {
  return call(LogisticNoise{like, size, generator, rng_state, positions});
}

TwoTensors binary_concrete_backward(const at::Tensor& grad, const at::Tensor& logits, double tau,
                                    const OptionalTensor& tau_tensor, const at::Tensor& rng_state,
                                    bool tau_grad, at::OptionalSymIntArrayRef positions) {
  return call(
      BinaryConcreteBackward{grad, logits, tau, tau_tensor, rng_state, tau_grad, positions});
}

// ---- arguments and results ----------------------------------------------------------------------

void BinaryConcrete::check() const {
  constexpr const char* op = name_of<BinaryConcrete>();
  check_logits(op, logits);
  check_elementwise_tau(op, tau, tau_tensor, logits);
  check_randomness(op, logits, generator, rng_state);
  check_positions(op, positions, logits.dim());
}

TwoTensors BinaryConcrete::prepare() {
  check();
  return {at::empty_like(logits), empty_rng_state(logits)};
}

void BinaryConcreteBackward::check() const {
  constexpr const char* op = name_of<BinaryConcreteBackward>();
  check_logits(op, logits);
  check_elementwise_tau(op, tau, tau_tensor, logits);
  check_randomness(op, logits, std::nullopt, rng_state);
  check_positions(op, positions, logits.dim());
  check_grad(op, grad, logits);
}

TwoTensors BinaryConcreteBackward::prepare() {
  check();
  return {at::empty_like(logits), empty_tau_terms(logits, tau_grad)};
}

TwoTensors LogisticNoise::prepare() {
  check_noise(*this);
  return {at::empty_symint(size, like.options()), empty_rng_state(like)};
}

namespace {

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

// Noise of the accumulate type, and the state it was made of.
TwoTensors noise_for(const at::Tensor& logits, const std::optional<at::Generator>& generator,
                     const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions) {
  const at::Tensor like =
      at::empty({0}, logits.options().dtype(compute_dtype(logits.scalar_type())));
  return call_below(LogisticNoise{like, logits.sym_sizes(), generator, rng_state, positions});
}

// ---- the sample ---------------------------------------------------------------------------------

class BinaryConcreteFunction : public torch::autograd::Function<BinaryConcreteFunction> {
 public:
  template <class... Field>
  static variable_list forward(AutogradContext* ctx, const Field&... field) {
    BinaryConcrete a{field...};
    auto [y, state] = call_below(a);
    ctx->mark_non_differentiable({state});
    ctx->set_materialize_grads(false);
    ctx->saved_data["tau_grad"] = requires_grad(a.tau_tensor);
    // Inputs alone, and y not even where it is at hand: one that has rounded to 0 or 1 no longer
    // says how steep the curve is there.
    a.rng_state = state;
    keep(ctx, a, {});
    return {y, state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list out(count_arguments(BinaryConcrete::schema));
    if (!grads[0].defined()) return out;
    const Kept<BinaryConcrete> kept(ctx, "logits or tau");
    const BinaryConcrete& a = kept.op;
    const bool tau_grad = ctx->saved_data["tau_grad"].toBool();
    const auto [grad_logits, tau_terms] = call(BinaryConcreteBackward{
        grads[0], a.logits, a.tau, a.tau_tensor, *a.rng_state, tau_grad, a.positions});
    out[place_of<BinaryConcrete>("logits")] = grad_logits;
    if (tau_grad) {
      out[place_of<BinaryConcrete>("tau_tensor")] = reduced_to(tau_terms, *a.tau_tensor);
    }
    return out;
  }
};

TwoTensors binary_concrete_autograd(BinaryConcrete& a) {
  const bool recorded = records(a.logits, a.tau_tensor),
             tangent = has_tangent(a.logits, a.tau_tensor);
  if (!recorded && !tangent) return call_below(a);
  if (!tangent && !under_transform()) {
    a.logits = unchanging(a.logits);
    a.tau_tensor = unchanging(a.tau_tensor);
    const variable_list out = apply_function<BinaryConcreteFunction>(a);
    return {out[0], out[1]};
  }
  // Under a transform the noise is kept, not the state: below this level a vmap may give each
  // example its own, which the one state that was drawn does not tell.
  a.check();
  const auto [noise, state] = noise_for(a.logits, a.generator, a.rng_state, a.positions);
  const DifferentiableCurve curve(a.logits, noise, safe_temperature(a.tau, a.tau_tensor, a.logits));
  at::Tensor y = curve.sigmoid();
  if (a.hard) y = curve.score.gt(0).to(y.scalar_type()) + (y - y.detach());
  return {y.to(a.logits.scalar_type()), state};
}

// ---- its backward -------------------------------------------------------------------------------

TwoTensors binary_concrete_backward_autograd(BinaryConcreteBackward& a) {
  if (!records(a.grad, a.logits, a.tau_tensor) && !has_tangent(a.grad, a.logits, a.tau_tensor)) {
    return call_below(a);
  }
  a.check();
  const at::Tensor noise = std::get<0>(noise_for(a.logits, std::nullopt, a.rng_state, a.positions)),
                   t = safe_temperature(a.tau, a.tau_tensor, a.logits);
  const DifferentiableCurve curve(a.logits, noise, t);
  const at::Tensor gradient = a.grad.to(t.scalar_type()) * curve.slope() / t;
  return {gradient.to(a.logits.scalar_type()),
          a.tau_grad ? -(gradient * curve.z) : at::empty({0}, t.options())};
}

}  // namespace
}  // namespace gumbel_ext

TORCH_LIBRARY_FRAGMENT(gumbel_ext, m) {
  using namespace gumbel_ext;
  define<BinaryConcrete>(m);
  define<BinaryConcreteBackward>(m);
  define<LogisticNoise>(m);
}

TORCH_LIBRARY_IMPL(gumbel_ext, Autograd, m) {
  using namespace gumbel_ext;
  implement<&binary_concrete_autograd>(m);
  implement<&binary_concrete_backward_autograd>(m);
  m.impl(name_of<LogisticNoise>(), torch::CppFunction::makeFallthrough());
}
