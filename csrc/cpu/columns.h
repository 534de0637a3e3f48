// Regime kColumns: vectorised across up to 64 neighbouring rows, one class after the other. For
// softmax dimensions that are not the last, where neighbouring rows have neighbouring noise
// positions. Sums keep the order of row_math.h: sixteen partial sums by class index mod 16 in each
// chunk, the same tree, chunk sums in double.
#pragma once

#include "operands.h"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

using cpu::kColumns;

// The columns of one operand that a tile works on.
template <class E>
struct ColumnView {
  E* base;
  std::int64_t class_stride;
  bool adjacent;
  const E* end;
  std::int64_t offset[kColumns];

  ColumnView(const Problem& p, const Operand& operand, std::int64_t first_row, std::int64_t width)
      : base(operand.as<E>()), class_stride(operand.class_stride), adjacent(true), end(nullptr) {
    if (operand.contiguous) {
      end = base + p.rows() * p.classes;
      offset[0] = row_offset(p, operand, first_row);
      for (std::int64_t j = 1; j < width; ++j) offset[j] = offset[0] + j;
      return;
    }
    for (std::int64_t j = 0; j < width; ++j) {
      offset[j] = row_offset(p, operand, first_row + j);
      adjacent = adjacent && offset[j] == offset[0] + j;
    }
  }

  // Neighbouring classes lie whole pages apart where the inner dimension is long, and no hardware
  // prefetcher looks beyond a page.
  GUMBEL_EXT_INLINE void prefetch(std::int64_t c, std::int64_t width, std::int64_t classes) const {
    if (!adjacent || c >= classes) return;
    const char* start = reinterpret_cast<const char*>(base + offset[0] + c * class_stride);
    for (std::int64_t byte = 0; byte < width * static_cast<std::int64_t>(sizeof(E)); byte += 64) {
      __builtin_prefetch(start + byte, std::is_const_v<E> ? 0 : 1);
    }
  }

  Run<const E> read(std::int64_t c, std::int64_t width, std::remove_const_t<E>* buffer) const {
    if (adjacent) {
      const E* start = base + offset[0] + c * class_stride;
      return {start, end ? end : start + width};
    }
    for (std::int64_t j = 0; j < width; ++j) buffer[j] = base[offset[j] + c * class_stride];
    return {buffer, buffer + kColumns};
  }
};

// The columns of a tile in runs whose noise positions follow each other: one run, unless the logits
// are part of a larger tensor.
class NoiseRuns {
 public:
  void find(const Problem& p, std::int64_t first_row, std::int64_t width) {
    run_[0] = {0, width, noise_position(p, first_row, 0)};
    runs_ = 1;
    for (std::int64_t j = 1; j < width && !p.positions.contiguous; ++j) {
      NoiseRun& last = run_[runs_ - 1];
      const std::uint64_t position = noise_position(p, first_row + j, 0);
      if (position == last.position + static_cast<std::uint64_t>(j - last.begin)) continue;
      last.end = j;
      run_[runs_++] = {j, width, position};
    }
  }

  // z = logits + noise of class c, a column each.
  template <class T, class A>
  void add_noise(NoiseSource& noise, const Problem& p, std::int64_t c, const Run<const T>& logits,
                 const Run<const std::uint8_t>& allowed, A* z, const A* z_end) const {
    const std::uint64_t of_class =
        static_cast<std::uint64_t>(c) * static_cast<std::uint64_t>(p.positions.class_stride);
    for (int r = 0; r < runs_; ++r) {
      const NoiseRun& run = run_[r];
      add_gumbel_noise(noise, run.position + of_class, run.end - run.begin, logits.data + run.begin,
                       logits.end, allowed.data ? allowed.data + run.begin : nullptr, allowed.end,
                       z + run.begin, z_end);
    }
  }

 private:
  struct NoiseRun {
    std::int64_t begin, end;
    std::uint64_t position;  // of column `begin`, class 0
  };
  int runs_ = 0;
  NoiseRun run_[kColumns];
};

template <class T>
class ColumnWorker {
 public:
  using A = typename ComputeType<T>::type;
  using F = Vector<A>;
  static constexpr int kPacks = kColumns / kLanes;
  // How many classes ahead to prefetch (measured at [4, 8192, 32, 32]).
  static constexpr std::int64_t kPrefetchReads = 4, kPrefetchWrites = 16;

  ColumnWorker(const Problem& problem, std::int64_t tile)
      : p_(problem), noise_(problem.seed, problem.offset, !problem.noise), tile_(tile) {}

