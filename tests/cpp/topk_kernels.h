// gumbel_topk's CPU kernels: the same choice however the work is cut, in every layout and on every
// instruction set, and nothing touched outside. That it is the right one is tests/test_topk.py's
// matter.
#pragma once

#include "cpu/execute.h"
#include "strided.h"

namespace gumbel_ext {
namespace cpu {

struct TopKCase {
  ElementType type;
  Extent size;
  std::int64_t k;
  Laying laying;
  bool masked, special, part;  // part: positions are those of a part of a larger tensor

  std::string name() const {
    return std::string(name_of(type)) + " [" + std::to_string(size.outer) + ", " +
           std::to_string(size.classes) + ", " + std::to_string(size.inner) + "] k " +
           std::to_string(k) + " layout " + std::to_string(static_cast<int>(laying));
  }
};

inline std::vector<TopKCase> topk_cases() {
  struct Sizes {
    Extent size;
    std::int64_t k;
  };
  // Short rows, rows searched by bounds, rows longer than a tile, slabs, columns, and a row that is
  // shared among threads.
  const Sizes sizes[] = {{{7, 1, 1}, 1},     {{21, 33, 1}, 5},  {{3, 500, 1}, 2},
                         {{3, 1031, 1}, 77}, {{2, 2500, 1}, 3}, {{2, 2500, 1}, 2500},
                         {{3, 65, 5}, 4},    {{2, 700, 5}, 65}, {{2, 33, 17}, 33},
                         {{2, 40, 67}, 3},   {{2, 20001, 1}, 5}};
  std::vector<TopKCase> cases;
  std::mt19937 flip(7);
  for (const ElementType type : kElementTypes) {
    for (const Sizes& s : sizes) {
      for (const Laying laying : kLayings) {
        if (s.size.classes > 10000 && laying != Laying::kContiguous) continue;
        cases.push_back(
            {type, s.size, s.k, laying, flip() % 2 == 0, flip() % 2 == 0, flip() % 2 == 0});
      }
    }
  }
  return cases;
}

// Cut in one, cut in five, contiguous.
constexpr int kTopKVariants = 3;

inline std::vector<char> compute_topk(const KernelTable& table, const TopKCase& c, int variant) {
  const Extent &size = c.size, plain = strides_of(Laying::kContiguous, size, false);
  Strided logits = random_strided(c.type, size, strides_of(c.laying, size, false), -4, 11);
  if (c.special) {
    set_some(logits, c.type, 3, -HUGE_VAL);
    set_some(logits, c.type, 101, std::nan(""));
  }
  Strided mask = some_mask(size, logits.stride);
  const bool contiguous = variant == 2 || c.laying == Laying::kContiguous;
  if (variant == 2) {
    logits = logits.moved(plain);
    mask = mask.moved(plain);
  }
  std::vector<std::int64_t> index(static_cast<std::size_t>(size.rows() * c.k), -7);

  Problem p{};
  p.type = c.type;
  p.outer = size.outer;
  p.classes = size.classes;
  p.inner = size.inner;
  p.dims = 2;
  p.size[0] = size.outer;
  p.size[1] = size.inner;
  p.seed = 0x1234567890ABCDEFu;
  p.offset = 3;
  p.first_position = 2;
  const std::int64_t gap = c.part ? 3 : 0;
  p.positions.stride[0] = (size.classes + gap) * (size.inner + gap);
  p.positions.stride[1] = 1;
  p.positions.class_stride = size.classes == 1 ? 1 : size.inner + gap;
  p.positions.contiguous = !c.part;
  p.k = c.k;
  logits.attach(p.logits, contiguous);
  if (c.masked) mask.attach(p.mask, contiguous);
  p.index = index.data();
  const int threads = variant == 1 ? 5 : 1;
  execute_topk(table, p, threads, InThreads{threads});

  std::vector<char> bytes(index.size() * sizeof index[0]);
  std::memcpy(bytes.data(), index.data(), bytes.size());
  return bytes;
}

}  // namespace cpu
}  // namespace gumbel_ext
