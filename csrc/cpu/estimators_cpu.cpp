// The estimators on the CPU: hard samples, and rows of their gradients.
#include "../ops/estimators.h"
#include "../row_tensors.h"
#include "gumbel_softmax_cpu.h"
#include "kernels.h"
#include "rows_builder.h"
#include "tensors.h"

namespace gumbel_ext {
namespace cpu {
namespace {

// The temperature of an op on rows, checked, or undefined where it has none.
template <class Op>
at::Tensor temperatures_of(const Op& a) {
  if constexpr (has_argument<Op>("tau_tensor")) {
    return row_temperatures(name_of<Op>(), a.tau_tensor, a.logits, a.dim);
  } else {
    return at::Tensor();
  }
}

template <class Estimator>
typename Estimator::Result hard_sample_cpu(Estimator& a) {
  if constexpr (has_argument<Estimator>("gap")) gap_value(a);
  const auto out = a.prepare();
  temperatures_of(a);  // for its check
  if constexpr (std::tuple_size_v<typename Estimator::Result> == 3) {
    sample_into(hard_sample(a), out);
  } else {
    const auto& [y, index] = out;
    sample_into(hard_sample(a), {y, index, empty_rng_state(y)});
  }
  return out;
}

// The operands that all backwards have.
template <class Backward>
struct EstimatorCall {
  EstimatorProblem p{};
  const at::Tensor grad_logits;
  RowsOutput out;
  const at::Tensor index, rows;
  RowsBuilder builder;

  explicit EstimatorCall(Backward& a)
      : grad_logits(a.prepare()),
        out(grad_logits, a.dim),
        index(a.index.contiguous()),
        rows(rows_of(a.logits, a.dim)),
        builder(p, rows, a.logits.scalar_type(), tau_of(a)) {
    const at::Tensor temperatures = temperatures_of(a);
    builder.add(p.logits, rows);
    builder.add(p.grad, rows_of(a.grad, a.dim));
    if (a.mask) builder.add(p.mask, rows_of(a.mask->expand(a.logits.sizes()), a.dim));
    if (temperatures.defined()) builder.add(p.tau, classes_last(temperatures, a.dim));
    p.index = index.const_data_ptr<int64_t>();
    p.grad_logits = out.data();
  }

  using Kernel = void (*)(const EstimatorProblem&, std::int64_t, std::int64_t);

  at::Tensor run(Kernel kernel, int64_t passes = 1) {
    if (rows.numel() > 0) {
      builder.run([&](int64_t begin, int64_t end) { kernel(p, begin, end); }, passes);
      out.finish();
    }
    return grad_logits;
  }

 private:
  static double tau_of(const Backward& a) {
    if constexpr (has_argument<Backward>("tau")) {
      return a.tau;
    } else {
      return 1;
    }
  }
};

at::Tensor gumbel_rao_backward_cpu(GumbelRaoBackward& a) {
  EstimatorCall call(a);
  const RngState state = reserve_randomness(std::nullopt, a.rng_state);
  call.p.draws = a.k.expect_int();
  call.p.seed = state.seed;
  call.p.offset_of_state = state.offset;
  return call.run(kernels().gumbel_rao, call.p.draws);
}

at::Tensor zgr_backward_cpu(ZgrBackward& a) {
  EstimatorCall call(a);
  call.p.kind = EstimatorKind::kZgr;
  return call.run(kernels().estimator);
}

at::Tensor reinmax_backward_cpu(ReinMaxBackward& a) {
  EstimatorCall call(a);
  call.p.kind = EstimatorKind::kReinMax;
  return call.run(kernels().estimator);
}

at::Tensor gapped_straight_through_backward_cpu(GappedStraightThroughBackward& a) {
  const std::optional<double> gap = gap_value(a);
  EstimatorCall call(a);
  call.p.kind = EstimatorKind::kGapped;
  call.p.gap = gap.value_or(0);
  return call.run(kernels().estimator);
}

}  // namespace
}  // namespace cpu
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CPU, m) {
  using namespace gumbel_ext;
  using namespace gumbel_ext::cpu;
  implement<&hard_sample_cpu<GumbelRao>>(m);
  implement<&hard_sample_cpu<Zgr>>(m);
  implement<&hard_sample_cpu<ReinMax>>(m);
  implement<&hard_sample_cpu<GappedStraightThrough>>(m);
  implement<&gumbel_rao_backward_cpu>(m);
  implement<&zgr_backward_cpu>(m);
  implement<&reinmax_backward_cpu>(m);
  implement<&gapped_straight_through_backward_cpu>(m);
}
