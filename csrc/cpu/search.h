// The best classes of a row: the largest of its noisy logits, and where.
#pragma once

#include <vector>

#include "noise_span.h"
#include "problem.h"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

// The largest of the noisy logits seen so far, and where. A NaN ends the search: its row is NaN and
// its index is the first.
template <class A>
struct Best {
  A value = -std::numeric_limits<A>::infinity();
  std::int64_t index = 0;
  bool nan = false;
};

template <class A>
inline std::int64_t first_nan(const A* z, std::int64_t count) {
  for (std::int64_t j = 0; j < count; ++j) {
    if (z[j] != z[j]) return j;
  }
  return count;
}

template <class A>
inline std::int64_t first_equal(const A* z, std::int64_t count, const A* z_end, A value) {
  using F = Vector<A>;
  const F wanted = RealTraits<F>::splat(value);
  for (std::int64_t j = 0; j < count; j += kLanes) {
    const unsigned found = lane_bits(equal(load_run(z + j, count - j, z_end), wanted));
    if (found) return j + __builtin_ctz(found);
  }
  return 0;
}

// Continues the search over z[0..count), classes base, base + 1, ...
template <class A>
inline void update_best(Best<A>& best, const A* z, std::int64_t count, const A* z_end,
                        std::int64_t base) {
  using F = Vector<A>;
  if (best.nan) return;
  const F lowest = RealTraits<F>::splat(-std::numeric_limits<A>::infinity());
  F high = lowest;
  typename RealTraits<F>::Mask nan = either_nan(high, high);
  std::int64_t j = 0;
  for (; j + 2 * kLanes <= count; j += 2 * kLanes) {
    const F a = load(z + j), b = load(z + j + kLanes);
    high = maximum(b, maximum(a, high));
    nan = nan | either_nan(a, b);
  }
  for (; j < count; j += kLanes) {
    const F a = select(first_lanes<F>(static_cast<int>(std::min<std::int64_t>(count - j, kLanes))),
                       load_run(z + j, count - j, z_end), lowest);
    high = maximum(a, high);
    nan = nan | either_nan(a, a);
  }
  if (__builtin_expect(any(nan), 0)) {
    best.nan = true;
    best.index = base + first_nan(z, count);
    return;
  }
  const A value = largest(high);
  if (value > best.value) {
    best.value = value;
    best.index = base + first_equal(z, count, z_end, value);
  }
}

// The order of a row's classes: NaN first, then the larger, then the lower index. With a type of
// its own, so that what the standard library makes of it is compiled for this instruction set
// alone.
struct Candidate {
  double value;
  std::int64_t index;

  bool operator<(const Candidate& other) const {
    const bool nan = value != value, other_nan = other.value != other.value;
    if (nan != other_nan) return nan;
    if (nan || value == other.value) return index < other.index;
    return value > other.value;
  }
};

// The k best classes of a row, found in one pass over them: a class that the k-th best so far does
// not beat joins the candidates, and when there are 2 k of those the worse half goes.
template <class A>
class TopClasses {
 public:
  void start(std::int64_t k, std::int64_t classes) {
    k_ = static_cast<std::size_t>(k);
    full_ = k_;
    bar_ = -std::numeric_limits<A>::infinity();
    candidates_.clear();
    candidates_.reserve(static_cast<std::size_t>(std::min(2 * k, classes)));
  }

  // Of the classes to come, only those above it, and NaN, can be among the best: they come in
  // order, and ties go to the lowest. NaN itself once k of them have been seen.
  A bar() const { return bar_; }
  bool closed() const { return bar_ != bar_; }

  void take(A value, std::int64_t index) {
    if (closed() || value <= bar_) return;
    keep(value, index);
    if (candidates_.size() == full_) drop_the_worse();
  }
  // In any order, and more than are chosen.
  void keep(A value, std::int64_t index) {
    candidates_.push_back({static_cast<double>(value), index});
  }

  // The best in no order.
  const std::vector<Candidate>& chosen() {
    if (candidates_.size() > k_) drop_the_worse();
    return candidates_;
  }
  // Their indices in order, then -1.
  void write(std::int64_t* out, std::int64_t stride) {
    chosen();
    std::sort(candidates_.begin(), candidates_.end());
    for (std::size_t j = 0; j < k_; ++j, out += stride) {
      *out = j < candidates_.size() ? candidates_[j].index : -1;
    }
  }

 private:
  void drop_the_worse() {
    const auto last = candidates_.begin() + static_cast<std::ptrdiff_t>(k_ - 1);
    std::nth_element(candidates_.begin(), last, candidates_.end());
    bar_ = static_cast<A>(last->value);
    candidates_.resize(k_);
    full_ = 2 * k_;
  }

  std::size_t k_ = 1, full_ = 1;
  A bar_ = 0;
  std::vector<Candidate> candidates_;
};

// Offers those of 16 noisy logits, classes base, base + 1, ..., whose bits are set.
template <class A>
inline void take_lanes(TopClasses<A>& top, unsigned lanes, const A* z, std::int64_t base) {
  for (; lanes; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    top.take(z[lane], base + lane);
  }
}

// Bits of the first `count` of 16 lanes.
inline unsigned first_bits(std::int64_t count) {
  return count >= kLanes ? 0xFFFFu : (1u << count) - 1;
}

