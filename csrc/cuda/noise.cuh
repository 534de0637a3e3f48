// The noise of the contract (docs/noise.md), in registers.
#pragma once

#include "positions.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

struct RandomState {
  std::uint64_t seed, offset;  // offset in blocks
};

GUMBEL_EXT_DEVICE RandomState read_state(const cuda::RandomSource& source) {
  RandomState state{source.seed, source.offset};
  if (source.in_memory) {
    state.seed = static_cast<std::uint64_t>(*source.seed_address);
    state.offset = static_cast<std::uint64_t>(*source.offset_address) + source.offset_more;
  }
  if (source.offset_in_words) state.offset /= 4;
  return state;
}

GUMBEL_EXT_DEVICE void record_state(const RandomState& state, std::int64_t* used_state) {
  if (used_state == nullptr || blockIdx.x != 0 || blockIdx.y != 0 || threadIdx.x != 0) return;
  used_state[0] = static_cast<std::int64_t>(state.seed);
  used_state[1] = static_cast<std::int64_t>(state.offset);
}

// Laws make numbers of words: the logarithm that the noise is minus of, log2 in float32 and log in
// float64; or E itself. From min(v, 1 - v) in float32, in float64 from both words as real numbers.
struct ExponentialLaw {
  // For v < 1/2 the logarithm of 1 - v would lose the relative accuracy of E, which the largest
  // noise is made of: hence the series.
  GUMBEL_EXT_DEVICE static float of_tail(DeviceF32 tail, bool upper) {
    const DeviceF32 square = tail * tail;
    const DeviceF32 series = fma(square,
                                 polynomial(tail, square, Int<Numerics<float>::log1m_terms>(),
                                            [](int i) { return Numerics<float>::log1m(i); }),
                                 tail);
    return upper ? multiply(-Numerics<float>::ln2, log2_approximate(tail.v)) : series.v;
  }
  GUMBEL_EXT_DEVICE static double of_words(DeviceF64 hi, DeviceF64 lo) {
    return exponential_from_real_words(hi, lo).v;
  }
};
struct GumbelLaw {
  GUMBEL_EXT_DEVICE static float of_tail(DeviceF32 tail, bool upper) {
    return log2_approximate(ExponentialLaw::of_tail(tail, upper));
  }
  GUMBEL_EXT_DEVICE static double of_words(DeviceF64 hi, DeviceF64 lo) {
    return natural_log(ExponentialLaw::of_words(hi, lo));
  }
};
struct LogisticLaw {
  // v / (1 - v). What 1 - v loses of a small v is below the rounding of the other logarithm.
  GUMBEL_EXT_DEVICE static float of_tail(DeviceF32 tail, bool upper) {
    const float odds = add(log2_approximate(tail.v), -log2_approximate(add(1.0f, -tail.v)));
    return upper ? -odds : odds;
  }
  GUMBEL_EXT_DEVICE static double of_words(DeviceF64 hi, DeviceF64 lo) {
    return -logistic_from_real_words(hi, lo).v;
  }
};

// The words are those of every other device, to the bit. float64 noise is too; float32 noise takes
// its logarithms from the hardware where their error is below what adding it to a logit rounds off:
// from the series for small v as everywhere, else log2, accurate to 2^-22 of its value, or
// absolutely for values below 1.
template <class Law>
class NoiseOf {
 public:
  GUMBEL_EXT_DEVICE explicit NoiseOf(const RandomState& state)
      : state_(state),
        high_words_(stream_of(state.seed, state.offset, 0)),
        low_words_(stream_of(state.seed, state.offset + 1, 0)) {}

  // z[j] += noise of position 4 * k + j.
  template <class Scalar, int count>
  GUMBEL_EXT_DEVICE void add_blocks(std::uint64_t k, Scalar (&z)[count]) {
    static_assert(count % 4 == 0);
    follow(k);
#pragma unroll
    for (int j = 0; j < count; j += 4) {
      // A group of positions never crosses a multiple of 2^34, so the high word stays.
      Scalar log_e[4];
      logarithms(low_word(k) + static_cast<unsigned>(j / 4), 4 * k + static_cast<unsigned>(j),
                 log_e);
#pragma unroll
      for (int v = 0; v < 4; ++v) z[j + v] = with_noise(z[j + v], log_e[v]);
    }
  }

