// The CUDA kernels, unchanged, under emulation: every regime, type and layout against a float64
// reference on the same noise, and the noise itself against the CPU kernels'.
//
//   test_gumbel_softmax_kernels [only cases whose name contains this]
//
// GUMBEL_EXT_ORDER = in_order | reverse | random | greedy chooses the order that threads run in,
// GUMBEL_EXT_REGIMES=stream,split limits the cases to some regimes. GUMBEL_EXT_QUICK=1 leaves out
// the long rows, GUMBEL_EXT_FAIL_FAST=1 ends at the first failure. Compiled with
// -DGUMBEL_EXT_TYPE=float, double, BFloat16 or Half it holds that type's cases alone.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cuda/positions_launch.cu"
#include "gumbel_softmax_launch.cuh"
#include "kernel_test.h"
#include "noise_kernels.cuh"
#include "topk_kernels.cuh"

namespace {

using namespace gumbel_ext;
using cuda::ElementType;
using cuda::Op;
using cuda::Params;
using cuda::Plan;
using cuda::Regime;

constexpr std::uint64_t kSeed = 0x1234567890ABCDEFu, kOffset = 41;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
// So large that noise rounds away, also in float64.
constexpr double kHuge = 0x1p70;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

double noise_of(std::uint64_t n) {
  const std::uint32_t hi = philox_word(kSeed, kOffset, n), lo = philox_word(kSeed, kOffset + 1, n);
  return -log_positive(exponential_from_real_words(DeviceF64{static_cast<double>(hi)},
                                                   DeviceF64{static_cast<double>(lo)}))
              .v;
}

enum class Shape { kContiguous, kChannelsLast, kPitched, kSpread, kClassesFirst };
enum class Special { kNone, kEdges, kTies };
// Where noise positions of [outer, classes, inner] lie.
enum class Places {
  kRowMajor,
  kShifted,   // row-major from a position on that is odd and beyond 2^32
  kCut,       // a part of the classes
  kPart,      // a part of the classes and of the inner elements
  kSwapped,   // the classes of an inner element follow each other
  kRepeated,  // every row the noise of the first
  kTable,     // rows in threes that follow each other and then a gap
  kNone,      // no noise
};
constexpr Places kPlaces[] = {Places::kShifted,  Places::kCut,   Places::kPart, Places::kSwapped,
                              Places::kRepeated, Places::kTable, Places::kNone};

struct Case {
  Op op = Op::kSoft;
  std::int64_t outer = 1, classes = 1, inner = 1;
  Shape shape = Shape::kContiguous;
  int shift = 0;  // elements that operands lie off a 64-byte boundary
  enum class Shifted { kAll, kLogits, kY, kGrad, kGradLogits } shifted = Shifted::kAll;
  bool mask = false, tau_rows = false, bad_tau = false, bad_index = false, grad_tau = false,
       in_memory = false;
  Special special = Special::kNone;
  Places places = Places::kRowMajor;
  double tau = 0.7;
  std::int64_t k = 0;  // of gumbel_topk, which takes the place of op if not 0
  // Forces a regime where its team is not 0.
  Plan plan{Regime::kRows, 0, 0, 1, 1, 0};
  cuda::Device device{132, true};

  // Where it is not odd, strides alone decide whether rows begin inside a group.
  std::uint64_t first_position() const {
    return places == Places::kRowMajor                             ? 0
           : places == Places::kShifted || places == Places::kPart ? 0xFFFFFFFF7u
                                                                   : 0xFFFFFFFF8u;
  }
  // Of outer, classes, inner.
  std::array<std::int64_t, 3> position_strides() const {
    switch (places) {
      case Places::kCut:
        return {(classes + 3) * inner, inner, 1};
      case Places::kPart:
        return {(classes + 3) * (inner + 2), inner + 2, 1};
      case Places::kSwapped:
        return {8 * (classes + 1) * inner, 1, classes + 1};
      case Places::kRepeated:
        return {0, 1, 0};
      default:
        return {classes * inner, inner, 1};
    }
  }
  std::uint64_t position(std::int64_t row, std::int64_t k) const {
    const auto s = position_strides();
    const std::int64_t of_row = places == Places::kTable
                                    ? row / 3 * (7 * classes * inner + 5) + row % 3
                                    : row / inner * s[0] + row % inner * s[2];
    return first_position() + static_cast<std::uint64_t>(of_row + k * s[1]);
  }
};

const char* name_of(Op op) {
  switch (op) {
    case Op::kSoft:
      return "soft";
    case Op::kLogSoft:
      return "log";
    case Op::kHard:
      return "hard";
    case Op::kIndexOnly:
      return "index";
    case Op::kBackward:
      return "backward";
    default:
      return "recompute";
  }
}
const char* name_of(Regime regime) {
  switch (regime) {
    case Regime::kRows:
      return "rows";
    case Regime::kClusters:
      return "clusters";
    case Regime::kStream:
      return "stream";
    case Regime::kSplit:
      return "split";
    default:
      return "columns";
  }
}

std::string only, regimes;

template <class T>
class Run {
 public:
  using Scalar = typename Element<T>::Scalar;

