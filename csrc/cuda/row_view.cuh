// One row as a thread meets it: groups of elements that share Philox blocks and, where memory
// allows, a 16-byte access.
#pragma once

#include "noise.cuh"
#include "team.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

using cuda::Params;

// Threads of a multiprocessor that the registers of a kernel must suffice for, if each holds so
// many elements: more threads hide more latency, up to where numbers would have to leave their
// registers.
template <class T>
constexpr int resident_threads(int elements) {
  if (sizeof(typename Element<T>::Scalar) == 8) return 384;
  return elements <= 4 ? 1024 : (elements <= 8 ? 768 : (elements <= 24 ? 640 : 512));
}

GUMBEL_EXT_DEVICE std::uint64_t position_in_table(const Params& p, std::int64_t row) {
  return static_cast<std::uint64_t>(load_read_only(p.row_positions + row));
}
// How far n classes are apart in noise positions.
GUMBEL_EXT_DEVICE std::uint64_t class_distance(const Params& p, int n) {
  return static_cast<std::uint64_t>(static_cast<std::int64_t>(n)) *
         static_cast<std::uint64_t>(p.position_class_stride);
}

// Groups follow noise positions, not memory: a Philox block is then never computed by two threads,
// and in a contiguous tensor 16-byte boundaries of memory and of positions are the same. Where the
// classes of a row are not adjacent in positions, groups begin with class 0. In memory they are
// adjacent here; other layouts are column_kernels.cuh's.
struct RowView {
  std::int64_t row, offset, mask_offset;
  std::uint64_t position;  // of class 0
  int classes;
  int lead;     // elements of group 0 that lie before class 0
  int groups;   // that the row takes part in
  bool vector;  // whole groups may be loaded and stored at once

  // A backward from y has no noise, and no positions either: its groups are those of row-major
  // ones, so that they are aligned where memory is.
  template <class T, bool kNoise = true>
  GUMBEL_EXT_DEVICE static RowView of(const Params& p, std::int64_t row) {
    constexpr int kGroup = Element<T>::kGroup;
    RowView v;
    const bool exists = row < p.outer * p.inner;
    if (!exists) row = 0;
    v.row = row;
    std::int64_t o = row;
    if (p.inner != 1) o = row / p.inner;
    v.offset = o * p.outer_stride;
    v.mask_offset = p.mask == nullptr ? 0 : o * p.mask_outer_stride;
    v.position = kNoise ? p.first_position + static_cast<std::uint64_t>(o) *
                                                 static_cast<std::uint64_t>(p.position_outer_stride)
                        : static_cast<std::uint64_t>(o) * static_cast<std::uint64_t>(p.classes);
    if (p.inner != 1) {
      const std::int64_t i = row - o * p.inner;
      v.offset += i * p.inner_stride;
      if (p.mask != nullptr) v.mask_offset += i * p.mask_inner_stride;
      v.position +=
          static_cast<std::uint64_t>(i) * static_cast<std::uint64_t>(p.position_inner_stride);
    }
    if (kNoise && p.row_positions != nullptr) {
      v.position = position_in_table(p, row);
    }
    const bool by_groups = kNoise ? p.position_class_stride == 1 : p.inner == 1;
    v.lead = by_groups ? static_cast<int>(v.position % kGroup) : 0;
    v.classes = exists ? static_cast<int>(p.classes) : 0;
    v.groups = exists ? (v.lead + v.classes + kGroup - 1) / kGroup : 0;
    const std::int64_t first = v.offset - v.lead;
    v.vector = aligned<T>(p.logits, first) && aligned<T>(p.y, first) && aligned<T>(p.grad, first) &&
               aligned<T>(p.grad_logits, first);
    return v;
  }

 private:
  // A pointer that is not used is null, and does no harm.
  template <class T>
  GUMBEL_EXT_DEVICE static bool aligned(const void* base, std::int64_t first) {
    return base == nullptr || (reinterpret_cast<std::uintptr_t>(base) +
                               static_cast<std::uintptr_t>(first) * sizeof(T)) %
                                      16 ==
                                  0;
  }
};

