// Regime kColumns: the classes of a row are not adjacent in memory, its neighbours are. Lanes go
// across neighbouring rows, four to a lane; the warps of a block share the classes.
#pragma once

#include "stream_kernels.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

constexpr int kColumnsPerLane = 4;

// Four neighbouring rows of one outer index. Lanes are numbered over all of them, so that a short
// inner dimension leaves none idle.
struct ColumnView {
  std::int64_t row, offset, mask_offset;  // of the first of them
  std::uint64_t position;                 // of the first of them, class 0
  int columns;                            // 0 past the end
  bool vector;                            // may be loaded and stored at once
  bool consecutive;                       // in noise positions

  template <class T>
  GUMBEL_EXT_DEVICE static ColumnView of(const Params& p, std::int64_t lane) {
    const std::int64_t per_outer = (p.inner + kColumnsPerLane - 1) / kColumnsPerLane;
    const std::int64_t o = lane / per_outer, i = lane % per_outer * kColumnsPerLane;
    const bool exists = o < p.outer;
    const std::int64_t left = p.inner - i;
    ColumnView v;
    v.row = exists ? o * p.inner + i : 0;
    v.columns = !exists ? 0 : left < kColumnsPerLane ? static_cast<int>(left) : kColumnsPerLane;
    v.offset = exists ? o * p.outer_stride + i * p.inner_stride : 0;
    v.mask_offset = exists ? o * p.mask_outer_stride + i * p.mask_inner_stride : 0;
    v.position =
        p.first_position +
        static_cast<std::uint64_t>(o) * static_cast<std::uint64_t>(p.position_outer_stride) +
        static_cast<std::uint64_t>(i) * static_cast<std::uint64_t>(p.position_inner_stride);
    if (p.row_positions != nullptr) v.position = position_in_table(p, v.row);
    v.consecutive = p.row_positions != nullptr || p.position_inner_stride == 1;
    for (int j = 1; p.row_positions != nullptr && j < v.columns; ++j) {
      if (v.column_position(p, j) != v.position + static_cast<unsigned>(j)) v.consecutive = false;
    }
    v.vector = v.columns == kColumnsPerLane && p.inner_stride == 1 &&
               p.class_stride % kColumnsPerLane == 0 && aligned<T>(p.logits, v.offset) &&
               aligned<T>(p.y, v.offset) && aligned<T>(p.grad, v.offset) &&
               aligned<T>(p.grad_logits, v.offset);
    return v;
  }

  // The noise position of class 0.
  GUMBEL_EXT_DEVICE std::uint64_t column_position(const Params& p, int column) const {
    if (p.row_positions != nullptr) {
      return position_in_table(p, row + column);
    }
    return position + static_cast<std::uint64_t>(static_cast<std::int64_t>(column)) *
                          static_cast<std::uint64_t>(p.position_inner_stride);
  }
  GUMBEL_EXT_DEVICE bool allowed(const Params& p, int column, int c) const {
    return p.mask == nullptr || p.mask[mask_offset + column * p.mask_inner_stride +
                                       static_cast<std::int64_t>(c) * p.mask_class_stride] != 0;
  }

 private:
  template <class T>
  GUMBEL_EXT_DEVICE static bool aligned(const void* base, std::int64_t first) {
    return (reinterpret_cast<std::uintptr_t>(base) +
            static_cast<std::uintptr_t>(first) * sizeof(T)) %
               (sizeof(T) == 2 ? 8 : 16) ==
           0;
  }
};

// The elements of a lane's columns in one class, where they are neighbours in memory.
template <class T>
union FourElements {
  using Vector = std::conditional_t<sizeof(T) == 2, uint2, uint4>;
  static constexpr int kVectors = kColumnsPerLane * sizeof(T) / sizeof(Vector);
  Vector vector[kVectors];
  T element[kColumnsPerLane];
};

template <class T, class Scalar>
GUMBEL_EXT_DEVICE void load_columns(const void* base, const Params& p, const ColumnView& view,
                                    int c, Scalar (&out)[kColumnsPerLane]) {
  const T* address = static_cast<const T*>(base) + (view.offset + c * p.class_stride);
  if (view.vector) {
    FourElements<T> all;
#pragma unroll
    for (int i = 0; i < FourElements<T>::kVectors; ++i) {
      all.vector[i] =
          load_vector(reinterpret_cast<const typename FourElements<T>::Vector*>(address) + i);
    }
#pragma unroll
    for (int j = 0; j < kColumnsPerLane; ++j) out[j] = widen(all.element[j]);
    return;
  }
#pragma unroll
  for (int j = 0; j < kColumnsPerLane; ++j) {
    out[j] = j < view.columns ? static_cast<Scalar>(widen(address[j * p.inner_stride])) : Scalar(0);
  }
}

