"""The density of the Concrete distribution: inside the simplex, on its boundary, its gradients."""

import itertools
import math

import mpmath
import pytest
import torch
from oracle import DTYPES, DispatchLog, accumulation_eps, eps, layouts, rng_state
from scipy import integrate
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import RelaxedOneHotCategorical
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical
from torch.library import opcheck

import gumbel_ext
from gumbel_ext import _reference, concrete_log_prob

OPS = torch.ops.gumbel_ext
INF = math.inf
SPACES = pytest.mark.parametrize("log_space", [False, True], ids=["simplex", "log"])


def feature(name, mode="eager"):
    return pytest.mark.feature(name, ops=("concrete_log_prob",), modes=(mode,))


def samples(logits, tau, log_space=False, dim=-1):
    """Points of the simplex in the dtype of logits, none of them on the boundary."""
    wide = logits.cpu().double()
    log_y = gumbel_ext.gumbel_log_softmax(wide, tau, dim, rng_state=rng_state())
    y = log_y if log_space else log_y.exp().clamp_min(1e-7)
    return y.to(logits.device, logits.dtype)


def density_of_digits(value, logits, tau, log_space=False):
    """The formula to fifty digits; the values are floats, and mean what they say."""
    with mpmath.workdps(50):
        t = mpmath.mpf(float(tau))
        x = [mpmath.mpf(v) if log_space else mpmath.log(mpmath.mpf(v)) for v in value]
        u = [mpmath.mpf(a) - t * b for a, b in zip(logits, x, strict=True)]
        n, peak = len(x), max(u)
        total = mpmath.log(sum(mpmath.exp(v - peak) for v in u)) + peak
        out = mpmath.loggamma(n) + (n - 1) * mpmath.log(t) + sum(u) - n * total
        return out if log_space else out - sum(x)


def along_the_line(value, logits, tau, step, log_space=False):
    """The density a step from the boundary, towards the centre of the simplex."""
    with mpmath.workdps(400):
        n, t, s = len(value), mpmath.mpf(tau), mpmath.mpf(step)
        y = [(1 - s) * mpmath.mpf(v) + s / n for v in value]
        x = [mpmath.log(v) for v in y]
        u = [mpmath.mpf(a) - t * b for a, b in zip(logits, x, strict=True)]
        peak = max(u)
        total = mpmath.log(sum(mpmath.exp(v - peak) for v in u)) + peak
        out = mpmath.loggamma(n) + (n - 1) * mpmath.log(t) + sum(u) - n * total
        return out if log_space else out - sum(x)


def terms_of(value, logits, tau, dim=-1, log_space=False):
    """Sizes of what is added up, a row: the rounding of the density is relative to them."""
    value, logits = torch.broadcast_tensors(value.cpu().double(), logits.cpu().double())
    x = value if log_space else value.log()
    u = logits - tau * x
    n = value.shape[dim] if value.dim() else 1
    size = (u - u.amax(dim, keepdim=True)).abs() + u.abs().amax(dim, keepdim=True)
    return 1 + abs(math.lgamma(n)) + n * abs(math.log(tau)) + (size + x.abs()).sum(dim)


def assert_density(actual, value, logits, tau, dim=-1, log_space=False):
    expected = _reference.concrete_log_prob(
        value.cpu().double(), logits.cpu().double(), tau, dim, log_space
    )
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert actual.dtype == wide
    assert actual.shape == expected.shape
    allowed = 8 * accumulation_eps(logits.dtype) * terms_of(value, logits, tau, dim, log_space)
    assert ((actual.cpu().double() - expected).abs() <= allowed).all()


# ---- inside -------------------------------------------------------------------------------------


def test_reference_against_fifty_digits():
    """The oracle first."""
    logits = torch.randn(6, 5, dtype=torch.float64)
    for tau, log_space in itertools.product((0.1, 0.5, 1.0, 3.0), (False, True)):
        value = samples(logits, tau, log_space)
        actual = _reference.concrete_log_prob(value, logits, tau, log_space=log_space)
        for a, v, row in zip(actual, value.tolist(), logits.tolist(), strict=True):
            exact = density_of_digits(v, row, tau, log_space)
            assert abs(a.item() - exact) <= 1e-12 * (1 + abs(exact))