// Continues the choice over z[0..count), classes base, base + 1, ...
template <class A>
inline void update_top(TopClasses<A>& top, const A* z, std::int64_t count, const A* z_end,
                       std::int64_t base) {
  using F = Vector<A>;
  for (std::int64_t j = 0; j < count; j += kLanes) {
    const F v = load_run(z + j, count - j, z_end);
    const unsigned lanes = lane_bits(less(RealTraits<F>::splat(top.bar()), v) | either_nan(v, v)) &
                           first_bits(count - j);
    if (lanes) take_lanes(top, lanes, z + j, base + j);
  }
}

// Long float32 rows are searched by bounds, others through their noisy logits: in a short row too
// many classes lead for a while (measured: level at about 150 classes).
constexpr std::int64_t kMinBoundedClasses = 192;

// The same search without the noisy logits: most classes lose by a bound on their noise already,
// which takes six operations where two logarithms take sixty.
class BoundedSearch {
 public:
  // At most this many positions are prepared at a time.
  static constexpr std::int64_t kCapacity = 2048;

  explicit BoundedSearch(NoiseSource& source) : source_(source) {}

  // Draws the first words of positions n, ..., n + count - 1.
  void prepare(std::uint64_t n, std::int64_t count) {
    n_ = n;
    first_ = high_ + (n & 3);
    source_.fill(0, n >> 2, (static_cast<std::int64_t>(n & 3) + count + 3) / 4, high_);
  }

  // Continues the search over `count` of the prepared positions, from n + at on, with logits
  // x[0..count), classes base, base + 1, ...
  template <class T>
  void update(Best<float>& best, std::int64_t at, const T* x, const T* x_end,
              const std::uint8_t* allowed, const std::uint8_t* allowed_end, std::int64_t count,
              std::int64_t base) {
    if (best.nan) return;
    const F32 lowest = RealTraits<F32>::splat(-std::numeric_limits<float>::infinity());
    F32 to_beat = RealTraits<F32>::splat(best.value);
    const std::uint32_t* high = first_ + at;
    // A NaN among the logits makes the bound NaN, which counts as beating anything.
    for (std::int64_t j = 0; j < count; j += kLanes) {
      const F32 logits = load_run(x + j, count - j, x_end);
      const F32 bound = logits + gumbel_upper_bound<F32>(load_words(high + j));
      if (__builtin_expect(!any(not_at_most(bound, to_beat)), 1)) continue;
      const std::int64_t here = std::min<std::int64_t>(count - j, kLanes);
      F32 z = noisy(logits, at + j);
      if (allowed) z = forbid<float>(allowed + j, here, allowed_end, z);
      if (here < kLanes) z = select(first_lanes<F32>(static_cast<int>(here)), z, lowest);
      const unsigned nan = lane_bits(either_nan(z, z));
      if (__builtin_expect(nan != 0, 0)) {
        best.nan = true;
        best.index = base + j + __builtin_ctz(nan);
        return;
      }
      const float value = largest(z);
      if (value > best.value) {
        best.value = value;
        to_beat = RealTraits<F32>::splat(value);
        best.index = base + j + __builtin_ctz(lane_bits(equal(z, to_beat)));
      }
    }
  }

  // Likewise for the k best.
  template <class T>
  void update(TopClasses<float>& top, std::int64_t at, const T* x, const T* x_end,
              const std::uint8_t* allowed, const std::uint8_t* allowed_end, std::int64_t count,
              std::int64_t base) {
    const std::uint32_t* high = first_ + at;
    for (std::int64_t j = 0; j < count && !top.closed(); j += kLanes) {
      const F32 logits = load_run(x + j, count - j, x_end);
      const F32 bound = logits + gumbel_upper_bound<F32>(load_words(high + j));
      if (__builtin_expect(!any(not_at_most(bound, RealTraits<F32>::splat(top.bar()))), 1)) {
        continue;
      }
      F32 z = noisy(logits, at + j);
      if (allowed) z = forbid<float>(allowed + j, count - j, allowed_end, z);
      float values[kLanes];
      store(values, z);
      take_lanes(top, first_bits(count - j), values, base + j);
    }
  }

 private:
  GUMBEL_EXT_INLINE F32 noisy(const F32& logits, std::int64_t at) {
    const U32 hi = load_words(first_ + at);
    F32 exponential = exponential_from_high_word<F32>(hi);
    if (__builtin_expect(any(needs_low_word<F32>(hi)), 0)) {
      float buffer[kLanes];
      store(buffer, exponential);
      resolve_tails(source_, n_ + static_cast<std::uint64_t>(at), first_ + at, buffer);
      exponential = load(buffer);
    }
    return logits - log_positive(exponential);
  }

  NoiseSource& source_;
  std::uint64_t n_ = 0;
  const std::uint32_t* first_ = nullptr;
  alignas(64) std::uint32_t high_[kCapacity + NoiseSource::kSlack + 2 * kLanes];
};

// What to do with a row once its best class is known.
enum class RowKind { kOrdinary, kNaN, kForbidden };

// Settles rows without an ordinary winner: a NaN among the logits, or nothing above -inf.
// `allowed_at(c)` says whether the mask allows class c; a row that it forbids entirely is defined
// (zeros, index -1), one whose allowed logits are all -inf is NaN, as softmax gives.
template <class A, class AllowedAt>
inline RowKind classify_row(Best<A>& best, std::int64_t classes, AllowedAt allowed_at) {
  if (best.nan) return RowKind::kNaN;
  if (best.value > -std::numeric_limits<A>::infinity()) return RowKind::kOrdinary;
  for (std::int64_t c = 0; c < classes; ++c) {
    if (allowed_at(c)) {
      best.index = c;
      return RowKind::kNaN;
    }
  }
  best.index = -1;
  return RowKind::kForbidden;
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
