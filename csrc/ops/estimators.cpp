// Hard samples of gumbel_softmax with the gradients of other estimators: arguments, results and
// derivatives.
//
// The backward of each is a matrix of the row times grad. The matrix is symmetric and a constant:
// derivatives in grad, and in forward mode, are the backward op once more, and there are none of it
// in the logits.
#include "estimators.h"

#include "../autograd.h"
#include "../gumbel_ext.h"

namespace gumbel_ext {

using Sample = std::tuple<at::Tensor, at::Tensor>;
using SampleAndState = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

SampleAndState gumbel_rao(const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor,
                          c10::SymInt k, int64_t dim, const OptionalTensor& mask, bool return_index,
                          std::optional<at::Generator> generator, const OptionalTensor& rng_state) {
  return call(GumbelRao{logits, tau, tau_tensor, k, dim, mask, return_index, generator, rng_state});
}

Sample zgr(const at::Tensor& logits, int64_t dim, const OptionalTensor& mask, bool return_index,
           std::optional<at::Generator> generator, const OptionalTensor& rng_state,
           at::OptionalSymIntArrayRef positions) {
  return call(Zgr{logits, dim, mask, return_index, generator, rng_state, positions});
}

Sample reinmax(const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor, int64_t dim,
               const OptionalTensor& mask, bool return_index,
               std::optional<at::Generator> generator, const OptionalTensor& rng_state,
               at::OptionalSymIntArrayRef positions) {
  return call(
      ReinMax{logits, tau, tau_tensor, dim, mask, return_index, generator, rng_state, positions});
}

Sample gapped_straight_through(const at::Tensor& logits, double tau,
                               const OptionalTensor& tau_tensor, std::optional<double> gap,
                               int64_t dim, const OptionalTensor& mask, bool return_index,
                               std::optional<at::Generator> generator,
                               const OptionalTensor& rng_state,
                               at::OptionalSymIntArrayRef positions,
                               const OptionalTensor& gap_tensor) {
  return call(GappedStraightThrough{logits, tau, tau_tensor, gap, dim, mask, return_index,
                                    generator, rng_state, positions, gap_tensor});
}

at::Tensor gumbel_rao_backward(const at::Tensor& grad, const at::Tensor& logits,
                               const at::Tensor& index, double tau,
                               const OptionalTensor& tau_tensor, c10::SymInt k, int64_t dim,
                               const OptionalTensor& mask, const at::Tensor& rng_state) {
  return call(GumbelRaoBackward{grad, logits, index, tau, tau_tensor, k, dim, mask, rng_state});
}

at::Tensor zgr_backward(const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& index,
                        int64_t dim, const OptionalTensor& mask) {
  return call(ZgrBackward{grad, logits, index, dim, mask});
}

at::Tensor reinmax_backward(const at::Tensor& grad, const at::Tensor& logits,
                            const at::Tensor& index, double tau, const OptionalTensor& tau_tensor,
                            int64_t dim, const OptionalTensor& mask) {
  return call(ReinMaxBackward{grad, logits, index, tau, tau_tensor, dim, mask});
}

at::Tensor gapped_straight_through_backward(const at::Tensor& grad, const at::Tensor& logits,
                                            const at::Tensor& index, double tau,
                                            const OptionalTensor& tau_tensor,
                                            std::optional<double> gap, int64_t dim,
                                            const OptionalTensor& mask,
                                            const OptionalTensor& gap_tensor) {
  return call(GappedStraightThroughBackward{grad, logits, index, tau, tau_tensor, gap, dim, mask,
                                            gap_tensor});
}

// ---- arguments and results ----------------------------------------------------------------------

SampleAndState GumbelRao::prepare() {
  check_conditional_draws(name_of<GumbelRao>(), k);
  check_rows(*this);
  return hard_sample(*this).allocate();
}

at::Tensor GumbelRaoBackward::prepare() {
  check_conditional_draws(name_of<GumbelRaoBackward>(), k);
  check_rows_backward(*this);
  return at::empty_like(logits);
}

Sample Zgr::prepare() {
  check_rows(*this);
  return {at::empty_like(logits), empty_index(logits, dim, return_index)};
}

at::Tensor ZgrBackward::prepare() {
  check_rows_backward(*this);
  return at::empty_like(logits);
}

Sample ReinMax::prepare() {
  check_rows(*this);
  return {at::empty_like(logits), empty_index(logits, dim, return_index)};
}

at::Tensor ReinMaxBackward::prepare() {
  check_rows_backward(*this);
  return at::empty_like(logits);
}

Sample GappedStraightThrough::prepare() {
  check_gap(name_of<GappedStraightThrough>(), gap, gap_tensor);
  check_rows(*this);
  return {at::empty_like(logits), empty_index(logits, dim, return_index)};
}

at::Tensor GappedStraightThroughBackward::prepare() {
  check_gap(name_of<GappedStraightThroughBackward>(), gap, gap_tensor);
  check_rows_backward(*this);
  return at::empty_like(logits);
}

namespace {

// ---- derivatives --------------------------------------------------------------------------------

// The backward op of a sample, for a gradient to be set.
GumbelRaoBackward backward_of(const GumbelRao& a, const SampleAndState& sample) {
  return {at::Tensor(), a.logits, std::get<1>(sample), a.tau, detached(a.tau_tensor), a.k,
          a.dim,        a.mask,   std::get<2>(sample)};
}
ZgrBackward backward_of(const Zgr& a, const Sample& sample) {
  return {at::Tensor(), a.logits, std::get<1>(sample), a.dim, a.mask};
}
ReinMaxBackward backward_of(const ReinMax& a, const Sample& sample) {
  return {at::Tensor(), a.logits, std::get<1>(sample), a.tau, detached(a.tau_tensor),
          a.dim,        a.mask};
}
GappedStraightThroughBackward backward_of(const GappedStraightThrough& a, const Sample& sample) {
  return {at::Tensor(), a.logits, std::get<1>(sample), a.tau, detached(a.tau_tensor), a.gap,
          a.dim,        a.mask,   a.gap_tensor};
}

// The name of the estimator that a backward op belongs to.
template <class Backward>
std::string estimator_name() {
  constexpr std::string_view name = name_in(Backward::schema);
  return std::string(name.substr(0, name.rfind('_')));
}

template <class Backward>
at::Tensor product(Backward a, const at::Tensor& v) {
  a.grad = v;
  return call(a);
}

// `inputs`: of a sample its logits; of a product the gradient and the logits.
template <class Backward>
void record_product(const at::Tensor& out, const variable_list& inputs, Backward a) {
  a.grad = at::Tensor();
  const variable_list tensors = tensors_of(a);
  set_tensors(a, variable_list(tensors.size()));  // the node owns them
  const std::string name = estimator_name<Backward>();
  record({name + "_product", name, "logits, tau or mask"}, {out}, inputs,
         {tensors.begin(), tensors.end()}, [a, name](const NodeCall& node) {
           TORCH_CHECK_NOT_IMPLEMENTED(
               node.out.size() == 1 || !node.node.task_should_compute_output(1), name,
               ": the gradient has no derivative in logits, of which its matrix is a constant");
           if (!node.wants(0)) return;
           Backward again = a;
           set_tensors(again, node.saved);
           node.out[0] = product(again, node.grads[0]);
         });
}

template <class Estimator>
typename Estimator::Result sample_autograd(Estimator& a) {
  constexpr const char* op = name_of<Estimator>();
  if constexpr (has_argument<Estimator>("tau_tensor")) {
    TORCH_CHECK_VALUE(!records(a.tau_tensor) && !has_tangent(a.tau_tensor), op,
                      ": tau must not require a gradient, of which this estimator has none; pass "
                      "its detach()");
  }
  const bool recorded = records(a.logits), tangent = has_tangent(a.logits);
  if (!recorded && !tangent) return call_below(a);
  const bool return_index = a.return_index;
  a.return_index = true;
  auto sample = call_below(a);
  const at::Tensor& y = std::get<0>(sample);
  a.dim = wrapped_dim(op, a.logits, a.dim);
  auto backward = backward_of(a, sample);
  if (tangent) {
    backward.logits = a.logits._fw_primal(/*level=*/0);
    y._set_fw_grad(product(backward, a.logits._fw_grad(/*level=*/0)), /*level=*/0,
                   /*is_inplace_op=*/false);
  }
  if (recorded) {
    backward.logits = unchanging(a.logits);
    if constexpr (has_argument<Estimator>("tau_tensor")) {
      backward.tau_tensor = unchanging(backward.tau_tensor);
    }
    record_product(y, {backward.logits}, backward);
  }
  at::Tensor& index = std::get<1>(sample);
  if (!return_index) index = at::empty({0}, index.options());
  return sample;
}

template <class Backward>
at::Tensor backward_autograd(Backward& a) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !has_tangent(a.logits), estimator_name<Backward>(),
      ": the gradient has no derivative in logits, of which its matrix is a constant");
  const at::Tensor out = call_below(a);
  if (records(a.grad, a.logits)) record_product(out, {a.grad, a.logits}, a);
  if (has_tangent(a.grad)) {
    out._set_fw_grad(product(a, a.grad._fw_grad(/*level=*/0)), /*level=*/0,
                     /*is_inplace_op=*/false);
  }
  return out;
}

}  // namespace
}  // namespace gumbel_ext

TORCH_LIBRARY_FRAGMENT(gumbel_ext, m) {
  using namespace gumbel_ext;
  define<GumbelRao>(m);
  define<GumbelRaoBackward>(m);
  define<Zgr>(m);
  define<ZgrBackward>(m);
  define<ReinMax>(m);
  define<ReinMaxBackward>(m);
  define<GappedStraightThrough>(m);
  define<GappedStraightThroughBackward>(m);
}

TORCH_LIBRARY_IMPL(gumbel_ext, Autograd, m) {
  using namespace gumbel_ext;
  implement<&sample_autograd<GumbelRao>>(m);
  implement<&backward_autograd<GumbelRaoBackward>>(m);
  implement<&sample_autograd<Zgr>>(m);
  implement<&backward_autograd<ZgrBackward>>(m);
  implement<&sample_autograd<ReinMax>>(m);
  implement<&backward_autograd<ReinMaxBackward>>(m);
  implement<&sample_autograd<GappedStraightThrough>>(m);
  implement<&backward_autograd<GappedStraightThroughBackward>>(m);
}