@SPACES
@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 2, 3, 10, 16, 17, 1024, 5003])
def test_values(device, classes, dtype, tau, log_space):
    logits = torch.randn(9, classes).to(device, dtype)
    value = samples(logits, tau, log_space)
    density = concrete_log_prob(value, logits, tau, log_space=log_space)
    assert_density(density, value, logits, tau, log_space=log_space)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_is_that_of_torch_distributions(device, tau):
    logits = torch.randn(50, 7, dtype=torch.float64, device=device)
    value = samples(logits, tau)
    temperature = torch.tensor(tau, dtype=torch.float64, device=device)
    theirs = RelaxedOneHotCategorical(temperature, logits=logits).log_prob(value)
    torch.testing.assert_close(concrete_log_prob(value, logits, tau), theirs)
    theirs = ExpRelaxedCategorical(temperature, logits=logits).log_prob(value.log())
    ours = concrete_log_prob(value.log(), logits, tau, log_space=True)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("tau", [0.6, 1.0, 2.0])
def test_integrates_to_one(tau):
    """Over the simplex of two and of three classes."""
    two, three = torch.tensor([0.4, -0.7]).double(), torch.tensor([0.5, -0.3, 0.2]).double()

    def of_two(a):
        value = torch.tensor([a, 1 - a], dtype=torch.float64)
        return concrete_log_prob(value, two, tau).exp().item()

    assert abs(integrate.quad(of_two, 0, 1, epsabs=1e-7)[0] - 1) < 1e-5

    # By logistic coordinates, in which the integrand is smooth and falls off at both ends.
    z = torch.linspace(-40 / min(tau, 1), 40 / min(tau, 1), 1201, dtype=torch.float64)
    first, rest = torch.sigmoid(z), torch.sigmoid(-z)
    a, b = first[:, None], first[None, :]
    value = torch.stack([a.expand(1201, 1201), rest[:, None] * b, rest[:, None] * rest], -1)
    # d(a, (1 - a) b) = a (1 - a)^2 b (1 - b)
    measure = a * rest[:, None] ** 2 * b * rest
    inside = (value > 0).all(-1) & (measure > 0)
    density = concrete_log_prob(value, three, tau).exp()
    total = torch.where(inside, density * measure, 0.0).sum() * (z[1] - z[0]) ** 2
    assert abs(total - 1) < 1e-4


def test_log_space_changes_variables(device):
    """p(x) = p(y) prod(y), the simplex being measured by all classes but one."""
    logits = torch.randn(8, 5, dtype=torch.float64, device=device)
    value = samples(logits, 0.7)
    simplex = concrete_log_prob(value, logits, 0.7)
    log = concrete_log_prob(value.log(), logits, 0.7, log_space=True)
    torch.testing.assert_close(log, simplex + value.log().sum(-1))


