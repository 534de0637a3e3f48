"""Means and variances of the estimators: what each promises of its gradient.

Seeds are fixed. A z-test below fails a correct estimator with probability 1e-4 at most.
"""

import functools
import math

import pytest
import torch
from oracle import DTYPES, rng_state

import gumbel_ext
from gumbel_ext import _reference

_ops = torch.ops.gumbel_ext

LOGITS = torch.tensor([0.3, -1.1, 0.9, 0.0, -0.4], dtype=torch.float64)
CLASSES = len(LOGITS)


def quadratic():
    """A symmetric matrix and a vector: f(y) = y.Qy / 2 + c.y, of gradient Qy + c."""
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(CLASSES, CLASSES, generator=generator, dtype=torch.float64)
    return q + q.T, torch.randn(CLASSES, generator=generator, dtype=torch.float64)


def gradient_for_every_sample(product):
    """Σ over i of p_i times the gradient given the sample i, for a quadratic function."""
    q, c = quadratic()
    one_hot = torch.eye(CLASSES, dtype=torch.float64)
    logits = LOGITS.expand(CLASSES, CLASSES).contiguous()
    given = product(one_hot @ q + c, logits, torch.arange(CLASSES))
    return LOGITS.softmax(0) @ given


def exact_gradient():
    q, c = quadratic()
    logits = LOGITS.clone().requires_grad_()
    one_hot = torch.eye(CLASSES, dtype=torch.float64)
    values = 0.5 * torch.einsum("ij,jk,ik->i", one_hot, q, one_hot) + one_hot @ c
    return torch.autograd.grad((logits.softmax(0) * values).sum(), logits)[0]


@pytest.mark.cpu_only(reason="enumerated in float64 on the CPU")
def test_reinmax_and_zgr_are_exact_on_quadratics():
    exact = exact_gradient()
    zgr = gradient_for_every_sample(lambda g, x, i: _ops.zgr_backward(g, x, i, -1, None))
    assert torch.allclose(zgr, exact, rtol=1e-12, atol=1e-14)
    reinmax = gradient_for_every_sample(
        lambda g, x, i: _ops.reinmax_backward(g, x, i, 1.0, None, -1, None)
    )
    assert torch.allclose(reinmax, exact, rtol=1e-12, atol=1e-14)
    # Others are not, by far more than that.
    gapped = gradient_for_every_sample(
        lambda g, x, i: _ops.gapped_straight_through_backward(g, x, i, 1.0, None, 1.0, -1, None)
    )
    assert (gapped - exact).abs().max() > 0.01


def rao_projections(rows, k, tau, grad, seed, group=1):
    """Projected Gumbel-Rao gradients of independent samples, averaged over groups of them."""
    logits = LOGITS.float().expand(rows, CLASSES).contiguous().requires_grad_()
    y = gumbel_ext.gumbel_rao(logits, tau, k, rng_state=rng_state(seed=seed))
    # What the gradient is of depends on the sample, as in a network.
    incoming = (y.detach() @ grad).requires_grad_(False)
    (gradient,) = torch.autograd.grad(y, logits, incoming)
    direction = torch.tensor([1.0, -0.5, 0.3, 0.8, -1.2])
    return (gradient @ direction).double().view(-1, group).mean(1)


def incoming_gradients():
    """That of every sample, in its row."""
    return torch.randn(CLASSES, CLASSES, generator=torch.Generator().manual_seed(2))


@functools.cache
def moments_given_the_sample(tau, draws):
    """Of every class, the mean and variance of the projected straight-through gradient given it."""
    direction = torch.tensor([1.0, -0.5, 0.3, 0.8, -1.2], dtype=torch.float64)
    p, total = LOGITS.softmax(0), LOGITS.logsumexp(0)
    means, variances = [], []
    generator = torch.Generator().manual_seed(11)
    for i in range(CLASSES):
        e = torch.empty(draws, CLASSES, dtype=torch.float64).exponential_(generator=generator)
        phi = total - (e / p + e[:, i : i + 1]).log()
        phi[:, i] = total - e[:, i].log()
        y = (phi / tau).softmax(-1)
        g = incoming_gradients()[i].double()
        gradient = y * (g - (y @ g).unsqueeze(1)) / tau
        projected = gradient @ direction
        means.append(projected.mean())
        variances.append(projected.var())
    return torch.stack(means), torch.stack(variances)


