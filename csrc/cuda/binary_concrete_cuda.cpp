// The binary concrete's CUDA ops: tensors in, launches out.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "binary_concrete_params.h"
#include "tensors.h"

namespace gumbel_ext {
namespace cuda {
namespace {

// Whether a tensor of this shape, seen in row-major order, is a contiguous one whose elements each
// stand for `repeat` neighbours, over and over.
bool is_broadcast(const at::Tensor& t, BroadcastOperand* operand) {
  int64_t d = t.dim() - 1, repeat = 1, period = 1;
  const auto moves = [&](int64_t dim) { return t.size(dim) != 1 && t.stride(dim) != 0; };
  for (; d >= 0 && !moves(d); --d) repeat *= t.size(d);
  for (; d >= 0 && (moves(d) || t.size(d) == 1); --d) {
    if (t.size(d) == 1) continue;
    if (t.stride(d) != period) return false;
    period *= t.size(d);
  }
  for (; d >= 0; --d) {
    if (moves(d)) return false;
  }
  *operand = BroadcastOperand{t.const_data_ptr(), repeat, period};
  return true;
}

class BinaryCall {
 public:
  BinaryCall(const char* op, const at::Tensor& like, c10::IntArrayRef shape,
             at::OptionalSymIntArrayRef positions)
      : op_(op), guard_(like.device()), like_(like), places_(shape, positions), shape_(shape) {
    params_.count = c10::multiply_integers(shape);
  }

  void set_operand(BroadcastOperand& operand, const at::Tensor& t) {
    kept_.push_back(t);
    if (is_broadcast(t, &operand)) return;
    kept_.push_back(t.contiguous());
    is_broadcast(kept_.back(), &operand);
  }

  // Reciprocals within the normal numbers, so that tau -> 0 and tau -> inf are no 0 * inf. A value
  // on the device that is not positive and finite becomes NaN.
  void set_tau(double tau, const OptionalTensor& tau_tensor) {
    const bool is_double = like_.scalar_type() == at::kDouble;
    const bool known = tau_tensor && on_host(*tau_tensor) && tau_tensor->numel() == 1;
    if (known) {
      const at::Tensor value = tau_tensor->to(at::kDouble);
      check_tau_values(op_, value);
      tau = value.item<double>();
    }
    if (!tau_tensor || known) {
      params_.inverse_tau_value = clamped_factor(1 / tau, is_double);
      params_.inverse_tau_float32 = static_cast<float>(params_.inverse_tau_value);
      return;
    }
    const at::Tensor values = tau_tensor->to(like_.device(), at::kDouble);
    const at::Tensor inverse =
        values.reciprocal()
            .clamp_(clamped_factor(0, is_double),
                    clamped_factor(std::numeric_limits<double>::max(), is_double))
            .masked_fill_(values.gt(0).logical_and(values.isfinite()).logical_not(),
                          std::numeric_limits<double>::quiet_NaN())
            .to(compute_dtype(like_.scalar_type()));
    set_operand(params_.inverse_tau, inverse.expand(shape_));
  }

  void set_random(const std::optional<at::Generator>& generator, const OptionalTensor& rng_state) {
    at::Tensor on_device;
    params_.random = random_source(generator, rng_state, on_device);
    if (on_device.defined()) kept_.push_back(on_device);
  }

  void run(BinaryOp op) {
    const PositionGrid positions =
        merged_positions(static_cast<uint64_t>(places_.base), static_cast<int>(shape_.size()),
                         shape_.data(), places_.strides.data());
    check_launch(op_, launch_binary(op, element_type(like_.scalar_type()), params_, positions,
                                    c10::cuda::getCurrentCUDAStream().stream()));
  }

  BinaryParams& params() { return params_; }

