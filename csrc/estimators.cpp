// Hard samples of gumbel_softmax with the gradients of other estimators, on any device: their
// functions and derivatives.
//
// The backward of each is a matrix of the row times grad. The matrix is symmetric and a constant:
// derivatives in grad, and in forward mode, are the backward op once more, and there are none of it
// in the logits.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <utility>

#include "autograd_levels.h"
#include "autograd_node.h"
#include "gumbel_ext.h"

namespace gumbel_ext {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using Sample = std::tuple<at::Tensor, at::Tensor>;
using SampleAndState = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Calls an op of the signature of `function`, the C++ function of its name.
template <class Result, class... Parameters>
auto find_op(const char* name, Result (*)(Parameters...)) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Result(Parameters...)>();
}

}  // namespace

// ---- functions ----------------------------------------------------------------------------------

SampleAndState gumbel_rao(const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor,
                          c10::SymInt k, int64_t dim, const OptionalTensor& mask, bool return_index,
                          std::optional<at::Generator> generator, const OptionalTensor& rng_state) {
  static const auto op = find_op("gumbel_ext::gumbel_rao", &gumbel_rao);
  return op.call(logits, tau, tau_tensor, std::move(k), dim, mask, return_index,
                 std::move(generator), rng_state);
}

Sample zgr(const at::Tensor& logits, int64_t dim, const OptionalTensor& mask, bool return_index,
           std::optional<at::Generator> generator, const OptionalTensor& rng_state,
           at::OptionalSymIntArrayRef positions) {
  static const auto op = find_op("gumbel_ext::zgr", &zgr);
  return op.call(logits, dim, mask, return_index, std::move(generator), rng_state, positions);
}

Sample reinmax(const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor, int64_t dim,
               const OptionalTensor& mask, bool return_index,
               std::optional<at::Generator> generator, const OptionalTensor& rng_state,
               at::OptionalSymIntArrayRef positions) {
  static const auto op = find_op("gumbel_ext::reinmax", &reinmax);
  return op.call(logits, tau, tau_tensor, dim, mask, return_index, std::move(generator), rng_state,
                 positions);
}

Sample gapped_straight_through(const at::Tensor& logits, double tau,
                               const OptionalTensor& tau_tensor, std::optional<double> gap,
                               int64_t dim, const OptionalTensor& mask, bool return_index,
                               std::optional<at::Generator> generator,
                               const OptionalTensor& rng_state,
                               at::OptionalSymIntArrayRef positions,
                               const OptionalTensor& gap_tensor) {
  static const auto op = find_op("gumbel_ext::gapped_straight_through", &gapped_straight_through);
  return op.call(logits, tau, tau_tensor, gap, dim, mask, return_index, std::move(generator),
                 rng_state, positions, gap_tensor);
}

at::Tensor gumbel_rao_backward(const at::Tensor& grad, const at::Tensor& logits,
                               const at::Tensor& index, double tau,
                               const OptionalTensor& tau_tensor, c10::SymInt k, int64_t dim,
                               const OptionalTensor& mask, const at::Tensor& rng_state) {
  static const auto op = find_op("gumbel_ext::gumbel_rao_backward", &gumbel_rao_backward);
  return op.call(grad, logits, index, tau, tau_tensor, std::move(k), dim, mask, rng_state);
}

at::Tensor zgr_backward(const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& index,
                        int64_t dim, const OptionalTensor& mask) {
  static const auto op = find_op("gumbel_ext::zgr_backward", &zgr_backward);
  return op.call(grad, logits, index, dim, mask);
}

at::Tensor reinmax_backward(const at::Tensor& grad, const at::Tensor& logits,
                            const at::Tensor& index, double tau, const OptionalTensor& tau_tensor,
                            int64_t dim, const OptionalTensor& mask) {
  static const auto op = find_op("gumbel_ext::reinmax_backward", &reinmax_backward);
  return op.call(grad, logits, index, tau, tau_tensor, dim, mask);
}

at::Tensor gapped_straight_through_backward(const at::Tensor& grad, const at::Tensor& logits,
                                            const at::Tensor& index, double tau,
                                            const OptionalTensor& tau_tensor,
                                            std::optional<double> gap, int64_t dim,
                                            const OptionalTensor& mask,
                                            const OptionalTensor& gap_tensor) {
  static const auto op =
      find_op("gumbel_ext::gapped_straight_through_backward", &gapped_straight_through_backward);
  return op.call(grad, logits, index, tau, tau_tensor, gap, dim, mask, gap_tensor);
}

