// The CPU kernels of the expected position under a softmax, and of its gradient: the same bits
// however the chunks are shared and on every instruction set, and nothing touched outside a chunk.
// Their values are tests/test_soft_argmax.py's matter.
#pragma once

#include "strided.h"

namespace gumbel_ext {
namespace cpu {

struct PositionCase {
  ElementType type;
  std::int64_t classes;
  int coordinates;
  bool special;

  std::string name() const {
    return std::string(name_of(type)) + " " + std::to_string(classes) + " classes in " +
           std::to_string(coordinates) + " dimensions";
  }
};

inline std::vector<PositionCase> position_cases() {
  std::vector<PositionCase> cases;
  for (const ElementType type : kElementTypes) {
    for (const std::int64_t classes : {1, 15, 16, 33, 1024, 1025, 5003}) {
      for (int coordinates = 1; coordinates <= kMaxCoordinates; ++coordinates) {
        cases.push_back({type, classes, coordinates, false});
        cases.push_back({type, classes, coordinates, true});
      }
    }
  }
  return cases;
}

// Chunks of one run of memory in turn; each in memory of its own, shared by five threads.
constexpr int kPositionVariants = 2;

inline std::vector<char> compute_positions(const KernelTable& table, const PositionCase& c,
                                           int variant) {
  const ElementType wide = computed_type(c.type);
  const int size = size_of(c.type);
  const Extent extent{1, c.classes, 1};
  const Strided logits = random_strided(c.type, extent, {0, 1, 0}, -4, 61);
  if (c.special) {
    set_some(logits, c.type, 3, -HUGE_VAL);
    if (c.coordinates == 2) set_some(logits, c.type, 4001, std::nan(""));
  }
  const bool is_double = wide == ElementType::kFloat64;
  const Bytes positions = random_numbers(c.classes * c.coordinates, is_double, -4, 62),
              grad = random_numbers(c.coordinates, is_double, -4, 63);
  const Written grad_logits(c.type, c.classes);
  const std::int64_t count = (c.classes + kChunk - 1) / kChunk;
  std::vector<PositionChunk> chunks(static_cast<std::size_t>(count));
  std::vector<double> numbers(static_cast<std::size_t>(3 + c.coordinates + count));
  double* of_beta = numbers.data() + 3 + c.coordinates;

  PositionRow row{};
  row.positions = positions.get();
  row.coordinates = c.coordinates;
  row.classes = c.classes;
  row.beta = c.special && c.coordinates == 3 ? -1.3 : 1.3;
  const InThreads in_threads{variant == 1 ? 5 : 1};
  // Calls body(chunk, first class, classes, memory of its logits).
  const auto each_chunk = [&](auto body) {
    in_threads(count, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t first = i * kChunk, here = std::min(kChunk, c.classes - first);
        const char* of_chunk = logits.at(0, first, 0);
        const Bytes alone = make_bytes(here, size);
        std::memcpy(alone.get(), of_chunk, static_cast<std::size_t>(here * size));
        body(i, first, here, variant == 1 ? alone.get() : of_chunk);
      }
    });
  };
  each_chunk([&](auto i, auto first, auto here, const char* x) {
    table.accumulate_positions(c.type, x, first, here, row, chunks[static_cast<std::size_t>(i)]);
  });
  table.settle_positions(c.type, chunks.data(), count, row, numbers.data());
  each_chunk([&](auto i, auto first, auto here, const char* x) {
    const Written out(c.type, here);
    of_beta[i] = table.position_gradient(c.type, x, first, here, row, numbers.data(), grad.get(),
                                         true, out.bytes.get());
    std::memcpy(&grad_logits.bytes[static_cast<std::size_t>(first * size)], out.bytes.get(),
                static_cast<std::size_t>(here * size));
  });

  std::vector<char> bytes;
  for (const double& number : numbers) {
    const char* p = reinterpret_cast<const char*>(&number);
    std::isnan(number) ? bytes.push_back('n')
                       : void(bytes.insert(bytes.end(), p, p + sizeof number));
  }
  grad_logits.append_to(bytes);
  return bytes;
}

}  // namespace cpu
}  // namespace gumbel_ext