  void forward(std::int64_t task) {
    start(task);
    const bool soft = p_.output && !p_.hard;
    search(soft);
    if (p_.index) {
      for (std::int64_t j = 0; j < width_; ++j) p_.index[first_row_ + j] = best_[j].index;
    }
    if (!p_.output) return;
    const ColumnView<T> y(p_, p_.output, first_row_, width_);
    if (soft) {
      exponentiate();
      write_soft(y);
    } else {
      write_hard(y);
    }
    for (std::int64_t j = 0; j < width_; ++j) {
      if (kind_[j] == RowKind::kOrdinary) continue;
      const T value = kind_[j] == RowKind::kNaN ? nan_of<T>() : T{};
      for (std::int64_t c = 0; c < p_.classes; ++c)
        y.base[y.offset[j] + c * y.class_stride] = value;
    }
  }

  void backward(std::int64_t task) {
    start(task);
    const ColumnView<const T> y(p_, p_.output, first_row_, width_);
    T buffer[kColumns];
    gradient([&](std::int64_t c) __attribute__((always_inline)) {
      y.prefetch(c + kPrefetchReads, width_, p_.classes);
      return y.read(c, width_, buffer);
    });
  }

  void backward_recompute(std::int64_t task) {
    start(task);
    search(true);
    exponentiate();
    for (std::int64_t c = 0; c < p_.classes; ++c) {
      A* z = z_row(c);
      for (std::int64_t k = 0; k < packs(); ++k)
        store(z + kLanes * k, load(z + kLanes * k) * load(factor_ + kLanes * k));
    }
    for (std::int64_t j = 0; j < width_; ++j) {
      if (kind_[j] == RowKind::kOrdinary) continue;
      const A value = kind_[j] == RowKind::kNaN ? nan_of<A>() : A{};
      for (std::int64_t c = 0; c < p_.classes; ++c) z_row(c)[j] = value;
    }
    gradient([&](std::int64_t c) __attribute__((always_inline)) {
      return Run<const A>{z_row(c), z_row(c) + kColumns};
    });
  }

 private:
  std::int64_t packs() const { return (width_ + kLanes - 1) / kLanes; }
  A* z_row(std::int64_t c) { return z_ + c * pitch_; }

  void start(std::int64_t task) {
    const std::int64_t tiles = (p_.inner + tile_ - 1) / tile_;
    const std::int64_t outer = task / tiles, first_inner = task % tiles * tile_;
    width_ = std::min(tile_, p_.inner - first_inner);
    first_row_ = outer * p_.inner + first_inner;
    for (std::int64_t j = 0; j < kColumns; ++j) {
      const InverseTau<A> tau =
          inverse_tau<A>(p_, first_row_ + (p_.tau ? std::min(j, width_ - 1) : 0));
      scale_[j] = tau.exponent_scale;
      inverse_[j] = tau.inverse;
      if (!p_.tau) {
        std::fill(scale_, scale_ + kColumns, tau.exponent_scale);
        std::fill(inverse_, inverse_ + kColumns, tau.inverse);
        break;
      }
    }
  }

  // Finds the best class of every column; keeps the noisy logits if asked to.
  void search(bool keep) {
    const std::int64_t classes = p_.classes;
    pitch_ = keep ? packs() * kLanes : 0;
    z_ = z_scratch_.reserve(std::max<std::int64_t>(classes * pitch_, kColumns));
    const ColumnView<const T> x(p_, p_.logits, first_row_, width_);
    std::unique_ptr<ColumnView<const std::uint8_t>> mask;
    if (p_.mask) mask.reset(new ColumnView<const std::uint8_t>(p_, p_.mask, first_row_, width_));
    for (std::int64_t j = 0; j < width_; ++j) best_[j] = Best<A>();
    noise_runs_.find(p_, first_row_, width_);

    const F lowest = RealTraits<F>::splat(-std::numeric_limits<A>::infinity());
    A high[kColumns], at[kColumns];
    T x_buffer[kColumns];
    std::uint8_t mask_buffer[kColumns];
    for (std::int64_t first = 0; first < classes; first += kChunk) {
      const std::int64_t last = std::min(classes, first + kChunk);
      for (int k = 0; k < kPacks; ++k) {
        store(high + kLanes * k, lowest);
        store(at + kLanes * k, RealTraits<F>::splat(0));
      }
      for (std::int64_t c = first; c < last; ++c) {
        x.prefetch(c + kPrefetchReads, width_, classes);
        const Run<const T> row = x.read(c, width_, x_buffer);
        Run<const std::uint8_t> allowed{nullptr, nullptr};
        if (mask) allowed = mask->read(c, width_, mask_buffer);
        A* z = z_row(c);
        noise_runs_.add_noise(noise_, p_, c, row, allowed, z,
                              static_cast<const A*>(z + packs() * kLanes));
        const F here = RealTraits<F>::splat(static_cast<A>(c - first));
        for (std::int64_t k = 0; k < packs(); ++k) {
          const F v = load(z + kLanes * k), h = load(high + kLanes * k);
          const auto better = less(h, v);
          store(high + kLanes * k, select(better, v, h));
          store(at + kLanes * k, select(better, here, load(at + kLanes * k)));
          const auto nan = either_nan(v, v);
          if (__builtin_expect(any(nan), 0)) note_nan(lane_bits(nan), k, c);
        }
      }
      for (std::int64_t j = 0; j < width_; ++j) {
        Best<A>& best = best_[j];
        if (!best.nan && high[j] > best.value) {
          best.value = high[j];
          best.index = first + static_cast<std::int64_t>(at[j]);
        }
      }
    }
    for (std::int64_t j = 0; j < width_; ++j) {
      kind_[j] = classify_row(best_[j], classes, [&](std::int64_t c) {
        return !mask || mask->base[mask->offset[j] + c * mask->class_stride] != 0;
      });
    }
  }

