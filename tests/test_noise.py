"""Noise: a pure function of (seed, offset, position), accurate everywhere, finite always."""

import math

import mpmath
import numpy as np
import pytest
import torch
from oracle import (
    DTYPES,
    accumulation_eps,
    default_rng_state,
    eps,
    noise,
    rng_state,
    runs_cpu_kernels,
)

import gumbel_ext
from gumbel_ext import _C, _reference

WORD = 0xFFFFFFFF
TAIL = 1 << 20

SIZES = {
    "scalar": (),
    "one": (1,),
    "odd": (7,),
    "vector": (1025,),
    "matrix": (33, 65),
    "large": (3, 70001),
    "four_dims": (2, 3, 5, 7),
    "empty": (0,),
    "empty_inside": (4, 0, 3),
}


# ---- the value ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_equals_reference(device, state, size, dtype):
    actual = gumbel_ext.gumbel_noise(size, dtype=dtype, device=device, rng_state=state)
    assert actual.shape == size
    assert actual.dtype == dtype
    assert actual.device.type == device
    assert actual.is_contiguous()
    expected = noise(size)
    # Half a unit of the output's rounding, and a few of the arithmetic's; the GPU's logarithm is
    # half as exact.
    few = 4 if runs_cpu_kernels(device) else 8
    allowed = 0.5 * eps(dtype) * expected.abs() + few * accumulation_eps(
        dtype
    ) * expected.abs().clamp(min=1)
    assert ((actual.cpu().double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_float32_rounded_once(device, state, dtype):
    single = gumbel_ext.gumbel_noise((1 << 16), dtype=torch.float32, device=device, rng_state=state)
    half = gumbel_ext.gumbel_noise((1 << 16), dtype=dtype, device=device, rng_state=state)
    assert torch.equal(half, single.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_depends_on_position_alone(device, state, dtype, thread_count):
    """Not on the shape, nor on what else is drawn in the call, nor on the threads that draw it."""

    def draw(*size):
        return gumbel_ext.gumbel_noise(size, dtype=dtype, device=device, rng_state=state)

    whole = draw(70001)
    for size in ((70000,), (7, 10000), (35, 4, 500), (2, 5, 7, 10, 100), (69999,), (13,), (1, 1)):
        part = draw(*size).flatten()
        assert torch.equal(part, whole[: part.numel()])
    for threads in (1, 2, 7):
        thread_count(threads)
        assert torch.equal(draw(70001), whole)


def test_size_may_be_a_number(device, state):
    assert torch.equal(
        gumbel_ext.gumbel_noise(5, device=device, rng_state=state),
        gumbel_ext.gumbel_noise((5,), device=device, rng_state=state),
    )


def test_dtype_defaults_to_the_default_dtype(device):
    assert gumbel_ext.gumbel_noise(3, device=device).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert gumbel_ext.gumbel_noise(3, device=device).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


# ---- accuracy of the kernels' own maths on words of our choice ----------------------------------


def words(kind, count=1 << 17):
    source = np.random.default_rng(5)
    anywhere = source.integers(0, 1 << 32, count)
    if kind == "anywhere":
        hi = anywhere
    elif kind == "below_tail_edge":
        hi = TAIL - 1 - np.arange(2000)
    elif kind == "above_tail_edge":
        hi = TAIL + np.arange(2000)
    elif kind == "middle":
        hi = (1 << 31) + np.arange(-1000, 1000)
    elif kind == "every_magnitude":
        hi = anywhere >> source.integers(0, 32, count)
    else:
        assert kind == "zero"
        hi = np.zeros(count, np.int64)
    lo = source.integers(0, 1 << 32, hi.size)
    lo >>= source.integers(0, 32, hi.size) if kind == "zero" else 0
    lo[:3] = 0, WORD, 1
    return torch.from_numpy(hi), torch.from_numpy(lo)


WORD_KINDS = (
    "anywhere",
    "below_tail_edge",
    "above_tail_edge",
    "middle",
    "every_magnitude",
    "zero",
)


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("complement", [False, True], ids=("near_0", "near_1"))
@pytest.mark.parametrize("kind", WORD_KINDS)
def test_gumbel_from_words(kind, complement, dtype):
    hi, lo = words(kind)
    if complement:
        hi, lo = WORD - hi, WORD - lo
    actual = _C.gumbel_from_words(hi, lo, dtype)
    assert actual.dtype == dtype
    assert actual.isfinite().all()
    expected = _reference.gumbel(hi, lo)
    allowed = 3 * eps(dtype) * expected.abs().clamp(min=1)
    if dtype == torch.float32:
        # Outside the tails float32 reads hi alone: v is known to 2^-33, at least 2^-12 of it.
        in_tail = (hi < TAIL) | (hi >= (1 << 32) - TAIL)
        v = (hi.double() + 0.5) * 2.0**-32
        rate = 1 / ((1 - v) * -torch.log1p(-v))  # |dg/dv|
        allowed = allowed + torch.where(in_tail, 0.0, rate * 2.0**-33)
        assert (allowed <= 8 * eps(dtype) * expected.abs().clamp(min=1)).all()
    error = (actual.double() - expected).abs()
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), f"hi, lo = {int(hi[worst])}, {int(lo[worst])}"


def exact_gumbel(hi, lo):
    with mpmath.workdps(60):
        v = (mpmath.mpf(hi) * 2**32 + lo + mpmath.mpf(1) / 2) / mpmath.mpf(2) ** 64
        return -mpmath.log(-mpmath.log1p(-v))


@pytest.mark.cpu_only
@pytest.mark.parametrize("source", ["compiled", "reference"])
def test_float64_against_sixty_digits(source):
    cases = []
    for kind in WORD_KINDS:
        hi, lo = words(kind, 400)
        cases += [*zip(hi.tolist(), lo.tolist(), strict=True)][:60]
    cases += [(0, 0), (0, WORD), (0, 1 << 31), (1, 0), (TAIL, 0), (TAIL - 1, WORD), (1 << 31, 0)]
    cases += [(WORD - hi, WORD - lo) for hi, lo in cases]
    hi, lo = torch.tensor(cases).T
    if source == "compiled":
        actual = _C.gumbel_from_words(hi.contiguous(), lo.contiguous(), torch.float64)
    else:
        actual = _reference.gumbel(hi, lo)
    for value, case in zip(actual.tolist(), cases, strict=True):
        exact = exact_gumbel(*case)
        assert abs(value - exact) <= 3 * eps(torch.float64) * max(1, abs(exact)), case


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_end_points(dtype):
    """The smallest and the largest v there are: noise reaches -3.8 and 45, and no infinity."""
    hi, lo = torch.tensor([0, WORD]), torch.tensor([0, WORD])
    smallest_v, largest_v = _C.gumbel_from_words(hi, lo, dtype).tolist()
    assert smallest_v == pytest.approx(65 * math.log(2), rel=eps(dtype))
    assert largest_v == pytest.approx(-math.log(65 * math.log(2)), rel=2 * eps(dtype))


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_monotone_across_the_tail_edges(dtype):
    """Where float32 begins to read the second word nothing jumps."""
    hi = torch.cat([edge + torch.arange(-3000, 3000) for edge in (TAIL, (1 << 32) - TAIL)])
    noise = _C.gumbel_from_words(hi, torch.full_like(hi, 1 << 31), dtype)
    down = noise.diff()[torch.arange(len(hi) - 1) != 5999]
    slack = 2 * eps(dtype) * noise.abs().max()
    assert (down <= slack).all()


# ---- the generator ------------------------------------------------------------------------------


def calls(device, generator):
    """Every kind of call, each of them one draw."""
    logits = torch.randn(4, 6, device=device, generator=torch.Generator(device).manual_seed(0))
    leaf = logits.clone().requires_grad_()
    tau = torch.tensor(0.5, device=device, requires_grad=True)
    yield "soft", lambda: gumbel_ext.gumbel_softmax(logits, generator=generator)
    yield "hard", lambda: gumbel_ext.gumbel_softmax(logits, hard=True, generator=generator)
    yield (
        "with_index",
        lambda: gumbel_ext.gumbel_softmax(logits, return_index=True, generator=generator),
    )
    yield "argmax", lambda: gumbel_ext.gumbel_argmax(logits, generator=generator)
    yield "masked", lambda: gumbel_ext.gumbel_softmax(logits, mask=logits > 0, generator=generator)
    yield "other_dim", lambda: gumbel_ext.gumbel_softmax(logits, dim=0, generator=generator)
    yield "large", lambda: gumbel_ext.gumbel_argmax(logits.repeat(300, 90), generator=generator)
    yield "scalar", lambda: gumbel_ext.gumbel_softmax(logits[0, 0], generator=generator)
    for dtype in DTYPES:
        yield (
            f"soft_{dtype}",
            lambda dtype=dtype: gumbel_ext.gumbel_softmax(logits.to(dtype), generator=generator),
        )
        yield (
            f"noise_{dtype}",
            lambda dtype=dtype: gumbel_ext.gumbel_noise(
                (3, 5), dtype=dtype, device=device, generator=generator
            ),
        )
    for hard in (False, True):
        yield (
            f"backward_{hard}",
            lambda hard=hard: (
                gumbel_ext.gumbel_softmax(leaf, tau, hard, generator=generator)
                .square()
                .sum()
                .backward()
            ),
        )


def test_every_call_advances_alike(device):
    generator = torch.Generator(device).manual_seed(3)
    start = generator.get_state()
    gumbel_ext.gumbel_noise(1, device=device, generator=generator)
    expected = generator.get_state()
    assert not torch.equal(start, expected)
    for name, call in calls(device, generator):
        generator.set_state(start)
        call()
        assert torch.equal(generator.get_state(), expected), name


@pytest.mark.cpu_only(reason="the CPU generator")
def test_one_draw_of_the_cpu_generator():
    """One ``random64()``: what ``random_`` over the whole of int64 draws, too."""
    drawn, used = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    for _ in range(5):
        seed = torch.empty((), dtype=torch.int64).random_(-(1 << 63), None, generator=drawn)
        _, _, state = torch.ops.gumbel_ext.gumbel_softmax(
            torch.zeros(2, 3), 1.0, None, False, -1, None, False, used, None
        )
        assert state.tolist() == [int(seed), 0]
        assert torch.equal(drawn.get_state(), used.get_state())


def test_generator_noise_is_that_of_the_state_it_reports(device):
    logits = torch.zeros(5, 7, dtype=torch.float64, device=device)
    for generator in (None, torch.Generator(device).manual_seed(1)):
        y, _, state = torch.ops.gumbel_ext.gumbel_softmax(
            logits, 1.0, None, False, -1, None, False, generator, None
        )
        assert state.dtype == torch.int64
        assert state.shape == (2,)
        again = gumbel_ext.gumbel_softmax(logits, rng_state=state)
        assert torch.equal(y, again)


def test_empty_calls_do_not_advance(device, hard):
    generator = torch.Generator(device).manual_seed(3)
    before = generator.get_state()
    empty = torch.zeros(0, 3, device=device)
    gumbel_ext.gumbel_softmax(empty, hard=hard, generator=generator)
    gumbel_ext.gumbel_argmax(empty, generator=generator)
    gumbel_ext.gumbel_noise((2, 0), device=device, generator=generator)
    assert torch.equal(generator.get_state(), before)


def test_stateless_form_reads_no_generator(device, state):
    before = default_rng_state(device)
    logits = torch.zeros(3, 4, device=device)
    for _ in range(2):
        gumbel_ext.gumbel_softmax(logits, rng_state=state)
        gumbel_ext.gumbel_argmax(logits, rng_state=state)
        gumbel_ext.gumbel_noise(3, device=device, rng_state=state)
    assert torch.equal(default_rng_state(device), before)
    assert torch.equal(state.cpu(), rng_state())


def test_rng_state_may_have_any_stride(device, state):
    spread = torch.zeros(4, dtype=torch.int64, device=device)
    spread[::2] = rng_state(device=device)
    assert torch.equal(
        gumbel_ext.gumbel_noise(9, device=device, rng_state=spread[::2]),
        gumbel_ext.gumbel_noise(9, device=device, rng_state=state),
    )


def test_saved_state_repeats_the_draws(device):
    generator = torch.Generator(device).manual_seed(11)
    gumbel_ext.gumbel_noise(3, device=device, generator=generator)
    saved = generator.get_state()
    draws = [gumbel_ext.gumbel_noise(9, device=device, generator=generator) for _ in range(3)]
    generator.set_state(saved)
    for draw in draws:
        assert torch.equal(gumbel_ext.gumbel_noise(9, device=device, generator=generator), draw)
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])


