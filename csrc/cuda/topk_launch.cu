// The kernels of gumbel_topk, of every type.
#include "launch.cuh"
#include "topk_kernels.cuh"

namespace gumbel_ext {
namespace cuda {

const char* launch_topk(ElementType type, const Params& params, const TopKPlan& plan,
                        void* stream) {
  with_type(type, [&](auto element) { launch_topk_of<decltype(element)>(params, plan, stream); });
  return launch_error();
}

}  // namespace cuda
}  // namespace gumbel_ext
