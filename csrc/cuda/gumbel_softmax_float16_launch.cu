#include "gumbel_softmax_launch.cuh"

namespace gumbel_ext {
namespace cuda {

const char* launch_float16(Op op, const Params& params, const Plan& plan, void* stream) {
  return launch_of<Half>(op, params, plan, stream);
}

}  // namespace cuda
}  // namespace gumbel_ext
