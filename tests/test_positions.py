"""Noise positions: a part of a larger tensor draws the noise that it has in the whole."""

import pytest
import torch
from oracle import DTYPES, assert_index_close, layouts, rng_state, runs_cpu_kernels

import gumbel_ext._reference as reference

OPS = torch.ops.gumbel_ext


def contiguous_strides(shape):
    strides = [1] * len(shape)
    for d in reversed(range(len(shape) - 1)):
        strides[d] = strides[d + 1] * shape[d + 1]
    return strides


def part_of(whole, slices):
    """The part, and its positions within the whole."""
    strides = contiguous_strides(whole.shape)
    base = sum(s.start * stride for s, stride in zip(slices, strides, strict=True))
    return whole[slices], [base, *strides]


# Whole shape, slices of the part.
PARTS = {
    "first_dim": ((6, 4, 40), (slice(3, 5), slice(0, 4), slice(0, 40))),
    "middle_dim": ((6, 5, 40), (slice(0, 6), slice(2, 4), slice(0, 40))),
    "last_dim": ((6, 5, 40), (slice(0, 6), slice(0, 5), slice(13, 30))),
    "corner": ((7, 5, 83), (slice(2, 5), slice(1, 4), slice(19, 82))),
    "one_of_each": ((7, 5, 9), (slice(2, 3), slice(1, 2), slice(4, 5))),
    "one_of_last": ((7, 70, 9), (slice(2, 5), slice(1, 69), slice(4, 5))),
    "long": ((2, 9000), (slice(1, 2), slice(17, 8990))),
    "images": ((2, 5, 6, 70), (slice(0, 2), slice(0, 5), slice(1, 5), slice(0, 70))),
    "image_columns": ((2, 21, 6, 70), (slice(0, 2), slice(0, 21), slice(1, 5), slice(3, 69))),
}


@pytest.fixture(params=PARTS, ids=str)
def part(request):
    shape, slices = PARTS[request.param]
    return torch.randn(shape), slices


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_of_a_part(device, state, part, dtype):
    whole = OPS.gumbel_noise(torch.empty(0, dtype=dtype, device=device), part[0].shape, None, state)
    expected, positions = part_of(whole, part[1])
    actual = OPS.gumbel_noise(whole, expected.shape, None, state, positions)
    assert torch.equal(actual, expected)


def test_reference_noise_of_a_part(state, part):
    whole = reference.gumbel_noise(part[0].shape, state)
    expected, positions = part_of(whole, part[1])
    assert torch.equal(reference.gumbel_noise(expected.shape, state, positions), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_samples_of_a_part(device, state, hard, part, dtype):
    """In every layout and dimension: forward, backward, index.

    Bit for bit those of the op on the whole tensor, where the classes are not cut. On CUDA sizes
    and layout decide how many threads share a row, and thereby the order of its sums, so that only
    what takes no sum has the same bits: noise, indices and hard samples.
    """
    shape, slices = part[0].shape, part[1]
    bound = 4 * torch.finfo(dtype).eps + 2e-5 * (dtype != torch.float64)

    def assert_same(actual, expected, bound, what):
        if runs_cpu_kernels(device):
            assert torch.equal(actual, expected), what
        else:
            torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)

    whole = part[0].to(device, dtype)
    weight = torch.randn(shape).to(device, dtype)
    for dim in range(len(shape)):
        cut, positions = part_of(whole, slices)
        uncut = slices[dim] == slice(0, shape[dim])
        if uncut:
            leaf = whole.clone().requires_grad_()
            y, index, _ = OPS.gumbel_softmax(leaf, 0.6, None, hard, dim, None, True, None, state)
            (y * weight).sum().backward()
            rows = tuple(s for d, s in enumerate(slices) if d != dim)
            expected = y[slices], index[rows], leaf.grad[slices]
        else:
            scores = cut.to(torch.float64 if dtype == torch.float64 else torch.float32)
            scores = scores + OPS.gumbel_noise(scores, cut.shape, None, state, positions)
            noise = reference.gumbel_noise(cut.shape, state.cpu(), positions)
        for name, laid in layouts(cut):
            leaf = laid.detach().requires_grad_()
            y, index, used = OPS.gumbel_softmax(
                leaf, 0.6, None, hard, dim, None, True, None, state, positions
            )
            assert torch.equal(used.cpu(), state.cpu())
            only = OPS.gumbel_argmax(laid, dim, False, None, None, state, positions)
            assert torch.equal(only, index), (dim, name)
            if uncut:
                assert torch.equal(index, expected[1]), (dim, name)
            elif runs_cpu_kernels(device):
                assert torch.equal(index, scores.argmax(dim)), (dim, name)
            else:
                # There a kernel rounds logits + noise once, not twice.
                assert_index_close(index, laid, noise, dim)
            if hard:
                assert torch.equal(y.argmax(dim), index)
            (y * weight[slices]).sum().backward()
            if uncut:
                assert_same(y, expected[0], 0 if hard else bound, (dim, name))
                assert_same(leaf.grad, expected[2], 8 * bound, (dim, name))
            else:
                frozen = laid.detach().double().requires_grad_()
                z, _ = reference.gumbel_softmax(
                    frozen, 0.6, hard, dim, rng_state=state, positions=positions
                )
                (z * weight[slices].double()).sum().backward()
                torch.testing.assert_close(y.double(), z, rtol=bound, atol=bound)
                torch.testing.assert_close(
                    leaf.grad.double(), frozen.grad, rtol=8 * bound, atol=8 * bound
                )


