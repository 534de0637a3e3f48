"""The log density of the binary concrete: the equation, its limits at 0 and 1, its gradients."""

import itertools
import math

import mpmath
import pytest
import torch
from oracle import DTYPES, eps

from gumbel_ext import binary_concrete, binary_concrete_log_prob

TAUS = (0.1, 0.5, 1.0, 3.0)
LOGITS = (-30.0, -2.0, 0.0, 0.7, 30.0)


def exact(value, logit, tau):
    """The equation as it is printed, in sixty digits."""
    with mpmath.workdps(60):
        y, alpha, t = mpmath.mpf(value), mpmath.exp(mpmath.mpf(logit)), mpmath.mpf(tau)
        top = t * alpha * y ** (-t - 1) * (1 - y) ** (-t - 1)
        return float(mpmath.log(top / (alpha * y**-t + (1 - y) ** -t) ** 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_equation(device, dtype):
    values = [2.0**-20, 1e-3, 0.25, 0.5, 0.75, 0.998]
    cases = [
        (torch.tensor(v, dtype=dtype).item(), torch.tensor(logit, dtype=dtype).item(), t)
        for v, logit, t in itertools.product(values, LOGITS, TAUS)
    ]
    value, logits, tau = torch.tensor(cases, dtype=torch.float64, device=device).T
    actual = binary_concrete_log_prob(value.to(dtype), logits.to(dtype), tau)
    assert actual.dtype == dtype
    expected = torch.tensor([exact(*case) for case in cases], dtype=torch.float64)
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    # tau is rounded to the dtype computed in, and multiplies a logit of up to 14.
    size = 1 + logits.cpu().abs() + tau.cpu() * 14 + expected.abs()
    allowed = 8 * eps(computed) * size + eps(dtype) * expected.abs()
    assert ((actual.cpu().double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tau", TAUS)
def test_limits(device, tau, dtype):
    logits = torch.tensor(LOGITS, device=device, dtype=dtype)
    ends = torch.tensor([[0.0], [1.0]], device=device, dtype=dtype)
    actual = binary_concrete_log_prob(ends, logits, tau)
    if tau == 1:
        assert torch.equal(actual, torch.stack([-logits, logits]))
    else:
        assert (actual == (math.inf if tau < 1 else -math.inf)).all()


@pytest.mark.parametrize("tau", TAUS)
def test_gradients_at_the_limits(device, tau):
    logits = torch.tensor(LOGITS, device=device, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor(tau, device=device, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([[0.0], [1.0]], device=device, dtype=torch.float64).expand(2, 5)
    ends = ends.contiguous().requires_grad_()
    density = binary_concrete_log_prob(ends, logits, temperature)
    signs = torch.tensor([[-1.0], [1.0]], device=device, dtype=torch.float64).expand(2, 5)
    for row in range(2):
        (actual,) = torch.autograd.grad(density[row].sum(), logits, retain_graph=True)
        assert torch.equal(actual, signs[row])
    slope, slope_tau = torch.autograd.grad(density.sum(), (ends, temperature))
    if tau == 1:
        towards = torch.stack([-logits, logits]).detach()
        torch.testing.assert_close(slope, signs * 2 * (torch.exp(towards) - 1))
        assert slope_tau.isfinite()
    else:
        assert torch.equal(slope, -signs * (math.inf if tau > 1 else -math.inf))
        assert slope_tau == -math.inf


def test_values_at_the_ends_leave_the_others_alone(device):
    """One temperature for a row with a 0 in it."""
    value = torch.tensor([0.3, 0.0, 0.8, 1.0], device=device, dtype=torch.float64)
    logits = torch.randn(4, device=device, dtype=torch.float64, requires_grad=True)
    for tau in TAUS:
        density = binary_concrete_log_prob(value, logits, tau)
        (all_of_them,) = torch.autograd.grad(density.sum(), logits)
        inner = binary_concrete_log_prob(value[::2], logits[::2], tau)
        (alone,) = torch.autograd.grad(inner.sum(), logits)
        assert torch.equal(all_of_them[::2], alone[::2])


@pytest.mark.parametrize("tau", TAUS)
def test_gradcheck(device, tau):
    value = torch.rand(3, 4, dtype=torch.float64, device=device) * 0.98 + 0.01
    logits = torch.randn(4, dtype=torch.float64, device=device)
    temperature = torch.tensor([[tau]], dtype=torch.float64, device=device)
    inputs = tuple(t.requires_grad_() for t in (value, logits, temperature))
    assert torch.autograd.gradcheck(binary_concrete_log_prob, inputs)
    assert torch.autograd.gradgradcheck(binary_concrete_log_prob, inputs)


@pytest.mark.parametrize("tau", TAUS)
def test_slope_where_the_noise_is_zero(device, tau):
    """|x| has a corner there, the density none."""
    value = torch.tensor(0.5, dtype=torch.float64, device=device, requires_grad=True)
    logits = torch.zeros((), dtype=torch.float64, device=device, requires_grad=True)
    density = binary_concrete_log_prob(value, logits, tau)
    for grad in torch.autograd.grad(density, (value, logits)):
        assert grad == 0


def test_infinite_logits(device):
    value = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.4], device=device)
    logits = torch.tensor([-math.inf, -math.inf, math.inf, math.inf, math.inf], device=device)
    logits.requires_grad_()
    for tau in TAUS:
        actual = binary_concrete_log_prob(value, logits, tau)
        assert actual.tolist() == [math.inf, -math.inf, -math.inf, math.inf, -math.inf]
        (grad,) = torch.autograd.grad(actual.sum(), logits)
        assert not grad.isnan().any()


def test_density_integrates_to_one(device):
    """By a sum over logit(y), where it is smooth; what has rounded to 1 is below 1e-7."""
    u = torch.linspace(-200, 200, 20001, dtype=torch.float64, device=device)
    y = torch.sigmoid(u)
    inner = (y > 0) & (y < 1)
    for tau, logit in ((0.5, 1.0), (1.0, -2.0), (2.5, 0.3)):
        density = binary_concrete_log_prob(y, torch.full_like(y, logit), tau).exp()
        total = (density * y * torch.sigmoid(-u))[inner].sum() * 0.02
        assert total.item() == pytest.approx(1, abs=1e-7)


def test_of_torch_distributions(device):
    value = torch.rand(200, dtype=torch.float64, device=device) * 0.9 + 0.05
    logits = torch.randn(200, dtype=torch.float64, device=device)
    tau = torch.tensor(0.8, dtype=torch.float64, device=device)
    theirs = torch.distributions.RelaxedBernoulli(tau, logits=logits).log_prob(value)
    torch.testing.assert_close(binary_concrete_log_prob(value, logits, tau), theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_samples(device, state, dtype):
    """Finite wherever a sample is not 0 or 1, and never NaN."""
    logits = torch.randn(10000, device=device).to(dtype)
    for tau in (0.05, 0.5, 2.0):
        y = binary_concrete(logits, tau, rng_state=state)
        density = binary_concrete_log_prob(y, logits, tau)
        assert not density.isnan().any()
        assert density[(y > 0) & (y < 1)].isfinite().all()


def test_compiles(device):
    def function(value, logits, tau):
        return binary_concrete_log_prob(value, logits, tau)

    value = torch.tensor([0.0, 0.2, 0.9, 1.0], device=device)
    logits = torch.randn(4, device=device, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for tau in (0.5, torch.tensor(1.0, device=device)):
        expected = function(value, logits, tau)
        actual = compiled(value, logits, tau)
        torch.testing.assert_close(actual, expected)
        grads = [torch.autograd.grad(result.sum(), logits)[0] for result in (actual, expected)]
        torch.testing.assert_close(*grads)


def test_bad_arguments(device):
    y = torch.rand(3, device=device)
    with pytest.raises(TypeError, match=r"^binary_concrete_log_prob: value must be a tensor, got"):
        binary_concrete_log_prob(0.5, y, 1.0)
    with pytest.raises(TypeError, match=r"logits must have dtype .* got torch.int64"):
        binary_concrete_log_prob(y, y.long(), 1.0)
    with pytest.raises(ValueError, match="tau must be positive and finite, got -1"):
        binary_concrete_log_prob(y, y, -1)
    with pytest.raises(TypeError, match=r"tau must have dtype .* got torch.bool"):
        binary_concrete_log_prob(y, y, y > 0)
    # Values are looked at where they are at hand; elsewhere nothing is silently a number.
    if y.is_cpu:
        with pytest.raises(ValueError, match=r"tau must be positive and finite, got -1\.0"):
            binary_concrete_log_prob(y, y, torch.tensor([0.5, -1.0, 0.5]))
    for wrong in (0.0, -1.0):
        taus = torch.full((2,), wrong, device=device)
        assert torch.vmap(lambda tau: binary_concrete_log_prob(y, y, tau))(taus).isnan().all()
    outside = torch.tensor([-0.5, 1.5, math.nan], device=device)
    assert binary_concrete_log_prob(outside, y, 0.5).isnan().all()
