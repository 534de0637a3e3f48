// The CUDA kernels of the straight-through softmax's gradient and of the soft-argmax, unchanged,
// under emulation: every type, team, operand and special row against the formulas in long double.
//
// GUMBEL_EXT_ORDER, GUMBEL_EXT_FAIL_FAST and GUMBEL_EXT_QUICK as for test_concrete_kernels.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "../../csrc/cuda/soft_argmax_launch.cu"
#include "../../csrc/cuda/straight_through_launch.cu"
#include "row_test.h"

namespace {

// The NaN that CUDA's arithmetic makes.
template <class T>
T device_nan() {
  T out;
  narrow(quiet_nan<typename Element<T>::Scalar>(), &out);
  return out;
}

constexpr Real kNan = std::numeric_limits<Real>::quiet_NaN();

struct Case {
  std::int64_t outer = 3, inner = 2, classes = 10;
  int shift = 0, coordinates = 1;
  Spread logits = Spread::kFull, other = Spread::kFull;  // the gradient's and the mask's
  bool mask = false, edges = false, tau_tensor = false, tau_grad = true;
  double tau = 0.7;  // or beta

  std::int64_t rows() const { return outer * inner; }
};

std::string name_of(const char* what, const char* type, const Case& c) {
  char name[200];
  std::snprintf(name, sizeof name,
                "%s %s [%lld, %lld, %lld], shift %d, spreads %d %d, %d coordinates%s%s%s, tau %g",
                type, what, (long long)c.outer, (long long)c.inner, (long long)c.classes, c.shift,
                static_cast<int>(c.logits), static_cast<int>(c.other), c.coordinates,
                c.mask ? ", mask" : "", c.edges ? ", edges" : "", c.tau_tensor ? ", tensor" : "",
                c.tau);
  return name;
}

// What a row is about, with edges.
enum Kind { kTies, kNaN, kInfinite, kNothing, kSomeImpossible, kForbidden, kBadTau, kBadState };

template <class T>
class Rows {
 public:
  using Scalar = typename Element<T>::Scalar;

  Rows(const Case& c, unsigned seed)
      : c_(c),
        logits(c.logits, c.outer, c.inner, c.classes, c.shift),
        tau(c.rows()),
        random(seed + static_cast<unsigned>(c.classes)) {
    for (std::int64_t r = 0; r < c.rows(); ++r) {
      const double bad = r % 16 < 8 ? -1 : INFINITY;
      tau[r] = static_cast<Scalar>(kind(r) == kBadTau && c.tau_tensor
                                       ? bad
                                       : c.tau * (1 + 0.1 * static_cast<double>(r % 7)));
      for (std::int64_t k = 0; k < c.classes; ++k) logits.at(r, k) = from_double<T>(logit(r));
      if (kind(r) == kNaN) {
        logits.at(r, c.classes / 2) = device_nan<T>();
        logits.at(r, c.classes - 1) = device_nan<T>();
      }
      if (kind(r) == kInfinite) logits.at(r, 2 * c.classes / 3) = from_double<T>(INFINITY);
    }
  }

  Kind kind(std::int64_t r) const { return c_.edges ? static_cast<Kind>(r % 8) : kTies; }
  Real tau_of(std::int64_t r) const {
    return c_.tau_tensor ? static_cast<Real>(tau_data()[r])
                         : static_cast<Real>(static_cast<Scalar>(c_.tau));
  }
  void set(cuda::RowsParams& p) {
    p.type = Type<T>::value;
    p.rows = c_.rows();
    p.classes = c_.classes;
    p.dims = 2;
    p.size[0] = c_.outer;
    p.size[1] = c_.inner;
    if (c_.tau_tensor) p.tau = tau.data();
    p.tau_value = c_.tau;
    p.tau_float32 = static_cast<float>(c_.tau);
  }
  double normal() { return normal_(random); }

  const Case& c_;
  Operand<T> logits;
  Buffer<Scalar> tau;
  std::mt19937 random;

