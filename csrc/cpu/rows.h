// Regimes kRows, kSlabs and kSplitRow: vectorised along the classes of a row.
#pragma once

#include "operands.h"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

using cpu::ChunkState;
using cpu::SplitRow;
using cpu::Step;

template <class T>
class RowWorker {
 public:
  using A = typename ComputeType<T>::type;
  using F = Vector<A>;

  explicit RowWorker(const Problem& problem)
      : p_(problem), noise_(problem.seed, problem.offset, !problem.noise), search_(noise_) {}

  // ---- kRows ------------------------------------------------------------------------------------

  void forward(std::int64_t row, std::int64_t rows) {
    if (!p_.output || p_.hard) {
      pick_rows(row, rows);
      return;
    }
    T* buffer = out_buffer(rows);
    const Run<T> y = rows_to_write(p_, p_.output, row, rows, buffer, capacity(rows));
    soft_rows(row, rows, y, p_.index);
    write_back(p_, p_.output, row, rows, y.data, buffer);
  }

  void backward(std::int64_t row, std::int64_t rows) {
    const Run<const T> y =
        read_rows(p_, p_.output, row, rows, large_or(y_buffer_, y_scratch_, rows), capacity(rows));
    gradient_rows(row, rows, y);
  }

  void backward_recompute(std::int64_t row, std::int64_t rows) {
    Run<A> y{soft_buffer_, soft_buffer_ + kTile + kLanes};
    if (p_.classes > kTile) {
      A* scratch = soft_scratch_.reserve(p_.classes + kLanes);
      y = {scratch, scratch + p_.classes + kLanes};
    }
    soft_rows(row, rows, y, nullptr);
    gradient_rows(row, rows, Run<const A>{y.data, y.end});
  }

  // ---- kSlabs -----------------------------------------------------------------------------------

  void forward_slab(std::int64_t outer) { slab(outer, false); }
  void backward_recompute_slab(std::int64_t outer) { slab(outer, true); }

  // ---- kSplitRow --------------------------------------------------------------------------------

  void split_step(Step step, const SplitRow& split, std::int64_t chunk_begin,
                  std::int64_t chunk_end) {
    A* work = static_cast<A*>(split.work);
    const std::int64_t begin = chunk_begin * kChunk, end = std::min(chunk_end * kChunk, p_.classes);
    switch (step) {
      case Step::kNoise: {
        Best<A> best;
        for (std::int64_t c = begin; c < end; c += kChunk) {
          const std::int64_t count = std::min(kChunk, end - c);
          const Best<A> before = best;
          if (work) {
            noisy_logits(split.row, c, count, work + c, work + c + count);
            update_best(best, work + c, count, work + c + count, c);
          } else {
            search_chunk(best, split.row, c, count);
          }
          ChunkState& state = split.chunks[c / kChunk];
          const bool better = (best.nan && !before.nan) || best.value > before.value;
          state.nan = best.nan && !before.nan;
          state.largest = better ? best.value : -std::numeric_limits<A>::infinity();
          state.index = best.index;
        }
        break;
      }
      case Step::kExponentiate:
        for (std::int64_t c = begin; c < end; c += kChunk) {
          const std::int64_t count = std::min(kChunk, end - c);
          split.chunks[c / kChunk].sum = exponentiate_chunk(
              work + c, count, work + c + count, static_cast<A>(split.largest),
              inverse_tau<A>(p_, split.row).exponent_scale, work + c, work + c + count);
        }
        break;
      case Step::kNormalize: {
        // The backward normalises in place and keeps the precision of the computation.
        const A factor = static_cast<A>(1.0 / split.sum);
        if (p_.grad_logits) {
          normalize_chunk(work + begin, end - begin, work + end, factor, work + begin, work + end);
          break;
        }
        for (std::int64_t c = begin; c < end; c += kChunk) {
          const std::int64_t count = std::min(kChunk, end - c);
          const Run<T> y = chunk_to_write(p_.output, split.row, c, count);
          normalize_chunk(work + c, count, work + c + count, factor, y.data, y.end);
          write_chunk_back(p_.output, split.row, c, count, y.data);
        }
        break;
      }
      case Step::kDot:
      case Step::kLogDot:
      case Step::kGradient:
        if (step == Step::kGradient && begin == 0) {
          set_grad_tau(split.row, split.log_dot, inverse_tau<A>(p_, split.row));
        }
        for (std::int64_t c = begin; c < end; c += kChunk) {
          const std::int64_t count = std::min(kChunk, end - c);
          if (work) {
            split_gradient(step, split, c, count, Run<const A>{work + c, work + c + count});
          } else {
            split_gradient(step, split, c, count,
                           read_chunk(p_, p_.output, split.row, c, count, y_buffer_));
          }
        }
        break;
    }
  }

