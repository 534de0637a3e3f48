// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11), laid out for
// Gumbel noise.
//
// The noise contract (docs/noise.md): block(k) of element n is
//     Philox4x32-10(key = seed, counter = (offset + k : 64 bit, n / 4 : 64 bit)),
// which equals curand_init(seed, n / 4, 4 * (offset + k)) and at::Philox4_32(seed, n / 4, offset +
// k), bit for bit.
//
// Neighbouring elements share everything in the counter but its third word, so much of the first
// three rounds is the same numbers over and over. PhiloxStream does that part once.
//
// This header knows no tensors and no standard library, so that host and device, vector and scalar
// code share it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GUMBEL_EXT_INLINE __host__ __device__ __forceinline__
#define GUMBEL_EXT_UNROLL _Pragma("unroll")
#else
#define GUMBEL_EXT_INLINE inline __attribute__((always_inline))
#define GUMBEL_EXT_UNROLL _Pragma("GCC unroll 20")
#endif

// One copy of every inline function per instruction set: were the AVX-512 build of one to stand in
// for the baseline build of the same name, as the linker is free to choose, an older machine would
// meet an illegal instruction.
#if !defined(GUMBEL_EXT_ISA)
#define GUMBEL_EXT_ISA baseline
#endif

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

constexpr std::uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr std::uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr std::uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr std::uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// One 32-bit counter word, or a vector of them. A vector type may keep junk above the low 32 bits
// of wider lanes as long as wide_multiply ignores it; that is what makes the low half of a product
// free.
GUMBEL_EXT_INLINE std::uint64_t wide_multiply(std::uint32_t a, std::uint32_t multiplier) {
  return static_cast<std::uint64_t>(a) * multiplier;
}
GUMBEL_EXT_INLINE std::uint32_t high_word(std::uint64_t product) {
  return static_cast<std::uint32_t>(product >> 32);
}
GUMBEL_EXT_INLINE std::uint32_t low_word(std::uint64_t product) {
  return static_cast<std::uint32_t>(product);
}

template <class Word>
struct PhiloxBlock {
  Word c0, c1, c2, c3;
};

template <class Word, class Key>
GUMBEL_EXT_INLINE PhiloxBlock<Word> philox_round(const PhiloxBlock<Word>& c, Key k0, Key k1) {
  const auto p0 = wide_multiply(c.c0, kPhiloxMultiplier0);
  const auto p1 = wide_multiply(c.c2, kPhiloxMultiplier1);
  return {high_word(p1) ^ c.c1 ^ k0, low_word(p1), high_word(p0) ^ c.c3 ^ k1, low_word(p0)};
}

// The textbook form: any counter, any key. Tests compare it with published known answers.
GUMBEL_EXT_INLINE PhiloxBlock<std::uint32_t> philox4x32_10(PhiloxBlock<std::uint32_t> counter,
                                                           std::uint32_t k0, std::uint32_t k1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    counter = philox_round(counter, k0, k1);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return counter;
}

// All blocks (draw, block_high : block_low) of one key, with only block_low left open. Constant is
// std::uint32_t, or a vector that holds one such number in every lane.
template <class Constant>
struct PhiloxStream {
  static constexpr int kFullRounds = kPhiloxRounds - 3;
  // What the fixed counter words contribute to the first three rounds.
  Constant round1_c0, round2_c0, round2_c2, round3_c0, round3_k1;
  Constant k0[kFullRounds], k1[kFullRounds];

  template <class Word>
  GUMBEL_EXT_INLINE PhiloxBlock<Word> block(const Word& block_low) const {
    const auto p1 = wide_multiply(block_low, kPhiloxMultiplier1);
    const auto p0 = wide_multiply(high_word(p1) ^ round1_c0, kPhiloxMultiplier0);
    const Word c0 = low_word(p1) ^ round2_c0;
    const Word c2 = high_word(p0) ^ round2_c2;
    const auto q0 = wide_multiply(c0, kPhiloxMultiplier0);
    const auto q1 = wide_multiply(c2, kPhiloxMultiplier1);
    PhiloxBlock<Word> c{high_word(q1) ^ round3_c0, low_word(q1),
                        high_word(q0) ^ low_word(p0) ^ round3_k1, low_word(q0)};
    GUMBEL_EXT_UNROLL
    for (int i = 0; i < kFullRounds; ++i) {
      c = philox_round(c, k0[i], k1[i]);
    }
    return c;
  }
};

// draw = offset + k of the contract; block_high = the high 32 bits of n / 4.
GUMBEL_EXT_INLINE PhiloxStream<std::uint32_t> philox_stream(std::uint64_t seed, std::uint64_t draw,
                                                            std::uint32_t block_high) {
  std::uint32_t key0 = low_word(seed), key1 = high_word(seed);
  PhiloxStream<std::uint32_t> s;
  s.round1_c0 = high_word(draw) ^ key0;
  const std::uint64_t first_p0 = wide_multiply(low_word(draw), kPhiloxMultiplier0);
  const std::uint32_t first_c2 = high_word(first_p0) ^ block_high ^ key1;
  key0 += kPhiloxWeyl0;
  key1 += kPhiloxWeyl1;
  const std::uint64_t second_p1 = wide_multiply(first_c2, kPhiloxMultiplier1);
  s.round2_c0 = high_word(second_p1) ^ key0;
  s.round2_c2 = low_word(first_p0) ^ key1;
  key0 += kPhiloxWeyl0;
  key1 += kPhiloxWeyl1;
  s.round3_c0 = low_word(second_p1) ^ key0;
  s.round3_k1 = key1;
  for (int i = 0; i < PhiloxStream<std::uint32_t>::kFullRounds; ++i) {
    s.k0[i] = key0 += kPhiloxWeyl0;
    s.k1[i] = key1 += kPhiloxWeyl1;
  }
  return s;
}

// The word that element n of the contract reads from block(k), for the few places that want just
// one.
GUMBEL_EXT_INLINE std::uint32_t philox_word(std::uint64_t seed, std::uint64_t draw,
                                            std::uint64_t n) {
  const std::uint64_t index = n >> 2;
  const auto b = philox_stream(seed, draw, high_word(index)).block(low_word(index));
  switch (n & 3) {
    case 0:
      return b.c0;
    case 1:
      return b.c1;
    case 2:
      return b.c2;
    default:
      return b.c3;
  }
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
