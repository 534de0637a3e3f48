// Elements of every type as numbers, operands with strides, and threads, for the tests of kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/kernels.h"

namespace gumbel_ext {
namespace cpu {

constexpr ElementType kElementTypes[] = {ElementType::kFloat64, ElementType::kFloat32,
                                         ElementType::kBFloat16, ElementType::kFloat16};

inline int size_of(ElementType type) {
  return type == ElementType::kFloat64 ? 8 : type == ElementType::kFloat32 ? 4 : 2;
}
inline const char* name_of(ElementType type) {
  switch (type) {
    case ElementType::kFloat64:
      return "float64";
    case ElementType::kFloat32:
      return "float32";
    case ElementType::kBFloat16:
      return "bfloat16";
    default:
      return "float16";
  }
}
inline double epsilon_of(ElementType type) {
  switch (type) {
    case ElementType::kFloat64:
      return 0x1p-52;
    case ElementType::kFloat32:
      return 0x1p-23;
    case ElementType::kBFloat16:
      return 0x1p-7;
    default:
      return 0x1p-10;
  }
}
inline double read_element(ElementType type, const char* p) {
  if (type == ElementType::kFloat64) {
    double v;
    std::memcpy(&v, p, 8);
    return v;
  }
  if (type == ElementType::kFloat32) {
    float v;
    std::memcpy(&v, p, 4);
    return static_cast<double>(v);
  }
  std::uint16_t bits;
  std::memcpy(&bits, p, 2);
  if (type == ElementType::kBFloat16) {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float v;
    std::memcpy(&v, &wide, 4);
    return static_cast<double>(v);
  }
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  double v = exponent == 31 ? (mantissa ? std::nan("") : HUGE_VAL)
             : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                            : std::ldexp(mantissa, -24);
  return bits & 0x8000 ? -v : v;
}
// Writes a value that the type holds exactly, or an infinity or NaN; 16-bit values are truncated.
inline void write_element(ElementType type, char* p, double value) {
  const float narrow = static_cast<float>(value);
  if (type == ElementType::kFloat64) {
    std::memcpy(p, &value, 8);
  } else if (type == ElementType::kFloat32) {
    std::memcpy(p, &narrow, 4);
  } else {
    std::uint32_t wide;
    std::memcpy(&wide, &narrow, 4);
    std::uint16_t bits = static_cast<std::uint16_t>(wide >> 16);
    if (type == ElementType::kFloat16) {
      const std::uint16_t sign = static_cast<std::uint16_t>(bits & 0x8000);
      const int exponent = static_cast<int>((wide >> 23) & 255) - 112;
      if (exponent >= 31) {
        bits = static_cast<std::uint16_t>(sign | 0x7C00 | (value != value ? 0x200 : 0));
      } else if (exponent <= 0) {
        bits = sign;
      } else {
        bits = static_cast<std::uint16_t>(sign | (exponent << 10) | ((wide >> 13) & 1023));
      }
    }
    std::memcpy(p, &bits, 2);
  }
}

// The type computed in.
inline ElementType computed_type(ElementType type) {
  return type == ElementType::kFloat64 ? type : ElementType::kFloat32;
}

// Memory of exactly the size asked for, so that AddressSanitizer sees the first byte past it.
using Bytes = std::unique_ptr<char[]>;
inline Bytes make_bytes(std::int64_t count, int size) {
  return Bytes(new char[static_cast<std::size_t>(count) * static_cast<std::size_t>(size)]);
}

// Numbers from low to low + 8, float or double. Not of std::normal_distribution, whose numbers are
// the library's choice.
inline Bytes random_numbers(std::int64_t count, bool is_double, double low, unsigned seed) {
  const ElementType type = is_double ? ElementType::kFloat64 : ElementType::kFloat32;
  const int size = size_of(type);
  Bytes out = make_bytes(count, size);
  std::mt19937 source(seed);
  for (std::int64_t i = 0; i < count; ++i) {
    write_element(type, &out[static_cast<std::size_t>(i * size)],
                  static_cast<double>(source() >> 8) * 0x1p-21 + low);
  }
  return out;
}

// Likewise of any type. Those of a 16-bit type are the upper halves of float32 numbers: small
// numbers of either type.
inline Bytes random_elements(std::int64_t count, ElementType type, double low, unsigned seed) {
  Bytes wide = random_numbers(count, type == ElementType::kFloat64, low, seed);
  if (size_of(type) > 2) return wide;
  Bytes out = make_bytes(count, 2);
  for (std::size_t i = 0; i < static_cast<std::size_t>(count); ++i) {
    std::memcpy(&out[2 * i], &wide[4 * i + 2], 2);
    // The sign, and exponents that float16 has too.
    if (type == ElementType::kFloat16) out[2 * i + 1] = static_cast<char>(out[2 * i + 1] & 0xBF);
  }
  return out;
}

// Sizes or strides of [outer, classes, inner].
struct Extent {
  std::int64_t outer, classes, inner;

