"""ONNX: the exported model draws the noise of its rng_state, or fresh noise at every run."""

import functools
import logging
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from oracle import (
    assert_index_close,
    assert_one_hot,
    assert_soft_close,
    condition,
    noise,
    reference,
    rng_state,
)
from scipy import stats
from torch.export import Dim

import gumbel_ext
import gumbel_ext._reference
import gumbel_ext.onnx

pytestmark = pytest.mark.cpu_only(reason="onnxruntime runs on the CPU here")


def feature(name, *ops):
    return pytest.mark.feature(name, ops=ops, modes=("exported",))


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)


class Model(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def session_of(function, *inputs, dynamic_shapes=None, optimize=False):
    """The rewriting of the graph takes longer than all the rest and is left to one test."""
    program = torch.onnx.export(
        Model(function).eval(),
        inputs,
        dynamic_shapes=dynamic_shapes and (dynamic_shapes,),
        dynamo=True,
        verbose=False,
        optimize=optimize,
        custom_translation_table=gumbel_ext.onnx.translation_table(),
    )
    return onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def run(session, *inputs):
    names = [argument.name for argument in session.get_inputs()]
    arrays = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    return [torch.from_numpy(np.asarray(y)) for y in session.run(None, arrays)]


# ---- stateless: PyTorch's own results -----------------------------------------------------------

# Both words of seed and offset, a carry from the low to the high word of the offset, the largest.
STATES = [
    rng_state(),
    rng_state(0, 0),
    rng_state(7, 0xFFFFFFFF),
    rng_state(2**64 - 1, 2**64 - 1),
    rng_state(1 << 63, 1 << 63),
]


@feature("ONNX export, rng_state as an input", "gumbel_noise")
def test_noise_is_that_of_the_contract():
    session = session_of(
        lambda x, state: gumbel_ext.gumbel_noise(x.shape, dtype=torch.float64, rng_state=state),
        torch.zeros(3, 5),
        STATES[0],
        dynamic_shapes=({0: Dim("rows"), 1: Dim("columns")}, None),
    )
    for state in STATES:
        for shape in ((3, 5), (1, 1), (50, 41)):
            expected = gumbel_ext._reference.gumbel_noise(shape, state)
            (actual,) = run(session, torch.zeros(shape), state)
            # Words to the bit; a logarithm may round otherwise in the runtime.
            torch.testing.assert_close(actual, expected, rtol=4e-15, atol=4e-15)


@feature("ONNX export, rng_state as an input", "gumbel_noise")
def test_noise_is_exact_in_the_tails(monkeypatch):
    """Words of all ones and of all zeros: log(1 - v) alone would be infinite, or have no digits."""
    words = torch.tensor([0, 1, 2, 3, 1 << 10, 1 << 31, 2**32 - 2, 2**32 - 1])
    hi, lo = (w.flatten() for w in torch.meshgrid(words, words, indexing="ij"))

    def given(counter, key, shape):
        # Position n takes word n of either row; the pattern is as long as the tensor.
        return gumbel_ext.onnx._ints(torch.stack([hi, lo]).tolist())

    monkeypatch.setattr(gumbel_ext.onnx, "_philox4x32_10", given)
    session = session_of(
        lambda state: gumbel_ext.gumbel_noise(64, dtype=torch.float64, rng_state=state), STATES[0]
    )
    (actual,) = run(session, STATES[0])
    expected = gumbel_ext._reference.gumbel(hi, lo)
    torch.testing.assert_close(actual, expected, rtol=4e-15, atol=4e-15)
    assert expected.max() > 45
    assert expected.min() < -3.7


@feature("ONNX export, rng_state as an input", "gumbel_softmax", "gumbel_softmax_hard")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_softmax(dtype):
    """Soft values within the bounds of the compiled kernels; the index but for ties."""

    def function(x, state):
        sample = functools.partial(gumbel_ext.gumbel_softmax, dim=1, return_index=True)
        return (*sample(x, 0.5, rng_state=state), *sample(x, 0.5, True, rng_state=state))

    session = session_of(
        function,
        torch.zeros(3, 7, 5, dtype=dtype),
        rng_state(),
        dynamic_shapes=({0: Dim("batch")}, None),
    )
    for rows in (3, 1, 20):
        x = torch.randn(rows, 7, 5).to(dtype)
        outputs = run(session, x, rng_state())
        soft, index, hard, hard_index = outputs
        drawn = noise(x.shape)
        assert soft.dtype == hard.dtype == dtype
        assert_index_close(index, x, drawn, dim=1)
        assert_one_hot(hard, hard_index, dim=1)
        expected, _ = reference(x, 0.5, dim=1, noise=drawn)
        assert_soft_close(soft, expected, condition(x, drawn, 0.5, dim=1))
        for actual, eager in zip(outputs, function(x, rng_state()), strict=True):
            torch.testing.assert_close(actual, eager)


@feature("ONNX export, tau and mask as inputs", "gumbel_softmax", "gumbel_softmax_hard")
def test_temperature_and_mask(hard):
    session = session_of(
        lambda x, tau, mask, state: gumbel_ext.gumbel_softmax(
            x, tau, hard, mask=mask, return_index=True, rng_state=state
        ),
        torch.zeros(3, 4, 6),
        torch.ones(4, 1),
        torch.ones(3, 1, 6, dtype=torch.bool),
        rng_state(),
    )
    x, tau = torch.randn(3, 4, 6), 0.2 + torch.rand(4, 1)
    mask = torch.rand(3, 1, 6) < 0.6
    mask[1] = False
    y, index = run(session, x, tau, mask, rng_state())
    eager, eager_index = gumbel_ext.gumbel_softmax(
        x, tau, hard, mask=mask, return_index=True, rng_state=rng_state()
    )
    torch.testing.assert_close(y, eager)
    assert torch.equal(index, eager_index)
    assert (index[1] == -1).all()
    assert (y[1] == 0).all()


@feature("ONNX export, rng_state as an input", "gumbel_argmax")
def test_argmax():
    def function(x, mask, state):
        return (
            gumbel_ext.gumbel_argmax(x, 1, keepdim=True, rng_state=state),
            gumbel_ext.gumbel_argmax(x, 1, mask=mask, rng_state=state),
        )

    x, mask = torch.randn(9, 7, 2), torch.rand(7, 2) < 0.7
    mask[:, 1] = False
    actual = run(session_of(function, x, mask, rng_state()), x, mask, rng_state())
    for a, b in zip(actual, function(x, mask, rng_state()), strict=True):
        assert torch.equal(a, b)


def test_edges():
    """Rows with infinities and NaN, the smallest temperature, a scalar: as in PyTorch."""
    inf, nan = torch.inf, torch.nan
    x = torch.tensor(
        [
            [1.0, -inf, 2.0, 0.0],
            [-inf, -inf, -inf, -inf],
            [0.0, nan, inf, nan],
            [0.0, inf, 1.0, 2.0],
            [5.0, 4.0, 3.0, 2.0],
        ]
    )
    tau = torch.tensor([[0.5], [0.5], [0.5], [0.5], [1e-45]])
    # Leaves the second row -inf alone, and the third its NaN and +inf, or not.
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [1, 0, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]) == 1

    def function(x, tau, mask, scalar, state):
        soft, index = gumbel_ext.gumbel_softmax(x, tau, return_index=True, rng_state=state)
        one = gumbel_ext.gumbel_softmax(scalar, 0.5, return_index=True, rng_state=state)
        hard = gumbel_ext.gumbel_softmax(x, tau, True, rng_state=state)
        bare = gumbel_ext.gumbel_argmax(scalar, rng_state=state)
        masked = gumbel_ext.gumbel_softmax(x, tau, mask=mask, return_index=True, rng_state=state)
        return soft, index, hard, *masked, *one, bare

    arguments = x, tau, mask, torch.tensor(3.0), rng_state()
    actual = run(session_of(function, *arguments), *arguments)
    for a, b in zip(actual, function(*arguments), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, equal_nan=True)


