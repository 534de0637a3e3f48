// What every device's kernels ask of their arguments, checked once and in one wording.
#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace gumbel_ext {

using OptionalTensor = std::optional<at::Tensor>;

// Throws TypeError, ValueError or IndexError that name the argument and its value. Shapes may be
// symbolic.
void check_logits(const char* op, const at::Tensor& logits);
int64_t wrapped_dim(const char* op, const at::Tensor& logits, int64_t dim);
void check_tau(const char* op, double tau, const OptionalTensor& tau_tensor,
               const at::Tensor& logits, int64_t dim, const char* name = "tau");
void check_tau_values(const char* op, const at::Tensor& tau, const char* name = "tau");
// Likewise of an inverse temperature, which may be negative.
void check_beta_values(const char* op, const at::Tensor& beta);
void check_mask(const char* op, const OptionalTensor& mask, const at::Tensor& logits);
// The incoming gradient of a backward op: shape and dtype of the output it belongs to.
void check_grad(const char* op, const at::Tensor& grad, const at::Tensor& output);
// The index that a backward op reads: int64, the shape of logits without dim.
void check_index(const char* op, const at::Tensor& index, const at::Tensor& logits, int64_t dim);
void check_randomness(const char* op, const at::Tensor& logits,
                      const std::optional<at::Generator>& generator,
                      const OptionalTensor& rng_state);
// `dims`: of the tensor whose elements have these positions.
void check_positions(const char* op, at::OptionalSymIntArrayRef positions, int64_t dims);

// Where the noise of a tensor's elements lies: the ops' argument `positions`, or else row-major
// order from 0.
struct Positions {
  int64_t base = 0;
  at::DimVector strides;
  bool contiguous = true;

  Positions(at::IntArrayRef shape, at::OptionalSymIntArrayRef given);
};

// All of a sampling op's arguments, and all of a backward op's, whose logits may be y instead;
// tensors' values aside. Return dim counted from the front.
int64_t check_forward(const char* op, const at::Tensor& logits, double tau,
                      const OptionalTensor& tau_tensor, int64_t dim, const OptionalTensor& mask,
                      const std::optional<at::Generator>& generator,
                      const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions);
// Those of the binary concrete, whose temperature broadcasts to the shape of logits.
void check_binary(const char* op, const at::Tensor& logits, double tau,
                  const OptionalTensor& tau_tensor, const std::optional<at::Generator>& generator,
                  const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions);
int64_t check_topk(const char* op, const at::Tensor& logits, const c10::SymInt& k, int64_t dim,
                   const OptionalTensor& mask, const std::optional<at::Generator>& generator,
                   const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions);
void check_noise(const char* op, const at::Tensor& like, c10::SymIntArrayRef size,
                 const std::optional<at::Generator>& generator, const OptionalTensor& rng_state,
                 at::OptionalSymIntArrayRef positions);
int64_t check_backward(const char* op, const at::Tensor& grad, const at::Tensor& logits,
                       const at::Tensor& index, double tau, const OptionalTensor& tau_tensor,
                       int64_t dim, const OptionalTensor& mask, const OptionalTensor& rng_state,
                       at::OptionalSymIntArrayRef positions);

// Those that the estimators have besides.
void check_conditional_draws(const char* op, const c10::SymInt& k);
// A gap_tensor takes the place of gap; gap_value() reads it.
void check_gap(const char* op, std::optional<double> gap, const OptionalTensor& gap_tensor);
std::optional<double> gap_value(const char* op, std::optional<double> gap,
                                const OptionalTensor& gap_tensor);

// That of the log-space sample: log_y is of the dtype that grad is computed in.
int64_t check_log_backward(const char* op, const at::Tensor& grad, const at::Tensor& log_y,
                           double tau, const OptionalTensor& tau_tensor, int64_t dim);

// Those of the pieces of sharded rows: scores are float32 or float64; largest, shift and dot are
// float64, of the shape of scores or grad without dim.
int64_t check_exponentiate(const char* op, const at::Tensor& scores, const at::Tensor& largest,
                           double tau, const OptionalTensor& tau_tensor, int64_t dim);
int64_t check_dot(const char* op, const at::Tensor& grad, const at::Tensor& y,
                  const at::Tensor& shift, const OptionalTensor& dot, int64_t dim);
// Those of the expected position, and of its backward: positions are [coordinates, classes] with at
// most kMaxCoordinates.
constexpr int64_t kMaxCoordinates = 3;
int64_t check_soft_argmax(const char* op, const at::Tensor& logits, double beta,
                          const OptionalTensor& beta_tensor, int64_t dim,
                          const at::Tensor& positions);
int64_t check_soft_argmax_backward(const char* op, const at::Tensor& grad, const at::Tensor& logits,
                                   const at::Tensor& row_state, double beta,
                                   const OptionalTensor& beta_tensor, int64_t dim,
                                   const at::Tensor& positions);
void check_noise_at(const char* op, const at::Tensor& like, const at::Tensor& position,
                    const at::Tensor& rng_state);

// The shape of logits with `dim` removed (indices), of size 1 (temperatures), or of another size,
// also for logits without dimensions (gumbel_topk).
c10::SymDimVector shape_without(const at::Tensor& logits, int64_t dim);
c10::SymDimVector shape_reduced(const at::Tensor& logits, int64_t dim);
c10::SymDimVector shape_with(const at::Tensor& logits, int64_t dim, const c10::SymInt& size);

// The type that a dtype is computed in.
inline at::ScalarType compute_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

// What a backward op returns for tau: a number for each row of logits, or nothing. Not initialised.
at::Tensor empty_grad_tau(const at::Tensor& logits, int64_t dim, bool tau_grad);
// Likewise that of the binary concrete: what each element adds, in row-major order.
at::Tensor empty_tau_terms(const at::Tensor& logits, bool tau_grad);

}  // namespace gumbel_ext
