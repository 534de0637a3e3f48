// The CPU kernels without PyTorch: every regime, type and op against a scalar reference in double,
// the same bits however the work is cut, and nothing written outside. Built with the sanitizers by
// run_sanitizers.sh.
//
//   test_kernels [--quick | --share 2/6] [--digest CAPABILITY]
//
// --share takes the second of six parts of all cases, which together are all.
// --digest prints one hash of every result that CAPABILITY's kernels computed, to compare machines
// that cannot run each other's instructions.
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "binary_kernels.h"
#include "cpu/execute.h"
#include "density_kernels.h"
#include "estimator_kernels.h"
#include "log_row_kernels.h"
#include "noiseless_kernels.h"
#include "soft_argmax_kernels.h"
#include "strided.h"
#include "topk_kernels.h"

namespace {

using namespace gumbel_ext::cpu;

int passed = 0, failed = 0;

void check(bool ok, const std::string& what) {
  ok ? ++passed : ++failed;
  if (!ok && failed <= 30) std::printf("FAILED %s\n", what.c_str());
}

// ---- tensors ------------------------------------------------------------------------------------

// The memory orders of [outer, classes, inner] that problems come in.
enum class Layout { kContiguous, kClassesFirst, kClassesLast, kPadded };

// A strided buffer of exactly the size it needs, from an odd multiple of the element's size on,
// with guards around it.
class Buffer {
 public:
  Buffer(int element, std::int64_t outer, std::int64_t classes, std::int64_t inner, Layout layout)
      : element_(element) {
    switch (layout) {
      case Layout::kContiguous:
        strides_[0] = classes * inner, strides_[1] = inner, strides_[2] = 1;
        break;
      case Layout::kClassesFirst:
        strides_[0] = inner, strides_[1] = outer * inner, strides_[2] = 1;
        break;
      case Layout::kClassesLast:
        strides_[0] = classes * inner, strides_[1] = 1, strides_[2] = classes;
        break;
      case Layout::kPadded:
        strides_[0] = classes * (inner + 1) + 3, strides_[1] = inner + 1, strides_[2] = 1;
        break;
    }
    count_ =
        (outer - 1) * strides_[0] + (classes - 1) * strides_[1] + (inner - 1) * strides_[2] + 1;
    contiguous_ = layout == Layout::kContiguous;
    bytes_.assign(static_cast<std::size_t>((count_ + 2 * kGuard) * element),
                  static_cast<char>(0xA5));
  }

  char* at(std::int64_t o, std::int64_t c, std::int64_t i) {
    return bytes_.data() +
           (kGuard + o * strides_[0] + c * strides_[1] + i * strides_[2]) * element_;
  }
  bool guards_intact() const {
    const std::size_t guard = static_cast<std::size_t>(kGuard * element_);
    for (std::size_t i = 0; i < guard; ++i) {
      if (bytes_[i] != static_cast<char>(0xA5) ||
          bytes_[bytes_.size() - 1 - i] != static_cast<char>(0xA5))
        return false;
    }
    return true;
  }
  void attach(Operand& operand, const Problem& p) {
    operand.data = at(0, 0, 0);
    operand.class_stride = p.classes == 1 ? 1 : strides_[1];
    operand.contiguous = contiguous_;
    operand.stride[0] = strides_[0];
    operand.stride[1] = strides_[2];
  }