  // z[j] += noise of position n + j.
  template <class Scalar>
  GUMBEL_EXT_DEVICE void add_four(std::uint64_t n, Scalar (&z)[4]) {
    const std::uint64_t k = n >> 2;
    const unsigned skip = static_cast<unsigned>(n & 3);
    if (skip == 0) return add_blocks(k, z);
    Scalar a[4], b[4];
    follow(k);
    logarithms(low_word(k), 4 * k, a);
    follow(k + 1);
    logarithms(low_word(k + 1), 4 * (k + 1), b);
    z[0] = with_noise(z[0], skip == 1 ? a[1] : (skip == 2 ? a[2] : a[3]));
    z[1] = with_noise(z[1], skip == 1 ? a[2] : (skip == 2 ? a[3] : b[0]));
    z[2] = with_noise(z[2], skip == 1 ? a[3] : (skip == 2 ? b[0] : b[1]));
    z[3] = with_noise(z[3], skip == 1 ? b[0] : (skip == 2 ? b[1] : b[2]));
  }

  // out[j] = what the law makes of position n + j. Positions are `aligned` where every n is a
  // multiple of 4.
  template <class Scalar>
  GUMBEL_EXT_DEVICE void make_four(std::uint64_t n, bool aligned, Scalar (&out)[4]) {
    const std::uint64_t k = n >> 2;
    follow(k);
    Block hi = high_words_.block(low_word(k)), lo{};
    if constexpr (sizeof(Scalar) == 8) lo = low_words_.block(low_word(k));
    if (!aligned) {
      const unsigned skip = static_cast<unsigned>(n & 3);
      follow(k + 1);
      hi = shifted(hi, high_words_.block(low_word(k + 1)), skip);
      if constexpr (sizeof(Scalar) == 8) {
        lo = shifted(lo, low_words_.block(low_word(k + 1)), skip);
      }
    }
    of_words(hi, lo, n, out);
  }
  // out = what the law makes of position n.
  GUMBEL_EXT_DEVICE void make_one(std::uint64_t n, float& out) {
    follow(n >> 2);
    const unsigned place = static_cast<unsigned>(n & 3);
    const std::uint32_t hi = shifted(high_words_.block(low_word(n >> 2)), Block{}, place).c0;
    out = in_tail(hi) ? from_tail(hi, n) : from_high_word(hi);
  }
  GUMBEL_EXT_DEVICE void make_one(std::uint64_t n, double& out) {
    follow(n >> 2);
    const unsigned place = static_cast<unsigned>(n & 3);
    out = from_both_words(shifted(high_words_.block(low_word(n >> 2)), Block{}, place).c0,
                          shifted(low_words_.block(low_word(n >> 2)), Block{}, place).c0);
  }

  // z += noise of position n.
  GUMBEL_EXT_DEVICE void add_one(std::uint64_t n, float& z) {
    const std::uint32_t hi = philox_word(state_.seed, state_.offset, n);
    z = with_noise(z, in_tail(hi) ? from_tail(hi, n) : from_high_word(hi));
  }
  GUMBEL_EXT_DEVICE void add_one(std::uint64_t n, double& z) {
    z = with_noise(z, from_both_words(philox_word(state_.seed, state_.offset, n),
                                      philox_word(state_.seed, state_.offset + 1, n)));
  }

 private:
  using Block = PhiloxBlock<std::uint32_t>;
  static constexpr float kLn2 = Numerics<float>::ln2;

  // Round keys are a sum away from each other, so that the compiler would rather add them up again
  // for every block, fourteen instructions, than keep them.
  GUMBEL_EXT_DEVICE static PhiloxStream<std::uint32_t> stream_of(std::uint64_t seed,
                                                                 std::uint64_t draw,
                                                                 std::uint32_t block_high) {
    PhiloxStream<std::uint32_t> s = philox_stream(seed, draw, block_high);
#pragma unroll
    for (int i = 0; i < PhiloxStream<std::uint32_t>::kFullRounds; ++i) {
      keep_in_register(s.k0[i]);
      keep_in_register(s.k1[i]);
    }
    return s;
  }

  GUMBEL_EXT_DEVICE void follow(std::uint64_t k) {
    const std::uint32_t high = high_word(k);
    if (high != block_high_) {
      block_high_ = high;
      high_words_ = stream_of(state_.seed, state_.offset, high);
      low_words_ = stream_of(state_.seed, state_.offset + 1, high);
    }
  }