  void write_uniform_row(std::int64_t row, RowKind kind, std::int64_t index) {
    T* out = p_.output.as<T>() + row_offset(p_, p_.output, row);
    const T value = kind == RowKind::kNaN ? nan_of<T>() : T{};
    for (std::int64_t c = 0; c < p_.classes; ++c) out[c * p_.output.class_stride] = value;
    if (kind == RowKind::kOrdinary) out[index * p_.output.class_stride] = rounded<T, A>(1);
  }

  bool allowed_at(std::int64_t row, std::int64_t c) const {
    return !p_.mask ||
           p_.mask
               .as<const std::uint8_t>()[row_offset(p_, p_.mask, row) + c * p_.mask.class_stride];
  }

  RowKind classify(std::int64_t row, Best<A>& best) const {
    return classify_row(best, p_.classes, [&](std::int64_t c) { return allowed_at(row, c); });
  }

 private:
  // ---- noise ------------------------------------------------------------------------------------

  // Noisy logits of whole rows, one after the other; inner == 1.
  void noisy_rows(std::int64_t row, std::int64_t rows, A* z, const A* z_end) {
    const Run<const T> x = read_rows(p_, p_.logits, row, rows, x_buffer_, kTile + kLanes);
    Run<const std::uint8_t> allowed{nullptr, nullptr};
    if (p_.mask) allowed = read_rows(p_, p_.mask, row, rows, mask_buffer_, kTile + kLanes);
    // Rows whose positions follow each other are one run.
    const std::int64_t runs = p_.positions.contiguous ? 1 : rows, count = rows * p_.classes / runs;
    for (std::int64_t r = 0; r < runs; ++r) {
      const std::int64_t at = r * count;
      add_gumbel_noise(noise_, noise_position(p_, row + r, 0), count, x.data + at, x.end,
                       allowed.data ? allowed.data + at : nullptr, allowed.end, z + at, z_end);
    }
  }

  // Noisy logits of one chunk of a long row; inner == 1.
  void noisy_logits(std::int64_t row, std::int64_t c, std::int64_t count, A* z, const A* z_end) {
    const Run<const T> x = read_chunk(p_, p_.logits, row, c, count, x_buffer_);
    Run<const std::uint8_t> allowed{nullptr, nullptr};
    if (p_.mask) allowed = read_chunk(p_, p_.mask, row, c, count, mask_buffer_);
    add_gumbel_noise(noise_, noise_position(p_, row, c), count, x.data, x.end, allowed.data,
                     allowed.end, z, z_end);
  }

  Run<T> chunk_to_write(const Operand& operand, std::int64_t row, std::int64_t c,
                        std::int64_t count) {
    if (operand.class_stride != 1) return {out_tile_, out_tile_ + kTile};
    T* start = operand.as<T>() + row_offset(p_, operand, row) + c;
    return {start, start + count};
  }
  void write_chunk_back(const Operand& operand, std::int64_t row, std::int64_t c,
                        std::int64_t count, const T* data) {
    if (data != out_tile_) return;
    T* start = operand.as<T>() + row_offset(p_, operand, row) + c * operand.class_stride;
    for (std::int64_t j = 0; j < count; ++j) start[j * operand.class_stride] = data[j];
  }

