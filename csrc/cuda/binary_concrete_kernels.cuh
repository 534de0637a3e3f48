// The binary concrete sample y = sigmoid((l + L) / tau), its gradient, and its noise alone.
#pragma once

#include "binary_concrete_params.h"
#include "noise.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

using cuda::BinaryOp;
using cuda::BinaryParams;
using cuda::BroadcastOperand;

// Neighbouring elements, in memory or out of it, of which some at the ends may not exist.
struct ElementGroup {
  std::int64_t first;  // negative in the first group if it begins inside a Philox block
  std::int64_t count;
  bool whole;

  GUMBEL_EXT_DEVICE bool holds(int j) const { return first + j >= 0 && first + j < count; }
};

GUMBEL_EXT_DEVICE bool on_16_bytes(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) % 16 == 0;
}

template <class T>
GUMBEL_EXT_DEVICE auto read_one(const BroadcastOperand& operand, std::int64_t n) {
  const T* data = static_cast<const T*>(operand.data);
  if (operand.period == 1) return widen(data[0]);
  if (operand.repeat != 1) n /= operand.repeat;
  return widen(data[n % operand.period]);
}

// A group of an operand of type T, zeros where it has no element.
template <class T, class Scalar, int kGroup>
GUMBEL_EXT_DEVICE void read_group(const BroadcastOperand& operand, const ElementGroup& group,
                                  Scalar (&out)[kGroup]) {
  constexpr int kVectors = kGroup * static_cast<int>(sizeof(T)) / 16;
  union {
    uint4 vector[kVectors];
    T element[kGroup];
  } raw;
  const T* data = static_cast<const T*>(operand.data);
  if (operand.period == 1) {
    const Scalar value = widen(data[0]);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) out[j] = value;
    return;
  }
  const bool direct = operand.period == group.count;
  if (direct && group.whole && on_16_bytes(data + group.first)) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      raw.vector[i] = load_vector(reinterpret_cast<const uint4*>(data + group.first) + i);
    }
#pragma unroll
    for (int j = 0; j < kGroup; ++j) out[j] = widen(raw.element[j]);
    return;
  }
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    out[j] = 0;
    if (!group.holds(j)) continue;
    const std::int64_t n = group.first + j;
    out[j] = direct ? widen(data[n]) : read_one<T>(operand, n);
  }
}

template <class T, class Scalar, int kGroup>
GUMBEL_EXT_DEVICE void write_group(void* base, const ElementGroup& group,
                                   const Scalar (&in)[kGroup]) {
  constexpr int kVectors = kGroup * static_cast<int>(sizeof(T)) / 16;
  union {
    uint4 vector[kVectors];
    T element[kGroup];
  } raw;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) narrow(in[j], &raw.element[j]);
  T* data = static_cast<T*>(base) + group.first;
  if (group.whole && on_16_bytes(data)) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      store_vector(reinterpret_cast<uint4*>(data) + i, raw.vector[i]);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    if (group.holds(j)) data[j] = raw.element[j];
  }
}

// With z = (l + L) / tau: e = exp(-|z|) and r = 1 / (1 + e), of which everything is made without
// cancelling, however close to 0 or 1 the sample lies.
template <class Scalar>
struct LogisticCurve {
  Scalar z, e, r;

  GUMBEL_EXT_DEVICE LogisticCurve(Scalar score, Scalar inverse_tau) {
    z = multiply(score, inverse_tau);
    e = power_of_two(multiply(z < 0 ? z : -z, static_cast<Scalar>(1.4426950408889634074)));
    const Scalar sum = add(Scalar(1), e);
    r = refined_reciprocal(sum);
  }
  GUMBEL_EXT_DEVICE Scalar sigmoid() const {
    if (z != z) return z;
    return z < 0 ? multiply(e, r) : r;
  }
  GUMBEL_EXT_DEVICE Scalar slope() const { return z != z ? z : multiply(multiply(e, r), r); }
};

template <class Scalar>
GUMBEL_EXT_DEVICE Scalar sample_of(BinaryOp op, Scalar score, Scalar inverse_tau) {
  if (op == BinaryOp::kNoise) return score;
  if (op == BinaryOp::kHard) return score != score ? score : static_cast<Scalar>(score > 0);
  return LogisticCurve<Scalar>(score, inverse_tau).sigmoid();
}

