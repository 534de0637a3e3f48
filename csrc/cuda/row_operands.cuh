// Rows of operands that may lie anywhere, and of results that follow each other, group by group.
#pragma once

#include <type_traits>

#include "row_view.cuh"
#include "rows_params.h"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

using cuda::kRowGroup;
using cuda::RowOperand;
using cuda::RowsParams;

template <class E>
GUMBEL_EXT_DEVICE bool on_group_boundary(const E* address) {
  constexpr std::uintptr_t kBytes = sizeof(E) == 2 ? 8 : 16;
  return reinterpret_cast<std::uintptr_t>(address) % kBytes == 0;
}

// A group as it lies in memory.
template <class E>
union GroupMemory {
  using Vector = std::conditional_t<sizeof(E) == 2, uint2, uint4>;
  static constexpr int kVectors = kRowGroup * sizeof(E) / sizeof(Vector);
  Vector vector[kVectors];
  std::uint32_t pair[2];
  E element[kRowGroup];

  GUMBEL_EXT_DEVICE GroupMemory() {}
};

// Calls take(T()) with the type of elements whose accumulate type is Scalar: the kernels are
// compiled for accumulate types alone.
template <class Scalar, class Take>
GUMBEL_EXT_DEVICE void with_element_type(cuda::ElementType type, Take take) {
  if constexpr (sizeof(Scalar) == 8) {
    take(double());
  } else if (type == cuda::ElementType::kFloat32) {
    take(float());
  } else if (type == cuda::ElementType::kBFloat16) {
    take(BFloat16());
  } else {
    take(Half());
  }
}
template <class Scalar>
constexpr cuda::ElementType kTypeOf =
    sizeof(Scalar) == 8 ? cuda::ElementType::kFloat64 : cuda::ElementType::kFloat32;

// The row of one operand.
template <class Scalar>
struct OperandRow {
  const void* data;
  std::int64_t offset, class_stride;
  cuda::ElementType type;

  GUMBEL_EXT_DEVICE static OperandRow of(const RowsParams& p, const RowOperand& operand,
                                         cuda::ElementType type, std::int64_t row) {
    std::int64_t offset = 0;
    for (int d = p.dims - 1; d > 0; --d) {
      const std::int64_t above = row / p.size[d];
      offset += (row - above * p.size[d]) * operand.stride[d];
      row = above;
    }
    if (p.dims > 0) offset += row * operand.stride[0];
    return {operand.data, offset, operand.class_stride, type};
  }

  // Classes c, c + 1, ... of the row; `outside` past its end.
  GUMBEL_EXT_DEVICE void load(int c, int classes, Scalar outside, Scalar (&out)[kRowGroup]) const {
    with_element_type<Scalar>(type, [&](auto element) {
      using E = decltype(element);
      const E* address = static_cast<const E*>(data) + offset + c * class_stride;
      if (class_stride == 1 && c <= classes - kRowGroup && on_group_boundary(address)) {
        GroupMemory<E> group;
#pragma unroll
        for (int i = 0; i < GroupMemory<E>::kVectors; ++i) {
          using Vector = typename GroupMemory<E>::Vector;
          group.vector[i] = load_vector(reinterpret_cast<const Vector*>(address) + i);
        }
#pragma unroll
        for (int v = 0; v < kRowGroup; ++v) out[v] = widen(group.element[v]);
      } else {
#pragma unroll
        for (int v = 0; v < kRowGroup; ++v) {
          out[v] = v < classes - c ? widen(address[v * class_stride]) : outside;
        }
      }
    });
  }
  // One class of the row.
  GUMBEL_EXT_DEVICE Scalar at(int c) const {
    Scalar out = 0;
    with_element_type<Scalar>(type, [&](auto element) {
      out = widen(static_cast<const decltype(element)*>(data)[offset + c * class_stride]);
    });
    return out;
  }
};