  // ---- soft -------------------------------------------------------------------------------------

  template <class Out>
  void soft_rows(std::int64_t row, std::int64_t rows, Run<Out> y, std::int64_t* index) {
    const std::int64_t classes = p_.classes;
    if (classes > kTile) {
      long_soft_row(row, y, index);
      return;
    }
    const A* z_end = z_buffer_ + kTile + kLanes;
    noisy_rows(row, rows, z_buffer_, z_end);
    if (classes <= kLanes) {
      if (classes <= kLanes / 2) {
        short_soft_rows<typename HalfOf<F>::type>(row, rows, y, index);
      } else {
        short_soft_rows<F>(row, rows, y, index);
      }
      return;
    }
    InverseTau<A> tau = inverse_tau<A>(p_, row);
    for (std::int64_t r = 0; r < rows; ++r) {
      if (p_.tau && r > 0) tau = inverse_tau<A>(p_, row + r);
      const A* z = z_buffer_ + r * classes;
      Best<A> best;
      update_best(best, z, classes, z_end, 0);
      const RowKind kind = classify(row + r, best);
      if (index) index[row + r] = best.index;
      soft_row(z, z_end, best, kind, tau.exponent_scale, e_buffer_, e_buffer_ + kTile + kLanes,
               y.data + r * classes, y.end);
    }
  }

  // The best class of a row that fits one vector, padded with -inf; -1 if the row is not an
  // ordinary one.
  template <class V>
  static GUMBEL_EXT_INLINE int short_best(const V& v, A& top) {
    using R = RealTraits<V>;
    top = largest(maximum(v, R::splat(-std::numeric_limits<A>::infinity())));
    const bool ordinary = !any(either_nan(v, v)) && top > -std::numeric_limits<A>::infinity();
    return ordinary ? __builtin_ctz(lane_bits(equal(v, R::splat(top)))) : -1;
  }

  // Rows that fit one vector stay in registers from the noisy logits in z_buffer_ to the output.
  template <class V, class Out>
  void short_soft_rows(std::int64_t row, std::int64_t rows, Run<Out> y, std::int64_t* index) {
    using R = RealTraits<V>;
    const std::int64_t classes = p_.classes;
    const auto used = first_lanes<V>(static_cast<int>(classes));
    const V lowest = R::splat(-std::numeric_limits<A>::infinity());
    const bool one_tau = !p_.tau;
    A scale = inverse_tau<A>(p_, row).exponent_scale;
    const A* z = z_buffer_;
    Out* out = y.data;
    for (std::int64_t r = 0; r < rows; ++r, z += classes, out += classes) {
      if (!one_tau) scale = inverse_tau<A>(p_, row + r).exponent_scale;
      const V v = select(used, load_as<V>(z), lowest);
      A top;
      const int at = short_best(v, top);
      if (__builtin_expect(at < 0, 0)) {
        Best<A> best;
        update_best(best, z, classes, z + classes, 0);
        const RowKind kind = classify(row + r, best);
        if (index) index[row + r] = best.index;
        std::fill(out, out + classes, kind == RowKind::kNaN ? nan_of<Out>() : Out{});
        continue;
      }
      if (index) index[row + r] = at;
      const V e = exp2_nonpositive((v - R::splat(top)) * R::splat(scale));
      const A factor = static_cast<A>(1.0 / static_cast<double>(sum(e)));
      store_run(out, e * R::splat(factor), classes, y.end);
    }
  }

  template <class Out>
  void long_soft_row(std::int64_t row, Run<Out> y, std::int64_t* index) {
    A* z = in_place(y.data);
    const A* z_end = z + p_.classes;
    Best<A> best;
    for (std::int64_t c = 0; c < p_.classes; c += kChunk) {
      const std::int64_t count = std::min(kChunk, p_.classes - c);
      noisy_logits(row, c, count, z + c, z + c + count);
      update_best(best, z + c, count, z + c + count, c);
    }
    const RowKind kind = classify(row, best);
    if (index) index[row] = best.index;
    soft_row(z, z_end, best, kind, inverse_tau<A>(p_, row).exponent_scale, z, z_end, y.data,
             y.data + p_.classes);
  }