  explicit Run(const Case& c)
      : c_(c),
        rows_(c.outer * c.inner),
        pitch_(c.shape == Shape::kPitched ? c.classes + 3 : c.classes),
        size_(c.outer * pitch_ * c.inner * (c.shape == Shape::kSpread ? 2 : 1)),
        x_(size_, shift_of(Case::Shifted::kLogits)),
        y_(size_, shift_of(Case::Shifted::kY)),
        grad_(size_, shift_of(Case::Shifted::kGrad)),
        out_(size_, shift_of(Case::Shifted::kGradLogits)),
        mask_(c.outer * c.classes * c.inner),
        index_(rows_ * std::max<std::int64_t>(c.k, 1)),
        tau_(rows_),
        grad_tau_(rows_),
        used_(2),
        state_(2),
        row_positions_(rows_) {
    Params& p = p_;
    p.outer = c.outer;
    p.classes = c.classes;
    p.inner = c.inner;
    if (c.shape == Shape::kChannelsLast) {
      p.outer_stride = c.classes * c.inner;
      p.class_stride = 1;
      p.inner_stride = c.classes;
    } else if (c.shape == Shape::kClassesFirst) {
      p.outer_stride = c.inner;
      p.class_stride = c.outer * c.inner;
      p.inner_stride = 1;
    } else {
      const std::int64_t step = c.shape == Shape::kSpread ? 2 : 1;
      p.outer_stride = pitch_ * c.inner * step;
      p.class_stride = c.inner * step;
      p.inner_stride = step;
    }
    std::mt19937_64 random(static_cast<std::uint64_t>(c.classes * 31 + c.inner));
    std::normal_distribution<double> normal(0, 2);
    for (std::int64_t i = 0; i < size_; ++i) {
      x_[i] = from_double<T>(c.special == Special::kTies ? kHuge : normal(random));
      grad_[i] = from_double<T>(normal(random));
    }
    for (std::int64_t i = 0; i < c.outer * c.classes * c.inner; ++i) mask_[i] = random() % 4 != 0;
    for (std::int64_t r = 0; r < rows_; ++r)
      tau_[r] = static_cast<Scalar>(0.3 + 0.1 * static_cast<double>(r % 11));
    if (c.bad_tau) {
      const double bad[] = {0, -1, kNaN, kInfinity, -0.0};
      for (std::int64_t r = 0; r < rows_; r += 2) tau_[r] = static_cast<Scalar>(bad[r / 2 % 5]);
    }
    if (c.special == Special::kEdges) make_edges();
    p.logits = x_.data();
    if (c.mask) {
      p.mask = mask_.data();
      p.mask_outer_stride = c.classes * c.inner;
      p.mask_class_stride = c.inner;
      p.mask_inner_stride = 1;
    }
    if (c.tau_rows) p.tau = tau_.data();
    p.exponent_scale = 1.4426950408889634074 / c.tau;
    p.inverse_tau = 1 / c.tau;
    p.exponent_scale_float32 = static_cast<float>(p.exponent_scale);
    p.inverse_tau_float32 = static_cast<float>(p.inverse_tau);
    set_positions();
    p.random.seed = kSeed;
    p.random.offset = kOffset;
    if (c.in_memory) {
      state_[0] = static_cast<std::int64_t>(kSeed);
      state_[1] = static_cast<std::int64_t>(4 * (kOffset - 1));
      p.random = {true, true, 0, 0, state_.data(), state_.data() + 1, 4};
    }
    p.used_state = used_.data();
  }

