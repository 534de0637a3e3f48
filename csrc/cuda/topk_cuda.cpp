// Samples without replacement on CUDA.
#include <c10/cuda/CUDAGuard.h>

#include <limits>

#include "../ops/topk.h"
#include "tensors.h"

namespace gumbel_ext {
namespace cuda {
namespace {

at::Tensor gumbel_topk_cuda(GumbelTopk& a) {
  constexpr const char* op = name_of<GumbelTopk>();
  const at::Tensor index = a.prepare();
  if (index.numel() == 0) return index;
  const int64_t k = a.k.expect_int();
  const c10::cuda::CUDAGuard guard(a.logits.device());

  // The kernels take rows of adjacent classes; positions stay those of the logits as they are.
  const bool flat = a.logits.dim() == 0;
  const at::Tensor x = flat ? a.logits.unsqueeze(0) : a.logits.movedim(a.dim, -1).contiguous();
  const int64_t last = x.dim() - 1, classes = x.size(last), rows = x.numel() / classes;
  check_classes(op, classes);
  Positions places(a.logits.sizes(), a.positions);
  if (flat) places.strides.push_back(1);
  const int64_t class_places = places.strides[a.dim];
  places.strides.erase(places.strides.begin() + a.dim);
  places.strides.push_back(class_places);

  Params p{};
  p.k = k;
  p.outer = rows;
  p.classes = classes;
  p.inner = 1;
  p.outer_stride = classes;
  p.class_stride = 1;
  p.logits = x.const_data_ptr();
  PositionGrid row_positions{};
  const bool needs_table = set_positions(
      p, static_cast<uint64_t>(places.base), static_cast<int>(x.dim()), x.sizes().data(),
      places.strides.data(), static_cast<int>(last), &row_positions);
  void* stream = current_stream();
  at::Tensor table, allowed, on_device;
  if (needs_table) {
    table = at::empty({rows}, index.options());
    p.row_positions = table.const_data_ptr<int64_t>();
    check_launch(op,
                 launch_positions(row_positions, rows, table.mutable_data_ptr<int64_t>(), stream));
  }
  if (a.mask) {
    allowed = a.mask->expand(a.logits.sizes());
    allowed = (flat ? allowed.unsqueeze(0) : allowed.movedim(a.dim, -1)).contiguous();
    p.mask = static_cast<const std::uint8_t*>(allowed.const_data_ptr());
    p.mask_outer_stride = classes;
    p.mask_class_stride = 1;
  }
  p.random = random_source(a.generator, a.rng_state, on_device);

  const ElementType type = element_type(a.logits.scalar_type());
  const TopKPlan plan = make_topk_plan(type, p, current_device());
  const at::Tensor scores = at::empty({plan.bytes}, a.logits.options().dtype(at::kByte));
  p.partials = scores.mutable_data_ptr();
  at::DimVector shape(x.sizes());
  shape[last] = k;
  at::Tensor chosen;
  if (plan.sorts) {
    check_launch(op, launch_topk(type, p, plan, stream));
    const auto [values, order] = scores.view(compute_dtype(a.logits.scalar_type()))
                                     .view(x.sizes())
                                     .sort(/*stable=*/true, /*dim=*/-1, /*descending=*/true);
    const double infinity = std::numeric_limits<double>::infinity();
    chosen = order.narrow(-1, 0, k).masked_fill(values.narrow(-1, 0, k).eq(-infinity), -1);
  } else {
    chosen = at::empty(shape, index.options());
    p.index = chosen.mutable_data_ptr<int64_t>();
    check_launch(op, launch_topk(type, p, plan, stream));
  }
  return index.copy_(flat ? chosen : chosen.movedim(-1, a.dim));
}

}  // namespace
}  // namespace cuda
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CUDA, m) {
  using namespace gumbel_ext::cuda;
  using gumbel_ext::implement;
  implement<&gumbel_topk_cuda>(m);
}
