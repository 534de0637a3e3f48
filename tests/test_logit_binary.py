"""Log-odds of binary concrete samples, and their density."""

import math

import pytest
import scipy.stats
import torch
from oracle import DTYPES, eps, rng_state

from gumbel_ext import (
    binary_concrete,
    binary_concrete_log_prob,
    logistic_noise,
    logit_binary_concrete,
)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_dtype
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 0), (70, 33)], ids=str)
@pytest.mark.parametrize("tau_kind", ["number", "tensor", "rows"])
def test_sample_and_gradients(shape, tau_kind, dtype, device, state):
    logits = (2 * torch.randn(shape)).to(device, dtype).requires_grad_()
    rows = (*shape[:-1], 1) if shape else ()
    tau = {
        "number": 0.3,
        "tensor": torch.tensor(0.3, requires_grad=True),  # on the CPU beside all devices
        "rows": (0.1 + torch.rand(rows)).to(device).requires_grad_(),
    }[tau_kind]
    x = logit_binary_concrete(logits, tau, rng_state=state)
    assert (x.shape, x.dtype) == (logits.shape, dtype)
    noise = logistic_noise(shape, dtype=torch.float64, device=device, rng_state=state)
    wide = logits.detach().double().requires_grad_()
    wide_tau = torch.as_tensor(tau, dtype=torch.float64).detach().to(device).requires_grad_()
    expected = (wide + noise) / wide_tau
    # The noise has an absolute error, as a sum with a cancelling logit has.
    bound = (
        4 * eps(dtype) * expected.abs() + 8 * eps(torch.float32) * (dtype != torch.float64) / 0.1
    )
    assert ((x - expected).abs() <= bound + 1e-12).all()
    weight = torch.randn(shape, device=device).to(dtype)
    inputs = (logits,) if tau_kind == "number" else (logits, tau)
    got = torch.autograd.grad((x * weight).sum(), inputs)
    theirs = torch.autograd.grad((expected * weight.double()).sum(), (wide, wide_tau))
    for one, other in zip(got, theirs, strict=False):
        rounding = 16 * max(eps(dtype), eps(one.dtype)) * max(1.0, weight.numel() ** 0.5)
        torch.testing.assert_close(one.double().to(device), other, rtol=rounding, atol=rounding)


@every_dtype
def test_is_the_log_odds_of_the_binary_concrete(dtype, device, state):
    logits = torch.randn(50, 4).to(device, dtype)
    y = binary_concrete(logits, 0.8, rng_state=state)
    x = logit_binary_concrete(logits, 0.8, rng_state=state)
    torch.testing.assert_close(x.sigmoid(), y, rtol=16 * eps(dtype), atol=4 * eps(dtype))
    # Where that one is decided entirely.
    assert logit_binary_concrete(logits, 1e-3, rng_state=state).isfinite().all()


