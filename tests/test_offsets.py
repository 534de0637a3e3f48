"""Softmax does not change with an offset of its row, nor with classes that are far below.

Logits are multiples of 1/8 and offsets of 2^20 or less, so that shifted logits are the same
numbers exactly, in float32 too.  What draws noise rounds logits + noise at the offset; the others
round nothing.
"""

import pytest
import torch

import gumbel_ext
from gumbel_ext import _reference, gumbel_topk, relaxed_topk
from gumbel_ext.topk import _log_prob

EVERY_DTYPE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WIDE = (torch.float32, torch.float64)
CLASSES, ALLOWED = 12, 7

# What users write in the place of a mask.
FINITE = {"-1e4": -1e4, "-1e11": -1e11, "-1e30": -1e30, "lowest": None}


def finite_mask(logits, mask, kind):
    value = torch.finfo(logits.dtype).min if FINITE[kind] is None else FINITE[kind]
    return logits.masked_fill(~mask, max(value, torch.finfo(logits.dtype).min))


def sampler(function, *arguments, **keywords):
    """With the mask in its argument, a temperature and a state."""

    def call(logits, tau, mask, state):
        return function(logits, *arguments, tau=tau, mask=mask, rng_state=state, **keywords)

    return call


def estimator(function):
    """An estimator has no gradient in its temperature."""
    return lambda x, tau, mask, state: (
        function(x, tau.detach(), mask=mask, rng_state=state) + 0 * tau
    )


def masked(function):
    """Of an op without an argument for the mask."""

    def call(logits, tau, mask, state):
        return function(
            logits if mask is None else logits.masked_fill(~mask, -torch.inf), tau, state
        )

    return call


def codebook(logits):
    entries = torch.arange(float(CLASSES * 3)).view(CLASSES, 3).sin()
    return entries.to(logits.device, logits.dtype)


def embedding(hard):
    return lambda x, tau, mask, state: gumbel_ext.gumbel_embedding(
        x, codebook(x), tau, hard, mask=mask, rng_state=state
    )


ESTIMATORS = {
    "gumbel_rao": estimator(gumbel_ext.gumbel_rao),
    "zgr": lambda x, tau, mask, state: gumbel_ext.zgr(x, mask=mask, rng_state=state) + 0 * tau,
    "reinmax": estimator(gumbel_ext.reinmax),
    "gapped_straight_through": estimator(gumbel_ext.gapped_straight_through),
}
DRAWS = {
    **ESTIMATORS,
    "gumbel_softmax": sampler(gumbel_ext.gumbel_softmax),
    "gumbel_softmax, hard": sampler(gumbel_ext.gumbel_softmax, hard=True),
    "relaxed_topk": sampler(relaxed_topk, 3),
    "relaxed_topk, all": sampler(relaxed_topk, ALLOWED),
    "relaxed_topk, hard": sampler(relaxed_topk, 3, hard=True),
    "gumbel_log_softmax": masked(
        lambda x, tau, state: gumbel_ext.gumbel_log_softmax(x, tau, rng_state=state)[:, :ALLOWED]
    ),
    "gumbel_embedding": embedding(False),
    "gumbel_embedding, hard": embedding(True),
    "decoupled_gumbel_softmax": lambda x, tau, mask, state: gumbel_ext.decoupled_gumbel_softmax(
        x, 0.7, tau, mask=mask, rng_state=state
    ),
}
NOISELESS = {
    "straight_through_softmax": lambda x, tau, mask, state: gumbel_ext.straight_through_softmax(
        x, tau, mask=mask
    ),
    "soft_argmax": masked(lambda x, tau, state: gumbel_ext.soft_argmax(x, tau)),
    "soft_argmax_2d": masked(
        lambda x, tau, state: gumbel_ext.soft_argmax_2d(x.unflatten(-1, (3, 4)), tau.unsqueeze(-1))
    ),
    "gumbel_topk": lambda x, tau, mask, state: (
        _log_prob(x, ORDER.expand(x.shape[0], -1), 1, mask) + 0 * tau.squeeze(-1)
    ),
}
ORDER = torch.tensor([5, 0, 3, 2])


def inputs(dtype, mask):
    logits = (torch.randn(40, CLASSES, dtype=torch.float64) * 8).round() / 8
    if mask:
        logits[:, ALLOWED:] = 0
    tau = 0.5 + torch.rand(40, 1, dtype=torch.float64)
    allowed = (torch.arange(CLASSES) < ALLOWED).expand(40, CLASSES)
    return logits.to(dtype), tau.to(torch.promote_types(dtype, torch.float32)), allowed


def weighted(values):
    weight = torch.arange(values.numel()).remainder(7).sub(3).sin()
    return (values.double().flatten() * weight.to(values.device)).sum()


