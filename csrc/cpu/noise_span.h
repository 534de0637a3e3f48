// logits -> logits + Gumbel noise, over a run of consecutive noise positions.
#pragma once

#include <algorithm>

#include "simd.h"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

// Pointers into memory of which 16 elements can be read from p come as (p, end): vectors may run
// past the elements asked for, but never past end.
template <class F, class T>
GUMBEL_EXT_INLINE F load_run_as(const T* p, std::int64_t count, const T* end) {
  constexpr int lanes = RealTraits<F>::lanes;
  if (__builtin_expect(end - p >= lanes, 1)) return load_as<F>(p);
  T padded[lanes] = {};
  for (std::int64_t i = 0; i < std::min<std::int64_t>(count, lanes); ++i) padded[i] = p[i];
  return load_as<F>(padded);
}
template <class T>
GUMBEL_EXT_INLINE auto load_run(const T* p, std::int64_t count, const T* end) {
  return load_run_as<decltype(load(p))>(p, count, end);
}
// Likewise for stores: elements after the first `count` and before end may be overwritten.
template <class T, class F>
GUMBEL_EXT_INLINE void store_run(T* p, const F& v, std::int64_t count, const T* end) {
  constexpr int lanes = RealTraits<F>::lanes;
  if (__builtin_expect(end - p >= lanes, 1)) {
    store(p, v);
    return;
  }
  T padded[lanes];
  store(padded, v);
  for (std::int64_t i = 0; i < std::min<std::int64_t>(count, lanes); ++i) p[i] = padded[i];
}
template <class F>
inline typename RealTraits<F>::Mask allowed_run(const std::uint8_t* p, std::int64_t count,
                                                const std::uint8_t* end) {
  if (__builtin_expect(end - p >= kLanes, 1)) return allowed_lanes(p, F());
  std::uint8_t padded[kLanes] = {};
  for (std::int64_t i = 0; i < std::min<std::int64_t>(count, kLanes); ++i) padded[i] = p[i];
  return allowed_lanes(padded, F());
}

// The Philox words of one (seed, offset).
class NoiseSource {
 public:
  // A fill() writes whole registers of blocks, up to this many words more than asked for.
  static constexpr int kSlack = 4 * RegWord::lanes;

  NoiseSource(std::uint64_t seed, std::uint64_t offset, bool silent = false)
      : silent_(silent), seed_(seed), offset_(offset) {
    set_block_high(0);
  }

  // Whether its noise is left out.
  bool silent() const { return silent_; }

  // The words of blocks first, first + 1, ... of block(k) of the noise contract, four each.
  void fill(int k, std::uint64_t first, std::int64_t blocks, std::uint32_t* out) {
    while (blocks > 0) {
      if (static_cast<std::uint32_t>(first >> 32) != block_high_) {
        set_block_high(static_cast<std::uint32_t>(first >> 32));
      }
      const std::int64_t until_carry =
          static_cast<std::int64_t>((std::uint64_t{1} << 32) - (first & 0xFFFFFFFFu));
      const std::int64_t here = std::min(blocks, until_carry);
      fill_same_high(streams_[k], static_cast<std::uint32_t>(first), here, out);
      first += static_cast<std::uint64_t>(here);
      blocks -= here;
      out += 4 * here;
    }
  }

 private:
  void set_block_high(std::uint32_t high) {
    block_high_ = high;
    for (int k = 0; k < 2; ++k) {
      const PhiloxStream<std::uint32_t> s =
          philox_stream(seed_, offset_ + static_cast<std::uint64_t>(k), high);
      PhiloxStream<RegWord>& v = streams_[k];
      v.round1_c0 = RegWord::splat(s.round1_c0);
      v.round2_c0 = RegWord::splat(s.round2_c0);
      v.round2_c2 = RegWord::splat(s.round2_c2);
      v.round3_c0 = RegWord::splat(s.round3_c0);
      v.round3_k1 = RegWord::splat(s.round3_k1);
      for (int i = 0; i < PhiloxStream<std::uint32_t>::kFullRounds; ++i) {
        v.k0[i] = RegWord::splat(s.k0[i]);
        v.k1[i] = RegWord::splat(s.k1[i]);
      }
    }
  }

  static void fill_same_high(const PhiloxStream<RegWord>& stream, std::uint32_t first,
                             std::int64_t blocks, std::uint32_t* out) {
    constexpr std::int64_t kFew = RegWord::lanes, kMany = sizeof(Words::r) / sizeof(RegWord) * kFew;
    const std::int64_t rest = blocks % kMany, main = blocks - rest;
    fill_packs<Words>(stream, first, main, out);
    fill_packs<FewWords>(stream, first + static_cast<std::uint32_t>(main),
                         (rest + kFew - 1) / kFew * kFew, out + 4 * main);
  }