  std::int64_t rows() const { return outer * inner; }
  std::int64_t count() const { return rows() * classes; }
};

// How an operand lies: as its kernel likes it, with gaps, transposed, or one slice for all.
enum class Laying { kContiguous, kPadded, kTransposed, kOuterExpanded, kClassesExpanded };
constexpr Laying kLayings[] = {Laying::kContiguous, Laying::kPadded, Laying::kTransposed,
                               Laying::kOuterExpanded, Laying::kClassesExpanded};

// The strides of [outer, classes, inner], or with `rows_last` of rows that follow each other.
inline Extent strides_of(Laying laying, const Extent& size, bool rows_last) {
  const std::int64_t gap = laying == Laying::kPadded ? 1 : 0;
  Extent stride = rows_last
                      ? Extent{size.inner * (size.classes + gap) + 3 * gap, 1, size.classes + gap}
                      : Extent{size.classes * (size.inner + gap) + 3 * gap, size.inner + gap, 1};
  if (laying == Laying::kTransposed) stride = {size.inner, size.rows(), 1};
  if (laying == Laying::kOuterExpanded) stride.outer = 0;
  if (laying == Laying::kClassesExpanded) stride = {size.inner, 0, 1};
  return stride;
}

// Memory that ends with the last element that the strides reach.
struct Strided {
  Extent size, stride;
  int element;
  Bytes bytes;

  Strided(const Extent& size_, const Extent& stride_, int element_)
      : size(size_), stride(stride_), element(element_), bytes(make_bytes(reach(), element)) {}

  std::int64_t reach() const {
    return (size.outer - 1) * stride.outer + (size.classes - 1) * stride.classes +
           (size.inner - 1) * stride.inner + 1;
  }
  char* at(std::int64_t o, std::int64_t c, std::int64_t i) const {
    return &bytes[static_cast<std::size_t>(
        (o * stride.outer + c * stride.classes + i * stride.inner) * element)];
  }
  // Calls body(outer, class, inner) for every element.
  template <class Body>
  void each(Body body) const {
    for (std::int64_t o = 0; o < size.outer; ++o)
      for (std::int64_t c = 0; c < size.classes; ++c)
        for (std::int64_t i = 0; i < size.inner; ++i) body(o, c, i);
  }
  // The same in other places.
  Strided moved(const Extent& to) const {
    Strided out(size, to, element);
    each([&](auto o, auto c, auto i) {
      std::memcpy(out.at(o, c, i), at(o, c, i), static_cast<std::size_t>(element));
    });
    return out;
  }
  void attach(Operand& operand, bool contiguous) const {
    operand.data = bytes.get();
    operand.class_stride = size.classes == 1 ? 1 : stride.classes;
    operand.contiguous = contiguous;
    operand.stride[0] = stride.outer;
    operand.stride[1] = stride.inner;
  }
};

inline Strided random_strided(ElementType type, const Extent& size, const Extent& stride,
                              double low, unsigned seed) {
  Strided out(size, stride, size_of(type));
  out.bytes = random_elements(out.reach(), type, low, seed);
  return out;
}

// Every `step`-th element of the memory becomes `value`.
inline void set_some(const Strided& elements, ElementType type, std::int64_t step, double value) {
  for (std::int64_t j = step / 2; j < elements.reach(); j += step) {
    write_element(type, &elements.bytes[static_cast<std::size_t>(j * elements.element)], value);
  }
}

// A mask that allows three classes of four, and of every fifth row none.
inline Strided some_mask(const Extent& size, const Extent& stride) {
  Strided mask(size, stride, 1);
  mask.each([&](auto o, auto c, auto i) {
    // A function of what the strides tell apart.
    const std::int64_t row = (stride.outer == 0 ? 0 : o) + i, j = stride.classes == 0 ? 0 : c;
    *mask.at(o, c, i) = row % 5 != 3 && (j * 7 + row) % 4 != 0;
  });
  return mask;
}

// What a kernel writes, in memory of exactly that size.
struct Written {
  ElementType type;
  std::int64_t count;
  Bytes bytes;

  Written(ElementType type_, std::int64_t count_)
      : type(type_), count(count_), bytes(make_bytes(count, size_of(type))) {
    std::memset(bytes.get(), 0xA5, static_cast<std::size_t>(count * size_of(type)));
  }
  // A NaN's sign and payload are nobody's promise.
  void append_to(std::vector<char>& to) const {
    const int size = size_of(type);
    for (std::int64_t j = 0; j < count; ++j) {
      const char* p = &bytes[static_cast<std::size_t>(j * size)];
      if (std::isnan(read_element(type, p))) {
        to.push_back('n');
      } else {
        to.insert(to.end(), p, p + size);
      }
    }
  }
};

// Calls body(begin, end) for `threads` pieces of [0, count), each in a thread of its own.
struct InThreads {
  int threads;

  template <class Body>
  void operator()(std::int64_t count, std::int64_t /*grain*/, const Body& body) const {
    std::vector<std::thread> workers;
    for (int t = 0; t < threads; ++t) {
      const std::int64_t begin = count * t / threads, end = count * (t + 1) / threads;
      if (begin < end) workers.emplace_back([&body, begin, end] { body(begin, end); });
    }
    for (std::thread& worker : workers) worker.join();
  }
};

// Calls check(ok, what) on the results compute(table, case, variant) of all cases: they are those
// of variant 0, cut and laid out otherwise, and of `reference` if bits must agree with it.
template <class Cases, class Compute, class Check>
void check_bits(const KernelTable& table, const KernelTable* reference, const char* family,
                const Cases& cases, int variants, Compute compute, Check check) {
  for (const auto& c : cases) {
    const std::string name = std::string(table.capability) + " " + family + " " + c.name();
    const std::vector<char> base = compute(table, c, 0);
    for (int variant = 1; variant < variants; ++variant) {
      check(compute(table, c, variant) == base,
            name + ": other bits in variant " + std::to_string(variant));
    }
    if (reference) check(compute(*reference, c, 0) == base, name + ": bits depend on instructions");
  }
}

}  // namespace cpu
}  // namespace gumbel_ext
