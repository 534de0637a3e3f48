// The binary concrete's CUDA kernels, unchanged, under emulation: every type, operand and position
// against float64 on the same noise.
//
// GUMBEL_EXT_ORDER and GUMBEL_EXT_FAIL_FAST as for test_gumbel_softmax_kernels.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "../../csrc/cuda/binary_concrete_launch.cu"
#include "kernel_test.h"

namespace {

using cuda::PositionGrid;

constexpr std::uint64_t kSeed = 0x1234567890ABCDEFu, kOffset = 41;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

double noise_of(std::uint64_t n) {
  const std::uint32_t hi = philox_word(kSeed, kOffset, n), lo = philox_word(kSeed, kOffset + 1, n);
  return logistic_from_real_words(DeviceF64{static_cast<double>(hi)},
                                  DeviceF64{static_cast<double>(lo)})
      .v;
}

// How an operand is spread over the elements.
enum class Spread { kFull, kOne, kLeading, kTrailing, kMiddle };

struct Case {
  BinaryOp op = BinaryOp::kSoft;
  std::int64_t count = 1000;
  int shift = 0;  // elements that memory begins past a 64-byte boundary
  std::uint64_t first = 0;
  std::int64_t stride = 1;  // of positions
  bool swapped = false;     // positions [rows, columns], columns adjacent
  Spread logits = Spread::kFull, tau = Spread::kOne, grad = Spread::kFull;
  bool tau_tensor = false, edges = false, state_in_memory = false, tau_terms = true;
  double tau_value = 0.7;
};

struct Pattern {
  std::int64_t repeat, period;
};
Pattern pattern_of(Spread spread, std::int64_t count) {
  switch (spread) {
    case Spread::kFull:
      return {1, count};
    case Spread::kOne:
      return {count, 1};
    case Spread::kLeading:
      return {1, count / 5};
    case Spread::kTrailing:
      return {5, count / 5};
    default:
      return {5, count / 25};
  }
}

template <class T>
std::string check(const Case& c) {
  using Scalar = typename Element<T>::Scalar;
  constexpr double kEpsilon = Type<T>::epsilon, kComputed = sizeof(Scalar) == 8 ? 0x1p-52 : 0x1p-23;
  const Pattern of_logits = pattern_of(c.logits, c.count), of_tau = pattern_of(c.tau, c.count),
                of_grad = pattern_of(c.grad, c.count);
  Buffer<T> logits(of_logits.period, c.shift), grad(of_grad.period, c.shift), out(c.count, c.shift);
  Buffer<Scalar> inverse(of_tau.period, c.shift), terms(c.count, c.shift);
  Buffer<std::int64_t> used(2), state(2);
  std::mt19937 random(static_cast<unsigned>(c.count + c.shift));
  std::normal_distribution<double> normal(0, 2);
  const double edges[] = {kInfinity, -kInfinity, std::nan(""), 60, -60, 3e4};
  for (std::int64_t i = 0; i < of_logits.period; ++i) {
    logits[i] = from_double<T>(c.edges && i % 3 == 0 ? edges[i / 3 % 6] : normal(random));
  }
  for (std::int64_t i = 0; i < of_grad.period; ++i) grad[i] = from_double<T>(normal(random));
  for (std::int64_t i = 0; i < of_tau.period; ++i) {
    inverse[i] = static_cast<Scalar>(1 / (c.tau_value * (1 + 0.1 * static_cast<double>(i % 7))));
  }
  used[0] = used[1] = 77;

  BinaryParams p{};
  p.count = c.count;
  p.out = out.data();
  p.used_state = used.data();
  if (c.op != BinaryOp::kNoise) p.logits = {logits.data(), of_logits.repeat, of_logits.period};
  if (c.op == BinaryOp::kBackward) {
    p.grad = {grad.data(), of_grad.repeat, of_grad.period};
    if (c.tau_terms) p.tau_terms = terms.data();
  }
  p.inverse_tau_value = 1 / c.tau_value;
  p.inverse_tau_float32 = static_cast<float>(p.inverse_tau_value);
  if (c.tau_tensor) p.inverse_tau = {inverse.data(), of_tau.repeat, of_tau.period};
  p.random.seed = kSeed;
  p.random.offset = kOffset;
  if (c.state_in_memory) {
    state[0] = static_cast<std::int64_t>(kSeed);
    state[1] = static_cast<std::int64_t>(kOffset);
    p.random.in_memory = true;
    p.random.seed_address = state.data();
    p.random.offset_address = state.data() + 1;
  }
  PositionGrid positions{};
  positions.first = c.first;
  positions.dims = 1;
  positions.size[0] = c.count;
  positions.stride[0] = c.stride;
  const std::int64_t columns = 7, rows = (c.count + columns - 1) / columns;
  if (c.swapped) {
    positions.dims = 2;
    positions.size[0] = rows;
    positions.size[1] = columns;
    positions.stride[0] = 1;
    positions.stride[1] = rows;
  }
  if (const char* error = cuda::launch_binary(c.op, Type<T>::value, p, positions, nullptr)) {
    return error;
  }

  if (used[0] != static_cast<std::int64_t>(kSeed) ||
      used[1] != static_cast<std::int64_t>(kOffset)) {
    return "state not recorded";
  }
  const auto wrong = [](const char* what, std::int64_t n, double got, double want) {
    char text[200];
    std::snprintf(text, sizeof text, "%s %lld is %.9g, not %.9g", what, (long long)n, got, want);
    return std::string(text);
  };
  for (std::int64_t n = 0; n < c.count; ++n) {
    const std::uint64_t position =
        c.first +
        static_cast<std::uint64_t>(c.swapped ? n % columns * rows + n / columns : n * c.stride);
    const double noise = noise_of(position),
                 l = c.op == BinaryOp::kNoise
                         ? 0
                         : to_double(logits[n / of_logits.repeat % of_logits.period]),
                 by = c.tau_tensor
                          ? inverse[n / of_tau.repeat % of_tau.period]
                          : (sizeof(Scalar) == 8 ? p.inverse_tau_value : p.inverse_tau_float32),
                 score = l + noise, z = score * by, e = std::exp(-std::fabs(z)),
                 slope = e / (1 + e) / (1 + e), got = to_double(out[n]);
    // A float32 score is off by some roundings of the logit and of the noise.
    const double off = 8 * kComputed *
                       (std::max(1.0, std::fabs(noise)) + (std::isfinite(l) ? std::fabs(l) : 0)),
                 relative = 4 * kEpsilon + 16 * kComputed + 2 * off * by;
    const double tiny = 2 * Type<T>::smallest + 0x1p-125;
    double want = score, allowed = off + kEpsilon * std::fabs(score);
    if (c.op == BinaryOp::kSoft) {
      want = z < 0 ? e / (1 + e) : 1 / (1 + e);
      allowed = relative * want + tiny;
    } else if (c.op == BinaryOp::kHard) {
      want = score > 0;
      allowed = std::fabs(score) < off ? 1 : 0;
    } else if (c.op == BinaryOp::kBackward) {
      const double dy = to_double(grad[n / of_grad.repeat % of_grad.period]);
      want = dy * slope * by;
      allowed = relative * std::fabs(want) + tiny * (1 + std::fabs(dy) * by);
      if (std::isfinite(l)) {
        const double term = -want * z, term_got = terms[n];
        // z, a difference where it is small, is off by as much as the score.
        const double room = (relative + 16 * kComputed) * std::fabs(term) +
                            std::fabs(want) * off * by + (1 + std::fabs(z)) * 0x1p-100;
        if (c.tau_terms && !(std::fabs(term_got - term) <= room)) {
          return wrong("term", n, term_got, term);
        }
      } else if (c.tau_terms && !std::isnan(l) && terms[n] != 0) {
        return wrong("term", n, terms[n], 0);
      } else if (c.tau_terms && std::isnan(l) && !std::isnan(static_cast<double>(terms[n]))) {
        return wrong("term", n, terms[n], l);
      }
    }
    if (std::isnan(l)) {
      if (!std::isnan(got)) return wrong("element", n, got, l);
      continue;
    }
    if (std::isinf(l) && c.op != BinaryOp::kBackward) want = l > 0, allowed = 0;
    if (std::isinf(l) && c.op == BinaryOp::kBackward) want = allowed = 0;
    if (!(std::fabs(got - want) <= allowed)) return wrong("element", n, got, want);
  }
  return "";
}

template <class T>
void run(const Case& c) {
  char name[200];
  constexpr const char* kOps[] = {"noise", "soft", "hard", "backward"};
  std::snprintf(name, sizeof name, "%s binary %s, %lld elements, shift %d, first %llx%s%s%s",
                Type<T>::name, kOps[static_cast<int>(c.op)], (long long)c.count, c.shift,
                (unsigned long long)c.first, c.swapped ? ", swapped" : "", c.edges ? ", edges" : "",
                c.tau_tensor ? ", tau tensor" : "");
  std::string why;
  try {
    why = check<T>(c);
  } catch (const emulation::Error& error) {
    why = error.what();
  }
  report(name, why);
}

template <class T>
void run_type() {
  for (const BinaryOp op :
       {BinaryOp::kNoise, BinaryOp::kSoft, BinaryOp::kHard, BinaryOp::kBackward}) {
    Case c;
    c.op = op;
    for (const std::int64_t count : {1, 3, 4, 7, 8, 9, 255, 1024, 4099}) {
      c.count = count;
      for (const int shift : {0, 1, 3, 4}) {
        for (const std::uint64_t first : {0, 1, 4, 6}) {
          if (count > 1000 && shift != static_cast<int>(first % 4)) continue;
          c.shift = shift;
          c.first = first;
          run<T>(c);
        }
      }
      c.shift = 0;
      // Blocks whose number outgrows 32 bits, positions that wrap.
      for (const std::uint64_t first : {(std::uint64_t{1} << 34) - 6, ~std::uint64_t{0} - 8}) {
        c.first = first;
        run<T>(c);
      }
      c.first = 5;
      c.edges = true;
      run<T>(c);
      c.tau_terms = false;
      run<T>(c);
      c.edges = false;
      c.tau_terms = true;
      c.swapped = true;
      run<T>(c);
      c.swapped = false;
      c.stride = count % 2 == 0 ? 0 : 3;
      run<T>(c);
      c.stride = 1;
      c.state_in_memory = true;
      run<T>(c);
      c.state_in_memory = false;
      c.first = 0;
    }
    c.count = 1000;
    for (const Spread spread :
         {Spread::kFull, Spread::kOne, Spread::kLeading, Spread::kTrailing, Spread::kMiddle}) {
      for (const bool swapped : {false, true}) {
        Case d = c;
        d.swapped = swapped;
        d.logits = spread;
        run<T>(d);
        d = c;
        d.swapped = swapped;
        d.grad = spread;
        run<T>(d);
        d = c;
        d.swapped = swapped;
        d.tau = spread;
        d.tau_tensor = true;
        run<T>(d);
      }
    }
    // More groups than the grid has threads is too much for here; a few of many tails is not.
    c.count = 20000;
    c.tau_value = 0.05;
    run<T>(c);
    c.edges = true;
    c.tau_value = 1e-30;
    run<T>(c);
  }
}

}  // namespace

int main() {
  choose_order();
  run_type<float>();
  run_type<double>();
  run_type<BFloat16>();
  run_type<Half>();
  return summary();
}
