// Samples without replacement: their arguments and results.
#include "topk.h"

#include "../autograd.h"
#include "../gumbel_ext.h"

namespace gumbel_ext {

at::Tensor gumbel_topk(const at::Tensor& logits, c10::SymInt k, int64_t dim,
                       const OptionalTensor& mask, std::optional<at::Generator> generator,
                       const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions) {
  return call(GumbelTopk{logits, k, dim, mask, generator, rng_state, positions});
}

at::Tensor GumbelTopk::prepare() {
  check_rows(*this);
  const c10::SymInt classes = logits.dim() == 0 ? c10::SymInt(1) : logits.sym_size(dim);
  TORCH_CHECK_VALUE(k >= 0 && classes >= k, name_of<GumbelTopk>(),
                    ": k must be between 0 and the number of classes, ", classes, ", got ", k);
  return at::empty_symint(shape_with(logits, dim, k), logits.options().dtype(at::kLong));
}

}  // namespace gumbel_ext

TORCH_LIBRARY_FRAGMENT(gumbel_ext, m) {
  using namespace gumbel_ext;
  define<GumbelTopk>(m);
}

TORCH_LIBRARY_IMPL(gumbel_ext, Autograd, m) {
  using namespace gumbel_ext;
  implement<&without_derivative<GumbelTopk>>(m);
}
