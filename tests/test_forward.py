"""Soft, hard and index against the float64 reference on the same noise."""

import math

import pytest
import torch
from oracle import (
    DTYPES,
    SIXTEEN_BIT,
    assert_index_close,
    assert_one_hot,
    assert_rows_sum_to_one,
    assert_soft_close,
    condition,
    eps,
    expanded,
    layouts,
    noise,
    reference,
    runs_cpu_kernels,
    smallest,
)

import gumbel_ext

# Sizes around vector widths, summation chunks and the limits between kernels.
SHAPES = {
    "scalar": ((), -1),
    "one_class": ((5, 1), -1),
    "one_class_inside": ((4, 1, 3), 1),
    "single_row": ((9,), 0),
    **{f"columns_{c}": ((37, c), -1) for c in (2, 3, 7, 8, 10, 15, 16, 17, 31, 33, 64, 65)},
    **{f"columns_{c}": ((5, c), -1) for c in (1023, 1024, 1025, 2047, 2048, 2049, 5000)},
    "one_long_row": ((1, 300_000), -1),
    "few_long_rows": ((3, 70_001), -1),
    "many_short_rows": ((5003, 8), -1),
    **{f"inner_{i}": ((3, 19, i), 1) for i in (1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 64, 65, 70)},
    "inner_of_an_image": ((2, 130, 9, 11), 1),
    "first_dim": ((33, 5, 13), 0),
    "first_dim_long": ((3001, 17), 0),
    "middle_dim_long": ((2, 1100, 37), -2),
    "last_of_five": ((2, 3, 2, 5, 12), -1),
    "third_of_five": ((2, 3, 40, 5, 2), 2),
}
EMPTY_SHAPES = {
    "no_rows": ((0, 5), -1),
    "no_inner": ((3, 5, 0), 1),
    "no_outer_first": ((5, 0), 0),
}


def draw(shape, dtype, device, scale=2.0):
    return (torch.randn(shape) * scale).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), SHAPES.values(), ids=SHAPES)
def test_equals_reference(device, state, shape, dim, dtype):
    logits = draw(shape, dtype, device)
    g = noise(shape)
    expected, _ = reference(logits, 0.7, dim=dim, noise=g)

    y, index = gumbel_ext.gumbel_softmax(logits, 0.7, dim=dim, return_index=True, rng_state=state)
    assert y.shape == logits.shape
    assert y.dtype == dtype
    assert y.device == logits.device
    assert_soft_close(y, expected, condition(logits, g, 0.7, dim) if shape else 1.0)
    assert_rows_sum_to_one(y, dim)

    assert index.shape == torch.Size(shape[:dim] + shape[dim:][1:])
    if shape:
        assert_index_close(index, logits, g, dim)

    hard, hard_index = gumbel_ext.gumbel_softmax(
        logits, 0.7, True, dim=dim, return_index=True, rng_state=state
    )
    assert hard.dtype == dtype
    assert torch.equal(hard_index, index)
    if shape:
        assert_one_hot(hard, index, dim)
    else:
        assert hard == 1

    # Without the index, and as the index alone, nothing else may change.
    assert torch.equal(gumbel_ext.gumbel_softmax(logits, 0.7, dim=dim, rng_state=state), y)
    assert torch.equal(gumbel_ext.gumbel_softmax(logits, 0.7, True, dim=dim, rng_state=state), hard)
    assert torch.equal(gumbel_ext.gumbel_argmax(logits, dim, rng_state=state), index)
    kept = gumbel_ext.gumbel_argmax(logits, dim, keepdim=True, rng_state=state)
    assert torch.equal(kept, index.unsqueeze(dim) if shape else index)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), EMPTY_SHAPES.values(), ids=EMPTY_SHAPES)
def test_empty(device, shape, dim, hard, dtype):
    logits = torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
    y, index = gumbel_ext.gumbel_softmax(logits, 0.5, hard, dim=dim, return_index=True)
    assert y.shape == logits.shape
    assert y.dtype == dtype
    assert index.shape == logits.argmax(dim).shape
    assert index.dtype == torch.int64
    y.sum().backward()
    assert logits.grad.shape == logits.shape
    assert gumbel_ext.gumbel_argmax(logits, dim).shape == index.shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((6, 35), -1), ((6, 35), 0), ((3, 17, 5), 1), ((2, 6, 5, 7), 1), ((2, 6, 5, 7), 3)],
    ids=str,
)
def test_every_layout(device, state, shape, dim, dtype):
    """Values follow the logical index; the memory format is the one ``empty_like`` would give."""
    logits = draw(shape, dtype, device)
    for name, laid in (*layouts(logits), *expanded(logits)):
        g = noise(shape)
        expected, _ = reference(laid, 0.5, dim=dim, noise=g)
        for hard in (False, True):
            y, index = gumbel_ext.gumbel_softmax(
                laid, 0.5, hard, dim=dim, return_index=True, rng_state=state
            )
            assert y.stride() == torch.empty_like(laid).stride(), name
            assert_index_close(index, laid, g, dim)
            if hard:
                assert_one_hot(y, index, dim)
            else:
                assert_soft_close(y, expected, condition(laid, g, 0.5, dim))
        assert torch.equal(gumbel_ext.gumbel_argmax(laid, dim, rng_state=state), index), name