  // Where a long row's noisy logits may lie: in its output, if that has their type.
  A* in_place(A* y) { return y; }
  template <class Out>
  A* in_place(Out*) {
    return z_scratch_.reserve(p_.classes);
  }

  template <class Out>
  void soft_row(const A* z, const A* z_end, const Best<A>& best, RowKind kind, A scale, A* e,
                const A* e_end, Out* y, const Out* y_end) {
    const std::int64_t classes = p_.classes;
    if (__builtin_expect(kind != RowKind::kOrdinary, 0)) {
      std::fill(y, y + classes, kind == RowKind::kNaN ? nan_of<Out>() : Out{});
      return;
    }
    double total = 0;
    for (std::int64_t c = 0; c < classes; c += kChunk) {
      total += exponentiate_chunk(z + c, std::min(kChunk, classes - c), z_end, best.value, scale,
                                  e + c, e_end);
    }
    normalize_chunk(e, classes, e_end, static_cast<A>(1.0 / total), y, y_end);
  }

  // ---- hard, index only -------------------------------------------------------------------------

  void pick_rows(std::int64_t row, std::int64_t rows) {
    const std::int64_t classes = p_.classes;
    const bool cleared = p_.output && p_.output.contiguous && p_.inner == 1;
    if (cleared) {
      std::memset(static_cast<void*>(p_.output.as<T>() + row * classes), 0,
                  static_cast<std::size_t>(rows * classes) * sizeof(T));
    }
    if (classes <= kLanes) {
      noisy_rows(row, rows, z_buffer_, z_buffer_ + kTile + kLanes);
      if (classes <= kLanes / 2) {
        short_pick_rows<typename HalfOf<F>::type>(row, rows, cleared);
      } else {
        short_pick_rows<F>(row, rows, cleared);
      }
      return;
    }
    if (classes > kTile) {
      for (std::int64_t r = 0; r < rows; ++r) {
        Best<A> best;
        for (std::int64_t c = 0; c < classes; c += kChunk) {
          search_chunk(best, row + r, c, std::min(kChunk, classes - c));
        }
        settle_pick(row + r, best, cleared);
      }
      return;
    }
    const Run<const T> x = read_rows(p_, p_.logits, row, rows, x_buffer_, kTile + kLanes);
    Run<const std::uint8_t> allowed{nullptr, nullptr};
    if (p_.mask) allowed = read_rows(p_, p_.mask, row, rows, mask_buffer_, kTile + kLanes);
    // Rows whose positions follow each other are searched in one run of them.
    const std::int64_t run = p_.positions.contiguous ? rows : 1;
    for (std::int64_t r = 0; r < rows; ++r) {
      if (r % run == 0) {
        prepare_search(noise_position(p_, row + r, 0), run * classes, rows_from(x, r),
                       rows_from(allowed, r));
      }
      Best<A> best;
      update_search(best, r % run * classes, classes, 0, rows_from(x, r), rows_from(allowed, r));
      settle_pick(row + r, best, cleared);
    }
  }

  // Continues the search over classes c, ..., c + count - 1 of a row; inner == 1.
  void search_chunk(Best<A>& best, std::int64_t row, std::int64_t c, std::int64_t count) {
    const Run<const T> x = read_chunk(p_, p_.logits, row, c, count, x_buffer_);
    Run<const std::uint8_t> allowed{nullptr, nullptr};
    if (p_.mask) allowed = read_chunk(p_, p_.mask, row, c, count, mask_buffer_);
    prepare_search(noise_position(p_, row, c), count, x, allowed);
    update_search(best, 0, count, c, x, allowed);
  }

  // What is left of a run of rows from its r-th on.
  template <class E>
  Run<const E> rows_from(const Run<const E>& run, std::int64_t r) const {
    return {run.data ? run.data + r * p_.classes : nullptr, run.end};
  }