@SPACES
def test_scale_of_logits_and_far_values(device, log_space):
    """Shifted logits change nothing; values whose products underflow are no matter."""
    logits = torch.randn(6, 4, dtype=torch.float64, device=device)
    value = samples(logits, 0.5, log_space)
    density = concrete_log_prob(value, logits, 0.5, log_space=log_space)
    shifted = concrete_log_prob(value, logits + 300, 0.5, log_space=log_space)
    torch.testing.assert_close(shifted, density)
    row = [1e-300, 1e-308, 5e-324, 1.0]
    far = torch.tensor(row, dtype=torch.float64, device=device)
    exact = density_of_digits(row, logits[0].tolist(), 0.5)
    actual = concrete_log_prob(far, logits[0], 0.5)
    assert abs(actual.item() - exact) <= 1e-12 * abs(exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_subnormal_values(device, dtype):
    tiny = torch.finfo(dtype).smallest_normal
    value = torch.tensor([[tiny / 4, 0.25, 0.75], [tiny, tiny / 8, 1.0]], dtype=dtype)
    assert (value > 0).all()
    logits = torch.randn(3).to(dtype)
    density = concrete_log_prob(value.to(device), logits.to(device), 0.3)
    assert_density(density, value, logits, 0.3)


# ---- shapes -------------------------------------------------------------------------------------

SHAPES = {
    "samples": ((5, 4, 6), (6,), -1),
    "samples_of_rows": ((5, 4, 6), (4, 6), -1),
    "one_value": ((6,), (3, 4, 6), -1),
    "both": ((5, 1, 6), (4, 6), 2),
    "inner": ((5, 6, 3), (6, 1), 1),
    "first": ((6, 2, 2), (6, 2, 2), 0),
    "classes_of_logits": ((5, 6), (5, 1), -1),
}


@SPACES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("value_shape", "logits_shape", "dim"), SHAPES.values(), ids=SHAPES)
def test_broadcasting(device, value_shape, logits_shape, dim, dtype, log_space):
    """As the copies would give: the values to the bit on the CPU, gradients summed once."""
    shape = torch.broadcast_shapes(value_shape, logits_shape)
    value = torch.randn(value_shape).softmax(min(dim, len(value_shape) - 1))
    value = (value.log() if log_space else value).to(device, dtype).requires_grad_()
    logits = torch.randn(logits_shape).to(device, dtype).requires_grad_()
    small = concrete_log_prob(value, logits, 0.5, dim, log_space=log_space)
    big = concrete_log_prob(
        value.expand(shape).contiguous(),
        logits.expand(shape).contiguous(),
        0.5,
        dim,
        log_space=log_space,
    )
    assert torch.equal(small, big)
    grad = torch.randn_like(small)
    actual = torch.autograd.grad(small, (value, logits), grad)
    leaves = [t.detach().cpu().double().requires_grad_() for t in (value, logits)]
    exact = _reference.concrete_log_prob(*leaves, 0.5, dim, log_space)
    expected = torch.autograd.grad(exact, leaves, grad.cpu().double())
    for a, e in zip(actual, expected, strict=True):
        size = e.abs().amax() + 1
        assert ((a.cpu().double() - e).abs() <= (eps(dtype) + 2e-6) * size).all()


def test_samples_are_not_expanded():
    """Ten thousand samples of one set of logits take no memory of their size for logits."""
    value = torch.rand(10_000, 64).softmax(-1)
    with DispatchLog() as log:
        concrete_log_prob(value, torch.randn(64), 0.5)
    assert log.names == ["concrete_log_prob"]


@pytest.mark.cpu_only(reason="layouts choose CUDA kernels")
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_layouts_and_threads_give_the_same_bits(thread_count, dim):
    logits = torch.randn(5, 9, 70)
    value = logits.softmax(dim)

    def results(v, x):
        v, x = (t.detach().requires_grad_() for t in (v, x))
        density = concrete_log_prob(v, x, 0.5, dim)
        return [density.detach(), *torch.autograd.grad(density.sum(), (v, x))]

    thread_count(1)
    expected = results(value, logits)
    thread_count(7)
    for (name, v), (_, x) in zip(layouts(value), layouts(logits), strict=True):
        for a, b in zip(results(v, x), expected, strict=True):
            assert torch.equal(a, b), name


def test_scalars_and_empty_tensors(device):
    one = torch.ones((), device=device)
    assert concrete_log_prob(one, one, 0.5) == 0
    for shape, result in (((0, 3), (0,)), ((3, 0), (3,)), ((0,), ())):
        x = torch.empty(shape, device=device, requires_grad=True)
        density = concrete_log_prob(x, x, 0.5)
        assert density.shape == result
        assert density.isnan().all()
        density.sum().backward()
        assert x.grad.shape == shape


# ---- the boundary -------------------------------------------------------------------------------