@pytest.mark.cpu_only(reason="a law of the formula, which other tests compare on every device")
@pytest.mark.parametrize(("k", "group"), [(1, 1), (4, 1), (32, 1), (8, 4)])
def test_variance_falls_with_draws_and_samples_as_it_should(k, group):
    """var = E[var(straight-through | D)] / (B K) + var(Rao) / B, for K draws and B samples."""
    tau, rows = 0.5, 100_000
    means, variances = moments_given_the_sample(tau, 300_000)
    p = LOGITS.softmax(0)
    of_rao = p @ means**2 - (p @ means) ** 2
    expected = ((p @ variances) / k + of_rao) / group

    found = rao_projections(rows, k, tau, incoming_gradients(), seed=7, group=group)
    variance = found.var()
    fourth = ((found - found.mean()) ** 4).mean()
    error = math.sqrt((fourth - variance**2) / len(found))
    # Half a per cent for the Monte Carlo error of the expected value, 300,000 draws a class.
    assert abs(variance - expected) < 3.9 * error + 0.005 * expected, (variance, expected)
    # Both terms count: neither alone would pass.
    assert abs(of_rao / group - variance) > 10 * error or k > 8
    assert abs(p @ variances / k / group - variance) > 10 * error

    mean_error = found.std() / math.sqrt(len(found))
    assert abs(found.mean() - p @ means) < 3.9 * mean_error + 0.001


@pytest.mark.cpu_only(reason="a law of the formula, which other tests compare on every device")
def test_mean_is_that_of_the_straight_through_gradient():
    tau, rows = 0.7, 300_000
    grad = incoming_gradients()

    def gradients(sample):
        logits = LOGITS.float().expand(rows, CLASSES).contiguous().requires_grad_()
        y = sample(logits)
        return torch.autograd.grad(y, logits, y.detach() @ grad)[0].double()

    rao = gradients(lambda x: gumbel_ext.gumbel_rao(x, tau, 4, rng_state=rng_state(seed=21)))
    straight = gradients(
        lambda x: gumbel_ext.gumbel_softmax(x, tau, hard=True, rng_state=rng_state(seed=22))
    )
    error = ((rao.var(0) + straight.var(0)) / rows).sqrt()
    z = (rao.mean(0) - straight.mean(0)) / error
    # Five classes at 4.3 sigma: alpha below 1e-4.
    assert z.abs().max() < 4.3, z
    # The estimator is no straight-through one: its variance is smaller.
    assert (rao.var(0) < 0.8 * straight.var(0)).all()


@pytest.mark.cpu_only(reason="a law of the formula, which other tests compare on every device")
@pytest.mark.parametrize("i", range(CLASSES))
def test_zgr_is_the_limit_of_gumbel_rao(i):
    rows, k, tau = 2000, 500, 0.02
    logits = LOGITS.float().expand(rows, CLASSES).contiguous()
    grad = torch.tensor([0.9, -0.7, 0.2, 1.4, -1.0]).expand(rows, CLASSES)
    index = torch.full((rows,), i)
    found = _ops.gumbel_rao_backward(
        grad, logits, index, tau, None, k, -1, None, rng_state(seed=31)
    ).double()
    expected = _ops.zgr_backward(grad[:1].double(), logits[:1].double(), index[:1], -1, None)
    error = found.std(0) / math.sqrt(rows)
    # What is left of the temperature is of second order in it: 0.02^2 times small numbers.
    assert ((found.mean(0) - expected[0]).abs() < 4.3 * error + 0.002).all()
    assert (error < 0.01).all()


@pytest.mark.cpu_only(reason="the reference takes seconds; other tests run on every device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 17, 1000])
def test_every_number_of_draws(k, dtype):
    logits = torch.randn(6, 9).to(dtype).requires_grad_()
    grad = torch.randn(6, 9).to(dtype)
    y, index = gumbel_ext.gumbel_rao(logits, 0.4, k, return_index=True, rng_state=rng_state())
    y.backward(grad)
    exact = logits.detach().double().requires_grad_()
    y = _reference.gumbel_rao(exact, index, 0.4, k, rng_state())
    (expected,) = torch.autograd.grad(y, exact, grad.double())
    # Draws are added in float32: the error of a sum of k terms, over k.
    tolerance = 4 * torch.finfo(dtype).eps + (1e-13 if dtype == torch.float64 else 2e-5)
    scale = expected.abs().amax(-1, keepdim=True)
    assert ((logits.grad.double() - expected).abs() <= tolerance * scale).all()


@pytest.mark.cpu_only(reason="the allocator is the CPU's; test_cuda measures the other")
def test_memory_does_not_grow_with_the_draws():
    logits = torch.randn(512, 64, requires_grad=True)
    allocated = []
    for k in (1, 1000):
        y = gumbel_ext.gumbel_rao(logits, k=k)
        grad = torch.randn_like(y)
        with torch.profiler.profile(profile_memory=True) as profile:
            torch.autograd.grad(y, logits, grad)
        sizes = [e.cpu_memory_usage for e in profile.events() if e.name == "[memory]"]
        allocated.append(sum(size for size in sizes if size > 0))
    assert allocated[0] == allocated[1]
    assert allocated[0] <= 2 * logits.numel() * logits.element_size()
