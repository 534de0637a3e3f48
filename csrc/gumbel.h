// Random words -> Gumbel(0, 1) and logistic noise, and the few functions that a softmax over it
// needs.
//
// Everything numerical about the noise lives here and nowhere else. The functions are templates
// over a real type F, a vector of floats or doubles (or, in a CUDA kernel, one of them). They are
// straight-line code of +, -, *, explicit fma and integer arithmetic on the bits, so that every
// instruction set that has fma computes the same bits; translation units must be compiled with
// -ffp-contract=off. What F has to offer is listed at RealTraits.
//
// Why not libm's log. E = -log1p(-v) must keep its *relative* accuracy as v -> 0, because -log E
// turns it into the absolute accuracy of the largest noise, the noise that wins; and 1 - v must
// keep its own as v -> 1. With q, the smaller of v and 1 - v, both ends fall out of one polynomial
// on [0, 1/2]:
//
//     v <  1/2:  E = -log1p(-t)               t = q
//     v >= 1/2:  E = -e ln 2 - log1p(-t)      q = 2^e (1 - t),  1/2 <= 1 - t < 1
//
// and as both terms are >= 0 nothing cancels: E is good to about 2 ulp all the way from 2^-65
// to 45.
#pragma once

#include "philox.h"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

// ---- constants by precision ---------------------------------------------------------------------

template <class Scalar>
struct Numerics;

// The polynomials, lowest power first, are minimax fits (Remez exchange in 60-digit arithmetic):
//   log1m  A(t):  -log1p(-t) = t + t^2 A(t)     0 <= t <= 1/2
//   log1p  B(f):   log1p(f)  = f + f^2 B(f)     |f| <= 1/3
//   exp2   C(r):   2^r       = 1 + r C(r)       |r| <= 1/2
// with a relative error of the whole expression of 2^-25.3, 2^-25.2, 2^-28.9 in float and 2^-57.0,
// 2^-56.8, 2^-58.0 in double.
template <>
struct Numerics<float> {
  using Bits = std::uint32_t;
  static constexpr int mantissa_bits = 23;
  static constexpr Bits mantissa_mask = 0x007FFFFFu;
  static constexpr Bits half_bits = 0x3F000000u;
  static constexpr Bits two_thirds_bits = 0x3F2AAAABu;
  static constexpr Bits two_thirds_to_one_bits = 0x3F800000u - two_thirds_bits;
  // An integer i < 2^23, or'ed into the bits of the real number 2^23, makes the real number 2^23 +
  // i.
  static constexpr Bits integer_bits = 0x4B000000u;
  static constexpr float integer_real = 0x1p23f;
  static constexpr float bias_of_one = 127.0f;
  static constexpr float bias_of_half = 126.0f;
  // Adding 1.5 * 2^23 leaves x, rounded to an integer, in the low bits.
  static constexpr float round_shift = 0x1.8p23f;
  static constexpr float smallest_exponent = -126.0f;
  static constexpr float ln2 = 0x1.62e430p-1f;

  static constexpr int log1m_terms = 8, log1p_terms = 8, exp2_terms = 6;
  GUMBEL_EXT_INLINE static constexpr float log1m(int i) {
    constexpr float c[log1m_terms] = {0x1.fffec0p-2f,  0x1.55a3aap-2f,  0x1.f30fc4p-3f,
                                      0x1.0e0576p-2f,  -0x1.729b20p-3f, 0x1.356f6ep+0f,
                                      -0x1.a3bd7ep+0f, 0x1.6a2070p+0f};
    return c[i];
  }
  GUMBEL_EXT_INLINE static constexpr float log1p(int i) {
    constexpr float c[log1p_terms] = {-0x1.ffffd6p-2f, 0x1.5554fap-2f,  -0x1.001482p-2f,
                                      0x1.99d430p-3f,  -0x1.503258p-3f, 0x1.1ea21ap-3f,
                                      -0x1.3b2bccp-3f, 0x1.1f430cp-3f};
    return c[i];
  }
  GUMBEL_EXT_INLINE static constexpr float exp2(int i) {
    constexpr float c[exp2_terms] = {0x1.62e430p-1f, 0x1.ebfbdcp-3f,  0x1.c6aee8p-5f,
                                     0x1.3b2d4ep-7f, 0x1.5f3e52p-10f, 0x1.41fbb2p-13f};
    return c[i];
  }
};

