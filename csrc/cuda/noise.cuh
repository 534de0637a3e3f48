// The noise of the contract (docs/noise.md), in registers.
#pragma once

#include "device_math.cuh"
#include "params.h"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

struct RandomState {
  std::uint64_t seed, offset;  // offset in blocks
};

GUMBEL_EXT_DEVICE inline RandomState read_state(const cuda::RandomSource& source) {
  RandomState state{source.seed, source.offset};
  if (source.in_memory) {
    state.seed = static_cast<std::uint64_t>(*source.seed_address);
    state.offset = static_cast<std::uint64_t>(*source.offset_address) + source.offset_more;
  }
  if (source.offset_in_words) state.offset /= 4;
  return state;
}

GUMBEL_EXT_DEVICE inline void record_state(const RandomState& state, std::int64_t* used_state) {
  if (used_state == nullptr || blockIdx.x != 0 || blockIdx.y != 0 || threadIdx.x != 0) return;
  used_state[0] = static_cast<std::int64_t>(state.seed);
  used_state[1] = static_cast<std::int64_t>(state.offset);
}

class NoiseSource {
 public:
  GUMBEL_EXT_DEVICE explicit NoiseSource(const RandomState& state)
      : state_(state),
        high_words_(philox_stream(state.seed, state.offset, 0)),
        low_words_(philox_stream(state.seed, state.offset + 1, 0)) {}

  // log E, the negative of the noise, of `count` consecutive positions from n on; a multiple of 4
  // of them. Where n is one too, no block is computed twice.
  template <class Scalar, int count>
  GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY void log_exponentials(std::uint64_t n,
                                                                 Scalar (&log_e)[count]) {
    static_assert(count % 4 == 0);
#pragma unroll
    for (int j = 0; j < count; j += 4) {
      four(n + static_cast<unsigned>(j), &log_e[j]);
    }
  }

  // Of one position.
  GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY void log_exponential(std::uint64_t n, float& log_e) {
    const std::uint32_t hi = philox_word(state_.seed, state_.offset, n);
    log_e = from_high_word(hi);
    if (in_tail(hi)) log_e = from_tail(hi, n);
  }
  GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY void log_exponential(std::uint64_t n, double& log_e) {
    log_e = from_both_words(philox_word(state_.seed, state_.offset, n),
                            philox_word(state_.seed, state_.offset + 1, n));
  }

 private:
  using Block = PhiloxBlock<std::uint32_t>;

  GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY void four(std::uint64_t n, float* log_e) {
    const Block hi = words(high_words_, n);
    log_e[0] = from_high_word(hi.c0);
    log_e[1] = from_high_word(hi.c1);
    log_e[2] = from_high_word(hi.c2);
    log_e[3] = from_high_word(hi.c3);
    // One element in 2^11 needs more than its first word. A loop, not four copies of the code; and
    // not a function, whose call would have to save registers.
    unsigned tails =
        in_tail(hi.c0) | in_tail(hi.c1) << 1 | in_tail(hi.c2) << 2 | in_tail(hi.c3) << 3;
#pragma unroll 1
    while (tails != 0) {
      const unsigned first = tails & (0u - tails);
      const unsigned j = first == 1 ? 0 : (first == 2 ? 1 : (first == 4 ? 2 : 3));
      const std::uint32_t word =
          first == 1 ? hi.c0 : (first == 2 ? hi.c1 : (first == 4 ? hi.c2 : hi.c3));
      const float resolved = from_tail(word, n + j);
      log_e[0] = first == 1 ? resolved : log_e[0];
      log_e[1] = first == 2 ? resolved : log_e[1];
      log_e[2] = first == 4 ? resolved : log_e[2];
      log_e[3] = first == 8 ? resolved : log_e[3];
      tails ^= first;
    }
  }
  GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY void four(std::uint64_t n, double* log_e) {
    const Block hi = words(high_words_, n), lo = words(low_words_, n);
    log_e[0] = from_both_words(hi.c0, lo.c0);
    log_e[1] = from_both_words(hi.c1, lo.c1);
    log_e[2] = from_both_words(hi.c2, lo.c2);
    log_e[3] = from_both_words(hi.c3, lo.c3);
  }

  // The words of positions n, ..., n + 3.
  GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY Block words(PhiloxStream<std::uint32_t>& stream,
                                                       std::uint64_t n) {
    const Block a = block(stream, n >> 2);
    const unsigned skip = static_cast<unsigned>(n & 3);
    if (skip == 0) return a;
    const Block b = block(stream, (n >> 2) + 1);
    if (skip == 1) return {a.c1, a.c2, a.c3, b.c0};
    if (skip == 2) return {a.c2, a.c3, b.c0, b.c1};
    return {a.c3, b.c0, b.c1, b.c2};
  }

  GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY Block block(PhiloxStream<std::uint32_t>& stream,
                                                       std::uint64_t k) {
    const std::uint32_t high = high_word(k);
    if (high != block_high_) {
      block_high_ = high;
      high_words_ = philox_stream(state_.seed, state_.offset, high);
      low_words_ = philox_stream(state_.seed, state_.offset + 1, high);
    }
    return stream.block(low_word(k));
  }

  GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY static bool in_tail(std::uint32_t hi) {
    return needs_low_word<DeviceF32>(DeviceU32{hi}).v;
  }
  GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY static float from_high_word(std::uint32_t hi) {
    return log_positive(exponential_from_high_word<DeviceF32>(DeviceU32{hi})).v;
  }
  GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY float from_tail(std::uint32_t hi,
                                                           std::uint64_t n) const {
    const std::uint32_t lo = philox_word(state_.seed, state_.offset + 1, n);
    return log_positive(exponential_from_tail_words<DeviceF32>(DeviceU32{hi}, DeviceU32{lo})).v;
  }
  GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY static double from_both_words(std::uint32_t hi,
                                                                         std::uint32_t lo) {
    return log_positive(exponential_from_real_words(DeviceF64{static_cast<double>(hi)},
                                                    DeviceF64{static_cast<double>(lo)}))
        .v;
  }

  RandomState state_;
  PhiloxStream<std::uint32_t> high_words_, low_words_;
  std::uint32_t block_high_ = 0;
};

// y[j] = noise of position j.
template <class T>
GUMBEL_EXT_KERNEL(256)
noise_kernel(const GUMBEL_EXT_CONSTANT cuda::RandomSource random, std::int64_t* used_state,
             std::int64_t count, T* y) {
  using Scalar = typename Element<T>::Scalar;
  const RandomState state = read_state(random);
  record_state(state, used_state);
  NoiseSource noise(state);
  const std::int64_t step = 4 * static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t n = 4 * (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x);
       n < count; n += step) {
    Scalar log_e[4];
    noise.log_exponentials(static_cast<std::uint64_t>(n), log_e);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (n + j < count) narrow(-log_e[j], &y[n + j]);
    }
  }
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
