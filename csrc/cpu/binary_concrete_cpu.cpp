// The binary concrete on the CPU: elements shared among PyTorch's threads.
#include <ATen/Parallel.h>

#include <limits>

#include "../ops/binary_concrete.h"
#include "../row_tensors.h"
#include "kernels.h"
#include "tensors.h"

namespace gumbel_ext {
namespace cpu {
namespace {

// Elements of work that pay for waking a thread.
constexpr int64_t kGrain = 8192;
// Runs shorter than this cost more than a copy in which they are longer.
constexpr int64_t kShortRun = 64;

// The reciprocal temperature of each element, of the accumulate type and within its normal
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

using TwoTensors = std::tuple<at::Tensor, at::Tensor>;

TwoTensors binary_concrete_cpu(BinaryConcrete& a) {
  const auto [y, used] = a.prepare();
  const at::Tensor inverse_tau =
      inverse_temperature(name_of<BinaryConcrete>(), a.tau, a.tau_tensor, a.logits);
  if (a.logits.numel() == 0) return {y, used.zero_()};
  const RngState state = reserve_randomness(a.generator, a.rng_state);
  write_state(state, used);
  RowMajorOutput out(y);
  const Positions places(a.logits.sizes(), a.positions);
  BinaryCall call(a.logits, inverse_tau, at::Tensor(), places);
  BinaryProblem& p = call.problem();
  p.seed = state.seed;
  p.offset = state.offset;
  p.hard = a.hard;
  p.out = out.data();
  call.run();
  out.finish();
  return {y, used};
}

TwoTensors binary_concrete_backward_cpu(BinaryConcreteBackward& a) {
  const auto [grad_logits, terms] = a.prepare();
  const at::Tensor inverse_tau =
      inverse_temperature(name_of<BinaryConcreteBackward>(), a.tau, a.tau_tensor, a.logits);
  if (a.logits.numel() == 0) return {grad_logits, terms};
  const RngState state = reserve_randomness(std::nullopt, a.rng_state);
  RowMajorOutput out(grad_logits);
  const Positions places(a.logits.sizes(), a.positions);
  BinaryCall call(a.logits, inverse_tau, a.grad, places);
  BinaryProblem& p = call.problem();
  p.seed = state.seed;
  p.offset = state.offset;
  p.out = out.data();
  if (a.tau_grad) p.tau_terms = terms.mutable_data_ptr();
  call.run();
  out.finish();
  return {grad_logits, terms};
}

TwoTensors logistic_noise_cpu(LogisticNoise& a) {
  const auto [noise, used] = a.prepare();
  if (noise.numel() == 0) return {noise, used.zero_()};
  const RngState state = reserve_randomness(a.generator, a.rng_state);
  write_state(state, used);
  fill_noise(noise, state, a.positions, kernels().logistic_noise);
  return {noise, used};
}

}  // namespace
}  // namespace cpu
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CPU, m) {
  using namespace gumbel_ext::cpu;
  using gumbel_ext::implement;
  implement<&binary_concrete_cpu>(m);
  implement<&binary_concrete_backward_cpu>(m);
  implement<&logistic_noise_cpu>(m);
}
