// Samples without replacement on the CPU.
#include "../ops/topk.h"
#include "problem_builder.h"

namespace gumbel_ext {
namespace cpu {
namespace {

at::Tensor gumbel_topk_cpu(GumbelTopk& a) {
  const at::Tensor index = a.prepare();
  if (index.numel() == 0) return index;
  const RngState state = reserve_randomness(a.generator, a.rng_state);
  const at::Tensor allowed = broadcast_mask(a.mask, a.logits),
                   rows = with_rows_together(a.logits, a.dim);
  const Positions places(a.logits.sizes(), a.positions);
  ProblemBuilder builder(a.logits, a.dim, places);
  Problem& p = builder.problem();
  p.seed = state.seed;
  p.offset = state.offset;
  p.k = a.k.expect_int();
  builder.add(p.logits, rows);
  if (a.mask) builder.add(p.mask, allowed);
  p.index = index.mutable_data_ptr<int64_t>();
  execute_topk(kernels(), builder.finish(), threads(), parallel_for);
  return index;
}

}  // namespace
}  // namespace cpu
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CPU, m) {
  using namespace gumbel_ext::cpu;
  using gumbel_ext::implement;
  implement<&gumbel_topk_cpu>(m);
}
