// From tensors to what the CPU kernels are told: shared by the files that register ops.
#pragma once

#include <ATen/CPUGeneratorImpl.h>

#include <mutex>

#include "../arguments.h"
#include "problem.h"

namespace gumbel_ext {
namespace cpu {

struct RngState {
  uint64_t seed, offset;
};

// The noise contract on the CPU: one 64-bit seed a call, offset 0.
inline RngState reserve_randomness(const std::optional<at::Generator>& generator,
                                   const OptionalTensor& rng_state) {
  if (rng_state) {
    const at::Tensor state = rng_state->cpu().contiguous();
    const int64_t* values = state.const_data_ptr<int64_t>();
    return {static_cast<uint64_t>(values[0]), static_cast<uint64_t>(values[1])};
  }
  auto* source = at::get_generator_or_default<at::CPUGeneratorImpl>(
      generator, at::detail::getDefaultCPUGenerator());
  const std::lock_guard<std::mutex> lock(source->mutex_);
  return {source->random64(), 0};
}

inline ElementType element_type(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return ElementType::kFloat64;
    case at::kFloat:
      return ElementType::kFloat32;
    case at::kBFloat16:
      return ElementType::kBFloat16;
    default:
      return ElementType::kFloat16;
  }
}

// A temperature tensor as float64 values broadcast over the rows.
inline at::Tensor row_temperatures(const char* op, const OptionalTensor& tau_tensor,
                                   const at::Tensor& logits, int64_t dim) {
  if (!tau_tensor) return at::Tensor();
  const at::Tensor values = tau_tensor->to(at::kDouble);
  check_tau_values(op, values);
  at::DimVector shape(logits.sizes());
  if (!shape.empty()) shape[dim] = 1;
  return values.expand(shape);
}

}  // namespace cpu
}  // namespace gumbel_ext
