#include "launch.cuh"

namespace gumbel_ext {
namespace cuda {

const char* launch_bfloat16(Op op, const Params& params, const Plan& plan, void* stream) {
  return launch_of<BFloat16>(op, params, plan, stream);
}
const char* launch_noise_bfloat16(const RandomSource& random, const PositionGrid& positions,
                                  std::int64_t count, void* y, void* stream) {
  return launch_noise_of<BFloat16>(random, positions, count, y, stream);
}

}  // namespace cuda
}  // namespace gumbel_ext
