"""The backwards of the estimators on a GPU against float64 on the same noise."""

import pytest
import torch
from oracle import (
    DTYPES,
    condition,
    eps,
    misaligned,
    relative_bound,
    rng_state,
    row_error,
    smallest,
)

from gumbel_ext import _reference

pytestmark = pytest.mark.cuda_only

OPS = torch.ops.gumbel_ext

# What csrc/cuda/plan.cpp tells apart: parts of a warp, warps, blocks, and rows that
# are not held; rows that begin amid a Philox block.
SHAPES = [(1, 1), (37, 3), (64, 16), (41, 31), (20, 64), (9, 70), (5, 513), (6, 1000), (3, 4096)]
SHAPES += [(3, 4099), (2, 9000)]
KINDS = ("gumbel_rao", "zgr", "reinmax", "gapped", "gapped_by_probability")


def backward(kind, grad, logits, index, tau, dim, mask, state, draws=7):
    number, tensor = (1.0, tau) if isinstance(tau, torch.Tensor) else (tau, None)
    if kind == "gumbel_rao":
        return OPS.gumbel_rao_backward(grad, logits, index, number, tensor, draws, dim, mask, state)
    if kind == "zgr":
        return OPS.zgr_backward(grad, logits, index, dim, mask)
    if kind == "reinmax":
        return OPS.reinmax_backward(grad, logits, index, number, tensor, dim, mask)
    gap = 1.0 if kind == "gapped" else None
    return OPS.gapped_straight_through_backward(grad, logits, index, number, tensor, gap, dim, mask)


def assert_on_both(device, kind, grad, logits, index, tau, dim=-1, mask=None, draws=7):
    """Both devices round logarithms and sums of float32, whatever the dtype of the operands."""
    state = rng_state()
    theirs = backward(kind, grad, logits, index, tau, dim, mask, state, draws).double()
    moved = [
        t.to(device) if isinstance(t, torch.Tensor) else t
        for t in (grad, logits, index, tau, mask, state)
    ]
    grad_, logits_, index_, tau_, mask_, state_ = moved
    out = backward(kind, grad_, logits_, index_, tau_, dim, mask_, state_, draws)
    assert out.stride() == torch.empty_like(logits_).stride()
    ours = out.cpu().double()
    least = float(tau.min()) if isinstance(tau, torch.Tensor) else tau
    finite = logits.double().nan_to_num(0, 0, 0)
    computed = torch.float64 if logits.dtype == torch.float64 else torch.float32
    room = eps(computed) * (8 + 8 * float(finite.abs().max() + 10) / min(least, 1.0))
    room *= 1 + float(grad.double().abs().max()) / min(least, 1.0)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert (
        torch.equal(ours == 0, theirs == 0)
        or float((ours - theirs).abs().nan_to_num().max()) <= room
    )
    error = (ours - theirs).abs().nan_to_num()
    assert (error <= room + 2 * eps(logits.dtype) * theirs.abs().nan_to_num()).all()


def expected_gradient(kind, grad, logits, index, tau, dim, mask, draws):
    leaf = logits.double().requires_grad_()
    tau = tau.double() if isinstance(tau, torch.Tensor) else tau
    if kind == "gumbel_rao":
        y = _reference.gumbel_rao(leaf, index, tau, draws, rng_state(), dim, mask=mask)
    elif kind == "zgr":
        y = _reference.zgr(leaf, index, dim, mask=mask)
    elif kind == "reinmax":
        y = _reference.reinmax(leaf, index, tau, dim, mask=mask)
    else:
        gap = 1.0 if kind == "gapped" else None
        y = _reference.gapped_straight_through(leaf, index, tau, gap, dim, mask=mask)
    return torch.autograd.grad(y, leaf, grad.double())[0]


