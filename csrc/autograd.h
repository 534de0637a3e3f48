// What the derivatives of ops share: which level of differentiation wants them, and what a backward
// is given.
//
// The Autograd kernels run once for each level of differentiation: that of torch.autograd, and that
// of each functorch transform around it. Like PyTorch's own they record a node, or set a
// forward-mode tangent, and call the same op for the levels below.
#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <functional>
#include <string>
#include <vector>

#include "arguments.h"

namespace gumbel_ext {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// exp(-kFar) is 0 in every type: what is farther counts for nothing, and overflows for nothing.
constexpr double kFar = 1000;

inline bool requires_grad(const OptionalTensor& t) {
  return t && t->defined() && t->requires_grad();
}

template <class... Tensors>
bool records(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (requires_grad(tensors) || ...);
}

template <class... Tensors>
bool has_tangent(const Tensors&... tensors) {
  return (torch::autograd::isFwGradDefined(OptionalTensor(tensors)) || ...);
}

// Whether the level being differentiated is that of a functorch transform.
inline bool under_transform() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

// What a backward reads again, so that it is still the forward's. Autograd sees a change in place
// and refuses, but not one through .data nor the step of a fused optimizer: of a leaf, whose memory
// these change, and of its views, this is a copy, differentiable in them. Tensors without memory,
// as in a graph being traced, have nothing to copy.
at::Tensor unchanging(const at::Tensor& t);

inline OptionalTensor unchanging(const OptionalTensor& t) {
  return t ? OptionalTensor(unchanging(*t)) : std::nullopt;
}

// read() of saved tensors; `names` are the arguments they are, for the error if one was changed.
template <class Read>
auto unchanged(const char* op, const char* names, Read read) {
  try {
    return read();
  } catch (const c10::Error& error) {
    const std::string message = error.what_without_backtrace(),
                      found = "has been modified by an inplace operation";
    const size_t start = message.find(found);
    if (start == std::string::npos) throw;
    const std::string which = message.substr(start, message.find(". Hint", start) - start);
    TORCH_CHECK(false, op, ": ", names, ", which the backward reads, ", which,
                "; modify a clone() of it, or modify it after the backward");
  }
}

inline OptionalTensor optional(const at::Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

inline OptionalTensor detached(const OptionalTensor& t) {
  return t ? OptionalTensor(t->detach()) : std::nullopt;
}

inline at::Tensor temperature(double tau, const OptionalTensor& tau_tensor, const at::Tensor& y) {
  const auto options = y.options().dtype(compute_dtype(y.scalar_type()));
  return tau_tensor ? tau_tensor->to(options.device(), options.dtype().toScalarType())
                    : at::full({}, tau, options);
}

inline at::Tensor reduced_to(const at::Tensor& grad_tau, const at::Tensor& tau) {
  return at::sum_to(grad_tau, tau.sym_sizes()).to(tau.device(), tau.scalar_type());
}

inline at::Tensor sum_classes(const at::Tensor& v, int64_t dim) {
  return v.dim() == 0 ? v : v.sum(dim, /*keepdim=*/true);
}

// The op for the levels below the one being differentiated.
template <class Op>
typename Op::Result call_below(const Op& op) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return call(op);
}

// An op whose index or noise has no gradient.
template <class Op>
typename Op::Result without_derivative(Op& op) {
  return call_below(op);
}

// ---- torch::autograd::Function ------------------------------------------------------------------

// Function::apply with a parameter for each field: it looks for tensors among its parameters.
template <class Function, class Op>
variable_list apply_function(const Op& op) {
  return std::apply([](const auto&... field) { return Function::apply(field...); },
                    fields(const_cast<Op&>(op)));
}

// The tensors among the fields of an op, in order. An optional one that is not given is undefined.
template <class Op>
variable_list tensors_of(const Op& op) {
  variable_list tensors;
  const auto add = [&](const auto& field) {
    using Field = std::decay_t<decltype(field)>;
    if constexpr (std::is_same_v<Field, at::Tensor>) tensors.push_back(field);
    if constexpr (std::is_same_v<Field, OptionalTensor>)
      tensors.push_back(field.value_or(at::Tensor()));
  };
  std::apply([&](const auto&... field) { (add(field), ...); }, fields(const_cast<Op&>(op)));
  return tensors;
}

// Their inverse: the tensors are the last ones of a list.
template <class Op>
void set_tensors(Op& op, const variable_list& tensors) {
  size_t next = tensors.size() - tensors_of(op).size();
  const auto set = [&](auto& field) {
    using Field = std::decay_t<decltype(field)>;
    if constexpr (std::is_same_v<Field, at::Tensor>) field = tensors[next++];
    if constexpr (std::is_same_v<Field, OptionalTensor>) field = optional(tensors[next++]);
  };
  std::apply([&](auto&... field) { (set(field), ...); }, fields(op));
}

// Calls visit(field) for each number of an op, and with_positions(field).
template <class Op, class Visit, class WithPositions>
void for_numbers(Op& op, Visit visit, WithPositions with_positions) {
  const auto of_field = [&](auto& field) {
    using Field = std::decay_t<decltype(field)>;
    if constexpr (std::is_same_v<Field, at::OptionalSymIntArrayRef>) with_positions(field);
    if constexpr (std::is_arithmetic_v<Field>) visit(field);
  };
  std::apply([&](auto&... field) { (of_field(field), ...); }, fields(op));
}

// Keeps an op for its backward, without its generator, and tensors among its results. Numbers are
// kept as one list, because each entry of saved_data costs as much as a small kernel.
template <class Op>
void keep(AutogradContext* ctx, Op& op, variable_list results) {
  std::vector<double> numbers;
  for_numbers(
      op, [&](auto number) { numbers.push_back(static_cast<double>(number)); },
      [&](at::OptionalSymIntArrayRef positions) {
        if (positions) ctx->saved_data["positions"] = *positions;
      });
  ctx->saved_data["numbers"] = std::move(numbers);
  for (at::Tensor& tensor : tensors_of(op)) results.push_back(std::move(tensor));
  ctx->save_for_backward(std::move(results));
}

// What keep() kept.
template <class Op>
struct Kept {
  Op op{};
  variable_list results;

