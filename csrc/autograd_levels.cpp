// What a backward reads again, kept as the forward saw it.
#include "autograd_levels.h"

#include <torch/csrc/autograd/custom_function.h>

namespace gumbel_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// One of each element that strides of 0 repeat.
at::Tensor distinct(const at::Tensor& t) {
  const at::AutoDispatchBelowADInplaceOrView below;
  at::Tensor out = t;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.stride(d) == 0 && t.size(d) > 1) out = out.narrow(d, 0, 1);
  }
  return out;
}

// A copy of an expanded tensor that stays expanded, with the derivative of clone().
class ExpandedCopy : public torch::autograd::Function<ExpandedCopy> {
 public:
  static at::Tensor forward(AutogradContext*, const at::Tensor& t) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return distinct(t).clone().expand(t.sizes());
  }

  static variable_list backward(AutogradContext*, const variable_list& grads) { return grads; }
};

}  // namespace

at::Tensor unchanging(const at::Tensor& t) {
  if (under_transform() || t.is_inference() || !t.has_storage()) return t;
  if (!(t.is_leaf() || (t.is_view() && t._base().is_leaf()))) return t;
  c10::StorageImpl* storage = t.storage().unsafeGetStorageImpl();
  if (!storage->_mutable_data_ptr_no_checks()) return t;
  const bool repeats = !has_tangent(t) && distinct(t).numel() < t.numel();
  return repeats ? ExpandedCopy::apply(t) : t.clone();
}

}  // namespace gumbel_ext
