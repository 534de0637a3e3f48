// What the binary concrete kernel is told: elements that do not know of each other.
#pragma once

#include "problem.h"

namespace gumbel_ext {
namespace cpu {

// An operand along runs of elements: its neighbours in a run are adjacent, or one for all.
struct RunOperand {
  const void* data = nullptr;
  bool one = false;
  std::int64_t stride[kMaxDims];  // over BinaryProblem::size, in elements

  explicit operator bool() const { return data != nullptr; }
};

// Elements are numbered row-major over the `dims` outer dimensions and the run.
struct BinaryProblem {
  ElementType type;
  int dims = 0;
  std::int64_t size[kMaxDims];
  std::int64_t run = 1;

  std::uint64_t seed, offset;
  std::uint64_t first_position;
  std::int64_t position_stride[kMaxDims];  // along a run positions are consecutive
  bool hard = false;

  RunOperand logits;
  RunOperand inverse_tau;     // of the accumulate type, normal numbers
  RunOperand grad;            // of y; without it the forward is asked for
  void* out;                  // y or the gradient of logits, row-major
  void* tau_terms = nullptr;  // what each element adds to the gradient of tau, of the type computed
                              // in, row-major, optional
};

}  // namespace cpu
}  // namespace gumbel_ext
