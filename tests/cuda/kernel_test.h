// What the emulated tests of kernels share: guarded memory, types as the tests see them, results.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <type_traits>

#include "../../csrc/cpu/kernels.h"
#include "device_math.cuh"
#include "params.h"

namespace {

using namespace gumbel_ext;
using cuda::ElementType;

int passed = 0, failed = 0;

// Memory at an address that is `shift` elements off a 64-byte boundary, of exactly the size asked
// for, so that AddressSanitizer sees the first byte past it; or, for the hooks that find races,
// between two stretches that may not be touched.
#if defined(__SANITIZE_THREAD__)
constexpr std::size_t kGuard = 4096;
#else
constexpr std::size_t kGuard = 0;
#endif
template <class T>
class Buffer {
 public:
  explicit Buffer(std::int64_t count, int shift = 0) : shift_(shift) {
    const std::size_t bytes = static_cast<std::size_t>(count + shift) * sizeof(T);
    memory_.reset(static_cast<char*>(
        ::operator new(2 * kGuard + (bytes > 0 ? bytes : 1), std::align_val_t(64))));
    std::memset(memory_.get(), 0xCC, 2 * kGuard + bytes);
    if (kGuard > 0) {
      emulation::forbid(memory_.get(), kGuard + static_cast<std::size_t>(shift) * sizeof(T));
      emulation::forbid(memory_.get() + kGuard + bytes, kGuard);
      end_ = memory_.get() + kGuard + bytes;
    }
  }
  ~Buffer() {
    if (kGuard > 0) {
      emulation::allow(memory_.get());
      emulation::allow(end_);
    }
  }
  Buffer(const Buffer&) = delete;
  T* data() { return reinterpret_cast<T*>(memory_.get() + kGuard) + shift_; }
  T& operator[](std::int64_t i) { return data()[i]; }

 private:
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  int shift_;
  const char* end_ = nullptr;
  std::unique_ptr<char, Free> memory_;
};

template <class T>
struct Type;
template <>
struct Type<float> {
  static constexpr ElementType value = ElementType::kFloat32;
  static constexpr cpu::ElementType cpu_value = cpu::ElementType::kFloat32;
  static constexpr const char* name = "float32";
  static constexpr double epsilon = 0x1p-23, smallest = 0x1p-126;
};
template <>
struct Type<double> {
  static constexpr ElementType value = ElementType::kFloat64;
  static constexpr cpu::ElementType cpu_value = cpu::ElementType::kFloat64;
  static constexpr const char* name = "float64";
  static constexpr double epsilon = 0x1p-52, smallest = 0x1p-1022;
};
template <>
struct Type<BFloat16> {
  static constexpr ElementType value = ElementType::kBFloat16;
  static constexpr cpu::ElementType cpu_value = cpu::ElementType::kBFloat16;
  static constexpr const char* name = "bfloat16";
  static constexpr double epsilon = 0x1p-7, smallest = 0x1p-126;
};
template <>
struct Type<Half> {
  static constexpr ElementType value = ElementType::kFloat16;
  static constexpr cpu::ElementType cpu_value = cpu::ElementType::kFloat16;
  static constexpr const char* name = "float16";
  static constexpr double epsilon = 0x1p-10, smallest = 0x1p-14;
};

[[maybe_unused]] double to_double(float a) { return a; }
[[maybe_unused]] double to_double(double a) { return a; }
[[maybe_unused]] double to_double(BFloat16 a) { return widen(a); }
[[maybe_unused]] double to_double(Half a) { return widen(a); }
template <class T>
T from_double(double a) {
  T out;
  if constexpr (std::is_same_v<T, double>) {
    out = a;
  } else {
    narrow(static_cast<float>(a), &out);
  }
  return out;
}

[[maybe_unused]] void report(const std::string& name, const std::string& why) {
  if (why.empty()) {
    ++passed;
    return;
  }
  ++failed;
  std::printf("FAILED %s: %s\n", name.c_str(), why.c_str());
  if (std::getenv("GUMBEL_EXT_FAIL_FAST") != nullptr) {
    std::fflush(stdout);
    std::_Exit(1);
  }
}

[[maybe_unused]] int summary() {
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}

// The order that threads run in, from GUMBEL_EXT_ORDER.
[[maybe_unused]] void choose_order() {
  auto& options = emulation::options();
  options.seed = 12345;
  if (const char* order = std::getenv("GUMBEL_EXT_ORDER")) {
    const std::string o = order;
    options.order = o == "reverse"  ? emulation::Order::kReverse
                    : o == "random" ? emulation::Order::kRandom
                    : o == "greedy" ? emulation::Order::kGreedy
                                    : emulation::Order::kInOrder;
  }
}

}  // namespace
