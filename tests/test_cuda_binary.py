"""The binary concrete's kernels on a GPU against float64 on the same noise."""

import pytest
import torch
from oracle import DTYPES, eps, placed, relative_bound, rng_state, smallest

import gumbel_ext
from gumbel_ext import _reference

pytestmark = [pytest.mark.cuda_only, pytest.mark.sanitizer]

OPS = torch.ops.gumbel_ext
INF, NAN = float("inf"), float("nan")

# Less than a group, groups and a rest, several blocks; more than the grid has threads is gpu_only.
SHAPES = [(), (1,), (3,), (7,), (1025,), (33, 65), (2, 3, 5, 77), (70_001,)]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def wide_of(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def inputs(shape, dtype, device, unaligned=False):
    """``(logits, grad)``, made on the CPU and moved as they are."""
    return [placed(x, device, unaligned) for x in (2 * torch.randn(2, *shape)).to(dtype)]


def check(logits, grad, tau, hard, state):
    """Value and gradients; the slope from the smaller of y and 1 - y."""
    dtype, learned = logits.dtype, isinstance(tau, torch.Tensor)
    leaf = logits.detach().requires_grad_()
    temperature = tau.detach().requires_grad_() if learned else tau
    y = gumbel_ext.binary_concrete(leaf, temperature, hard, rng_state=state)
    actual = torch.autograd.grad(y, (leaf, temperature) if learned else (leaf,), grad)

    g = _reference.logistic_noise(logits.shape, rng_state())
    t = tau.detach().cpu().double() if learned else tau
    scores = logits.cpu().double() + g
    z = scores / t
    small = torch.special.expit(-z.abs())
    weight = grad.cpu().double()
    k = relative_bound(dtype, 1 + (logits.cpu().double().abs() + g.abs()) / t)
    floor = smallest(dtype) + smallest(torch.float32) * weight.abs() / t
    y = y.detach().cpu().double()
    if hard:
        clear = scores.abs() > 8 * eps(wide_of(dtype)) * (1 + g.abs())
        assert (~clear).sum() <= 1 + clear.numel() // 1000
        assert torch.equal(y[clear], (scores > 0).double()[clear])
    else:
        expected = torch.special.expit(z)
        assert ((y - expected).abs() <= k * expected + smallest(dtype)).all()
    expected = weight * small * (1 - small) / t
    error = (actual[0].cpu().double() - expected).abs()
    assert (error <= k * expected.abs() + floor).all()
    if learned:
        # Terms of both signs meet: the error is relative to their sizes. That of z is relative to
        # what it is the sum of.
        terms = (expected * z).expand(logits.shape)
        k = relative_bound(wide_of(dtype), 1 + (1 + logits.cpu().double().abs() + g.abs()) / t)
        allowed = k * (terms.abs() + expected.abs()) + floor * z.abs()
        error = (actual[1].cpu().double() + terms.sum_to_size(tau.shape)).abs()
        assert (error <= allowed.sum_to_size(tau.shape)).all()


@every_dtype
@pytest.mark.parametrize("unaligned", [False, True], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_samples_and_gradients(device, state, hard, shape, unaligned, dtype):
    logits, grad = inputs(shape, dtype, device, unaligned)
    if unaligned:
        assert logits.data_ptr() % 16 != 0
    check(logits, grad, 0.67, hard, state)


@every_dtype
@pytest.mark.parametrize("tau_shape", [(), (6, 1), (81,), (6, 81)], ids=str)
def test_temperatures_of_any_shape(device, state, hard, tau_shape, dtype):
    logits, grad = inputs((6, 81), dtype, device)
    tau = (torch.rand(tau_shape) + 0.3).to(device, wide_of(dtype))
    check(logits, grad, tau, hard, state)


@every_dtype
def test_operands_that_lie_otherwise(device, state, hard, dtype):
    """Expanded, transposed, with gaps: read where they are, or copied."""
    logits, grad = (x.view(12, 6, 10) for x in inputs((720,), dtype, device))
    for laid in (
        logits.mT.contiguous().mT,
        logits[:1].expand(12, 6, 10),
        logits[:, :, :1].expand(12, 6, 10),
        logits[:, :1, :1].expand(12, 6, 10),
        logits[:, ::2],
    ):
        check(laid, grad[:, : laid.shape[1]].flip(0), 0.5, hard, state)


@every_dtype
@pytest.mark.parametrize(
    ("shape", "positions"),
    [((1001,), [3, 1]), ((7, 33), [5, 70, 1]), ((4, 3, 11), [0, 1, 44, 4]), ((50,), [9, 0])],
    ids=str,
)
def test_parts_of_a_tensor(device, state, hard, shape, positions, dtype):
    logits, grad = inputs(shape, dtype, device)
    g = _reference.logistic_noise(shape, rng_state(), positions)
    noise = OPS.logistic_noise(logits, shape, None, state, positions)[0].cpu().double()
    wide = 8 * eps(wide_of(dtype)) * g.abs().clamp(min=1)
    assert ((noise - g).abs() <= wide + eps(dtype) * g.abs()).all()
    y, used = OPS.binary_concrete(logits, 0.5, None, hard, None, state, positions)
    assert torch.equal(used, state)
    gradient, _ = OPS.binary_concrete_backward(grad, logits, 0.5, None, used, False, positions)
    z = (logits.cpu().double() + g) / 0.5
    k = relative_bound(dtype, 1 + z.abs() + 4 * g.abs())
    small = torch.special.expit(-z.abs())
    expected = grad.cpu().double() * small * (1 - small) / 0.5
    error = (gradient.cpu().double() - expected).abs()
    assert (error <= k * expected.abs() + 4 * smallest(dtype)).all()
    clear = z.abs() > 1e-4
    if hard:
        assert torch.equal(y.cpu().double()[clear], (z > 0).double()[clear])
    else:
        error = (y.cpu().double() - torch.special.expit(z)).abs()
        assert (error <= k * torch.special.expit(z) + smallest(dtype)).all()


@every_dtype
@pytest.mark.parametrize("count", [1, 4, 1003])
def test_noise(device, state, count, dtype):
    noise = gumbel_ext.logistic_noise(count, dtype=dtype, device=device, rng_state=state)
    g = _reference.logistic_noise((count,), rng_state())
    wide = 8 * eps(wide_of(dtype)) * g.abs().clamp(min=1)
    assert ((noise.cpu().double() - g).abs() <= wide + eps(dtype) * g.abs()).all()


def test_bad_temperatures_in_a_tensor_are_nan(device, state):
    """To raise would be to wait for the GPU.  Other elements are untouched."""
    logits, grad = inputs((6, 9), torch.float32, device)
    good = torch.full((6, 1), 0.5, device=device)
    bad = good.clone()
    bad[1:] = torch.tensor([0.0, -1.0, NAN, INF, -INF], device=device).view(5, 1)
    found = []
    for tau in (good, bad):
        leaf = logits.detach().requires_grad_()
        y = gumbel_ext.binary_concrete(leaf, tau, rng_state=state)
        found.append((y.detach(), *torch.autograd.grad(y, leaf, grad)))
    for ours, untouched in zip(found[1], found[0], strict=True):
        assert ours[1:].isnan().all()
        assert torch.equal(ours[0], untouched[0])


@pytest.mark.gpu_only(reason="millions of elements")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_elements_than_threads(device, state, hard, dtype):
    logits, grad = (torch.randn(150_000_007, device=device).to(dtype) for _ in range(2))
    leaf = logits.requires_grad_()
    y = gumbel_ext.binary_concrete(leaf, 0.5, hard, rng_state=state)
    (gradient,) = torch.autograd.grad(y, leaf, grad)
    part = slice(149_000_001, 150_000_007)
    positions = [part.start, 1]
    x = logits.detach()[part]
    expected = OPS.binary_concrete(x, 0.5, None, hard, None, state, positions)[0]
    assert torch.equal(y.detach()[part], expected)
    expected, _ = OPS.binary_concrete_backward(grad[part], x, 0.5, None, state, False, positions)
    assert torch.equal(gradient[part], expected)