# ---- without a state: fresh noise ---------------------------------------------------------------


@feature("ONNX export, default generator", "gumbel_softmax", "gumbel_noise")
def test_runs_and_calls_draw_different_noise():
    """Also after the exporter's own rewriting, which merges equal nodes, and the runtime's."""

    def function(x):
        return (
            gumbel_ext.gumbel_softmax(x),
            gumbel_ext.gumbel_softmax(x),
            gumbel_ext.gumbel_noise(x.shape),
        )

    session = session_of(function, torch.zeros(5, 1000), optimize=True)
    first, second = (run(session, torch.zeros(5, 1000)) for _ in range(2))
    draws = [first[0], first[1], second[0], second[1]]
    draws += [torch.softmax(g, -1) for g in (first[2], second[2])]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert not torch.allclose(a, b, atol=1e-4)


@feature("ONNX export, default generator", "gumbel_argmax")
def test_drawn_indices_have_the_right_distribution():
    """Chi-square over runs, so that the seeds are what is tested; alpha = 1e-4."""
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5])
    session = session_of(lambda x: gumbel_ext.gumbel_argmax(x), torch.zeros(4, 5))
    onnxruntime.set_seed(1)
    counts = torch.zeros(5)
    for _ in range(500):
        (index,) = run(session, logits.expand(4, 5).contiguous())
        counts += index.bincount(minlength=5)
    expected = torch.softmax(logits.double(), 0) * counts.sum()
    assert stats.chisquare(counts.double(), expected).pvalue > 1e-4


# ---- what cannot be done ------------------------------------------------------------------------


def test_positions_are_refused():
    """Of the op's argument that tells where a part lies in a larger tensor."""
    with pytest.raises(NotImplementedError, match="positions"):
        gumbel_ext.onnx._gumbel_argmax(None, -1, False, None, None, None, [8, 4, 1])


def test_onnxscript_is_imported_when_asked_for():
    """The package works without it; the module says what to install."""
    code = """
import sys, gumbel_ext
assert "onnxscript" not in sys.modules and "onnx" not in sys.modules
sys.modules["onnxscript"] = None
import gumbel_ext.onnx
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip().endswith(
        "ImportError: gumbel_ext.onnx needs onnxscript; run: pip install onnx onnxscript"
    )


def test_a_state_is_drawn_in_the_model():
    """Fresh at every run, and one for all calls that take it."""

    def function(x):
        state = gumbel_ext.draw_rng_state()
        index = gumbel_ext.gumbel_softmax(x, return_index=True, rng_state=state)[1]
        return index, gumbel_ext.gumbel_argmax(x, rng_state=state), state

    x = torch.zeros(50, 6)
    session = session_of(function, x)
    first, second = run(session, x), run(session, x)
    for index, same, state in (first, second):
        assert torch.equal(index, same)
        assert torch.equal(index, gumbel_ext.gumbel_argmax(x, rng_state=state))
    assert not torch.equal(first[0], second[0])
