// The CUDA ops of the estimators' backwards: tensors in, launches out. Their forwards are hard
// samples, whose op is called.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "estimators_params.h"
#include "rows_builder.h"

namespace gumbel_ext {
namespace cuda {
namespace {

void* current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

// What all of them are given; the tensors outlive the launch.
class EstimatorCall {
 public:
  EstimatorCall(const char* op, const at::Tensor& grad, const at::Tensor& logits,
                const at::Tensor& index, double tau, const OptionalTensor& tau_tensor, int64_t dim,
                const OptionalTensor& mask, const OptionalTensor& rng_state = std::nullopt)
      : op_(op),
        dim_(check_backward(op, grad, logits, index, tau, tau_tensor, dim, mask, rng_state,
                            std::nullopt)),
        guard_(logits.device()),
        out_(at::empty_like(logits), dim_),
        index_(index.contiguous()),
        builder_(params, op, logits, dim_, tau, tau_tensor) {
    if (logits.numel() == 0) return;
    builder_.add(params.grad, grad);
    builder_.add(params.logits, logits);
    if (mask) builder_.add(params.mask, mask->expand(logits.sizes()));
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
    if (out_.tensor.numel() == 0) return out_.tensor;
    check_launch(op_, launch());
    out_.settle();
    return out_.tensor;
  }

  GumbelRaoParams params{};

 private:
  const char* op_;
  const int64_t dim_;
  const c10::cuda::CUDAGuard guard_;
  RowsOutput out_;
  const at::Tensor index_;
  RowsBuilder builder_;
};

at::Tensor gumbel_rao_backward_cuda(const at::Tensor& grad, const at::Tensor& logits,
                                    const at::Tensor& index, double tau,
                                    const OptionalTensor& tau_tensor, int64_t k, int64_t dim,
                                    const OptionalTensor& mask, const at::Tensor& rng_state) {
  constexpr const char* op = "gumbel_rao_backward";
  check_conditional_draws(op, k);
  EstimatorCall call(op, grad, logits, index, tau, tau_tensor, dim, mask, rng_state);
  return call.run([&] {
    at::Tensor on_device, sums;
    GumbelRaoParams& p = call.params;
    p.random = random_source(std::nullopt, rng_state, on_device);
    p.draws = k;
    p.draws_at_once = kDrawsAtOnce;
    if (make_gumbel_rao_plan(p.type, p.classes).groups == 0 && k > kDrawsAtOnce) {
      p.sums = p.grad_logits;
      if (element_bytes(p.type) == 2) {
        sums = at::empty({p.rows, p.classes}, logits.options().dtype(at::kFloat));
        p.sums = sums.mutable_data_ptr();
      }
    }
    return launch_gumbel_rao(p, current_stream());
  });
}

at::Tensor zgr_backward_cuda(const at::Tensor& grad, const at::Tensor& logits,
                             const at::Tensor& index, int64_t dim, const OptionalTensor& mask) {
  EstimatorCall call("zgr_backward", grad, logits, index, 1.0, std::nullopt, dim, mask);
  return call.run(Estimator::kZgr);
}

at::Tensor reinmax_backward_cuda(const at::Tensor& grad, const at::Tensor& logits,
                                 const at::Tensor& index, double tau,
                                 const OptionalTensor& tau_tensor, int64_t dim,
                                 const OptionalTensor& mask) {
  EstimatorCall call("reinmax_backward", grad, logits, index, tau, tau_tensor, dim, mask);
  return call.run(Estimator::kReinMax);
}

at::Tensor gapped_straight_through_backward_cuda(const at::Tensor& grad, const at::Tensor& logits,
                                                 const at::Tensor& index, double tau,
                                                 const OptionalTensor& tau_tensor,
                                                 std::optional<double> gap, int64_t dim,
                                                 const OptionalTensor& mask,
                                                 const OptionalTensor& gap_tensor) {
  constexpr const char* op = "gapped_straight_through_backward";
  gap = gap_value(op, gap, gap_tensor);
  EstimatorCall call(op, grad, logits, index, tau, tau_tensor, dim, mask);
  if (gap) {
    call.params.gap = clamped_factor(*gap, logits.scalar_type() == at::kDouble);
    call.params.gap_float32 = static_cast<float>(call.params.gap);
  }
  return call.run(Estimator::kGapped);
}

}  // namespace
}  // namespace cuda
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CUDA, m) {
  using namespace gumbel_ext::cuda;
  m.impl("gumbel_rao_backward", &gumbel_rao_backward_cuda);
  m.impl("zgr_backward", &zgr_backward_cuda);
  m.impl("reinmax_backward", &reinmax_backward_cuda);
  m.impl("gapped_straight_through_backward", &gapped_straight_through_backward_cuda);
}
