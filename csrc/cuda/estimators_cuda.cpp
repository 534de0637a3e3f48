// The estimators on CUDA: hard samples, and rows of their gradients.
#include <c10/cuda/CUDAGuard.h>

#include "../ops/estimators.h"
#include "estimators_params.h"
#include "gumbel_softmax_cuda.h"
#include "rows_builder.h"

namespace gumbel_ext {
namespace cuda {
namespace {

template <class Estimator>
typename Estimator::Result hard_sample_cuda(Estimator& a) {
  if constexpr (has_argument<Estimator>("gap")) gap_value(a);
  const auto out = a.prepare();
  if constexpr (has_argument<Estimator>("tau_tensor")) check_tau_on_host(a);
  if constexpr (std::tuple_size_v<typename Estimator::Result> == 3) {
    sample_into(hard_sample(a), out);
  } else {
    const auto& [y, index] = out;
    sample_into(hard_sample(a), {y, index, empty_rng_state(y)});
  }
  return out;
}

// What all backwards are given; the tensors outlive the launch.
template <class Backward>
class EstimatorCall {
 public:
  explicit EstimatorCall(Backward& a)
      : grad_logits_(a.prepare()),
        guard_(a.logits.device()),
        out_(grad_logits_, a.dim),
        index_(a.index.contiguous()),
        builder_(params, kOp, a.logits, a.dim, tau_of(a), tau_tensor_of(a)) {
    if (a.logits.numel() == 0) return;
    builder_.add(params.grad, a.grad);
    builder_.add(params.logits, a.logits);
    if (a.mask) builder_.add(params.mask, a.mask->expand(a.logits.sizes()));
    builder_.finish();
    params.index = index_.const_data_ptr<int64_t>();
    params.grad_logits = out_.data();
  }

  at::Tensor run(Estimator estimator) {
    return run([&] { return launch_estimator(estimator, params, current_stream()); });
  }
  // launch() returns the error.
  template <class Launch>
  at::Tensor run(Launch launch) {
    if (grad_logits_.numel() == 0) return grad_logits_;
    check_launch(kOp, launch());
    out_.finish();
    return grad_logits_;
  }

  GumbelRaoParams params{};

 private:
  static constexpr const char* kOp = name_of<Backward>();

  static double tau_of(const Backward& a) {
    if constexpr (has_argument<Backward>("tau")) {
      return a.tau;
    } else {
      return 1;
    }
  }
  static OptionalTensor tau_tensor_of(const Backward& a) {
    if constexpr (has_argument<Backward>("tau_tensor")) {
      return a.tau_tensor;
    } else {
      return std::nullopt;
    }
  }

  const at::Tensor grad_logits_;
  const c10::cuda::CUDAGuard guard_;
  RowsOutput out_;
  const at::Tensor index_;
  RowsBuilder builder_;
};

at::Tensor gumbel_rao_backward_cuda(GumbelRaoBackward& a) {
  EstimatorCall call(a);
  return call.run([&] {
    at::Tensor on_device, sums;
    GumbelRaoParams& p = call.params;
    p.random = random_source(std::nullopt, a.rng_state, on_device);
    p.draws = a.k.expect_int();
    p.draws_at_once = kDrawsAtOnce;
    if (make_gumbel_rao_plan(p.type, p.classes).groups == 0 && p.draws > kDrawsAtOnce) {
      p.sums = p.grad_logits;
      if (element_bytes(p.type) == 2) {
        sums = at::empty({p.rows, p.classes}, a.logits.options().dtype(at::kFloat));
        p.sums = sums.mutable_data_ptr();
      }
    }
    return launch_gumbel_rao(p, current_stream());
  });
}

at::Tensor zgr_backward_cuda(ZgrBackward& a) { return EstimatorCall(a).run(Estimator::kZgr); }

at::Tensor reinmax_backward_cuda(ReinMaxBackward& a) {
  return EstimatorCall(a).run(Estimator::kReinMax);
}

at::Tensor gapped_straight_through_backward_cuda(GappedStraightThroughBackward& a) {
  const std::optional<double> gap = gap_value(a);
  EstimatorCall call(a);
  if (gap) {
    call.params.gap = clamped_factor(*gap, a.logits.scalar_type() == at::kDouble);
    call.params.gap_float32 = static_cast<float>(call.params.gap);
  }
  return call.run(Estimator::kGapped);
}

}  // namespace
}  // namespace cuda
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CUDA, m) {
  using namespace gumbel_ext;
  using namespace gumbel_ext::cuda;
  implement<&hard_sample_cuda<GumbelRao>>(m);
  implement<&hard_sample_cuda<Zgr>>(m);
  implement<&hard_sample_cuda<ReinMax>>(m);
  implement<&hard_sample_cuda<GappedStraightThrough>>(m);
  implement<&gumbel_rao_backward_cuda>(m);
  implement<&zgr_backward_cuda>(m);
  implement<&reinmax_backward_cuda>(m);
  implement<&gapped_straight_through_backward_cuda>(m);
}
