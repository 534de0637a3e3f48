// What the backwards of all estimators read of a row: its logits and, less its value at the sample,
// the incoming gradient.
#pragma once

#include "log_rows.h"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

using cpu::EstimatorProblem;

constexpr std::int64_t padded(std::int64_t classes) {
  return (classes + kLanes - 1) / kLanes * kLanes;
}

template <class T>
class EstimatorRows {
 public:
  using A = typename ComputeType<T>::type;
  using F = Vector<A>;
  using N = std::numeric_limits<A>;

  explicit EstimatorRows(const EstimatorProblem& problem) : p_(problem) {}

  // Logits, -inf where the mask forbids and past the end, and d = grad - grad[index], both padded
  // to whole vectors; whether the row has a gradient, or else `kind` says what takes its place. The
  // gradient at an impossible class is not looked at, as 0 times a NaN would be one.
  bool read(std::int64_t row, A* logits, A* d) {
    index = p_.index[row];
    if (index < 0) {
      kind = RowKind::kForbidden;
      return false;
    }
    const std::int64_t classes = p_.classes;
    if (index >= classes) {
      kind = RowKind::kNaN;
      return false;
    }
    const Run<const T> x = row_run(p_, p_.logits, row, x_.reserve(classes)),
                       g = row_run(p_, p_.grad, row, g_.reserve(classes));
    Run<const std::uint8_t> allowed{nullptr, nullptr};
    if (p_.mask) allowed = row_run(p_, p_.mask, row, mask_.reserve(classes));
    const F lowest = RealTraits<F>::splat(-N::infinity()), nothing = RealTraits<F>::splat(0),
            shift = RealTraits<F>::splat(widened<A>(g.data[index]));
    F most = lowest;
    auto bad = either_nan(lowest, lowest);
    for (std::int64_t j = 0; j < classes; j += kLanes) {
      const std::int64_t left = classes - j;
      F l = load_run(x.data + j, left, x.end), h = load_run(g.data + j, left, g.end) - shift;
      if (allowed.data) l = forbid<A>(allowed.data + j, left, allowed.end, l);
      if (left < kLanes) {
        const auto used = first_lanes<F>(static_cast<int>(left));
        l = select(used, l, lowest);
        h = select(used, h, nothing);
      }
      bad = bad | either_nan(l, l);
      most = maximum(l, most);
      store(logits + j, l);
      store(d + j, select(equal(l, lowest), nothing, h));
    }
    if (any(bad)) {
      kind = RowKind::kNaN;
      return false;
    }
    top = largest(most);
    // As the soft sample, whose gradient is NaN there.
    const bool finite = -N::infinity() < top && top < N::infinity();
    kind = finite ? RowKind::kOrdinary : RowKind::kNaN;
    return finite;
  }

  // e = exp((l - top) scale / log2(e)) and its sum, of a padded row.
  double exponentiate(const A* logits, A scale, A* e) const {
    double total = 0;
    for (std::int64_t from = 0; from < p_.classes; from += kChunk) {
      total += exponentiate_chunk(logits + from, padded(std::min(kChunk, p_.classes - from)),
                                  logits + p_.classes, top, scale, e + from,
                                  static_cast<const A*>(e + p_.classes));
    }
    return total;
  }

  // sum e d.
  double dot(const A* e, const A* d) const {
    double total = 0;
    for (std::int64_t from = 0; from < p_.classes; from += kChunk) {
      const std::int64_t to = from + padded(std::min(kChunk, p_.classes - from));
      F part = RealTraits<F>::splat(0);
      for (std::int64_t j = from; j < to; j += kLanes) part = fma(load(e + j), load(d + j), part);
      total += sum(part);
    }
    return total;
  }

  // Writes a row: value(j), a vector of classes j, ..., and at the sample `at_index`.
  template <class Value>
  void write(std::int64_t row, std::int64_t last_row, A at_index, Value value) const {
    T* out = static_cast<T*>(p_.grad_logits) + row * p_.classes;
    const T* end = static_cast<T*>(p_.grad_logits) + last_row * p_.classes;
    for (std::int64_t j = 0; j < p_.classes; j += kLanes) {
      store_run(out + j, value(j), p_.classes - j, end);
    }
    out[index] = rounded<T, A>(at_index);
  }
  // A row without a gradient.
  void write_uniform(std::int64_t row) const {
    T* out = static_cast<T*>(p_.grad_logits) + row * p_.classes;
    std::fill(out, out + p_.classes, kind == RowKind::kNaN ? nan_of<T>() : T{});
  }

  RowKind kind = RowKind::kOrdinary;
  std::int64_t index = 0;
  A top = 0;

 private:
  const EstimatorProblem& p_;
  Scratch<T> x_, g_;
  Scratch<std::uint8_t> mask_;
};

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
