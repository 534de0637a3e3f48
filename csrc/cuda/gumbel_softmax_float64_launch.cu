#include "gumbel_softmax_launch.cuh"

namespace gumbel_ext {
namespace cuda {

const char* launch_float64(Op op, const Params& params, const Plan& plan, void* stream) {
  return launch_of<double>(op, params, plan, stream);
}

}  // namespace cuda
}  // namespace gumbel_ext
