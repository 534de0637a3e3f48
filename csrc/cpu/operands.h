// Runs of rows of strided operands: used in place where memory allows, else gathered into a buffer
// and scattered back.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "row_math.h"

namespace gumbel_ext {
inline namespace GUMBEL_EXT_ISA {

using cpu::kTile;
using cpu::Operand;
using cpu::Problem;
using cpu::row_offset;

// `rows` rows from `row` on, one after the other.
template <class T>
struct Run {
  T* data;
  const T* end;  // vectors may touch memory up to here
};

template <class T>
inline Run<const T> read_rows(const Problem& p, const Operand& operand, std::int64_t row,
                              std::int64_t rows, T* buffer, std::int64_t capacity) {
  const T* base = operand.as<const T>();
  const std::int64_t classes = p.classes;
  if (operand.contiguous && p.inner == 1) {
    return {base + row * classes, base + p.rows() * classes};
  }
  if (rows == 1 && operand.class_stride == 1) {
    const T* start = base + row_offset(p, operand, row);
    return {start, start + classes};
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    const T* start = base + row_offset(p, operand, row + r);
    for (std::int64_t c = 0; c < classes; ++c)
      buffer[r * classes + c] = start[c * operand.class_stride];
  }
  return {buffer, buffer + capacity};
}

// Where to write rows: in place if that is one run of memory, else the buffer, which write_back()
// then scatters.
template <class T>
inline Run<T> rows_to_write(const Problem& p, const Operand& operand, std::int64_t row,
                            std::int64_t rows, T* buffer, std::int64_t capacity) {
  if (operand.contiguous && p.inner == 1) {
    T* start = operand.as<T>() + row * p.classes;
    return {start, start + rows * p.classes};
  }
  if (rows == 1 && operand.class_stride == 1) {
    T* start = operand.as<T>() + row_offset(p, operand, row);
    return {start, start + p.classes};
  }
  return {buffer, buffer + capacity};
}

template <class T>
inline void write_back(const Problem& p, const Operand& operand, std::int64_t row,
                       std::int64_t rows, const T* data, const T* buffer) {
  if (data != buffer) return;
  for (std::int64_t r = 0; r < rows; ++r) {
    T* start = operand.as<T>() + row_offset(p, operand, row + r);
    for (std::int64_t c = 0; c < p.classes; ++c)
      start[c * operand.class_stride] = data[r * p.classes + c];
  }
}

// Classes c, ..., c + count - 1 of one row; the buffer holds kTile of them.
template <class T>
inline Run<const T> read_chunk(const Problem& p, const Operand& operand, std::int64_t row,
                               std::int64_t c, std::int64_t count, T* buffer) {
  const T* start = operand.as<const T>() + row_offset(p, operand, row) + c * operand.class_stride;
  if (operand.class_stride == 1) return {start, start + count};
  for (std::int64_t j = 0; j < count; ++j) buffer[j] = start[j * operand.class_stride];
  return {buffer, buffer + kTile};
}

// Likewise of the p.inner rows from first_row on, the rows of a class one after the other.
template <class T>
inline Run<const T> read_slab(const Problem& p, const Operand& operand, std::int64_t first_row,
                              std::int64_t c, std::int64_t count, T* buffer) {
  const std::int64_t inner = p.inner;
  if (operand.contiguous) {
    const T* base = operand.as<const T>();
    return {base + first_row * p.classes + c * inner, base + p.rows() * p.classes};
  }
  for (std::int64_t i = 0; i < inner; ++i) {
    const T* start =
        operand.as<const T>() + row_offset(p, operand, first_row + i) + c * operand.class_stride;
    for (std::int64_t j = 0; j < count; ++j)
      buffer[j * inner + i] = start[j * operand.class_stride];
  }
  return {buffer, buffer + kTile + kLanes};
}

// Scratch memory that is not initialised.
template <class T>
class Scratch {
 public:
  T* reserve(std::int64_t count) {
    if (count > capacity_) {
      data_.reset(static_cast<T*>(std::malloc(static_cast<std::size_t>(count) * sizeof(T))));
      if (!data_) throw std::bad_alloc();
      capacity_ = count;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  std::int64_t capacity_ = 0;
};

// The temperature of a row as the factors that the kernels multiply by.
template <class A>
struct InverseTau {
  A exponent_scale;  // log2(e) / tau
  A inverse;         // 1 / tau

  explicit InverseTau(double tau)
      : exponent_scale(clamped<A>(1.4426950408889634074 / tau)), inverse(clamped<A>(1.0 / tau)) {}
};

template <class A>
inline InverseTau<A> inverse_tau(const Problem& p, std::int64_t row) {
  return InverseTau<A>(p.tau ? p.tau.as<const double>()[row_offset(p, p.tau, row)] : p.tau_value);
}

}  // namespace GUMBEL_EXT_ISA
}  // namespace gumbel_ext