  template <class W>
  static GUMBEL_EXT_INLINE void fill_packs(const PhiloxStream<RegWord>& stream, std::uint32_t first,
                                           std::int64_t blocks, std::uint32_t* out) {
    constexpr int kRegs = sizeof(W::r) / sizeof(RegWord);
    W block;
    for (int i = 0; i < kRegs; ++i) {
      block.r[i] = RegWord::splat(first + static_cast<std::uint32_t>(i * RegWord::lanes)) +
                   RegWord::lane_blocks();
    }
    const RegWord step = RegWord::splat(kRegs * RegWord::lanes);
    for (std::int64_t b = 0; b < blocks; b += kRegs * RegWord::lanes) {
      const PhiloxBlock<W> w = stream.block(block);
      for (int i = 0; i < kRegs; ++i) {
        interleave_words(out + 4 * b + 4 * i * RegWord::lanes, w.c0.r[i], w.c1.r[i], w.c2.r[i],
                         w.c3.r[i]);
        block.r[i] = block.r[i] + step;
      }
    }
  }

  bool silent_;
  std::uint64_t seed_, offset_;
  std::uint32_t block_high_ = 0;
  PhiloxStream<RegWord> streams_[2];
};

// What a span makes of words: a variate in float32 from the first word or from both, in float64
// from both as real numbers.
struct Exponential {
  static GUMBEL_EXT_INLINE F32 of_high_word(U32 hi) { return exponential_from_high_word<F32>(hi); }
  static GUMBEL_EXT_INLINE F32 of_words(U32 hi, U32 lo) {
    return exponential_from_tail_words<F32>(hi, lo);
  }
  static GUMBEL_EXT_INLINE F64 of_words(F64 hi, F64 lo) {
    return exponential_from_real_words(hi, lo);
  }
};
struct Logistic {
  static GUMBEL_EXT_INLINE F32 of_high_word(U32 hi) { return logistic_from_high_word<F32>(hi); }
  static GUMBEL_EXT_INLINE F32 of_words(U32 hi, U32 lo) {
    return logistic_from_tail_words<F32>(hi, lo);
  }
  static GUMBEL_EXT_INLINE F64 of_words(F64 hi, F64 lo) { return logistic_from_real_words(hi, lo); }
};

// Replaces those of 16 variates, of positions n, n + 1, ... with the given first words, that need
// their second word.
template <class Law = Exponential>
__attribute__((noinline, cold)) inline void resolve_tails(NoiseSource& source, std::uint64_t n,
                                                          const std::uint32_t* high,
                                                          float* variate) {
  std::uint32_t low[2 * kLanes + NoiseSource::kSlack];
  source.fill(1, n >> 2, kLanes / 4 + 1, low);
  const U32 hi = load_words(high);
  const F32 resolved = Law::of_words(hi, load_words(low + (n & 3)));
  store(variate, select(needs_low_word<F32>(hi), resolved, load(variate)));
}

// Standard variates for runs of positions, in the precision of Scalar: logistic noise, or
// exponentials, -log of which is the Gumbel noise. Words, exponentials and logarithms are made in a
// loop each. One loop over all three would need more registers than there are, and so long a chain
// of operations in one iteration leaves a processor too few iterations to work on at once.
template <class Scalar, class Law>
class VariateSpan;

template <class Law>
class VariateSpan<float, Law> {
 public:
  static constexpr std::int64_t kCapacity = 512;

  // Makes at most kCapacity - 3 positions, from n on, ready.
  void prepare(NoiseSource& source, std::uint64_t n, std::int64_t count) {
    skip_ = static_cast<int>(n & 3);
    const std::int64_t words = skip_ + count;
    source.fill(0, n >> 2, (words + 3) / 4, high_);
    for (std::int64_t i = 0; i < words; i += kLanes) {
      const U32 hi = load_words(high_ + i);
      store(variate_ + i, Law::of_high_word(hi));
      if (__builtin_expect(any(needs_low_word<F32>(hi)), 0)) {
        resolve_tails<Law>(source, (n & ~std::uint64_t{3}) + static_cast<std::uint64_t>(i),
                           high_ + i, variate_ + i);
      }
    }
  }