def test_equal_noise_for_every_row(device, state, hard):
    """Stride 0: each row has the noise of the row alone.

    To the bit on CUDA too, where as many threads share a row of either.
    """
    logits = torch.randn(5, 3, 37, device=device)
    y, index, _ = OPS.gumbel_softmax(
        logits, 0.6, None, hard, -1, None, True, None, state, [0, 0, 37, 1]
    )
    for i in range(5):
        alone = OPS.gumbel_softmax(logits[i], 0.6, None, hard, -1, None, True, None, state)
        assert torch.equal(y[i], alone[0])
        assert torch.equal(index[i], alone[1])


def test_second_derivative_of_a_part(device, state, hard):
    logits = torch.randn(3, 7, dtype=torch.float64, device=device, requires_grad=True)
    positions = [1003, 50, 1]

    def sample(x):
        return OPS.gumbel_softmax(x, 0.7, None, hard, -1, None, False, None, state, positions)[0]

    weight = torch.randn_like(logits)

    def twice(function):
        (first,) = torch.autograd.grad((function(logits) * weight).sum(), logits, create_graph=True)
        return torch.autograd.grad(first.sin().sum(), logits)[0]

    expected = twice(
        lambda x: reference.gumbel_softmax(x, 0.7, hard, rng_state=state, positions=positions)[0]
    )
    torch.testing.assert_close(twice(sample), expected, rtol=1e-9, atol=1e-11)


def test_far_positions_and_negative_strides(device):
    state = rng_state(device=device)
    like = torch.empty(0, dtype=torch.float64, device=device)
    last = 2**62 - 1
    expected = reference.gumbel_noise((12,), state.cpu(), [last - 11, 1]).to(device)
    actual = OPS.gumbel_noise(like, (12,), None, state, [last - 11, 1])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)
    backwards = OPS.gumbel_noise(like, (12,), None, state, [last, -1])
    assert torch.equal(backwards.flip(0), actual)


@pytest.mark.parametrize("positions", [[], [0], [0, 1], [0, 3, 1, 1]], ids=str)
def test_wrong_number_of_positions(device, state, positions):
    logits = torch.randn(2, 3, device=device)
    message = r"positions must be \[base, one stride per dimension\], 3 numbers, got"
    with pytest.raises(ValueError, match=f"gumbel_softmax: {message}"):
        OPS.gumbel_softmax(logits, 1.0, None, False, -1, None, False, None, state, positions)
    with pytest.raises(ValueError, match=f"gumbel_argmax: {message}"):
        OPS.gumbel_argmax(logits, -1, False, None, None, state, positions)
    with pytest.raises(ValueError, match=f"gumbel_noise: {message}"):
        OPS.gumbel_noise(logits, (2, 3), None, state, positions)