  // `names`, or names(op) where they depend on its numbers: the arguments that the backward reads,
  // for the error if one was changed.
  Kept(AutogradContext* ctx, const char* names) : Kept(ctx, [names](const Op&) { return names; }) {}
  template <class Names>
  Kept(AutogradContext* ctx, Names names) {
    const std::vector<double> numbers = ctx->saved_data["numbers"].toDoubleVector();
    size_t next = 0;
    for_numbers(
        op,
        [&](auto& number) {
          number = static_cast<std::decay_t<decltype(number)>>(numbers[next++]);
        },
        [&](at::OptionalSymIntArrayRef& positions) {
          const auto found = ctx->saved_data.find("positions");
          if (found == ctx->saved_data.end()) return;
          positions_ = found->second.toSymIntVector();
          positions = positions_;
        });
    results = unchanged(name_of<Op>(), names(op), [&] { return ctx->get_saved_variables(); });
    set_tensors(op, results);
  }
  Kept(const Kept&) = delete;

 private:
  std::vector<c10::SymInt> positions_;  // of op
};

// ---- nodes recorded by hand ---------------------------------------------------------------------

// A tensor that a node saves. An output of the node is saved as such, or it would own itself.
struct Saved {
  at::Tensor tensor;
  bool is_output = false;

  Saved(const at::Tensor& t, bool output = false) : tensor(t), is_output(output) {}
  Saved(const OptionalTensor& t) : tensor(t.value_or(at::Tensor())) {}
};

// What the backward of a node is given. Gradients that did not arrive are undefined.
struct NodeCall {
  const variable_list& grads;
  const variable_list& saved;
  const torch::autograd::Node& node;
  variable_list& out;  // one for each input

  bool wants(size_t input) const { return node.should_compute_output(input); }
};

struct NodeDescription {
  std::string name;
  std::string op;
  const char* saved_names;  // for the error if one was changed
};

// torch::autograd::Function refuses to run under a transform and has no forward mode. Where either
// is wanted a node is recorded by this. set_tangents() is called when the outputs have their
// history and before they are saved: the tangent of an output may be a function of it, and that of
// the gradient is made from the tangent.
void record(
    const NodeDescription& description, const variable_list& outputs, const variable_list& inputs,
    const std::vector<Saved>& saved, std::function<void(const NodeCall&)> backward,
    const std::function<void()>& set_tangents = [] {});

}  // namespace gumbel_ext