namespace {

// ---- samples ------------------------------------------------------------------------------------

void check_values(const char* op, const OptionalTensor& tau_tensor) {
  if (tau_tensor && tau_tensor->is_cpu()) check_tau_values(op, tau_tensor->to(at::kDouble));
}

// A hard sample does not depend on the temperature.
SampleAndState hard_sample(const at::Tensor& logits, int64_t dim, const OptionalTensor& mask,
                           bool return_index, std::optional<at::Generator> generator,
                           const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions) {
  return gumbel_softmax(logits, 1.0, std::nullopt, /*hard=*/true, dim, mask, return_index,
                        std::move(generator), rng_state, positions);
}

SampleAndState gumbel_rao_sample(const at::Tensor& logits, double tau,
                                 const OptionalTensor& tau_tensor, int64_t k, int64_t dim,
                                 const OptionalTensor& mask, bool return_index,
                                 std::optional<at::Generator> generator,
                                 const OptionalTensor& rng_state) {
  constexpr const char* op = "gumbel_rao";
  check_conditional_draws(op, k);
  dim = check_forward(op, logits, tau, tau_tensor, dim, mask, generator, rng_state, std::nullopt);
  check_values(op, tau_tensor);
  return hard_sample(logits, dim, mask, return_index, generator, rng_state, std::nullopt);
}

Sample zgr_sample(const at::Tensor& logits, int64_t dim, const OptionalTensor& mask,
                  bool return_index, std::optional<at::Generator> generator,
                  const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions) {
  dim = check_forward("zgr", logits, 1.0, std::nullopt, dim, mask, generator, rng_state, positions);
  auto [y, index, state] =
      hard_sample(logits, dim, mask, return_index, generator, rng_state, positions);
  return {y, index};
}

Sample reinmax_sample(const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor,
                      int64_t dim, const OptionalTensor& mask, bool return_index,
                      std::optional<at::Generator> generator, const OptionalTensor& rng_state,
                      at::OptionalSymIntArrayRef positions) {
  constexpr const char* op = "reinmax";
  dim = check_forward(op, logits, tau, tau_tensor, dim, mask, generator, rng_state, positions);
  check_values(op, tau_tensor);
  auto [y, index, state] =
      hard_sample(logits, dim, mask, return_index, generator, rng_state, positions);
  return {y, index};
}

Sample gapped_sample(const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor,
                     std::optional<double> gap, int64_t dim, const OptionalTensor& mask,
                     bool return_index, std::optional<at::Generator> generator,
                     const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions,
                     const OptionalTensor& gap_tensor) {
  constexpr const char* op = "gapped_straight_through";
  gap_value(op, gap, gap_tensor);
  dim = check_forward(op, logits, tau, tau_tensor, dim, mask, generator, rng_state, positions);
  check_values(op, tau_tensor);
  auto [y, index, state] =
      hard_sample(logits, dim, mask, return_index, generator, rng_state, positions);
  return {y, index};
}

// ---- derivatives --------------------------------------------------------------------------------

// One of the four with its numbers, and what it multiplies by.
struct Estimator {
  enum Kind { kGumbelRao, kZgr, kReinMax, kGapped };

  Kind kind;
  double tau = 1;
  c10::SymInt k = 1;
  std::optional<double> gap;
  int64_t dim = 0;
  OptionalTensor gap_tensor;

  const char* name() const {
    constexpr const char* names[] = {"gumbel_rao", "zgr", "reinmax", "gapped_straight_through"};
    return names[kind];
  }
};

struct Factors {
  at::Tensor logits, index, tau, mask, rng_state;
};

at::Tensor product(const Estimator& e, const at::Tensor& v, const Factors& f) {
  switch (e.kind) {
    case Estimator::kGumbelRao:
      return gumbel_rao_backward(v, f.logits, f.index, e.tau, optional(f.tau), e.k, e.dim,
                                 optional(f.mask), f.rng_state);
    case Estimator::kZgr:
      return zgr_backward(v, f.logits, f.index, e.dim, optional(f.mask));
    case Estimator::kReinMax:
      return reinmax_backward(v, f.logits, f.index, e.tau, optional(f.tau), e.dim,
                              optional(f.mask));
    default:
      return gapped_straight_through_backward(v, f.logits, f.index, e.tau, optional(f.tau), e.gap,
                                              e.dim, optional(f.mask), e.gap_tensor);
  }
}

// The product with a gradient: of a sample, and then of such a product.
struct ProductNode : torch::autograd::Node {
  std::string name() const override { return std::string(estimator.name()) + "_product"; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list out(num_outputs());
    if (!grads[0].defined()) return out;
    if (out.size() > 1) {
      TORCH_CHECK_NOT_IMPLEMENTED(
          !task_should_compute_output(1), estimator.name(),
          ": the gradient has no derivative in logits, of which its matrix is a constant");
    }
    if (should_compute_output(0)) {
      const Factors factors = unchanged(estimator.name(), "logits, tau or mask", [&] {
        return Factors{logits.unpack(), index.unpack(), tau.unpack(), mask.unpack(),
                       rng_state.unpack()};
      });
      out[0] = product(estimator, grads[0], factors);
    }
    return out;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&logits, &index, &tau, &mask, &rng_state}) saved->reset_data();
  }

  void save(const Factors& f) {
    logits = SavedVariable(f.logits, /*is_output=*/false);
    index = SavedVariable(f.index, /*is_output=*/false);
    tau = SavedVariable(f.tau, /*is_output=*/false);
    mask = SavedVariable(f.mask, /*is_output=*/false);
    rng_state = SavedVariable(f.rng_state, /*is_output=*/false);
  }

  Estimator estimator;
  SavedVariable logits, index, tau, mask, rng_state;
};

