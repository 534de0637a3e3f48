// The CUDA kernels of the estimators' backwards, unchanged, under emulation: every type, team,
// operand and edge against the formulas in long double on the same noise.
//
// GUMBEL_EXT_ORDER and GUMBEL_EXT_FAIL_FAST as for test_gumbel_softmax_kernels; GUMBEL_EXT_QUICK=1
// leaves out bfloat16, whose addresses are float16's, and some numbers of classes.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "../../csrc/cuda/estimators_launch.cu"
#include "kernel_test.h"

namespace {

using Real = long double;
using cuda::Estimator;

constexpr std::uint64_t kSeed = 0x1234567890ABCDEFu, kOffset = 41;
constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
constexpr Real kNan = std::numeric_limits<Real>::quiet_NaN();

const bool quick = std::getenv("GUMBEL_EXT_QUICK") != nullptr;

Real exponential_of(std::uint64_t n) {
  const std::uint32_t hi = philox_word(kSeed, kOffset, n), lo = philox_word(kSeed, kOffset + 1, n);
  return exponential_from_real_words(DeviceF64{static_cast<double>(hi)},
                                     DeviceF64{static_cast<double>(lo)})
      .v;
}

template <class T>
constexpr double kComputed = sizeof(typename Element<T>::Scalar) == 8 ? 0x1p-52 : 0x1p-23;

enum class Rule { kZgr, kReinMax, kGapped, kGappedByProbability, kGumbelRao };
constexpr const char* kNames[] = {"ZGR", "ReinMax", "gapped", "gapped by probability",
                                  "Gumbel-Rao"};

struct Case {
  Rule rule = Rule::kZgr;
  std::int64_t outer = 3, inner = 2, classes = 10, draws = 3, at_once = 0;
  int shift = 0;
  bool grad_expanded = false, logits_expanded = false;  // over outer
  bool mask = false, edges = false, tau_tensor = false, state_in_memory = false;
  double tau = 0.7, gap = 1, spread = 2;
};

// [outer, inner, classes] of E, or of one outer row.
template <class E>
class Operand {
 public:
  Operand(const Case& c, bool expanded, std::int64_t class_stride = 1)
      : stride_(class_stride),
        rows_(expanded ? c.inner : c.outer * c.inner),
        inner_(c.inner),
        classes_(c.classes),
        memory_(rows_ * c.classes * class_stride, c.shift) {}
  RowOperand of() {
    RowOperand o{};
    o.data = memory_.data();
    o.stride[0] = rows_ == inner_ ? 0 : inner_ * classes_ * stride_;
    o.stride[1] = classes_ * stride_;
    o.class_stride = stride_;
    return o;
  }
  E& at(std::int64_t row, std::int64_t c) {
    return memory_[(row % rows_ * classes_ + c) * stride_];
  }
  std::int64_t rows() const { return rows_; }

 private:
  std::int64_t stride_, rows_, inner_, classes_;
  Buffer<E> memory_;
};

// A row, as the formulas have it.
struct Row {
  std::vector<Real> l, d;
  std::size_t i;
  Real tau, gap;

