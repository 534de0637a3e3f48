// Tensors -> Problem, and its plan carried out on PyTorch's threads.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <limits>

#include "backward_into.h"
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

// An output in the layout of `like`, and where kernels write it: the same tensor unless its rows
// are scattered.
struct Output {
  at::Tensor tensor, rows;

  Output(const at::Tensor& like, int64_t dim) : Output(dim, at::empty_like(like)) {}
  // Of the caller's.
  Output(int64_t dim, const at::Tensor& given)
      : tensor(given),
        rows(rows_are_scattered(given, dim) ? at::empty(given.sizes(), given.options()) : given) {}

  void settle() {
    if (!rows.is_same(tensor)) tensor.copy_(rows);
  }
};

at::Tensor broadcast_mask(const OptionalTensor& mask, const at::Tensor& logits) {
  return mask ? mask->expand(logits.sizes()) : at::Tensor();
}

at::DimVector without_dim(const at::Tensor& logits, int64_t dim) {
  at::DimVector shape(logits.sizes());
  if (!shape.empty()) shape.erase(shape.begin() + dim);
  return shape;
}

int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

constexpr auto parallel_for = [](int64_t count, int64_t grain, const auto& body) {
  at::parallel_for(0, count, grain, body);
};

void run_problem(Op op, const Problem& p) { execute(kernels(), op, p, threads(), parallel_for); }

// ---- the ops
// ---------------------------------------------------------------------------------------------------------

std::tuple<at::Tensor, at::Tensor, at::Tensor> gumbel_softmax_cpu(
    const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor, bool hard, int64_t dim,
    const OptionalTensor& mask, bool return_index, std::optional<at::Generator> generator,
    const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions) {
  constexpr const char* op = "gumbel_softmax";
  dim = check_forward(op, logits, tau, tau_tensor, dim, mask, generator, rng_state, positions);
  const at::Tensor temperatures = row_temperatures(op, tau_tensor, logits, dim);

  Output y(logits, dim);
  at::Tensor index =
      return_index ? at::empty(without_dim(logits, dim), at::kLong) : at::empty({0}, at::kLong);
  if (logits.numel() == 0) {
    index.fill_(-1);
    return {y.tensor, index, at::zeros({2}, at::kLong)};
  }
  const RngState state = reserve_randomness(generator, rng_state);
  const at::Tensor allowed = broadcast_mask(mask, logits), rows = with_rows_together(logits, dim);
  const Positions places(logits.sizes(), positions);

  ProblemBuilder builder(logits, dim, places);
  Problem& p = builder.problem();
  p.seed = state.seed;
  p.offset = state.offset;
  p.hard = hard;
  p.tau_value = tau;
  builder.add(p.logits, rows);
  builder.add(p.output, y.rows);
  if (mask) builder.add(p.mask, allowed);
  if (tau_tensor) builder.add(p.tau, temperatures);
  if (return_index) p.index = index.mutable_data_ptr<int64_t>();
  run_problem(Op::kForward, builder.finish());
  y.settle();
  return {y.tensor, index, to_tensor(state)};
}

at::Tensor gumbel_argmax_cpu(const at::Tensor& logits, int64_t dim, bool keepdim,
                             const OptionalTensor& mask, std::optional<at::Generator> generator,
                             const OptionalTensor& rng_state,
                             at::OptionalSymIntArrayRef positions) {
  constexpr const char* op = "gumbel_argmax";
  dim = check_forward(op, logits, 1.0, std::nullopt, dim, mask, generator, rng_state, positions);

  at::Tensor index = at::empty(without_dim(logits, dim), at::kLong);
  if (logits.numel() == 0) {
    index.fill_(-1);
  } else {
    const RngState state = reserve_randomness(generator, rng_state);
    const at::Tensor allowed = broadcast_mask(mask, logits), rows = with_rows_together(logits, dim);
    const Positions places(logits.sizes(), positions);
    ProblemBuilder builder(logits, dim, places);
    Problem& p = builder.problem();
    p.seed = state.seed;
    p.offset = state.offset;
    builder.add(p.logits, rows);
    if (mask) builder.add(p.mask, allowed);
    p.index = index.mutable_data_ptr<int64_t>();
    run_problem(Op::kIndexOnly, builder.finish());
  }
  return keepdim && logits.dim() > 0 ? index.unsqueeze_(dim) : index;
}