@every_dtype
def test_infinite_logits_are_constants(dtype, device):
    assert logit_binary_concrete(torch.full((), math.nan, device=device, dtype=dtype)).isnan()
    logits = torch.tensor([math.inf, -math.inf, 0.5], device=device, dtype=dtype)
    logits.requires_grad_()
    tau = torch.tensor(0.1, device=device, requires_grad=True)
    x = logit_binary_concrete(logits, tau)
    assert torch.equal(x[:2], logits[:2])
    assert x[2].isfinite()
    of_logits, of_tau = torch.autograd.grad(x.nan_to_num(0, 0, 0).sum(), (logits, tau))
    assert (of_logits[:2] == 0).all()
    assert of_logits[2] != 0
    assert of_tau.isfinite()


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_draws_what_the_binary_concrete_draws(randomness, device, state):
    logits = torch.randn(3, 5, dtype=torch.float64, device=device)
    for given in ({}, {"rng_state": state}):
        results = []
        for sampler in (logit_binary_concrete, binary_concrete):
            torch.manual_seed(3)

            def one(row, sampler=sampler, given=given):
                return sampler(row, 0.9, **given)

            results.append(torch.vmap(one, randomness=randomness)(logits))
        torch.testing.assert_close(results[0].sigmoid(), results[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(logit_binary_concrete)(logits)


def test_derivatives_and_transforms(device, state):
    logits = torch.randn(4, 3, dtype=torch.float64, device=device, requires_grad=True)
    tau = torch.tensor(0.6, dtype=torch.float64, device=device, requires_grad=True)

    def sample(logits, tau):
        return logit_binary_concrete(logits, tau, rng_state=state)

    def density(x, logits, tau):
        return binary_concrete_log_prob(x, logits, tau, logit_space=True)

    x = sample(logits, tau).detach().requires_grad_()
    for function, inputs in ((sample, (logits, tau)), (density, (x, logits, tau))):
        assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, inputs)
    by_func = torch.func.grad(lambda row: sample(row, 0.6).cos().sum())(logits.detach())
    (expected,) = torch.autograd.grad(sample(logits, 0.6).cos().sum(), logits)
    torch.testing.assert_close(by_func, expected)


@pytest.mark.cpu_only(reason="one compiler is enough")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_compiled_traced_and_seeded(state):
    logits = torch.randn(4, 3)

    def step(logits, tau, state):
        x = logit_binary_concrete(logits, tau, rng_state=state)
        return binary_concrete_log_prob(x, logits * 2, tau, logit_space=True)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    traced = torch.jit.trace(step, (torch.zeros(4, 3), torch.tensor(1.0), state))
    for tau in (torch.tensor(0.5), torch.tensor(0.1)):
        expected = step(logits, tau, state)
        torch.testing.assert_close(compiled(logits, tau, state), expected)
        torch.testing.assert_close(traced(logits, tau, state), expected)
    drawn = torch.jit.trace(lambda x: logit_binary_concrete(x, 0.5), logits, check_trace=False)
    assert not torch.equal(drawn(logits), drawn(logits))

    # A call draws one seed, whatever the shape.
    after = []
    for sampler in (logit_binary_concrete, binary_concrete):
        generator = torch.Generator().manual_seed(1)
        sampler(logits, generator=generator)
        after.append(generator.get_state())
    assert torch.equal(*after)


# ---- the density --------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("tau", [0.01, 0.5, 3.0])
def test_density_is_logistic(dtype, tau, device):
    logits = torch.randn(40, 1).to(device, dtype)
    x = (torch.randn(40, 7) / tau).to(device, dtype)
    density = binary_concrete_log_prob(x, logits, tau, logit_space=True)
    assert density.dtype == dtype
    law = scipy.stats.logistic(loc=logits.double().cpu().numpy() / tau, scale=1 / tau)
    expected = torch.as_tensor(law.logpdf(x.double().cpu().numpy()))
    scale = expected.abs() + tau * x.double().cpu().abs() + 1
    assert ((density.double().cpu() - expected).abs() <= 4 * eps(dtype) * scale).all()


def test_density_and_that_of_the_sigmoid_differ_by_the_jacobian(device):
    x = torch.linspace(-30, 30, 101, dtype=torch.float64, device=device)
    y = x.sigmoid()
    logits = torch.tensor([[-2.0], [0.3]], dtype=torch.float64, device=device)
    difference = binary_concrete_log_prob(y, logits, 0.4) - binary_concrete_log_prob(
        x, logits, 0.4, logit_space=True
    )
    jacobian = torch.nn.functional.softplus(x) + torch.nn.functional.softplus(-x)
    inside = x < 20  # further on 1 - y has lost its digits
    torch.testing.assert_close(
        difference[:, inside], jacobian.expand(2, -1)[:, inside], rtol=1e-6, atol=1e-6
    )


def test_density_at_infinity(device):
    inf = math.inf
    x = torch.tensor([inf, -inf, inf, -inf, 0.0, 0.0, math.nan], device=device)
    logits = torch.tensor([0.0, 0.0, inf, inf, inf, -inf, 0.0], device=device, requires_grad=True)
    tau = torch.tensor(0.5, device=device, requires_grad=True)
    density = binary_concrete_log_prob(x, logits, tau, logit_space=True)
    assert density[:6].tolist() == [-inf, -inf, inf, -inf, -inf, -inf]
    assert density[6].isnan()
    (gradient,) = torch.autograd.grad(density[:6].sum(), logits)
    assert not gradient[:6].isnan().any()


# ---- arguments ----------------------------------------------------------------------------------


def test_bad_arguments(device):
    logits = torch.zeros(3, device=device)
    name = "logit_binary_concrete"
    for wrong in ([0.0], None, logits.long(), logits.to(torch.float8_e5m2)):
        with pytest.raises(TypeError, match=f"^{name}: logits must "):
            logit_binary_concrete(wrong)
    for tau in (0, -1.0, math.inf, math.nan, torch.tensor(0.0), torch.tensor([1.0, -1.0, 2.0])):
        with pytest.raises(ValueError, match=f"^{name}: tau must be positive and finite, got"):
            logit_binary_concrete(torch.zeros(3), tau)
    with pytest.raises(ValueError, match=f"^{name}: tau must broadcast to the shape of logits"):
        logit_binary_concrete(logits, torch.ones(2, device=device))
    with pytest.raises(TypeError, match=f"^{name}: tau must be a number or a tensor"):
        logit_binary_concrete(logits, "1")
    with pytest.raises(ValueError, match="generator or rng_state, not both"):
        logit_binary_concrete(
            logits, generator=torch.Generator(device), rng_state=rng_state(device=device)
        )
    with pytest.raises(ValueError, match=r"^binary_concrete_log_prob: tau must be positive"):
        binary_concrete_log_prob(torch.zeros(3), torch.zeros(3), torch.tensor(-1.0))