// The gradient of a logit; z of a slope that is 0 may be infinite.
template <class Scalar>
GUMBEL_EXT_DEVICE Scalar gradient_of(Scalar grad, Scalar score, Scalar inverse_tau, Scalar* term) {
  const LogisticCurve<Scalar> curve(score, inverse_tau);
  const Scalar gradient = multiply(multiply(grad, curve.slope()), inverse_tau);
  *term = curve.e == 0 ? Scalar(0) : -multiply(gradient, curve.z);
  return gradient;
}

GUMBEL_EXT_DEVICE float inverse_tau_of(const BinaryParams& p, float) {
  return p.inverse_tau_float32;
}
GUMBEL_EXT_DEVICE double inverse_tau_of(const BinaryParams& p, double) {
  return p.inverse_tau_value;
}

// Noise positions first, first + 1, ...: a thread takes the elements of whole Philox blocks.
template <class T, bool kBackward>
GUMBEL_EXT_KERNEL(256, sizeof(T) == 8 ? 512 : 768)
binary_kernel(const GUMBEL_EXT_CONSTANT BinaryParams p, BinaryOp op, std::uint64_t first) {
  using Scalar = typename Element<T>::Scalar;
  constexpr int kGroup = Element<T>::kGroup;
  const RandomState state = read_state(p.random);
  record_state(state, p.used_state);
  LogisticSource noise(state);
  const int lead = static_cast<int>(first % kGroup);
  const std::int64_t groups = (p.count + lead + kGroup - 1) / kGroup,
                     step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t g = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       g < groups; g += step) {
    const std::int64_t n = kGroup * g - lead;
    const ElementGroup group{n, p.count, n >= 0 && n <= p.count - kGroup};
    Scalar z[kGroup], inverse[kGroup], dy[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      z[j] = 0;
      inverse[j] = inverse_tau_of(p, Scalar());
    }
    if (p.logits.data != nullptr) read_group<T>(p.logits, group, z);
    if constexpr (kBackward) read_group<T>(p.grad, group, dy);
    if (p.inverse_tau.data != nullptr) read_group<Scalar>(p.inverse_tau, group, inverse);
    noise.add_blocks((first + static_cast<std::uint64_t>(n)) >> 2, z);
    if constexpr (kBackward) {
      Scalar terms[kGroup];
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        z[j] = gradient_of(dy[j], z[j], inverse[j], &terms[j]);
      }
      if (p.tau_terms != nullptr) write_group<Scalar>(p.tau_terms, group, terms);
    } else {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) z[j] = sample_of(op, z[j], inverse[j]);
    }
    write_group<T>(p.out, group, z);
  }
}

// Noise positions anywhere.
template <class T>
GUMBEL_EXT_KERNEL(256, sizeof(T) == 8 ? 512 : 768)
binary_positions_kernel(const GUMBEL_EXT_CONSTANT BinaryParams p, BinaryOp op,
                        const GUMBEL_EXT_CONSTANT cuda::PositionGrid positions) {
  using Scalar = typename Element<T>::Scalar;
  const RandomState state = read_state(p.random);
  record_state(state, p.used_state);
  LogisticSource noise(state);
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t n = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       n < p.count; n += step) {
    Scalar z = 0, inverse = inverse_tau_of(p, Scalar());
    if (p.logits.data != nullptr) z = read_one<T>(p.logits, n);
    if (p.inverse_tau.data != nullptr) inverse = read_one<Scalar>(p.inverse_tau, n);
    noise.add_one(position_of(positions, n), z);
    if (op == BinaryOp::kBackward) {
      Scalar term;
      z = gradient_of(static_cast<Scalar>(read_one<T>(p.grad, n)), z, inverse, &term);
      if (p.tau_terms != nullptr) static_cast<Scalar*>(p.tau_terms)[n] = term;
    } else {
      z = sample_of(op, z, inverse);
    }
    narrow(z, static_cast<T*>(p.out) + n);
  }
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
