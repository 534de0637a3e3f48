// Tensors -> rows of the estimators' gradients, shared among PyTorch's threads.
#include <torch/library.h>

#include "../gumbel_ext.h"
#include "../row_tensors.h"
#include "kernels.h"
#include "rows_builder.h"
#include "tensors.h"

namespace gumbel_ext {
namespace cpu {
namespace {

// The operands that all of them have; finish() gives the gradient.
struct EstimatorCall {
  EstimatorProblem p{};
  RowsOutput out;
  at::Tensor index;
  at::Tensor rows;
  RowsBuilder builder;

  EstimatorCall(const char* op, const at::Tensor& grad, const at::Tensor& logits,
                const at::Tensor& index, double tau, const OptionalTensor& tau_tensor, int64_t dim,
                const OptionalTensor& mask)
      : out(at::empty_like(logits), dim),
        index(index.contiguous()),
        rows(rows_of(logits, dim)),
        builder(p, rows, logits.scalar_type(), tau) {
    const at::Tensor temperatures = row_temperatures(op, tau_tensor, logits, dim);
    builder.add(p.logits, rows);
    builder.add(p.grad, rows_of(grad, dim));
    if (mask) builder.add(p.mask, rows_of(mask->expand(logits.sizes()), dim));
    if (tau_tensor) builder.add(p.tau, classes_last(temperatures, dim));
    p.index = this->index.const_data_ptr<int64_t>();
    p.grad_logits = out.data();
  }

  using Kernel = void (*)(const EstimatorProblem&, std::int64_t, std::int64_t);

  at::Tensor run(Kernel kernel, int64_t passes = 1) {
    if (rows.numel() > 0) {
      builder.run([&](int64_t begin, int64_t end) { kernel(p, begin, end); }, passes);
      out.settle();
    }
    return out.tensor;
  }
};

at::Tensor gumbel_rao_backward_cpu(const at::Tensor& grad, const at::Tensor& logits,
                                   const at::Tensor& index, double tau,
                                   const OptionalTensor& tau_tensor, int64_t k, int64_t dim,
                                   const OptionalTensor& mask, const at::Tensor& rng_state) {
  constexpr const char* op = "gumbel_rao_backward";
  check_conditional_draws(op, k);
  dim =
      check_backward(op, grad, logits, index, tau, tau_tensor, dim, mask, rng_state, std::nullopt);
  EstimatorCall call(op, grad, logits, index, tau, tau_tensor, dim, mask);
  const RngState state = reserve_randomness(std::nullopt, rng_state);
  call.p.draws = k;
  call.p.seed = state.seed;
  call.p.offset_of_state = state.offset;
  return call.run(kernels().gumbel_rao, k);
}

at::Tensor zgr_backward_cpu(const at::Tensor& grad, const at::Tensor& logits,
                            const at::Tensor& index, int64_t dim, const OptionalTensor& mask) {
  constexpr const char* op = "zgr_backward";
  dim = check_backward(op, grad, logits, index, 1.0, std::nullopt, dim, mask, std::nullopt,
                       std::nullopt);
  EstimatorCall call(op, grad, logits, index, 1.0, std::nullopt, dim, mask);
  call.p.kind = EstimatorKind::kZgr;
  return call.run(kernels().estimator);
}

at::Tensor reinmax_backward_cpu(const at::Tensor& grad, const at::Tensor& logits,
                                const at::Tensor& index, double tau,
                                const OptionalTensor& tau_tensor, int64_t dim,
                                const OptionalTensor& mask) {
  constexpr const char* op = "reinmax_backward";
  dim = check_backward(op, grad, logits, index, tau, tau_tensor, dim, mask, std::nullopt,
                       std::nullopt);
  EstimatorCall call(op, grad, logits, index, tau, tau_tensor, dim, mask);
  call.p.kind = EstimatorKind::kReinMax;
  return call.run(kernels().estimator);
}

at::Tensor gapped_straight_through_backward_cpu(const at::Tensor& grad, const at::Tensor& logits,
                                                const at::Tensor& index, double tau,
                                                const OptionalTensor& tau_tensor,
                                                std::optional<double> gap, int64_t dim,
                                                const OptionalTensor& mask,
                                                const OptionalTensor& gap_tensor) {
  constexpr const char* op = "gapped_straight_through_backward";
  gap = gap_value(op, gap, gap_tensor);
  dim = check_backward(op, grad, logits, index, tau, tau_tensor, dim, mask, std::nullopt,
                       std::nullopt);
  EstimatorCall call(op, grad, logits, index, tau, tau_tensor, dim, mask);
  call.p.kind = EstimatorKind::kGapped;
  call.p.gap = gap.value_or(0);
  return call.run(kernels().estimator);
}

}  // namespace
}  // namespace cpu
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CPU, m) {
  using namespace gumbel_ext::cpu;
  m.impl("gumbel_rao_backward", &gumbel_rao_backward_cpu);
  m.impl("zgr_backward", &zgr_backward_cpu);
  m.impl("reinmax_backward", &reinmax_backward_cpu);
  m.impl("gapped_straight_through_backward", &gapped_straight_through_backward_cpu);
}