 private:
  const Scalar* tau_data() const { return const_cast<Rows*>(this)->tau.data(); }
  double logit(std::int64_t r) {
    const double l = normal();
    if (kind(r) == kNothing) return -INFINITY;
    if (kind(r) == kSomeImpossible && random() % 3 == 0) return -INFINITY;
    // Whole numbers, so that several classes are the largest; and rows that are almost one-hot.
    return r % 3 == 0 ? std::round(l) : (r % 3 == 1 ? l : 20 * l);
  }
  std::normal_distribution<double> normal_{0, 2};
};

// ---- the straight-through softmax ---------------------------------------------------------------

template <class T>
std::string check_straight_through(const Case& c) {
  using Scalar = typename Element<T>::Scalar;
  const std::int64_t rows = c.rows(), classes = c.classes;
  Rows<T> given(c, 1);
  Operand<T> grad(c.other, c.outer, c.inner, classes, c.shift);
  Operand<std::uint8_t> mask(c.other, c.outer, c.inner, classes, c.shift);
  Buffer<T> out(rows * classes, c.shift);
  Buffer<std::int64_t> index(rows);
  Buffer<Scalar> grad_tau(rows);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t k = 0; k < classes; ++k) {
      grad.at(r, k) = from_double<T>(given.normal());
      mask.at(r, k) = given.kind(r) != kForbidden && given.random() % 3 != 0;
    }
  }
  cuda::StraightThroughParams p{};
  given.set(p);
  p.logits = given.logits.of();
  if (c.mask) p.mask = mask.of();

  const auto score = [&](std::int64_t r, std::int64_t k) {
    return c.mask && mask.at(r, k) == 0 ? -kInfinity : Real(to_double(given.logits.at(r, k)));
  };
  std::vector<std::int64_t> chosen(static_cast<std::size_t>(rows), -1);
  for (std::int64_t r = 0; r < rows; ++r) {
    std::int64_t& best = chosen[static_cast<std::size_t>(r)];
    std::int64_t allowed = -1;
    for (std::int64_t k = classes - 1; k >= 0; --k) {
      if (!c.mask || mask.at(r, k) != 0) allowed = k;
    }
    for (std::int64_t k = 0; k < classes; ++k) {
      const Real z = score(r, k);
      if (std::isnan(z) || (z > -kInfinity && (best < 0 || z > score(r, best)))) best = k;
      if (std::isnan(z)) break;
    }
    if (best < 0) best = allowed;
  }

  for (std::int64_t r = 0; r < rows; ++r) {
    index[r] = chosen[static_cast<std::size_t>(r)];
    if (given.kind(r) == kBadState) index[r] = classes;
  }
  p.index = index.data();
  p.grad = grad.of();
  p.grad_logits = out.data();
  if (c.tau_grad) p.grad_tau = grad_tau.data();
  if (const char* error = cuda::launch_straight_through_backward(p, nullptr)) return error;

  constexpr Real kE = kComputed<T>;
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t best = index[r];
    const Real t = given.tau_of(r);
    const bool forbidden = best < 0;
    bool nan = !forbidden && (best >= classes || !(t > 0 && t < kInfinity));
    for (std::int64_t k = 0; k < classes; ++k) nan = nan || std::isnan(score(r, k));
    nan = nan || (!forbidden && !std::isfinite(score(r, best)));
    Real total = 0, dot = 0, size = 0, off = 0, off_size = 0, largest = 0;
    struct Class {
      Real d, y, h, relative;
    };
    std::vector<Class> row(static_cast<std::size_t>(classes));
    for (std::int64_t k = 0; k < classes && !nan && !forbidden; ++k) {
      Class& q = row[static_cast<std::size_t>(k)];
      q.d = score(r, k) - score(r, best);
      q.y = std::exp(q.d / t);
      q.h = Real(to_double(grad.at(r, k))) - Real(to_double(grad.at(r, best)));
      q.relative = q.y == 0 ? 0 : kE * (4 - 2 * q.d / t);
      total += q.y;
      largest = std::max(largest, std::fabs(q.h));
    }
    for (Class& q : row) {
      if (total > 0) q.y /= total;
      dot += q.y * q.h;
      size += q.y * std::fabs(q.h);
      off += q.y * q.relative;
      off_size += q.y * q.relative * std::fabs(q.h);
    }
    Real slope = 0, slope_room = 0;
    for (std::int64_t k = 0; k < classes; ++k) {
      const Class& q = row[static_cast<std::size_t>(k)];
      const Real w = q.y * (q.h - dot);
      const Real room = 2 * (q.y * ((q.relative + off) * (std::fabs(q.h) + size) + off_size +
                                    8 * kE * (std::fabs(q.h) + size)));
      const Real want = nan ? kNan : (forbidden ? 0 : w / t), got = to_double(out[r * classes + k]);
      const Real lost = Type<T>::smallest * (1 + 4 * largest / t);
      if (!agrees(got, want, room / t + Type<T>::epsilon * std::fabs(want) + lost)) {
        return wrong("gradient", r, k, got, want);
      }
      if (q.y == 0) continue;
      slope -= w * q.d / t / t;
      slope_room += (room + 8 * kE * std::fabs(w)) * std::fabs(q.d) / t / t;
    }
    if (!c.tau_grad) continue;
    const Real want = nan ? kNan : slope;
    if (!agrees(grad_tau[r], want, slope_room + Real(0x1p-100))) {
      return wrong("gradient of tau", r, 0, grad_tau[r], want);
    }
  }
  return "";
}

