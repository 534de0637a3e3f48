"""Whatever the shape, layout, dtype, dimension, temperature and mask: the reference's answer."""

import dataclasses
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    DTYPES,
    LAYOUTS,
    assert_rows_sum_to_one,
    assert_soft_close,
    condition,
    gradient_floor,
    reference,
    relative_bound,
    rng_state,
    row_error,
    row_shape,
)

import gumbel_ext
from gumbel_ext import _reference

# Sizes at which something changes: vectors of 4 to 16, unrolled loops, summation chunks.
SIZES = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 63, 64, 65, 130]))
LARGE = st.sampled_from([1, 2, 1023, 1024, 1025, 2050])
word = st.integers(0, (1 << 64) - 1)


@dataclasses.dataclass
class Problem:
    """What identifies a case; hypothesis prints it."""

    shape: tuple[int, ...]
    dim: int
    dtype: torch.dtype
    layout: str
    expanded: tuple[bool, ...]
    scale: float
    tau: float
    tau_shape: tuple[int, ...] | None
    mask_shape: tuple[int, ...] | None
    allowed: float
    data_seed: int
    seed: int
    offset: int

    def tensors(self, device):
        source = torch.Generator().manual_seed(self.data_seed)
        logits = (torch.randn(self.shape, generator=source) * self.scale).to(device, self.dtype)
        if any(self.expanded):
            slices = [slice(0, 1) if e else slice(None) for e in self.expanded]
            logits = logits[tuple(slices)].expand(self.shape)
        else:
            logits = LAYOUTS[self.layout](logits)
        tau = self.tau
        if self.tau_shape is not None:
            tau = tau * (0.5 + torch.rand(self.tau_shape, generator=source)).to(device)
        mask = None
        if self.mask_shape is not None:
            mask = (torch.rand(self.mask_shape, generator=source) < self.allowed).to(device)
        grad = torch.randn(self.shape, generator=source).to(device, self.dtype)
        return logits, tau, mask, grad, rng_state(self.seed, self.offset, device)


@st.composite
def problems(draw):
    shape = draw(st.lists(SIZES, min_size=1, max_size=4))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    if draw(st.integers(0, 3)) == 0:
        shape[dim] = draw(LARGE)
    others = [d for d in range(len(shape)) if d != dim % len(shape)]
    while math.prod(shape) > 30_000 and any(shape[d] > 1 for d in others):
        largest = max(others, key=lambda d: shape[d])
        shape[largest] = (shape[largest] + 1) // 2

    def some_of(sizes):
        return tuple(n if draw(st.booleans()) else 1 for n in sizes)

    rows = row_shape(shape, dim)
    return Problem(
        shape=tuple(shape),
        dim=dim,
        dtype=draw(st.sampled_from(DTYPES)),
        layout=draw(st.sampled_from([*LAYOUTS])),
        expanded=tuple(draw(st.booleans()) and draw(st.booleans()) for _ in shape),
        scale=draw(st.sampled_from([0.0, 1.0, 5.0, 100.0])),
        tau=draw(st.sampled_from([0.01, 0.1, 0.5, 1.0, 7.0])),
        tau_shape=draw(st.sampled_from([None, (), tuple(rows), some_of(rows)])),
        mask_shape=draw(st.sampled_from([None, some_of(shape)])),
        allowed=draw(st.sampled_from([0.0, 0.3, 0.9])),
        data_seed=draw(st.integers(0, 1 << 30)),
        seed=draw(word),
        offset=draw(word),
    )


@settings(max_examples=400)
@given(problem=problems(), hard=st.booleans())
def test_values_and_gradients(device, problem, hard):
    logits, tau, mask, grad, state = problem.tensors(device)
    dim = problem.dim
    noise = _reference.gumbel_noise(logits.shape, state.cpu())
    k = condition(logits, noise, tau, dim)
    dtype = logits.dtype

    leaf = logits.detach().requires_grad_()
    y, index = gumbel_ext.gumbel_softmax(
        leaf, tau, hard, dim=dim, mask=mask, return_index=True, rng_state=state
    )
    assert y.stride() == torch.empty_like(logits).stride()

    # The index, but for near-ties; where they differ the reference's row is not compared.
    expected_leaf = logits.detach().cpu().double().requires_grad_()
    expected_tau = tau.cpu() if isinstance(tau, torch.Tensor) else tau
    expected_mask = None if mask is None else mask.cpu()
    expected, expected_index = _reference.gumbel_softmax(
        expected_leaf, expected_tau, hard, dim, mask=expected_mask, noise=noise
    )
    same = index.cpu() == expected_index
    assert (~same).sum() <= 1 + same.numel() // 500
    rows = same.unsqueeze(dim)
    assert torch.equal(index, gumbel_ext.gumbel_argmax(logits, dim, mask=mask, rng_state=state))

    soft, _ = reference(logits, tau, dim=dim, mask=mask, noise=noise)
    if hard:
        assert torch.equal(torch.where(rows, y.cpu().double(), 0), torch.where(rows, expected, 0))
    else:
        assert_soft_close(y, soft, k)
        if mask is None:
            assert_rows_sum_to_one(y, dim)
    if mask is not None:
        assert (y[~mask.expand(y.shape)] == 0).all()

    (actual,) = torch.autograd.grad(y, leaf, grad)
    (wanted,) = torch.autograd.grad(expected, expected_leaf, grad.cpu().double())
    floor = gradient_floor(dtype, logits, grad, tau, noise, dim, mask)
    error = row_error(actual, wanted, dim, floor) / relative_bound(dtype, k)
    # The target is a percentile: rows whose terms cancel may lose a few digits more.
    assert (error > 1).sum() <= 1 + error.numel() // 100
    assert error.max() <= 30


@settings(max_examples=100)
@given(
    shape=st.lists(st.integers(0, 9), max_size=4),
    dtype=st.sampled_from(DTYPES),
    seed=word,
    offset=word,
)
def test_noise(device, shape, dtype, seed, offset):
    state = rng_state(seed, offset)
    actual = gumbel_ext.gumbel_noise(shape, dtype=dtype, device=device, rng_state=state)
    expected = _reference.gumbel_noise(shape, state)
    bound = relative_bound(dtype, 1.0) * expected.abs().clamp(min=1)
    assert actual.shape == tuple(shape)
    assert ((actual.cpu().double() - expected).abs() <= bound).all()


@settings(max_examples=200)
@given(
    value=st.lists(
        st.one_of(
            st.floats(width=32),
            st.sampled_from([float("nan"), float("inf"), float("-inf"), 3.4e38, -3.4e38, 1e-45]),
        ),
        min_size=1,
        max_size=40,
    ),
    tau=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    hard=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_float_at_all(device, value, tau, hard, dtype):
    """No logits and no temperature lead out of range; finite logits never give NaN."""
    logits = torch.tensor(value).to(device, dtype)
    y, index = gumbel_ext.gumbel_softmax(logits, tau, hard, return_index=True)
    assert 0 <= index < len(value)
    assert y.isnan().all() or not y.isnan().any()
    if logits.isfinite().all():
        assert y.isfinite().all()
        assert_rows_sum_to_one(y)
        if hard:
            assert y[index] == 1
    elif logits.isnan().any():
        assert y.isnan().all()
        assert index == int(logits.isnan().int().argmax())
