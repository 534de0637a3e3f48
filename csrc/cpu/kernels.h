// The table of kernels that each instruction set offers. All of them are compiled from kernels.inc.
#pragma once

#include <cstddef>

#include "binary_problem.h"
#include "problem.h"
#include "row_problems.h"

namespace gumbel_ext {
namespace cpu {

struct KernelTable {
  const char* capability;
  // Tasks [begin, end) of the plan.
  void (*run)(Op op, const Problem& problem, const Plan& plan, std::int64_t begin,
              std::int64_t end);
  // One step of a split row (Regime::kSplitRow) on chunks [begin, end).
  void (*split_step)(const Problem& problem, Step step, const SplitRow& split, std::int64_t begin,
                     std::int64_t end);
  // Settles a split row whose best class is known: returns whether it is an ordinary row, or else
  // writes its output (and its index, which may become -1).
  bool (*split_settle)(const Problem& problem, std::int64_t row, double largest, bool nan,
                       std::int64_t* index);
  // The k best classes of the rows of tasks [begin, end) of a plan for Op::kIndexOnly.
  void (*topk)(const Problem& problem, const Plan& plan, std::int64_t begin, std::int64_t end);
  // Those among classes [begin, end) of one row, in no order; returns how many there are.
  std::int64_t (*topk_of_part)(const Problem& problem, std::int64_t row, std::int64_t begin,
                               std::int64_t end, ScoredClass* out);
  // The k best of a row's parts together: their indices in order, then -1.
  void (*topk_of_parts)(const ScoredClass* found, std::int64_t count, std::int64_t k,
                        std::int64_t* out);
  // Rows [begin, end) of a log-space sample, of its gradient, and of a density or its gradients.
  void (*log_sample)(const LogSampleProblem& problem, std::int64_t begin, std::int64_t end);
  void (*log_gradient)(const LogGradientProblem& problem, std::int64_t begin, std::int64_t end);
  void (*density)(const DensityProblem& problem, std::int64_t begin, std::int64_t end);
  // Rows [begin, end) of the gradient of an estimator in closed form, and of Gumbel-Rao.
  void (*estimator)(const EstimatorProblem& problem, std::int64_t begin, std::int64_t end);
  void (*gumbel_rao)(const EstimatorProblem& problem, std::int64_t begin, std::int64_t end);
  // Noise of positions first, first + 1, ...
  void (*noise)(ElementType type, std::uint64_t seed, std::uint64_t offset, std::uint64_t first,
                std::int64_t count, void* out);
  // For rows that are sharded over processes, a chunk (kChunk classes, or what is left) at a time,
  // in the arithmetic of the kernels above: e = exp((z - largest) / tau), whose sum is returned, z
  // and e float or double;
  double (*exponentiate)(ElementType type, const void* z, std::int64_t count, double largest,
                         double tau, void* e);
  // and the sum of y (grad - shift), or with `dot` that of log(y) y (grad - shift - dot). y is of
  // the type of grad, or of the accumulate type.
  double (*dot)(ElementType type, bool computed_y, const void* y, const void* grad,
                std::int64_t count, double shift, const double* dot);
  // The noise that given words make, for tests of the far ends; float or double.
  void (*noise_from_words)(ElementType type, const std::uint32_t* hi, const std::uint32_t* lo,
                           std::int64_t count, void* out);
  // Elements [begin, end) of a binary concrete sample or of its gradient.
  void (*binary)(const BinaryProblem& problem, std::int64_t begin, std::int64_t end);
  // noise and noise_from_words of the logistic noise.
  void (*logistic_noise)(ElementType type, std::uint64_t seed, std::uint64_t offset,
                         std::uint64_t first, std::int64_t count, void* out);
  void (*logistic_from_words)(ElementType type, const std::uint32_t* hi, const std::uint32_t* lo,
                              std::int64_t count, void* out);
  // The expected position of a row: what chunk [first, first + count) adds, the chunks together,
  // and a chunk of the gradient; see soft_argmax.h.
  void (*accumulate_positions)(ElementType type, const void* logits, std::int64_t first,
                               std::int64_t count, const PositionRow& row, PositionChunk& out);
  void (*settle_positions)(ElementType type, const PositionChunk* chunks, std::int64_t count,
                           const PositionRow& row, double* state);
  double (*position_gradient)(ElementType type, const void* logits, std::int64_t first,
                              std::int64_t count, const PositionRow& row, const double* state,
                              const void* grad_expected, bool beta_grad, void* grad_logits);
};

extern const KernelTable kBaselineKernels;
#if defined(__x86_64__)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
#endif

// The best table that this machine can run, or the lower one that GUMBEL_EXT_CPU_CAPABILITY asks
// for. Throws std::invalid_argument if it asks for one that cannot be had.
const KernelTable& kernels();

// Capabilities that this machine can run, best first.
constexpr int kMaxCapabilities = 3;
int available_kernels(const KernelTable* (&tables)[kMaxCapabilities]);

}  // namespace cpu
}  // namespace gumbel_ext