  // Noise is compared exactly up to the rounding of a sum: classes that close may change places.
  void check_topk(std::string* why) {
    if (!regimes.empty() && regimes.find("topk") == std::string::npos) return;
    reference();
    p_.k = c_.k;
    p_.index = index_.data();
    p_.used_state = nullptr;
    const cuda::TopKPlan plan = cuda::make_topk_plan(Type<T>::value, p_, c_.device);
    Buffer<char> scores(plan.bytes);
    p_.partials = scores.data();
    launch_topk_of<T>(p_, plan, nullptr);
    const auto fail = [&](std::int64_t r, std::int64_t j, const char* what, std::int64_t got) {
      char text[200];
      std::snprintf(text, sizeof text, "row %lld place %lld: %s, got %lld", (long long)r,
                    (long long)j, what, (long long)got);
      *why = text;
    };
    for (std::int64_t r = 0; r < rows_; ++r) {
      std::vector<std::int64_t> order;
      for (std::int64_t k = 0; k < c_.classes; ++k) {
        if (z_[flat(r, k)] != -kInfinity) order.push_back(k);
      }
      std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
        const double x = z_[flat(r, a)], y = z_[flat(r, b)];
        return x > y || (x != x && y == y);
      });
      if (plan.sorts) {
        const Scalar* of_row = reinterpret_cast<const Scalar*>(scores.data()) + r * c_.classes;
        for (std::int64_t k = 0; k < c_.classes; ++k) {
          const double z = z_[flat(r, k)], got = of_row[k];
          const double size = std::isfinite(z) ? std::fabs(z) + 4 : 0;
          if (got != z && !close(got, z, 8 * size * 0x1p-23)) return fail(r, k, "score", k);
        }
        continue;
      }
      std::vector<bool> seen(static_cast<std::size_t>(c_.classes));
      for (std::int64_t j = 0; j < c_.k; ++j) {
        const std::int64_t got = index_[r * c_.k + j];
        if (j >= static_cast<std::int64_t>(order.size())) {
          if (got != -1) return fail(r, j, "a class where none is left", got);
          continue;
        }
        const std::int64_t want = order[static_cast<std::size_t>(j)];
        if (got < 0 || got >= c_.classes) return fail(r, j, "no class", got);
        if (seen[static_cast<std::size_t>(got)]) return fail(r, j, "a class twice", got);
        seen[static_cast<std::size_t>(got)] = true;
        const double best = z_[flat(r, want)], z = z_[flat(r, got)];
        const bool near_tie = c_.special != Special::kTies &&
                              std::fabs(z - best) <= 4 * 0x1p-23 * std::max(1.0, std::fabs(best));
        if (got != want && !near_tie) return fail(r, j, "not the next", got);
      }
    }
  }

  void check(std::string* why) {
    if (c_.k > 0) return check_topk(why);
    if (!regimes.empty() && regimes.find(name_of(planned().regime)) == std::string::npos) return;
    reference();
    const bool backward = c_.op == Op::kBackward || c_.op == Op::kBackwardRecompute;
    if (backward) {
      for (std::int64_t r = 0; r < rows_; ++r) index_[r] = want_index_[static_cast<std::size_t>(r)];
      if (c_.bad_index) index_[rows_ - 1] = c_.classes + 1000;
      p_.index = index_.data();
      p_.grad = grad_.data();
      p_.grad_logits = out_.data();
      p_.used_state = nullptr;
      if (c_.grad_tau) p_.grad_tau = grad_tau_.data();
      if (c_.op == Op::kBackward) {
        p_.logits = nullptr;
        p_.mask = nullptr;
        for (std::int64_t r = 0; r < rows_; ++r) {
          for (std::int64_t k = 0; k < c_.classes; ++k) {
            y_[at(r, k)] = from_double<T>(want_y_[flat(r, k)]);
          }
        }
        p_.y = y_.data();
      }
    } else {
      p_.index = index_.data();
      if (c_.op != Op::kIndexOnly) p_.y = y_.data();
    }
    const Plan plan = planned();
    Buffer<char> partials(cuda::partial_bytes(plan, p_));
    p_.partials = partials.data();
    launch_of<T>(c_.op, p_, plan, nullptr);
    if (backward) {
      check_gradient(why);
    } else {
      check_forward(why);
    }
  }

  Plan planned() const {
    return c_.plan.team != 0 ? c_.plan : cuda::make_plan(c_.op, Type<T>::value, p_, c_.device);
  }

 private:
  void set_positions() {
    Case c = c_;
    // A backward from y is not told.
    if (c.op == Op::kBackward) c.places = Places::kRowMajor;
    const std::int64_t size[] = {c.outer, c.classes, c.inner};
    if (c.places == Places::kNone) return cuda::set_no_noise(p_);
    cuda::PositionGrid unused;
    cuda::set_positions(p_, c.first_position(), 3, size, c.position_strides().data(), 1, &unused);
    if (c.places != Places::kTable) return;
    for (std::int64_t r = 0; r < rows_; ++r) {
      row_positions_[r] = static_cast<std::int64_t>(c.position(r, 0));
    }
    p_.row_positions = row_positions_.data();
  }
  int shift_of(Case::Shifted operand) const {
    return c_.shifted == Case::Shifted::kAll || c_.shifted == operand ? c_.shift : 0;
  }
  std::int64_t at(std::int64_t row, std::int64_t k) const {
    return row / c_.inner * p_.outer_stride + row % c_.inner * p_.inner_stride +
           k * p_.class_stride;
  }
  std::size_t flat(std::int64_t row, std::int64_t k) const {
    return static_cast<std::size_t>(row * c_.classes + k);
  }
  bool allowed(std::int64_t row, std::int64_t k) {
    return !c_.mask || mask_[(row / c_.inner * c_.classes + k) * c_.inner + row % c_.inner] != 0;
  }
  double row_tau(std::int64_t row) { return c_.tau_rows ? tau_[row] : c_.tau; }

  // Rows that go another way: NaN, nothing but -inf, +inf, and for masks nothing allowed.
  void make_edges() {
    const std::int64_t middle = c_.classes / 2, last = c_.classes - 1;
    for (std::int64_t r = 0; r < rows_; ++r) {
      switch (r % 8) {
        case 1:
          x_[at(r, middle)] = from_double<T>(kNaN);
          x_[at(r, last)] = from_double<T>(kNaN);
          break;
        case 2:
          for (std::int64_t k = 0; k < c_.classes; ++k) x_[at(r, k)] = from_double<T>(-kInfinity);
          break;
        case 3:
          x_[at(r, last)] = from_double<T>(kInfinity);
          break;
        case 4:
          for (std::int64_t k = 0; k < c_.classes; ++k) {
            mask_[(r / c_.inner * c_.classes + k) * c_.inner + r % c_.inner] = 0;
          }
          break;
        case 5:
          for (std::int64_t k = 0; k < last; ++k) x_[at(r, k)] = from_double<T>(-kInfinity);
          mask_[(r / c_.inner * c_.classes + last) * c_.inner + r % c_.inner] = 1;
          break;
        default:
          break;
      }
    }
  }

  void reference() {
    want_y_.assign(static_cast<std::size_t>(rows_ * c_.classes), 0);
    want_log_ = want_y_;
    want_index_.assign(static_cast<std::size_t>(rows_), 0);
    z_.assign(static_cast<std::size_t>(rows_ * c_.classes), 0);
    condition_.assign(static_cast<std::size_t>(rows_), 1);
    for (std::int64_t r = 0; r < rows_; ++r) {
      double best = -kInfinity, largest = 0;
      std::int64_t index = -1, first_allowed = -1, nan = -1;
      for (std::int64_t k = 0; k < c_.classes; ++k) {
        const double g = c_.places == Places::kNone ? 0 : noise_of(c_.position(r, k)),
                     l = to_double(x_[at(r, k)]);
        // The tie case is about rounding; the others about exact values.
        double z = c_.special == Special::kTies
                       ? static_cast<double>(static_cast<Scalar>(l) + static_cast<Scalar>(g))
                       : l + g;
        if (!allowed(r, k)) z = -kInfinity;
        z_[flat(r, k)] = z;
        if (allowed(r, k) && first_allowed < 0) first_allowed = k;
        if (z != z && nan < 0) nan = k;
        if (z > best) {
          best = z;
          index = k;
        }
        if (std::isfinite(z)) largest = std::max(largest, std::fabs(l) + std::fabs(g));
      }
      const double tau = row_tau(r);
      condition_[static_cast<std::size_t>(r)] = tau > 0 ? 1 + largest / tau : 1;
      bool is_nan = nan >= 0 || best == kInfinity || !(tau > 0 && tau < kInfinity);
      if (nan >= 0) {
        index = nan;
      } else if (index < 0 && first_allowed >= 0) {
        index = first_allowed;
        is_nan = true;
      }
      want_index_[static_cast<std::size_t>(r)] = index;
      double sum = 0;
      for (std::int64_t k = 0; k < c_.classes; ++k) {
        const double e = std::exp((z_[flat(r, k)] - best) / row_tau(r));
        want_y_[flat(r, k)] = e;
        sum += e;
      }
      for (std::int64_t k = 0; k < c_.classes; ++k) {
        double &y = want_y_[flat(r, k)], &log_y = want_log_[flat(r, k)];
        y = index < 0 ? 0 : is_nan ? kNaN : y / sum;
        log_y = (z_[flat(r, k)] - best) / row_tau(r) - std::log(sum);
        if (index < 0 || is_nan) log_y = index < 0 ? -kInfinity : kNaN;
      }
    }
  }

  static bool close(double got, double want, double tolerance) {
    if (want != want) return got != got;
    if (std::isinf(want)) return got == want;
    return std::fabs(got - want) <= tolerance;
  }

  void check_forward(std::string* why) {
    char text[200];
    if (used_[0] != static_cast<std::int64_t>(kSeed) ||
        used_[1] != static_cast<std::int64_t>(kOffset)) {
      *why = "used_state is not (seed, offset)";
      return;
    }
    for (std::int64_t r = 0; r < rows_; ++r) {
      const std::int64_t index = index_[r], want = want_index_[static_cast<std::size_t>(r)];
      bool near_tie = false;
      if (index != want && index >= 0 && index < c_.classes && want >= 0) {
        const double best = z_[flat(r, want)];
        near_tie = std::fabs(z_[flat(r, index)] - best) <= 4 * 0x1p-23 * std::fabs(best);
        if (c_.special == Special::kTies) near_tie = false;
      }
      if (c_.op != Op::kLogSoft && index != want && !near_tie) {
        std::snprintf(text, sizeof text, "row %lld: index %lld, want %lld", (long long)r,
                      (long long)index, (long long)want);
        *why = text;
        return;
      }
      if (c_.op == Op::kIndexOnly) continue;
      const double k_eps =
          condition_[static_cast<std::size_t>(r)] * (std::is_same_v<T, double> ? 0x1p-52 : 0x1p-23);
      for (std::int64_t k = 0; k < c_.classes; ++k) {
        const double got = to_double(y_[at(r, k)]);
        double wanted = want_y_[flat(r, k)];
        double tolerance = wanted * (8 * k_eps + Type<T>::epsilon) + Type<T>::smallest;
        if (c_.op == Op::kHard) {
          // +inf is a winner like any other; a soft row of it is NaN.
          const bool no_winner = want < 0 || !(z_[flat(r, want)] > -kInfinity);
          wanted = want < 0 ? 0 : no_winner ? kNaN : (k == index ? 1 : 0);
          tolerance = 0;
        } else if (c_.op == Op::kLogSoft) {
          wanted = want_log_[flat(r, k)];
          tolerance = 16 * k_eps * (1 + 1 / row_tau(r)) + 2 * Type<T>::epsilon * std::fabs(wanted);
        }
        if (!close(got, wanted, tolerance)) {
          std::snprintf(text, sizeof text, "row %lld class %lld: y = %.9g, want %.9g", (long long)r,
                        (long long)k, got, wanted);
          *why = text;
          return;
        }
      }
    }
  }

  void check_gradient(std::string* why) {
    char text[200];
    for (std::int64_t r = 0; r < rows_; ++r) {
      const bool no_class = c_.bad_index && r == rows_ - 1;
      const std::int64_t index = no_class ? c_.classes : want_index_[static_cast<std::size_t>(r)];
      const double k_eps =
          condition_[static_cast<std::size_t>(r)] * (std::is_same_v<T, double> ? 0x1p-52 : 0x1p-23);
      const double tau = row_tau(r);
      const double shift = index < 0 ? 0 : no_class ? kNaN : to_double(grad_[at(r, index)]);
      const auto y_at = [&](std::int64_t k) {
        return c_.op == Op::kBackward ? to_double(y_[at(r, k)]) : want_y_[flat(r, k)];
      };
      double dot = 0, scale = 0, widest = 0, dtau = 0, dtau_scale = 0, subnormal_scale = 0;
      for (std::int64_t k = 0; k < c_.classes; ++k) {
        dot += (to_double(grad_[at(r, k)]) - shift) * y_at(k);
      }
      std::vector<double> want(static_cast<std::size_t>(c_.classes));
      for (std::int64_t k = 0; k < c_.classes; ++k) {
        const double y = y_at(k), h = to_double(grad_[at(r, k)]) - shift;
        const double bad = tau > 0 && tau < kInfinity ? 0 : kNaN;
        const double dl = index < 0 ? 0 : y * (h - dot) / tau + bad;
        want[static_cast<std::size_t>(k)] = dl;
        if (dl == dl) {
          scale = std::max(scale, y * (std::fabs(h) + std::fabs(dot)) / tau);
          widest = std::max(widest, std::fabs(h) + std::fabs(dot));
        }
        const double log_y = y > 0 ? std::log(y) : 0;
        dtau -= log_y * dl;
        if (index >= 0) dtau_scale += std::fabs(log_y * y) * (std::fabs(h) + std::fabs(dot)) / tau;
        if (index >= 0)
          subnormal_scale += (std::fabs(log_y) + 1) * (std::fabs(h) + std::fabs(dot)) / tau;
        if (dl != dl) dtau = kNaN;
      }
      for (std::int64_t k = 0; k < c_.classes; ++k) {
        const double got = to_double(out_[at(r, k)]), wanted = want[static_cast<std::size_t>(k)];
        // A y below the smallest normal number may be anything down to 0.
        const double tiny = std::is_same_v<T, double> ? 0x1p-1022 : 0x1p-126;
        const double lost = tau > 0 ? tiny * widest / tau : 0;
        if (!close(got, wanted,
                   scale * (4 * Type<T>::epsilon + 16 * k_eps) + Type<T>::smallest + lost)) {
          std::snprintf(text, sizeof text, "row %lld class %lld: gradient %.9g, want %.9g",
                        (long long)r, (long long)k, got, wanted);
          *why = text;
          return;
        }
      }
      if (c_.grad_tau) {
        const double got = static_cast<double>(grad_tau_[r]);
        // Regimes that do not hold a row round y to 16 bits on the way; below the smallest normal
        // float16 that is an absolute error of up to 2^-25.
        const bool rounds = c_.op == Op::kBackwardRecompute && sizeof(T) == 2;
        const double tolerance =
            dtau_scale * (4 * (rounds ? Type<T>::epsilon : 0) + 32 * k_eps) +
            (rounds && std::is_same_v<T, Half> ? subnormal_scale * 0x1p-25 : 0);
        if (!close(got, index < 0 ? 0 : dtau, tolerance + 1e-37)) {
          std::snprintf(text, sizeof text, "row %lld: grad_tau %.9g, want %.9g (scale %.3g)",
                        (long long)r, got, dtau, dtau_scale);
          *why = text;
          return;
        }
      }
    }
  }

  const Case c_;
  const std::int64_t rows_, pitch_, size_;
  Buffer<T> x_, y_, grad_, out_;
  Buffer<std::uint8_t> mask_;
  Buffer<std::int64_t> index_;
  Buffer<Scalar> tau_, grad_tau_;
  Buffer<std::int64_t> used_, state_, row_positions_;
  Params p_{};
  std::vector<double> want_y_, want_log_, z_, condition_;
  std::vector<std::int64_t> want_index_;
};

