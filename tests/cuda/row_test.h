// What the emulated tests of operations on rows share: operands that lie anywhere, and what is near
// enough.
#pragma once

#include <cmath>

#include "kernel_test.h"
#include "rows_params.h"

namespace {

using Real = long double;

constexpr Real kInfinity = std::numeric_limits<Real>::infinity();

[[maybe_unused]] std::string wrong(const char* what, std::int64_t row, std::int64_t c, Real got,
                                   Real want) {
  char text[200];
  std::snprintf(text, sizeof text, "%s of row %lld, class %lld is %.9Lg, not %.9Lg", what,
                (long long)row, (long long)c, got, want);
  return text;
}
// NaN is right where it is wanted, and infinities where they are.
[[maybe_unused]] bool agrees(Real got, Real want, Real allowed) {
  if (std::isnan(want)) return std::isnan(got);
  if (std::isinf(want)) return got == want;
  return std::fabs(got - want) <= allowed;
}

template <class T>
constexpr double kComputed = sizeof(typename Element<T>::Scalar) == 8 ? 0x1p-52 : 0x1p-23;

const bool quick = std::getenv("GUMBEL_EXT_QUICK") != nullptr;

template <class Check>
void run(const std::string& name, Check check) {
  std::string why;
  try {
    why = check();
  } catch (const emulation::Error& error) {
    why = error.what();
  }
  report(name, why);
}

enum class Spread { kFull, kOneOuter, kOneInner, kClassesApart, kOne };

// [outer, inner, classes] of E, of which not all dimensions are stored.
template <class E>
class Operand {
 public:
  Operand(Spread spread, std::int64_t outer, std::int64_t inner, std::int64_t classes, int shift)
      : inner_(inner),
        classes_(classes),
        stride_{spread == Spread::kOneOuter || spread == Spread::kOne ? 0 : inner * classes,
                spread == Spread::kOneInner || spread == Spread::kOne ? 0 : classes,
                spread == Spread::kOne ? 0 : 1},
        memory_(outer * inner * classes, shift) {
    if (spread == Spread::kClassesApart) {
      stride_[1] = 1;
      stride_[2] = inner;
    }
  }
  cuda::RowOperand of() {
    cuda::RowOperand o{};
    o.data = memory_.data();
    o.stride[0] = stride_[0];
    o.stride[1] = stride_[1];
    o.class_stride = stride_[2];
    return o;
  }
  E& at(std::int64_t row, std::int64_t c) {
    return memory_[row / inner_ * stride_[0] + row % inner_ * stride_[1] + c * stride_[2]];
  }

 private:
  std::int64_t inner_, classes_, stride_[3];
  Buffer<E> memory_;
};

}  // namespace
