// The binary concrete's kernels, of every type.
#include "binary_kernels.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

inline int binary_grid(std::int64_t threads) {
  const std::int64_t blocks = (threads + 255) / 256;
  return static_cast<int>(blocks < 65536 ? blocks : 65536);
}

template <class T>
void launch_binary_of(BinaryOp op, const BinaryParams& p, const cuda::PositionGrid& positions,
                      void* stream) {
  const bool consecutive = positions.dims == 0 || (positions.dims == 1 && positions.stride[0] == 1);
  if (!consecutive) {
    GUMBEL_EXT_LAUNCH((binary_positions_kernel<T>), binary_grid(p.count), 256, stream, p, op,
                      positions);
    return;
  }
  constexpr int kGroup = Element<T>::kGroup;
  const int grid = binary_grid(p.count / kGroup + 2);
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
  switch (type) {
    case ElementType::kFloat64:
      launch_binary_of<double>(op, params, positions, stream);
      break;
    case ElementType::kFloat32:
      launch_binary_of<float>(op, params, positions, stream);
      break;
    case ElementType::kBFloat16:
      launch_binary_of<BFloat16>(op, params, positions, stream);
      break;
    case ElementType::kFloat16:
      launch_binary_of<Half>(op, params, positions, stream);
      break;
  }
  return launch_error();
}

}  // namespace cuda
}  // namespace gumbel_ext