template <class T>
void run_case(const Case& c) {
  char name[200];
  constexpr const char* kPlaceNames[] = {"",         " shifted",  " cut",   " part",
                                         " swapped", " repeated", " table", " no noise"};
  std::snprintf(name, sizeof name, "%s %s [%lld, %lld, %lld]%s%s%s%s%s%s%s team %d cluster %d",
                Type<T>::name, name_of(c.op), (long long)c.outer, (long long)c.classes,
                (long long)c.inner,
                c.shape == Shape::kChannelsLast   ? " channels-last"
                : c.shape == Shape::kPitched      ? " pitched"
                : c.shape == Shape::kSpread       ? " spread"
                : c.shape == Shape::kClassesFirst ? " classes first"
                                                  : "",
                c.shift ? " misaligned" : "",
                c.bad_index ? " bad index"
                : c.mask    ? " mask"
                            : "",
                c.bad_tau    ? " bad tau"
                : c.tau_rows ? " tau"
                             : "",
                c.grad_tau ? " grad_tau" : "",
                c.special == Special::kEdges  ? " edges"
                : c.special == Special::kTies ? " ties"
                                              : "",
                kPlaceNames[static_cast<int>(c.places)], c.plan.team, c.plan.cluster);
  std::string full = (c.k > 0 ? "topk " + std::to_string(c.k) + " " : std::string()) +
                     std::string(name) +
                     (c.plan.team ? std::string(" ") + name_of(c.plan.regime) : "");
  if (!only.empty() && full.find(only) == std::string::npos) return;
  std::string why;
  try {
    Run<T>(c).check(&why);
  } catch (const std::exception& error) {
    why = error.what();
  }
  report(full, why);
}

