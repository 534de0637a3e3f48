// The Gumbel-softmax sample, its index and its backward on the CPU.
#include "gumbel_softmax_cpu.h"

#include "problem_builder.h"

namespace gumbel_ext {
namespace cpu {

// ---- samples ------------------------------------------------------------------------------------

void sample_into(const GumbelSoftmax& a, const GumbelSoftmax::Result& out) {
  constexpr const char* op = name_of<GumbelSoftmax>();
  const auto& [y, index, used_rng_state] = out;
  const at::Tensor temperatures = row_temperatures(op, a.tau_tensor, a.logits, a.dim);
  if (a.logits.numel() == 0) {
    index.fill_(-1);
    used_rng_state.zero_();
    return;
  }
  const RngState state = reserve_randomness(a.generator, a.rng_state);
  write_state(state, used_rng_state);
  Output y_rows(y, a.dim);
  const at::Tensor allowed = broadcast_mask(a.mask, a.logits),
                   rows = with_rows_together(a.logits, a.dim);
  const Positions places(a.logits.sizes(), a.positions);

  ProblemBuilder builder(a.logits, a.dim, places);
  Problem& p = builder.problem();
  p.seed = state.seed;
  p.offset = state.offset;
  p.hard = a.hard;
  p.tau_value = a.tau;
  builder.add(p.logits, rows);
  builder.add(p.output, y_rows.rows);
  if (a.mask) builder.add(p.mask, allowed);
  if (a.tau_tensor) builder.add(p.tau, temperatures);
  if (a.return_index) p.index = index.mutable_data_ptr<int64_t>();
  run_problem(Op::kForward, builder.finish());
  y_rows.finish();
}

GumbelSoftmax::Result sample(const GumbelSoftmax& a) {
  const auto out = a.allocate();
  sample_into(a, out);
  return out;
}

at::Tensor argmax(const GumbelArgmax& a) {
  const at::Tensor index = a.allocate();
  if (a.logits.numel() == 0) return index.fill_(-1);
  const RngState state = reserve_randomness(a.generator, a.rng_state);
  const at::Tensor allowed = broadcast_mask(a.mask, a.logits),
                   rows = with_rows_together(a.logits, a.dim);
  const Positions places(a.logits.sizes(), a.positions);
  ProblemBuilder builder(a.logits, a.dim, places);
  Problem& p = builder.problem();
  p.seed = state.seed;
  p.offset = state.offset;
  builder.add(p.logits, rows);
  if (a.mask) builder.add(p.mask, allowed);
  p.index = index.mutable_data_ptr<int64_t>();
  run_problem(Op::kIndexOnly, builder.finish());
  return index;
}

namespace {

GumbelSoftmax::Result gumbel_softmax_cpu(GumbelSoftmax& a) {
  const auto out = a.prepare();
  sample_into(a, out);
  return out;
}

at::Tensor gumbel_argmax_cpu(GumbelArgmax& a) {
  check_rows(a);
  return argmax(a);
}

// ---- their backwards ----------------------------------------------------------------------------

// An index from outside the row would be read from outside the gradient.
void check_index_values(const char* name, const int64_t* index, int64_t rows, int64_t classes) {
  const auto bad = [&](int64_t r) {
    return static_cast<uint64_t>(index[r] + 1) > static_cast<uint64_t>(classes);
  };
  // Without a branch in the loop, so that it is a vector of comparisons.
  bool any_bad = false;
  for (int64_t r = 0; r < rows; ++r) any_bad |= bad(r);
  if (C10_LIKELY(!any_bad)) return;
  for (int64_t r = 0; r < rows; ++r) {
    TORCH_CHECK_INDEX(!bad(r), name, ": index must be between -1 and ", classes - 1, ", got ",
                      index[r]);
  }
}

}  // namespace

void backward_into(const char* name, Op op, const GumbelSoftmaxHardBackward& a,
                   const at::Tensor& grad_logits, const at::Tensor& grad_tau) {
  const at::Tensor& input = a.logits;
  const at::Tensor temperatures = row_temperatures(name, a.tau_tensor, input, a.dim);
  grad_tau.zero_();
  if (input.numel() == 0) return;

  Output output(grad_logits, a.dim);
  const at::Tensor indices = a.index.contiguous();
  const int64_t* row_index = indices.const_data_ptr<int64_t>();
  const int64_t classes = input.dim() == 0 ? 1 : input.size(a.dim);
  check_index_values(name, row_index, indices.numel(), classes);
  const at::Tensor allowed = broadcast_mask(a.mask, input);
  const at::Tensor input_rows = with_rows_together(input, a.dim),
                   grad_rows = with_rows_together(a.grad, a.dim);
  const Positions places(input.sizes(), a.positions);

  ProblemBuilder builder(input, a.dim, places);
  Problem& p = builder.problem();
  p.tau_value = a.tau;
  p.index = const_cast<int64_t*>(row_index);
  if (a.tau_grad) p.grad_tau = grad_tau.mutable_data_ptr();
  builder.add(op == Op::kBackward ? p.output : p.logits, input_rows);
  builder.add(p.grad, grad_rows);
  builder.add(p.grad_logits, output.rows);
  if (a.mask) builder.add(p.mask, allowed);
  if (a.tau_tensor) builder.add(p.tau, temperatures);
  p.noise = a.rng_state.defined() && op == Op::kBackwardRecompute;
  if (p.noise) {
    const RngState state = reserve_randomness(std::nullopt, a.rng_state);
    p.seed = state.seed;
    p.offset = state.offset;
  }
  run_problem(op, builder.finish());
  output.finish();
}

namespace {

using Gradients = std::tuple<at::Tensor, at::Tensor>;

Gradients gumbel_softmax_backward_cpu(GumbelSoftmaxBackward& a) {
  const auto out = a.prepare();
  backward_into(name_of<GumbelSoftmaxBackward>(), Op::kBackward, from_y(a), std::get<0>(out),
                std::get<1>(out));
  return out;
}

Gradients gumbel_softmax_hard_backward_cpu(GumbelSoftmaxHardBackward& a) {
  const auto out = a.prepare();
  backward_into(name_of<GumbelSoftmaxHardBackward>(), Op::kBackwardRecompute, a, std::get<0>(out),
                std::get<1>(out));
  return out;
}

}  // namespace
}  // namespace cpu
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CPU, m) {
  using namespace gumbel_ext::cpu;
  using gumbel_ext::implement;
  implement<&gumbel_softmax_cpu>(m);
  implement<&gumbel_argmax_cpu>(m);
  implement<&gumbel_softmax_backward_cpu>(m);
  implement<&gumbel_softmax_hard_backward_cpu>(m);
}
