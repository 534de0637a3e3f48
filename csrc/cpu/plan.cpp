// Which regime a call runs in: every rule about sizes and shapes in one place.
#include <algorithm>

#include "problem.h"

namespace gumbel_ext {
namespace cpu {

namespace {

// Elements of work that pay for waking a thread, about 10 microseconds of it.
constexpr std::int64_t kGrainElements = 8192;
// Fewer neighbouring rows than this leave more lanes idle across rows than transposing them costs.
constexpr std::int64_t kMinColumns = 16;
// Rows shorter than this are not worth the barriers of being shared among threads.
constexpr std::int64_t kMinSplitClasses = 16384;

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

bool classes_adjacent(const Operand& operand) { return !operand || operand.class_stride == 1; }

}  // namespace

std::int64_t row_offset(const Problem& p, const Strides& strides, std::int64_t row) {
  std::int64_t offset = 0;
  for (int d = p.dims - 1; d > 0; --d) {
    offset += (row % p.size[d]) * strides.stride[d];
    row /= p.size[d];
  }
  return p.dims > 0 ? offset + row * strides.stride[0] : 0;
}

Plan make_plan(Op op, const Problem& p, int threads) {
  const auto plan = [&](Regime regime, std::int64_t tasks, std::int64_t elements_per_task,
                        std::int64_t tile) {
    return Plan{
        regime, tasks,
        std::max<std::int64_t>(1, kGrainElements / std::max<std::int64_t>(1, elements_per_task)),
        tile};
  };

  // Only the noise ties neighbouring rows together: a backward from y whose rows are runs of memory
  // takes them one by one.
  const bool rows_apart =
      op == Op::kBackward
          ? p.inner < kMinColumns || (classes_adjacent(p.output) && classes_adjacent(p.grad) &&
                                      classes_adjacent(p.grad_logits))
          : p.inner == 1 && p.positions.class_stride == 1;
  if (rows_apart) {
    const bool uneven = p.rows() < 4 * threads && p.rows() % threads != 0 &&
                        p.classes >= kMinSplitClasses * threads / 2;
    if (threads > 1 && p.classes >= kMinSplitClasses && (p.rows() < threads || uneven)) {
      return plan(Regime::kSplitRow, p.rows(), p.classes, 1);
    }
    const std::int64_t tile = std::max<std::int64_t>(1, kTile / p.classes);
    return plan(Regime::kRows, divide_up(p.rows(), tile), tile * p.classes, tile);
  }
  if (p.inner < kMinColumns && p.positions.contiguous) {
    return plan(Regime::kSlabs, p.outer, p.classes * p.inner, p.inner);
  }
  // Narrower tiles when there are too few to go round.
  std::int64_t tile = kColumns;
  while (tile > 16 && p.outer * divide_up(p.inner, tile) < 2 * threads) tile /= 2;
  return plan(Regime::kColumns, p.outer * divide_up(p.inner, tile), p.classes * tile, tile);
}

}  // namespace cpu
}  // namespace gumbel_ext