// The part of a row that one group covers.
struct GroupSpan {
  int c;  // class of element 0; negative in the first group of a row that starts inside one
  int classes;
  bool vector;

  template <class T>
  GUMBEL_EXT_DEVICE static GroupSpan of(const RowView& row, int group) {
    constexpr int kGroup = Element<T>::kGroup;
    GroupSpan s;
    s.c = group * kGroup - row.lead;
    s.classes = row.classes;
    s.vector = row.vector && s.c >= 0 && s.c <= row.classes - kGroup;
    return s;
  }
  GUMBEL_EXT_DEVICE bool holds(int v) const {
    return static_cast<unsigned>(c + v) < static_cast<unsigned>(classes);
  }
};

template <class T>
GUMBEL_EXT_DEVICE const T* element_of(const void* base, const RowView& row, int c) {
  return static_cast<const T*>(base) + (row.offset + c);
}
template <class T>
GUMBEL_EXT_DEVICE T* element_of(void* base, const RowView& row, int c) {
  return static_cast<T*>(base) + (row.offset + c);
}

// A group as it lies in memory, which is how it stays until its turn comes: a thread's loads are
// all under way before the first is waited for.
template <class T>
struct RawGroup {
  static constexpr int kGroup = Element<T>::kGroup;
  static constexpr int kVectors = kGroup * static_cast<int>(sizeof(T)) / 16;
  union {
    uint4 vector[kVectors];
    std::uint32_t word[4 * kVectors];
    T element[kGroup];
  };

  // What the span does not hold becomes `outside`.
  GUMBEL_EXT_DEVICE void load(const void* base, const RowView& row, const GroupSpan& span,
                              T outside) {
    const T* address = element_of<T>(base, row, span.c);
    if (span.vector) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        vector[i] = load_vector(reinterpret_cast<const uint4*>(address) + i);
      }
    } else {
#pragma unroll
      for (int v = 0; v < kGroup; ++v) element[v] = span.holds(v) ? address[v] : outside;
    }
  }
  GUMBEL_EXT_DEVICE void store(void* base, const RowView& row, const GroupSpan& span) const {
    T* address = element_of<T>(base, row, span.c);
    if (span.vector) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        store_vector(reinterpret_cast<uint4*>(address) + i, vector[i]);
      }
    } else {
#pragma unroll
      for (int v = 0; v < kGroup; ++v) {
        if (span.holds(v)) address[v] = element[v];
      }
    }
  }

  template <class Scalar>
  GUMBEL_EXT_DEVICE void widen_to(Scalar (&out)[kGroup]) const {
#pragma unroll
    for (int v = 0; v < kGroup; ++v) out[v] = widen(element[v]);
  }
  template <class Scalar>
  GUMBEL_EXT_DEVICE void narrow_from(const Scalar (&in)[kGroup]) {
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int v = 0; v < kGroup; v += 2) word[v / 2] = narrow_two(in[v], in[v + 1], element);
    } else {
#pragma unroll
      for (int v = 0; v < kGroup; ++v) narrow(in[v], &element[v]);
    }
  }
};

template <class T>
GUMBEL_EXT_DEVICE T narrowed(typename Element<T>::Scalar value) {
  T out;
  narrow(value, &out);
  return out;
}

template <class T, class Scalar, int count>
GUMBEL_EXT_DEVICE void store_group(void* base, const RowView& row, const GroupSpan& span,
                                   const Scalar (&in)[count]) {
  RawGroup<T> raw;
  raw.narrow_from(in);
  raw.store(base, row, span);
}

// The calling thread's part of groups [first, last) of a row becomes `value`.
template <class T, class Team, class Scalar>
GUMBEL_EXT_DEVICE void fill_groups(const Team& team, void* base, const RowView& row, int first,
                                   int last, Scalar value) {
  Scalar values[Element<T>::kGroup];
#pragma unroll
  for (int v = 0; v < Element<T>::kGroup; ++v) values[v] = value;
  for (int g = first + team.rank(); g < last; g += team.threads()) {
    store_group<T>(base, row, GroupSpan::of<T>(row, g), values);
  }
}

