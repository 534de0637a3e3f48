// gumbel_topk: the k best classes of each row, in the regimes of the index alone.
#pragma once

#include "columns.h"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

template <class T>
class TopKWorker {
 public:
  using A = typename ComputeType<T>::type;
  using F = Vector<A>;

  explicit TopKWorker(const Problem& problem)
      : p_(problem), noise_(problem.seed, problem.offset), search_(noise_) {}

  // ---- kRows

  void rows(std::int64_t row, std::int64_t rows) {
    const std::int64_t classes = p_.classes;
    TopClasses<A>& top = top_[0];
    if (classes > kTile) {
      for (std::int64_t r = row; r < row + rows; ++r) {
        top.start(p_.k, classes);
        part_of_row(top, r, 0, classes);
        write(r, top);
      }
      return;
    }
    const Run<const T> x = read_rows(p_, p_.logits, row, rows, x_buffer_, kTile + kLanes);
    Run<const std::uint8_t> allowed{nullptr, nullptr};
    if (p_.mask) allowed = read_rows(p_, p_.mask, row, rows, mask_buffer_, kTile + kLanes);
    // Rows whose positions follow each other are prepared in one run of them.
    const std::int64_t run = p_.positions.contiguous ? rows : 1;
    for (std::int64_t r = 0; r < rows; ++r) {
      const Run<const T> logits{x.data + r * classes, x.end};
      const Run<const std::uint8_t> may{allowed.data ? allowed.data + r * classes : nullptr,
                                        allowed.end};
      if (r % run == 0) prepare(noise_position(p_, row + r, 0), run * classes, logits, may);
      top.start(p_.k, classes);
      update(top, r % run * classes, classes, 0, logits, may);
      write(row + r, top);
    }
  }

  // Continues with classes [begin, end) of a long row.
  void part_of_row(TopClasses<A>& top, std::int64_t row, std::int64_t begin, std::int64_t end) {
    for (std::int64_t c = begin; c < end; c += kChunk) {
      const std::int64_t count = std::min(kChunk, end - c);
      const Run<const T> x = read_chunk(p_, p_.logits, row, c, count, x_buffer_);
      Run<const std::uint8_t> allowed{nullptr, nullptr};
      if (p_.mask) allowed = read_chunk(p_, p_.mask, row, c, count, mask_buffer_);
      prepare(noise_position(p_, row, c), count, x, allowed);
      update(top, 0, count, c, x, allowed);
    }
  }

  // ---- kSlabs

  void slab(std::int64_t outer) {
    const std::int64_t classes = p_.classes, inner = p_.inner, first_row = outer * inner;
    const std::int64_t step = kTile / inner;
    for (std::int64_t i = 0; i < inner; ++i) top_[i].start(p_.k, classes);
    for (std::int64_t c = 0; c < classes; c += step) {
      const std::int64_t count = std::min(step, classes - c);
      const Run<const T> x = read_slab(p_, p_.logits, first_row, c, count, x_buffer_);
      Run<const std::uint8_t> allowed{nullptr, nullptr};
      if (p_.mask) allowed = read_slab(p_, p_.mask, first_row, c, count, mask_buffer_);
      add_noise(noise_position(p_, first_row, c), count * inner, x, allowed);
      for (std::int64_t i = 0; i < inner; ++i) {
        for (std::int64_t j = 0; j < count; ++j) row_buffer_[j] = z_buffer_[j * inner + i];
        update_top(top_[i], row_buffer_, count, end_of(row_buffer_), c);
      }
    }
    for (std::int64_t i = 0; i < inner; ++i) write(first_row + i, top_[i]);
  }

  // ---- kColumns

  void columns(std::int64_t task, std::int64_t tile) {
    const std::int64_t tiles = (p_.inner + tile - 1) / tile, first_inner = task % tiles * tile;
    const std::int64_t width = std::min(tile, p_.inner - first_inner);
    const std::int64_t first_row = task / tiles * p_.inner + first_inner;
    const ColumnView<const T> x(p_, p_.logits, first_row, width);
    std::unique_ptr<ColumnView<const std::uint8_t>> mask;
    if (p_.mask) mask.reset(new ColumnView<const std::uint8_t>(p_, p_.mask, first_row, width));
    NoiseRuns noise_runs;
    noise_runs.find(p_, first_row, width);
    alignas(64) A bars[kColumns];
    std::fill(bars, bars + kColumns, -std::numeric_limits<A>::infinity());
    for (std::int64_t j = 0; j < width; ++j) top_[j].start(p_.k, p_.classes);
    A* z = z_buffer_;
    for (std::int64_t c = 0; c < p_.classes; ++c) {
      const Run<const T> row = x.read(c, width, x_buffer_);
      Run<const std::uint8_t> allowed{nullptr, nullptr};
      if (mask) allowed = mask->read(c, width, mask_buffer_);
      noise_runs.add_noise(noise_, p_, c, row, allowed, z, end_of(z_buffer_));
      for (std::int64_t j = 0; j < width; j += kLanes) {
        const F v = load(z + j);
        unsigned lanes =
            lane_bits(less(load(bars + j), v) | either_nan(v, v)) & first_bits(width - j);
        for (; lanes; lanes &= lanes - 1) {
          const std::int64_t column = j + __builtin_ctz(lanes);
          top_[column].take(z[column], c);
          bars[column] = top_[column].bar();
        }
      }
    }
    for (std::int64_t j = 0; j < width; ++j) write(first_row + j, top_[j]);
  }

 private:
  void write(std::int64_t row, TopClasses<A>& top) {
    top.write(p_.index + row / p_.inner * p_.k * p_.inner + row % p_.inner, p_.inner);
  }

  void add_noise(std::uint64_t n, std::int64_t count, const Run<const T>& x,
                 const Run<const std::uint8_t>& allowed) {
    add_gumbel_noise(noise_, n, count, x.data, x.end, allowed.data, allowed.end, z_buffer_,
                     end_of(z_buffer_));
  }

  // As RowWorker searches: by bounds where those pay, and from the k-th best on they pay the later
  // the larger k is.
  bool bounded() const {
    return std::is_same_v<A, float> && p_.classes >= kMinBoundedClasses * p_.k;
  }
  void prepare(std::uint64_t n, std::int64_t count, const Run<const T>& x,
               const Run<const std::uint8_t>& allowed) {
    if (bounded()) {
      search_.prepare(n, count);
    } else {
      add_noise(n, count, x, allowed);
    }
  }
  void update(TopClasses<A>& top, std::int64_t at, std::int64_t count, std::int64_t base,
              const Run<const T>& x, const Run<const std::uint8_t>& allowed) {
    if constexpr (std::is_same_v<A, float>) {
      if (bounded()) {
        search_.update(top, at, x.data, x.end, allowed.data, allowed.end, count, base);
        return;
      }
    }
    update_top(top, z_buffer_ + at, count, end_of(z_buffer_), base);
  }

  static const A* end_of(const A (&buffer)[kTile + kLanes]) { return buffer + kTile + kLanes; }

  const Problem& p_;
  NoiseSource noise_;
  alignas(64) A z_buffer_[kTile + kLanes];
  alignas(64) A row_buffer_[kTile + kLanes];
  alignas(64) T x_buffer_[kTile + kLanes];
  alignas(64) std::uint8_t mask_buffer_[kTile + kLanes];
  BoundedSearch search_;
  TopClasses<A> top_[kColumns];
};

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
