"""One state, whatever the device: the CPU's noise to the bit, its choices, its gradients."""

import math

import pytest
import torch
from device_calls import DRAWING, OF_A_STATE, WITHOUT_NOISE, draw_inputs
from oracle import DTYPES, accumulation_eps, assert_index_close, device_and_cpu, eps, rng_state
from scipy import stats

import gumbel_ext
from gumbel_ext import _reference

OPS = torch.ops.gumbel_ext
ALPHA = 1e-4
pytestmark = pytest.mark.cuda_only

STATES = ((0, 0), (7, (1 << 64) - 1), ((1 << 64) - 5, 0xFFFFFFFF))
SHAPES = (((200_000, 10), -1), ((2000, 3001), -1), ((20, 500, 100), 1))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_shape = pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)


def on_both(device, function, *tensors):
    """What a function of tensors and a state gives here and on the CPU, to the CPU."""
    return [
        function(*(t.to(where) for t in tensors), rng_state().to(where)).cpu()
        for where in device_and_cpu(device)
    ]


# ---- noise --------------------------------------------------------------------------------------


def scattered(like, state):
    """Positions of a part of a middle dimension."""
    return OPS.gumbel_noise(like, (500, 20, 100), None, state, [300, 9000, 100, 1])


def single_positions(like, state):
    position = torch.arange(1_000_003, device=like.device) * 12345 - (1 << 40)
    return OPS.noise_at(like, position, state)


NOISE = {
    "gumbel": lambda like, state: OPS.gumbel_noise(like, (1_000_003,), None, state),
    "logistic": lambda like, state: OPS.logistic_noise(like, (1_000_003,), None, state)[0],
    "scattered": scattered,
    "at_positions": single_positions,
}


@pytest.mark.parametrize("kind", NOISE)
@pytest.mark.parametrize(("seed", "offset"), STATES)
def test_noise_words_are_the_cpus(device, record_property, kind, seed, offset):
    """Float64 noise tells every word apart, so equal noise means equal words."""
    ours, theirs = (
        NOISE[kind](
            torch.empty(0, dtype=torch.float64, device=where), rng_state(seed, offset, where)
        ).cpu()
        for where in device_and_cpu(device)
    )
    # Logistic noise is a difference of two logarithms.
    units = 4 if kind == "logistic" else 1
    unit = eps(torch.float64) * theirs.abs().clamp(min=1)
    assert ((ours - theirs).abs() <= units * unit).all()
    same = (ours == theirs).double().mean().item()
    record_property(f"least share of {kind} float64 noise with the same bits", same)
    assert same > (0.9 if kind == "logistic" else 0.99)


@pytest.mark.parametrize("kind", NOISE)
def test_float32_noise_is_the_cpus_to_a_few_units(device, kind):
    ours, theirs = on_both(device, NOISE[kind], torch.empty(0))
    unit = eps(torch.float32) * theirs.abs().clamp(min=1)
    assert ((ours - theirs).abs() <= 8 * unit).all()


# ---- choices ------------------------------------------------------------------------------------


def record_share(record_property, ours, theirs, one_in=20_000):
    """Counts what differs, for the report; asserts how much may, and one besides."""
    differ = int((ours != theirs).sum())
    record_property("choices", theirs.numel())
    record_property("choices that differ from the CPU's", differ)
    assert differ <= 1 + theirs.numel() // one_in
    return differ


@every_dtype
@every_shape
def test_indices_are_the_cpus(device, record_property, shape, dim, dtype):
    """But for near-ties, of which there is one in 10^5 rows or fewer."""
    logits = torch.randn(shape).to(dtype)

    def choose(x, state):
        return gumbel_ext.gumbel_argmax(x, dim, rng_state=state)

    ours, theirs = on_both(device, choose, logits)
    if record_share(record_property, ours, theirs):
        g = _reference.gumbel_noise(shape, rng_state(device=device)).cpu()
        assert_index_close(ours, logits, g, dim)


@every_dtype
@every_shape
def test_masked_indices_are_the_cpus(device, record_property, shape, dim, dtype):
    logits, mask = torch.randn(shape).to(dtype), torch.rand(shape) < 0.5

    def choose(x, allowed, state):
        return gumbel_ext.gumbel_argmax(x, dim, mask=allowed, rng_state=state)

    record_share(record_property, *on_both(device, choose, logits, mask))


@every_dtype
@pytest.mark.parametrize("k", [8, 100], ids=["rounds", "sorted"])
def test_sets_of_classes_are_the_cpus(device, record_property, k, dtype):
    """Of near-ties two classes change places: of the best hundred, neighbours are 0.01 apart."""
    logits = torch.randn(3000, 400).to(dtype)

    def choose(x, state):
        return gumbel_ext.gumbel_topk(x, k, rng_state=state)

    one_in = 20_000 if k < 10 else 1000
    record_share(record_property, *on_both(device, choose, logits), one_in)


