"""Every argument of every public function: what PyTorch takes is taken, the rest gets one line."""

import inspect
import math
import re
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from oracle import rng_state

import gumbel_ext
from gumbel_ext import distributed
from gumbel_ext.nn import (
    ZGR,
    GappedStraightThrough,
    GumbelRao,
    GumbelSoftmax,
    GumbelVectorQuantizer,
    ReinMax,
)
from gumbel_ext.temperature import (
    CosineTemperature,
    ExponentialTemperature,
    LearnableTemperature,
    LinearTemperature,
    PiecewiseTemperature,
)

pytestmark = pytest.mark.cpu_only(reason="arguments are checked before anything has a device")

LOGITS = torch.linspace(-1, 1, 12).view(3, 4)
MASK = torch.ones(3, 4, dtype=torch.bool)
STATE = rng_state()
RANDOM = {"mask": MASK, "rng_state": STATE}
SHARD = distributed.Shard(0, offset=0, size=3)

# Calls that are right, with all arguments that a function has but those in UNSET.
CALLS = {
    "gumbel_softmax": {
        "logits": LOGITS,
        "tau": 0.5,
        "hard": False,
        "dim": 1,
        "return_index": False,
        **RANDOM,
    },
    "gumbel_argmax": {"logits": LOGITS, "dim": 1, "keepdim": False, **RANDOM},
    "gumbel_noise": {"size": 2, "dtype": None, "device": None, "rng_state": STATE},
    "logistic_noise": {"size": 2, "dtype": None, "device": None, "rng_state": STATE},
    "binary_concrete": {"logits": LOGITS, "tau": 0.5, "hard": False, "rng_state": STATE},
    "logit_binary_concrete": {"logits": LOGITS, "tau": 0.5, "rng_state": STATE},
    "binary_concrete_log_prob": {
        "value": LOGITS.sigmoid(),
        "logits": LOGITS,
        "tau": 0.5,
        "logit_space": False,
    },
    "gumbel_log_softmax": {"logits": LOGITS, "tau": 0.5, "dim": 1, **RANDOM},
    "concrete_log_prob": {
        "value": LOGITS.softmax(1),
        "logits": LOGITS,
        "tau": 0.5,
        "dim": 1,
        "log_space": False,
    },
    "gumbel_topk": {"logits": LOGITS, "k": 1, "dim": 1, "return_log_prob": False, **RANDOM},
    "relaxed_topk": {"logits": LOGITS, "k": 1, "tau": 0.5, "hard": False, "dim": 1, **RANDOM},
    "gumbel_rao": {"logits": LOGITS, "tau": 0.5, "k": 1, "dim": 1, "return_index": False, **RANDOM},
    "zgr": {"logits": LOGITS, "dim": 1, "return_index": False, **RANDOM},
    "reinmax": {"logits": LOGITS, "tau": 0.5, "dim": 1, "return_index": False, **RANDOM},
    "gapped_straight_through": {
        "logits": LOGITS,
        "tau": 0.5,
        "gap": 0.5,
        "dim": 1,
        "return_index": False,
        **RANDOM,
    },
    "gumbel_embedding": {
        "logits": LOGITS,
        "weight": LOGITS.t(),
        "tau": 0.5,
        "hard": False,
        "dim": 1,
        "return_index": False,
        **RANDOM,
    },
    "straight_through_softmax": {
        "logits": LOGITS,
        "tau": 0.5,
        "dim": 1,
        "mask": MASK,
        "return_index": False,
    },
    "soft_argmax": {
        "logits": LOGITS,
        "beta": 0.5,
        "dim": 1,
        "positions": torch.arange(4.0),
        "keepdim": False,
    },
    "soft_argmax_2d": {"maps": LOGITS, "beta": 0.5, "normalized": False},
    "decoupled_gumbel_softmax": {
        "logits": LOGITS,
        "tau_forward": 0.5,
        "tau_backward": 0.5,
        "hard": False,
        "dim": 1,
        "return_index": False,
        **RANDOM,
    },
    "draw_rng_state": {"generator": None, "device": None},
    "distributed.gumbel_softmax": {
        "logits": LOGITS,
        "tau": 0.5,
        "hard": False,
        "dim": 1,
        "shards": SHARD,
        "return_index": False,
        **RANDOM,
    },
    "distributed.gumbel_argmax": {
        "logits": LOGITS,
        "dim": 1,
        "keepdim": False,
        "shards": SHARD,
        **RANDOM,
    },
    "distributed.gumbel_noise": {
        "size": (3, 4),
        "shards": SHARD,
        "dtype": None,
        "rng_state": STATE,
    },
}
# Shapes that only show with k above 1, or several samples.
VARIANTS = {
    "relaxed_topk k=2": ("relaxed_topk", {"k": 2}),
    "gumbel_topk log_prob": ("gumbel_topk", {"return_log_prob": True}),
    "gumbel_argmax num_samples": ("gumbel_argmax", {"num_samples": 1}),
}
CONSTRUCTORS = {
    GumbelSoftmax: {"tau": 0.5, "hard": False, "dim": 1, "eval_mode": "argmax"},
    GumbelRao: {"tau": 0.5, "k": 1, "dim": 1, "eval_mode": "argmax"},
    ZGR: {"dim": 1, "eval_mode": "argmax"},
    ReinMax: {"tau": 0.5, "dim": 1, "eval_mode": "argmax"},
    GappedStraightThrough: {"tau": 0.5, "gap": 0.5, "dim": 1, "eval_mode": "argmax"},
    GumbelVectorQuantizer: {
        "input_dim": 1,
        "num_vars": 1,
        "groups": 1,
        "vq_dim": 1,
        "temperature": 0.5,
        "hard": False,
    },
    ExponentialTemperature: {"rate": 0.5, "minimum": 0.5, "start": 0.5, "every": 1},
    LinearTemperature: {"start": 0.5, "end": 0.5, "total_steps": 1, "every": 1},
    CosineTemperature: {"start": 0.5, "end": 0.5, "total_steps": 1, "every": 1},
    LearnableTemperature: {"initial": 0.5, "minimum": 0.25},
}