  bool bounded() const {
    return std::is_same_v<A, float> && p_.classes >= kMinBoundedClasses && p_.noise;
  }
  void prepare_search(std::uint64_t n, std::int64_t count, const Run<const T>& x,
                      const Run<const std::uint8_t>& allowed) {
    if (bounded()) {
      search_.prepare(n, count);
    } else {
      add_gumbel_noise(noise_, n, count, x.data, x.end, allowed.data, allowed.end, z_buffer_,
                       static_cast<const A*>(z_buffer_ + kTile + kLanes));
    }
  }
  // `at`: the first of the prepared positions.
  void update_search(Best<A>& best, std::int64_t at, std::int64_t count, std::int64_t base,
                     const Run<const T>& x, const Run<const std::uint8_t>& allowed) {
    if constexpr (std::is_same_v<A, float>) {
      if (bounded()) {
        search_.update(best, at, x.data, x.end, allowed.data, allowed.end, count, base);
        return;
      }
    }
    update_best(best, z_buffer_ + at, count, z_buffer_ + kTile + kLanes, base);
  }

  template <class V>
  void short_pick_rows(std::int64_t row, std::int64_t rows, bool cleared) {
    const std::int64_t classes = p_.classes;
    const auto used = first_lanes<V>(static_cast<int>(classes));
    const V lowest = RealTraits<V>::splat(-std::numeric_limits<A>::infinity());
    const bool direct = cleared || !p_.output;
    T* out = cleared ? p_.output.as<T>() + row * classes : nullptr;
    std::int64_t* index = p_.index ? p_.index + row : nullptr;
    const A* z = z_buffer_;
    const T one = one_;
    for (std::int64_t r = 0; r < rows; ++r, z += classes) {
      A top;
      const int at = short_best(select(used, load_as<V>(z), lowest), top);
      if (__builtin_expect(at >= 0 && direct, 1)) {
        if (index) index[r] = at;
        if (out) out[r * classes + at] = one;
        continue;
      }
      Best<A> best;
      update_best(best, z, classes, z + classes, 0);
      settle_pick(row + r, best, cleared);
    }
  }

  void settle_pick(std::int64_t row, Best<A>& best, bool cleared) {
    const RowKind kind = classify(row, best);
    if (p_.index) p_.index[row] = best.index;
    if (!p_.output) return;
    if (cleared && kind == RowKind::kOrdinary) {
      p_.output.as<T>()[row * p_.classes + best.index] = one_;
    } else {
      write_uniform_row(row, kind, best.index);
    }
  }

  // ---- backward ---------------------------------------------------------------------------------

  template <class Y>
  void gradient_rows(std::int64_t row, std::int64_t rows, Run<const Y> y) {
    const std::int64_t classes = p_.classes;
    const Run<const T> grad =
        read_rows(p_, p_.grad, row, rows, large_or(x_buffer_, grad_scratch_, rows), capacity(rows));
    T* buffer = out_buffer(rows);
    const Run<T> out = rows_to_write(p_, p_.grad_logits, row, rows, buffer, capacity(rows));
    if (classes <= kLanes / 2 && !p_.grad_tau) {
      short_gradient_rows<typename HalfOf<F>::type>(row, rows, y, grad, out);
    } else if (classes <= kLanes && !p_.grad_tau) {
      short_gradient_rows<F>(row, rows, y, grad, out);
    } else {
      long_gradient_rows(row, rows, y, grad, out);
    }
    write_back(p_, p_.grad_logits, row, rows, out.data, buffer);
  }

  template <class Y>
  void long_gradient_rows(std::int64_t row, std::int64_t rows, const Run<const Y>& y,
                          const Run<const T>& grad, const Run<T>& out) {
    InverseTau<A> tau = inverse_tau<A>(p_, row);
    for (std::int64_t r = 0; r < rows; ++r) {
      if (p_.tau && r > 0) tau = inverse_tau<A>(p_, row + r);
      const std::int64_t at = r * p_.classes;
      gradient_row(row + r, y.data + at, y.end, grad.data + at, grad.end, tau, out.data + at,
                   out.end);
    }
  }