constexpr Op kOps[] = {Op::kSoft,      Op::kLogSoft,  Op::kHard,
                       Op::kIndexOnly, Op::kBackward, Op::kBackwardRecompute};

// One shape in all ops and, in turn, with everything that a call can ask for.
template <class T>
void run_shape(const Case& base) {
  int variant = 0;
  for (const Op op : kOps) {
    Case c = base;
    c.op = op;
    c.grad_tau = op == Op::kBackward || op == Op::kBackwardRecompute;
    run_case<T>(c);
    c.mask = true;
    c.tau_rows = true;
    c.shift = 1 + variant % 3;
    c.in_memory = variant % 2 == 0;
    run_case<T>(c);
    c.special = Special::kEdges;
    run_case<T>(c);
    c.bad_index = c.grad_tau;
    if (c.bad_index) run_case<T>(c);
    c.bad_index = false;
    c.special = Special::kNone;
    c.bad_tau = true;
    if (op == Op::kSoft || op == Op::kLogSoft || c.grad_tau) run_case<T>(c);
    c.special = Special::kEdges;
    c.mask = c.tau_rows = c.bad_tau = c.in_memory = false;
    c.shift = 0;
    run_case<T>(c);
    ++variant;
  }
}

// The CPU's kernels for an instruction set that has fma; null on a machine without.
const cpu::KernelTable* cpu_kernels() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &cpu::kAvx2Kernels
                                                                         : nullptr;
#else
  return &cpu::kBaselineKernels;
#endif
}

// float64 noise comes of both words of a position and must be the CPU's to the bit: so are the
// words. float32 noise has the hardware's logarithms, off by at most 2^-22 of a value each, or
// of 1.
template <class T>
std::string compare_noise(Buffer<T>& ours, Buffer<T>& theirs, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const double a = to_double(ours[i]), b = to_double(theirs[i]);
    const double tolerance = std::is_same_v<T, double>
                                 ? 0
                                 : 4 * 0x1p-22 * std::max(1.0, std::fabs(b)) +
                                       (sizeof(T) == 2 ? Type<T>::epsilon * std::fabs(b) : 0);
    if (!(std::fabs(a - b) <= tolerance)) {
      char text[100];
      std::snprintf(text, sizeof text, "element %lld: %.17g, on the CPU %.17g", (long long)i, a, b);
      return text;
    }
  }
  return "";
}

template <class T>
void check_noise() {
  if (cpu_kernels() == nullptr) return;
  // A seed with words near both ends of their range, where the second word counts.
  constexpr std::int64_t kCount = 40'003;
  constexpr std::uint64_t kTailSeed = 391;
  std::uint32_t least = ~0u, most = 0;
  for (std::int64_t n = 0; n < kCount; ++n) {
    least = std::min(least, philox_word(kTailSeed, 0, static_cast<std::uint64_t>(n)));
    most = std::max(most, philox_word(kTailSeed, 0, static_cast<std::uint64_t>(n)));
  }
  std::string why = least < 1u << 12 && most > ~(1u << 12) ? "" : "the seed reaches no tail";
  Buffer<T> ours(kCount), theirs(kCount);
  cuda::RandomSource random{};
  random.seed = kTailSeed;
  try {
    launch_noise_of<T>(random, cuda::PositionGrid{}, kCount, ours.data(), nullptr);
    cpu_kernels()->noise(Type<T>::cpu_value, kTailSeed, 0, 0, kCount, theirs.data());
    if (why.empty()) why = compare_noise(ours, theirs, kCount);
  } catch (const std::exception& error) {
    why = error.what();
  }
  report(std::string(Type<T>::name) + " noise against the CPU's", why);
}

// Sizes of a tensor, the base of its positions and their strides; the dimension of the classes.
struct PlacedShape {
  std::uint64_t base;
  std::vector<std::int64_t> size, stride;
  int dim;
  bool table;  // whether rows need one