def assert_is_the_references(
    device, kind, grad, logits, index, tau, dim=-1, mask=None, draws=7, lay=torch.Tensor.to
):
    """The target for gradients; noise of a draw is hardly ever above 15.

    The float64 reference does not shift the gradient, so that terms of the size of the gradient
    cancel in it: that rounding is no error of the kernels.  Nor is underflow.
    """
    expected = expected_gradient(kind, grad, logits, index, tau, dim, mask, draws)
    moved = [
        lay(t, device) if isinstance(t, torch.Tensor) else t
        for t in (grad, logits, index, tau, mask, rng_state())
    ]
    ours = backward(kind, *moved[:4], dim, *moved[4:], draws)
    assert ours.dtype == logits.dtype
    assert ours.stride() == torch.empty_like(moved[1]).stride()
    size = grad.double().abs().amax(dim, keepdim=True)
    tau = torch.as_tensor(tau, dtype=torch.float64)
    floor = 16 * eps(torch.float64) * size + 4 * smallest(logits.dtype) * (1 + size)
    k = condition(logits, torch.full(logits.shape, 15.0).double(), tau, dim)
    error = row_error(ours, expected, dim, floor / tau.clamp(max=1))
    assert (error <= relative_bound(logits.dtype, k)).all()


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lay", [torch.Tensor.to, misaligned], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_backward(device, kind, shape, lay, dtype):
    grad, logits = torch.randn(2, *shape).to(dtype)
    index = sampled_index(logits)
    of_rows = 0.1 + torch.rand(shape[0], 1).to(torch.promote_types(dtype, torch.float32))
    tau = 0.7 if lay is misaligned else of_rows
    draws = 7 if shape[1] < 100 else 2  # the reference takes its time
    assert_is_the_references(device, kind, grad, logits, index, tau, draws=draws, lay=lay)


def sampled_index(logits, dim=-1, mask=None):
    scores = logits.double()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    index = (scores + torch.randn(logits.shape, dtype=torch.float64)).argmax(dim)
    return index if mask is None else index.masked_fill(~mask.any(dim), -1)


@pytest.mark.sanitizer
@pytest.mark.parametrize("kind", KINDS)
def test_layouts_and_masks(device, kind):
    for shape, dim in (((6, 11, 5), 1), ((4, 700, 3), 1), ((9, 13), 0)):
        logits, grad = torch.randn(shape), torch.randn(shape)
        mask = torch.rand(shape) < 0.6
        mask.movedim(dim, -1)[0] = False
        for values, g in ((logits, grad), (logits[..., :1].expand(shape), grad[:1].expand(shape))):
            index = sampled_index(values, dim, mask)
            assert_is_the_references(device, kind, g, values, index, 0.5, dim, mask)


@pytest.mark.gpu_only(reason="compares two devices")
@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_softmax(device, kind):
    logits, grad = torch.randn(2, 6, 9)
    logits[1, 4] = torch.nan
    logits[2, 3] = torch.inf
    logits[3] = -torch.inf
    logits[4, ::2] = -torch.inf
    index = torch.tensor([1, 4, 3, 0, 1, 2])
    assert_on_both(device, kind, grad, logits, index, 0.5)


@pytest.mark.gpu_only(reason="compares two devices")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "draws"), [((3, 40), 1000), ((2, 4100), 1100)], ids=str)
def test_many_draws(device, shape, draws, dtype):
    """More than a team has threads, and than the sums of which a block has room for."""
    grad, logits = torch.randn(2, *shape).to(dtype)
    assert_on_both(device, "gumbel_rao", grad, logits, sampled_index(logits), 0.5, draws=draws)


def test_probabilities_that_are_no_number(device):
    """At large temperatures classes count whose probability underflows."""
    logits, grad = 60 * torch.randn(8, 33), torch.randn(8, 33)
    index = logits.argmax(-1)
    for kind in KINDS:
        assert_is_the_references(device, kind, grad, logits, index, 30.0)


@pytest.mark.parametrize("shape", [(100, 10), (50, 512), (3, 5000)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_runs_give_the_same_bits(device, kind, shape):
    grad, logits = torch.randn(2, *shape, device=device)
    index = logits.argmax(-1)
    state = rng_state(device=device)
    first, second = (backward(kind, grad, logits, index, 0.5, -1, None, state) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.gpu_only(reason="memory statistics")
def test_memory_is_that_of_the_gradient(device):
    logits = torch.randn(512, 1024, device=device)
    index, state = logits.argmax(-1), rng_state(device=device)
    backward("gumbel_rao", logits, logits, index, 0.5, -1, None, state, 100)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = backward("gumbel_rao", logits, logits, index, 0.5, -1, None, state, 100)
    assert torch.cuda.max_memory_allocated() - before <= out.nbytes + 4096
