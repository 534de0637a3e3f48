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

bool is_floating(at::ScalarType type) {
  return type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

}  // namespace

void check_floating(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(is_floating(t.scalar_type()), op, ": ", name,
                   " must have dtype float16, bfloat16, float32 or float64, got ",
                   scalar_name(t.scalar_type()));
  TORCH_CHECK_TYPE(t.layout() == at::kStrided, op, ": ", name,
                   " must be a dense (strided) tensor, got layout ", t.layout());
}

void check_logits(const char* op, const at::Tensor& logits) {
  check_floating(op, "logits", logits);
}

int64_t wrapped_dim(const char* op, const at::Tensor& logits, int64_t dim) {
  const int64_t dims = std::max<int64_t>(logits.dim(), 1);
  TORCH_CHECK_INDEX(-dims <= dim && dim < dims, op, ": dim must be between ", -dims, " and ",
                    dims - 1, " for logits of ", logits.dim(), " dimensions, got ", dim);
  return dim < 0 ? dim + dims : dim;
}

namespace {

bool is_tau(double value) { return std::isfinite(value) && value > 0; }
bool is_beta(double value) { return std::isfinite(value) && value != 0; }

void check_tau_tensor(const char* op, const at::Tensor& t, const at::Tensor& logits,
                      c10::SymIntArrayRef shape, const char* shape_name, const char* name) {
  TORCH_CHECK_TYPE(is_floating(t.scalar_type()), op, ": a ", name,
                   " tensor must have dtype float16, bfloat16, float32 or float64, got ",
                   scalar_name(t.scalar_type()));
  TORCH_CHECK_VALUE(t.device() == logits.device() || (t.device().is_cpu() && t.dim() == 0), op,
                    ": ", name, " must be on the device of logits (", logits.device(), "), got ",
                    t.device());
  TORCH_CHECK_VALUE(broadcasts_to(t.sym_sizes(), shape), op, ": ", name, " must broadcast to ",
                    shape, ", the shape of logits", shape_name, ", got shape ", t.sym_sizes());
}

template <class Valid>
void check_value(const char* op, double value, const char* name, const char* valid_are,
                 Valid valid) {
  TORCH_CHECK_VALUE(valid(value), op, ": ", name, " must be ", valid_are, ", got ", value);
}

template <class Valid>
void check_values(const char* op, const at::Tensor& tensor, const char* name, const char* valid_are,
                  Valid valid) {
  const at::Tensor values = tensor.contiguous();
  const double* data = values.const_data_ptr<double>();
  for (int64_t i = 0; i < values.numel(); ++i) check_value(op, data[i], name, valid_are, valid);
}

constexpr const char* kTauIs = "positive and finite";
constexpr const char* kBetaIs = "finite and not 0";
constexpr const char* kWithDimReduced = " with dim reduced to 1";

}  // namespace

void check_tau(const char* op, double tau, const OptionalTensor& tau_tensor,
               const at::Tensor& logits, int64_t dim, const char* name) {
  if (!tau_tensor) return check_value(op, tau, name, kTauIs, is_tau);
  check_tau_tensor(op, *tau_tensor, logits, shape_reduced(logits, dim), kWithDimReduced, name);
}

void check_elementwise_tau(const char* op, double tau, const OptionalTensor& tau_tensor,
                           const at::Tensor& logits) {
  if (!tau_tensor) return check_value(op, tau, "tau", kTauIs, is_tau);
  check_tau_tensor(op, *tau_tensor, logits, logits.sym_sizes(), "", "tau");
}

void check_beta(const char* op, double beta, const OptionalTensor& beta_tensor,
                const at::Tensor& logits, int64_t dim) {
  if (!beta_tensor) return check_value(op, beta, "beta", kBetaIs, is_beta);
  check_tau_tensor(op, *beta_tensor, logits, shape_reduced(logits, dim), kWithDimReduced, "beta");
}

void check_tau_values(const char* op, const at::Tensor& tau, const char* name) {
  check_values(op, tau, name, kTauIs, is_tau);
}

void check_beta_values(const char* op, const at::Tensor& beta) {
  check_values(op, beta, "beta", kBetaIs, is_beta);
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

void check_grad(const char* op, const at::Tensor& grad, at::ScalarType dtype,
                c10::SymIntArrayRef shape, at::Device device) {
  TORCH_CHECK_TYPE(grad.scalar_type() == dtype, op, ": grad must have dtype ", scalar_name(dtype),
                   ", got ", scalar_name(grad.scalar_type()));
  TORCH_CHECK_VALUE(grad.device() == device, op, ": grad must be on ", device, ", got ",
                    grad.device());
  TORCH_CHECK_VALUE(grad.sym_sizes() == shape, op, ": grad must have shape ", shape, ", got ",
                    grad.sym_sizes());
}

void check_grad(const char* op, const at::Tensor& grad, const at::Tensor& output) {
  check_grad(op, grad, output.scalar_type(), output.sym_sizes(), output.device());
}

void check_index(const char* op, const at::Tensor& index, c10::SymIntArrayRef shape) {
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, op, ": index must have dtype int64, got ",
                   scalar_name(index.scalar_type()));
  TORCH_CHECK_VALUE(index.sym_sizes() == shape, op, ": index must have shape ", shape, ", got ",
                    index.sym_sizes());
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

void check_row_values(const char* op, const char* name, const at::Tensor& values,
                      const at::Tensor& logits, int64_t dim) {
  const c10::SymDimVector shape = shape_without(logits, dim);
  TORCH_CHECK_VALUE(
      values.scalar_type() == at::kDouble && values.sym_sizes() == c10::SymIntArrayRef(shape), op,
      ": ", name, " must be float64 of shape ", c10::SymIntArrayRef(shape), ", got ",
      scalar_name(values.scalar_type()), " of shape ", values.sym_sizes());
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

at::Tensor empty_index(const at::Tensor& logits, int64_t dim, bool wanted) {
  const auto options = logits.options().dtype(at::kLong);
  return wanted ? at::empty_symint(shape_without(logits, dim), options) : at::empty({0}, options);
}

at::Tensor empty_rng_state(const at::Tensor& like) {
  return at::empty({2}, like.options().dtype(at::kLong));
}

at::Tensor empty_grad_tau(const at::Tensor& logits, int64_t dim, bool wanted) {
  const auto options = logits.options().dtype(compute_dtype(logits.scalar_type()));
  return wanted ? at::empty_symint(shape_reduced(logits, dim), options) : at::empty({0}, options);
}

at::Tensor empty_tau_terms(const at::Tensor& logits, bool wanted) {
  const auto options = logits.options().dtype(compute_dtype(logits.scalar_type()));
  return wanted ? at::empty_symint(logits.sym_sizes(), options) : at::empty({0}, options);
}

}  // namespace gumbel_ext