INTS = ("dim", "k", "num_samples", "size", "input_dim", "num_vars", "groups", "vq_dim")
INTS += ("every", "total_steps")
BOOLS = ("hard", "keepdim", "return_index", "return_log_prob", "normalized")
BOOLS += ("log_space", "logit_space")
TEMPERATURES = ("tau", "beta", "tau_forward", "tau_backward", "temperature", "initial")
NUMBERS = ("gap", "rate", "minimum", "start", "end")
TENSORS = ("logits", "value", "maps", "weight")


def function_of(name):
    found = gumbel_ext
    for part in name.split("."):
        found = getattr(found, part)
    return found


def cases():
    """``(name in messages, what to call, its arguments)``."""
    for name, arguments in CALLS.items():
        yield pytest.param(name, function_of(name), arguments, id=name)
    for label, (name, other) in VARIANTS.items():
        yield pytest.param(name, function_of(name), CALLS[name] | other, id=label)
    for kind, arguments in CONSTRUCTORS.items():
        yield pytest.param(kind.__name__, kind, arguments, id=kind.__name__)


every_call = pytest.mark.parametrize(("name", "function", "arguments"), list(cases()))


class Index:
    def __index__(self):
        return 1


class Jagged:
    """A nested tensor is made where it is used: it is no constant that many tests may share."""

    def __new__(cls):
        return torch.nested.nested_tensor(list(LOGITS), layout=torch.jagged)


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(LOGITS, 0.1, 0, torch.quint8)


FLOAT8 = [d for d in vars(torch).values() if isinstance(d, torch.dtype) and "float8" in str(d)]
OTHER_DTYPES = [torch.int64, torch.uint8, torch.bool, torch.complex64, *FLOAT8]


def others_than_dense():
    yield LOGITS.to_sparse()
    yield LOGITS.to_sparse_csr()
    yield torch.nested.nested_tensor(list(LOGITS))
    yield Jagged()
    yield quantized()