  // What the law makes of the positions of block k, the first of which is n.
  GUMBEL_EXT_DEVICE void logarithms(std::uint32_t k, std::uint64_t n, float (&log2_e)[4]) {
    of_words(high_words_.block(k), Block{}, n, log2_e);
  }
  GUMBEL_EXT_DEVICE void logarithms(std::uint32_t k, std::uint64_t n, double (&log_e)[4]) {
    of_words(high_words_.block(k), low_words_.block(k), n, log_e);
  }

  // What the law makes of the words of positions n to n + 3.
  GUMBEL_EXT_DEVICE void of_words(const Block& hi, const Block&, std::uint64_t n,
                                  float (&out)[4]) const {
    out[0] = from_high_word(hi.c0);
    out[1] = from_high_word(hi.c1);
    out[2] = from_high_word(hi.c2);
    out[3] = from_high_word(hi.c3);
    // One element in 2^11 needs more than its first word. A loop, not four copies of the code; and
    // not a function, whose call would have to save registers.
    if (in_tail(hi.c0) || in_tail(hi.c1) || in_tail(hi.c2) || in_tail(hi.c3)) {
#pragma unroll 1
      for (unsigned j = 0; j < 4; ++j) {
        const std::uint32_t word = j == 0 ? hi.c0 : (j == 1 ? hi.c1 : (j == 2 ? hi.c2 : hi.c3));
        if (!in_tail(word)) continue;
        const float resolved = from_tail(word, n + j);
        out[0] = j == 0 ? resolved : out[0];
        out[1] = j == 1 ? resolved : out[1];
        out[2] = j == 2 ? resolved : out[2];
        out[3] = j == 3 ? resolved : out[3];
      }
    }
  }
  GUMBEL_EXT_DEVICE void of_words(const Block& hi, const Block& lo, std::uint64_t,
                                  double (&out)[4]) const {
    out[0] = from_both_words(hi.c0, lo.c0);
    out[1] = from_both_words(hi.c1, lo.c1);
    out[2] = from_both_words(hi.c2, lo.c2);
    out[3] = from_both_words(hi.c3, lo.c3);
  }
  // The four words that begin `skip` into a.
  GUMBEL_EXT_DEVICE static Block shifted(const Block& a, const Block& b, unsigned skip) {
    const bool two = (skip & 2) != 0, one = (skip & 1) != 0;
    const std::uint32_t w0 = two ? a.c2 : a.c0, w1 = two ? a.c3 : a.c1, w2 = two ? b.c0 : a.c2,
                        w3 = two ? b.c1 : a.c3, w4 = two ? b.c2 : b.c0;
    return {one ? w1 : w0, one ? w2 : w1, one ? w3 : w2, one ? w4 : w3};
  }

  // The logit plus the noise; in float32 rounded once.
  GUMBEL_EXT_DEVICE static float with_noise(float logit, float log2_e) {
    return multiply_add(log2_e, -kLn2, logit);
  }
  GUMBEL_EXT_DEVICE static double with_noise(double logit, double log_e) {
    return add(logit, -log_e);
  }
  GUMBEL_EXT_DEVICE static bool in_tail(std::uint32_t hi) {
    // needs_low_word() as one comparison of what the float is made of anyway.
    return (hi ^ spread_top_bit(DeviceU32{hi}).v) < (1u << 20);
  }
  GUMBEL_EXT_DEVICE static bool is_upper(std::uint32_t hi) {
    return static_cast<std::int32_t>(hi) < 0;
  }
  GUMBEL_EXT_DEVICE static float from_high_word(std::uint32_t hi) {
    return Law::of_tail(tail_from_high_word<DeviceF32>(DeviceU32{hi}), is_upper(hi));
  }
  GUMBEL_EXT_DEVICE float from_tail(std::uint32_t hi, std::uint64_t n) const {
    const std::uint32_t lo = philox_word(state_.seed, state_.offset + 1, n);
    return Law::of_tail(tail_from_both_words<DeviceF32>(DeviceU32{hi}, DeviceU32{lo}),
                        is_upper(hi));
  }
  GUMBEL_EXT_DEVICE static double from_both_words(std::uint32_t hi, std::uint32_t lo) {
    return Law::of_words(DeviceF64{static_cast<double>(hi)}, DeviceF64{static_cast<double>(lo)});
  }

  RandomState state_;
  PhiloxStream<std::uint32_t> high_words_, low_words_;
  std::uint32_t block_high_ = 0;
};

using NoiseSource = NoiseOf<GumbelLaw>;
using LogisticSource = NoiseOf<LogisticLaw>;
using ExponentialSource = NoiseOf<ExponentialLaw>;

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