// Takes classes c, c + 1, ... into the best of a thread so far: among equals the first, and the
// first NaN above all.
template <class Scalar>
GUMBEL_EXT_DEVICE void take_first_best(const Scalar (&z)[kRowGroup], int c, Best<Scalar>& best) {
  Scalar top = z[0];
#pragma unroll
  for (int v = 1; v < kRowGroup; ++v) top = larger_or_nan(top, z[v]);
  if (top <= best.value || best.is_nan()) return;
#pragma unroll
  for (int v = 0; v < kRowGroup; ++v) {
    if (!(z[v] <= best.value) && !best.is_nan()) best = {z[v], c + v};
  }
}

// Classes c, c + 1, ... of a row of results, the first class of which is element `offset`.
template <class Scalar>
GUMBEL_EXT_DEVICE void store_results(void* data, cuda::ElementType type, std::int64_t offset, int c,
                                     int classes, const Scalar (&in)[kRowGroup]) {
  with_element_type<Scalar>(type, [&](auto element) {
    using E = decltype(element);
    E* address = static_cast<E*>(data) + offset + c;
    GroupMemory<E> group;
    if constexpr (sizeof(E) == 2) {
      group.pair[0] = narrow_two(in[0], in[1], group.element);
      group.pair[1] = narrow_two(in[2], in[3], group.element);
    } else {
#pragma unroll
      for (int v = 0; v < kRowGroup; ++v) group.element[v] = in[v];
    }
    const bool whole = c <= classes - kRowGroup;
    if (whole && on_group_boundary(address)) {
#pragma unroll
      for (int i = 0; i < GroupMemory<E>::kVectors; ++i) {
        using Vector = typename GroupMemory<E>::Vector;
        store_vector(reinterpret_cast<Vector*>(address) + i, group.vector[i]);
      }
    } else {
#pragma unroll
      for (int v = 0; v < kRowGroup; ++v) {
        if (v < classes - c) address[v] = group.element[v];
      }
    }
  });
}

// A row of an operation on such operands, as a thread meets it.
template <class Scalar>
struct OperandRows {
  std::int64_t row;
  bool exists;
  int classes, groups;
  Scalar tau;  // positive (or negative, if kSigned) and finite, or NaN

  template <bool kSigned = false>
  GUMBEL_EXT_DEVICE static OperandRows of(const RowsParams& p, std::int64_t row) {
    OperandRows r;
    r.exists = row < p.rows;
    r.row = r.exists ? row : 0;
    r.classes = r.exists ? static_cast<int>(p.classes) : 0;
    r.groups = (r.classes + kRowGroup - 1) / kRowGroup;
    if (p.tau != nullptr) {
      r.tau = static_cast<const Scalar*>(p.tau)[r.row];
    } else if constexpr (sizeof(Scalar) == 4) {
      r.tau = p.tau_float32;
    } else {
      r.tau = p.tau_value;
    }
    const Scalar size = kSigned && r.tau < 0 ? -r.tau : r.tau;
    const Scalar valid =
        size > 0 && size < infinity<Scalar>() ? clamped(size) : quiet_nan<Scalar>();
    r.tau = kSigned && r.tau < 0 ? -valid : valid;
    return r;
  }
};

// Sums over classes of e^((l - top) scale), and of that times a number d of each.
template <class Scalar>
struct SoftmaxSums {
  Scalar sum, dot;

  GUMBEL_EXT_DEVICE void take(Scalar e, Scalar d) {
    sum = add(sum, e);
    dot = multiply_add(e, d, dot);
  }
  GUMBEL_EXT_DEVICE SoftmaxSums times(Scalar factor) const {
    return {multiply(sum, factor), multiply(dot, factor)};
  }
};
struct AddSums {
  template <class Scalar>
  GUMBEL_EXT_DEVICE SoftmaxSums<Scalar> operator()(const SoftmaxSums<Scalar>& a,
                                                   const SoftmaxSums<Scalar>& b) const {
    return {add(a.sum, b.sum), add(a.dot, b.dot)};
  }
};

// e^x for x <= 0.
template <class Scalar>
GUMBEL_EXT_DEVICE Scalar exp_nonpositive(Scalar x) {
  return power_of_two(multiply(x, Scalar(1.4426950408889634074)));
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