  std::int64_t count() const {
    std::int64_t n = 1;
    for (const std::int64_t s : size) n *= s;
    return n;
  }
  // Of element n, counted row-major.
  std::uint64_t position(std::int64_t n) const {
    std::uint64_t at = base;
    for (std::size_t d = size.size(); d-- > 0; n /= size[d]) {
      at += static_cast<std::uint64_t>(n % size[d] * stride[d]);
    }
    return at;
  }
};
const std::vector<PlacedShape> kPlacedShapes = {
    {0, {}, {}, 0, false},
    {7, {}, {}, 0, false},
    {0, {5}, {1}, 0, false},
    {0xFFFFFFFFFu, {1027}, {1}, 0, false},
    {(std::uint64_t{1} << 62) - 1, {1030}, {-1}, 0, false},
    {3, {6}, {0}, 0, false},
    {2, {4, 3, 5}, {15, 5, 1}, 1, false},
    // Classes cut: first, middle, last dimension.
    {21, {2, 4, 5}, {20, 5, 1}, 0, false},
    {21, {3, 2, 5}, {20, 5, 1}, 1, false},
    {21, {3, 4, 2}, {20, 5, 1}, 2, false},
    // Rows cut.
    {21, {3, 2, 5}, {20, 5, 1}, 0, false},
    {21, {3, 2, 5}, {20, 5, 1}, 2, true},
    {21, {3, 2, 1, 5}, {20, 5, 5, 1}, 3, true},
    {9, {2, 4, 3, 5}, {120, 24, 6, 1}, 1, true},
    {9, {2, 3, 4, 2, 3, 5}, {3600, 900, 200, 40, 8, 1}, 2, true},
    {9, {2, 3, 4, 6, 5}, {360, 120, 30, 5, 1}, 2, false},
    {9, {2, 1, 4, 1, 5}, {120, 77, 24, 99, 1}, 2, false},
    {9, {2, 3, 1}, {0, 1, 55}, 2, true},
    {9, {3, 1, 4}, {4, 99, 1}, 1, false},
    {40, {3, 4}, {-4, -1}, 1, false},
};

// Noise of parts of larger tensors.
template <class T>
void check_noise_of_parts() {
  if (cpu_kernels() == nullptr) return;
  for (std::size_t number = 0; number < kPlacedShapes.size(); ++number) {
    const PlacedShape& shape = kPlacedShapes[number];
    const std::int64_t count = shape.count();
    Buffer<T> ours(count), theirs(count);
    cuda::RandomSource random{};
    random.seed = kSeed;
    random.offset = kOffset;
    std::string why;
    try {
      launch_noise_of<T>(random,
                         cuda::merged_positions(shape.base, static_cast<int>(shape.size.size()),
                                                shape.size.data(), shape.stride.data()),
                         count, ours.data(), nullptr);
      for (std::int64_t n = 0; n < count; ++n) {
        cpu_kernels()->noise(Type<T>::cpu_value, kSeed, kOffset, shape.position(n), 1, &theirs[n]);
      }
      why = compare_noise(ours, theirs, count);
      if (why.empty()) {
        // The same positions, told one by one.
        Buffer<std::int64_t> table(count);
        for (std::int64_t n = 0; n < count; ++n) {
          table[n] = static_cast<std::int64_t>(shape.position(n));
        }
        cuda::PositionGrid told{};
        told.table = table.data();
        Buffer<T> of_table(count);
        launch_noise_of<T>(random, told, count, of_table.data(), nullptr);
        why = compare_noise(of_table, theirs, count);
      }
    } catch (const std::exception& error) {
      why = error.what();
    }
    report(std::string(Type<T>::name) + " noise of part " + std::to_string(number), why);
  }
}

// What the kernels are told about the positions of rows, by strides or by a table.
void check_positions_of_rows() {
  for (std::size_t number = 0; number < kPlacedShapes.size(); ++number) {
    const PlacedShape& shape = kPlacedShapes[number];
    const int dims = static_cast<int>(shape.size.size());
    Params p{};
    p.outer = p.classes = p.inner = 1;
    for (int d = 0; d < dims; ++d) {
      const std::int64_t size = shape.size[static_cast<std::size_t>(d)];
      (d < shape.dim ? p.outer : d == shape.dim ? p.classes : p.inner) *= size;
    }
    const std::int64_t rows = p.outer * p.inner;
    Buffer<std::int64_t> table(rows);
    std::string why;
    try {
      cuda::PositionGrid grid;
      const bool needed = cuda::set_positions(p, shape.base, dims, shape.size.data(),
                                              shape.stride.data(), shape.dim, &grid);
      if (needed != shape.table) why = needed ? "needs a table" : "needs no table";
      if (needed) cuda::launch_positions(grid, rows, table.data(), nullptr);
      for (std::int64_t r = 0; r < rows && why.empty(); ++r) {
        const std::int64_t o = r / p.inner, i = r % p.inner;
        const std::int64_t of_row = needed ? table[r]
                                           : static_cast<std::int64_t>(p.first_position) +
                                                 o * p.position_outer_stride +
                                                 i * p.position_inner_stride;
        for (std::int64_t k = 0; k < p.classes; ++k) {
          const std::uint64_t want = shape.position((o * p.classes + k) * p.inner + i);
          if (static_cast<std::uint64_t>(of_row + k * p.position_class_stride) != want) {
            why = "row " + std::to_string(r) + " class " + std::to_string(k);
          }
        }
      }
    } catch (const std::exception& error) {
      why = error.what();
    }
    report("positions of rows of part " + std::to_string(number), why);
  }
}

