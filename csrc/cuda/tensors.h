// From tensors to what the CUDA kernels are told: shared by the files that register ops.
#pragma once

#include <ATen/cuda/CUDAGeneratorImpl.h>

#include <algorithm>
#include <limits>
#include <mutex>

#include "../arguments.h"
#include "params.h"

namespace gumbel_ext {
namespace cuda {

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

// A call reserves two Philox blocks, eight words, of the generator.
constexpr std::uint64_t kWordsPerCall = 8;

inline RandomSource random_source(const std::optional<at::Generator>& generator,
                                  const OptionalTensor& rng_state, at::Tensor& on_device) {
  RandomSource source{};
  if (rng_state) {
    if (rng_state->is_cpu()) {
      const at::Tensor values = rng_state->contiguous();
      source.seed = static_cast<std::uint64_t>(values.const_data_ptr<int64_t>()[0]);
      source.offset = static_cast<std::uint64_t>(values.const_data_ptr<int64_t>()[1]);
      return source;
    }
    on_device = rng_state->contiguous();
    source.in_memory = true;
    source.seed_address = on_device.const_data_ptr<int64_t>();
    source.offset_address = source.seed_address + 1;
    return source;
  }
  auto* impl = at::get_generator_or_default<at::CUDAGeneratorImpl>(
      generator, at::cuda::detail::getDefaultCUDAGenerator());
  at::PhiloxCudaState state;
  {
    std::lock_guard<std::mutex> lock(impl->mutex_);
    state = impl->philox_cuda_state(kWordsPerCall);
  }
  source.offset_in_words = true;
  source.in_memory = state.captured_;
  if (state.captured_) {
    source.seed_address = state.seed_.ptr;
    source.offset_address = state.offset_.ptr;
    source.offset_more = state.offset_intragraph_;
  } else {
    source.seed = state.seed_.val;
    source.offset = state.offset_.val;
  }
  return source;
}

inline void check_launch(const char* op, const char* error) {
  TORCH_CHECK(error == nullptr, op, ": CUDA launch failed: ", error);
}

// A factor kept inside the normal range of the type computed in.
inline double clamped_factor(double value, bool is_double) {
  const double low =
      is_double ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min();
  const double high =
      is_double ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
  return std::min(std::max(value, low), high);
}

}  // namespace cuda
}  // namespace gumbel_ext
