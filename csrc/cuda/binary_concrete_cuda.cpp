// The binary concrete on CUDA.
#include <c10/cuda/CUDAGuard.h>

#include "../ops/binary_concrete.h"
#include "../row_tensors.h"
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
                                    current_stream()));
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

using TwoTensors = std::tuple<at::Tensor, at::Tensor>;

TwoTensors binary_concrete_cuda(BinaryConcrete& a) {
  const auto [y, used] = a.prepare();
  BinaryCall call(name_of<BinaryConcrete>(), a.logits, a.logits.sizes(), a.positions);
  if (a.logits.numel() == 0) return {y, used.zero_()};
  RowMajorOutput out(y);
  BinaryParams& p = call.params();
  call.set_operand(p.logits, a.logits);
  call.set_tau(a.tau, a.tau_tensor);
  call.set_random(a.generator, a.rng_state);
  p.out = out.data();
  p.used_state = used.mutable_data_ptr<int64_t>();
  call.run(a.hard ? BinaryOp::kHard : BinaryOp::kSoft);
  out.finish();
  return {y, used};
}

TwoTensors binary_concrete_backward_cuda(BinaryConcreteBackward& a) {
  const auto [grad_logits, terms] = a.prepare();
  BinaryCall call(name_of<BinaryConcreteBackward>(), a.logits, a.logits.sizes(), a.positions);
  if (a.logits.numel() == 0) return {grad_logits, terms};
  RowMajorOutput out(grad_logits);
  BinaryParams& p = call.params();
  call.set_operand(p.logits, a.logits);
  call.set_operand(p.grad, a.grad);
  call.set_tau(a.tau, a.tau_tensor);
  call.set_random(std::nullopt, a.rng_state);
  p.out = out.data();
  if (a.tau_grad) p.tau_terms = terms.mutable_data_ptr();
  call.run(BinaryOp::kBackward);
  out.finish();
  return {grad_logits, terms};
}

TwoTensors logistic_noise_cuda(LogisticNoise& a) {
  const auto [noise, used] = a.prepare();
  if (noise.numel() == 0) return {noise, used.zero_()};
  BinaryCall call(name_of<LogisticNoise>(), noise, noise.sizes(), a.positions);
  call.set_random(a.generator, a.rng_state);
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
  using gumbel_ext::implement;
  implement<&binary_concrete_cuda>(m);
  implement<&binary_concrete_backward_cuda>(m);
  implement<&logistic_noise_cuda>(m);
}