  std::vector<Real> softmax(const std::vector<Real>& of, Real t) const {
    Real top = -kInfinity, total = 0;
    for (const Real at : of) top = std::max(top, at);
    std::vector<Real> y;
    for (const Real at : of) total += y.emplace_back(std::exp((at - top) / t));
    for (Real& at : y) at /= total;
    return y;
  }
  Real dot(const std::vector<Real>& y) const {
    Real sum = 0;
    for (std::size_t k = 0; k < y.size(); ++k) sum += y[k] * d[k];
    return sum;
  }
  std::vector<Real> gradient(Rule rule, std::int64_t draws, std::uint64_t position,
                             std::uint64_t step) const {
    const std::size_t n = l.size();
    const std::vector<Real> p = softmax(l, 1);
    std::vector<Real> out(n, 0);
    if (rule == Rule::kZgr) {
      for (std::size_t k = 0; k < n; ++k) out[k] = k == i ? -dot(p) / 2 : p[k] * d[k] / 2;
    } else if (rule == Rule::kReinMax) {
      // 2 J(pi) - J(p) / 2 with pi = (q + one-hot) / 2.
      std::vector<Real> pi = softmax(l, tau);
      for (std::size_t k = 0; k < n; ++k) pi[k] = (pi[k] + (k == i)) / 2;
      for (std::size_t k = 0; k < n; ++k) {
        out[k] = 2 * pi[k] * (d[k] - dot(pi)) - p[k] * (d[k] - dot(p)) / 2;
      }
    } else if (rule == Rule::kGumbelRao) {
      for (std::int64_t draw = 0; draw < draws; ++draw, position += step) {
        const Real chosen = exponential_of(position + i);
        std::vector<Real> phi(n);  // the conditional perturbed logits, Z left out
        for (std::size_t k = 0; k < n; ++k) {
          phi[k] = -std::log(k == i ? chosen : exponential_of(position + k) / p[k] + chosen);
        }
        const std::vector<Real> y = softmax(phi, tau);
        for (std::size_t k = 0; k < n; ++k) out[k] += y[k] * (d[k] - dot(y)) / tau;
      }
      for (Real& at : out) at /= static_cast<Real>(draws);
    } else {
      Real top = -kInfinity;
      for (const Real at : l) top = std::max(top, at);
      const Real near = p[i] * (1 - 1e-5L),
                 g = rule == Rule::kGapped ? gap : -std::log1p(-near) / near;
      std::vector<Real> m(n);
      for (std::size_t k = 0; k < n; ++k) m[k] = k == i ? top : std::min(l[k], top - g);
      const std::vector<Real> y = softmax(m, tau);
      for (std::size_t k = 0; k < n; ++k) out[k] = y[k] * (d[k] - dot(y)) / tau;
    }
    return out;
  }
};

template <class T>
std::string check(const Case& c) {
  using Scalar = typename Element<T>::Scalar;
  const std::int64_t rows = c.outer * c.inner, classes = c.classes;
  Operand<T> grad(c, c.grad_expanded), logits(c, c.logits_expanded);
  Operand<std::uint8_t> mask(c, true, 2);
  Buffer<T> out(rows * classes, c.shift);
  Buffer<std::int64_t> index(rows), state(2);
  Buffer<Scalar> tau(rows), sums(c.at_once > 0 ? rows * classes : 0);
  std::mt19937 random(static_cast<unsigned>(classes * 7 + rows));
  std::normal_distribution<double> normal(0, 1);
  for (std::int64_t r = 0; r < grad.rows(); ++r) {
    for (std::int64_t k = 0; k < classes; ++k) grad.at(r, k) = from_double<T>(normal(random));
  }
  for (std::int64_t r = 0; r < logits.rows(); ++r) {
    const std::int64_t kind = c.edges ? r % 8 : 0;
    for (std::int64_t k = 0; k < classes; ++k) {
      double l = c.spread * normal(random);
      if (kind == 1 && k % 2 == 1) l = -INFINITY;
      if (kind == 2) l = -INFINITY;
      if (kind == 3 && k == classes / 2) l = std::nan("");
      if (kind == 4 && k == classes / 3) l = INFINITY;
      if (kind == 5) l = k == classes / 2 ? 60 : l;  // one class has all but e^-50
      logits.at(r, k) = from_double<T>(l);
    }
  }
  for (std::int64_t r = 0; r < c.inner; ++r) {
    // Row 1 of every outer index is forbidden.
    for (std::int64_t k = 0; k < classes; ++k) mask.at(r, k) = r != 1 && (k == 0 || random() % 3);
  }
  const auto allowed = [&](std::int64_t r, std::int64_t k) {
    return !c.mask || mask.at(r % c.inner, k) != 0;
  };
  // Gradients of classes out of reach are not looked at.
  for (std::int64_t r = 0; r < rows && !c.grad_expanded; ++r) {
    for (std::int64_t k = 0; k < classes; ++k) {
      if (!allowed(r, k) || to_double(logits.at(r, k)) == -INFINITY) {
        grad.at(r, k) = from_double<T>(INFINITY);
      }
    }
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    std::int64_t i = static_cast<std::int64_t>(random() % static_cast<unsigned>(classes)),
                 tries = 0;
    while (tries < classes && !(allowed(r, i) && to_double(logits.at(r, i)) > -INFINITY)) {
      i = (i + 1) % classes;
      ++tries;
    }
    index[r] = c.mask && r % c.inner == 1 ? -1 : i;
    if (c.edges && r % 8 == 6) index[r] = classes;  // none of a forward's
    tau[r] = static_cast<Scalar>(
        c.edges && r % 8 == 7 ? -1 : c.tau * (1 + 0.1 * static_cast<double>(r % 7)));
  }
  cuda::GumbelRaoParams p{};
  p.type = Type<T>::value;
  p.rows = rows;
  p.classes = classes;
  p.dims = 2;
  p.size[0] = c.outer;
  p.size[1] = c.inner;
  if (c.tau_tensor) p.tau = tau.data();
  p.tau_value = c.tau;
  p.tau_float32 = static_cast<float>(c.tau);
  p.grad = grad.of();
  p.logits = logits.of();
  if (c.mask) p.mask = mask.of();
  p.index = index.data();
  p.grad_logits = out.data();
  p.draws = c.draws;
  p.draws_at_once = c.at_once > 0 ? c.at_once : cuda::kDrawsAtOnce;
  if (c.at_once > 0) p.sums = sums.data();
  p.random.seed = kSeed;
  p.random.offset = kOffset;
  if (c.state_in_memory) {
    state[0] = static_cast<std::int64_t>(kSeed);
    state[1] = static_cast<std::int64_t>(kOffset);
    p.random = {};
    p.random.in_memory = true;
    p.random.seed_address = state.data();
    p.random.offset_address = state.data() + 1;
  }
  if (c.rule == Rule::kGapped) {
    p.gap = c.gap;
    p.gap_float32 = static_cast<float>(c.gap);
  }
  const char* error = nullptr;
  if (c.rule == Rule::kGumbelRao) {
    error = cuda::launch_gumbel_rao(p, nullptr);
  } else {
    error = cuda::launch_estimator(c.rule == Rule::kZgr       ? Estimator::kZgr
                                   : c.rule == Rule::kReinMax ? Estimator::kReinMax
                                                              : Estimator::kGapped,
                                   p, nullptr);
  }
  if (error != nullptr) return error;

  const std::uint64_t step = static_cast<std::uint64_t>(rows * classes);
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t i = index[r];
    const Real t =
        c.tau_tensor ? static_cast<Real>(tau[r]) : static_cast<Real>(static_cast<Scalar>(c.tau));
    Row row{{}, {}, 0, t, static_cast<Real>(static_cast<Scalar>(c.gap))};
    std::vector<std::int64_t> place;
    bool bad = !(t > 0) || i >= classes;
    Real top = -kInfinity, size = 0, lowest = 0;
    for (std::int64_t k = 0; k < classes && i >= 0 && i < classes; ++k) {
      const Real l = to_double(logits.at(r, k)),
                 d = static_cast<Real>(to_double(grad.at(r, k))) - to_double(grad.at(r, i));
      if (!allowed(r, k)) continue;
      bad = bad || std::isnan(l) || l == kInfinity;
      if (l == -kInfinity) continue;
      if (k == i) row.i = row.l.size();
      row.l.push_back(l);
      row.d.push_back(d);
      place.push_back(k);
      top = std::max(top, l);
      lowest = std::min(lowest, l);
      size = std::max(size, std::fabs(d));
    }
    bad = bad || (i >= 0 && (top == -kInfinity || to_double(logits.at(r, i)) == -INFINITY));
    std::vector<Real> want(static_cast<std::size_t>(classes), i < 0 ? 0 : bad ? kNan : 0);
    if (i >= 0 && !bad) {
      // E goes with the class, so that classes out of reach keep their places.
      Row whole = row;
      if (c.rule == Rule::kGumbelRao) {
        whole.l.assign(static_cast<std::size_t>(classes), -kInfinity);
        whole.d.assign(static_cast<std::size_t>(classes), 0);
        for (std::size_t k = 0; k < place.size(); ++k) {
          whole.l[static_cast<std::size_t>(place[k])] = row.l[k];
          whole.d[static_cast<std::size_t>(place[k])] = row.d[k];
        }
        whole.i = static_cast<std::size_t>(i);
        want =
            whole.gradient(c.rule, c.draws, step + static_cast<std::uint64_t>(r * classes), step);
      } else {
        const std::vector<Real> some = row.gradient(c.rule, 0, 0, 0);
        for (std::size_t k = 0; k < place.size(); ++k) {
          want[static_cast<std::size_t>(place[k])] = some[k];
        }
      }
    }
    // Rounded logarithms and distances, over tau; and sums of as many terms.
    const Real over = c.rule == Rule::kZgr ? 1 : std::min<Real>(1, t);
    const Real noise = kComputed<T> * (8 + 4 * (top - lowest + 8) / over +
                                       std::log2(static_cast<Real>(classes + c.draws)));
    const Real room_of_row =
        noise * size / (c.rule == Rule::kGumbelRao || c.rule >= Rule::kGapped ? t : 1);
    for (std::int64_t k = 0; k < classes; ++k) {
      const Real got = to_double(out[r * classes + k]),
                 expected = want[static_cast<std::size_t>(k)];
      const Real room =
          Type<T>::epsilon * std::fabs(expected) + room_of_row + Type<T>::smallest / 64;
      const bool right =
          std::isnan(expected) ? std::isnan(got)
          : expected == 0 && (i < 0 || !allowed(r, k) || to_double(logits.at(r, k)) == -INFINITY)
              ? got == 0
              : std::fabs(got - expected) <= room;
      if (!right) {
        char text[200];
        std::snprintf(text, sizeof text,
                      "row %lld, class %lld (chosen %lld) is %.9Lg, not %.9Lg, room %.3Lg",
                      (long long)r, (long long)k, (long long)i, got, expected, room);
        return text;
      }
    }
  }
  return "";
}

