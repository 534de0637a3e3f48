// Which team of threads takes the rows of an operation on several operands, and how many of them.
#pragma once

#include "row_operands.cuh"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

template <class Team>
int teams_grid(std::int64_t rows) {
  constexpr std::int64_t kMost = 1 << 30;
  const std::int64_t blocks = (rows + Team::kRowsPerBlock - 1) / Team::kRowsPerBlock;
  return static_cast<int>(blocks < kMost ? blocks : kMost);
}

// Calls launch(team) with a team for rows of so many classes, that all have work.
template <class Launch>
void with_team(std::int64_t classes, Launch launch) {
  if (classes <= 4 * kRowGroup) {
    launch(LaneTeam<4>());
  } else if (classes <= 1024) {
    launch(LaneTeam<32>());
  } else {
    launch(BlockTeam<256>());
  }
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
