"""Choices without noise on a GPU: values and gradients, the same bits in every run, no waiting."""

import pytest
import torch
from oracle import DTYPES, accumulation_eps, eps, misaligned, row_shape, smallest

from gumbel_ext import _reference, soft_argmax, straight_through_softmax

pytestmark = pytest.mark.cuda_only

OPS = torch.ops.gumbel_ext
# Part of a warp, a warp, a block; classes that are copied to be adjacent, and too many dimensions.
SHAPES = (
    ((37, 3), -1),
    ((33, 16), -1),
    ((19, 127), -1),
    ((5, 1025), -1),
    ((3, 100_003), -1),
    ((2, 40, 33), 1),
    ((70_001, 7), -1),
)


def train(logits, grad, tau, dim, mask=None):
    """Both functions and their gradients."""
    leaf, tau = logits.detach().requires_grad_(), tau.detach().requires_grad_()
    y, index = straight_through_softmax(leaf, tau, dim, mask=mask, return_index=True)
    expected = soft_argmax(leaf, tau, dim)
    of_rows = grad.select(dim, 0).to(expected.dtype)
    return (
        y.detach(),
        index,
        expected.detach(),
        *torch.autograd.grad(y, (leaf, tau), grad),
        *torch.autograd.grad(expected, (leaf, tau), of_rows),
    )


def draw(shape, dim, dtype):
    logits, grad = torch.randn(2, *shape).to(dtype)
    rows = row_shape(shape, dim)
    tau = 0.3 + torch.rand(rows).to(torch.promote_types(dtype, torch.float32))
    return logits, grad, tau, torch.rand(shape) < 0.7


def expected_results(logits, grad, tau, dim, mask=None):
    """What ``train`` returns, in float64."""
    leaf, tau = (t.detach().double().requires_grad_() for t in (logits, tau))
    y, index = _reference.straight_through_softmax(leaf, tau, dim, mask=mask)
    expected = _reference.soft_argmax(leaf, tau, dim)
    of_rows = grad.select(dim, 0).double()
    return (
        y.detach(),
        index,
        expected.detach(),
        *torch.autograd.grad(y, (leaf, tau), grad.double()),
        *torch.autograd.grad(expected, (leaf, tau), of_rows),
    )


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
def test_results_are_the_references(device, shape, dim, dtype):
    logits, grad, tau, mask = draw(shape, dim, dtype)
    theirs = expected_results(logits, grad, tau, dim, mask)
    for lay in (torch.Tensor.to, misaligned):
        ours = train(*(lay(t, device) for t in (logits, grad, tau)), dim, lay(mask, device))
        assert torch.equal(ours[0].cpu().double(), theirs[0])
        assert torch.equal(ours[1].cpu(), theirs[1])
        # Exponents are of size 12 / tau; a mean of positions is as exact as they are far apart.
        near, classes = 64 * accumulation_eps(dtype), shape[dim]
        for at, extent in ((2, classes), (3, 1), (4, 40), (5, classes), (6, 4 * classes)):
            size = extent * max(1, float(grad.abs().max())) / float(tau.min()) ** 2
            allowed = near * size + (2 * eps(dtype) * theirs[at].abs() if at in (3, 5) else 0)
            off = (ours[at].cpu().double() - theirs[at]).abs()
            assert (off <= allowed + smallest(dtype) * extent).all()


@pytest.mark.gpu_only(reason="CUDA graphs")
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
def test_runs_give_the_same_bits_and_graphs_too(device, shape, dim):
    arguments = [t.to(device) for t in draw(shape, dim, torch.float32)]
    logits, grad, tau, mask = arguments
    expected = train(logits, grad, tau, dim, mask)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        train(logits, grad, tau, dim, mask)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = train(logits, grad, tau, dim, mask)
    for _ in range(3):
        graph.replay()
        for a, b in zip(captured, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu_only(reason="waiting")
def test_host_never_waits(device):
    logits, grad, tau, mask = (t.to(device) for t in draw((40, 33), -1, torch.float32))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(logits, grad, tau, -1, mask)
        train(logits.mT, grad.mT, tau.mT, 0, mask.mT)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu_only(reason="on the CPU temperatures are looked at")
def test_values_that_cannot_raise_make_a_nan_row(device):
    """Temperatures, and what backward operators are told to read: the other rows are untouched."""
    logits, grad, tau, _ = (t.to(device) for t in draw((4, 2050), -1, torch.float32))
    good = train(logits, grad, tau, -1)
    bad_tau = tau.clone()
    bad_tau[1], bad_tau[2] = 0, torch.inf
    bad = train(logits, grad, bad_tau, -1)
    for ours, untouched in zip(bad[2:], good[2:], strict=True):
        assert ours[1:3].isnan().all()
        assert torch.equal(ours[::3], untouched[::3])
    with pytest.raises(ValueError, match="beta must be finite and not 0, got 0"):
        soft_argmax(logits, torch.tensor(0.0))

    index = good[1].clone()
    index[1] = 2050
    backward = OPS.straight_through_softmax_backward(
        grad, logits, index, 1.0, tau, -1, None, False
    )[0]
    assert backward[1].isnan().all()
    assert torch.equal(backward[2:], good[3][2:])
    positions = torch.arange(2050.0, device=device)[None]
    expected, state = OPS.soft_argmax(logits, 1.0, tau, -1, positions)
    state[1, 0] = 1e9
    backward = OPS.soft_argmax_backward(
        torch.ones_like(expected), logits, state, 1.0, tau, -1, positions, False
    )[0]
    assert backward[1].isnan().all()
    assert backward[2:].isfinite().all()


@pytest.mark.gpu_only(reason="memory statistics")
def test_nothing_but_the_results_is_stored(device):
    logits = torch.randn(64, 50_000, device=device, requires_grad=True).clone()
    grad = torch.randn_like(logits)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = straight_through_softmax(logits)
    results = y, torch.autograd.grad(y, logits, grad)
    of_size = logits.numel() * logits.element_size()
    # y and the gradient; the positions of one row and what is kept of rows are small beside them.
    assert torch.cuda.max_memory_allocated() - before < 2.1 * of_size
    del y, results
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(soft_argmax(logits).sum(), logits)
    assert torch.cuda.max_memory_allocated() - before < 1.1 * of_size