// The three ways to ask for noise agree, also where the block number outgrows 32 bits.
template <class Scalar>
void check_positions() {
  std::string why;
  const auto kernel = [&] {
    NoiseSource noise(RandomState{kSeed, kOffset});
    const std::uint64_t corner = std::uint64_t{1} << 34;
    for (const std::uint64_t start : {std::uint64_t{0}, corner, corner - 16, 3 * corner - 8}) {
      for (std::uint64_t n = start; n < start + 24; ++n) {
        const double want = noise_of(n);
        Scalar one = 0, four[4] = {}, of_blocks[8] = {};
        noise.add_one(n, one);
        noise.add_four(n, four);
        noise.add_blocks(n / 8 * 2, of_blocks);
        for (const Scalar got : {one, four[0], of_blocks[n % 8]}) {
          if (got != one || std::fabs(got - want) > 0x1p-19 * std::max(1.0, std::fabs(want))) {
            why = "position " + std::to_string(n) + " differs";
          }
        }
        noise.add_one(n + 3, one = 0);
        if (four[3] != one) why = "the last of four from " + std::to_string(n) + " differs";
      }
    }
  };
  try {
    emulation::launch(dim3(1), 1, 1, kernel);
  } catch (const std::exception& error) {
    why = error.what();
  }
  report("noise by position", why);
}

// One operand at a time off its boundary.
template <class T>
void run_shifted(Case c) {
  using Shifted = Case::Shifted;
  c.shift = 1;
  for (const Op op : kOps) {
    for (const Shifted shifted :
         {Shifted::kLogits, Shifted::kY, Shifted::kGrad, Shifted::kGradLogits}) {
      c.op = op;
      c.shifted = shifted;
      run_case<T>(c);
    }
  }
}

// Every regime with noise positions of every kind.
template <class T>
void run_places(bool quick) {
  std::vector<Case> bases;
  const auto add = [&](std::int64_t outer, std::int64_t classes, std::int64_t inner) -> Case& {
    Case c;
    c.outer = outer;
    c.classes = classes;
    c.inner = inner;
    bases.push_back(c);
    return bases.back();
  };
  // The most classes that a team holds if rows begin with a group; of those that do not, one less
  // is too many.
  for (const std::int64_t classes :
       quick ? std::vector<std::int64_t>{4, 8, 33, 128, 768}
             : std::vector<std::int64_t>{1, 4, 5, 8, 16, 32, 33, 64, 128, 256, 512, 768, 3072}) {
    add(9, classes, 1).device.multiprocessors = 4;
  }
  for (const std::int64_t classes : {4, 8, 9}) add(3, classes, 5).shape = Shape::kChannelsLast;
  add(5, 1, 7);
  add(5, 3007, 1).plan = Plan{Regime::kClusters, 256, cuda::held_groups(sizeof(T)), 2, 1, 0};
  constexpr int kGroup = Element<T>::kGroup;
  add(3, 700, 1).plan = Plan{Regime::kStream, 256, 0, 1, 1, (700 + 2 * kGroup) / kGroup * kGroup};
  const std::int64_t chunk = 256 * kGroup;
  // One class more in the last chunk, unless rows begin inside a group.
  add(3, 2 * chunk + 1, 1).plan = Plan{Regime::kSplit, 256, 0, 1, 3, chunk};
  for (const std::int64_t inner : {3, 5, 7, 8, 18}) add(4, 9, inner);
  add(3, 70, 6);
  add(1, 600, 8);
  int turn = 0;
  for (Case c : bases) {
    for (const Places places : kPlaces) {
      for (const Op op : {Op::kSoft, Op::kHard, Op::kIndexOnly, Op::kBackwardRecompute}) {
        if (c.plan.regime == Regime::kClusters || c.plan.regime == Regime::kStream) {
          if (op == Op::kHard || op == Op::kIndexOnly) continue;
        }
        // A backward that makes no noise reads y.
        if (op == Op::kBackwardRecompute && places == Places::kNone) continue;
        c.op = op;
        c.places = places;
        c.grad_tau = op == Op::kBackwardRecompute;
        c.mask = c.tau_rows = turn % 3 == 1;
        c.special = turn % 4 == 3 ? Special::kEdges : Special::kNone;
        c.shift = turn % 5 == 2 ? 3 : 0;
        ++turn;
        run_case<T>(c);
        const bool held =
            c.inner == 1 && c.plan.regime != Regime::kStream && c.plan.regime != Regime::kSplit;
        if (op != Op::kBackwardRecompute || !held) continue;
        // So cold that a largest score with another's noise would overflow.
        c.tau_rows = c.grad_tau = false;
        c.tau = 0.004;
        run_case<T>(c);
        c.tau = Case().tau;
      }
    }
  }
}