GUMBEL_EXT_DEVICE bool is_allowed(const Params& p, const RowView& row, int c) {
  return p.mask == nullptr || p.mask[row.mask_offset + c * p.mask_class_stride] != 0;
}

// logits + noise if there is any, -inf where the mask forbids or the row ends.
template <class T, class Scalar, int count>
GUMBEL_EXT_DEVICE void noisy_group(const Params& p, const RowView& row, const GroupSpan& span,
                                   const RawGroup<T>& logits, NoiseSource& noise,
                                   Scalar (&z)[count]) {
  logits.widen_to(z);
  if (p.position_class_stride == 1) {
    noise.add_blocks(
        (row.position + static_cast<std::uint64_t>(static_cast<std::int64_t>(span.c))) >> 2, z);
  } else if (p.position_class_stride != cuda::kNoNoise) {
#pragma unroll 1
    for (int v = 0; v < count; ++v) {
      Scalar own = z[0];
      noise.add_one(row.position + class_distance(p, span.c + v), own);
      // Rotates, so that the loop needs no index into registers.
#pragma unroll
      for (int w = 0; w + 1 < count; ++w) z[w] = z[w + 1];
      z[count - 1] = own;
    }
  }
  if (p.mask != nullptr) {
#pragma unroll
    for (int v = 0; v < count; ++v) {
      if (span.holds(v) && !is_allowed(p, row, span.c + v)) z[v] = -infinity<Scalar>();
    }
  }
}

// Takes z of a group into the best of a thread so far, by its largest first: most groups end there.
template <class Scalar, int count>
GUMBEL_EXT_DEVICE void take_group(const Scalar (&z)[count], int c, Best<Scalar>& best) {
  Scalar top = z[0];
#pragma unroll
  for (int v = 1; v < count; ++v) top = larger_or_nan(top, z[v]);
  // A NaN must win, and stay, so that the test is not "larger".
  if (top <= best.value || best.is_nan()) return;
  best.value = top;
#pragma unroll
  for (int v = count - 1; v >= 0; --v) {
    // The place of a NaN does not matter: settle_row() looks for the first.
    if (!(z[v] < top)) best.index = c + v;
  }
}

// Calls take(span, z) for groups [first, last) of a row that are the calling thread's, kBatch loads
// ahead.
template <class T, int kBatch, class Team, class Take>
GUMBEL_EXT_DEVICE void for_noisy_groups(const Team& team, const Params& p, const RowView& row,
                                        int first, int last, NoiseSource& noise, Take take) {
  using Scalar = typename Element<T>::Scalar;
  for (int g = first + team.rank(); g < last; g += kBatch * team.threads()) {
    RawGroup<T> logits[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      logits[k].load(p.logits, row, GroupSpan::of<T>(row, g + k * team.threads()),
                     narrowed<T>(-infinity<Scalar>()));
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int group = g + k * team.threads();
      if (group >= last) break;
      const GroupSpan span = GroupSpan::of<T>(row, group);
      Scalar z[Element<T>::kGroup];
      noisy_group(p, row, span, logits[k], noise, z);
      take(span, z);
    }
  }
}

// z of one class that the mask allows, with the very bits that noisy_group() gives it.
template <class T, class Scalar>
GUMBEL_EXT_DEVICE Scalar noisy_logit(const Params& p, const RowView& row, int c,
                                     NoiseSource& noise) {
  Scalar z = widen(*element_of<T>(p.logits, row, c));
  noise.add_one(row.position + class_distance(p, c), z);
  return z;
}

// What a row's gradients are shifted by: that of its chosen class; 0 for a row that the mask
// forbids, whose index is -1. An index that is none of a forward's makes its row NaN.
template <class T>
GUMBEL_EXT_DEVICE typename Element<T>::Scalar chosen_gradient(const Params& p, const RowView& row,
                                                              std::int64_t index) {
  using Scalar = typename Element<T>::Scalar;
  if (index < 0) return Scalar(0);
  if (index >= row.classes) return quiet_nan<Scalar>();
  return widen(*element_of<T>(p.grad, row, static_cast<int>(index)));
}