template <class T>
void run(const Case& c) {
  char name[240];
  std::snprintf(
      name, sizeof name,
      "%s %s [%lld, %lld, %lld], %lld draws, shift %d%s%s%s%s%s, tau %g, gap %g, spread %g",
      kNames[static_cast<int>(c.rule)], Type<T>::name, (long long)c.outer, (long long)c.inner,
      (long long)c.classes, (long long)c.draws, c.shift, c.grad_expanded ? ", grad expanded" : "",
      c.logits_expanded ? ", logits expanded" : "", c.mask ? ", mask" : "",
      c.edges ? ", edges" : "", c.tau_tensor ? ", tau tensor" : "", c.tau, c.gap, c.spread);
  std::string why;
  try {
    why = check<T>(c);
  } catch (const emulation::Error& error) {
    why = error.what();
  }
  report(name, why);
}

template <class T>
void run_all() {
  constexpr bool wide = sizeof(typename Element<T>::Scalar) == 8;
  for (const Rule rule :
       {Rule::kZgr, Rule::kReinMax, Rule::kGapped, Rule::kGappedByProbability, Rule::kGumbelRao}) {
    const bool rao = rule == Rule::kGumbelRao;
    const auto of = [&](std::int64_t classes) {
      Case c;
      c.rule = rule;
      c.classes = classes;
      return c;
    };
    for (const std::int64_t classes : {1, 2, 3, 7, 10, 16, 32, 63, 70, 130}) {
      if (quick && (classes == 2 || classes == 16 || classes == 63 || classes == 130)) continue;
      Case c = of(classes);
      run<T>(c);
      c.mask = true;
      c.outer = 7;
      c.shift = 1;
      c.tau_tensor = rule != Rule::kZgr;
      c.state_in_memory = true;
      run<T>(c);
      c.inner = 3;
      c.grad_expanded = true;
      c.tau = 0.05;
      c.gap = 0.3;
      run<T>(c);
      c.grad_expanded = false;
      c.logits_expanded = true;
      c.shift = 0;
      c.tau = 3;
      run<T>(c);
      c.logits_expanded = false;
      c.edges = true;
      c.mask = false;
      c.outer = 8;
      c.inner = 1;
      run<T>(c);
      c.tau_tensor = false;
      c.spread = 40;
      c.tau = 20;
      c.gap = 30;
      run<T>(c);
    }
    // Larger teams, and rows that are not held.
    for (const std::int64_t classes : {wide ? 257 : 513, wide ? 1030 : 1028, wide ? 2049 : 4098}) {
      Case c = of(classes);
      c.outer = 2;
      c.inner = 1;
      c.draws = rao ? 2 : 1;
      c.at_once = rao && classes > 2000 ? 1 : 0;
      run<T>(c);
      if (classes > 2000 && !rao) {
        // Of a spread that no power of two bridges.
        c.spread = 100;
        c.tau = 50;
        run<T>(c);
        c.spread = 2;
        c.tau = 0.7;
      }
      if (quick && classes > 1000) continue;
      c.at_once = 0;
      c.edges = true;
      c.outer = 8;
      c.draws = 1;
      c.tau_tensor = rule != Rule::kZgr;
      run<T>(c);
      c.edges = false;
      c.mask = true;
      c.inner = 2;
      c.outer = 1;
      c.shift = 1;
      c.spread = 100;
      c.tau = 50;
      run<T>(c);
    }
    if (!rao) continue;
    // More draws than a team has threads.
    Case c = of(5);
    c.draws = 33;
    c.outer = 2;
    run<T>(c);
    c.classes = 72;
    c.draws = 67;
    c.inner = 1;
    run<T>(c);
  }
}

}  // namespace

int main() {
  choose_order();
  run_all<float>();
  run_all<double>();
  if (!quick) run_all<BFloat16>();
  run_all<Half>();
  return summary();
}
