#include "arguments.h"

#include <c10/util/Exception.h>

#include <cmath>

namespace gumbel_ext {

namespace {

// Whether `shape` broadcasts to `target` without growing it.
bool broadcasts_to(c10::SymIntArrayRef shape, c10::SymIntArrayRef target) {
  if (shape.size() > target.size()) return false;
  for (size_t i = 1; i <= shape.size(); ++i) {
    const c10::SymInt& size = shape[shape.size() - i];
    if (size != 1 && size != target[target.size() - i]) return false;
  }
  return true;
}

const char* scalar_name(at::ScalarType type) { return c10::toString(type); }

}  // namespace

void check_logits(const char* op, const at::Tensor& logits) {
  const at::ScalarType type = logits.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, op,
      ": logits must have dtype float16, bfloat16, float32 or float64, got ", scalar_name(type));
  TORCH_CHECK_TYPE(logits.layout() == at::kStrided, op,
                   ": logits must be a dense (strided) tensor, got layout ", logits.layout());
}

int64_t wrapped_dim(const char* op, const at::Tensor& logits, int64_t dim) {
  const int64_t dims = std::max<int64_t>(logits.dim(), 1);
  TORCH_CHECK_INDEX(-dims <= dim && dim < dims, op, ": dim must be between ", -dims, " and ",
                    dims - 1, " for logits of ", logits.dim(), " dimensions, got ", dim);
  return dim < 0 ? dim + dims : dim;
}

namespace {

void check_tau_of(const char* op, double tau, const OptionalTensor& tau_tensor,
                  const at::Tensor& logits, c10::SymIntArrayRef shape, const char* shape_name,
                  const char* name) {
  if (!tau_tensor) {
    TORCH_CHECK_VALUE(std::isfinite(tau) && tau > 0, op, ": ", name,
                      " must be positive and finite, got ", tau);
    return;
  }
  const at::Tensor& t = *tau_tensor;
  const at::ScalarType type = t.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, op,
      ": a ", name, " tensor must have dtype float16, bfloat16, float32 or float64, got ",
      scalar_name(type));
  TORCH_CHECK_VALUE(t.device() == logits.device() || (t.device().is_cpu() && t.dim() == 0), op,
                    ": ", name, " must be on the device of logits (", logits.device(), "), got ",
                    t.device());
  TORCH_CHECK_VALUE(broadcasts_to(t.sym_sizes(), shape), op, ": ", name, " must broadcast to ",
                    shape, ", the shape of logits", shape_name, ", got shape ", t.sym_sizes());
}

}  // namespace

void check_tau(const char* op, double tau, const OptionalTensor& tau_tensor,
               const at::Tensor& logits, int64_t dim, const char* name) {
  check_tau_of(op, tau, tau_tensor, logits, shape_reduced(logits, dim), " with dim reduced to 1",
               name);
}

namespace {

template <class Valid>
void check_values(const char* op, const at::Tensor& tensor, const char* name, const char* valid_are,
                  Valid valid) {
  const at::Tensor values = tensor.contiguous();
  const double* data = values.const_data_ptr<double>();
  for (int64_t i = 0; i < values.numel(); ++i) {
    TORCH_CHECK_VALUE(valid(data[i]), op, ": ", name, " must be ", valid_are, ", got ", data[i]);
  }
}

bool is_beta(double value) { return std::isfinite(value) && value != 0; }

}  // namespace

void check_tau_values(const char* op, const at::Tensor& tau, const char* name) {
  check_values(op, tau, name, "positive and finite",
               [](double value) { return std::isfinite(value) && value > 0; });
}

void check_beta_values(const char* op, const at::Tensor& beta) {
  check_values(op, beta, "beta", "finite and not 0", is_beta);
}

void check_mask(const char* op, const OptionalTensor& mask, const at::Tensor& logits) {
  if (!mask) return;
  TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool, op,
                   ": mask must have dtype bool (True = may be chosen), got ",
                   scalar_name(mask->scalar_type()));
  TORCH_CHECK_VALUE(mask->device() == logits.device(), op,
                    ": mask must be on the device of logits (", logits.device(), "), got ",
                    mask->device());
  TORCH_CHECK_VALUE(broadcasts_to(mask->sym_sizes(), logits.sym_sizes()), op,
                    ": mask must broadcast to the shape of logits, ", logits.sym_sizes(),
                    ", got shape ", mask->sym_sizes());
}

void check_grad(const char* op, const at::Tensor& grad, const at::Tensor& output) {
  TORCH_CHECK_TYPE(grad.scalar_type() == output.scalar_type(), op, ": grad must have dtype ",
                   scalar_name(output.scalar_type()), ", got ", scalar_name(grad.scalar_type()));
  TORCH_CHECK_VALUE(grad.device() == output.device(), op, ": grad must be on ", output.device(),
                    ", got ", grad.device());
  TORCH_CHECK_VALUE(grad.sym_sizes() == output.sym_sizes(), op, ": grad must have shape ",
                    output.sym_sizes(), ", got ", grad.sym_sizes());
}

