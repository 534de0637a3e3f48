"""Noise positions of parts on a GPU, against the reference's noise there."""

import itertools

import pytest
import torch
from oracle import (
    DTYPES,
    assert_index_close,
    assert_one_hot,
    assert_row_errors,
    assert_soft_close,
    condition,
    eps,
    rng_state,
)

from gumbel_ext import _reference

pytestmark = [pytest.mark.cuda_only, pytest.mark.sanitizer]

OPS = torch.ops.gumbel_ext

# Shape, dim, positions. What two strides can describe and what needs a table; rows that begin
# inside a Philox block; classes that share none; one noise for all rows; far and negative ones.
PARTS = {
    "base": ((6, 40), -1, [24, 40, 1]),
    "base_amid_a_block": ((6, 40), -1, [25, 40, 1]),
    "odd_rows": ((6, 25), -1, [31, 100, 1]),
    "long": ((2, 9001), -1, [17, 20_000, 1]),
    "split": ((1, 20_003), -1, [5, 0, 1]),
    "middle": ((6, 2, 40), -1, [80, 200, 40, 1]),
    "table": ((5, 3, 4, 37), -1, [7, 2000, 500, 50, 1]),
    "table_of_columns": ((3, 21, 4, 10), 1, [70, 9000, 420, 70, 1]),
    "columns": ((3, 40, 33), 1, [9, 5000, 41, 1]),
    "strided_classes": ((9, 130), -1, [3, 1, 9]),
    "one_noise": ((9, 130), -1, [4, 0, 1]),
    "backwards": ((9, 130), -1, [1 << 40, -130, -1]),
}
every_part = pytest.mark.parametrize(("shape", "dim", "positions"), PARTS.values(), ids=PARTS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_dtype
@every_part
def test_samples_and_gradients(device, state, hard, shape, dim, positions, dtype):
    g = _reference.gumbel_noise(shape, rng_state(), positions)
    logits, grad = torch.randn(2, *shape).to(dtype)
    on_device = logits.to(device)
    y, index, used = OPS.gumbel_softmax(
        on_device, 0.5, None, hard, dim, None, True, None, state, positions
    )
    assert torch.equal(used, state)
    assert_index_close(index, logits, g, dim)
    alone = OPS.gumbel_argmax(on_device, dim, False, None, None, state, positions)
    assert torch.equal(alone, index)
    leaf = logits.double().requires_grad_()
    expected, _ = _reference.gumbel_softmax(leaf, 0.5, dim=dim, noise=g)
    if hard:
        assert_one_hot(y, index, dim)
        gradient, _ = OPS.gumbel_softmax_hard_backward(
            grad.to(device), on_device, index, 0.5, None, dim, None, used, False, positions
        )
    else:
        assert_soft_close(y, expected.detach(), condition(logits, g, 0.5, dim))
        gradient, _ = OPS.gumbel_softmax_backward(grad.to(device), y, index, 0.5, None, dim, False)
    (wanted,) = torch.autograd.grad(expected, leaf, grad.double())
    assert_row_errors(gradient, wanted, logits, grad, 0.5, g, dim, slack=4.0)


@every_dtype
@every_part
def test_noise(device, state, shape, dim, positions, dtype):
    like = torch.empty(0, dtype=dtype, device=device)
    ours = OPS.gumbel_noise(like, shape, None, state, positions)
    expected = _reference.gumbel_noise(shape, rng_state(), positions)
    error = (ours.cpu().double() - expected).abs()
    wide = 8 * eps(torch.promote_types(dtype, torch.float32)) * expected.abs().clamp(min=1)
    assert (error <= wide + eps(dtype) * expected.abs()).all()


@every_dtype
def test_noise_at_single_positions(device, state, dtype):
    position = torch.randint(0, 1 << 62, (3, 101))
    position[0, :5] = torch.arange(5)
    like = torch.empty(0, dtype=dtype, device=device)
    for laid in (position, position.mT.contiguous().mT, position[:, ::2]):
        ours = OPS.noise_at(like, laid.to(device), state)
        expected = _reference.gumbel(*_reference.random_words(laid, rng_state()))
        error = (ours.cpu().double() - expected).abs()
        wide = 8 * eps(torch.promote_types(dtype, torch.float32)) * expected.abs().clamp(min=1)
        assert (error <= wide + eps(dtype) * expected.abs()).all()


@every_dtype
@every_part
def test_classes_without_replacement(device, state, shape, dim, positions, dtype):
    """The first of them, and the order of all."""
    g = _reference.gumbel_noise(shape, rng_state(), positions)
    logits = torch.randn(shape).to(dtype)
    index = OPS.gumbel_topk(logits.to(device), 3, dim, None, None, state, positions).cpu()
    scores = logits.double() + g
    chosen = scores.gather(dim, index)
    size = (logits.double().abs() + g.abs()).amax()
    near = 8 * eps(torch.promote_types(dtype, torch.float32)) * size
    best = scores.topk(3, dim).values
    assert ((best - chosen).abs() <= near).all()
    for a, b in itertools.combinations(range(3), 2):
        assert (index.select(dim, a) != index.select(dim, b)).all()
