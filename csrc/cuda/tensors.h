// From tensors to what the CUDA kernels are told: shared by the files that register ops.
#pragma once

#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

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

// Whether its values are readable without a device sync. Under emulation the device's tensors are
// the CPU's: only a single number, which may be the CPU's beside a GPU too, counts as one of the
// host.
inline bool on_host(const at::Tensor& t) {
#if defined(GUMBEL_EXT_EMULATE_CUDA)
  return t.dim() == 0;
#else
  return t.is_cpu();
#endif
}

inline void* current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

inline Device current_device() {
  const auto index = c10::cuda::current_device();
  int multiprocessors = 1, major = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  return Device{multiprocessors, major >= 9};
}

// Checks the values of a temperature that can be read without a device sync.
template <class Op>
void check_tau_on_host(const Op& a) {
  if (a.tau_tensor && a.tau_tensor->is_cpu()) {
    check_tau_values(name_of<Op>(), a.tau_tensor->to(at::kDouble));
  }
}

// A call reserves two Philox blocks, eight words, of the generator.
constexpr std::uint64_t kWordsPerCall = 8;

inline RandomSource random_source(const std::optional<at::Generator>& generator,
                                  const OptionalTensor& rng_state, at::Tensor& on_device) {
  RandomSource source{};
  if (rng_state) {
    if (on_host(*rng_state)) {
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

// A factor kept inside the normal range of the accumulate type.
inline double clamped_factor(double value, bool is_double) {
  const double low =
      is_double ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min();
  const double high =
      is_double ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
  return std::min(std::max(value, low), high);
}

// The number that a temperature is, if that is known without a look at the device: one on the CPU
// needs no copy there, and is what a number becomes under torch.compile.
inline std::optional<double> known_tau(double tau, const OptionalTensor& tau_tensor) {
  if (!tau_tensor) return tau;
  if (on_host(*tau_tensor) && tau_tensor->numel() == 1) return tau_tensor->item<double>();
  return std::nullopt;
}

// One number for each row of `like`, of the accumulate type.
inline at::Tensor row_temperatures(const at::Tensor& tau_tensor, const at::Tensor& like,
                                   int64_t dim) {
  const at::ScalarType type = compute_dtype(like.scalar_type());
  at::Tensor of_rows = tau_tensor.to(like.device());
  if (type == at::kFloat && of_rows.scalar_type() == at::kDouble) {
    // What is positive and finite stays so in float32; what is not stays what it is.
    const at::Tensor valid = of_rows.gt(0).logical_and(of_rows.isfinite());
    of_rows = at::where(
        valid, of_rows.clamp(std::numeric_limits<float>::min(), std::numeric_limits<float>::max()),
        of_rows);
  }
  return of_rows.to(type).expand_symint(shape_reduced(like, dim)).contiguous();
}

// Returns what must outlive the launch.
inline at::Tensor set_tau(Params& p, double tau, const OptionalTensor& tau_tensor,
                          const at::Tensor& like, int64_t dim) {
  const bool is_double = like.scalar_type() == at::kDouble;
  if (const std::optional<double> number = known_tau(tau, tau_tensor)) {
    p.exponent_scale = clamped_factor(1.4426950408889634074 / *number, is_double);
    p.inverse_tau = clamped_factor(1.0 / *number, is_double);
    p.exponent_scale_float32 = static_cast<float>(p.exponent_scale);
    p.inverse_tau_float32 = static_cast<float>(p.inverse_tau);
    return at::Tensor();
  }
  const at::Tensor of_rows = row_temperatures(*tau_tensor, like, dim);
  p.tau = of_rows.const_data_ptr();
  return of_rows;
}

inline void check_classes(const char* op, int64_t classes) {
  TORCH_CHECK_VALUE(classes < std::numeric_limits<int32_t>::max() - 16, op,
                    ": logits may have at most 2^31 - 17 classes on CUDA, got ", classes);
}

// Whether dimensions [begin, end) are one dimension to walk through; its stride.
inline bool merges(const at::Tensor& t, int64_t begin, int64_t end, int64_t* stride) {
  int64_t expected = 0;
  *stride = 0;
  bool first = true;
  for (int64_t d = end - 1; d >= begin; --d) {
    if (t.size(d) == 1) continue;
    if (first) {
      *stride = t.stride(d);
      first = false;
    } else if (t.stride(d) != expected) {
      return false;
    }
    expected = t.stride(d) * t.size(d);
  }
  return true;
}

}  // namespace cuda
}  // namespace gumbel_ext
