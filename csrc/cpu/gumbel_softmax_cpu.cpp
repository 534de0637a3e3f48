// Tensors -> Problem, and its plan carried out on PyTorch's threads.
#include "gumbel_softmax_cpu.h"

#include <ATen/Parallel.h>

#include "../ops/straight_through.h"
#include "../ops/topk.h"
#include "execute.h"
#include "tensors.h"

namespace gumbel_ext {
namespace cpu {
namespace {

// Collects the operands of a Problem, then merges the dimensions that rows are numbered over. The
// tensors and positions passed in must outlive it.
class ProblemBuilder {
 public:
  ProblemBuilder(const at::Tensor& logits, int64_t dim, const Positions& positions)
      : dim_(dim), shape_(logits.sizes()) {
    problem_.type = element_type(logits.scalar_type());
    problem_.outer = problem_.classes = problem_.inner = 1;
    for (int64_t d = 0; d < logits.dim(); ++d) {
      (d < dim ? problem_.outer : d == dim ? problem_.classes : problem_.inner) *= logits.size(d);
    }
    problem_.tau_value = 1;
    problem_.noise = true;
    problem_.seed = problem_.offset = 0;
    problem_.hard = false;
    problem_.k = 1;
    problem_.index = nullptr;
    problem_.grad_tau = nullptr;
    problem_.first_position = static_cast<uint64_t>(positions.base);
    add_strides(problem_.positions, positions.strides, positions.contiguous);
  }

  Problem& problem() { return problem_; }

  // `tensor` has the shape of logits, or that shape with dim reduced to 1.
  void add(Operand& operand, const at::Tensor& tensor) {
    operand.data = const_cast<void*>(tensor.const_data_ptr());
    add_strides(operand, tensor.strides(), tensor.is_contiguous());
    if (tensor.dim() > 0 && tensor.size(dim_) == 1) operand.class_stride = 1;
  }

  const Problem& finish() {
    int dims = 0;
    for (int64_t d = 0; d < static_cast<int64_t>(shape_.size()); ++d) {
      if (d == dim_ || shape_[d] == 1) continue;
      bool merges = dims > 0;
      for (int i = 0; i < count_ && merges; ++i) {
        merges = operands_[i]->stride[dims - 1] == strides_[i][d] * shape_[d];
      }
      if (merges) {
        problem_.size[--dims] *= shape_[d];
      } else {
        problem_.size[dims] = shape_[d];
      }
      for (int i = 0; i < count_; ++i) operands_[i]->stride[dims] = strides_[i][d];
      ++dims;
    }
    problem_.dims = dims;
    return problem_;
  }

 private:
  void add_strides(Strides& operand, at::IntArrayRef strides, bool contiguous) {
    operand.class_stride = shape_.empty() || shape_[dim_] == 1 ? 1 : strides[dim_];
    operand.contiguous = contiguous;
    operands_[count_] = &operand;
    strides_[count_++] = strides;
  }

  Problem problem_;
  int64_t dim_;
  at::IntArrayRef shape_;
  int count_ = 0;
  Strides* operands_[7];
  at::IntArrayRef strides_[7];
};

// Whether the rows of a tensor are scattered so that the classes of neighbouring rows, not those of
// one row, share cache lines: the transposed layouts. PyTorch's own copy turns such a tensor over
// better than row by row gathering does.
bool rows_are_scattered(const at::Tensor& t, int64_t dim) {
  int64_t inner = 1;
  for (int64_t d = dim + 1; d < t.dim(); ++d) inner *= t.size(d);
  return inner == 1 && t.dim() > 1 && t.size(dim) > 1 && t.stride(dim) > 1 &&
         t.is_non_overlapping_and_dense();
}

at::Tensor with_rows_together(const at::Tensor& t, int64_t dim) {
  return rows_are_scattered(t, dim) ? t.contiguous() : t;
}

// An output, and where kernels write it: the same tensor unless its rows are scattered.
struct Output {
  at::Tensor tensor, rows;

  Output(const at::Tensor& out, int64_t dim)
      : tensor(out),
        rows(rows_are_scattered(out, dim) ? at::empty(out.sizes(), out.options()) : out) {}

  void finish() {
    if (!rows.is_same(tensor)) tensor.copy_(rows);
  }
};

at::Tensor broadcast_mask(const OptionalTensor& mask, const at::Tensor& logits) {
  return mask ? mask->expand(logits.sizes()) : at::Tensor();
}

int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

constexpr auto parallel_for = [](int64_t count, int64_t grain, const auto& body) {
  at::parallel_for(0, count, grain, body);
};

void run_problem(Op op, const Problem& p) { execute(kernels(), op, p, threads(), parallel_for); }

// ---- samples ------------------------------------------------------------------------------------

}  // namespace

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

Gradients straight_through_softmax_backward_cpu(StraightThroughSoftmaxBackward& a) {
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
  implement<&gumbel_softmax_cpu>(m);
  implement<&gumbel_argmax_cpu>(m);
  implement<&gumbel_topk_cpu>(m);
  implement<&gumbel_softmax_backward_cpu>(m);
  implement<&gumbel_softmax_hard_backward_cpu>(m);
  implement<&straight_through_softmax_cpu>(m);
  implement<&straight_through_softmax_backward_cpu>(m);
}