auto product_node(const Estimator& e, const Factors& f) {
  auto node = make_node<ProductNode>();
  node->estimator = e;
  node->save(f);
  return node;
}

// sample_below(return_index) calls the op for the levels below and returns y, index and, where the
// backward reads it, the state.
template <class SampleBelow>
SampleAndState differentiable_sample(Estimator e, const at::Tensor& logits,
                                     const OptionalTensor& tau_tensor, const OptionalTensor& mask,
                                     bool return_index, SampleBelow sample_below) {
  TORCH_CHECK_VALUE(!records(tau_tensor) && !has_tangent(tau_tensor), e.name(),
                    ": tau must not require a gradient, of which this estimator has none; pass its "
                    "detach()");
  const bool recorded = records(logits), tangent = has_tangent(logits);
  SampleAndState sample;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    sample = sample_below(return_index || recorded || tangent);
  }
  if (!recorded && !tangent) return sample;
  const auto& [y, index, state] = sample;
  e.dim = wrapped_dim(e.name(), logits, e.dim);
  const at::Tensor tau = tau_tensor ? tau_tensor->detach() : at::Tensor();
  const Factors factors{logits, index, tau, mask.value_or(at::Tensor()), state};
  if (recorded) {
    Factors kept = factors;
    kept.logits = unchanging(logits);
    if (tau_tensor) kept.tau = unchanging(tau);
    auto node = product_node(e, kept);
    node->set_next_edges(torch::autograd::collect_next_edges(kept.logits));
    torch::autograd::set_history(y, node);
  }
  if (tangent) {
    Factors primal = factors;
    primal.logits = logits._fw_primal(/*level=*/0);
    const at::Tensor of_y = product(e, logits._fw_grad(/*level=*/0), primal);
    y._set_fw_grad(of_y, /*level=*/0, /*is_inplace_op=*/false);
  }
  return {y, return_index ? index : at::empty({0}, index.options()), state};
}

at::Tensor differentiable_product(const Estimator& e, const at::Tensor& grad, const Factors& f) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !has_tangent(f.logits), e.name(),
      ": the gradient has no derivative in logits, of which its matrix is a constant");
  at::Tensor out;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    out = product(e, grad, f);
  }
  if (records(grad, f.logits)) {
    auto node = product_node(e, f);
    node->set_next_edges(torch::autograd::collect_next_edges(grad, f.logits));
    torch::autograd::set_history(out, node);
  }
  if (has_tangent(grad)) {
    out._set_fw_grad(product(e, grad._fw_grad(/*level=*/0), f), /*level=*/0,
                     /*is_inplace_op=*/false);
  }
  return out;
}

SampleAndState gumbel_rao_autograd(const at::Tensor& logits, double tau,
                                   const OptionalTensor& tau_tensor, c10::SymInt k, int64_t dim,
                                   const OptionalTensor& mask, bool return_index,
                                   std::optional<at::Generator> generator,
                                   const OptionalTensor& rng_state) {
  return differentiable_sample({Estimator::kGumbelRao, tau, k, std::nullopt, dim}, logits,
                               tau_tensor, mask, return_index, [&](bool with_index) {
                                 return gumbel_rao(logits, tau, tau_tensor, k, dim, mask,
                                                   with_index, generator, rng_state);
                               });
}

Sample zgr_autograd(const at::Tensor& logits, int64_t dim, const OptionalTensor& mask,
                    bool return_index, std::optional<at::Generator> generator,
                    const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions) {
  auto [y, index, none] = differentiable_sample(
      {Estimator::kZgr, 1, 1, std::nullopt, dim}, logits, std::nullopt, mask, return_index,
      [&](bool with_index) -> SampleAndState {
        auto [y, index] = zgr(logits, dim, mask, with_index, generator, rng_state, positions);
        return {y, index, at::Tensor()};
      });
  return {y, index};
}