@pytest.mark.parametrize("tau", [1e3, 10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_temperatures(device, state, dtype, tau):
    logits = draw((64, 50), dtype, device)
    g = noise(logits.shape)
    expected, _ = reference(logits, tau, noise=g)
    for given in (tau, torch.tensor(tau, dtype=torch.float64, device=device)):
        y = gumbel_ext.gumbel_softmax(logits, given, rng_state=state)
        assert_soft_close(y, expected, condition(logits, g, tau))
        assert_rows_sum_to_one(y)


@pytest.mark.parametrize("tau", [1e-10, 1e-30, 1e-38, 1e-40, 1.5e-45, 1e-60, 1e-300, 5e-324])
@pytest.mark.parametrize("dtype", DTYPES)
def test_smallest_temperatures_give_the_one_hot_limit(device, state, dtype, tau):
    """Eager gives NaN from 1e-40 on; below the normal numbers 1 / tau is infinite."""
    logits = draw((64, 50), dtype, device)
    y, index = gumbel_ext.gumbel_softmax(logits, tau, return_index=True, rng_state=state)
    assert_one_hot(y, index)
    y = gumbel_ext.gumbel_softmax(
        logits, torch.tensor(tau, dtype=torch.float64, device=device), rng_state=state
    )
    assert_one_hot(y, index)


@pytest.mark.parametrize("tau_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tau_tensor_of_any_dtype(device, state, dtype, tau_dtype):
    logits = draw((8, 20), dtype, device)
    tau = (0.3 + torch.rand(8, 1)).to(device, tau_dtype)
    g = noise(logits.shape)
    expected, _ = reference(logits, tau, noise=g)
    y = gumbel_ext.gumbel_softmax(logits, tau, rng_state=state)
    assert y.dtype == dtype
    assert_soft_close(y, expected, condition(logits, g, tau))


TAU_SHAPES = {
    "scalar": ((), (4, 6, 5), -1),
    "per_row": ((4, 6, 1), (4, 6, 5), -1),
    "per_outer": ((4, 1, 1), (4, 6, 5), -1),
    "per_inner_row": ((6, 1), (4, 6, 5), -1),
    "single": ((1,), (4, 6, 5), -1),
    "per_pixel": ((4, 1, 5), (4, 6, 5), 1),
    "per_column": ((1, 5), (4, 6, 5), 1),
    "first_dim": ((1, 6, 5), (4, 6, 5), 0),
    "first_dim_broadcast": ((6, 1), (4, 6, 5), 0),
    "scalar_of_scalar": ((), (), -1),
}


@pytest.mark.parametrize(("tau_shape", "shape", "dim"), TAU_SHAPES.values(), ids=TAU_SHAPES)
def test_tau_broadcasts(device, state, tau_shape, shape, dim, hard):
    logits = draw(shape, torch.float64, device)
    tau = 0.2 + torch.rand(tau_shape, dtype=torch.float64).to(device)
    expected, _ = reference(logits, tau, hard, dim, noise=noise(shape))
    y = gumbel_ext.gumbel_softmax(logits, tau, hard, dim=dim, rng_state=state)
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-12, atol=1e-15)


MASK_SHAPES = {
    "full": ((4, 30, 5), 1),
    "classes_last": ((5,), -1),
    "classes_inside": ((30, 1), 1),
    "per_outer": ((4, 30, 1), 1),
    "first": ((4, 1, 1), 0),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mask_shape", "dim"), MASK_SHAPES.values(), ids=MASK_SHAPES)
def test_mask(device, state, mask_shape, dim, dtype):
    shape = (4, 30, 5)
    logits = draw(shape, dtype, device)
    mask = torch.rand(mask_shape) < 0.6
    mask.view(-1)[0] = True
    mask.view(-1)[1] = False
    whole = mask.expand(shape)
    g = noise(shape)
    expected, expected_index = reference(logits, 0.5, dim=dim, mask=mask, noise=g)
    k = condition(logits, g, 0.5, dim)

    for given in (mask, whole, whole.contiguous(), whole.mT.contiguous().mT):
        given = given.to(device)
        y, index = gumbel_ext.gumbel_softmax(
            logits, 0.5, dim=dim, mask=given, return_index=True, rng_state=state
        )
        assert_soft_close(y, expected, k)
        assert (y.cpu()[~whole] == 0).all()
        close = index.cpu() == expected_index
        assert close.float().mean() > 0.99
        hard = gumbel_ext.gumbel_softmax(logits, 0.5, True, dim=dim, mask=given, rng_state=state)
        rows = index >= 0
        one_hot = torch.zeros_like(hard).scatter(dim, index.clamp(min=0).unsqueeze(dim), 1)
        assert torch.equal(hard, one_hot * rows.unsqueeze(dim).to(dtype))
        assert torch.equal(
            gumbel_ext.gumbel_argmax(logits, dim, mask=given, rng_state=state), index
        )


def test_all_true_mask_changes_nothing(device, state):
    logits = draw((40, 33), torch.float32, device)
    everything = torch.ones(33, dtype=torch.bool, device=device)
    assert torch.equal(
        gumbel_ext.gumbel_softmax(logits, mask=everything, rng_state=state),
        gumbel_ext.gumbel_softmax(logits, rng_state=state),
    )


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("shape", [(4000, 50), (20, 5000)], ids=str)
def test_sixteen_bit_index_is_that_of_float32(device, state, shape, dtype):
    """The choice is made before rounding: eager's differs in 1.5 % of bfloat16 rows."""
    logits = draw(shape, dtype, device)
    exact = gumbel_ext.gumbel_argmax(logits.float(), rng_state=state)
    assert torch.equal(gumbel_ext.gumbel_argmax(logits, rng_state=state), exact)
    for hard in (False, True):
        _, index = gumbel_ext.gumbel_softmax(logits, 10.0, hard, return_index=True, rng_state=state)
        assert torch.equal(index, exact)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_sixteen_bit_values_are_float32_rounded_once(device, state, dtype):
    logits = draw((100, 300), dtype, device)
    single = gumbel_ext.gumbel_softmax(logits.float(), 0.5, rng_state=state)
    half = gumbel_ext.gumbel_softmax(logits, 0.5, rng_state=state)
    if runs_cpu_kernels(device):
        assert torch.equal(half, single.to(dtype))
        return
    # A CUDA thread holds other classes of a row in 16 bits than in 32, and adds them up in another
    # order: where the last bit of float32 differs, a tie of the rounding may.
    assert (half == single.to(dtype)).float().mean() > 0.99
    torch.testing.assert_close(half, single.to(dtype), rtol=eps(dtype), atol=smallest(dtype))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_large_sixteen_bit_logits_over_small_tau(device, state, dtype):
    """``logits / tau`` leaves the range of float16; eager's rows are NaN."""
    logits = (torch.randn(64, 40) * 1e4).to(device, dtype)
    expected, expected_index = reference(logits, 0.1, noise=noise(logits.shape))
    y, index = gumbel_ext.gumbel_softmax(logits, 0.1, return_index=True, rng_state=state)
    assert torch.equal(index.cpu(), expected_index)
    assert_soft_close(y, expected, condition(logits, noise(logits.shape), 0.1))
    assert_rows_sum_to_one(y)


def test_ties_go_to_the_lowest_index(device, state):
    """Where the logits swallow the noise, every score is the same number."""
    for classes in (2, 17, 1025, 70001):
        logits = torch.full((3, classes), 2.0**40, device=device)
        logits[:, 0] = 0
        assert (gumbel_ext.gumbel_argmax(logits, rng_state=state) == 1).all()
        turned = logits.t().contiguous()
        assert (gumbel_ext.gumbel_argmax(turned, 0, rng_state=state) == 1).all()


def test_scores_are_never_rounded_probabilities(device, state):
    """At tau = 1e6 all probabilities round to the same number; the index does not care."""
    logits = draw((200, 30), torch.float32, device)
    _, index = gumbel_ext.gumbel_softmax(logits, 1e6, return_index=True, rng_state=state)
    assert_index_close(index, logits, noise(logits.shape))


def test_input_is_left_alone(device, state):
    logits = draw((5, 7), torch.float32, device)
    before = logits.clone()
    gumbel_ext.gumbel_softmax(logits, 0.5, True, rng_state=state)
    assert torch.equal(logits, before)
    assert math.isfinite(float(logits.sum()))
