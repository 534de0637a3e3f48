// Chunks of rows whose classes are sharded over processes; gumbel_ext/_sharded_rows.py says how the
// pieces come together.
#pragma once

#include "../arguments.h"
#include "../op.h"

namespace gumbel_ext {

// Scores are float32 or float64; largest is float64 and has the shape of scores without dim.
struct ExponentiateChunks {
  static constexpr const char* schema =
      "exponentiate_chunks(Tensor scores, Tensor largest, float tau, Tensor? tau_tensor, int dim) "
      "-> (Tensor exponentials, Tensor sums)";
  static constexpr bool draws = false;
  static constexpr Autocast autocast = Autocast::kNone;
  using Result = std::tuple<at::Tensor, at::Tensor>;
  void check();
  Result prepare();

  at::Tensor scores, largest;
  double tau;
  OptionalTensor tau_tensor;
  int64_t dim;
};

// shift and dot are float64 and have the shape of grad without dim.
struct DotChunks {
  static constexpr const char* schema =
      "dot_chunks(Tensor grad, Tensor y, Tensor shift, Tensor? dot, int dim) -> Tensor sums";
  static constexpr bool draws = false;
  static constexpr Autocast autocast = Autocast::kNone;
  using Result = at::Tensor;
  void check();
  Result prepare();

  at::Tensor grad, y, shift;
  OptionalTensor dot;
  int64_t dim;
};

}  // namespace gumbel_ext