// ---- the soft-argmax ----------------------------------------------------------------------------

template <class T>
std::string check_soft_argmax(const Case& c) {
  using Scalar = typename Element<T>::Scalar;
  constexpr Real kE = kComputed<T>;
  const std::int64_t rows = c.rows(), classes = c.classes, n = c.coordinates;
  Rows<T> given(c, 2);
  Buffer<Scalar> positions(n * classes), expected(rows * n), grad(rows * n), grad_beta(rows);
  Buffer<double> state(rows * (3 + n)), middle(n);
  Buffer<T> out(rows * classes, c.shift);
  for (std::int64_t k = 0; k < n; ++k) {
    middle[k] = k == 0 ? static_cast<double>(classes - 1) / 2 : 1000.0 * given.normal();
    for (std::int64_t j = 0; j < classes; ++j) {
      const double at = k == 0 ? static_cast<double>(j) - middle[0] : 8 * given.normal();
      positions[k * classes + j] = static_cast<Scalar>(at);
    }
  }
  if (c.tau == 1) {
    // Rows of equal logits, and of two classes alone, far apart and nearly alike.
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t k = 0; k < classes; ++k) {
        const bool one = k == 1 || k == classes - 2;
        const double two = k == 1 ? 0.0 : -static_cast<double>(r) / 64;
        given.logits.at(r, k) = from_double<T>(r == 0 ? 3.0 : (one ? two : -INFINITY));
      }
    }
  }
  cuda::SoftArgmaxParams p{};
  given.set(p);
  p.logits = given.logits.of();
  p.coordinates = static_cast<int>(n);
  p.positions = positions.data();
  p.middle = middle.data();
  p.expected = expected.data();
  p.state = state.data();
  if (const char* error = cuda::launch_soft_argmax(p, nullptr)) return error;

  struct Row {
    bool nan;
    std::int64_t best;
    Real total, apart[3], off[3];  // the expected position less that of the best; its error
    std::vector<Real> d, y;
  };
  std::vector<Row> wanted;
  for (std::int64_t r = 0; r < rows; ++r) {
    // A negative beta is its size, of negated logits.
    const Real sign = given.tau_of(r) < 0 ? -1 : 1, beta = sign * given.tau_of(r);
    Row row{!(beta > 0 && beta < kInfinity), 0, 0, {}, {}, {}, {}};
    const auto logit = [&](std::int64_t k) {
      return sign * Real(to_double(given.logits.at(r, k)));
    };
    for (std::int64_t k = 0; k < classes && !std::isnan(logit(row.best)); ++k) {
      if (!(logit(k) <= logit(row.best))) row.best = k;
    }
    row.nan = row.nan || !std::isfinite(logit(row.best));
    Real size[3] = {};
    for (std::int64_t k = 0; k < classes; ++k) {
      row.d.push_back(logit(k) - logit(row.best));
      row.y.push_back(row.nan ? 0 : std::exp(beta * row.d.back()));
      row.total += row.y.back();
    }
    for (std::int64_t k = 0; k < n; ++k) {
      const auto at = [&](std::int64_t j) { return Real(positions[k * classes + j]); };
      for (std::int64_t j = 0; j < classes; ++j) {
        Real& y = row.y[static_cast<std::size_t>(j)];
        if (k == 0) y /= row.total;
        row.apart[k] += y * (at(j) - at(row.best));
        size[k] += y * std::fabs(at(j) - at(row.best));
      }
      for (std::int64_t j = 0; j < classes; ++j) {
        const Real y = row.y[static_cast<std::size_t>(j)], d = row.d[static_cast<std::size_t>(j)];
        // Weights of 1 are exact.
        const Real relative = y == 0 || d == 0 ? 0 : kE * (1 - 1.5L * beta * d);
        row.off[k] += y * relative * std::fabs(at(j) - at(row.best) - row.apart[k]);
        // So are indices and their distances.
        if (d != 0 || k > 0) row.off[k] += y * kE * std::fabs(at(j) - at(row.best));
      }
      row.off[k] +=
          0x1p-40L * size[k] + smallest_normal<Scalar> * static_cast<Real>(1000 * classes);
      const double* got = state.data() + r * (3 + n);
      const Real apart = row.nan ? kNan : row.apart[k];
      if (!agrees(got[3 + k], apart, row.off[k])) {
        return wrong("offset", r, k, got[3 + k], apart);
      }
      const Real want = apart + at(row.best) + Real(middle[k]);
      const Real in_float64 = 0x1p-50L * (std::fabs(at(row.best)) + std::fabs(middle[k]));
      const Real room = row.off[k] + in_float64 + kE * std::fabs(want);
      if (!agrees(expected[r * n + k], want, room)) {
        return wrong("expected position", r, k, expected[r * n + k], want);
      }
    }
    const double* got = state.data() + r * (3 + n);
    if (got[0] != static_cast<double>(row.best)) {
      return wrong("best class", r, 0, got[0], static_cast<Real>(row.best));
    }
    const Real peak = sign * logit(row.best);
    if (!agrees(got[1], peak, 0)) return wrong("peak", r, 0, got[1], peak);
    if (!agrees(got[2], row.nan ? kNan : row.total, 64 * kE * row.total)) {
      return wrong("total", r, 0, got[2], row.total);
    }
    wanted.push_back(row);
  }

  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t k = 0; k < n; ++k) grad[r * n + k] = static_cast<Scalar>(given.normal());
    if (given.kind(r) == kBadState) {
      state[r * (3 + n)] =
          r % 24 == 7 ? -1.0 : (r % 24 == 15 ? static_cast<double>(classes) : std::nan(""));
    }
  }
  p.grad = grad.data();
  p.grad_logits = out.data();
  if (c.tau_grad) p.grad_beta = grad_beta.data();
  if (const char* error = cuda::launch_soft_argmax(p, nullptr)) return error;
  for (std::int64_t r = 0; r < rows; ++r) {
    const Row& row = wanted[static_cast<std::size_t>(r)];
    const Real sign = given.tau_of(r) < 0 ? -1 : 1, beta = sign * given.tau_of(r);
    const bool nan = row.nan || given.kind(r) == kBadState;
    Real slope = 0, slope_room = 0;
    for (std::int64_t j = 0; j < classes; ++j) {
      const Real y = row.y[static_cast<std::size_t>(j)], d = row.d[static_cast<std::size_t>(j)];
      Real h = 0, h_size = 0, h_off = 0;
      for (std::int64_t k = 0; k < n; ++k) {
        const Real x = Real(positions[k * classes + j]) - Real(positions[k * classes + row.best]);
        h += grad[r * n + k] * (x - row.apart[k]);
        h_off += std::fabs(grad[r * n + k]) * row.off[k];
        h_size += std::fabs(grad[r * n + k]) * (std::fabs(x) + std::fabs(row.apart[k]));
      }
      const Real got = to_double(out[r * classes + j]), want = nan ? kNan : sign * beta * y * h;
      const Real relative = y == 0 ? 0 : kE * (8 - 3 * beta * d);
      const Real room = y * (relative * std::fabs(h) + 8 * kE * h_size + 2 * h_off);
      const Real lost = Type<T>::smallest * (1 + beta * h_size);
      if (!agrees(got, want, beta * room + Type<T>::epsilon * std::fabs(want) + lost)) {
        return wrong("gradient", r, j, got, want);
      }
      if (y == 0) continue;
      slope += y * h * d;
      slope_room += (room + 8 * kE * y * std::fabs(h)) * std::fabs(d);
    }
    if (!c.tau_grad) continue;
    const Real want = nan ? kNan : sign * slope;
    if (!agrees(grad_beta[r], want, slope_room + Real(0x1p-100))) {
      return wrong("gradient of beta", r, 0, grad_beta[r], want);
    }
  }
  return "";
}

