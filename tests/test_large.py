"""Beyond 2^31 elements: positions, offsets and counts are 64 bits wide everywhere."""

import os

import pytest
import torch
from oracle import assert_soft_close, condition, emulated, reference

import gumbel_ext
from gumbel_ext import _reference

BEYOND = 1 << 31


def reference_rows(logits_row, rows, state):
    """float64 ``(y, index)`` of single rows of an expanded matrix, at their own positions."""
    classes = logits_row.shape[-1]
    for row in rows:
        g = _reference.gumbel_noise([classes], state.cpu(), [row * classes, 1])
        yield row, g, reference(logits_row, 0.5, noise=g)


def free_memory():
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(emulated, reason="minutes")
def test_index_of_many_rows(device, state):
    """Rows on both sides of position 2^31; nothing of that size is stored."""
    classes = 4099
    rows = BEYOND // classes + 1000
    row = torch.randn(classes).to(device, torch.float16)
    index = gumbel_ext.gumbel_argmax(row.expand(rows, classes), rng_state=state).cpu()
    edge = BEYOND // classes
    for i, _, (_, expected) in reference_rows(
        row, (0, 1, edge - 1, edge, edge + 1, rows - 1), state
    ):
        assert index[i] == expected, i


@pytest.mark.cpu_only(reason="a row on CUDA has at most 2^31 - 17 classes")
def test_index_within_a_long_row(device, state):
    """Only the last classes of one row may be chosen: index and positions need 32 bits."""
    classes, allowed = BEYOND + (1 << 15), 1 << 15
    mask = torch.zeros(classes, dtype=torch.bool, device=device)
    mask[-allowed:] = True
    logits = torch.zeros((), dtype=torch.bfloat16, device=device).expand(classes)
    index = gumbel_ext.gumbel_argmax(logits, mask=mask, rng_state=state)
    g = _reference.gumbel_noise([allowed], state.cpu(), [classes - allowed, 1])
    assert index == classes - allowed + int(g.argmax())


@pytest.mark.skipif(emulated, reason="minutes")
def test_index_over_an_inner_dimension(device, state):
    inner = 3
    outer = BEYOND // (1000 * inner) + 10
    column = torch.randn(1, 1000, 1).to(device, torch.bfloat16)
    index = gumbel_ext.gumbel_argmax(column.expand(outer, 1000, inner), 1, rng_state=state).cpu()
    for i in (0, outer - 11, outer - 1):
        g = _reference.gumbel_noise([1000, inner], state.cpu(), [i * 1000 * inner, inner, 1])
        expected = _reference.gumbel_argmax(
            column[0].cpu().double().expand(1000, inner), 0, noise=g
        )
        assert torch.equal(index[i], expected)


@pytest.mark.slow
def test_soft_and_hard_forward_and_backward(device, state):
    """4.3 GB a tensor in 16 bits: the output, the incoming gradient and the gradient."""
    if device == "cpu" and free_memory() < 18 << 30:
        pytest.skip("needs 18 GB of free memory")
    classes = 4099
    rows = BEYOND // classes + 100
    row = torch.randn(classes).to(device, torch.bfloat16)
    leaf = row.expand(rows, classes).requires_grad_()
    grad_row = torch.randn(classes).to(device, torch.bfloat16)
    edge = BEYOND // classes
    wanted = (0, edge - 1, edge, edge + 1, rows - 1)
    for hard in (False, True):
        y, index = gumbel_ext.gumbel_softmax(leaf, 0.5, hard, return_index=True, rng_state=state)
        (gradient,) = torch.autograd.grad(y, leaf, grad_row.expand(rows, classes))
        for i, g, (expected, expected_index) in reference_rows(row, wanted, state):
            assert index[i] == expected_index
            if hard:
                assert y[i].sum() == 1
                assert y[i, expected_index] == 1
            else:
                assert_soft_close(y[i], expected, condition(row, g, 0.5))
            slope = expected * (
                grad_row.double().cpu() - (expected * grad_row.double().cpu()).sum()
            )
            torch.testing.assert_close(
                gradient[i].double().cpu(), slope / 0.5, rtol=0.05, atol=1e-4
            )
        del y, gradient