  // Rows that fit one vector. What the loop needs of p_ is copied: the compiler cannot know that
  // the rows it writes are not part of it.
  template <class V, class Y>
  void short_gradient_rows(std::int64_t row, std::int64_t rows, Run<const Y> y, Run<const T> grad,
                           Run<T> out) {
    using R = RealTraits<V>;
    const std::int64_t classes = p_.classes;
    const std::int64_t* index = p_.index + row;
    const auto used = first_lanes<V>(static_cast<int>(classes));
    const bool one_tau = !p_.tau;
    A inverse = inverse_tau<A>(p_, row).inverse;
    for (std::int64_t r = 0; r < rows; ++r) {
      if (!one_tau) inverse = inverse_tau<A>(p_, row + r).inverse;
      if (__builtin_expect(index[r] < 0, 0)) {
        std::fill(out.data, out.data + classes, T{});
      } else {
        const V p = select(used, load_run_as<V>(y.data, classes, y.end), R::splat(0));
        const V h = load_run_as<V>(grad.data, classes, grad.end) -
                    R::splat(widened<A>(grad.data[index[r]]));
        const A dot = sum(fma(select(used, h, R::splat(0)), p, R::splat(0)));
        store_run(out.data, p * (h - R::splat(dot)) * R::splat(inverse), classes, out.end);
      }
      y.data += classes;
      grad.data += classes;
      out.data += classes;
    }
  }

  template <class Y>
  void gradient_row(std::int64_t row, const Y* y, const Y* y_end, const T* grad, const T* grad_end,
                    const InverseTau<A>& tau, T* out, const T* out_end) {
    const std::int64_t classes = p_.classes, index = p_.index[row];
    if (__builtin_expect(index < 0, 0)) {
      std::fill(out, out + classes, T{});
      set_grad_tau(row, 0, tau);
      return;
    }
    const A shift = widened<A>(grad[index]);
    double total = 0;
    for (std::int64_t c = 0; c < classes; c += kChunk) {
      total += dot_chunk(y + c, y_end, grad + c, grad_end, std::min(kChunk, classes - c), shift);
    }
    const A dot = static_cast<A>(total);
    if (p_.grad_tau) {
      double log_total = 0;
      for (std::int64_t c = 0; c < classes; c += kChunk) {
        log_total += log_dot_chunk(y + c, y_end, grad + c, grad_end, std::min(kChunk, classes - c),
                                   shift, dot);
      }
      set_grad_tau(row, log_total, tau);
    }
    gradient_chunk(y, y_end, grad, grad_end, classes, shift, dot, tau.inverse, out, out_end);
  }

  void set_grad_tau(std::int64_t row, double log_dot, const InverseTau<A>& tau) {
    if (p_.grad_tau) static_cast<A*>(p_.grad_tau)[row] = static_cast<A>(-log_dot) * tau.inverse;
  }

  template <class Y>
  void split_gradient(Step step, const SplitRow& split, std::int64_t c, std::int64_t count,
                      Run<const Y> y) {
    const Run<const T> grad = read_chunk(p_, p_.grad, split.row, c, count, x_buffer_);
    const std::int64_t index = p_.index[split.row];
    const A shift = widened<A>(
        p_.grad.as<const T>()[row_offset(p_, p_.grad, split.row) + index * p_.grad.class_stride]);
    const A dot = static_cast<A>(split.dot);
    if (step == Step::kDot) {
      split.chunks[c / kChunk].sum = dot_chunk(y.data, y.end, grad.data, grad.end, count, shift);
    } else if (step == Step::kLogDot) {
      split.chunks[c / kChunk].sum =
          log_dot_chunk(y.data, y.end, grad.data, grad.end, count, shift, dot);
    } else {
      const Run<T> out = chunk_to_write(p_.grad_logits, split.row, c, count);
      gradient_chunk(y.data, y.end, grad.data, grad.end, count, shift, dot,
                     inverse_tau<A>(p_, split.row).inverse, out.data, out.end);
      write_chunk_back(p_.grad_logits, split.row, c, count, out.data);
    }
  }

