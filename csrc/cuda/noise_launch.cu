// The kernels of the noise alone, of every type.
#include "noise_kernels.cuh"

namespace gumbel_ext {
namespace cuda {

const char* launch_noise(ElementType type, const RandomSource& random,
                         const PositionGrid& positions, std::int64_t count, void* y, void* stream) {
  with_type(type, [&](auto element) {
    launch_noise_of(random, positions, count, static_cast<decltype(element)*>(y), stream);
  });
  return launch_error();
}

}  // namespace cuda
}  // namespace gumbel_ext