 private:
  const char* op_;
  c10::cuda::CUDAGuard guard_;
  const at::Tensor& like_;
  const Positions places_;
  const c10::IntArrayRef shape_;
  BinaryParams params_{};
  // What the kernels read must outlive the launch; the stream orders its memory's next use.
  std::vector<at::Tensor> kept_;
};

// What the caller gets: the strides that empty_like() gives.
at::Tensor as_empty_like(const at::Tensor& result, const at::Tensor& logits) {
  if (result.strides() == logits.strides()) return result;
  at::Tensor out = at::empty_like(logits);
  return result.strides() == out.strides() ? result : out.copy_(result);
}

std::tuple<at::Tensor, at::Tensor> binary_concrete_cuda(const at::Tensor& logits, double tau,
                                                        const OptionalTensor& tau_tensor, bool hard,
                                                        std::optional<at::Generator> generator,
                                                        const OptionalTensor& rng_state,
                                                        at::OptionalSymIntArrayRef positions) {
  constexpr const char* op = "binary_concrete";
  check_binary(op, logits, tau, tau_tensor, generator, rng_state, positions);
  BinaryCall call(op, logits, logits.sizes(), positions);
  const auto integers = logits.options().dtype(at::kLong);
  if (logits.numel() == 0) return {at::empty_like(logits), at::zeros({2}, integers)};
  const at::Tensor y = at::empty(logits.sizes(), logits.options()), used = at::empty({2}, integers);
  BinaryParams& p = call.params();
  call.set_operand(p.logits, logits);
  call.set_tau(tau, tau_tensor);
  call.set_random(generator, rng_state);
  p.out = y.mutable_data_ptr();
  p.used_state = used.mutable_data_ptr<int64_t>();
  call.run(hard ? BinaryOp::kHard : BinaryOp::kSoft);
  return {as_empty_like(y, logits), used};
}

std::tuple<at::Tensor, at::Tensor> binary_concrete_backward_cuda(
    const at::Tensor& grad, const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor,
    const at::Tensor& rng_state, bool tau_grad, at::OptionalSymIntArrayRef positions) {
  constexpr const char* op = "binary_concrete_backward";
  check_binary(op, logits, tau, tau_tensor, std::nullopt, rng_state, positions);
  check_grad(op, grad, logits);
  BinaryCall call(op, logits, logits.sizes(), positions);
  const at::Tensor out = at::empty(logits.sizes(), logits.options()),
                   terms = empty_tau_terms(logits, tau_grad);
  if (logits.numel() > 0) {
    BinaryParams& p = call.params();
    call.set_operand(p.logits, logits);
    call.set_operand(p.grad, grad);
    call.set_tau(tau, tau_tensor);
    call.set_random(std::nullopt, rng_state);
    p.out = out.mutable_data_ptr();
    if (tau_grad) p.tau_terms = terms.mutable_data_ptr();
    call.run(BinaryOp::kBackward);
  }
  return {as_empty_like(out, logits), terms};
}

std::tuple<at::Tensor, at::Tensor> logistic_noise_cuda(const at::Tensor& like,
                                                       c10::SymIntArrayRef size,
                                                       std::optional<at::Generator> generator,
                                                       const OptionalTensor& rng_state,
                                                       at::OptionalSymIntArrayRef positions) {
  constexpr const char* op = "logistic_noise";
  check_noise(op, like, size, generator, rng_state, positions);
  const at::Tensor noise = at::empty_symint(size, like.options());
  const auto integers = like.options().dtype(at::kLong);
  if (noise.numel() == 0) return {noise, at::zeros({2}, integers)};
  const at::Tensor used = at::empty({2}, integers);
  BinaryCall call(op, noise, noise.sizes(), positions);
  call.set_random(generator, rng_state);
  call.params().out = noise.mutable_data_ptr();
  call.params().used_state = used.mutable_data_ptr<int64_t>();
  call.run(BinaryOp::kNoise);
  return {noise, used};
}

}  // namespace
}  // namespace cuda
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CUDA, m) {
  using namespace gumbel_ext::cuda;
  m.impl("binary_concrete", &binary_concrete_cuda);
  m.impl("binary_concrete_backward", &binary_concrete_backward_cuda);
  m.impl("logistic_noise", &logistic_noise_cuda);
}
