// Carries out the plan of a call on somebody's threads: PyTorch's for the ops, std::thread in the
// tests of the kernels.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "kernels.h"

namespace gumbel_ext {
namespace cpu {

// ParallelFor(count, grain, body) calls body(begin, end) for pieces of [0, count), none smaller
// than grain but the last.
template <class ParallelFor>
class SplitRowRunner {
 public:
  SplitRowRunner(const KernelTable& table, Op op, const Problem& problem, ParallelFor parallel_for)
      : table_(table),
        op_(op),
        p_(problem),
        parallel_for_(parallel_for),
        chunks_(static_cast<std::size_t>((problem.classes + kChunk - 1) / kChunk)) {
    if (op == Op::kBackwardRecompute || (op == Op::kForward && !problem.hard)) {
      // Room for a row of float or double, whichever is computed in; not initialised.
      const std::size_t bytes =
          problem.type == ElementType::kFloat64 ? sizeof(double) : sizeof(float);
      work_.reset(new char[static_cast<std::size_t>(problem.classes) * bytes]);
    }
  }

  void run(std::int64_t row) {
    split_ = SplitRow{row, work_.get(), chunks_.data(), 0, 0, 0, 0};
    if (op_ == Op::kForward || op_ == Op::kIndexOnly) {
      if (search() && work_) normalize();
      return;
    }
    if (op_ == Op::kBackwardRecompute) {
      search();
      normalize();
    }
    split_.dot = total_of(Step::kDot);
    if (p_.grad_tau != nullptr) split_.log_dot = total_of(Step::kLogDot);
    step(Step::kGradient);
  }

 private:
  // Chunks that are worth a thread of their own.
  static constexpr std::int64_t kChunkGrain = 4;

  void step(Step which) {
    parallel_for_(static_cast<std::int64_t>(chunks_.size()), kChunkGrain,
                  [&](std::int64_t begin, std::int64_t end) {
                    table_.split_step(p_, which, split_, begin, end);
                  });
  }

  double total_of(Step which) {
    step(which);
    double total = 0;
    for (const ChunkState& chunk : chunks_) total += chunk.sum;
    return total;
  }

  // Finds the best class; returns whether the row is an ordinary one.
  bool search() {
    step(Step::kNoise);
    const ChunkState* best = &chunks_.front();
    for (const ChunkState& chunk : chunks_) {
      if (chunk.nan) {
        best = &chunk;
        break;
      }
      if (chunk.largest > best->largest) best = &chunk;
    }
    split_.largest = best->largest;
    std::int64_t index = best->index;
    const bool ordinary = table_.split_settle(p_, split_.row, best->largest, best->nan, &index);
    if (p_.index != nullptr && !p_.grad_logits) p_.index[split_.row] = index;
    return ordinary;
  }

  void normalize() {
    split_.sum = total_of(Step::kExponentiate);
    step(Step::kNormalize);
  }

  const KernelTable& table_;
  const Op op_;
  const Problem& p_;
  ParallelFor parallel_for_;
  std::unique_ptr<char[]> work_;
  std::vector<ChunkState> chunks_;
  SplitRow split_{};
};

template <class ParallelFor>
void execute_plan(const KernelTable& table, Op op, const Problem& p, const Plan& plan,
                  ParallelFor parallel_for) {
  if (plan.regime != Regime::kSplitRow) {
    parallel_for(plan.tasks, plan.grain,
                 [&](std::int64_t begin, std::int64_t end) { table.run(op, p, plan, begin, end); });
    return;
  }
  SplitRowRunner<ParallelFor> runner(table, op, p, parallel_for);
  for (std::int64_t row = 0; row < p.rows(); ++row) {
    if (p.grad_logits && p.index[row] < 0) {
      // A row that the mask forbids has a gradient of zero, and no class to shift by.
      table.run(op, p, Plan{Regime::kRows, p.rows(), 1, 1}, row, row + 1);
    } else {
      runner.run(row);
    }
  }
}

template <class ParallelFor>
void execute(const KernelTable& table, Op op, const Problem& p, int threads,
             ParallelFor parallel_for) {
  execute_plan(table, op, p, make_plan(op, p, threads), parallel_for);
}

// gumbel_topk. A row that is shared among threads is cut into parts, whose best are then compared.
template <class ParallelFor>
void execute_topk(const KernelTable& table, const Problem& p, int threads,
                  ParallelFor parallel_for) {
  const Plan plan = make_plan(Op::kIndexOnly, p, threads);
  if (plan.regime != Regime::kSplitRow) {
    parallel_for(plan.tasks, plan.grain,
                 [&](std::int64_t begin, std::int64_t end) { table.topk(p, plan, begin, end); });
    return;
  }
  const std::int64_t chunks = (p.classes + kChunk - 1) / kChunk;
  const std::int64_t parts = std::min<std::int64_t>(threads, chunks);
  const std::int64_t part = (chunks + parts - 1) / parts * kChunk;
  const std::int64_t most = std::min(p.k, part);
  std::vector<ScoredClass> found(static_cast<std::size_t>(parts * most));
  std::vector<std::int64_t> counts(static_cast<std::size_t>(parts));
  for (std::int64_t row = 0; row < p.rows(); ++row) {
    parallel_for(parts, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t first = std::min(i * part, p.classes);
        counts[static_cast<std::size_t>(i)] = table.topk_of_part(
            p, row, first, std::min(first + part, p.classes), found.data() + i * most);
      }
    });
    std::int64_t count = 0;
    for (std::int64_t i = 0; i < parts; ++i) {
      const ScoredClass* of_part = found.data() + i * most;
      std::copy(of_part, of_part + counts[static_cast<std::size_t>(i)], found.data() + count);
      count += counts[static_cast<std::size_t>(i)];
    }
    table.topk_of_parts(found.data(), count, p.k, p.index + row * p.k);
  }
}

}  // namespace cpu
}  // namespace gumbel_ext
