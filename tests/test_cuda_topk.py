"""Classes without replacement on a GPU: the k best of logits + noise, in order, in every regime."""

import pytest
import torch
from oracle import DTYPES, accumulation_eps, noise, placed, rng_state

import gumbel_ext
from gumbel_ext import _reference

pytestmark = [pytest.mark.cuda_only, pytest.mark.sanitizer]

INF, NAN = float("inf"), float("nan")

# Part of a warp, a warp, a block; and so many classes at once that scores are sorted.
SHAPES = {
    "one_class": ((5, 1), -1, (1,)),
    "part_of_a_warp": ((37, 13), -1, (1, 5, 13)),
    "part_of_a_warp_full": ((40, 64), -1, (3, 64)),
    "warp": ((9, 191), -1, (4, 64)),
    "block": ((3, 2049), -1, (1, 7)),
    "sorted": ((9, 191), -1, (65, 191)),
    "sorted_long": ((2, 3001), -1, (300,)),
    "inner": ((3, 50, 7), 1, (6, 50)),
    "first": ((70, 17), 0, (9, 70)),
}
every_shape = pytest.mark.parametrize(("shape", "dim", "counts"), SHAPES.values(), ids=SHAPES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_best(index, logits, k, g, dim, mask=None):
    """In the order of the scores, but for classes that the kernels' rounding cannot tell apart."""
    scores = logits.double() + g
    size = (torch.where(logits.isfinite(), logits.double(), 0.0).abs() + g.abs()).amax()
    if mask is not None:
        scores = scores.masked_fill(~mask, -INF)
    order = scores.sort(dim=dim, descending=True, stable=True)
    best = order.values.narrow(dim, 0, k)
    expected = torch.where(best == -INF, -1, order.indices.narrow(dim, 0, k))
    index = index.cpu()
    assert torch.equal(index < 0, expected < 0)
    chosen = scores.gather(dim, index.clamp(min=0)).masked_fill(index < 0, -INF)
    near = 8 * accumulation_eps(logits.dtype) * size
    assert ((best == chosen) | ((best - chosen).abs() <= near)).all()
    assert int((index != expected).sum()) <= 2 + index.numel() // 1000
    distinct = index.sort(dim).values.diff(dim=dim) != 0
    assert (distinct | (index.sort(dim).values.narrow(dim, 1, k - 1) < 0)).all()


@every_dtype
@pytest.mark.parametrize("unaligned", [False, True], ids=["aligned", "unaligned"])
@every_shape
def test_the_best_in_order(device, state, shape, dim, counts, unaligned, dtype):
    logits = (2 * torch.randn(shape)).to(dtype)
    laid = placed(logits, device, unaligned)
    if unaligned:
        assert laid.data_ptr() % 16 != 0
    for k in counts:
        index = gumbel_ext.gumbel_topk(laid, k, dim, rng_state=state)
        assert_best(index, logits, k, noise(shape), dim)
    first = gumbel_ext.gumbel_topk(laid, counts[0], dim, rng_state=state).narrow(dim, 0, 1)
    assert torch.equal(first, gumbel_ext.gumbel_argmax(laid, dim, True, rng_state=state))


@every_dtype
@every_shape
def test_masked_and_impossible_classes(device, state, shape, dim, counts, dtype):
    """Places that are left are -1."""
    logits, mask = torch.randn(shape).to(dtype), torch.rand(shape) < 0.4
    logits.movedim(dim, -1)[0, ..., ::2] = -INF
    mask.movedim(dim, -1)[-1] = False
    k = counts[-1]
    index = gumbel_ext.gumbel_topk(logits.to(device), k, dim, mask=mask.to(device), rng_state=state)
    assert (index < 0).any()
    assert_best(index, logits, k, noise(shape), dim, mask)


@every_dtype
@pytest.mark.parametrize(("classes", "k"), [(13, 5), (191, 20), (2049, 9), (191, 70)])
def test_ties_and_rows_with_nan(device, state, classes, k, dtype):
    """Of infinite scores the lowest index first; a NaN is the largest of all."""
    logits = torch.randn(4, classes).to(dtype)
    logits[0, 3:8] = INF
    logits[1, 6], logits[1, 2] = NAN, NAN
    logits[2] = -INF
    index = gumbel_ext.gumbel_topk(logits.to(device), k, rng_state=state).cpu()
    assert index[0, :5].tolist() == [3, 4, 5, 6, 7]
    assert index[1, :2].tolist() == [2, 6]
    assert (index[2] == -1).all()
    assert_best(index[3:], logits[3:], k, noise((4, classes))[3:], -1)


def test_log_probability(device, state):
    logits = torch.randn(9, 191).to(device).requires_grad_()
    index, log_prob = gumbel_ext.gumbel_topk(logits, 6, return_log_prob=True, rng_state=state)
    (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
    exact = logits.detach().cpu().double().requires_grad_()
    expected = 0.0
    left = exact
    for j in range(6):
        chosen = index[:, j : j + 1].cpu()
        expected = expected + left.gather(1, chosen).squeeze(1) - left.logsumexp(1)
        left = left.scatter(1, chosen, -INF)
    torch.testing.assert_close(
        log_prob.detach().cpu().double(), expected.detach(), rtol=1e-4, atol=1e-4
    )
    (wanted,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(gradient.cpu().double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu_only(reason="millions of elements")
@pytest.mark.parametrize("k", [3, 100], ids=["rounds", "sorted"])
@pytest.mark.parametrize("shape", [(200_001, 30), (3000, 1000), (40, 150_001)], ids=str)
def test_large(device, state, shape, k):
    """More rows than there are teams, which take several; the reference has time for three."""
    k = min(k, shape[1])
    logits = torch.randn(shape, device=device)
    rows = [0, shape[0] // 2, shape[0] - 1]
    index = gumbel_ext.gumbel_topk(logits, k, rng_state=state)
    g = torch.stack(
        [_reference.gumbel_noise(shape[1:], rng_state(), [row * shape[1], 1]) for row in rows]
    )
    assert_best(index[rows], logits[rows].cpu(), k, g, -1)
    first = gumbel_ext.gumbel_argmax(logits, rng_state=state)
    assert torch.equal(index[:, 0], first)
    again = gumbel_ext.gumbel_topk(logits, k, rng_state=state)
    assert torch.equal(index, again)