# A value with zeros, and a temperature; what the coefficient (n - m) tau - m of their logarithm is.
BOUNDARY = [
    ([0.0, 1.0], 1.0, 0),
    ([0.0, 1.0], 0.7, -1),
    ([0.0, 1.0], 1.3, 1),
    ([0.0, 0.4, 0.6], 0.5, 0),
    ([0.0, 0.4, 0.6], 0.4, -1),
    ([0.0, 0.4, 0.6], 2.0, 1),
    ([0.0, 0.0, 1.0], 2.0, 0),
    ([0.0, 0.0, 1.0], 1.0, -1),
    ([0.0, 0.25, 0.25, 0.5], 1 / 3, 0),
    ([0.0, 0.0, 0.25, 0.75], 1.0, 0),
    ([0.0, 0.0, 0.25, 0.75], 3.0, 1),
    ([0.0] * 15 + [1.0], 15.0, 0),
    ([0.0, 0.0] + [0.0625] * 16, 0.125, 0),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("value", "tau", "sign"), BOUNDARY)
def test_limit_on_the_boundary(device, value, tau, sign, dtype):
    """Against the formula a step of 1e-150 from it, and the trend from there to 1e-250."""
    logits = torch.linspace(-1, 1.5, len(value)).to(device, dtype)
    at = torch.tensor(value, dtype=dtype, device=device)
    density = concrete_log_prob(at, logits, tau).item()
    if sign:
        assert density == -INF * sign
        near, nearer = (
            along_the_line(at.tolist(), logits.tolist(), tau, step) for step in ("1e-150", "1e-250")
        )
        assert (nearer > near) == (sign < 0)
        return
    # 1/3 is no binary number: that the coefficient is 0 holds to rounding, as does the limit.
    third = tau == 1 / 3
    exact = along_the_line(at.tolist(), logits.tolist(), "1/3" if third else tau, "1e-350")
    unit = 1e-13 if dtype == torch.float64 else 1e-5
    assert abs(density - exact) <= unit * (1 + abs(exact)) * len(value)


def test_log_space_on_the_boundary(device):
    logits = torch.randn(3, device=device)
    for x in ([-INF, 0.0, -INF], [-INF, math.log(0.4), math.log(0.6)]):
        value = torch.tensor(x, device=device)
        for tau in (0.1, 1.0, 5.0):
            assert concrete_log_prob(value, logits, tau, log_space=True) == -INF


@pytest.mark.parametrize(("value", "tau", "sign"), BOUNDARY)
def test_gradients_on_the_boundary(device, value, tau, sign):
    """Those of logits are finite and the limit; those of value infinite or the limit, never NaN."""
    n = len(value)
    logits = torch.linspace(-1, 1.5, n).double().to(device).requires_grad_()
    at = torch.tensor(value, dtype=torch.float64, device=device, requires_grad=True)
    t = torch.tensor(tau, dtype=torch.float64, device=device, requires_grad=True)
    density = concrete_log_prob(at, logits, t)
    of_value, of_logits, of_tau = torch.autograd.grad(density, (at, logits, t))
    assert of_tau == -INF
    with mpmath.workdps(400):
        s, size = mpmath.mpf("1e-100"), mpmath.mpf(float(tau))
        y = [(1 - s) * mpmath.mpf(v) + s / n for v in value]
        u = [mpmath.mpf(a) - size * mpmath.log(b) for a, b in zip(logits.tolist(), y, strict=True)]
        peak = max(u)
        e = [mpmath.exp(v - peak) for v in u]
        w = [1 - n * v / sum(e) for v in e]
        exact = [-(size * a + 1) / b for a, b in zip(w, y, strict=True)]
    for i in range(n):
        # A temperature like 0.125 leaves (1e-100)^tau of the others.
        assert abs(of_logits[i].item() - w[i]) <= 1e-9
        if value[i] > 0:
            assert abs(of_value[i].item() - exact[i]) <= 1e-9 * abs(exact[i])
        elif of_value[i].isinf():
            assert mpmath.sign(exact[i]) == of_value[i].sign().item()
            assert abs(exact[i]) > 1e9
        else:
            # The next term of the expansion decides; for tau = 1 it is a number.
            assert tau >= 1
            assert abs(of_value[i].item() - exact[i]) <= 1e-9 * (1 + abs(exact[i]))
    (nothing,) = torch.autograd.grad(concrete_log_prob(at, logits, t), at, torch.zeros(()).to(at))
    assert (nothing == 0).all()


