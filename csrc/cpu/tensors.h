// From tensors to what the CPU kernels are told: shared by the files that register ops.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>

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

inline void write_state(const RngState& state, const at::Tensor& rng_state) {
  int64_t* values = rng_state.mutable_data_ptr<int64_t>();
  values[0] = static_cast<int64_t>(state.seed);
  values[1] = static_cast<int64_t>(state.offset);
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

// Noise of a kernel of the table, at the positions of a contiguous tensor.
template <class Noise>
void fill_noise(const at::Tensor& out, const RngState& state, at::OptionalSymIntArrayRef positions,
                Noise noise) {
  const ElementType type = element_type(out.scalar_type());
  char* data = static_cast<char*>(out.mutable_data_ptr());
  const int64_t bytes = static_cast<int64_t>(out.element_size());
  const auto fill = [&](int64_t position, int64_t begin, int64_t count) {
    noise(type, state.seed, state.offset, static_cast<uint64_t>(position), count,
          data + begin * bytes);
  };
  const Positions places(out.sizes(), positions);
  if (places.contiguous) {
    at::parallel_for(0, out.numel(), 8192, [&](int64_t begin, int64_t end) {
      fill(places.base + begin, begin, end - begin);
    });
    return;
  }
  // Trailing dimensions of consecutive positions are one run.
  int64_t run = 1, outer_dims = out.dim();
  while (outer_dims > 0 &&
         (out.size(outer_dims - 1) == 1 || places.strides[outer_dims - 1] == run)) {
    run *= out.size(--outer_dims);
  }
  at::parallel_for(0, out.numel() / run, std::max<int64_t>(1, 8192 / run),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t r = begin; r < end; ++r) {
                       int64_t position = places.base, rest = r;
                       for (int64_t d = outer_dims; d-- > 0; rest /= out.size(d)) {
                         position += rest % out.size(d) * places.strides[d];
                       }
                       fill(position, r * run, run);
                     }
                   });
}

// A temperature tensor as float64 values broadcast over the rows.
inline at::Tensor row_temperatures(const char* op, const OptionalTensor& tau_tensor,
                                   const at::Tensor& logits, int64_t dim,
                                   const char* name = "tau") {
  if (!tau_tensor) return at::Tensor();
  const at::Tensor values = tau_tensor->to(at::kDouble);
  check_tau_values(op, values, name);
  at::DimVector shape(logits.sizes());
  if (!shape.empty()) shape[dim] = 1;
  return values.expand(shape);
}

}  // namespace cpu
}  // namespace gumbel_ext