  // ---- slabs ------------------------------------------------------------------------------------

  void slab(std::int64_t outer, bool recompute) {
    constexpr std::int64_t kMaxInner = 16;
    const std::int64_t classes = p_.classes, inner = p_.inner, first_row = outer * inner;
    const bool soft = recompute || (p_.output && !p_.hard);
    const std::int64_t step = kTile / inner;
    // Soft rows are kept whole until their sum is known; for the others one run of classes at a
    // time will do.
    const std::int64_t pitch = (soft ? classes : step) + kLanes;
    A* rows = z_scratch_.reserve(inner * pitch);
    Best<A> best[kMaxInner];
    for (std::int64_t c = 0; c < classes; c += step) {
      const std::int64_t count = std::min(step, classes - c);
      const Run<const T> x = read_slab(p_, p_.logits, first_row, c, count, x_buffer_);
      Run<const std::uint8_t> allowed{nullptr, nullptr};
      if (p_.mask) allowed = read_slab(p_, p_.mask, first_row, c, count, mask_buffer_);
      add_gumbel_noise(noise_, noise_position(p_, first_row, c), count * inner, x.data, x.end,
                       allowed.data, allowed.end, z_buffer_,
                       static_cast<const A*>(z_buffer_ + kTile + kLanes));
      for (std::int64_t i = 0; i < inner; ++i) {
        A* z = rows + i * pitch + (soft ? c : 0);
        for (std::int64_t j = 0; j < count; ++j) z[j] = z_buffer_[j * inner + i];
        update_best(best[i], z, count, z + count, c);
      }
    }
    for (std::int64_t i = 0; i < inner; ++i) {
      const std::int64_t row = first_row + i;
      if (!soft) {
        settle_pick(row, best[i], false);
        continue;
      }
      const RowKind kind = classify(row, best[i]);
      const InverseTau<A> tau = inverse_tau<A>(p_, row);
      A* z = rows + i * pitch;
      const A* z_end = z + pitch;
      if (recompute) {
        soft_row(z, z_end, best[i], kind, tau.exponent_scale, z, z_end, z, z_end);
        gradient_rows(row, 1, Run<const A>{z, z_end});
        continue;
      }
      if (p_.index) p_.index[row] = best[i].index;
      T* buffer = out_scratch_.reserve(classes + kLanes);
      soft_row(z, z_end, best[i], kind, tau.exponent_scale, z, z_end, buffer,
               buffer + classes + kLanes);
      write_back(p_, p_.output, row, 1, buffer, buffer);
    }
  }

  // ---- buffers ----------------------------------------------------------------------------------

  std::int64_t capacity(std::int64_t rows) const {
    return std::max(kTile, rows * p_.classes) + kLanes;
  }

  // A tile of rows fits a fixed buffer; a long row that has to be gathered does not.
  template <class E>
  E* large_or(E* tile, Scratch<E>& scratch, std::int64_t rows) {
    return rows * p_.classes <= kTile ? tile : scratch.reserve(capacity(rows));
  }
  T* out_buffer(std::int64_t rows) { return large_or(out_tile_, out_scratch_, rows); }

  const Problem& p_;
  NoiseSource noise_;
  const T one_ = rounded<T, A>(1);
  alignas(64) A z_buffer_[kTile + kLanes];
  alignas(64) A e_buffer_[kTile + kLanes];
  alignas(64) A soft_buffer_[kTile + kLanes];
  alignas(64) T x_buffer_[kTile + kLanes];
  alignas(64) T y_buffer_[kTile + kLanes];
  alignas(64) T out_tile_[kTile + kLanes];
  alignas(64) std::uint8_t mask_buffer_[kTile + kLanes];
  BoundedSearch search_;
  Scratch<A> z_scratch_, soft_scratch_;
  Scratch<T> y_scratch_, grad_scratch_, out_scratch_;
};

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