at::Tensor gumbel_topk_cpu(const at::Tensor& logits, c10::SymInt k, int64_t dim,
                           const OptionalTensor& mask, std::optional<at::Generator> generator,
                           const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions) {
  dim = check_topk("gumbel_topk", logits, k, dim, mask, generator, rng_state, positions);
  at::Tensor index = at::empty_symint(shape_with(logits, dim, k), at::kLong);
  if (index.numel() == 0) return index;
  const RngState state = reserve_randomness(generator, rng_state);
  const at::Tensor allowed = broadcast_mask(mask, logits), rows = with_rows_together(logits, dim);
  const Positions places(logits.sizes(), positions);
  ProblemBuilder builder(logits, dim, places);
  Problem& p = builder.problem();
  p.seed = state.seed;
  p.offset = state.offset;
  p.k = k.expect_int();
  builder.add(p.logits, rows);
  if (mask) builder.add(p.mask, allowed);
  p.index = index.mutable_data_ptr<int64_t>();
  execute_topk(kernels(), builder.finish(), threads(), parallel_for);
  return index;
}

at::Tensor gumbel_noise_cpu(const at::Tensor& like, c10::SymIntArrayRef size,
                            std::optional<at::Generator> generator, const OptionalTensor& rng_state,
                            at::OptionalSymIntArrayRef positions) {
  check_noise("gumbel_noise", like, size, generator, rng_state, positions);
  at::Tensor out = at::empty_symint(size, like.options());
  if (out.numel() > 0) {
    fill_noise(out, reserve_randomness(generator, rng_state), positions, kernels().noise);
  }
  return out;
}

at::Tensor draw_rng_state_cpu(const at::Tensor& /*like*/, std::optional<at::Generator> generator,
                              const OptionalTensor& /*after*/) {
  return to_tensor(reserve_randomness(generator, std::nullopt));
}

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

at::Tensor backward_into(const char* name, Op op, const at::Tensor& grad,
                         const at::Tensor& logits_or_y, const at::Tensor& index, double tau,
                         const OptionalTensor& tau_tensor, int64_t dim, const OptionalTensor& mask,
                         const OptionalTensor& rng_state, bool tau_grad,
                         at::OptionalSymIntArrayRef positions, const at::Tensor& grad_logits) {
  dim = check_backward(name, grad, logits_or_y, index, tau, tau_tensor, dim, mask, rng_state,
                       positions);
  const at::Tensor temperatures = row_temperatures(name, tau_tensor, logits_or_y, dim);

  Output output(dim, grad_logits);
  at::Tensor grad_tau = empty_grad_tau(logits_or_y, dim, tau_grad).zero_();
  if (logits_or_y.numel() == 0) return grad_tau;

  const at::Tensor indices = index.contiguous();
  const int64_t* row_index = indices.const_data_ptr<int64_t>();
  const int64_t classes = logits_or_y.dim() == 0 ? 1 : logits_or_y.size(dim);
  check_index_values(name, row_index, indices.numel(), classes);
  const at::Tensor allowed = broadcast_mask(mask, logits_or_y);
  const at::Tensor input_rows = with_rows_together(logits_or_y, dim),
                   grad_rows = with_rows_together(grad, dim);

  const Positions places(logits_or_y.sizes(), positions);

  ProblemBuilder builder(logits_or_y, dim, places);
  Problem& p = builder.problem();
  p.tau_value = tau;
  p.index = const_cast<int64_t*>(row_index);
  if (tau_grad) p.grad_tau = grad_tau.mutable_data_ptr();
  builder.add(op == Op::kBackward ? p.output : p.logits, input_rows);
  builder.add(p.grad, grad_rows);
  builder.add(p.grad_logits, output.rows);
  if (mask) builder.add(p.mask, allowed);
  if (tau_tensor) builder.add(p.tau, temperatures);
  p.noise = rng_state.has_value();
  if (rng_state) {
    const RngState state = reserve_randomness(std::nullopt, rng_state);
    p.seed = state.seed;
    p.offset = state.offset;
  }
  run_problem(op, builder.finish());
  output.settle();
  return grad_tau;
}