  void note_nan(unsigned lanes, std::int64_t pack, std::int64_t c) {
    for (; lanes; lanes &= lanes - 1) {
      const std::int64_t j = kLanes * pack + __builtin_ctz(lanes);
      if (j < width_ && !best_[j].nan) {
        best_[j].nan = true;
        best_[j].index = c;
      }
    }
  }

  void exponentiate() {
    A largest[kColumns];
    for (std::int64_t j = 0; j < kColumns; ++j) largest[j] = j < width_ ? best_[j].value : A{};
    sum_over_classes([&](std::int64_t c, A* sums) __attribute__((always_inline)) {
      A* z = z_row(c);
      for (std::int64_t k = 0; k < packs(); ++k, z += kLanes, sums += kLanes) {
        const F e =
            exp2_nonpositive((load(z) - load(largest + kLanes * k)) * load(scale_ + kLanes * k));
        store(z, e);
        store(sums, load(sums) + e);
      }
    });
    for (std::int64_t j = 0; j < width_; ++j) factor_[j] = static_cast<A>(1.0 / total_[j]);
    for (std::int64_t j = width_; j < kColumns; ++j) factor_[j] = 0;
  }

  // total_[j] = sum over classes of what `accumulate(class, partial sums)` adds to the latter.
  template <class Accumulate>
  void sum_over_classes(Accumulate accumulate) {
    alignas(64) A partial[kLanes][kColumns];
    for (std::int64_t j = 0; j < kColumns; ++j) total_[j] = 0;
    for (std::int64_t first = 0; first < p_.classes; first += kChunk) {
      const std::int64_t last = std::min(p_.classes, first + kChunk);
      for (std::int64_t k = 0; k < packs(); ++k) {
        for (int lane = 0; lane < kLanes; ++lane)
          store(partial[lane] + kLanes * k, RealTraits<F>::splat(0));
      }
      for (std::int64_t c = first; c < last; ++c) {
        accumulate(c, partial[c % kLanes]);
      }
      for (std::int64_t k = 0; k < packs(); ++k) {
        for (int half = kLanes / 2; half > 0; half /= 2) {
          for (int lane = 0; lane < half; ++lane) {
            A* sums = partial[lane] + kLanes * k;
            store(sums, load(sums) + load(partial[lane + half] + kLanes * k));
          }
        }
      }
      for (std::int64_t j = 0; j < width_; ++j) total_[j] += partial[0][j];
    }
  }

  // Writes value(k), k = 0, 1, ..., as the packs of class c.
  template <class Value>
  GUMBEL_EXT_INLINE void write_class(const ColumnView<T>& out, std::int64_t c, Value value) {
    out.prefetch(c + kPrefetchWrites, width_, p_.classes);
    if (out.adjacent) {
      T* start = out.base + out.offset[0] + c * out.class_stride;
      const T* end = start + width_;
      for (std::int64_t k = 0; k < packs(); ++k) {
        store_run(start + kLanes * k, value(k), width_ - kLanes * k, end);
      }
      return;
    }
    T buffer[kColumns];
    for (std::int64_t k = 0; k < packs(); ++k) store(buffer + kLanes * k, value(k));
    for (std::int64_t j = 0; j < width_; ++j) {
      out.base[out.offset[j] + c * out.class_stride] = buffer[j];
    }
  }