  // Those of 16 positions from n + at on, or of fewer, and that of the first alone.
  GUMBEL_EXT_INLINE F32 at(std::int64_t at) const { return load(variate_ + skip_ + at); }
  template <class F>
  GUMBEL_EXT_INLINE F at_as(std::int64_t at) const {
    return load_as<F>(variate_ + skip_ + at);
  }
  float one_at(std::int64_t at) const { return variate_[skip_ + at]; }

 private:
  int skip_ = 0;
  alignas(64) std::uint32_t high_[kCapacity + NoiseSource::kSlack + kLanes];
  alignas(64) float variate_[kCapacity + NoiseSource::kSlack + kLanes];
};

template <class Law>
class VariateSpan<double, Law> {
 public:
  static constexpr std::int64_t kCapacity = 512;

  void prepare(NoiseSource& source, std::uint64_t n, std::int64_t count) {
    skip_ = static_cast<int>(n & 3);
    source.fill(0, n >> 2, (skip_ + count + 3) / 4, high_);
    source.fill(1, n >> 2, (skip_ + count + 3) / 4, low_);
  }

  GUMBEL_EXT_INLINE F64 at(std::int64_t at) const {
    return Law::of_words(load_real_words(high_ + skip_ + at), load_real_words(low_ + skip_ + at));
  }
  template <class F>
  GUMBEL_EXT_INLINE F at_as(std::int64_t position) const {
    return first_registers<F>(at(position));
  }
  double one_at(std::int64_t position) const {
    double variates[kLanes];
    store(variates, at(position));
    return variates[0];
  }

 private:
  int skip_ = 0;
  alignas(64) std::uint32_t high_[kCapacity + NoiseSource::kSlack + kLanes];
  alignas(64) std::uint32_t low_[kCapacity + NoiseSource::kSlack + kLanes];
};

template <class Scalar>
using ExponentialSpan = VariateSpan<Scalar, Exponential>;
template <class Scalar>
using LogisticSpan = VariateSpan<Scalar, Logistic>;

template <class A>
GUMBEL_EXT_INLINE Vector<A> forbid(const std::uint8_t* allowed, std::int64_t count,
                                   const std::uint8_t* end, const Vector<A>& z) {
  return select(allowed_run<Vector<A>>(allowed, count, end), z,
                RealTraits<Vector<A>>::splat(-std::numeric_limits<A>::infinity()));
}

// z[j] = x[j], or -inf where allowed[j] == 0, for 0 <= j < count.
template <class T, class A>
void copy_logits(std::int64_t count, const T* x, const T* x_end, const std::uint8_t* allowed,
                 const std::uint8_t* allowed_end, A* z, const A* z_end) {
  for (std::int64_t j = 0; j < count; j += kLanes) {
    Vector<A> v = load_run(x + j, count - j, x_end);
    if (allowed) v = forbid<A>(allowed + j, count - j, allowed_end, v);
    store_run(z + j, v, count - j, count - j >= kLanes ? z + j + kLanes : z_end);
  }
}

// z[j] = x[j] + noise of position n + j, or -inf where allowed[j] == 0, for 0 <= j < count.
template <class T, class A>
void add_gumbel_noise(NoiseSource& source, std::uint64_t n, std::int64_t count, const T* x,
                      const T* x_end, const std::uint8_t* allowed, const std::uint8_t* allowed_end,
                      A* z, const A* z_end) {
  using F = Vector<A>;
  if (source.silent()) return copy_logits(count, x, x_end, allowed, allowed_end, z, z_end);
  ExponentialSpan<A> span;
  while (count > 0) {
    // Spans end on a multiple of four positions, so that only the first one is unaligned.
    const std::int64_t take =
        std::min<std::int64_t>(count, ExponentialSpan<A>::kCapacity - static_cast<int>(n & 3));
    span.prepare(source, n, take);
    std::int64_t j = 0;
    for (; j + kLanes <= take && x_end - (x + j) >= kLanes; j += kLanes) {
      F sum = load(x + j) - log_positive(span.at(j));
      if (allowed) sum = forbid<A>(allowed + j, kLanes, allowed_end, sum);
      store(z + j, sum);
    }
    for (; j < take; j += kLanes) {
      F sum = load_run(x + j, take - j, x_end) - log_positive(span.at(j));
      if (allowed) sum = forbid<A>(allowed + j, take - j, allowed_end, sum);
      store_run(z + j, sum, take - j, take - j >= kLanes ? z + j + kLanes : z_end);
    }
    n += static_cast<std::uint64_t>(take);
    count -= take;
    x += take;
    z += take;
    if (allowed) allowed += take;
  }
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