namespace {

// Both backward ops, but for where y comes from.
std::tuple<at::Tensor, at::Tensor> backward_cpu(const char* name, Op op, const at::Tensor& grad,
                                                const at::Tensor& logits_or_y,
                                                const at::Tensor& index, double tau,
                                                const OptionalTensor& tau_tensor, int64_t dim,
                                                const OptionalTensor& mask,
                                                const OptionalTensor& rng_state, bool tau_grad,
                                                at::OptionalSymIntArrayRef positions) {
  check_logits(name, logits_or_y);
  const at::Tensor grad_logits = at::empty_like(logits_or_y);
  const at::Tensor grad_tau = backward_into(name, op, grad, logits_or_y, index, tau, tau_tensor,
                                            dim, mask, rng_state, tau_grad, positions, grad_logits);
  return {grad_logits, grad_tau};
}

std::tuple<at::Tensor, at::Tensor> gumbel_softmax_backward_cpu(const at::Tensor& grad,
                                                               const at::Tensor& y,
                                                               const at::Tensor& index, double tau,
                                                               const OptionalTensor& tau_tensor,
                                                               int64_t dim, bool tau_grad) {
  return backward_cpu("gumbel_softmax_backward", Op::kBackward, grad, y, index, tau, tau_tensor,
                      dim, std::nullopt, std::nullopt, tau_grad, std::nullopt);
}

std::tuple<at::Tensor, at::Tensor> gumbel_softmax_hard_backward_cpu(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& index, double tau,
    const OptionalTensor& tau_tensor, int64_t dim, const OptionalTensor& mask,
    const at::Tensor& rng_state, bool tau_grad, at::OptionalSymIntArrayRef positions) {
  return backward_cpu("gumbel_softmax_hard_backward", Op::kBackwardRecompute, grad, logits, index,
                      tau, tau_tensor, dim, mask, rng_state, tau_grad, positions);
}

std::tuple<at::Tensor, at::Tensor> straight_through_softmax_cpu(
    const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor, int64_t dim,
    const OptionalTensor& mask, bool return_index) {
  constexpr const char* op = "straight_through_softmax";
  dim = check_forward(op, logits, tau, tau_tensor, dim, mask, std::nullopt, std::nullopt,
                      std::nullopt);
  row_temperatures(op, tau_tensor, logits, dim);  // for its check

  Output y(logits, dim);
  at::Tensor index =
      return_index ? at::empty(without_dim(logits, dim), at::kLong) : at::empty({0}, at::kLong);
  if (logits.numel() == 0) return {y.tensor, index.fill_(-1)};
  const at::Tensor allowed = broadcast_mask(mask, logits), rows = with_rows_together(logits, dim);
  const Positions places(logits.sizes(), std::nullopt);

  ProblemBuilder builder(logits, dim, places);
  Problem& p = builder.problem();
  p.noise = false;
  p.hard = true;
  builder.add(p.logits, rows);
  builder.add(p.output, y.rows);
  if (mask) builder.add(p.mask, allowed);
  if (return_index) p.index = index.mutable_data_ptr<int64_t>();
  run_problem(Op::kForward, builder.finish());
  y.settle();
  return {y.tensor, index};
}

std::tuple<at::Tensor, at::Tensor> straight_through_softmax_backward_cpu(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& index, double tau,
    const OptionalTensor& tau_tensor, int64_t dim, const OptionalTensor& mask, bool tau_grad) {
  return backward_cpu("straight_through_softmax_backward", Op::kBackwardRecompute, grad, logits,
                      index, tau, tau_tensor, dim, mask, std::nullopt, tau_grad, std::nullopt);
}

}  // namespace
}  // namespace cpu
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CPU, m) {
  using namespace gumbel_ext::cpu;
  m.impl("gumbel_softmax", &gumbel_softmax_cpu);
  m.impl("gumbel_argmax", &gumbel_argmax_cpu);
  m.impl("gumbel_topk", &gumbel_topk_cpu);
  m.impl("gumbel_noise", &gumbel_noise_cpu);
  m.impl("draw_rng_state", &draw_rng_state_cpu);
  m.impl("gumbel_softmax_backward", &gumbel_softmax_backward_cpu);
  m.impl("gumbel_softmax_hard_backward", &gumbel_softmax_hard_backward_cpu);
  m.impl("straight_through_softmax", &straight_through_softmax_cpu);
  m.impl("straight_through_softmax_backward", &straight_through_softmax_backward_cpu);
}