def test_default_generator_follows_manual_seed(device):
    def draw():
        return gumbel_ext.gumbel_noise((3, 4), device=device)

    torch.manual_seed(5)
    first, second = draw(), draw()
    torch.manual_seed(5)
    assert torch.equal(draw(), first)
    assert torch.equal(draw(), second)
    assert not torch.equal(first, second)
    torch.manual_seed(6)
    assert not torch.equal(draw(), first)
    own = torch.Generator(device).manual_seed(5)
    assert torch.equal(gumbel_ext.gumbel_noise((3, 4), device=device, generator=own), first)


def test_other_draws_interleave(device):
    """A call takes its numbers from the stream: what follows it is new, and still reproducible."""

    def follow(seed):
        generator = torch.Generator(device).manual_seed(seed)
        gumbel_ext.gumbel_noise(3, device=device, generator=generator)
        return torch.rand(5, device=device, generator=generator)

    assert torch.equal(follow(1), follow(1))
    plain = torch.rand(5, device=device, generator=torch.Generator(device).manual_seed(1))
    assert not torch.equal(follow(1), plain)


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        ((-1,), (ValueError, RuntimeError), "-1"),
        ((3, -2), (ValueError, RuntimeError), "-2"),
        ((2.5,), TypeError, "size|2.5"),
        ("3", TypeError, "size|3"),
        (None, TypeError, "size|None"),
    ],
)
def test_bad_sizes(device, size, error, message):
    with pytest.raises(error, match=message):
        gumbel_ext.gumbel_noise(size, device=device)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_bad_dtypes(device, dtype):
    with pytest.raises(TypeError, match=r"dtype|floating"):
        gumbel_ext.gumbel_noise((3,), dtype=dtype, device=device)
