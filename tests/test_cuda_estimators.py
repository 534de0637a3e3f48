"""The CUDA backwards of the estimators against the CPU's on the same noise: what needs a GPU."""

import pytest
import torch
from oracle import DTYPES, eps, rng_state

pytestmark = pytest.mark.cuda_only

OPS = torch.ops.gumbel_ext

# What csrc/cuda/launch_estimators.cu tells apart: parts of a warp, warps, blocks, and rows that
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_backward_is_the_cpus(device, kind, shape, dtype):
    grad, logits = torch.randn(2, *shape).to(dtype)
    index = sampled_index(logits)
    assert_on_both(device, kind, grad, logits, index, 0.7)
    assert_on_both(device, kind, grad, logits, index, 0.1 + torch.rand(shape[0], 1).to(dtype))


def sampled_index(logits, dim=-1, mask=None):
    scores = logits.double()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    index = (scores + torch.randn(logits.shape, dtype=torch.float64)).argmax(dim)
    return index if mask is None else index.masked_fill(~mask.any(dim), -1)


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_and_masks(device, kind):
    for shape, dim in (((6, 11, 5), 1), ((4, 700, 3), 1), ((9, 13), 0)):
        logits, grad = torch.randn(shape), torch.randn(shape)
        mask = torch.rand(shape) < 0.6
        mask.movedim(dim, -1)[0] = False
        for values, g in ((logits, grad), (logits[..., :1].expand(shape), grad[:1].expand(shape))):
            index = sampled_index(values, dim, mask)
            assert_on_both(device, kind, g, values, index, 0.5, dim, mask)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_softmax(device, kind):
    logits, grad = torch.randn(2, 6, 9)
    logits[1, 4] = torch.nan
    logits[2, 3] = torch.inf
    logits[3] = -torch.inf
    logits[4, ::2] = -torch.inf
    index = torch.tensor([1, 4, 3, 0, 1, 2])
    assert_on_both(device, kind, grad, logits, index, 0.5)


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
        assert_on_both(device, kind, grad, logits, index, 30.0)


@pytest.mark.parametrize("shape", [(100, 10), (50, 512), (3, 5000)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_runs_give_the_same_bits(device, kind, shape):
    grad, logits = torch.randn(2, *shape, device=device)
    index = logits.argmax(-1)
    state = rng_state(device=device)
    first, second = (backward(kind, grad, logits, index, 0.5, -1, None, state) for _ in range(2))
    assert torch.equal(first, second)


def test_memory_is_that_of_the_gradient(device):
    logits = torch.randn(512, 1024, device=device)
    index, state = logits.argmax(-1), rng_state(device=device)
    backward("gumbel_rao", logits, logits, index, 0.5, -1, None, state, 100)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = backward("gumbel_rao", logits, logits, index, 0.5, -1, None, state, 100)
    assert torch.cuda.max_memory_allocated() - before <= out.nbytes + 4096
