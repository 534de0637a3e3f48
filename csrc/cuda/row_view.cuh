// One row as a thread meets it: groups of elements that share Philox blocks and, where memory
// allows, a 16-byte access.
#pragma once

#include "noise.cuh"
#include "team.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

using cuda::Params;

// Groups follow noise positions, not memory: a Philox block is then never computed by two threads,
// and in a contiguous tensor 16-byte boundaries of memory and of positions are the same.
struct RowView {
  std::int64_t row, offset, mask_offset;
  std::uint64_t position;  // of class 0
  int classes;
  int lead;     // elements of group 0 that lie before class 0
  int groups;   // that the row takes part in
  bool vector;  // whole groups may be loaded and stored at once

  template <class T>
  GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY static RowView of(const Params& p, std::int64_t row) {
    constexpr int kGroup = Element<T>::kGroup;
    RowView v;
    const bool exists = row < p.outer * p.inner;
    if (!exists) row = 0;
    const std::int64_t o = p.inner == 1 ? row : row / p.inner, i = p.inner == 1 ? 0 : row % p.inner;
    v.row = row;
    v.offset = o * p.outer_stride + i * p.inner_stride;
    v.mask_offset = o * p.mask_outer_stride + i * p.mask_inner_stride;
    v.position = static_cast<std::uint64_t>(o) * static_cast<std::uint64_t>(p.classes) *
                     static_cast<std::uint64_t>(p.inner) +
                 static_cast<std::uint64_t>(i);
    v.classes = exists ? static_cast<int>(p.classes) : 0;
    v.lead = p.inner == 1 ? static_cast<int>(v.position % kGroup) : 0;
    v.groups = exists ? (v.lead + v.classes + kGroup - 1) / kGroup : 0;
    const std::int64_t first = v.offset - v.lead;
    v.vector = p.class_stride == 1 && aligned<T>(p.logits, first) && aligned<T>(p.y, first) &&
               aligned<T>(p.grad, first) && aligned<T>(p.grad_logits, first);
    return v;
  }

 private:
  // A pointer that is not used is null, and does no harm.
  template <class T>
  GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY static bool aligned(const void* base,
                                                               std::int64_t first) {
    return base == nullptr || (reinterpret_cast<std::uintptr_t>(base) +
                               static_cast<std::uintptr_t>(first) * sizeof(T)) %
                                      16 ==
                                  0;
  }
};

// The part of a row that one group covers: elements [begin, end) are its classes c + begin, ...
struct GroupSpan {
  int c;  // class of element 0; negative in the first group of a row that starts inside one
  int begin, end;
  bool vector;

  template <class T>
  GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY static GroupSpan of(const RowView& row, int group,
                                                               int last_class) {
    constexpr int kGroup = Element<T>::kGroup;
    GroupSpan s;
    s.c = group * kGroup - row.lead;
    s.begin = s.c < 0 ? -s.c : 0;
    const int left = last_class - s.c;
    s.end = left < kGroup ? (left < 0 ? 0 : left) : kGroup;
    s.vector = row.vector && s.begin == 0 && s.end == kGroup;
    return s;
  }
  GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY bool holds(int v) const { return begin <= v && v < end; }
};

// `address` is that of element 0, which may lie outside the row; only what the span holds is read.
template <class T, class Scalar, int count>
GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY void load_group(const T* address, std::int64_t stride,
                                                         const GroupSpan& span, Scalar outside,
                                                         Scalar (&out)[count]) {
  static_assert(count == Element<T>::kGroup);
  if (span.vector) {
    constexpr int kVectors = count * static_cast<int>(sizeof(T)) / 16;
    union {
      uint4 raw[kVectors];
      T element[count];
    } u;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) u.raw[i] = reinterpret_cast<const uint4*>(address)[i];
#pragma unroll
    for (int v = 0; v < count; ++v) out[v] = widen(u.element[v]);
    return;
  }
#pragma unroll
  for (int v = 0; v < count; ++v) {
    out[v] = span.holds(v) ? static_cast<Scalar>(widen(address[v * stride])) : outside;
  }
}

template <class T, class Scalar, int count>
GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY void store_group(T* address, std::int64_t stride,
                                                          const GroupSpan& span,
                                                          const Scalar (&in)[count]) {
  static_assert(count == Element<T>::kGroup);
  if (span.vector) {
    constexpr int kVectors = count * static_cast<int>(sizeof(T)) / 16;
    union {
      uint4 raw[kVectors];
      T element[count];
    } u;
#pragma unroll
    for (int v = 0; v < count; ++v) narrow(in[v], &u.element[v]);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) reinterpret_cast<uint4*>(address)[i] = u.raw[i];
    return;
  }