template <class T>
void run_all() {
  const auto both = [](const Case& c) {
    run(name_of("straight-through", Type<T>::name, c),
        [&] { return check_straight_through<T>(c); });
    run(name_of("soft-argmax", Type<T>::name, c), [&] { return check_soft_argmax<T>(c); });
  };
  for (const std::int64_t classes : {1, 2, 4, 10, 14, 16, 17, 129, 1024, 1030}) {
    if (quick && (classes == 4 || classes == 16 || classes == 129 || classes == 1024)) continue;
    Case c;
    c.classes = classes;
    c.outer = classes < 1000 ? 19 : 2;
    both(c);
    c.tau = -c.tau;
    run(name_of("soft-argmax", Type<T>::name, c), [&] { return check_soft_argmax<T>(c); });
    c.tau = -c.tau;
    c.mask = c.tau_tensor = true;
    c.coordinates = 2;
    both(c);
    c.outer = 12;
    c.edges = true;
    both(c);
    c.mask = c.tau_grad = false;
    c.shift = 1;
    both(c);
    c.mask = true;
    c.tau_tensor = c.edges = false;
    c.coordinates = 3;
    c.shift = 0;
    c.tau = 0.05;
    c.outer = 3;
    for (const Spread spread : {Spread::kOneOuter, Spread::kOneInner, Spread::kClassesApart}) {
      c.logits = spread;
      both(c);
      std::swap(c.logits, c.other);
      both(c);
      c.other = Spread::kFull;
      c.tau = 12;
    }
  }
}

// beta times log2(e) above the largest number.
template <class T>
void run_steepest() {
  Case c;
  c.classes = 1;
  c.tau = sizeof(typename Element<T>::Scalar) == 8 ? 1.5e308 : 3e38;
  run(name_of("soft-argmax", Type<T>::name, c), [&] { return check_soft_argmax<T>(c); });
}

// Sums that float32 cannot hold, and weights whose last digit shows.
template <class T>
void run_far_apart() {
  for (const std::int64_t classes : {600, 30001}) {
    Case c;
    c.classes = classes;
    c.outer = 3;
    c.inner = 3;
    c.tau = 1;
    run(name_of("soft-argmax", Type<T>::name, c), [&] { return check_soft_argmax<T>(c); });
  }
}

}  // namespace

int main() {
  choose_order();
  run_all<float>();
  run_all<double>();
  if (!quick) run_all<BFloat16>();
  run_all<Half>();
  run_steepest<float>();
  run_steepest<double>();
  run_far_apart<float>();
  run_far_apart<double>();
  return summary();
}
