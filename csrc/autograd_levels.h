// What the files with derivatives share: which level of differentiation wants them, and the
// temperature as a tensor.
#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <string>

#include "arguments.h"

namespace gumbel_ext {

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

inline at::Tensor temperature(double tau, const OptionalTensor& tau_tensor, const at::Tensor& y) {
  const auto options = y.options().dtype(compute_dtype(y.scalar_type()));
  return tau_tensor ? tau_tensor->to(options.device(), options.dtype().toScalarType())
                    : at::full({}, tau, options);
}

inline at::Tensor reduced_to(const at::Tensor& grad_tau, const at::Tensor& tau) {
  return at::sum_to(grad_tau, tau.sym_sizes()).to(tau.device(), tau.scalar_type());
}

}  // namespace gumbel_ext