template <>
struct Numerics<double> {
  using Bits = std::uint64_t;
  static constexpr int mantissa_bits = 52;
  static constexpr Bits mantissa_mask = 0x000FFFFFFFFFFFFFull;
  static constexpr Bits half_bits = 0x3FE0000000000000ull;
  static constexpr Bits two_thirds_bits = 0x3FE5555555555555ull;
  static constexpr Bits two_thirds_to_one_bits = 0x3FF0000000000000ull - two_thirds_bits;
  static constexpr Bits integer_bits = 0x4330000000000000ull;
  static constexpr double integer_real = 0x1p52;
  static constexpr double bias_of_one = 1023.0;
  static constexpr double bias_of_half = 1022.0;
  static constexpr double round_shift = 0x1.8p52;
  static constexpr double smallest_exponent = -1022.0;
  static constexpr double ln2 = 0x1.62e42fefa39efp-1;

  static constexpr int log1m_terms = 20, log1p_terms = 20, exp2_terms = 11;
  GUMBEL_EXT_INLINE static constexpr double log1m(int i) {
    constexpr double c[log1m_terms] = {
        0x1.fffffffffff85p-2, 0x1.55555555603f9p-2, 0x1.fffffff542ebep-3, 0x1.99999c46fdb43p-3,
        0x1.5554eedeab27ep-3, 0x1.249c62958d021p-3, 0x1.fe9b277bf23ebp-4, 0x1.d9107f3c07cc9p-4,
        0x1.d87d167b76332p-5, 0x1.9cec56b8b069ep-2, -0x1.b360efdcef151p0, 0x1.00a4c283bdbffp3,
        -0x1.b8ca3c50584d4p4, 0x1.2b45c46b98f8dp6,  -0x1.37af21a6f7f71p7, 0x1.ec19839dfecf0p7,
        -0x1.1c632bf57f3e7p8, 0x1.c81dd74341211p7,  -0x1.c6c35d84139f1p6, 0x1.ae87652e62da1p4};
    return c[i];
  }
  GUMBEL_EXT_INLINE static constexpr double log1p(int i) {
    constexpr double c[log1p_terms] = {
        -0x1.ffffffffffff8p-2, 0x1.5555555555532p-2, -0x1.00000000014ccp-2, 0x1.99999999a0cbdp-3,
        -0x1.5555555357df6p-3, 0x1.2492492070c55p-3, -0x1.000000b13f699p-3, 0x1.c71c742563c4ap-4,
        -0x1.9999562e7c6dap-4, 0x1.745cb32b3fe8dp-4, -0x1.555d0022bdc24p-4, 0x1.3b1de74ef84b0p-4,
        -0x1.24074da870598p-4, 0x1.106760654123dp-4, -0x1.062616a51962dp-4, 0x1.efdc0045221b0p-5,
        -0x1.736efcad2b6aap-5, 0x1.55a93795f8f3ep-5, -0x1.64342c63229acp-4, 0x1.5c7a28c288931p-4};
    return c[i];
  }
  GUMBEL_EXT_INLINE static constexpr double exp2(int i) {
    constexpr double c[exp2_terms] = {
        0x1.62e42fefa39efp-1,  0x1.ebfbdff82c5a4p-3,  0x1.c6b08d7049fe8p-5,  0x1.3b2ab6fba0116p-7,
        0x1.5d87fe78cd662p-10, 0x1.4309130ed97adp-13, 0x1.ffcbfba99c14cp-17, 0x1.62bfc79bcde3fp-20,
        0x1.b5267cae9144cp-24, 0x1.e61b51e663cacp-28, 0x1.e79bfa0581a2cp-32};
    return c[i];
  }
};

// ---- what a real type F must offer --------------------------------------------------------------

// Specialised beside each F:
//
//   Scalar                                   float or double
//   Bits                                     the integer type, or vector, of the same width
//   F splat(Scalar)
//   Bits splat_bits(Numerics<Scalar>::Bits)
//
// Found by argument-dependent lookup, for F:
//
//   + - *
//   fma(a, b, c)                             a * b + c rounded once
//   less(a, b) -> mask
//   select(mask, a, b), zero_unless(mask, a)
//   bits(F) -> Bits
//
// For Bits:
//
//   + - & | ^
//   shift_left(b, Int<n>)
//   shift_right(b, Int<n>)                   logical
//   real(Bits) -> F
//
// For Bits of 32 bits also:
//
//   spread_top_bit(b)                        arithmetic shift by 31
//   as_mask(b)                               of that
//   top_bit(b) -> mask                       good for any() and select() only
//   to_real(b)                               for 0 <= b < 2^31
template <class F>
struct RealTraits;

template <int n>
struct Int {};

// ---- functions ----------------------------------------------------------------------------------