// log2(e) / tau and 1 / tau, kept inside the normal range: an infinite or zero factor would turn 0
// * inf and -inf * 0 into NaN where the limit (one-hot, uniform) is well defined.
template <class Scalar>
struct InverseTau {
  Scalar exponent_scale, inverse;
};
template <class Scalar>
constexpr Scalar smallest_normal = sizeof(Scalar) == 4 ? 0x1p-126 : 0x1p-1022;
template <class Scalar>
GUMBEL_EXT_DEVICE Scalar clamped(Scalar value) {
  constexpr Scalar lowest = smallest_normal<Scalar>;
  constexpr Scalar highest = sizeof(Scalar) == 4 ? 0x1.fffffep127 : 0x1.fffffffffffffp1023;
  return value < lowest ? lowest : (value > highest ? highest : value);
}
// A tensor's tau that is not positive and finite makes its row NaN: to raise would be to wait for
// the device.
template <class Scalar>
GUMBEL_EXT_DEVICE InverseTau<Scalar> inverse_tau(const Params& p, std::int64_t row) {
  if (p.tau == nullptr) {
    if constexpr (sizeof(Scalar) == 4) return {p.exponent_scale_float32, p.inverse_tau_float32};
    return {static_cast<Scalar>(p.exponent_scale), static_cast<Scalar>(p.inverse_tau)};
  }
  const Scalar tau = static_cast<const Scalar*>(p.tau)[row];
  if (!(tau > 0 && tau < infinity<Scalar>())) return {quiet_nan<Scalar>(), quiet_nan<Scalar>()};
  return {clamped(Scalar(1.4426950408889634074) / tau), clamped(Scalar(1) / tau)};
}

enum class RowKind { kOrdinary, kNaN, kForbidden };

// What all classes of a row share: the reciprocal of their sum of exponentials or, for log y, its
// logarithm; in a row that is not ordinary, what fills it.
template <bool kLog, class Scalar>
GUMBEL_EXT_DEVICE Scalar share_of(Scalar sum) {
  return kLog ? natural_log(sum) : refined_reciprocal(sum);
}
template <bool kLog, class Scalar>
GUMBEL_EXT_DEVICE Scalar fill_of(RowKind kind) {
  if (kind != RowKind::kForbidden) return quiet_nan<Scalar>();
  return kLog ? -infinity<Scalar>() : Scalar(0);
}
// y or log y of a class with noisy logit z, in a row whose largest is `top`.
template <bool kLog, class Scalar>
GUMBEL_EXT_DEVICE Scalar result_of(Scalar z, Scalar top, const InverseTau<Scalar>& tau,
                                   Scalar share) {
  const Scalar distance = add(z, -top);
  if (kLog) return add(multiply(distance, tau.inverse), -share);
  return multiply(power_of_two(multiply(distance, tau.exponent_scale)), share);
}

// What becomes of a row that is not ordinary, for its logits or its tau. In: the index of its
// largest noisy logit, or kNoIndex if none is above -inf. A row that the mask forbids entirely is
// defined (zeros, index -1); one whose allowed logits are all -inf is NaN, as softmax gives; a NaN
// logit's row has its index.
template <class T, class Team>
GUMBEL_EXT_DEVICE RowKind settle_row(Team& team, const Params& p, const RowView& row, int* index) {
  int first_allowed = kNoIndex, first_nan = kNoIndex;
  for (int c = team.rank(); c < row.classes; c += team.threads()) {
    if (!is_allowed(p, row, c)) continue;
    if (first_allowed == kNoIndex) first_allowed = c;
    const auto logit = widen(*element_of<T>(p.logits, row, c));
    if (logit != logit) {
      first_nan = c;
      break;
    }
  }
  first_allowed = team.reduce(first_allowed, Smaller());
  first_nan = team.reduce(first_nan, Smaller());
  if (first_allowed == kNoIndex) {
    *index = -1;
    return RowKind::kForbidden;
  }
  if (first_nan != kNoIndex) {
    *index = first_nan;
  } else if (*index == kNoIndex) {
    *index = first_allowed;
  }
  return RowKind::kNaN;
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
