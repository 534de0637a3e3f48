// What the kernels of the log-space sample, of the density and of the estimators are told: rows
// whose operands may lie anywhere, stride 0 included, and results whose rows follow each other.
#pragma once

#include "problem.h"

namespace gumbel_ext {
namespace cpu {

struct RowShape {
  ElementType type;
  std::int64_t rows, classes;
  // The dimensions that rows are numbered over, row-major; Strides::stride goes with them.
  int dims;
  std::int64_t size[kMaxDims];
  double tau_value;  // used where tau has no data
  Operand tau;       // double, optional

  std::int64_t offset(const Strides& strides, std::int64_t row) const {
    std::int64_t offset = 0;
    for (int d = dims - 1; d > 0; --d) {
      offset += row % size[d] * strides.stride[d];
      row /= size[d];
    }
    return dims > 0 ? offset + row * strides.stride[0] : 0;
  }
  double tau_of(std::int64_t row) const {
    return tau ? tau.as<const double>()[offset(tau, row)] : tau_value;
  }
};

struct LogSampleProblem : RowShape {
  Operand logits;
  Operand mask;   // bytes, optional
  Operand noise;  // of the accumulate type; without it noise is made, for positions of stride 1
  std::uint64_t seed, offset_of_state, first_position;
  Strides positions;  // contiguous: those of consecutive rows follow each other
  void* log_y;
};

struct LogGradientProblem : RowShape {
  Operand grad;
  Operand log_y;  // of the accumulate type
  void* grad_logits;
  void* grad_tau;  // [rows] of the accumulate type, optional
};

struct DensityProblem : RowShape {
  bool log_space;
  Operand value, logits;
  void* density;  // [rows] of the accumulate type: written by a forward
  // Those of a backward. Gradients are of the accumulate type where `wide`, else of the inputs'.
  Operand grad;       // [rows] of the accumulate type
  void* grad_value;   // optional
  void* grad_logits;  // optional
  void* grad_tau;     // [rows] of the accumulate type, optional
  bool wide_grad_value, wide_grad_logits;
};

// The gradient of a hard sample by one of the estimators.
enum class EstimatorKind { kZgr, kReinMax, kGapped };

struct EstimatorProblem : RowShape {
  Operand grad, logits;
  Operand mask;               // bytes, optional
  const std::int64_t* index;  // [rows]
  void* grad_logits;
  EstimatorKind kind;
  double gap;  // of the gapped straight-through; 0: that of the probability of the sample
  // Of Gumbel-Rao: conditional draws, and the noise they are made of.
  std::int64_t draws;
  std::uint64_t seed, offset_of_state;
};

}  // namespace cpu
}  // namespace gumbel_ext