// Eight terms as even and odd powers: half the latency of Horner's scheme, x^2 being at hand
// anyway, and hardly more instructions. (Estrin's would save a little more latency, but each of its
// pairs needs a constant in a register.)
template <class F, class Table>
GUMBEL_EXT_INLINE F polynomial(F x, F x2, Int<8>, Table coefficient) {
  using T = RealTraits<F>;
  F even = T::splat(coefficient(6)), odd = T::splat(coefficient(7));
  GUMBEL_EXT_UNROLL
  for (int i = 4; i >= 0; i -= 2) {
    even = fma(even, x2, T::splat(coefficient(i)));
    odd = fma(odd, x2, T::splat(coefficient(i + 1)));
  }
  return fma(odd, x, even);
}

template <class F, class Table, int terms>
GUMBEL_EXT_INLINE F polynomial(F x, F, Int<terms>, Table coefficient) {
  using T = RealTraits<F>;
  F p = T::splat(coefficient(terms - 1));
  GUMBEL_EXT_UNROLL
  for (int i = terms - 2; i >= 0; --i) {
    p = fma(p, x, T::splat(coefficient(i)));
  }
  return p;
}

// E = -log1p(-v), given q = min(v, 1 - v) and upper = (v >= 1/2).
template <class F, class Mask>
GUMBEL_EXT_INLINE F exponential_from_tail(F q, Mask upper) {
  using T = RealTraits<F>;
  using N = Numerics<typename T::Scalar>;
  const auto q_bits = bits(q);
  // q = 2^e m with m in [1/2, 1); the biased exponent becomes a real number by the trick at
  // integer_bits.
  const F m = real((q_bits & T::splat_bits(N::mantissa_mask)) | T::splat_bits(N::half_bits));
  const F minus_e =
      T::splat(N::integer_real + N::bias_of_half) -
      real(shift_right(q_bits, Int<N::mantissa_bits>()) | T::splat_bits(N::integer_bits));
  const F t = select(upper, T::splat(1) - m, q);
  const F k = zero_unless(upper, minus_e);
  const F t2 = t * t;
  const F a = polynomial(t, t2, Int<N::log1m_terms>(), [](int i) { return N::log1m(i); });
  return fma(k, T::splat(N::ln2), fma(t2, a, t));
}

// log x for normal x > 0.
template <class F>
GUMBEL_EXT_INLINE F log_positive(F x) {
  using T = RealTraits<F>;
  using N = Numerics<typename T::Scalar>;
  // x = 2^e m with m in [2/3, 4/3), so that x near 1 has e = 0 and the result keeps its relative
  // accuracy there.
  const auto shifted = bits(x) + T::splat_bits(N::two_thirds_to_one_bits);
  const F e = real(shift_right(shifted, Int<N::mantissa_bits>()) | T::splat_bits(N::integer_bits)) -
              T::splat(N::integer_real + N::bias_of_one);
  const F m = real((shifted & T::splat_bits(N::mantissa_mask)) + T::splat_bits(N::two_thirds_bits));
  const F f = m - T::splat(1);
  const F f2 = f * f;
  const F b = polynomial(f, f2, Int<N::log1p_terms>(), [](int i) { return N::log1p(i); });
  return fma(e, T::splat(N::ln2), fma(f2, b, f));
}

// min(v, 1 - v) in float32, from the first word alone: v = (hi + 1/2) 2^-32. Good to 2^-21 unless
// needs_low_word().
template <class F, class Words>
GUMBEL_EXT_INLINE F tail_from_high_word(Words hi) {
  using T = RealTraits<F>;
  const F nearest = to_real(hi ^ spread_top_bit(hi));
  return fma(nearest, T::splat(0x1p-32f), T::splat(0x1p-33f));
}
template <class F, class Words>
GUMBEL_EXT_INLINE F exponential_from_high_word(Words hi) {
  return exponential_from_tail(tail_from_high_word<F>(hi), as_mask(spread_top_bit(hi)));
}

// Lanes whose hi lies within 2^20 of either end of its range, where 32 bits no longer resolve E:
// probability 2^-11.
template <class F, class Words>
GUMBEL_EXT_INLINE auto needs_low_word(Words hi) {
  return top_bit((hi ^ spread_top_bit(hi)) - RealTraits<F>::splat_bits(1u << 20));
}

// min(v, 1 - v) in float32, from both words: v = (hi 2^32 + lo + 1/2) 2^-64. Where
// needs_low_word(): every part of the sum is exact there.
template <class F, class Words>
GUMBEL_EXT_INLINE F tail_from_both_words(Words hi, Words lo) {
  using T = RealTraits<F>;
  const Words flip = spread_top_bit(hi);
  const Words near_lo = lo ^ flip;
  const F lo_high = to_real(shift_right(near_lo, Int<16>()));
  const F lo_low = to_real(near_lo & T::splat_bits(0xFFFFu));
  const F below =
      fma(lo_high, T::splat(0x1p-48f), fma(lo_low, T::splat(0x1p-64f), T::splat(0x1p-65f)));
  return fma(to_real(hi ^ flip), T::splat(0x1p-32f), below);
}
template <class F, class Words>
GUMBEL_EXT_INLINE F exponential_from_tail_words(Words hi, Words lo) {
  return exponential_from_tail(tail_from_both_words<F>(hi, lo), as_mask(spread_top_bit(hi)));
}