template <class T>
void run_type(bool quick) {
  if (only.empty()) {
    check_noise<T>();
    check_noise_of_parts<T>();
    check_positions_of_rows();
    check_positions<typename Element<T>::Scalar>();
  }
  // Teams of lanes and blocks, by the plan's own choice; odd widths begin rows anywhere in a group.
  for (const std::int64_t classes :
       quick ? std::vector<std::int64_t>{1, 2, 5, 8, 17, 33, 129, 257, 500, 769}
             : std::vector<std::int64_t>{1,   2,   3,   4,   5,   7,   8,   9,   10,  15,
                                         16,  17,  31,  32,  33,  64,  65,  100, 127, 128,
                                         129, 255, 256, 257, 500, 767, 768, 769}) {
    Case c;
    c.outer = classes <= 32 ? 37 : 9;
    c.classes = classes;
    run_shape<T>(c);
  }
  run_places<T>(quick);
  // So few multiprocessors that short rows come several to a thread.
  for (const std::int64_t classes : {3, 8, 33}) {
    Case c;
    c.outer = 1999;
    c.classes = classes;
    c.device.multiprocessors = 1;
    for (const Op op : kOps) {
      c.op = op;
      run_case<T>(c);
    }
  }
  for (const std::int64_t classes :
       quick ? std::vector<std::int64_t>{1025}
             : std::vector<std::int64_t>{1023, 1025, 3071, 3073, 6145, 9215}) {
    Case c;
    c.outer = 8;
    c.classes = classes;
    c.device.multiprocessors = 4;
    run_shape<T>(c);
  }
  for (const std::int64_t classes : {5, 33, 1025}) {
    Case c;
    c.outer = 9;
    c.classes = classes;
    run_shifted<T>(c);
    c.shape = Shape::kPitched;
    run_shape<T>(c);
  }
  // Clusters of 2 and 4 blocks, with a row that leaves some of their threads idle.
  for (const int cluster : {2, 4}) {
    Case c;
    c.outer = 5;
    c.classes = cluster * 1500 + 7;
    c.plan = Plan{Regime::kClusters,
                  cluster == 2 || sizeof(T) == 8 ? 256 : 480,
                  cuda::held_groups(sizeof(T)),
                  cluster,
                  1,
                  0};
    for (const Op op : {Op::kSoft, Op::kLogSoft, Op::kBackward, Op::kBackwardRecompute}) {
      c.op = op;
      c.grad_tau = op == Op::kBackward || op == Op::kBackwardRecompute;
      c.special = Special::kNone;
      run_case<T>(c);
      c.special = Special::kEdges;
      c.mask = true;
      run_case<T>(c);
      c.mask = false;
    }
  }
  for (const std::int64_t classes : {3, 700, 4097}) {
    Case c;
    c.outer = 8;
    c.classes = classes;
    constexpr int kGroup = Element<T>::kGroup;
    const std::int64_t whole = (classes + 2 * kGroup) / kGroup * kGroup;
    c.plan = Plan{Regime::kStream, 256, 0, 1, 1, whole};
    for (const Op op : {Op::kSoft, Op::kLogSoft, Op::kBackward, Op::kBackwardRecompute}) {
      c.op = op;
      c.grad_tau = op == Op::kBackward || op == Op::kBackwardRecompute;
      c.special = Special::kNone;
      run_case<T>(c);
      c.special = Special::kEdges;
      c.mask = c.tau_rows = true;
      run_case<T>(c);
      c.bad_tau = true;
      run_case<T>(c);
      c.mask = c.tau_rows = c.bad_tau = false;
    }
    const std::int64_t chunk = 256 * kGroup;
    c.plan = Plan{Regime::kSplit, 256, 0, 1, (classes + kGroup - 1 + chunk - 1) / chunk, chunk};
    run_shape<T>(c);
  }
  // Few long rows, by the plan's own choice: on many multiprocessors shared among blocks, on few
  // not.
  for (const int multiprocessors : {2, 132}) {
    Case c;
    c.outer = 3;
    c.classes = 16'411;
    c.device = {multiprocessors, false};
    for (const Op op : kOps) {
      if (quick) continue;
      c.op = op;
      c.grad_tau = op == Op::kBackward || op == Op::kBackwardRecompute;
      run_case<T>(c);
    }
  }
  // gumbel_topk, by each team, and by scores to be sorted. More rows than teams, so that each takes
  // several; of lengths that make their groups begin at different places.
  for (const std::int64_t classes : {1, 9, 65, 130, 515, 2101}) {
    if (quick && classes == 2101) continue;
    for (const std::int64_t k : {1, 7, 65}) {
      if (k > classes) continue;
      Case c;
      c.op = Op::kIndexOnly;
      c.device = {1, true};
      c.outer = classes > 1000 ? 5 : (classes > 100 ? 37 : 150);
      c.classes = classes;
      c.k = k;
      run_case<T>(c);
      c.special = Special::kEdges;
      c.mask = true;
      c.shift = 1;
      run_case<T>(c);
      for (const Places places : kPlaces) {
        if (k != 7 || (classes != 9 && classes != 130)) continue;
        c.places = places;
        run_case<T>(c);
      }
      c.places = Places::kRowMajor;
      c.shift = 0;
      if (std::is_same_v<T, Half>) continue;
      c.special = Special::kTies;
      run_case<T>(c);
    }
  }
  // Classes that are not adjacent: 16-byte vectors across rows where memory allows.
  for (const std::int64_t inner : quick ? std::vector<std::int64_t>{2, 4, 5, 130}
                                        : std::vector<std::int64_t>{2, 3, 4, 5, 8, 31, 32, 130}) {
    for (const std::int64_t classes : {2, 9, 70}) {
      Case c;
      c.outer = 3;
      c.classes = classes;
      c.inner = inner;
      run_shape<T>(c);
      if (classes == 9) {
        c.shape = Shape::kChannelsLast;
        run_shape<T>(c);
        c.shape = Shape::kSpread;
        run_shape<T>(c);
      }
    }
  }
  {
    Case c;
    c.outer = 1;
    c.classes = 600;
    c.inner = 8;
    run_shape<T>(c);
    run_shifted<T>(c);
    // Rows of 5 columns, of which the fifth is aligned but has no three neighbours.
    c.outer = 4;
    c.classes = 9;
    c.inner = 5;
    c.shape = Shape::kClassesFirst;
    run_shape<T>(c);
  }
  // Every score the same number: the lowest index wins, in every regime, with noise and without.
  for (const Op op : {Op::kSoft, Op::kHard, Op::kIndexOnly}) {
    Case c;
    c.op = op;
    c.special = Special::kTies;
    if (std::is_same_v<T, Half>) continue;  // has no number that large
    for (const std::int64_t classes : {2, 10, 33, 500, 3000}) {
      for (const bool mask : {false, true}) {
        c.places = mask ? Places::kRowMajor : Places::kNone;
        c.outer = 5;
        c.classes = classes;
        c.mask = mask;
        c.inner = 1;
        run_case<T>(c);
        c.inner = 4;
        run_case<T>(c);
        if (classes < 3000) continue;
        const std::int64_t chunk = 256 * Element<T>::kGroup;
        c.inner = 1;
        c.plan = Plan{Regime::kSplit, 256, 0, 1, (classes + 7 + chunk - 1) / chunk, chunk};
        run_case<T>(c);
        c.plan = Case().plan;
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) only = argv[1];
  if (const char* chosen = std::getenv("GUMBEL_EXT_REGIMES")) regimes = chosen;
  const bool quick = std::getenv("GUMBEL_EXT_QUICK") != nullptr;
  choose_order();
#if defined(GUMBEL_EXT_TYPE)
  run_type<GUMBEL_EXT_TYPE>(quick);
#else
  run_type<float>(quick);
  run_type<BFloat16>(quick);
  run_type<Half>(quick);
  run_type<double>(quick);
#endif
  return summary();
}