void check_index(const char* op, const at::Tensor& index, const at::Tensor& logits, int64_t dim) {
  const c10::SymDimVector shape = shape_without(logits, dim);
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, op, ": index must have dtype int64, got ",
                   scalar_name(index.scalar_type()));
  TORCH_CHECK_VALUE(index.sym_sizes() == c10::SymIntArrayRef(shape), op, ": index must have shape ",
                    c10::SymIntArrayRef(shape), ", got ", index.sym_sizes());
}

void check_randomness(const char* op, const at::Tensor& logits,
                      const std::optional<at::Generator>& generator,
                      const OptionalTensor& rng_state) {
  if (!rng_state) return;
  TORCH_CHECK_VALUE(!generator || !generator->defined(), op,
                    ": give either generator or rng_state, not both");
  TORCH_CHECK_TYPE(rng_state->scalar_type() == at::kLong, op,
                   ": rng_state must be an int64 tensor [seed, offset], got dtype ",
                   scalar_name(rng_state->scalar_type()));
  TORCH_CHECK_VALUE(rng_state->is_cpu() || rng_state->device() == logits.device(), op,
                    ": rng_state must be on the CPU or on the device of logits (", logits.device(),
                    "), got ", rng_state->device());
  TORCH_CHECK_VALUE(rng_state->dim() == 1 && rng_state->sym_size(0) == 2, op,
                    ": rng_state must be an int64 tensor [seed, offset] of shape [2], got shape ",
                    rng_state->sym_sizes());
}

void check_positions(const char* op, at::OptionalSymIntArrayRef positions, int64_t dims) {
  if (!positions) return;
  TORCH_CHECK_VALUE(static_cast<int64_t>(positions->size()) == dims + 1, op,
                    ": positions must be [base, one stride per dimension], ", dims + 1,
                    " numbers, got ", *positions);
}

Positions::Positions(at::IntArrayRef shape, at::OptionalSymIntArrayRef given)
    : strides(shape.size()) {
  int64_t count = 1;
  for (size_t d = shape.size(); d-- > 0; count *= shape[d]) strides[d] = count;
  if (!given) return;
  base = (*given)[0].expect_int();
  for (size_t d = 0; d < shape.size(); ++d) {
    const int64_t stride = (*given)[d + 1].expect_int();
    contiguous = contiguous && (shape[d] == 1 || stride == strides[d]);
    strides[d] = stride;
  }
}

int64_t check_forward(const char* op, const at::Tensor& logits, double tau,
                      const OptionalTensor& tau_tensor, int64_t dim, const OptionalTensor& mask,
                      const std::optional<at::Generator>& generator,
                      const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions) {
  check_logits(op, logits);
  dim = wrapped_dim(op, logits, dim);
  check_tau(op, tau, tau_tensor, logits, dim);
  check_mask(op, mask, logits);
  check_randomness(op, logits, generator, rng_state);
  check_positions(op, positions, logits.dim());
  return dim;
}

void check_binary(const char* op, const at::Tensor& logits, double tau,
                  const OptionalTensor& tau_tensor, const std::optional<at::Generator>& generator,
                  const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions) {
  check_logits(op, logits);
  check_tau_of(op, tau, tau_tensor, logits, logits.sym_sizes(), "", "tau");
  check_randomness(op, logits, generator, rng_state);
  check_positions(op, positions, logits.dim());
}

int64_t check_topk(const char* op, const at::Tensor& logits, const c10::SymInt& k, int64_t dim,
                   const OptionalTensor& mask, const std::optional<at::Generator>& generator,
                   const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions) {
  dim = check_forward(op, logits, 1.0, std::nullopt, dim, mask, generator, rng_state, positions);
  const c10::SymInt classes = logits.dim() == 0 ? c10::SymInt(1) : logits.sym_size(dim);
  TORCH_CHECK_VALUE(k >= 0 && classes >= k, op, ": k must be between 0 and the number of classes, ",
                    classes, ", got ", k);
  return dim;
}

void check_noise(const char* op, const at::Tensor& like, c10::SymIntArrayRef size,
                 const std::optional<at::Generator>& generator, const OptionalTensor& rng_state,
                 at::OptionalSymIntArrayRef positions) {
  check_logits(op, like);
  check_randomness(op, like, generator, rng_state);
  check_positions(op, positions, static_cast<int64_t>(size.size()));
}

