// Kernels on rows of several operands, by accumulate type and team.
#pragma once

#include "launch.cuh"
#include "rows_params.h"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

// Calls launch(Scalar(), Team()).
template <class Launch>
void with_row_kernel(const cuda::RowsParams& p, Launch launch) {
  with_accumulate_type(p.type, [&](auto scalar) {
    switch (cuda::row_team(p.classes)) {
      case 4:
        return launch(scalar, LaneTeam<4>());
      case 32:
        return launch(scalar, LaneTeam<32>());
      default:
        return launch(scalar, BlockTeam<256>());
    }
  });
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