@every_dtype
def test_many_samples_of_a_row_are_the_cpus(device, record_property, dtype):
    logits = torch.randn(20, 1001).to(dtype)

    def choose(x, state):
        return gumbel_ext.gumbel_argmax(x, num_samples=5000, rng_state=state)

    record_share(record_property, *on_both(device, choose, logits))


@every_dtype
def test_binary_choices_are_the_cpus(device, record_property, dtype):
    logits = torch.randn(1_000_003).to(dtype)

    def choose(x, state):
        return gumbel_ext.binary_concrete(x, 0.5, hard=True, rng_state=state)

    ours, theirs = on_both(device, choose, logits)
    record_share(record_property, ours, theirs)
    differ = ours != theirs
    g = _reference.logistic_noise(logits.shape, rng_state())[differ]
    scores = logits.double()[differ] + g
    assert (scores.abs() <= 8 * accumulation_eps(dtype) * (1 + g.abs())).all()


# ---- values and gradients -----------------------------------------------------------------------


def test_values_and_gradients_are_the_cpus(device):
    """With one state, whatever the device: a model that moves keeps its samples."""
    logits, grad = torch.randn(2, 500, 300)
    results = []
    for where in device_and_cpu(device):
        leaf = logits.to(where).requires_grad_()
        for hard in (False, True):
            y = gumbel_ext.gumbel_softmax(leaf, 0.5, hard, rng_state=rng_state())
            results.append(y.detach().cpu())
            results.append(torch.autograd.grad(y, leaf, grad.to(where))[0].cpu())
    for ours, theirs in zip(results[:4], results[4:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["last", "middle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", [*OF_A_STATE, *WITHOUT_NOISE])
def test_every_operator_gives_what_the_cpu_does(device, name, dtype, where):
    """Choices are equal: twelve rows have no near-tie."""
    x = draw_inputs(where, dtype)
    results = []
    for place in device_and_cpu(device):
        state = {} if name in WITHOUT_NOISE else {"rng_state": rng_state(device=place)}
        call = WITHOUT_NOISE.get(name) or OF_A_STATE[name]
        results.append([t.cpu() for t in call(x.to(place), **state)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        if ours.is_floating_point():
            size = float(theirs.abs().nan_to_num(0, 0, 0).max())
            near = 2048 * eps(dtype)
            torch.testing.assert_close(
                ours, theirs, rtol=near, atol=near * max(size, 1.0), equal_nan=True
            )
        else:
            assert torch.equal(ours, theirs)


@pytest.mark.gpu_only(reason="where a tensor lies")
@pytest.mark.parametrize("where", ["last", "middle"])
@pytest.mark.parametrize("name", DRAWING)
def test_a_state_may_lie_on_the_cpu(device, name, where):
    x = draw_inputs(where).to(device)
    call = DRAWING[name]
    ours, theirs = (call(x, rng_state=rng_state(device=place)) for place in (device, "cpu"))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


# ---- the tail -----------------------------------------------------------------------------------


@pytest.mark.gpu_only(reason="10^11 words of noise")
def test_long_tail(device):
    """A head 20.5 above 262,143 tails loses 32.8 times in 100,000 draws, for every way to ask.

    Noise that stops at 16.7 never lets a tail win.  The number of wins is Poisson; the interval has
    alpha = ALPHA, and 0 has probability 6e-15 in truth.
    """
    classes, gap, draws, rows = 1 << 18, 20.5, 100_000, 2000
    expected = draws * (classes - 1) / (classes - 1 + math.exp(gap))
    low, high = stats.poisson.interval(1 - ALPHA, expected)
    assert low > 1

    def soft(logits, state):
        return gumbel_ext.gumbel_softmax(logits, return_index=True, rng_state=state)[1]

    def hard(logits, state):
        return gumbel_ext.gumbel_softmax(logits, hard=True, return_index=True, rng_state=state)[1]

    def index(logits, state):
        return gumbel_ext.gumbel_argmax(logits, rng_state=state)

    for number, (way, dtype) in enumerate(
        [(index, torch.float32), (index, torch.bfloat16), (hard, torch.float32), (soft, torch.half)]
    ):
        logits = torch.zeros(rows, classes, dtype=dtype, device=device)
        logits[:, 0] = gap
        winners = [way(logits, rng_state(number, 2 * i, device)) for i in range(draws // rows)]
        winners = torch.cat(winners)
        tails = winners[winners != 0].double() / classes
        assert low <= tails.numel() <= high, (way.__name__, dtype)
        assert stats.kstest(tails.cpu().numpy(), "uniform").pvalue > ALPHA