template <class T, class Scalar>
GUMBEL_EXT_DEVICE void store_columns(void* base, const Params& p, const ColumnView& view, int c,
                                     const Scalar (&in)[kColumnsPerLane]) {
  T* address = static_cast<T*>(base) + (view.offset + c * p.class_stride);
  if (view.vector) {
    FourElements<T> all;
#pragma unroll
    for (int j = 0; j < kColumnsPerLane; ++j) narrow(in[j], &all.element[j]);
#pragma unroll
    for (int i = 0; i < FourElements<T>::kVectors; ++i) {
      store_vector(reinterpret_cast<typename FourElements<T>::Vector*>(address) + i, all.vector[i]);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kColumnsPerLane; ++j) {
    if (j < view.columns) narrow(in[j], &address[j * p.inner_stride]);
  }
}

template <class T, class Scalar>
GUMBEL_EXT_DEVICE void noisy_columns(const Params& p, const ColumnView& view, int c,
                                     NoiseSource& noise, Scalar (&z)[kColumnsPerLane]) {
  load_columns<T>(p.logits, p, view, c, z);
  if (view.consecutive) {
    noise.add_four(view.position + class_distance(p, c), z);
  } else if (p.position_class_stride != cuda::kNoNoise) {
#pragma unroll 1
    for (int j = 0; j < kColumnsPerLane; ++j) {
      Scalar own = z[0];
      if (j < view.columns) noise.add_one(view.column_position(p, j) + class_distance(p, c), own);
      // Rotates, as in noisy_group().
      z[0] = z[1];
      z[1] = z[2];
      z[2] = z[3];
      z[3] = own;
    }
  }
  if (p.mask != nullptr) {
#pragma unroll
    for (int j = 0; j < kColumnsPerLane; ++j) {
      if (j < view.columns && !view.allowed(p, j, c)) z[j] = -infinity<Scalar>();
    }
  }
}

// Combines, once in a kernel, what the warps of a block found for the same columns, in the order of
// the warps, by the operation op_of(j) for the j-th column of each lane.
template <int kWarps, class V, class OpOf>
GUMBEL_EXT_DEVICE void merge_warps(V (&of_columns)[kColumnsPerLane], OpOf op_of) {
  if constexpr (kWarps == 1) return;
  GUMBEL_EXT_SHARED(V, parts, kWarps * kColumnsPerLane * 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int j = 0; j < kColumnsPerLane; ++j) {
    parts[(warp * kColumnsPerLane + j) * 32 + lane] = of_columns[j];
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kColumnsPerLane; ++j) {
    V total = parts[j * 32 + lane];
    for (int w = 1; w < kWarps; ++w) {
      total = op_of(j)(total, parts[(w * kColumnsPerLane + j) * 32 + lane]);
    }
    of_columns[j] = total;
  }
}

// A column that is not ordinary; see settle_row().
template <class T>
GUMBEL_EXT_DEVICE RowKind settle_column(const Params& p, const ColumnView& view, int column,
                                        int* index) {
  int first_allowed = kNoIndex;
  for (int c = 0; c < static_cast<int>(p.classes); ++c) {
    if (!view.allowed(p, column, c)) continue;
    if (first_allowed == kNoIndex) first_allowed = c;
    const auto logit = widen(static_cast<const T*>(
        p.logits)[view.offset + column * p.inner_stride + c * p.class_stride]);
    if (logit != logit) {
      *index = c;
      return RowKind::kNaN;
    }
  }
  if (*index == kNoIndex) *index = first_allowed == kNoIndex ? -1 : first_allowed;
  return *index < 0 ? RowKind::kForbidden : RowKind::kNaN;
}

// Writes y or, if kLog, log y, which has no index.
template <class T, int kWarps, bool kLog>
GUMBEL_EXT_KERNEL(kWarps * 32, sizeof(T) == 8 ? 256 : 512)
soft_columns_kernel(const GUMBEL_EXT_CONSTANT Params p) {
  using Scalar = typename Element<T>::Scalar;
  const RandomState state = read_state(p.random);
  record_state(state, p.used_state);
  NoiseSource noise(state);
  const int warp = threadIdx.x / 32, classes = static_cast<int>(p.classes);
  const ColumnView view =
      ColumnView::of<T>(p, 32 * static_cast<std::int64_t>(blockIdx.x) + threadIdx.x % 32);
  InverseTau<Scalar> tau[kColumnsPerLane];
  RunningSum<Scalar> total[kColumnsPerLane];
#pragma unroll
  for (int j = 0; j < kColumnsPerLane; ++j) {
    tau[j] = inverse_tau<Scalar>(p, view.row + (j < view.columns ? j : 0));
    total[j] = {Best<Scalar>::none(), Scalar(0)};
  }
  for (int c = warp; c < (view.columns > 0 ? classes : 0); c += kWarps) {
    Scalar z[kColumnsPerLane];
    noisy_columns<T>(p, view, c, noise, z);
#pragma unroll
    for (int j = 0; j < kColumnsPerLane; ++j) {
      Best<Scalar>& best = total[j].best;
      const Scalar scale = tau[j].exponent_scale;
      if (!(z[j] <= best.value)) {
        if (best.is_nan()) continue;
        // A first number comes after a sum of 0, which stays 0.
        total[j].sum =
            best.value == -infinity<Scalar>()
                ? Scalar(1)
                : add(multiply(total[j].sum, power_of_two(multiply(add(best.value, -z[j]), scale))),
                      Scalar(1));
        best = {z[j], c};
      } else if (best.value != -infinity<Scalar>()) {
        total[j].sum = add(total[j].sum, power_of_two(multiply(add(z[j], -best.value), scale)));
      }
    }
  }
  // One temperature a column.
  merge_warps<kWarps>(total, [&](int j) { return MergeSums<Scalar>{tau[j].exponent_scale}; });

  Scalar share[kColumnsPerLane];
  bool special[kColumnsPerLane];
#pragma unroll
  for (int j = 0; j < kColumnsPerLane; ++j) {
    const Best<Scalar>& best = total[j].best;
    int index = best.index;
    share[j] = share_of<kLog>(total[j].sum);
    special[j] = j < view.columns && (!(total[j].sum < infinity<Scalar>()) ||
                                      best.value == infinity<Scalar>() || index == kNoIndex);
    if (special[j]) {
      const RowKind kind = settle_column<T>(p, view, j, &index);
      share[j] = fill_of<kLog, Scalar>(kind);
    }
    if (!kLog && p.index != nullptr && warp == 0 && j < view.columns) {
      p.index[view.row + j] = index;
    }
  }
  for (int c = warp; c < (view.columns > 0 ? classes : 0); c += kWarps) {
    Scalar z[kColumnsPerLane];
    noisy_columns<T>(p, view, c, noise, z);
#pragma unroll
    for (int j = 0; j < kColumnsPerLane; ++j) {
      z[j] = special[j] ? share[j] : result_of<kLog>(z[j], total[j].best.value, tau[j], share[j]);
    }
    store_columns<T>(p.y, p, view, c, z);
  }
}

template <class T, int kWarps>
GUMBEL_EXT_KERNEL(kWarps * 32, sizeof(T) == 8 ? 256 : 512)
pick_columns_kernel(const GUMBEL_EXT_CONSTANT Params p) {
  using Scalar = typename Element<T>::Scalar;
  const RandomState state = read_state(p.random);
  record_state(state, p.used_state);
  NoiseSource noise(state);
  const int warp = threadIdx.x / 32, classes = static_cast<int>(p.classes);
  const ColumnView view =
      ColumnView::of<T>(p, 32 * static_cast<std::int64_t>(blockIdx.x) + threadIdx.x % 32);
  Best<Scalar> best[kColumnsPerLane];
#pragma unroll
  for (int j = 0; j < kColumnsPerLane; ++j) best[j] = Best<Scalar>::none();
  for (int c = warp; c < (view.columns > 0 ? classes : 0); c += kWarps) {
    Scalar z[kColumnsPerLane];
    noisy_columns<T>(p, view, c, noise, z);
#pragma unroll
    for (int j = 0; j < kColumnsPerLane; ++j) {
      if (!(z[j] <= best[j].value) && !best[j].is_nan()) best[j] = {z[j], c};
    }
    if (p.y != nullptr) {
      const Scalar zeros[kColumnsPerLane] = {};
      store_columns<T>(p.y, p, view, c, zeros);
    }
  }
  merge_warps<kWarps>(best, [](int) { return BetterOf(); });
#pragma unroll
  for (int j = 0; j < kColumnsPerLane; ++j) {
    if (j >= view.columns) continue;
    int index = best[j].index;
    RowKind kind = RowKind::kOrdinary;
    if (best[j].is_nan() || index == kNoIndex) {
      index = kNoIndex;
      kind = settle_column<T>(p, view, j, &index);
    }
    if (p.index != nullptr && warp == 0) p.index[view.row + j] = index;
    if (p.y == nullptr) continue;
    T* column = static_cast<T*>(p.y) + view.offset + j * p.inner_stride;
    if (kind == RowKind::kOrdinary) {
      // The warp that wrote the zero writes the one.
      if (index % kWarps == warp) narrow(Scalar(1), &column[index * p.class_stride]);
    } else if (kind == RowKind::kNaN) {
      for (int c = warp; c < classes; c += kWarps) {
        narrow(quiet_nan<Scalar>(), &column[c * p.class_stride]);
      }
    }
  }
}

// y may lie where grad_logits is written: a thread reads every element before it writes it.
template <class T, int kWarps>
GUMBEL_EXT_KERNEL(kWarps * 32, sizeof(T) == 8 ? 256 : 512)
backward_columns_kernel(const GUMBEL_EXT_CONSTANT Params p) {
  using Scalar = typename Element<T>::Scalar;
  const int warp = threadIdx.x / 32, classes = static_cast<int>(p.classes);
  const ColumnView view =
      ColumnView::of<T>(p, 32 * static_cast<std::int64_t>(blockIdx.x) + threadIdx.x % 32);
  Scalar shift[kColumnsPerLane];
  bool forbidden[kColumnsPerLane];
  Dots<Scalar> total[kColumnsPerLane];
#pragma unroll
  for (int j = 0; j < kColumnsPerLane; ++j) {
    total[j] = {0, 0, 0};
    const std::int64_t index = j < view.columns ? p.index[view.row + j] : -1;
    forbidden[j] = index < 0;
    shift[j] = 0;
    if (index >= classes) {
      shift[j] = quiet_nan<Scalar>();  // see chosen_gradient()
    } else if (index >= 0) {
      shift[j] = widen(
          static_cast<const T*>(p.grad)[view.offset + j * p.inner_stride + index * p.class_stride]);
    }
  }
  for (int c = warp; c < (view.columns > 0 ? classes : 0); c += kWarps) {
    Scalar y[kColumnsPerLane], h[kColumnsPerLane];
    load_columns<T>(p.y, p, view, c, y);
    load_columns<T>(p.grad, p, view, c, h);
#pragma unroll
    for (int j = 0; j < kColumnsPerLane; ++j) {
      total[j].take(y[j], add(h[j], -shift[j]), p.grad_tau != nullptr);
    }
  }
  merge_warps<kWarps>(total, [](int) { return AddDots(); });
  Scalar inverse[kColumnsPerLane];
#pragma unroll
  for (int j = 0; j < kColumnsPerLane; ++j) {
    inverse[j] = inverse_tau<Scalar>(p, view.row + (j < view.columns ? j : 0)).inverse;
    if (p.grad_tau != nullptr && warp == 0 && j < view.columns) {
      static_cast<Scalar*>(p.grad_tau)[view.row + j] =
          forbidden[j] ? Scalar(0) : total[j].grad_tau(inverse[j]);
    }
  }
  for (int c = warp; c < (view.columns > 0 ? classes : 0); c += kWarps) {
    Scalar y[kColumnsPerLane], h[kColumnsPerLane];
    load_columns<T>(p.y, p, view, c, y);
    load_columns<T>(p.grad, p, view, c, h);
#pragma unroll
    for (int j = 0; j < kColumnsPerLane; ++j) {
      y[j] = forbidden[j]
                 ? Scalar(0)
                 : multiply(multiply(y[j], add(add(h[j], -shift[j]), -total[j].dot)), inverse[j]);
    }
    store_columns<T>(p.grad_logits, p, view, c, y);
  }
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
