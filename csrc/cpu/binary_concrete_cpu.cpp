// Tensors -> BinaryProblem, and its elements shared among PyTorch's threads.
#include <torch/library.h>

#include <limits>

#include "kernels.h"
#include "tensors.h"

namespace gumbel_ext {
namespace cpu {
namespace {

// Elements of work that pay for waking a thread.
constexpr int64_t kGrain = 8192;
// Runs shorter than this cost more than a copy in which they are longer.
constexpr int64_t kShortRun = 64;

// The reciprocal temperature of each element, in the type computed in and within its normal
// numbers, so that the limits tau -> 0 and tau -> inf are no 0 * inf.
at::Tensor inverse_temperature(const char* op, double tau, const OptionalTensor& tau_tensor,
                               const at::Tensor& logits) {
  const at::ScalarType type = compute_dtype(logits.scalar_type());
  const bool is_double = type == at::kDouble;
  const double low =
      is_double ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min();
  const double high =
      is_double ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
  if (!tau_tensor) {
    return at::scalar_tensor(std::min(std::max(1 / tau, low), high), type).expand(logits.sizes());
  }
  const at::Tensor values = tau_tensor->to(at::kDouble);
  check_tau_values(op, values);
  return values.reciprocal().clamp_(low, high).to(type).expand(logits.sizes());
}

// The operands of a call. The tensors and positions passed in must outlive it.
class BinaryCall {
 public:
  BinaryCall(const at::Tensor& logits, const at::Tensor& inverse_tau, const at::Tensor& grad,
             const Positions& positions)
      : operands_{logits, inverse_tau, grad}, positions_(positions) {
    problem_.type = element_type(logits.scalar_type());
    problem_.first_position = static_cast<uint64_t>(positions.base);
    if (!set_runs(/*may_be_short=*/false)) {
      for (at::Tensor& operand : operands_) {
        if (operand.defined()) operand = operand.contiguous();
      }
      set_runs(/*may_be_short=*/true);
    }
  }

  BinaryProblem& problem() { return problem_; }

  void run() {
    at::parallel_for(0, operands_[0].numel(), kGrain,
                     [&](int64_t begin, int64_t end) { kernels().binary(problem_, begin, end); });
  }

 private:
  // Merges trailing dimensions into the run for as long as each operand goes on, or stands still,
  // as it does within it, then the others. False if a run can only be had by copying.
  bool set_runs(bool may_be_short) {
    const at::IntArrayRef shape = operands_[0].sizes();
    RunOperand* const targets[] = {&problem_.logits, &problem_.inverse_tau, &problem_.grad};
    for (int i = 0; i < 3; ++i) {
      if (!operands_[i].defined()) continue;
      targets[i]->data = operands_[i].const_data_ptr();
      targets[i]->one = true;
    }
    int64_t run = 1, d = static_cast<int64_t>(shape.size()) - 1;
    for (; d >= 0; --d) {
      if (shape[d] == 1) continue;
      bool merges = positions_.strides[d] == run;
      for (int i = 0; i < 3 && merges; ++i) {
        if (!operands_[i].defined()) continue;
        const int64_t stride = operands_[i].stride(d);
        if (run == 1) {
          merges = stride == 0 || stride == 1;
        } else {
          merges = stride == (targets[i]->one ? 0 : run);
        }
      }
      if (!merges) break;
      if (run == 1) {
        for (int i = 0; i < 3; ++i) {
          if (operands_[i].defined()) targets[i]->one = operands_[i].stride(d) == 0;
        }
      }
      run *= shape[d];
    }
    if (!may_be_short && run < kShortRun && run < operands_[0].numel()) return false;
    problem_.run = run;
    problem_.dims = 0;
    for (int64_t outer = 0; outer <= d; ++outer) {
      if (shape[outer] == 1) continue;
      const int at = problem_.dims++;
      problem_.size[at] = shape[outer];
      problem_.position_stride[at] = positions_.strides[outer];
      for (int i = 0; i < 3; ++i) {
        if (operands_[i].defined()) targets[i]->stride[at] = operands_[i].stride(outer);
      }
    }
    return true;
  }

