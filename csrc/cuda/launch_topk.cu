#include "topk_kernels.cuh"

namespace gumbel_ext {
namespace cuda {

const char* launch_topk(ElementType type, const Params& params, const TopKPlan& plan,
                        void* stream) {
  switch (type) {
    case ElementType::kFloat64:
      return launch_topk_of<double>(params, plan, stream);
    case ElementType::kFloat32:
      return launch_topk_of<float>(params, plan, stream);
    case ElementType::kBFloat16:
      return launch_topk_of<BFloat16>(params, plan, stream);
    default:
      return launch_topk_of<Half>(params, plan, stream);
  }
}

}  // namespace cuda
}  // namespace gumbel_ext
