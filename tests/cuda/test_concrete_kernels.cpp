// The CUDA kernels of the log-space sample's gradient and of the density, unchanged, under
// emulation: every type, team, operand and boundary against the formulas in long double.
//
// GUMBEL_EXT_ORDER and GUMBEL_EXT_FAIL_FAST as for test_gumbel_softmax_kernels; GUMBEL_EXT_QUICK=1
// leaves out bfloat16, whose addresses are float16's, and some numbers of classes.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "../../csrc/cuda/concrete_density_launch.cu"
#include "../../csrc/cuda/log_softmax_launch.cu"
#include "row_test.h"

namespace {

struct RowCase {
  std::int64_t outer = 3, inner = 2, classes = 10;
  int shift = 0;
  Spread a = Spread::kFull, b = Spread::kFull;  // value and logits, or grad and log y
  bool edges = false, tau_tensor = false, log_space = false, wide = false, tau_grad = true;
  double tau = 0.7;
};

std::string name_of(const char* what, const char* type, const RowCase& c) {
  char name[200];
  std::snprintf(name, sizeof name,
                "%s %s [%lld, %lld, %lld], shift %d, spreads %d %d%s%s%s%s, tau %g", type, what,
                (long long)c.outer, (long long)c.inner, (long long)c.classes, c.shift,
                static_cast<int>(c.a), static_cast<int>(c.b), c.edges ? ", edges" : "",
                c.tau_tensor ? ", tau tensor" : "", c.log_space ? ", log space" : "",
                c.wide ? ", wide" : "", c.tau);
  return name;
}

template <class T>
void set_rows(cuda::RowsParams& p, const RowCase& c, Buffer<typename Element<T>::Scalar>& tau) {
  p.type = Type<T>::value;
  p.rows = c.outer * c.inner;
  p.classes = c.classes;
  p.dims = 2;
  p.size[0] = c.outer;
  p.size[1] = c.inner;
  for (std::int64_t r = 0; r < p.rows; ++r) {
    const double t =
        c.edges ? (r % 8 == 7 ? -1 : c.tau) : c.tau * (1 + 0.1 * static_cast<double>(r % 7));
    tau[r] = static_cast<typename Element<T>::Scalar>(t);
  }
  if (c.tau_tensor) p.tau = tau.data();
  p.tau_value = c.tau;
  p.tau_float32 = static_cast<float>(c.tau);
}

// ---- the gradient of the log-space sample -------------------------------------------------------

template <class T>
std::string check_gradient(const RowCase& c) {
  using Scalar = typename Element<T>::Scalar;
  const std::int64_t rows = c.outer * c.inner;
  Operand<T> grad(c.a, c.outer, c.inner, c.classes, c.shift);
  Operand<Scalar> log_y(c.b, c.outer, c.inner, c.classes, c.shift);
  Buffer<T> out(rows * c.classes, c.shift);
  Buffer<Scalar> grad_tau(rows), tau(rows);
  std::mt19937 random(static_cast<unsigned>(c.classes + rows));
  std::normal_distribution<double> normal(0, 2);
  for (std::int64_t r = 0; r < rows; ++r) {
    // From even rows to such whose likeliest class has all but 1e-17 of the probability.
    const double spread = 1 + 15 * static_cast<double>(r % 3);
    std::vector<double> x(static_cast<std::size_t>(c.classes));
    double total = 0;
    for (double& at : x) at = spread * normal(random);
    if (c.edges && r % 4 == 1) {
      for (double& at : x) at = random() % 2 == 0 ? -INFINITY : at;
    }
    const double top = *std::max_element(x.begin(), x.end());
    for (const double at : x) total += std::exp(at - top);
    for (std::int64_t k = 0; k < c.classes; ++k) {
      const double at = x[static_cast<std::size_t>(k)];
      log_y.at(r, k) = static_cast<Scalar>(top == -INFINITY ? at : at - top - std::log(total));
      if (c.edges && r % 4 == 2) log_y.at(r, k) = -infinity<Scalar>();
      if (c.edges && r % 4 == 3 && k == c.classes / 2) log_y.at(r, k) = quiet_nan<Scalar>();
      grad.at(r, k) = from_double<T>(normal(random));
    }
  }
  cuda::LogGradientParams p{};
  set_rows<T>(p, c, tau);
  p.grad = grad.of();
  p.log_y = log_y.of();
  p.grad_logits = out.data();
  if (c.tau_grad) p.grad_tau = grad_tau.data();
  if (const char* error = cuda::launch_log_gradient(p, nullptr)) return error;

  for (std::int64_t r = 0; r < rows; ++r) {
    std::int64_t best = -1;
    bool nan = false;
    for (std::int64_t k = 0; k < c.classes; ++k) {
      const Real x = log_y.at(r, k);
      nan = nan || std::isnan(x);
      if (x > -kInfinity && (best < 0 || x > static_cast<Real>(log_y.at(r, best)))) best = k;
    }
    const Real t = c.tau_tensor ? static_cast<Real>(tau[r]) : c.tau;
    Real rest = 0, grads = 0, sizes = 0, deepest = 1;
    for (std::int64_t k = 0; k < c.classes; ++k) {
      const Real x = log_y.at(r, k), g = to_double(grad.at(r, k));
      if (k == best || x == -kInfinity) continue;
      rest += std::exp(x);
      grads += g;
      sizes += std::fabs(g);
      deepest = std::max(deepest, std::min<Real>(-x, 100));
    }
    const Real g_best = best < 0 ? 0 : to_double(grad.at(r, best));
    Real of_tau = 0, tau_size = 0;
    for (std::int64_t k = 0; k < c.classes; ++k) {
      const Real x = log_y.at(r, k), g = to_double(grad.at(r, k)), y = std::exp(x);
      Real dz = k == best ? g * rest - y * grads : g - y * (g_best + grads);
      Real size = k == best ? std::fabs(g) * rest * deepest + y * sizes
                            : std::fabs(g) + y * (std::fabs(g_best) + sizes);
      if (x == -kInfinity) dz = size = 0;
      if (x != -kInfinity) of_tau -= x * dz / t, tau_size += std::fabs(x) * size / t;
      if (nan || !(t > 0)) dz = std::numeric_limits<Real>::quiet_NaN();
      if (x == -kInfinity && !nan && best < 0) dz = 0;
      if (x == -kInfinity && !nan && !(t > 0)) dz = 0;
      const Real got = to_double(out[r * c.classes + k]), want = dz / t;
      const Real room = Type<T>::epsilon * std::fabs(want) + 16 * kComputed<T> * size / t +
                        Type<T>::smallest / 64;
      if (!agrees(got, x == -kInfinity && !nan ? 0 : want, room)) {
        return wrong("gradient", r, k, got, want);
      }
    }
    if (!c.tau_grad) continue;
    if (nan || (best >= 0 && !(t > 0))) of_tau = std::numeric_limits<Real>::quiet_NaN();
    if (best < 0 && !nan) of_tau = 0;
    if (!agrees(grad_tau[r], of_tau, 32 * kComputed<T> * tau_size)) {
      return wrong("gradient of tau", r, 0, grad_tau[r], of_tau);
    }
  }
  return "";
}

// ---- the density --------------------------------------------------------------------------------

template <class T>
std::string check_density(const RowCase& c) {
  using Scalar = typename Element<T>::Scalar;
  const std::int64_t rows = c.outer * c.inner, classes = c.classes;
  constexpr Real kNan = std::numeric_limits<Real>::quiet_NaN();
  Operand<T> value(c.a, c.outer, c.inner, classes, c.shift),
      logits(c.b, c.outer, c.inner, classes, c.shift);
  const int out_shift = c.shift;
  Buffer<T> of_value(rows * classes, out_shift), of_logits(rows * classes, out_shift);
  Buffer<Scalar> wide_value(rows * classes, out_shift), wide_logits(rows * classes, out_shift);
  Buffer<Scalar> density(rows), grad(rows), of_tau(rows), tau(rows);
  std::mt19937 random(static_cast<unsigned>(classes * 7 + rows));
  std::normal_distribution<double> normal(0, 2);
  for (std::int64_t r = 0; r < rows; ++r) {
    std::vector<double> x(static_cast<std::size_t>(classes));
    double total = 0;
    for (double& at : x) total += std::exp(at = normal(random));
    grad[r] = static_cast<Scalar>(c.edges && r % 11 == 10 ? 0 : normal(random));
    for (std::int64_t k = 0; k < classes; ++k) {
      double v = std::exp(x[static_cast<std::size_t>(k)]) / total, l = normal(random);
      const std::int64_t kind = c.edges ? r % 11 : -1;
      const bool half = random() % 2 == 0 && k > 0;
      if (kind == 1 && half) v = 0;                      // a face
      if (kind == 2 && half) v = 0, l = -INFINITY;       // impossible classes without value
      if (kind == 3 && k == classes / 2) l = -INFINITY;  // one with
      if (kind == 4 && k == classes - 1) v = c.log_space ? std::nan("") : -v;
      if (kind == 5 && k == classes / 3) l = k % 2 == 0 ? std::nan("") : INFINITY;
      if (kind == 6) v = 0;
      if (kind == 7 && k > 0) v = Type<T>::smallest / 8;  // subnormal
      if (kind == 8)
        v = k < (c.tau == 2 ? 2 * classes / 3 : classes / 2) ? 0 : v,
        l = 0.5;  // as many zeros as others
      if (kind == 9) l = -INFINITY, v = k == 0 ? v : 0;
      if (c.log_space && kind != 4) v = std::log(v);
      value.at(r, k) = from_double<T>(v);
      logits.at(r, k) = from_double<T>(l);
    }
  }
  cuda::DensityParams p{};
  set_rows<T>(p, c, tau);
  p.log_space = c.log_space;
  p.value = value.of();
  p.logits = logits.of();
  p.density = density.data();
  if (const char* error = cuda::launch_density(p, nullptr)) return error;
  p.density = nullptr;
  p.grad = grad.data();
  p.wide_grad_value = c.wide;
  p.wide_grad_logits = c.wide;
  p.grad_value = c.wide ? static_cast<void*>(wide_value.data()) : of_value.data();
  p.grad_logits = c.wide ? static_cast<void*>(wide_logits.data()) : of_logits.data();
  if (c.tau_grad) p.grad_tau = of_tau.data();
  if (const char* error = cuda::launch_density(p, nullptr)) return error;

  const double out_epsilon = c.wide ? kComputed<T> : Type<T>::epsilon;
  const Real out_tiny = c.wide ? 0x1p-120L : Type<T>::smallest;
  const Real out_most = c.wide || sizeof(T) > 2 || Type<T>::value == ElementType::kBFloat16
                            ? Real(std::numeric_limits<Scalar>::max())
                            : 65504;
  for (std::int64_t r = 0; r < rows; ++r) {
    const Real t =
        c.tau_tensor ? static_cast<Real>(tau[r]) : static_cast<Real>(static_cast<Scalar>(c.tau));
    std::int64_t n = 0, m = 0;
    bool bad = !(t > 0), impossible = false;
    Real sum_x = 0, sizes = 0, largest = 1;
    struct Class {
      Real value, x, u;
      bool none, never;
    };
    std::vector<Class> row;
    for (std::int64_t k = 0; k < classes; ++k) {
      const Real v = to_double(value.at(r, k)), l = to_double(logits.at(r, k));
      Class q{v, 0, 0, v == (c.log_space ? -kInfinity : 0), l == -kInfinity};
      bad = bad || std::isnan(v) || std::isnan(l) || l == kInfinity || (!c.log_space && v < 0);
      q.x = q.none ? 0 : (c.log_space ? v : std::log(v));
      q.u = l - t * q.x;
      row.push_back(q);
      if (q.none && q.never) continue;
      ++n;
      m += q.none;
      impossible = impossible || q.never;
      sum_x += q.x;
      if (q.never) continue;
      const Real size = std::fabs(l) + t * std::fabs(q.x);
      sizes += size + std::fabs(q.x);
      largest = std::max(largest, size);
    }
    Real peak = -kInfinity, total = 0, inside = 0;
    for (const Class& q : row) {
      if (!(q.none && q.never) && (m == 0 || q.none)) peak = std::max(peak, q.u);
    }
    bad = bad || n == m || peak == -kInfinity;
    for (const Class& q : row) {
      if (q.none && q.never) continue;
      (m == 0 || q.none ? total : inside) += std::exp(q.u - peak);
    }
    const Real nn = static_cast<Real>(n);
    // In the arithmetic of the kernel: whether it is 0 is decided there.
    const Scalar coefficient = add(multiply(static_cast<Scalar>(n - m), static_cast<Scalar>(t)),
                                   c.log_space ? Scalar(0) : -static_cast<Scalar>(m));
    Real want = std::lgamma(nn) + (nn - 1) * std::log(t) - nn * std::log(total);
    for (const Class& q : row) want += q.none && q.never ? 0 : q.u - peak;
    if (!c.log_space) want -= sum_x;
    if (m > 0 && coefficient != 0) want = coefficient > 0 ? -kInfinity : kInfinity;
    if (impossible) want = -kInfinity;
    if (bad) want = kNan;
    const Real noise = kComputed<T> * largest;  // of u
    const Real room = 8 * kComputed<T> * (sizes + nn * (1 + largest + std::fabs(std::log(t))));
    if (!agrees(density[r], want, room)) return wrong("density", r, 0, density[r], want);

    const Real g = grad[r];
    Real sum_xw = 0, xw_size = 0;
    for (std::int64_t k = 0; k < classes; ++k) {
      const Class& q = row[static_cast<std::size_t>(k)];
      const bool dropped = q.none && q.never;
      const Real np = m == 0 || q.none ? nn * std::exp(q.u - peak) / total : 0, w = 1 - np;
      Real l_want = g * w, of_x = -t * w - (c.log_space ? 0 : 1), v_want = g * of_x;
      const Real w_room = 16 * (noise * np + kComputed<T> * (1 + np));
      Real l_room = std::fabs(g) * w_room, v_room = std::fabs(g) * (t * w_room + 4 * kComputed<T>);
      bool undecided = false;
      if (!c.log_space && !q.none) v_want /= q.value, v_room /= std::fabs(q.value);
      if (!c.log_space && q.none) {
        // Equal logits make it 0 exactly.
        const bool none_of_x = std::fabs(of_x) < 1e-12L;
        undecided = !none_of_x && std::fabs(of_x) <= t * w_room;
        v_want = none_of_x ? (t < 1   ? -kInfinity * g
                              : t > 1 ? 0
                                      : -g * np * inside / total)
                           : g * of_x * kInfinity;
        v_room = 16 * kComputed<T> * (1 + largest) * std::fabs(v_want);
      }
      if (dropped) l_want = v_want = 0;
      if (!dropped)
        sum_xw += q.x * w, xw_size += std::fabs(q.x) * (w_room + kComputed<T> * std::fabs(w));
      if (g == 0) l_want = v_want = 0;
      if (bad) l_want = v_want = kNan;
      const std::int64_t i = r * classes + k;
      const Real l_got = c.wide ? static_cast<Real>(wide_logits[i]) : to_double(of_logits[i]),
                 v_got = c.wide ? static_cast<Real>(wide_value[i]) : to_double(of_value[i]);
      if (!agrees(l_got, l_want, l_room + out_epsilon * std::fabs(l_want) + out_tiny)) {
        return wrong("gradient of logits", r, k, l_got, l_want);
      }
      if (undecided) continue;
      if (std::isfinite(v_want) && std::fabs(v_want) >= out_most * 0.99L) continue;
      if (!agrees(v_got, v_want, v_room + out_epsilon * std::fabs(v_want) + out_tiny)) {
        return wrong("gradient of value", r, k, v_got, v_want);
      }
    }
    if (!c.tau_grad) continue;
    Real tau_want = g * ((nn - 1) / t - sum_xw);
    if (m > 0) tau_want = -kInfinity * g;
    if (g == 0) tau_want = 0;
    if (bad) tau_want = kNan;
    const Real tau_room = std::fabs(g) * (8 * kComputed<T> * nn / t + 4 * xw_size +
                                          8 * kComputed<T> * std::fabs(sum_xw));
    if (!agrees(of_tau[r], tau_want, tau_room)) {
      return wrong("gradient of tau", r, 0, of_tau[r], tau_want);
    }
  }
  return "";
}

template <class T>
void run_rows() {
  const auto both = [](const RowCase& c) {
    run(name_of("log gradient", Type<T>::name, c), [&] { return check_gradient<T>(c); });
    run(name_of("density", Type<T>::name, c), [&] { return check_density<T>(c); });
  };
  for (const std::int64_t classes : {1, 2, 4, 10, 14, 16, 17, 129, 1024, 1030}) {
    if (quick && (classes == 4 || classes == 16 || classes == 129 || classes == 1024)) continue;
    RowCase c;
    c.classes = classes;
    c.outer = classes < 1000 ? 19 : 2;
    both(c);
    c.tau_tensor = true;
    c.log_space = true;
    both(c);
    c.outer = classes < 1000 ? 12 : 6;
    c.edges = true;
    both(c);
    c.log_space = false;
    both(c);
    c.tau = 1;
    c.shift = 1;
    both(c);
    c.tau_tensor = false;
    c.tau = 1.3;
    c.wide = true;
    both(c);
    c.tau_grad = false;
    both(c);
    c.edges = false;
    c.shift = 0;
    c.outer = 3;
    for (const Spread spread : {Spread::kOneOuter, Spread::kOneInner, Spread::kClassesApart}) {
      c.a = spread;
      both(c);
      std::swap(c.a, c.b);
      both(c);
      c.b = Spread::kFull;
    }
    c.a = Spread::kOne;
    run(name_of("log gradient", Type<T>::name, c), [&] { return check_gradient<T>(c); });
  }
  // (n - m) tau = m with tau on either side of 1: one zero of three classes, two of three.
  for (const double tau : {0.5, 2.0}) {
    RowCase c;
    c.classes = 3;
    c.outer = 12;
    c.edges = true;
    c.tau = tau;
    both(c);
  }
}

}  // namespace

int main() {
  choose_order();
  run_rows<float>();
  run_rows<double>();
  if (!quick) run_rows<BFloat16>();
  run_rows<Half>();
  return summary();
}
