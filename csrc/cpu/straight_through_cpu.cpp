// The straight-through softmax on the CPU: the core without noise.
#include "../ops/straight_through.h"
#include "gumbel_softmax_cpu.h"
#include "problem_builder.h"

namespace gumbel_ext {
namespace cpu {
namespace {

StraightThroughSoftmax::Result straight_through_softmax_cpu(StraightThroughSoftmax& a) {
  const auto out = a.prepare();
  const auto& [y, index] = out;
  row_temperatures(name_of<StraightThroughSoftmax>(), a.tau_tensor, a.logits, a.dim);  // checks it
  if (a.logits.numel() == 0) return {y, index.fill_(-1)};
  Output y_rows(y, a.dim);
  const at::Tensor allowed = broadcast_mask(a.mask, a.logits),
                   rows = with_rows_together(a.logits, a.dim);
  const Positions places(a.logits.sizes(), std::nullopt);

  ProblemBuilder builder(a.logits, a.dim, places);
  Problem& p = builder.problem();
  p.noise = false;
  p.hard = true;
  builder.add(p.logits, rows);
  builder.add(p.output, y_rows.rows);
  if (a.mask) builder.add(p.mask, allowed);
  if (a.return_index) p.index = index.mutable_data_ptr<int64_t>();
  run_problem(Op::kForward, builder.finish());
  y_rows.finish();
  return out;
}

StraightThroughSoftmaxBackward::Result straight_through_softmax_backward_cpu(
    StraightThroughSoftmaxBackward& a) {
  const auto out = a.prepare();
  backward_into(name_of<StraightThroughSoftmaxBackward>(), Op::kBackwardRecompute, without_noise(a),
                std::get<0>(out), std::get<1>(out));
  return out;
}

}  // namespace
}  // namespace cpu
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CPU, m) {
  using namespace gumbel_ext::cpu;
  using gumbel_ext::implement;
  implement<&straight_through_softmax_cpu>(m);
  implement<&straight_through_softmax_backward_cpu>(m);
}