def of_no_use(argument):
    """Values that no argument of this name takes."""
    if argument in INTS:
        yield from (None, 1.5, "1", True, np.float64(1), np.bool_(True), 1j, {}, object())
        yield from (2**63, -(2**63) - 1, 10**30)
        yield from (torch.tensor(1.0), torch.tensor(True), torch.ones(2, dtype=torch.int64))
    elif argument in BOOLS:
        yield from (None, "yes", 2, -1, 1.5, [], {}, torch.tensor(1.0), np.ones(2, dtype=bool))
    elif argument in TEMPERATURES + NUMBERS:
        if argument != "gap":
            yield None
        yield from ("1", [1.0], True, np.bool_(True), 1j, {})
        if argument != "beta":
            yield from (-1.0, torch.tensor(-1.0)) if argument in TEMPERATURES else (-1.0,)
        yield from (math.nan, math.inf, 10**400, -(10**400), np.float32("nan"))
        if argument != "minimum":
            yield 0
        if argument in TEMPERATURES:
            yield from (torch.tensor(math.nan), torch.tensor(1j))
            yield from (torch.tensor(True), np.array("text"), np.array(1j), np.array(True))
            yield from (torch.tensor(1.0).to(dtype) for dtype in FLOAT8)
            yield from others_than_dense()
    elif argument in TENSORS:
        yield from (None, 1.5, "text", [1.0], LOGITS.numpy())
        yield from others_than_dense()
        for dtype in OTHER_DTYPES:
            yield LOGITS.to(dtype)
    elif argument == "positions":
        yield from (1.5, "text", [1.0], torch.ones(3), torch.ones(4).to_sparse())
        yield from (torch.ones(4).to(dtype) for dtype in (torch.bool, torch.complex64, *FLOAT8))
    elif argument == "mask":
        yield from (True, "text", [True], MASK.numpy(), LOGITS, MASK.to_sparse(), MASK[:2])
        yield torch.nested.nested_tensor(list(LOGITS))
    elif argument == "rng_state":
        yield from ("text", [1, 2], 7, STATE.numpy(), STATE.double(), STATE[:1])
    elif argument == "generator":
        yield from ("cpu", 7, STATE, [])
    elif argument in ("dtype", "device"):
        yield from ("text", 1.5, [], {})
        if argument == "dtype":
            yield from OTHER_DTYPES
    elif argument == "shards":
        yield from (None, 0, "text", [0], distributed.Shard(1.5))
    elif argument == "eval_mode":
        yield from (None, 1, "text", [])
    else:
        raise AssertionError(argument)


def check(error, name, argument):
    message = str(error)
    assert re.match(rf"{re.escape(name)}: (an? )?{argument}\b", message), message
    assert "\n" not in message
    assert len(message) < 250


def test_every_public_function_is_here():
    exempt = {"patch_torch", "replay_generators"}
    functions = {n for n in gumbel_ext.__all__ if inspect.isfunction(getattr(gumbel_ext, n))}
    assert functions - exempt <= set(CALLS)


@every_call
def test_what_is_refused_gets_one_line(name, function, arguments):
    function(**arguments)
    for argument in (*arguments, *(["generator"] if "rng_state" in arguments else [])):
        kept = dict(arguments)
        if argument == "generator":
            kept.pop("rng_state", None)
        for value in of_no_use(argument):
            if (argument, value) == ("num_samples", None):
                continue
            what = f"{argument}={value!r}" if not isinstance(value, torch.Tensor) else argument
            error = None
            try:
                function(**kept | {argument: value})
            except Exception as caught:
                error = caught
            assert isinstance(error, (TypeError, ValueError)), f"{what}: {error!r}"
            check(error, name, argument)


def plain(result):
    """What two calls must have in common."""
    if isinstance(result, torch.nn.Module):
        return repr(result)
    if isinstance(result, tuple):
        return [tensor.tolist() for tensor in result]
    return result.tolist() if isinstance(result, torch.Tensor) else repr(result)