@SPACES
def test_impossible_classes(device, log_space):
    """Left out where the value is zero; where it is not, the density is."""
    logits = torch.randn(4, 5, dtype=torch.float64, device=device)
    logits[:, 2] = -INF
    nothing = -INF if log_space else 0.0
    possible = [0, 1, 3, 4]
    face = samples(logits[:, possible], 0.6, log_space)
    value = torch.full((4, 5), nothing, dtype=torch.float64, device=device)
    value[:, possible] = face
    value.requires_grad_()
    logits.requires_grad_()
    actual = concrete_log_prob(value, logits, 0.6, log_space=log_space)
    expected = concrete_log_prob(value[:, possible], logits[:, possible], 0.6, log_space=log_space)
    torch.testing.assert_close(actual, expected)
    a = torch.autograd.grad(actual.sum(), (value, logits))
    e = torch.autograd.grad(expected.sum(), (value, logits))
    for got, want in zip(a, e, strict=True):
        assert (got[:, 2] == 0).all()
        torch.testing.assert_close(got, want)

    somewhere = value.detach().clone()
    somewhere[:, 2] = -3.0 if log_space else 0.1
    density = concrete_log_prob(somewhere, logits, 0.6, log_space=log_space)
    assert (density == -INF).all()
    assert torch.autograd.grad(density.sum(), logits)[0].isfinite().all()
    # A sample of such logits is on the face.
    sample = gumbel_ext.gumbel_log_softmax(logits.detach(), 0.6)
    value = sample if log_space else sample.exp()
    assert concrete_log_prob(value, logits, 0.6, log_space=log_space).isfinite().all()