Sample reinmax_autograd(const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor,
                        int64_t dim, const OptionalTensor& mask, bool return_index,
                        std::optional<at::Generator> generator, const OptionalTensor& rng_state,
                        at::OptionalSymIntArrayRef positions) {
  auto [y, index, none] = differentiable_sample(
      {Estimator::kReinMax, tau, 1, std::nullopt, dim}, logits, tau_tensor, mask, return_index,
      [&](bool with_index) -> SampleAndState {
        auto [y, index] = reinmax(logits, tau, tau_tensor, dim, mask, with_index, generator,
                                  rng_state, positions);
        return {y, index, at::Tensor()};
      });
  return {y, index};
}

Sample gapped_autograd(const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor,
                       std::optional<double> gap, int64_t dim, const OptionalTensor& mask,
                       bool return_index, std::optional<at::Generator> generator,
                       const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions,
                       const OptionalTensor& gap_tensor) {
  auto [y, index, none] =
      differentiable_sample({Estimator::kGapped, tau, 1, gap, dim, gap_tensor}, logits, tau_tensor,
                            mask, return_index, [&](bool with_index) -> SampleAndState {
                              auto [y, index] = gapped_straight_through(
                                  logits, tau, tau_tensor, gap, dim, mask, with_index, generator,
                                  rng_state, positions, gap_tensor);
                              return {y, index, at::Tensor()};
                            });
  return {y, index};
}

at::Tensor gumbel_rao_backward_autograd(const at::Tensor& grad, const at::Tensor& logits,
                                        const at::Tensor& index, double tau,
                                        const OptionalTensor& tau_tensor, c10::SymInt k,
                                        int64_t dim, const OptionalTensor& mask,
                                        const at::Tensor& rng_state) {
  return differentiable_product(
      {Estimator::kGumbelRao, tau, k, std::nullopt, dim}, grad,
      {logits, index, tau_tensor.value_or(at::Tensor()), mask.value_or(at::Tensor()), rng_state});
}

at::Tensor zgr_backward_autograd(const at::Tensor& grad, const at::Tensor& logits,
                                 const at::Tensor& index, int64_t dim, const OptionalTensor& mask) {
  return differentiable_product({Estimator::kZgr, 1, 1, std::nullopt, dim}, grad,
                                {logits, index, {}, mask.value_or(at::Tensor()), {}});
}

at::Tensor reinmax_backward_autograd(const at::Tensor& grad, const at::Tensor& logits,
                                     const at::Tensor& index, double tau,
                                     const OptionalTensor& tau_tensor, int64_t dim,
                                     const OptionalTensor& mask) {
  return differentiable_product(
      {Estimator::kReinMax, tau, 1, std::nullopt, dim}, grad,
      {logits, index, tau_tensor.value_or(at::Tensor()), mask.value_or(at::Tensor()), {}});
}

at::Tensor gapped_backward_autograd(const at::Tensor& grad, const at::Tensor& logits,
                                    const at::Tensor& index, double tau,
                                    const OptionalTensor& tau_tensor, std::optional<double> gap,
                                    int64_t dim, const OptionalTensor& mask,
                                    const OptionalTensor& gap_tensor) {
  return differentiable_product(
      {Estimator::kGapped, tau, 1, gap, dim, gap_tensor}, grad,
      {logits, index, tau_tensor.value_or(at::Tensor()), mask.value_or(at::Tensor()), {}});
}

}  // namespace
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CompositeExplicitAutograd, m) {
  using namespace gumbel_ext;
  m.impl("gumbel_rao", &gumbel_rao_sample);
  m.impl("zgr", &zgr_sample);
  m.impl("reinmax", &reinmax_sample);
  m.impl("gapped_straight_through", &gapped_sample);
}

TORCH_LIBRARY_IMPL(gumbel_ext, Autograd, m) {
  using namespace gumbel_ext;
  m.impl("gumbel_rao", &gumbel_rao_autograd);
  m.impl("gumbel_rao_backward", &gumbel_rao_backward_autograd);
  m.impl("zgr", &zgr_autograd);
  m.impl("zgr_backward", &zgr_backward_autograd);
  m.impl("reinmax", &reinmax_autograd);
  m.impl("reinmax_backward", &reinmax_backward_autograd);
  m.impl("gapped_straight_through", &gapped_autograd);
  m.impl("gapped_straight_through_backward", &gapped_backward_autograd);
}
