// Checks of arguments that ops have in common, each in one wording, and shapes of results.
#pragma once

#include "op.h"

namespace gumbel_ext {

// The dtype that kernels compute and accumulate in.
inline at::ScalarType compute_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

// ---- checks -------------------------------------------------------------------------------------
// Each throws TypeError, ValueError or IndexError that names the argument and its value. Shapes may
// be symbolic.

// A floating-point dtype that kernels compute in, of a dense tensor.
void check_floating(const char* op, const char* name, const at::Tensor& t);
void check_logits(const char* op, const at::Tensor& logits);
int64_t wrapped_dim(const char* op, const at::Tensor& logits, int64_t dim);
// A temperature broadcasts to the shape of logits with dim reduced to 1, or, where ops work element
// by element, to that of logits.
void check_tau(const char* op, double tau, const OptionalTensor& tau_tensor,
               const at::Tensor& logits, int64_t dim, const char* name = "tau");
void check_elementwise_tau(const char* op, double tau, const OptionalTensor& tau_tensor,
                           const at::Tensor& logits);
void check_tau_values(const char* op, const at::Tensor& tau, const char* name = "tau");
// An inverse temperature may be negative.
void check_beta(const char* op, double beta, const OptionalTensor& beta_tensor,
                const at::Tensor& logits, int64_t dim);
void check_beta_values(const char* op, const at::Tensor& beta);
void check_mask(const char* op, const OptionalTensor& mask, const at::Tensor& logits);
// The incoming gradient of a backward op: dtype, shape and device of the output it belongs to.
void check_grad(const char* op, const at::Tensor& grad, at::ScalarType dtype,
                c10::SymIntArrayRef shape, at::Device device);
void check_grad(const char* op, const at::Tensor& grad, const at::Tensor& output);
// The index that a backward op reads: int64, the shape of logits without dim.
void check_index(const char* op, const at::Tensor& index, c10::SymIntArrayRef shape);
void check_randomness(const char* op, const at::Tensor& logits,
                      const std::optional<at::Generator>& generator,
                      const OptionalTensor& rng_state);
// `dims`: of the tensor whose elements have these positions.
void check_positions(const char* op, at::OptionalSymIntArrayRef positions, int64_t dims);
void check_conditional_draws(const char* op, const c10::SymInt& k);
void check_gap(const char* op, std::optional<double> gap, const OptionalTensor& gap_tensor);
// The value of gap, which a gap_tensor takes the place of.
std::optional<double> gap_value(const char* op, std::optional<double> gap,
                                const OptionalTensor& gap_tensor);
// Float64 numbers, one for each row of logits.
void check_row_values(const char* op, const char* name, const at::Tensor& values,
                      const at::Tensor& logits, int64_t dim);

// ---- shapes and results -------------------------------------------------------------------------

// The shape of logits with `dim` removed (indices), of size 1 (temperatures), or of another size,
// also for logits without dimensions (gumbel_topk).
c10::SymDimVector shape_without(const at::Tensor& logits, int64_t dim);
c10::SymDimVector shape_reduced(const at::Tensor& logits, int64_t dim);
c10::SymDimVector shape_with(const at::Tensor& logits, int64_t dim, const c10::SymInt& size);

// Results that are not initialised. Those that are not wanted have no elements.
at::Tensor empty_index(const at::Tensor& logits, int64_t dim, bool wanted = true);
at::Tensor empty_rng_state(const at::Tensor& like);
// What a backward op returns for tau: a number for each row of logits; and that of an elementwise
// op: what each element adds, in row-major order.
at::Tensor empty_grad_tau(const at::Tensor& logits, int64_t dim, bool wanted);
at::Tensor empty_tau_terms(const at::Tensor& logits, bool wanted);

// ---- the arguments of an op ---------------------------------------------------------------------

// Where the noise of a tensor's elements lies: the ops' argument `positions`, or else row-major
// order from 0.
struct Positions {
  int64_t base = 0;
  at::DimVector strides;
  bool contiguous = true;

  Positions(at::IntArrayRef shape, at::OptionalSymIntArrayRef given);
};

// Checks the arguments of an op on rows of classes, found by their names, and counts dim from the
// front.
template <class Op>
void check_rows(Op& a) {
  constexpr const char* op = name_of<Op>();
  const at::Tensor& logits = [&]() -> const at::Tensor& {
    if constexpr (has_argument<Op>("logits")) {
      return a.logits;
    } else {
      return a.y;
    }
  }();
  check_logits(op, logits);
  a.dim = wrapped_dim(op, logits, a.dim);
  if constexpr (has_argument<Op>("tau")) check_tau(op, a.tau, a.tau_tensor, logits, a.dim);
  if constexpr (has_argument<Op>("mask")) check_mask(op, a.mask, logits);
  if constexpr (has_argument<Op>("generator")) {
    check_randomness(op, logits, a.generator, a.rng_state);
  } else if constexpr (has_argument<Op>("rng_state")) {
    check_randomness(op, logits, std::nullopt, a.rng_state);
  }
  if constexpr (has_argument<Op>("positions")) check_positions(op, a.positions, logits.dim());
}

// The same of a backward op, whose gradient has the shape of logits.
template <class Op>
void check_rows_backward(Op& a) {
  check_rows(a);
  constexpr const char* op = name_of<Op>();
  if constexpr (has_argument<Op>("logits")) {
    check_grad(op, a.grad, a.logits);
  } else {
    check_grad(op, a.grad, a.y);
  }
  check_index(op, a.index, shape_without(a.grad, a.dim));
}

// The arguments of an op that gives noise.
template <class Op>
void check_noise(const Op& a) {
  constexpr const char* op = name_of<Op>();
  check_logits(op, a.like);
  check_randomness(op, a.like, a.generator, a.rng_state);
  check_positions(op, a.positions, static_cast<int64_t>(a.size.size()));
}

}  // namespace gumbel_ext
