// The CPU kernels of the density of the Concrete distribution and of its gradients: the same bits
// however the rows are cut, wherever their classes lie and on every instruction set, and nothing
// touched outside. Their values are tests/test_concrete_density.py's matter.
#pragma once

#include "log_row_kernels.h"

namespace gumbel_ext {
namespace cpu {

struct DensityCase {
  ElementType type;
  Extent size;
  Laying laying;
  bool log_space, special, tau_per_row, wide;

  std::string name() const {
    return std::string(name_of(type)) + " [" + std::to_string(size.outer) + ", " +
           std::to_string(size.inner) + "] rows of " + std::to_string(size.classes) + ", layout " +
           std::to_string(static_cast<int>(laying)) + (log_space ? ", log space" : "");
  }
};

inline std::vector<DensityCase> density_cases() {
  const Extent sizes[] = {{7, 1, 1}, {5, 16, 3}, {4, 33, 5}, {2, 1031, 2}};
  std::vector<DensityCase> cases;
  std::mt19937 flip(7);
  for (const ElementType type : kElementTypes) {
    for (const Extent& size : sizes) {
      for (const Laying laying : kLayings) {
        for (const bool log_space : {false, true}) {
          cases.push_back(
              {type, size, laying, log_space, flip() % 2 == 0, flip() % 2 == 0, flip() % 2 == 0});
        }
      }
    }
  }
  return cases;
}

// Cut in one, cut in five, rows one after the other.
constexpr int kDensityVariants = 3;

inline std::vector<char> compute_density(const KernelTable& table, const DensityCase& c,
                                         int variant) {
  // Values and logits lie differently, as where one of them is expanded.
  const Extent &size = c.size, plain = strides_of(Laying::kContiguous, size, true),
               laid = strides_of(c.laying, size, true);
  const ElementType wide = computed_type(c.type);
  Strided value = random_strided(c.type, size, laid, c.log_space ? -8.5 : 0.5, 51),
          logits = random_strided(c.type, size, c.wide ? laid : plain, -4, 52);
  if (c.special) {
    // At the boundary, with impossible classes, and without a density.
    set_some(value, c.type, 23, c.log_space ? -HUGE_VAL : 0);
    set_some(logits, c.type, 37, -HUGE_VAL);
    set_some(value, c.type, 611, std::nan(""));
  }
  bool value_contiguous = c.laying == Laying::kContiguous,
       logits_contiguous = value_contiguous || !c.wide;
  if (variant == 2) {
    value = value.moved(plain);
    logits = logits.moved(plain);
    value_contiguous = logits_contiguous = true;
  }
  const Bytes tau = random_numbers(size.inner, true, 0.5, 53);
  // One gradient for each outer element.
  const Bytes grad = random_numbers(size.outer, wide == ElementType::kFloat64, -4, 54);
  const Written density(wide, size.rows()), grad_tau(wide, size.rows()),
      grad_value(c.wide ? wide : c.type, size.count()),
      grad_logits(c.tau_per_row ? wide : c.type, size.count());

  DensityProblem p{};
  set_rows(p, c.type, size, tau, c.tau_per_row);
  p.log_space = c.log_space;
  value.attach(p.value, value_contiguous);
  logits.attach(p.logits, logits_contiguous);
  const auto run = [&] {
    InThreads{variant == 1 ? 5 : 1}(
        p.rows, 1, [&](std::int64_t begin, std::int64_t end) { table.density(p, begin, end); });
  };
  p.density = density.bytes.get();
  run();
  p.density = nullptr;
  p.grad.data = grad.get();
  p.grad.class_stride = 1;
  p.grad.stride[0] = 1;
  p.grad.stride[1] = 0;
  p.grad_value = grad_value.bytes.get();
  p.grad_logits = grad_logits.bytes.get();
  p.grad_tau = grad_tau.bytes.get();
  p.wide_grad_value = c.wide;
  p.wide_grad_logits = c.tau_per_row;
  run();

  std::vector<char> bytes;
  for (const Written* out : {&density, &grad_value, &grad_logits, &grad_tau}) {
    out->append_to(bytes);
  }
  return bytes;
}

}  // namespace cpu
}  // namespace gumbel_ext