 private:
  static constexpr std::int64_t kGuard = 3;
  int element_;
  std::int64_t strides_[3], count_;
  bool contiguous_;
  std::vector<char> bytes_;
};

// ---- reference ----------------------------------------------------------------------------------

// Textbook Philox4x32-10, written apart from csrc/philox.h.
std::uint32_t reference_word(std::uint64_t seed, std::uint64_t draw, std::uint64_t n) {
  std::uint32_t c[4] = {static_cast<std::uint32_t>(draw), static_cast<std::uint32_t>(draw >> 32),
                        static_cast<std::uint32_t>(n >> 2), static_cast<std::uint32_t>(n >> 34)};
  std::uint32_t key[2] = {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
    const std::uint32_t next[4] = {
        static_cast<std::uint32_t>(b >> 32) ^ c[1] ^ key[0], static_cast<std::uint32_t>(b),
        static_cast<std::uint32_t>(a >> 32) ^ c[3] ^ key[1], static_cast<std::uint32_t>(a)};
    std::memcpy(c, next, sizeof c);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return c[n & 3];
}
double reference_noise(std::uint64_t seed, std::uint64_t offset, std::uint64_t n) {
  const double hi = reference_word(seed, offset, n), lo = reference_word(seed, offset + 1, n);
  if (hi < 0x1p31) return -std::log(-std::log1p(-(hi * 0x1p-32 + (lo + 0.5) * 0x1p-64)));
  return -std::log(-std::log((4294967295.0 - hi) * 0x1p-32 + (4294967295.5 - lo) * 0x1p-64));
}

// ---- cases --------------------------------------------------------------------------------------

// Where noise positions of [outer, classes, inner] lie.
enum class Places {
  kRowMajor,
  kShifted,   // from another first position on
  kPart,      // a part of a tensor with more classes and more inner elements
  kRepeated,  // every inner element the noise of its neighbour, as in a batch of equal noise
};

struct Case {
  ElementType type;
  std::int64_t outer, classes, inner;
  Layout layout;
  bool masked, tau_per_row, special;
  double tau;
  Places places;

  std::string name() const {
    char text[160];
    std::snprintf(text, sizeof text, "%s [%lld, %lld, %lld] layout %d places %d%s%s%s",
                  name_of(type), static_cast<long long>(outer), static_cast<long long>(classes),
                  static_cast<long long>(inner), static_cast<int>(layout), static_cast<int>(places),
                  masked ? " masked" : "", tau_per_row ? " tau per row" : "",
                  special ? " special values" : "");
    return text;
  }

  std::uint64_t first_position() const { return places == Places::kRowMajor ? 0 : 0xFFFFFFFF7ull; }
  // Of outer, classes, inner.
  std::array<std::int64_t, 3> position_strides() const {
    switch (places) {
      case Places::kPart:
        return {(classes + 3) * (inner + 2), inner + 2, 1};
      case Places::kRepeated:
        return {classes + 3, 1, 0};
      default:
        return {classes * inner, inner, 1};
    }
  }
  std::uint64_t position(std::int64_t o, std::int64_t k, std::int64_t i) const {
    const auto s = position_strides();
    return first_position() + static_cast<std::uint64_t>(o * s[0] + k * s[1] + i * s[2]);
  }
};

// Everything that one case computes, in logical order, for comparison bit by bit.
struct Results {
  std::vector<char> soft, hard, soft_grad, hard_grad;
  std::vector<std::int64_t> soft_index, hard_index, only_index;
  std::vector<char> soft_grad_tau, hard_grad_tau;

  bool operator==(const Results& o) const {
    return soft == o.soft && hard == o.hard && soft_grad == o.soft_grad &&
           hard_grad == o.hard_grad && soft_index == o.soft_index && hard_index == o.hard_index &&
           only_index == o.only_index && soft_grad_tau == o.soft_grad_tau &&
           hard_grad_tau == o.hard_grad_tau;
  }
};

constexpr std::uint64_t kSeed = 0xFEDCBA9876543210ull, kOffset = 0xFFFFFFFFull;

struct Data {
  std::vector<double> logits, grad;
  std::vector<std::uint8_t> mask;
  std::vector<double> tau;
};

Data make_data(const Case& c) {
  Data d;
  std::mt19937 random(static_cast<unsigned>(c.classes * 31 + c.inner * 7 + c.outer));
  const auto rows = c.outer * c.inner, count = rows * c.classes;
  // Multiples of 1/16 that every type holds exactly.
  const auto value = [&] {
    return static_cast<double>(static_cast<int>(random() % 129) - 64) / 16;
  };
  for (std::int64_t i = 0; i < count; ++i) {
    d.logits.push_back(value());
    d.grad.push_back(value() / 4);
    d.mask.push_back(!c.masked || random() % 4 != 0);
  }
  for (std::int64_t r = 0; r < rows; ++r)
    d.tau.push_back(c.tau * (c.tau_per_row ? 0.5 + (random() % 100) / 100.0 : 1));
  const auto at = [&](std::int64_t o, std::int64_t k, std::int64_t i) {
    return static_cast<std::size_t>((o * c.classes + k) * c.inner + i);
  };
  for (std::int64_t o = 0; o < c.outer; ++o) {
    for (std::int64_t i = 0; i < c.inner; ++i) {
      const std::int64_t row = o * c.inner + i;
      for (std::int64_t k = 0; k < c.classes; ++k) {
        if (c.masked && row % 5 == 2) d.mask[at(o, k, i)] = 0;
        if (c.special && row % 7 == 1) d.logits[at(o, k, i)] = -HUGE_VAL;
        if (c.special && row % 7 == 4 && k % 3 == 0) d.logits[at(o, k, i)] = -HUGE_VAL;
      }
      if (c.special && row % 7 == 3) d.logits[at(o, c.classes / 2, i)] = std::nan("");
    }
  }
  return d;
}

Results compute(const KernelTable& table, const Case& c, const Data& d, Layout layout, int threads,
                bool split) {
  Problem p{};
  p.type = c.type;
  p.outer = c.outer;
  p.classes = c.classes;
  p.inner = c.inner;
  p.dims = 2;
  p.size[0] = c.outer;
  p.size[1] = c.inner;
  p.seed = kSeed;
  p.offset = kOffset;
  p.tau_value = c.tau;
  p.first_position = c.first_position();
  const auto strides = c.position_strides();
  p.positions.stride[0] = strides[0];
  p.positions.stride[1] = strides[2];
  p.positions.class_stride = c.classes == 1 ? 1 : strides[1];
  p.positions.contiguous = c.places == Places::kRowMajor || c.places == Places::kShifted;

  const int element = size_of(c.type), wide = c.type == ElementType::kFloat64 ? 8 : 4;
  const std::int64_t rows = p.rows();
  const auto buffer = [&](int bytes) { return Buffer(bytes, c.outer, c.classes, c.inner, layout); };
  Buffer logits = buffer(element), grad = buffer(element), mask = buffer(1), y = buffer(element),
         one_hot = buffer(element), soft_grad = buffer(element), hard_grad = buffer(element);
  const auto each = [&](auto body) {
    for (std::int64_t o = 0; o < c.outer; ++o)
      for (std::int64_t k = 0; k < c.classes; ++k)
        for (std::int64_t i = 0; i < c.inner; ++i)
          body(o, k, i, static_cast<std::size_t>((o * c.classes + k) * c.inner + i));
  };
  each([&](auto o, auto k, auto i, std::size_t n) {
    write_element(c.type, logits.at(o, k, i), d.logits[n]);
    write_element(c.type, grad.at(o, k, i), d.grad[n]);
    *mask.at(o, k, i) = static_cast<char>(d.mask[n]);
  });

  const auto parallel_for = [threads](std::int64_t count, std::int64_t, const auto& body) {
    std::vector<std::thread> workers;
    for (int t = 1; t < threads; ++t) {
      const std::int64_t begin = count * t / threads, end = count * (t + 1) / threads;
      if (begin < end) workers.emplace_back([&body, begin, end] { body(begin, end); });
    }
    if (count / threads > 0) body(0, count / threads);
    for (std::thread& worker : workers) worker.join();
  };
  const auto run = [&](Op op) {
    if (split) {
      execute_plan(table, op, p, Plan{Regime::kSplitRow, p.rows(), 1, 1}, parallel_for);
    } else {
      execute(table, op, p, 1, parallel_for);
    }
  };
  const auto forward_operands = [&] {
    logits.attach(p.logits, p);
    if (c.masked) mask.attach(p.mask, p);
    if (c.tau_per_row) {
      p.tau.data = const_cast<double*>(d.tau.data());
      p.tau.class_stride = 1;
      p.tau.stride[0] = c.inner;
      p.tau.stride[1] = 1;
    }
  };

  Results out;
  const auto room = static_cast<std::size_t>(rows);
  out.soft_index.assign(room, -7);
  out.hard_index.assign(room, -7);
  out.only_index.assign(room, -7);
  out.soft_grad_tau.assign(room * static_cast<std::size_t>(wide), 0);
  out.hard_grad_tau = out.soft_grad_tau;

  forward_operands();
  p.index = out.only_index.data();
  run(Op::kIndexOnly);
  y.attach(p.output, p);
  p.index = out.soft_index.data();
  run(Op::kForward);
  one_hot.attach(p.output, p);
  p.hard = true;
  p.index = out.hard_index.data();
  run(Op::kForward);
  p.hard = false;

  grad.attach(p.grad, p);
  hard_grad.attach(p.grad_logits, p);
  p.output = Operand();
  p.grad_tau = out.hard_grad_tau.data();
  run(Op::kBackwardRecompute);
  p.logits = p.mask = Operand();
  y.attach(p.output, p);
  soft_grad.attach(p.grad_logits, p);
  p.grad_tau = out.soft_grad_tau.data();
  run(Op::kBackward);

  check(logits.guards_intact() && y.guards_intact() && one_hot.guards_intact() &&
            soft_grad.guards_intact() && hard_grad.guards_intact(),
        c.name() + ": wrote outside a tensor");
  const auto collect = [&](Buffer& from, std::vector<char>& to) {
    each([&](auto o, auto k, auto i, std::size_t) {
      to.insert(to.end(), from.at(o, k, i), from.at(o, k, i) + element);
    });
  };
  collect(y, out.soft);
  collect(one_hot, out.hard);
  collect(soft_grad, out.soft_grad);
  collect(hard_grad, out.hard_grad);
  return out;
}

// Compares one case with the reference, row by row.
void check_values(const Case& c, const Data& d, const Results& got) {
  const int element = size_of(c.type);
  const double eps = epsilon_of(c.type),
               working = c.type == ElementType::kFloat64 ? 0x1p-52 : 0x1p-23;
  bool soft_ok = true, hard_ok = true, index_ok = true, grad_ok = true, tau_ok = true;
  std::vector<double> z(static_cast<std::size_t>(c.classes)), y(z), h(z);
  for (std::int64_t o = 0; o < c.outer; ++o) {
    for (std::int64_t i = 0; i < c.inner; ++i) {
      const auto row = static_cast<std::size_t>(o * c.inner + i);
      const auto at = [&](std::int64_t k) {
        return static_cast<std::size_t>((o * c.classes + k) * c.inner + i);
      };
      const auto value = [&](const std::vector<char>& from, std::int64_t k) {
        return read_element(c.type, from.data() + at(k) * static_cast<std::size_t>(element));
      };
      std::int64_t first_allowed = -1, first_nan = -1;
      double top = -HUGE_VAL, widest = 1;
      for (std::int64_t k = 0; k < c.classes; ++k) {
        const auto n = at(k);
        z[static_cast<std::size_t>(k)] = -HUGE_VAL;
        if (!d.mask[n]) continue;
        if (first_allowed < 0) first_allowed = k;
        if (d.logits[n] != d.logits[n] && first_nan < 0) first_nan = k;
        const double v = d.logits[n] + reference_noise(kSeed, kOffset, c.position(o, k, i));
        z[static_cast<std::size_t>(k)] = v;
        if (v > top) top = v;
        if (std::isfinite(v)) widest = std::max(widest, std::fabs(v));
      }
      const std::int64_t index = got.soft_index[row];
      index_ok = index_ok && got.hard_index[row] == index && got.only_index[row] == index;
      const bool forbidden = first_allowed < 0,
                 nan = !forbidden && (first_nan >= 0 || top == -HUGE_VAL);
      if (forbidden || nan) {
        index_ok = index_ok && index == (forbidden        ? -1
                                         : first_nan >= 0 ? first_nan
                                                          : first_allowed);
        for (std::int64_t k = 0; k < c.classes; ++k) {
          const double soft = value(got.soft, k), hard = value(got.hard, k);
          soft_ok =
              soft_ok &&
              (forbidden ? soft == 0 && value(got.soft_grad, k) == 0 && value(got.hard_grad, k) == 0
                         : soft != soft && value(got.hard_grad, k) != value(got.hard_grad, k));
          hard_ok = hard_ok && (forbidden ? hard == 0 : hard != hard);
        }
        continue;
      }
      const double tau = d.tau[row];
      // Near-ties may fall either way: the winner must be within rounding of the largest.
      index_ok = index_ok && index >= 0 && index < c.classes &&
                 z[static_cast<std::size_t>(index)] >= top - 8 * working * widest;
      double total = 0;
      for (auto& v : z) total += std::exp((v - top) / tau);
      const double shift = d.grad[at(index)];
      double dot = 0, log_dot = 0, scale = 0;
      for (std::size_t k = 0; k < z.size(); ++k) {
        y[k] = std::exp((z[k] - top) / tau) / total;
        h[k] = d.grad[at(static_cast<std::int64_t>(k))] - shift;
        dot += h[k] * y[k];
        scale = std::max(scale, std::fabs(h[k]));
      }
      const double spread = 1 + 2 * widest / tau, tolerance = 4 * eps + 16 * spread * working;
      for (std::size_t k = 0; k < z.size(); ++k) {
        const auto kk = static_cast<std::int64_t>(k);
        const double gradient = y[k] * (h[k] - dot) / tau;
        if (y[k] > 0) log_dot += std::log(y[k]) * gradient * tau;
        soft_ok = soft_ok &&
                  std::fabs(value(got.soft, kk) - y[k]) <= tolerance * y[k] + 1e-7 * eps + 0x1p-24;
        hard_ok = hard_ok && value(got.hard, kk) == (kk == index ? 1 : 0);
        const double slack = 2 * tolerance * scale / tau + 0x1p-24;
        grad_ok = grad_ok && std::fabs(value(got.soft_grad, kk) - gradient) <= slack &&
                  std::fabs(value(got.hard_grad, kk) - gradient) <= slack;
      }
      const ElementType wide =
          c.type == ElementType::kFloat64 ? ElementType::kFloat64 : ElementType::kFloat32;
      const double dtau = read_element(
          wide, got.hard_grad_tau.data() + row * static_cast<std::size_t>(size_of(wide)));
      tau_ok = tau_ok &&
               std::fabs(dtau + log_dot / tau) <= 64 * spread * working * scale * spread / tau +
                                                      0x1p-20 * (wide == ElementType::kFloat32);
    }
  }
  check(soft_ok, c.name() + ": soft values");
  check(hard_ok, c.name() + ": hard values");
  check(index_ok, c.name() + ": index");
  check(grad_ok, c.name() + ": gradient");
  check(tau_ok, c.name() + ": gradient of tau");
  if (element >= 4) {
    check(got.soft_grad == got.hard_grad && got.soft_grad_tau == got.hard_grad_tau,
          c.name() + ": soft and hard gradients differ");
  }
}

std::uint64_t hash(std::uint64_t h, const void* data, std::size_t bytes) {
  const auto* p = static_cast<const unsigned char*>(data);
  for (std::size_t i = 0; i < bytes; ++i) h = (h ^ p[i]) * 0x100000001B3ull;
  return h;
}

// A NaN's sign and payload are nobody's promise.
std::uint64_t hash_elements(std::uint64_t h, ElementType type, const std::vector<char>& data) {
  const auto size = static_cast<std::size_t>(size_of(type));
  for (std::size_t i = 0; i < data.size(); i += size) {
    const double v = read_element(type, data.data() + i);
    h = v != v ? hash(h, "nan", 3) : hash(h, data.data() + i, size);
  }
  return h;
}

std::uint64_t digest(const Case& c, const Results& r) {
  const ElementType wide =
      c.type == ElementType::kFloat64 ? ElementType::kFloat64 : ElementType::kFloat32;
  std::uint64_t h = 0xCBF29CE484222325ull;
  for (const auto* values : {&r.soft, &r.hard, &r.soft_grad, &r.hard_grad})
    h = hash_elements(h, c.type, *values);
  for (const auto* values : {&r.soft_grad_tau, &r.hard_grad_tau})
    h = hash_elements(h, wide, *values);
  for (const auto* index : {&r.soft_index, &r.hard_index, &r.only_index})
    h = hash(h, index->data(), index->size() * 8);
  return h;
}

std::vector<Case> make_cases(bool quick) {
  std::vector<Case> cases;
  const std::vector<ElementType> types = {ElementType::kFloat32, ElementType::kFloat64,
                                          ElementType::kBFloat16, ElementType::kFloat16};
  const std::int64_t many[] = {1,  2,    7,    8,    9,    15,   16,   17,
                               64, 1023, 1024, 1025, 2047, 2048, 2049, 5000};
  const std::int64_t few[] = {1, 2, 8, 9, 17, 1025, 2049};
  const std::int64_t inners[] = {1, 2, 7, 15, 16, 17, 64, 65, 130};
  const std::int64_t few_inners[] = {1, 3, 17, 65};
  int turn = 0;
  for (ElementType type : types) {
    for (std::int64_t inner : quick ? std::vector<std::int64_t>(few_inners, few_inners + 4)
                                    : std::vector<std::int64_t>(inners, inners + 9)) {
      for (std::int64_t classes : quick ? std::vector<std::int64_t>(few, few + 7)
                                        : std::vector<std::int64_t>(many, many + 16)) {
        const std::int64_t outer = classes * inner > 20000 ? 1 : classes > 500 ? 3 : 21;
        for (int variant = 0; variant < (quick ? 1 : 2); ++variant, ++turn) {
          cases.push_back(Case{type, outer, classes, inner, static_cast<Layout>(turn % 4),
                               turn % 3 == 0, turn % 5 < 2, turn % 2 == 0,
                               turn % 7 == 0 ? 0.1 : 0.8, static_cast<Places>(turn / 3 % 4)});
        }
      }
    }
  }
  return cases;
}

// One of `parts` of the cases. Cases are numbered by what they vary, so that every nth of them
// would be alike in some of it.
struct Share {
  unsigned part = 0, parts = 1;
  bool has(std::size_t i) const {
    return (static_cast<std::uint32_t>(i) * 0x9E3779B1u >> 16) % parts == part;
  }
};

// Those of a share; every third of them where time is short.
template <class Cases>
Cases some_of(const Cases& cases, bool quick, Share share) {
  Cases some;
  for (std::size_t i = 0; i < cases.size(); i += quick ? 3 : 1) {
    if (share.has(i)) some.push_back(cases[i]);
  }
  return some;
}

// Calls use(name, cases, variants of the work's cut and of layouts, function that computes one).
template <class Use>
void each_family(bool quick, Share share, Use use) {
  use("gumbel_topk", some_of(topk_cases(), quick, share), kTopKVariants, compute_topk);
  use("log-space sample", some_of(log_sample_cases(), quick, share), kLogRowVariants,
      compute_log_sample);
  use("log-space gradient", some_of(log_gradient_cases(), quick, share), kLogRowVariants,
      compute_log_gradient);
  use("density", some_of(density_cases(), quick, share), kDensityVariants, compute_density);
  use("estimator", some_of(estimator_cases(), quick, share), kEstimatorVariants, compute_estimator);
  use("expected position", some_of(position_cases(), quick, share), kPositionVariants,
      compute_positions);
  use("without noise", some_of(noiseless_cases(), quick, share), kNoiselessVariants,
      compute_noiseless);
}

}  // namespace

int main(int argc, char** argv) {
  bool quick = false;
  Share share;
  std::string wanted;
  for (int i = 1; i < argc; ++i) {
    if (!std::strcmp(argv[i], "--quick")) quick = true;
    if (!std::strcmp(argv[i], "--share") && i + 1 < argc) {
      if (std::sscanf(argv[++i], "%u/%u", &share.part, &share.parts) != 2 || share.part < 1 ||
          share.part-- > share.parts) {
        std::fprintf(stderr, "--share must be for instance 2/6, got %s\n", argv[i]);
        return 2;
      }
    }
    if (!std::strcmp(argv[i], "--digest") && i + 1 < argc) wanted = argv[++i];
  }
  const KernelTable* tables[kMaxCapabilities];
  const int count = available_kernels(tables);
  const std::vector<Case> cases = some_of(make_cases(quick), false, share);

#if defined(GUMBEL_EXT_EMULATED_AVX512)
  if (wanted == "avx512") tables[0] = &kAvx512Kernels;
#endif
  if (!wanted.empty()) {
    for (int i = 0; i < count; ++i) {
      if (wanted != tables[i]->capability) continue;
      std::uint64_t h = 0;
      for (const Case& c : cases) {
        const std::uint64_t one =
            digest(c, compute(*tables[i], c, make_data(c), c.layout, 1, false));
        h = hash(h, &one, sizeof one);
      }
      for (const BinaryCase& c : binary_cases()) {
        const std::vector<char> bytes = compute_binary(*tables[i], c, 1);
        h = hash(h, bytes.data(), bytes.size());
      }
      each_family(quick, share, [&](const char*, const auto& cases, int, auto compute) {
        for (const auto& c : cases) {
          const std::vector<char> bytes = compute(*tables[i], c, 0);
          h = hash(h, bytes.data(), bytes.size());
        }
      });
      std::printf("%016llx\n", static_cast<unsigned long long>(h));
      return 0;
    }
    std::fprintf(stderr, "this machine cannot run %s kernels\n", wanted.c_str());
    return 2;
  }

  for (int i = 0; i < count; ++i) {
    const KernelTable& table = *tables[i];
    const int before = failed;
    for (const Case& c : cases) {
      const Data d = make_data(c);
      const Results base = compute(table, c, d, c.layout, 1, false);
      check_values(c, d, base);
      for (int threads : {2, 7}) {
        check(digest(c, compute(table, c, d, c.layout, threads, false)) == digest(c, base),
              c.name() + ": bits depend on the number of threads");
      }
      const Layout other =
          c.layout == Layout::kContiguous ? Layout::kClassesLast : Layout::kContiguous;
      check(digest(c, compute(table, c, d, other, 1, false)) == digest(c, base),
            c.name() + ": bits depend on layout");
      if (c.inner == 1 && (c.places != Places::kPart || c.classes == 1)) {
        check(digest(c, compute(table, c, d, c.layout, 3, true)) == digest(c, base),
              c.name() + ": bits of a row shared among threads");
      }
      if (i > 0 && std::strcmp(table.capability, "generic") != 0) {
        check(digest(c, compute(*tables[0], c, d, c.layout, 1, false)) == digest(c, base),
              c.name() + ": bits depend on the instruction set");
      }
    }
    const bool has_fma = std::strcmp(table.capability, "generic") != 0;
    const KernelTable* reference = i > 0 && has_fma ? tables[0] : nullptr;
    check_binary_kernels(table, reference, check);
    each_family(quick, share,
                [&](const char* family, const auto& cases, int variants, auto compute) {
                  check_bits(table, reference, family, cases, variants, compute, check);
                });
    std::printf("%s: %zu cases, %d failures\n", table.capability, cases.size(), failed - before);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}
