#include "gumbel_softmax_launch.cuh"

namespace gumbel_ext {
namespace cuda {

const char* launch_bfloat16(Op op, const Params& params, const Plan& plan, void* stream) {
  return launch_of<BFloat16>(op, params, plan, stream);
}

}  // namespace cuda
}  // namespace gumbel_ext
