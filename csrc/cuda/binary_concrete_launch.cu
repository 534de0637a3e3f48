// The binary concrete's kernels, of every type.
#include "binary_concrete_kernels.cuh"
#include "launch.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

template <class T>
void launch_binary_of(BinaryOp op, const BinaryParams& p, const cuda::PositionGrid& positions,
                      void* stream) {
  const bool consecutive = positions.dims == 0 || (positions.dims == 1 && positions.stride[0] == 1);
  if (!consecutive) {
    GUMBEL_EXT_LAUNCH((binary_positions_kernel<T>), elements_grid(p.count), 256, stream, p, op,
                      positions);
    return;
  }
  constexpr int kGroup = Element<T>::kGroup;
  const int grid = elements_grid(p.count / kGroup + 2);
  if (op == BinaryOp::kBackward) {
    GUMBEL_EXT_LAUNCH((binary_kernel<T, true>), grid, 256, stream, p, op, positions.first);
  } else {
    GUMBEL_EXT_LAUNCH((binary_kernel<T, false>), grid, 256, stream, p, op, positions.first);
  }
}

}  // namespace GUMBEL_EXT_ISA

namespace cuda {

const char* launch_binary(BinaryOp op, ElementType type, const BinaryParams& params,
                          const PositionGrid& positions, void* stream) {
  with_type(type, [&](auto element) {
    launch_binary_of<decltype(element)>(op, params, positions, stream);
  });
  return launch_error();
}

}  // namespace cuda
}  // namespace gumbel_ext