@SPACES
def test_rows_know_nothing_of_each_other(device, log_space):
    """Rows differ by turns in the number of possible classes and in temperature."""
    logits, value = torch.randn(2, 6, 9, device=device)
    value = value.log_softmax(-1) if log_space else value.softmax(-1)
    for i in range(6):
        logits[i, : (i + 1) // 2] = -INF
        value[i, : (i + 1) // 2] = -INF if log_space else 0.0
    tau = torch.tensor([0.3, 0.3, 0.8, 0.8, 1.5, 1.5], device=device).unsqueeze(1)
    grad = torch.randn(6, device=device)

    def results(rows):
        leaves = [t[rows].detach().requires_grad_() for t in (value, logits, tau)]
        density = concrete_log_prob(*leaves, log_space=log_space)
        return density.detach(), *torch.autograd.grad(density, leaves, grad[rows])

    together = results(slice(None))
    for i in range(6):
        for whole, alone in zip(together, results(slice(i, i + 1)), strict=True):
            torch.testing.assert_close(whole[i : i + 1], alone)


def test_rows_without_a_density(device):
    nan = math.nan
    rows = [
        ([-0.1, 0.5, 0.6], [0.0, 0.0, 0.0]),
        ([nan, 0.5, 0.5], [0.0, 0.0, 0.0]),
        ([INF, 0.5, 0.5], [0.0, 0.0, 0.0]),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
        ([0.2, 0.3, 0.5], [nan, 0.0, 0.0]),
        ([0.2, 0.3, 0.5], [INF, 0.0, 0.0]),
        ([0.2, 0.3, 0.5], [-INF, -INF, -INF]),
        ([0.0, 0.3, 0.7], [nan, 0.0, -INF]),
        ([-0.0, -1.0, 2.0], [-INF, 0.0, 0.0]),
    ]
    value = torch.tensor([row[0] for row in rows], device=device, requires_grad=True)
    logits = torch.tensor([row[1] for row in rows], device=device, requires_grad=True)
    density = concrete_log_prob(value, logits, 0.5)
    assert density.isnan().all()
    for grad in torch.autograd.grad(density.sum(), (value, logits)):
        assert grad.isnan().all()
    for x in ([nan, -1.0], [INF, -1.0], [-INF, -INF]):
        logs = torch.tensor(x, device=device)
        assert concrete_log_prob(logs, torch.zeros(2, device=device), 1, log_space=True).isnan()
    # Neighbours of such rows keep their density.
    mixed = torch.tensor([[0.2, 0.8], [nan, 1.0], [0.2, 0.8]], device=device)
    density = concrete_log_prob(mixed, torch.zeros(2, device=device), 0.5)
    assert density[0] == density[2]
    assert density[0].isfinite()


def test_values_of_low_temperatures_are_told_apart(device):
    """Samples that underflowed lie on the boundary; their logarithms have a density each."""
    logits = torch.randn(100, 20, device=device)
    log_y = gumbel_ext.gumbel_log_softmax(logits, 0.01)
    on_boundary = concrete_log_prob(log_y.exp(), logits, 0.01)
    assert (on_boundary == INF).any()
    assert not on_boundary.isnan().any()
    assert concrete_log_prob(log_y, logits, 0.01, log_space=True).isfinite().all()


# ---- gradients ----------------------------------------------------------------------------------


@SPACES
@pytest.mark.parametrize("tau", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 10, 33, 2049])
def test_gradients(device, classes, dtype, tau, log_space):
    logits = torch.randn(7, classes).to(device, dtype)
    value = samples(logits, tau, log_space).requires_grad_()
    logits.requires_grad_()
    t = torch.tensor(tau, device=device, dtype=torch.float64, requires_grad=True)
    density = concrete_log_prob(value, logits, t, log_space=log_space)
    grad = torch.randn_like(density)
    actual = torch.autograd.grad(density, (value, logits, t), grad)
    leaves = [x.detach().cpu().double().requires_grad_() for x in (value, logits, t)]
    exact = _reference.concrete_log_prob(*leaves, log_space=log_space)
    expected = torch.autograd.grad(exact, leaves, grad.cpu().double())
    x = leaves[0] if log_space else leaves[0].log()
    u = (leaves[1] - tau * x).detach()
    # Of w = 1 - n p, p is rounded by its u; to the value comes the rest as it stands.
    p = u.softmax(-1)
    condition = 1 + u.abs().amax(-1, keepdim=True)
    unit = 16 * accumulation_eps(dtype) * condition
    g = grad.cpu().double().abs().unsqueeze(-1)
    of_w = unit * (1 + classes * p) * g
    allowed = of_w + eps(dtype) * expected[1].abs()
    assert ((actual[1].cpu().double() - expected[1]).abs() <= allowed).all()
    of_x = unit * (1 + tau * (1 + classes * p)) * g
    of_value = of_x if log_space else of_x / leaves[0].detach()
    allowed = of_value + eps(dtype) * expected[0].abs()
    # What a small value is divided by may be more than float16 holds.
    most = torch.finfo(dtype).max
    of_values = actual[0].cpu().double().clamp(-most, most)
    assert ((of_values - expected[0].clamp(-most, most)).abs() <= allowed).all()
    of_tau = (x.detach().abs() * of_w + unit * classes / tau * g / classes).sum()
    assert (actual[2].cpu() - expected[2]).abs() <= 2 * of_tau


@SPACES
@pytest.mark.parametrize("tau_shape", [(), (3, 1), (2, 3, 1)])
@feature("gradcheck, gradgradcheck")
@feature("forward-mode AD, dual tensors")
def test_derivatives_of_two_orders(device, tau_shape, log_space):
    options = {"dtype": torch.float64, "device": device, "requires_grad": True}
    free, logits = torch.randn(2, 3, 4, **options), torch.randn(3, 4, **options)
    tau = (torch.rand(tau_shape, dtype=torch.float64, device=device) + 0.5).requires_grad_()

    def density(free, logits, tau):
        value = torch.log_softmax(free, -1) if log_space else torch.softmax(free, -1)
        return concrete_log_prob(value, logits, tau, log_space=log_space)

    assert gradcheck(density, (free, logits, tau), check_forward_ad=True)
    assert gradgradcheck(density, (free, logits, tau))


@feature("vmap of grad, per-sample gradients")
def test_score_has_mean_zero(device):
    """E[d log p(y) / d logits] = 0 over samples; alpha = 1e-6 by six standard errors."""
    logits = torch.randn(6, dtype=torch.float64, device=device, requires_grad=True)
    with torch.no_grad():
        log_y = gumbel_ext.gumbel_log_softmax(logits.expand(20_000, 6), 0.5, rng_state=rng_state())
    scores = torch.vmap(
        torch.func.grad(lambda a, x: concrete_log_prob(x, a, 0.5, log_space=True)), (None, 0)
    )(logits.detach(), log_y)
    mean, error = scores.mean(0), scores.std(0) / math.sqrt(20_000)
    assert (mean.abs() <= 6 * error).all()


# ---- modes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@feature("torch.library.opcheck")
def test_opcheck(device, dtype):
    logits = torch.randn(3, 4, device=device).to(dtype).requires_grad_()
    value = torch.rand(2, 4, 3, device=device).softmax(-2).to(dtype).mT.requires_grad_()
    tau = torch.tensor(0.5, device=device, requires_grad=True)
    for t in (None, tau):
        opcheck(OPS.concrete_log_prob, (value, logits, 0.5, t, -1, False))
    grad = torch.randn(2, 3, device=device)
    wanted = ((True, True, True), (True, False, False), (False, True, False))
    for flags in wanted:
        opcheck(
            OPS.concrete_log_prob_backward,
            (grad, value.detach(), logits.detach(), 0.5, None, -1, False, *flags),
        )


@feature("vmap in_dims, out_dims")
@feature("torch.func jacrev")
@feature("torch.func jacfwd")
def test_vmap_and_func(device):
    value, logits = torch.randn(4, 3, 5).softmax(-1).to(device), torch.randn(3, 5, device=device)
    tau = torch.rand(4, device=device) + 0.3
    batch = torch.vmap(concrete_log_prob, (0, None, 0))(value, logits, tau)
    for i in range(4):
        assert torch.equal(batch[i], concrete_log_prob(value[i], logits, tau[i]))
    inner = torch.vmap(lambda v: concrete_log_prob(v, logits.mT, 0.5, 0), 2)(value.permute(2, 1, 0))
    torch.testing.assert_close(inner, concrete_log_prob(value, logits, 0.5))
    reverse = torch.func.jacrev(lambda a: concrete_log_prob(value, a, 0.5))(logits)
    forward = torch.func.jacfwd(lambda a: concrete_log_prob(value, a, 0.5))(logits)
    torch.testing.assert_close(reverse, forward)


@pytest.mark.cpu_only(reason="compiled on the CPU is enough for the graph")
@feature("torch.compile(fullgraph=True), forward and backward", "compiled")
def test_compiles_whole():
    logits = torch.randn(6, requires_grad=True)
    value = torch.rand(8, 6).softmax(-1)
    compiled = torch.compile(
        lambda v, a, t: concrete_log_prob(v, a, t).square().sum(), fullgraph=True
    )
    for tau in (0.5, 0.25):
        (actual,) = torch.autograd.grad(compiled(value, logits, tau), logits)
        loss = concrete_log_prob(value, logits, tau).square().sum()
        torch.testing.assert_close(actual, torch.autograd.grad(loss, logits)[0])


def test_errors(device):
    x = torch.rand(3, 4, device=device)
    with pytest.raises(TypeError, match=r"concrete_log_prob: value must be a tensor, got list"):
        concrete_log_prob([0.5, 0.5], x, 1.0)
    with pytest.raises(TypeError, match=r"concrete_log_prob: logits must have dtype"):
        concrete_log_prob(x, x.long(), 1.0)
    with pytest.raises(TypeError, match=r"concrete_log_prob: value must have dtype"):
        concrete_log_prob(x.long(), x, 1.0)
    with pytest.raises(ValueError, match=r"value and logits must broadcast together, got shapes"):
        concrete_log_prob(x, x[:2], 1.0)
    with pytest.raises(ValueError, match=r"tau must be positive and finite, got 0"):
        concrete_log_prob(x, x, 0.0)
    with pytest.raises(ValueError, match=r"tau must be positive and finite, got nan"):
        concrete_log_prob(x, x, torch.tensor(math.nan))
    with pytest.raises(ValueError, match=r"tau must broadcast to \[3, 1\]"):
        concrete_log_prob(x, x, torch.ones(4, device=device))
    with pytest.raises(IndexError, match=r"dim must be between -2 and 1"):
        concrete_log_prob(x, x, 1.0, 3)
    with pytest.raises(TypeError, match=r"concrete_log_prob: value must be a dense"):
        concrete_log_prob(x.to_sparse(), x, 1.0)
    with pytest.raises(TypeError, match=r"concrete_log_prob_backward: grad must have dtype"):
        OPS.concrete_log_prob_backward(
            x[:, 0].half(), x.half(), x.half(), 1.0, None, -1, False, True, True, True
        )
    assert concrete_log_prob(x.half(), x, 1.0).dtype == torch.float32
    assert concrete_log_prob(x.half(), x.half(), 1.0).dtype == torch.float32
    assert concrete_log_prob(x.double(), x, 1.0).dtype == torch.float64


# ---- rounding and zero gradients ----------------------------------------------------------------


@pytest.mark.parametrize("log_space", [False, True])
@pytest.mark.parametrize("offset", [2.0**17, -(2.0**20)])
@pytest.mark.parametrize("shared", [False, True], ids=["a row each", "one row for all"])
def test_an_offset_of_the_logits_changes_nothing(device, offset, shared, log_space):
    """Logits are multiples of 1/4, so that shifted ones are the same numbers exactly."""
    logits = (torch.randn(30, 6) * 4).round().div(4).to(device)
    logits = logits[0] if shared else logits
    logits.view(-1, 6)[:, 5] = -1e30
    value = torch.randn(30, 6).log_softmax(-1).to(device)
    value = value if log_space else value.exp()
    weight = torch.randn(30, device=device)
    results = []
    for moved in (logits, logits + offset):
        leaf = moved.clone().requires_grad_()
        density = concrete_log_prob(value, leaf, 0.7, log_space=log_space)
        results.append((density, torch.autograd.grad((density * weight).sum(), leaf)[0]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("log_space", [False, True])
def test_a_gradient_of_zero_has_derivatives(device, log_space):
    """As weights have that are learnt from 0."""
    logits = torch.randn(4, 3, dtype=torch.float64, device=device, requires_grad=True)
    value = torch.randn(4, 3, dtype=torch.float64, device=device).log_softmax(-1)
    value = (value if log_space else value.exp()).requires_grad_()
    tau = torch.tensor(0.7, dtype=torch.float64, device=device, requires_grad=True)
    inputs = (logits, value, tau)
    direction = [torch.randn_like(x) for x in inputs]
    products = []
    for start in (0.0, 1.0):
        weight = torch.full((4,), start, dtype=torch.float64, device=device, requires_grad=True)
        density = concrete_log_prob(value, logits, tau, log_space=log_space)
        first = torch.autograd.grad((weight * density).sum(), inputs, create_graph=True)
        moved = sum((g * d).sum() for g, d in zip(first, direction, strict=True))
        products.append(torch.autograd.grad(moved, weight)[0])
    # Linear in the weights: the derivative is the same wherever they are.
    torch.testing.assert_close(*products)
    assert (products[0] != 0).all()