  void write_soft(const ColumnView<T>& y) {
    for (std::int64_t c = 0; c < p_.classes; ++c) {
      const A* z = z_row(c);
      write_class(y, c, [&](std::int64_t k) __attribute__((always_inline)) {
        return load(z + kLanes * k) * load(factor_ + kLanes * k);
      });
    }
  }

  void write_hard(const ColumnView<T>& y) {
    for (std::int64_t c = 0; c < p_.classes; ++c) {
      write_class(y, c, [](std::int64_t) __attribute__((always_inline)) {
        return RealTraits<F>::splat(0);
      });
    }
    const T one = rounded<T, A>(1);
    for (std::int64_t j = 0; j < width_; ++j) {
      if (kind_[j] == RowKind::kOrdinary)
        y.base[y.offset[j] + best_[j].index * y.class_stride] = one;
    }
  }

  // `y_row(c)` gives the soft y of class c; see row_math.h for the formula.
  template <class YRow>
  void gradient(YRow y_row) {
    const ColumnView<const T> grad(p_, p_.grad, first_row_, width_);
    const std::int64_t* index = p_.index + first_row_;
    alignas(64) A shift[kColumns] = {}, dot[kColumns] = {};
    for (std::int64_t j = 0; j < width_; ++j) {
      if (index[j] >= 0)
        shift[j] = widened<A>(grad.base[grad.offset[j] + index[j] * grad.class_stride]);
    }
    T grad_buffer[kColumns];
    // The packs of a class one after the other: use(k, y, dy - dy[index]).
    const auto for_packs = [&](std::int64_t c, auto use) __attribute__((always_inline)) {
      grad.prefetch(c + kPrefetchReads, width_, p_.classes);
      const Run<const T> g = grad.read(c, width_, grad_buffer);
      const auto y = y_row(c);
      for (std::int64_t k = 0; k < packs(); ++k) {
        const std::int64_t at = kLanes * k;
        use(k, load_run(y.data + at, width_ - at, y.end),
            load_run(g.data + at, width_ - at, g.end) - load(shift + at));
      }
    };
    sum_over_classes([&](std::int64_t c, A* sums) __attribute__((always_inline)) {
      for_packs(c, [&](std::int64_t k, const F& y, const F& h) __attribute__((always_inline)) {
        store(sums + kLanes * k, fma(h, y, load(sums + kLanes * k)));
      });
    });
    for (std::int64_t j = 0; j < width_; ++j) dot[j] = static_cast<A>(total_[j]);
    if (p_.grad_tau) {
      sum_over_classes([&](std::int64_t c, A* sums) {
        for_packs(c, [&](std::int64_t k, const F& y, const F& h) {
          store(sums + kLanes * k,
                load(sums + kLanes * k) + log_dot_term(y, h, load(dot + kLanes * k)));
        });
      });
      for (std::int64_t j = 0; j < width_; ++j) {
        static_cast<A*>(p_.grad_tau)[first_row_ + j] =
            static_cast<A>(index[j] < 0 ? -0.0 : -total_[j]) * inverse_[j];
      }
    }
    const ColumnView<T> out(p_, p_.grad_logits, first_row_, width_);
    for (std::int64_t c = 0; c < p_.classes; ++c) {
      grad.prefetch(c + kPrefetchReads, width_, p_.classes);
      const Run<const T> g = grad.read(c, width_, grad_buffer);
      const auto y = y_row(c);
      write_class(out, c, [&](std::int64_t k) __attribute__((always_inline)) {
        const std::int64_t at = kLanes * k;
        const F h = load_run(g.data + at, width_ - at, g.end) - load(shift + at);
        return load_run(y.data + at, width_ - at, y.end) * (h - load(dot + at)) *
               load(inverse_ + at);
      });
    }
    for (std::int64_t j = 0; j < width_; ++j) {
      if (index[j] >= 0) continue;
      for (std::int64_t c = 0; c < p_.classes; ++c)
        out.base[out.offset[j] + c * out.class_stride] = T{};
    }
  }

  const Problem& p_;
  NoiseSource noise_;
  const std::int64_t tile_;
  std::int64_t first_row_ = 0, width_ = 0, pitch_ = 0;
  NoiseRuns noise_runs_;
  A* z_ = nullptr;
  Scratch<A> z_scratch_;
  Best<A> best_[kColumns];
  RowKind kind_[kColumns];
  double total_[kColumns];
  alignas(64) A scale_[kColumns], inverse_[kColumns], factor_[kColumns];
};

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
