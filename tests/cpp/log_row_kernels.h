// The CPU kernels of the log-space sample and of its gradient: the same bits however the rows are
// cut, wherever their classes lie and on every instruction set, and nothing touched outside. Their
// values are tests/test_log_softmax.py's matter.
#pragma once

#include "strided.h"

namespace gumbel_ext {
namespace cpu {

struct LogRowCase {
  ElementType type;
  Extent size;
  Laying laying;
  bool masked, special, tau_per_row, given_noise;

  std::string name() const {
    return std::string(name_of(type)) + " [" + std::to_string(size.outer) + ", " +
           std::to_string(size.inner) + "] rows of " + std::to_string(size.classes) + ", layout " +
           std::to_string(static_cast<int>(laying)) + (given_noise ? ", noise given" : "");
  }
};

inline std::vector<LogRowCase> log_sample_cases() {
  // Rows of which many, few or none make a tile.
  const Extent sizes[] = {{7, 1, 1}, {5, 16, 3}, {4, 33, 5}, {2, 1031, 2}, {1, 2500, 2}};
  std::vector<LogRowCase> cases;
  std::mt19937 flip(7);
  for (const ElementType type : kElementTypes) {
    for (const Extent& size : sizes) {
      for (const Laying laying : kLayings) {
        for (const bool given_noise : {false, true}) {
          cases.push_back(
              {type, size, laying, flip() % 2 == 0, flip() % 2 == 0, flip() % 2 == 0, given_noise});
        }
      }
    }
  }
  return cases;
}

inline std::vector<LogRowCase> log_gradient_cases() {
  std::vector<LogRowCase> cases;
  for (const LogRowCase& c : log_sample_cases()) {
    if (!c.given_noise) cases.push_back(c);
  }
  return cases;
}

// Cut in one, cut in five, rows one after the other.
constexpr int kLogRowVariants = 3;

inline void set_rows(RowShape& p, ElementType type, const Extent& size, const Bytes& tau,
                     bool tau_per_row) {
  p.type = type;
  p.rows = size.rows();
  p.classes = size.classes;
  p.dims = 2;
  p.size[0] = size.outer;
  p.size[1] = size.inner;
  p.tau_value = 0.7;
  if (!tau_per_row) return;
  // One for each inner element.
  p.tau.data = tau.get();
  p.tau.class_stride = 1;
  p.tau.stride[0] = 0;
  p.tau.stride[1] = 1;
}

inline std::vector<char> compute_log_sample(const KernelTable& table, const LogRowCase& c,
                                            int variant) {
  const Extent &size = c.size, plain = strides_of(Laying::kContiguous, size, true),
               laid = strides_of(c.laying, size, true);
  Strided logits = random_strided(c.type, size, laid, -4, 31),
          noise = random_strided(computed_type(c.type), size, laid, -4, 32),
          mask = some_mask(size, laid);
  if (c.special) {
    set_some(logits, c.type, 3, -HUGE_VAL);
    set_some(logits, c.type, 211, std::nan(""));
  }
  const bool contiguous = variant == 2 || c.laying == Laying::kContiguous;
  if (variant == 2) {
    logits = logits.moved(plain);
    noise = noise.moved(plain);
    mask = mask.moved(plain);
  }
  const Bytes tau = random_numbers(size.inner, true, 0.5, 33);
  const Written log_y(c.type, size.count());

  LogSampleProblem p{};
  set_rows(p, c.type, size, tau, c.tau_per_row);
  logits.attach(p.logits, contiguous);
  if (c.masked) mask.attach(p.mask, contiguous);
  if (c.given_noise) {
    noise.attach(p.noise, contiguous);
  } else {
    p.seed = 0x1234567890ABCDEFu;
    p.offset_of_state = 3;
    p.first_position = 2;
    // Those of a part where the case is not masked.
    const std::int64_t gap = c.masked ? 0 : 3;
    p.positions.stride[0] = size.inner * (size.classes + gap);
    p.positions.stride[1] = size.classes + gap;
    p.positions.class_stride = 1;
    p.positions.contiguous = gap == 0;
  }
  p.log_y = log_y.bytes.get();
  InThreads{variant == 1 ? 5 : 1}(
      p.rows, 1, [&](std::int64_t begin, std::int64_t end) { table.log_sample(p, begin, end); });
  std::vector<char> bytes;
  log_y.append_to(bytes);
  return bytes;
}

inline std::vector<char> compute_log_gradient(const KernelTable& table, const LogRowCase& c,
                                              int variant) {
  const Extent &size = c.size, plain = strides_of(Laying::kContiguous, size, true),
               laid = strides_of(c.laying, size, true);
  const ElementType wide = computed_type(c.type);
  Strided grad = random_strided(c.type, size, laid, -4, 41),
          log_y = random_strided(wide, size, laid, -8.5, 42);
  if (c.special) {
    set_some(log_y, wide, 3, -HUGE_VAL);
    set_some(log_y, wide, 211, std::nan(""));
  }
  const bool contiguous = variant == 2 || c.laying == Laying::kContiguous;
  if (variant == 2) {
    grad = grad.moved(plain);
    log_y = log_y.moved(plain);
  }
  const Bytes tau = random_numbers(size.inner, true, 0.5, 43);
  const Written grad_logits(c.type, size.count()), grad_tau(wide, size.rows());

  LogGradientProblem p{};
  set_rows(p, c.type, size, tau, c.tau_per_row);
  grad.attach(p.grad, contiguous);
  log_y.attach(p.log_y, contiguous);
  p.grad_logits = grad_logits.bytes.get();
  if (c.masked) p.grad_tau = grad_tau.bytes.get();
  InThreads{variant == 1 ? 5 : 1}(
      p.rows, 1, [&](std::int64_t begin, std::int64_t end) { table.log_gradient(p, begin, end); });
  std::vector<char> bytes;
  grad_logits.append_to(bytes);
  grad_tau.append_to(bytes);
  return bytes;
}

}  // namespace cpu
}  // namespace gumbel_ext
