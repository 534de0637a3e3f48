// The CPU kernels of the estimators' gradients, those in closed form and Gumbel-Rao: the same bits
// however the rows are cut, wherever their classes lie and on every instruction set, and nothing
// touched outside. Their values are tests/test_estimators.py's matter.
#pragma once

#include "log_row_kernels.h"

namespace gumbel_ext {
namespace cpu {

struct EstimatorCase {
  ElementType type;
  Extent size;
  Laying laying;
  bool masked, special, tau_per_row;
  double tau, gap;
  EstimatorKind kind;
  std::int64_t draws;  // of Gumbel-Rao; 0: `kind`

  std::string name() const {
    return std::string(name_of(type)) + " [" + std::to_string(size.outer) + ", " +
           std::to_string(size.inner) + "] rows of " + std::to_string(size.classes) + ", layout " +
           std::to_string(static_cast<int>(laying)) + ", " +
           (draws ? std::to_string(draws) + " draws"
                  : "estimator " + std::to_string(static_cast<int>(kind)));
  }
};

inline std::vector<EstimatorCase> estimator_cases() {
  // Rows that fit half a vector, one vector and several, and longer ones than a run of noise.
  const Extent sizes[] = {{7, 1, 1}, {9, 5, 3}, {70, 16, 1}, {4, 33, 5}, {2, 1031, 2}};
  const EstimatorKind kinds[] = {EstimatorKind::kZgr, EstimatorKind::kReinMax,
                                 EstimatorKind::kGapped};
  const double taus[] = {0.5, 0.7, 1};
  std::vector<EstimatorCase> cases;
  std::mt19937 flip(8);
  for (const ElementType type : kElementTypes) {
    for (const Extent& size : sizes) {
      for (const Laying laying : kLayings) {
        for (const std::int64_t draws : {0, 3}) {
          const bool masked = flip() % 2 == 0, special = flip() % 2 == 0, rows = flip() % 2 == 0;
          cases.push_back({type, size, laying, masked, special, rows, taus[flip() % 3],
                           flip() % 2 == 0 ? 1.0 : 0.0, kinds[flip() % 3], draws});
        }
      }
    }
  }
  return cases;
}

// Cut in one, cut in five, rows one after the other.
constexpr int kEstimatorVariants = 3;

inline std::vector<char> compute_estimator(const KernelTable& table, const EstimatorCase& c,
                                           int variant) {
  const Extent &size = c.size, plain = strides_of(Laying::kContiguous, size, true),
               laid = strides_of(c.laying, size, true);
  Strided grad = random_strided(c.type, size, laid, -4, 61),
          logits = random_strided(c.type, size, laid, -4, 62), mask = some_mask(size, laid);
  if (c.special) {
    set_some(logits, c.type, 5, -HUGE_VAL);
    set_some(logits, c.type, 211, std::nan(""));
    set_some(grad, c.type, 301, std::nan(""));
  }
  // A class for every row, also one that the mask forbids, and some that are none.
  std::vector<std::int64_t> index(static_cast<std::size_t>(size.rows()));
  for (std::size_t row = 0; row < index.size(); ++row) {
    const std::int64_t r = static_cast<std::int64_t>(row);
    index[row] = r % 11 == 5 ? -1 : r % 13 == 7 ? size.classes : r * 7 % size.classes;
  }
  const bool contiguous = variant == 2 || c.laying == Laying::kContiguous;
  if (variant == 2) {
    grad = grad.moved(plain);
    logits = logits.moved(plain);
    mask = mask.moved(plain);
  }
  const Bytes tau = random_numbers(size.inner, true, 0.5, 63);
  const Written grad_logits(c.type, size.count());

  EstimatorProblem p{};
  set_rows(p, c.type, size, tau, c.tau_per_row);
  p.tau_value = c.tau;
  grad.attach(p.grad, contiguous);
  logits.attach(p.logits, contiguous);
  if (c.masked) mask.attach(p.mask, contiguous);
  p.index = index.data();
  p.grad_logits = grad_logits.bytes.get();
  p.kind = c.kind;
  p.gap = c.gap;
  p.draws = c.draws;
  p.seed = 0x1234567890ABCDEFu;
  p.offset_of_state = 3;
  const auto kernel = c.draws ? table.gumbel_rao : table.estimator;
  InThreads{variant == 1 ? 5 : 1}(
      p.rows, 1, [&](std::int64_t begin, std::int64_t end) { kernel(p, begin, end); });
  std::vector<char> bytes;
  grad_logits.append_to(bytes);
  return bytes;
}

}  // namespace cpu
}  // namespace gumbel_ext