int64_t check_backward(const char* op, const at::Tensor& grad, const at::Tensor& logits,
                       const at::Tensor& index, double tau, const OptionalTensor& tau_tensor,
                       int64_t dim, const OptionalTensor& mask, const OptionalTensor& rng_state,
                       at::OptionalSymIntArrayRef positions) {
  dim = check_forward(op, logits, tau, tau_tensor, dim, mask, std::nullopt, rng_state, positions);
  check_grad(op, grad, logits);
  check_index(op, index, logits, dim);
  return dim;
}

void check_conditional_draws(const char* op, const c10::SymInt& k) {
  TORCH_CHECK_VALUE(k >= 1, op, ": k must be at least 1, got ", k);
}

void check_gap(const char* op, std::optional<double> gap, const OptionalTensor& gap_tensor) {
  if (gap_tensor) {
    TORCH_CHECK_VALUE(gap_tensor->scalar_type() == at::kDouble && gap_tensor->dim() == 0, op,
                      ": gap_tensor must be a float64 tensor without dimensions, got ",
                      scalar_name(gap_tensor->scalar_type()), " of shape ",
                      gap_tensor->sym_sizes());
    return;
  }
  TORCH_CHECK_VALUE(!gap || (std::isfinite(*gap) && *gap > 0), op,
                    ": gap must be positive and finite, or None, got ", *gap);
}

std::optional<double> gap_value(const char* op, std::optional<double> gap,
                                const OptionalTensor& gap_tensor) {
  check_gap(op, gap, gap_tensor);
  if (!gap_tensor) return gap;
  const double value = gap_tensor->item<double>();
  check_gap(op, value, std::nullopt);
  return value;
}

int64_t check_log_backward(const char* op, const at::Tensor& grad, const at::Tensor& log_y,
                           double tau, const OptionalTensor& tau_tensor, int64_t dim) {
  check_logits(op, grad);
  dim = wrapped_dim(op, grad, dim);
  TORCH_CHECK_TYPE(log_y.scalar_type() == compute_dtype(grad.scalar_type()), op,
                   ": log_y must have the dtype that grad is computed in, got ",
                   c10::toString(log_y.scalar_type()), " for grad of ",
                   c10::toString(grad.scalar_type()));
  TORCH_CHECK_VALUE(log_y.sym_sizes() == grad.sym_sizes() && log_y.device() == grad.device(), op,
                    ": log_y must have the shape and device of grad, got shape ", log_y.sym_sizes(),
                    " on ", log_y.device());
  check_tau(op, tau, tau_tensor, grad, dim);
  return dim;
}

namespace {

void check_of_rows(const char* op, const char* name, const at::Tensor& values,
                   const at::Tensor& logits, int64_t dim) {
  const c10::SymDimVector shape = shape_without(logits, dim);
  TORCH_CHECK_VALUE(
      values.scalar_type() == at::kDouble && values.sym_sizes() == c10::SymIntArrayRef(shape), op,
      ": ", name, " must be float64 of shape ", c10::SymIntArrayRef(shape), ", got ",
      scalar_name(values.scalar_type()), " of shape ", values.sym_sizes());
}

}  // namespace

int64_t check_exponentiate(const char* op, const at::Tensor& scores, const at::Tensor& largest,
                           double tau, const OptionalTensor& tau_tensor, int64_t dim) {
  check_logits(op, scores);
  TORCH_CHECK_TYPE(scores.scalar_type() == compute_dtype(scores.scalar_type()), op,
                   ": scores must have dtype float32 or float64, got ",
                   scalar_name(scores.scalar_type()));
  TORCH_CHECK_VALUE(scores.dim() > 0, op, ": scores must have a dimension");
  dim = wrapped_dim(op, scores, dim);
  check_tau(op, tau, tau_tensor, scores, dim);
  check_of_rows(op, "largest", largest, scores, dim);
  return dim;
}

int64_t check_dot(const char* op, const at::Tensor& grad, const at::Tensor& y,
                  const at::Tensor& shift, const OptionalTensor& dot, int64_t dim) {
  check_logits(op, grad);
  TORCH_CHECK_VALUE(grad.dim() > 0, op, ": grad must have a dimension");
  dim = wrapped_dim(op, grad, dim);
  TORCH_CHECK_VALUE(
      y.sym_sizes() == grad.sym_sizes() && (y.scalar_type() == grad.scalar_type() ||
                                            y.scalar_type() == compute_dtype(grad.scalar_type())),
      op, ": y must have the shape of grad, and its dtype or the one computed in");
  check_of_rows(op, "shift", shift, grad, dim);
  if (dot) check_of_rows(op, "dot", *dot, grad, dim);
  return dim;
}