@every_call
def test_what_pytorch_takes_is_taken(name, function, arguments):
    """NumPy's numbers, 0-d arrays and tensors, whatever has an index: as Python's own."""
    for argument in arguments:
        ones = [np.int32(1), np.uint8(1), np.int64(1), np.array(1), Index()]
        ones += [torch.tensor(1), torch.tensor(1, dtype=torch.int32)]
        halves = [np.float32(0.5), np.float16(0.5), np.float64(0.5), np.array(0.5), Fraction(1, 2)]
        tensors = [torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)]
        if argument in INTS:
            kinds, same = ones, 1
        elif argument in BOOLS:
            kinds, same = [np.bool_(True), 1, np.int64(1), torch.tensor(True)], True
            if (argument, arguments.get("num_samples")) == ("keepdim", 1):
                continue
        elif argument in TEMPERATURES:
            kinds, same = [*halves, *tensors], 0.5
        elif argument in NUMBERS:
            kinds, same = halves, 0.5
            if name == "LearnableTemperature":
                kinds, same = [half / 2 for half in halves], 0.25
        else:
            continue
        if (name, argument) == ("distributed.gumbel_noise", "size"):
            kinds, same = [[np.int32(3), torch.tensor(4)], (3, np.uint8(4))], (3, 4)
        expected = plain(function(**arguments | {argument: same}))
        for kind in kinds:
            actual = plain(function(**arguments | {argument: kind}))
            if argument == "temperature" or name != "GumbelVectorQuantizer":
                assert actual == expected, (argument, kind)


@pytest.mark.parametrize("of", ["int", "size", "milestones"])
def test_sequences_of_integers(of):
    ints = [np.int32(1), torch.tensor(2), Index()]
    if of == "size":
        for noise in (gumbel_ext.gumbel_noise, gumbel_ext.logistic_noise):
            assert noise(ints).shape == (1, 2, 1)
            assert noise(torch.Size([2, 3])).shape == (2, 3)
    else:
        schedule = PiecewiseTemperature(np.array([1, 5]), np.array([1, 0.5, 0.25], np.float16))
        assert (schedule.milestones, schedule.values) == ([1, 5], [1.0, 0.5, 0.25])
    for bad in (None, 1, "text", [1.5], [True]):
        with pytest.raises(TypeError) as caught:
            PiecewiseTemperature(bad, [1.0, 0.5])
        check(caught.value, "PiecewiseTemperature", "milestones")
        with pytest.raises(TypeError) as caught:
            PiecewiseTemperature([1], bad if bad != [1.5] else [1j])
        check(caught.value, "PiecewiseTemperature", "values")


def test_temperatures_in_an_array():
    """As F.gumbel_softmax takes them."""
    tau = np.array([[0.5], [1.0], [2.0]], dtype=np.float32)
    assert torch.equal(
        gumbel_ext.gumbel_softmax(LOGITS, tau, rng_state=STATE),
        gumbel_ext.gumbel_softmax(LOGITS, torch.from_numpy(tau), rng_state=STATE),
    )


@pytest.mark.parametrize("dim", [np.int64(1), torch.tensor(1), Index()], ids=["numpy", "0-d", "i"])
@pytest.mark.parametrize("tau", [np.float32(0.5), np.array(0.5)], ids=["scalar", "array"])
def test_compiled_takes_them_too(dim, tau):
    torch.compiler.reset()

    def sample(x):
        return gumbel_ext.gumbel_softmax(x, tau, dim=dim, rng_state=STATE)

    compiled = torch.compile(sample, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(LOGITS), sample(LOGITS))


TRACEABLE = (*TENSORS, *TEMPERATURES, "mask", "rng_state", "positions")


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        (name, argument)
        for name, arguments in CALLS.items()
        for argument in arguments
        if argument in TRACEABLE and not name.startswith("distributed.")
    ],
)
def test_traced_by_fx_in_any_tensor(name, argument):
    """A tracer, a subclass or a mode sees the call whichever argument is its own."""
    arguments = CALLS[name]
    function, value = function_of(name), torch.as_tensor(arguments[argument])

    def call(given):
        return function(**{**arguments, argument: given})

    graph = torch.fx.symbolic_trace(call)
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [function]
    assert plain(graph(value)) == plain(call(value))

    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        call(value)
    assert seen.count(function) == 1
