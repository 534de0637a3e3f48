"""Kernels of the log-space sample and of the density on a GPU, against float64."""

import math

import pytest
import torch
from oracle import (
    DTYPES,
    accumulation_eps,
    condition,
    eps,
    noise,
    placed,
    relative_bound,
    rng_state,
    row_error,
    row_shape,
    smallest,
)

import gumbel_ext
from gumbel_ext import _reference

pytestmark = [pytest.mark.cuda_only, pytest.mark.sanitizer]

OPS = torch.ops.gumbel_ext
INF, NAN = float("inf"), float("nan")

# Four lanes, a warp, a block and rows that are read twice, with and without a rest; classes that
# are copied to be adjacent.
SHAPES = {
    "one_class": ((5, 1), -1),
    "lanes": ((41, 16), -1),
    "lanes_odd": ((37, 13), -1),
    "warp": ((9, 256), -1),
    "warp_odd": ((9, 33), -1),
    "block": ((5, 1000), -1),
    "block_odd": ((3, 1023), -1),
    "streamed": ((3, 3001), -1),
    "streamed_long": ((1, 20_003), -1),
    "inner": ((3, 50, 7), 1),
    "first": ((30, 17), 0),
}
every_shape = pytest.mark.parametrize(("shape", "dim"), SHAPES.values(), ids=SHAPES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
alignment = pytest.mark.parametrize("unaligned", [False, True], ids=["aligned", "unaligned"])


# ---- the log-space sample -----------------------------------------------------------------------


@every_dtype
@alignment
@every_shape
def test_log_sample_and_its_gradient(device, state, shape, dim, unaligned, dtype):
    cpu_logits, cpu_grad = torch.randn(2, *shape).to(dtype)
    logits, grad = placed(cpu_logits, device, unaligned), placed(cpu_grad, device, unaligned)
    cpu_tau = 0.4 + torch.rand(row_shape(shape, dim), dtype=torch.float64)
    leaf, tau = logits.requires_grad_(), cpu_tau.to(device).requires_grad_()
    log_y = gumbel_ext.gumbel_log_softmax(leaf, tau, dim, rng_state=state)
    dl, dt = torch.autograd.grad(log_y, (leaf, tau), grad)

    g, exact, t = noise(shape), cpu_logits.double().requires_grad_(), cpu_tau.requires_grad_()
    expected = _reference.gumbel_log_softmax(exact, t, dim, noise=g)
    wanted, wanted_tau = torch.autograd.grad(expected, (exact, t), cpu_grad.double())
    expected = expected.detach()
    k = condition(cpu_logits, g, cpu_tau, dim)
    allowed = 16 * k * accumulation_eps(dtype) + eps(dtype) * expected.abs()
    assert ((log_y.detach().cpu().double() - expected).abs() <= allowed).all()

    # Of terms of both signs there may be nothing left: those rows are told by their terms.
    size = cpu_grad.double().abs().sum(dim, keepdim=True) / cpu_tau.detach()
    floor = 4 * smallest(dtype) * (1 + size)
    off = (dl.cpu().double() - wanted).abs().amax(dim, keepdim=True)
    relative = row_error(dl, wanted, dim, floor) / relative_bound(dtype, k)
    of_terms = off / (relative_bound(dtype, k) * size + floor) * 8
    assert (torch.minimum(relative, of_terms) <= 1).all()
    terms = (expected.abs() * wanted.abs()).sum(dim, keepdim=True) / cpu_tau.detach()
    allowed = 8 * relative_bound(dtype, k) * (terms + size) + floor
    assert ((dt.cpu() - wanted_tau).abs() <= allowed).all()


@every_dtype
@pytest.mark.parametrize(("shape", "dim"), [((9, 13), -1), ((5, 1023), -1), ((3, 50, 7), 1)])
def test_masks_and_impossible_classes(device, state, shape, dim, dtype):
    logits, mask = torch.randn(shape).to(dtype), torch.rand(shape) < 0.6
    logits.movedim(dim, -1)[..., 1] = -INF
    mask.movedim(dim, -1)[..., 0] = True
    ours = gumbel_ext.gumbel_log_softmax(
        logits.to(device), 0.7, dim, mask=mask.to(device), rng_state=state
    )
    g = noise(shape)
    expected = _reference.gumbel_log_softmax(logits.double(), 0.7, dim, mask=mask, noise=g)
    assert torch.equal(ours.cpu() == -INF, expected == -INF)
    there = expected != -INF
    allowed = 16 * condition(logits, g, 0.7, dim) * accumulation_eps(dtype)
    allowed = (allowed + eps(dtype) * expected.abs().nan_to_num(0, 0, 0)).expand(shape)[there]
    assert ((ours.cpu().double() - expected)[there].abs() <= allowed).all()


@every_dtype
@pytest.mark.parametrize(
    ("shape", "dim", "positions"),
    [
        ((9, 33), -1, [2, 70, 1]),
        ((3, 4, 37), -1, [7, 500, 50, 1]),
        ((3, 40, 5), 1, [9, 900, 7, 1]),
        ((2, 3001), -1, [5, 4000, 1]),
        ((5, 2, 3, 9), -1, [1, 500, 200, 30, 1]),
    ],
    ids=str,
)
def test_log_samples_of_a_part(device, state, shape, dim, positions, dtype):
    logits = torch.randn(shape).to(dtype)
    ours, used = OPS.gumbel_log_softmax(
        logits.to(device), 0.7, None, dim, None, None, state, positions
    )
    assert torch.equal(used, state)
    g = _reference.gumbel_noise(shape, rng_state(), positions)
    expected = _reference.gumbel_log_softmax(logits.double(), 0.7, dim, noise=g)
    allowed = 16 * condition(logits, g, 0.7, dim) * accumulation_eps(dtype)
    error = (ours.cpu().double() - expected).abs()
    assert (error <= allowed + eps(dtype) * expected.abs()).all()


# ---- the density --------------------------------------------------------------------------------


@every_dtype
@alignment
@pytest.mark.parametrize("log_space", [False, True], ids=["simplex", "log"])
@every_shape
def test_density_and_its_gradients(device, shape, dim, log_space, unaligned, dtype):
    cpu_logits, tau = torch.randn(shape).to(dtype), 0.6
    log_y = _reference.gumbel_log_softmax(cpu_logits.double(), tau, dim, noise=noise(shape))
    cpu_value = (log_y if log_space else log_y.exp().clamp_min(1e-6)).to(dtype)
    value = placed(cpu_value, device, unaligned).requires_grad_()
    logits = placed(cpu_logits, device, unaligned).requires_grad_()
    t = torch.tensor(tau, device=device, dtype=torch.float64, requires_grad=True)
    density = gumbel_ext.concrete_log_prob(value, logits, t, dim, log_space=log_space)
    grad = torch.randn(density.shape).to(density)
    actual = torch.autograd.grad(density, (value, logits, t), grad)

    leaves = [x.double().requires_grad_() for x in (cpu_value, cpu_logits, torch.tensor(tau))]
    leaves[2] = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
    exact = _reference.concrete_log_prob(*leaves, dim, log_space)
    expected = torch.autograd.grad(exact, leaves, grad.cpu().double())
    x = (leaves[0] if log_space else leaves[0].log()).detach()
    u = leaves[1].detach() - tau * x
    n = shape[dim]
    spread = (u - u.amax(dim, keepdim=True)).abs() + u.abs().amax(dim, keepdim=True)
    terms = 1 + math.lgamma(n) + n * abs(math.log(tau)) + (spread + x.abs()).sum(dim)
    error = (density.detach().cpu().double() - exact.detach()).abs()
    assert (error <= 8 * accumulation_eps(dtype) * terms).all()

    # Of w = 1 - n p, p is rounded by its u; to the value comes the rest as it stands.
    p = u.softmax(dim)
    unit = 16 * accumulation_eps(dtype) * (1 + u.abs().amax(dim, keepdim=True))
    weight = grad.cpu().double().abs().unsqueeze(dim)
    of_w = unit * (1 + n * p) * weight
    most = torch.finfo(dtype).max
    allowed = of_w + eps(dtype) * expected[1].abs() + smallest(dtype)
    assert ((actual[1].cpu().double() - expected[1]).abs() <= allowed).all()
    of_x = unit * (1 + tau * (1 + n * p)) * weight
    of_value = of_x if log_space else of_x / leaves[0].detach()
    wanted = expected[0].clamp(-most, most)
    error = (actual[0].cpu().double().clamp(-most, most) - wanted).abs()
    assert (error <= of_value + eps(dtype) * wanted.abs() + smallest(dtype)).all()
    of_tau = (x.abs() * of_w + unit / tau * weight).sum()
    assert (actual[2].cpu() - expected[2]).abs() <= 2 * of_tau


@every_dtype
def test_densities_of_broadcast_operands(device, dtype):
    """Many samples of one set of logits: neither is expanded in memory."""
    for value_shape, logits_shape in (((30, 4, 13), (4, 13)), ((4, 13), (30, 4, 13))):
        value = torch.rand(value_shape, dtype=torch.float64).log_softmax(-1).to(dtype)
        logits = torch.randn(logits_shape).to(dtype)
        ours = gumbel_ext.concrete_log_prob(
            value.to(device), logits.to(device), 0.5, log_space=True
        )
        expected = _reference.concrete_log_prob(
            value.double(), logits.double(), 0.5, log_space=True
        )
        error = (ours.cpu().double() - expected).abs()
        assert (error <= 2000 * accumulation_eps(dtype)).all()


@pytest.mark.gpu_only(reason="on the CPU temperatures are looked at")
def test_bad_temperatures_in_a_tensor_make_nan_rows(device, state):
    logits = torch.randn(6, 40).to(device)
    good = torch.full((6, 1), 0.5, device=device)
    bad = good.clone()
    bad[1:] = torch.tensor([0.0, -1.0, NAN, INF, -INF], device=device).view(5, 1)
    value = logits.log_softmax(-1)
    for call in (
        lambda tau: gumbel_ext.gumbel_log_softmax(logits, tau, rng_state=state),
        lambda tau: gumbel_ext.concrete_log_prob(value, logits, tau, log_space=True),
    ):
        assert call(bad)[1:].isnan().all()
        assert torch.equal(call(bad)[0], call(good)[0])