// An upper bound of the float32 noise, from the first word alone and without a logarithm. With
// w = floor(hi / 2^20), v >= w 2^-12, and E >= v, so
//     g = -log E <= 12 ln 2 - ln 2 log2(w),      log2(2^e (1 + m)) >= e + m = bits(w) / 2^23 - 127
// where the bits of 0 make the bound 96: above all noise, so that needs_low_word() is implied.
// bits(w) ends in zeros and is exact as a float; the slack covers the rounding of the noise.
template <class F, class Words>
GUMBEL_EXT_INLINE F gumbel_upper_bound(Words hi) {
  using T = RealTraits<F>;
  using N = Numerics<typename T::Scalar>;
  constexpr float slack = 0x1p-14f;
  const F w_bits = to_real(bits(to_real(shift_right(hi, Int<20>()))));
  return fma(w_bits, T::splat(-0x1p-23f * N::ln2), T::splat((127 + 12) * N::ln2 + slack));
}

// min(v, 1 - v) in float64, from both words given as real numbers. Complements are exact; v is
// rounded once.
template <class F>
GUMBEL_EXT_INLINE F tail_from_real_words(F hi, F lo) {
  using T = RealTraits<F>;
  const F largest = T::splat(0x1p32 - 1);
  const auto lower = less(hi, T::splat(0x1p31));
  const F near_hi = select(lower, hi, largest - hi);
  const F near_lo = select(lower, lo, largest - lo);
  const F below = fma(near_lo, T::splat(0x1p-64), T::splat(0x1p-65));
  return fma(near_hi, T::splat(0x1p-32), below);
}
template <class F>
GUMBEL_EXT_INLINE auto is_upper_half(F hi) {
  return less(RealTraits<F>::splat(0x1p31 - 1), hi);
}
template <class F>
GUMBEL_EXT_INLINE F exponential_from_real_words(F hi, F lo) {
  return exponential_from_tail(tail_from_real_words(hi, lo), is_upper_half(hi));
}

// L = log(1 - v) - log(v), Logistic(0, 1), given q = min(v, 1 - v) and upper = (v >= 1/2): large
// for small v, as the Gumbel noise is, and odd about v = 1/2 to the bit. Both ends are tails here,
// and at both log(q) keeps its relative accuracy.
template <class F, class Mask>
GUMBEL_EXT_INLINE F logistic_from_tail(F q, Mask upper) {
  using T = RealTraits<F>;
  using N = Numerics<typename T::Scalar>;
  const F q2 = q * q;
  const F a = polynomial(q, q2, Int<N::log1m_terms>(), [](int i) { return N::log1m(i); });
  const F negative = log_positive(q) + fma(q2, a, q);
  return select(upper, negative, T::splat(0) - negative);
}
template <class F, class Words>
GUMBEL_EXT_INLINE F logistic_from_high_word(Words hi) {
  return logistic_from_tail(tail_from_high_word<F>(hi), as_mask(spread_top_bit(hi)));
}
template <class F, class Words>
GUMBEL_EXT_INLINE F logistic_from_tail_words(Words hi, Words lo) {
  return logistic_from_tail(tail_from_both_words<F>(hi, lo), as_mask(spread_top_bit(hi)));
}
template <class F>
GUMBEL_EXT_INLINE F logistic_from_real_words(F hi, F lo) {
  return logistic_from_tail(tail_from_real_words(hi, lo), is_upper_half(hi));
}

// 2^x for x <= 0 (or NaN). Exactly 0 below the smallest normal number and for -inf.
template <class F>
GUMBEL_EXT_INLINE F exp2_nonpositive(F x) {
  using T = RealTraits<F>;
  using N = Numerics<typename T::Scalar>;
  const F shifted = x + T::splat(N::round_shift);
  const F r = x - (shifted - T::splat(N::round_shift));
  const F c = polynomial(r, r * r, Int<N::exp2_terms>(), [](int i) { return N::exp2(i); });
  const F power = fma(r, c, T::splat(1));
  const F scaled = real(bits(power) + shift_left(bits(shifted), Int<N::mantissa_bits>()));
  return select(less(x, T::splat(N::smallest_exponent)), T::splat(0), scaled);
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