#pragma unroll
  for (int v = 0; v < count; ++v) {
    if (span.holds(v)) narrow(in[v], &address[v * stride]);
  }
}

template <class T>
GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY const T* element_of(const void* base, const Params& p,
                                                             const RowView& row, int c) {
  return static_cast<const T*>(base) + (row.offset + c * p.class_stride);
}
template <class T>
GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY T* element_of(void* base, const Params& p,
                                                       const RowView& row, int c) {
  return static_cast<T*>(base) + (row.offset + c * p.class_stride);
}

GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY bool is_allowed(const Params& p, const RowView& row,
                                                         int c) {
  return p.mask == nullptr || p.mask[row.mask_offset + c * p.mask_class_stride] != 0;
}

// logits + noise, -inf where the mask forbids or the row ends.
template <class T, class Scalar, int count>
GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY void noisy_group(const Params& p, const RowView& row,
                                                          const GroupSpan& span, NoiseSource& noise,
                                                          Scalar (&z)[count]) {
  load_group(element_of<T>(p.logits, p, row, span.c), p.class_stride, span, -infinity<Scalar>(), z);
  Scalar log_e[count];
  if (p.inner == 1) {
    noise.log_exponentials(
        row.position + static_cast<std::uint64_t>(static_cast<std::int64_t>(span.c)), log_e);
  } else {
#pragma unroll
    for (int v = 0; v < count; ++v) {
      noise.log_exponential(row.position + static_cast<std::uint64_t>(span.c + v) *
                                               static_cast<std::uint64_t>(p.inner),
                            log_e[v]);
    }
  }
#pragma unroll
  for (int v = 0; v < count; ++v) z[v] = add(z[v], -log_e[v]);
  if (p.mask != nullptr) {
#pragma unroll
    for (int v = 0; v < count; ++v) {
      if (span.holds(v) && !is_allowed(p, row, span.c + v)) z[v] = -infinity<Scalar>();
    }
  }
}

// z of one class, with the very bits that noisy_group() gives it.
template <class T, class Scalar>
GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY Scalar noisy_logit(const Params& p, const RowView& row,
                                                            int c, NoiseSource& noise) {
  Scalar log_e;
  noise.log_exponential(
      row.position + static_cast<std::uint64_t>(c) * static_cast<std::uint64_t>(p.inner), log_e);
  return is_allowed(p, row, c) ? add(widen(*element_of<T>(p.logits, p, row, c)), -log_e)
                               : -infinity<Scalar>();
}

// log2(e) / tau and 1 / tau, kept inside the normal range: an infinite or zero factor would turn 0
// * inf and -inf * 0 into NaN where the limit (one-hot, uniform) is well defined.
template <class Scalar>
struct InverseTau {
  Scalar exponent_scale, inverse;
};
template <class Scalar>
GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY Scalar clamped(double value) {
  constexpr double lowest = sizeof(Scalar) == 4 ? 0x1p-126 : 0x1p-1022;
  constexpr double highest = sizeof(Scalar) == 4 ? 0x1.fffffep127 : 0x1.fffffffffffffp1023;
  return static_cast<Scalar>(value < lowest ? lowest : (value > highest ? highest : value));
}
template <class Scalar>
GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY InverseTau<Scalar> inverse_tau(const Params& p,
                                                                        std::int64_t row) {
  if (p.tau == nullptr) {
    return {static_cast<Scalar>(p.exponent_scale), static_cast<Scalar>(p.inverse_tau)};
  }
  const double tau = p.tau[row];
  return {clamped<Scalar>(1.4426950408889634074 / tau), clamped<Scalar>(1.0 / tau)};
}

enum class RowKind { kOrdinary, kNaN, kForbidden };

// What becomes of a row without an ordinary winner, given the best class that the search left: a
// NaN, or nothing above -inf. A row that the mask forbids entirely is defined (zeros, index -1);
// one whose allowed logits are all -inf is NaN, as softmax gives.
template <class Team>
GUMBEL_EXT_DEVICE GUMBEL_EXT_INLINE_ONLY RowKind settle_row(Team& team, const Params& p,
                                                            const RowView& row, bool nan,
                                                            int* index) {
  int first_allowed = kNoIndex;
  for (int c = team.rank(); c < row.classes; c += team.threads()) {
    if (is_allowed(p, row, c)) {
      first_allowed = c;
      break;
    }
  }
  first_allowed = team.reduce(first_allowed, Smaller());
  if (nan) return RowKind::kNaN;
  *index = first_allowed == kNoIndex ? -1 : first_allowed;
  return first_allowed == kNoIndex ? RowKind::kForbidden : RowKind::kNaN;
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
