// What the files with derivatives share: which level of differentiation wants them, and the
// temperature as a tensor.
#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/functions/utils.h>

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