def with_gradients(call, logits, tau, mask, state):
    """``y``, its gradients and, but for estimators, those of their sum, each weighted."""
    of = logits.detach().requires_grad_(), tau.detach().requires_grad_()
    y = call(*of, mask, state)
    first = torch.autograd.grad(weighted(y), of, create_graph=True)
    second = ()
    if call not in ESTIMATORS.values():
        second = torch.autograd.grad(sum(map(weighted, first)), of, allow_unused=True)
    return [t.detach() for t in (y, *first, *second) if t is not None]


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("kind", FINITE)
@pytest.mark.parametrize("name", [*DRAWS, *NOISELESS])
def test_a_finite_mask_is_a_mask(name, kind, dtype, state):
    """Value and gradients, in the logits and in tau, of the classes that are allowed."""
    call = {**DRAWS, **NOISELESS}[name]
    logits, tau, mask = inputs(dtype, mask=True)
    expected = with_gradients(call, logits, tau, mask, state)
    actual = with_gradients(call, finite_mask(logits, mask, kind), tau, None, state)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("offset", [2.0**17, 2.0**20, -(2.0**20)])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("name", NOISELESS)
def test_an_offset_of_the_row_changes_nothing(name, dtype, offset, state):
    logits, tau, _ = inputs(dtype, mask=False)
    actual = with_gradients(NOISELESS[name], logits + offset, tau, None, state)
    expected = with_gradients(NOISELESS[name], logits, tau, None, state)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("offset", [2.0**17, 2.0**20, -(2.0**20)])
@pytest.mark.parametrize("name", DRAWS)
def test_an_offset_of_the_row_changes_what_rounding_the_noise_does(name, offset, state):
    """In float64 noise at 2^20 is rounded to 1e-10."""
    logits, tau, _ = inputs(torch.float64, mask=False)
    actual = with_gradients(DRAWS[name], logits + offset, tau, None, state)
    expected = with_gradients(DRAWS[name], logits, tau, None, state)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


# ---- against the definition


def finite_or_not(logits, allowed, kind):
    if kind == "-inf":
        return logits.masked_fill(~allowed, -torch.inf)
    return finite_mask(logits, allowed, kind)


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("kind", ["-inf", *FINITE])
@pytest.mark.parametrize("offset", [0.0, 1e5, 1e6, -1e6])
@pytest.mark.parametrize("k", [1, 4, ALLOWED, CLASSES - 1, CLASSES])
def test_log_prob_of_an_ordered_sample(device, k, offset, kind, dtype):
    """As exact as a log_softmax for each class drawn, those of the masked ones included."""
    offset = offset if dtype in WIDE else offset / 1e3
    logits = (torch.randn(20, CLASSES, dtype=torch.float64) + offset).to(device, dtype)
    logits = finite_or_not(logits, torch.arange(CLASSES, device=device) < ALLOWED, kind)
    logits.requires_grad_()
    index, log_prob = gumbel_topk(logits, k, return_log_prob=True)
    wide = logits.detach().cpu().double().requires_grad_()
    left = min(k, ALLOWED) if kind == "-inf" else k
    expected = _reference.ordered_log_prob(wide, index[:, :left].cpu())
    exact = dtype == torch.float64
    torch.testing.assert_close(
        log_prob.cpu().double(),
        expected,
        rtol=1e-13 if exact else 3e-6,
        atol=1e-12 if exact else 3e-6,
    )
    weight = torch.randn(20, dtype=torch.float64)
    (actual,) = torch.autograd.grad(log_prob, logits, weight.to(device, log_prob.dtype))
    (exact_gradient,) = torch.autograd.grad(expected, wide, weight)
    tolerance = 1e-12 if exact else 4 * torch.finfo(dtype).eps + 3e-6
    torch.testing.assert_close(
        actual.cpu().double(), exact_gradient, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("offset", [1e5, 1e6, -1e6])
@pytest.mark.parametrize("kind", ["-inf", *FINITE])
def test_relaxed_steps_at_an_offset(device, kind, offset):
    """Of the same noisy logits, which the offset has rounded, as in float64."""
    from gumbel_ext.topk import _relaxed

    scores = (torch.randn(20, CLASSES) + offset).to(device)
    allowed = torch.arange(CLASSES, device=device) < ALLOWED
    scores = finite_or_not(scores, allowed, kind).requires_grad_()
    tau = torch.tensor(0.7, device=device)
    wide = scores.detach().double().requires_grad_()
    there = scores.detach() != -torch.inf
    of = _relaxed(scores, there, 4, tau, 1), _relaxed(wide, there, 4, tau.double(), 1)
    torch.testing.assert_close(of[0], of[1].float())
    weight = torch.randn_like(wide)
    actual, expected = (
        torch.autograd.grad(y, x, weight.to(y.dtype))[0]
        for y, x in zip(of, (scores, wide), strict=True)
    )
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)