  at::Tensor operands_[3];
  const Positions& positions_;
  BinaryProblem problem_;
};

// What the caller gets: the strides that empty_like() gives.
at::Tensor as_empty_like(const at::Tensor& result, const at::Tensor& logits) {
  if (result.strides() == logits.strides()) return result;
  at::Tensor out = at::empty_like(logits);
  return result.strides() == out.strides() ? result : out.copy_(result);
}

std::tuple<at::Tensor, at::Tensor> binary_concrete_cpu(const at::Tensor& logits, double tau,
                                                       const OptionalTensor& tau_tensor, bool hard,
                                                       std::optional<at::Generator> generator,
                                                       const OptionalTensor& rng_state,
                                                       at::OptionalSymIntArrayRef positions) {
  constexpr const char* op = "binary_concrete";
  check_binary(op, logits, tau, tau_tensor, generator, rng_state, positions);
  const at::Tensor inverse_tau = inverse_temperature(op, tau, tau_tensor, logits);
  if (logits.numel() == 0) return {at::empty_like(logits), at::zeros({2}, at::kLong)};
  const RngState state = reserve_randomness(generator, rng_state);
  const at::Tensor y = at::empty(logits.sizes(), logits.options());
  const Positions places(logits.sizes(), positions);
  BinaryCall call(logits, inverse_tau, at::Tensor(), places);
  BinaryProblem& p = call.problem();
  p.seed = state.seed;
  p.offset = state.offset;
  p.hard = hard;
  p.out = y.mutable_data_ptr();
  call.run();
  return {as_empty_like(y, logits), to_tensor(state)};
}

std::tuple<at::Tensor, at::Tensor> binary_concrete_backward_cpu(
    const at::Tensor& grad, const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor,
    const at::Tensor& rng_state, bool tau_grad, at::OptionalSymIntArrayRef positions) {
  constexpr const char* op = "binary_concrete_backward";
  check_binary(op, logits, tau, tau_tensor, std::nullopt, rng_state, positions);
  check_grad(op, grad, logits);
  const at::Tensor inverse_tau = inverse_temperature(op, tau, tau_tensor, logits);
  const at::Tensor out = at::empty(logits.sizes(), logits.options()),
                   terms = empty_tau_terms(logits, tau_grad);
  if (logits.numel() > 0) {
    const RngState state = reserve_randomness(std::nullopt, rng_state);
    const Positions places(logits.sizes(), positions);
    BinaryCall call(logits, inverse_tau, grad, places);
    BinaryProblem& p = call.problem();
    p.seed = state.seed;
    p.offset = state.offset;
    p.out = out.mutable_data_ptr();
    if (tau_grad) p.tau_terms = terms.mutable_data_ptr();
    call.run();
  }
  return {as_empty_like(out, logits), terms};
}

std::tuple<at::Tensor, at::Tensor> logistic_noise_cpu(const at::Tensor& like,
                                                      c10::SymIntArrayRef size,
                                                      std::optional<at::Generator> generator,
                                                      const OptionalTensor& rng_state,
                                                      at::OptionalSymIntArrayRef positions) {
  check_noise("logistic_noise", like, size, generator, rng_state, positions);
  at::Tensor out = at::empty_symint(size, like.options());
  if (out.numel() == 0) return {out, at::zeros({2}, at::kLong)};
  const RngState state = reserve_randomness(generator, rng_state);
  fill_noise(out, state, positions, kernels().logistic_noise);
  return {out, to_tensor(state)};
}

}  // namespace
}  // namespace cpu
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CPU, m) {
  using namespace gumbel_ext::cpu;
  m.impl("binary_concrete", &binary_concrete_cpu);
  m.impl("binary_concrete_backward", &binary_concrete_backward_cpu);
  m.impl("logistic_noise", &logistic_noise_cpu);
}
