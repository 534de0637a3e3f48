// What the backwards of the estimators of hard samples' gradients are told.
#pragma once

#include "rows_params.h"

namespace gumbel_ext {
namespace cuda {

enum class Estimator { kZgr, kReinMax, kGapped };

struct EstimatorParams : RowsParams {
  RowOperand grad, logits;
  RowOperand mask;            // of bytes; data may be null
  const std::int64_t* index;  // [rows]: the chosen class, or -1 of a row that the mask forbids
  void* grad_logits;          // [rows, classes]
  // The gap of kGapped, a positive normal number of the accumulate type; 0: each row's own, by the
  // probability of its class.
  double gap;
  float gap_float32;
};

struct GumbelRaoParams : EstimatorParams {
  RandomSource random;
  std::int64_t draws, draws_at_once;  // of a row that is not held; at most kDrawsAtOnce
  // [rows, classes] of the accumulate type: sums over draws, where not all are made at once. May
  // be grad_logits, if that is of the type. Null: there are few enough draws.
  void* sums;
};

// Draws whose sums a block has room for.
constexpr std::int64_t kDrawsAtOnce = 1024;

// How a row is taken: by a team of that many threads, each of which holds so many groups; none if
// the row is streamed.
struct HeldRowPlan {
  int team, groups;
};
constexpr int held_row_groups(ElementType type) { return type == ElementType::kFloat64 ? 2 : 4; }
HeldRowPlan make_estimator_plan(ElementType type, std::int64_t classes);
HeldRowPlan make_gumbel_rao_plan(ElementType type, std::int64_t classes);

// Launch on `stream`; return the name of the first CUDA error, or null.
const char* launch_estimator(Estimator estimator, const EstimatorParams& params, void* stream);
const char* launch_gumbel_rao(const GumbelRaoParams& params, void* stream);

}  // namespace cuda
}  // namespace gumbel_ext