int64_t check_soft_argmax(const char* op, const at::Tensor& logits, double beta,
                          const OptionalTensor& beta_tensor, int64_t dim,
                          const at::Tensor& positions) {
  check_logits(op, logits);
  dim = wrapped_dim(op, logits, dim);
  TORCH_CHECK_VALUE(beta_tensor || is_beta(beta), op, ": beta must be finite and not 0, got ",
                    beta);
  check_tau(op, /*tau=*/1.0, beta_tensor, logits, dim, "beta");
  const c10::SymInt classes = logits.dim() == 0 ? c10::SymInt(1) : logits.sym_size(dim);
  TORCH_CHECK_VALUE(classes != 0, op, ": logits must have at least one class along dim, got shape ",
                    logits.sym_sizes());
  TORCH_CHECK_TYPE(positions.is_floating_point() ||
                       c10::isIntegralType(positions.scalar_type(), /*includeBool=*/false),
                   op, ": positions must have an integer or floating-point dtype, got ",
                   scalar_name(positions.scalar_type()));
  TORCH_CHECK_VALUE(positions.device() == logits.device(), op,
                    ": positions must be on the device of logits (", logits.device(), "), got ",
                    positions.device());
  TORCH_CHECK_VALUE(positions.dim() == 2 && positions.sym_size(0) >= 1 &&
                        positions.sym_size(0) <= kMaxCoordinates &&
                        positions.sym_size(1) == classes,
                    op, ": positions must be of shape [1 to ", kMaxCoordinates, ", ", classes,
                    "], got ", positions.sym_sizes());
  return dim;
}

int64_t check_soft_argmax_backward(const char* op, const at::Tensor& grad, const at::Tensor& logits,
                                   const at::Tensor& row_state, double beta,
                                   const OptionalTensor& beta_tensor, int64_t dim,
                                   const at::Tensor& positions) {
  dim = check_soft_argmax(op, logits, beta, beta_tensor, dim, positions);
  c10::SymDimVector shape = shape_without(logits, dim);
  shape.push_back(positions.sym_size(0));
  TORCH_CHECK_TYPE(grad.scalar_type() == compute_dtype(logits.scalar_type()), op,
                   ": grad must have dtype ", scalar_name(compute_dtype(logits.scalar_type())),
                   ", got ", scalar_name(grad.scalar_type()));
  TORCH_CHECK_VALUE(grad.sym_sizes() == c10::SymIntArrayRef(shape), op, ": grad must have shape ",
                    c10::SymIntArrayRef(shape), ", got ", grad.sym_sizes());
  shape.back() += 3;
  TORCH_CHECK_VALUE(
      row_state.scalar_type() == at::kDouble && row_state.sym_sizes() == c10::SymIntArrayRef(shape),
      op, ": row_state must be float64 of shape ", c10::SymIntArrayRef(shape), ", got ",
      scalar_name(row_state.scalar_type()), " of shape ", row_state.sym_sizes());
  return dim;
}

void check_noise_at(const char* op, const at::Tensor& like, const at::Tensor& position,
                    const at::Tensor& rng_state) {
  check_logits(op, like);
  check_randomness(op, like, std::nullopt, rng_state);
  TORCH_CHECK_TYPE(position.scalar_type() == at::kLong, op, ": position must be int64, got ",
                   scalar_name(position.scalar_type()));
  TORCH_CHECK_VALUE(position.device() == like.device(), op, ": position must be on ", like.device(),
                    ", got ", position.device());
}

c10::SymDimVector shape_without(const at::Tensor& logits, int64_t dim) {
  c10::SymDimVector shape(logits.sym_sizes().begin(), logits.sym_sizes().end());
  if (!shape.empty()) shape.erase(shape.begin() + dim);
  return shape;
}

c10::SymDimVector shape_reduced(const at::Tensor& logits, int64_t dim) {
  c10::SymDimVector shape(logits.sym_sizes().begin(), logits.sym_sizes().end());
  if (!shape.empty()) shape[dim] = 1;
  return shape;
}

c10::SymDimVector shape_with(const at::Tensor& logits, int64_t dim, const c10::SymInt& size) {
  c10::SymDimVector shape(logits.sym_sizes().begin(), logits.sym_sizes().end());
  if (shape.empty()) {
    shape.push_back(size);
  } else {
    shape[dim] = size;
  }
  return shape;
}

at::Tensor empty_grad_tau(const at::Tensor& logits, int64_t dim, bool tau_grad) {
  const auto options = logits.options().dtype(compute_dtype(logits.scalar_type()));
  return tau_grad ? at::empty_symint(shape_reduced(logits, dim), options) : at::empty({0}, options);
}

at::Tensor empty_tau_terms(const at::Tensor& logits, bool tau_grad) {
  const auto options = logits.options().dtype(compute_dtype(logits.scalar_type()));
  return tau_grad ? at::empty_symint(logits.sym_sizes(), options) : at::empty({0}, options);
}

}  // namespace gumbel_ext
