#include "launch.cuh"

namespace gumbel_ext {
namespace cuda {

const char* launch_float32(Op op, const Params& params, const Plan& plan, void* stream) {
  return launch_of<float>(op, params, plan, stream);
}
const char* launch_noise_float32(const RandomSource& random, const PositionGrid& positions,
                                 std::int64_t count, void* y, void* stream) {
  return launch_noise_of<float>(random, positions, count, y, stream);
}

}  // namespace cuda
}  // namespace gumbel_ext
