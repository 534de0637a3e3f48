"""The temperature of a module: set at any time, made on the meta device, traced."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from oracle import rng_state
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from gumbel_ext import gumbel_softmax
from gumbel_ext.nn import (
    ZGR,
    GappedStraightThrough,
    GumbelRao,
    GumbelSoftmax,
    GumbelVectorQuantizer,
    ReinMax,
)
from gumbel_ext.temperature import LearnableTemperature, LinearTemperature

pytestmark = pytest.mark.cpu_only(reason="what modules hold, whatever computes with it")

SAMPLERS = (GumbelSoftmax, GumbelRao, ReinMax, GappedStraightThrough)
LOGITS = torch.linspace(-1, 1, 15).view(3, 5)


def quantizer(temperature=0.5):
    return GumbelVectorQuantizer(5, 4, 2, 6, temperature)


TEMPERED = {kind.__name__: kind for kind in SAMPLERS} | {"quantizer": quantizer}
each = pytest.mark.parametrize("make", TEMPERED.values(), ids=TEMPERED)
each_sampler = pytest.mark.parametrize("make", SAMPLERS, ids=lambda kind: kind.__name__)


def name_of(module):
    return "temperature" if isinstance(module, GumbelVectorQuantizer) else "tau"


def now(module):
    value = module._temperature_of_call()
    return value.tolist() if isinstance(value, torch.Tensor) else value


def put(module, value):
    setattr(module, name_of(module), value)


# ---- set at any time ----------------------------------------------------------------------------


@each
def test_numbers_are_assigned(make):
    module = make(1.0)
    held = getattr(module, name_of(module))
    keys = list(module.state_dict())
    for value in (0.5, 2, np.float32(0.25), np.array(0.75), torch.tensor(0.125), np.int32(3)):
        put(module, value)
        assert getattr(module, name_of(module)) is held
        assert (held.dtype, now(module)) == (torch.float64, float(value))
    assert list(module.state_dict()) == keys
    assert ("tau" in keys) == (name_of(module) == "tau")
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        put(copied, 0.1)
        assert (now(copied), now(module)) == (0.1, 3.0)


@each
def test_what_makes_it_is_assigned(make):
    module = make(1.0)
    keys = set(module.state_dict()) - {"tau"}
    schedule = LinearTemperature(0.5, 0.1, 10)
    put(module, schedule)
    schedule.step()
    assert now(module) == schedule.tau
    put(module, LearnableTemperature(0.5))
    assert now(module) == pytest.approx(0.5)
    assert set(module.state_dict()) == keys | {f"{name_of(module)}.raw"}
    put(module, lambda: torch.tensor(0.25))
    assert now(module) == 0.25
    assert not [name for name, _ in module.named_children() if name == name_of(module)]
    put(module, 0.125)
    assert now(module) == 0.125
    assert set(module.state_dict()) - {"tau"} == keys


@each_sampler
def test_rows_of_temperatures_are_assigned(make):
    module = make(1.0)
    rows = torch.tensor([[0.5], [1.0], [2.0]])
    module.tau = rows
    rows.fill_(-1.0)
    assert now(module) == [[0.5], [1.0], [2.0]]
    assert "tau" in repr(module)
    assert module(LOGITS).shape == LOGITS.shape
    held = module.tau
    module.tau = 0.5
    assert module.tau is held
    assert now(module) == [[0.5]] * 3


@each
@pytest.mark.parametrize(
    "bad",
    [
        *(0, -1.0, float("nan"), 10**400, True, None, "1", [1.0], 1j),
        *(torch.tensor(-1.0), torch.tensor([0.5, 0.0]), torch.tensor(1j), torch.tensor(True)),
        *(np.array("1"), nn.Parameter(torch.tensor(0.5)), torch.tensor(0.5, requires_grad=True)),
    ],
    ids=repr,
)
def test_what_is_no_temperature_is_refused(make, bad):
    module = make(1.0)
    place = rf"\A{type(module).__name__}: {name_of(module)} must .*\Z"
    with pytest.raises((TypeError, ValueError), match=place):
        put(module, bad)
    assert now(module) == 1.0
    with pytest.raises((TypeError, ValueError), match=place):
        make(bad)


@each
def test_assigned_numbers_compile_once(make):
    torch.compiler.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    module = make(1.0).train()
    if isinstance(module, GumbelVectorQuantizer):
        module.hard = False
    compiled = torch.compile(module, fullgraph=True, backend=count)
    state = rng_state()
    for tau in (1.0, 0.5, 0.25, 2.0):
        put(module, tau)
        expected, actual = module(LOGITS, rng_state=state), compiled(LOGITS, rng_state=state)
        torch.testing.assert_close(actual, expected)
    assert len(graphs) == 1


# ---- the meta device ----------------------------------------------------------------------------

MODULES = TEMPERED | {
    "rows": lambda tau: GumbelSoftmax(torch.full((3, 1), tau, device="cpu")),
    "schedule": lambda tau: GumbelSoftmax(LinearTemperature(tau, tau, 10)),
    "learnable": lambda tau: LearnableTemperature(tau, minimum=0.1),
    "heads": lambda tau: LearnableTemperature(torch.full((3, 1), tau, device="cpu")),
    "learnable in a sampler": lambda tau: GumbelSoftmax(LearnableTemperature(tau)),
    "learnable in a quantizer": lambda tau: quantizer(LearnableTemperature(tau)),
}
each_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


def temperature_of(module):
    value = module() if isinstance(module, LearnableTemperature) else module._temperature_of_call()
    return torch.as_tensor(value).double()


def check(module, tau=0.5):
    value = temperature_of(module)
    assert value.device.type == "cpu"
    torch.testing.assert_close(value, torch.full_like(value, tau))
    if isinstance(module, GumbelVectorQuantizer):
        assert not module.weight_proj.bias.any()
        assert module.codevectors.min() >= 0
        assert module.codevectors.max() < 1
        assert 0.5 < module.weight_proj.weight.std() < 1.5


def garbage(module):
    """What an allocator may give."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.fill_(6.9e-310 if tensor.dtype == torch.float64 else 7.0)


@each_module
def test_made_on_the_meta_device(make):
    with torch.device("meta"):
        module = make(0.5)
    text = repr(module)
    tensors = [*module.parameters(), *module.buffers()]
    assert all(tensor.is_meta for tensor in tensors if tensor.shape != (3, 1))
    assert text == repr(make(0.5))
    module.to_empty(device="cpu")
    garbage(module)
    module.reset_parameters()
    check(module)
    assert repr(module) == text


@each_module
def test_a_temperature_is_there_without_a_reset(make, monkeypatch):
    """Uninitialised memory is mostly a positive number, which nothing could tell from one."""
    with torch.device("meta"):
        module = make(0.5)
    on_meta = all(parameter.is_meta for parameter in module.parameters())

    def empty_like(tensor, **options):
        return torch.full(tensor.shape, 6.9e-310, dtype=tensor.dtype, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty_like", empty_like)
        module.to_empty(device="cpu")
    if on_meta:
        value = temperature_of(module)
        torch.testing.assert_close(value, torch.full_like(value, 0.5))


@each
def test_to_empty_keeps_a_temperature_that_is_set(make):
    module = make(1.0)
    put(module, 0.5)
    module.to_empty(device="cpu")
    assert now(module) == 0.5
    assert module.bfloat16().to("cpu") is module
    assert (now(module), getattr(module, name_of(module)).dtype) == (0.5, torch.float64)
    module.reset_parameters()
    assert now(module) == 1.0


@each
def test_set_while_on_the_meta_device(make):
    with torch.device("meta"):
        module = make(1.0)
        put(module, 0.5)
    assert "=0.5" in repr(module)
    module.to_empty(device="cpu").reset_parameters()
    assert now(module) == 0.5


@each_module
def test_reset_module_by_module(make):
    """As FSDP and others do: parents first, each with its own tensors or with all."""
    for recurse in (False, True):
        with torch.device("meta"):
            model = nn.Sequential(make(0.5))
        if recurse:
            model.to_empty(device="cpu")
            garbage(model)
        for module in model.modules():
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if not own:
                continue
            if not recurse:
                module.to_empty(device="cpu", recurse=False)
                for tensor in own:
                    tensor.data.fill_(7.0) if not tensor.is_meta else None
            module.reset_parameters()
        check(model[0])


@each_module
@pytest.mark.parametrize("buffers", [False, True])
def test_deferred_as_accelerate_defers(make, buffers, monkeypatch):
    """Whatever is registered goes to the meta device at once."""
    original = nn.Module.register_parameter, nn.Module.register_buffer

    def register_parameter(module, name, param):
        original[0](module, name, param)
        if param is not None:
            kept = {"requires_grad": param.requires_grad, **param.__dict__}
            module._parameters[name] = type(param)(param.to("meta"), **kept)

    def register_buffer(module, name, buffer, persistent=True):
        original[1](module, name, buffer, persistent)
        module._buffers[name] = buffer.to("meta")

    state = make(0.5).state_dict()
    with monkeypatch.context() as patched:
        patched.setattr(nn.Module, "register_parameter", register_parameter)
        if buffers:
            patched.setattr(nn.Module, "register_buffer", register_buffer)
        module, other = make(0.5), make(0.25)
    assert all(parameter.is_meta for parameter in module.parameters())
    repr(module)
    module.to_empty(device="cpu").reset_parameters()
    check(module)
    if not isinstance(other, GumbelVectorQuantizer) and state:
        other.load_state_dict(state, assign=True)
        check(other)


def test_initial_without_values():
    with torch.device("meta"):
        module = LearnableTemperature(torch.ones(3, 1))
    repr(module)
    module.to_empty(device="cpu")
    with pytest.raises(ValueError, match=r"^LearnableTemperature: initial must have values"):
        module.reset_parameters()


@pytest.mark.parametrize("kind", ["sampler", "heads", "quantizer"])
def test_fully_sharded(kind, tmp_path):
    dist = pytest.importorskip("torch.distributed")
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("this torch has no fully_shard")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with torch.device("meta"):
            model = nn.Sequential(
                nn.Linear(5, 5),
                {
                    "sampler": lambda: GumbelSoftmax(0.5),
                    "heads": lambda: LearnableTemperature(torch.full((3, 1), 0.5, device="cpu")),
                    "quantizer": lambda: quantizer(0.5),
                }[kind](),
            )
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        fsdp.fully_shard(model, mesh=mesh)
        model.to_empty(device="cpu")
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        if kind == "heads":
            value = model[1].raw.full_tensor()
            torch.testing.assert_close(
                value, LearnableTemperature(torch.full((3, 1), 0.5)).raw.data
            )
        else:
            assert now(model[1]) == 0.5
            model(torch.randn(3, 5))
    finally:
        dist.destroy_process_group()


# ---- traced -------------------------------------------------------------------------------------


@each_sampler
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", ["fx", "jit", "make_fx"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_module_follows_the_temperature(make, how, training):
    module = make(1.0).train(training)
    if how == "fx":
        traced = torch.fx.symbolic_trace(module)
    elif how == "jit":
        traced = torch.jit.trace(module, LOGITS, check_trace=False)
    else:
        traced = make_fx(module)(LOGITS)
    weight = torch.linspace(1, 2, 15).view(3, 5).square()

    def gradient(function):
        torch.manual_seed(5)
        leaf = LOGITS.clone().requires_grad_()
        y = function(leaf)
        return y, torch.autograd.grad((y * weight).sum(), leaf)[0]

    for tau in (1.0, 0.25):
        module.tau = tau
        torch.testing.assert_close(gradient(traced), gradient(module))
    before = gradient(module)
    module.tau = 2.0
    changed = [not torch.equal(a, b) for a, b in zip(before, gradient(module), strict=True)]
    assert any(changed)


@pytest.mark.parametrize("how", ["fx", "jit"])
@pytest.mark.parametrize("kind", ["learnable", "schedule", "callable"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_temperatures_traced(how, kind):
    """What changes is followed, or a warning says that it is not."""
    held = torch.tensor(1.0, dtype=torch.float64)
    schedule = LinearTemperature(1.0, 0.25, 1)
    module = GumbelSoftmax(
        {"learnable": LearnableTemperature(1.0), "schedule": schedule, "callable": lambda: held}[
            kind
        ]
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if how == "fx":
            traced = torch.fx.symbolic_trace(module)
        else:
            traced = torch.jit.trace(module, LOGITS, check_trace=False)
    said = [str(w.message) for w in caught if issubclass(w.category, torch.jit.TracerWarning)]
    if kind == "learnable":
        with torch.no_grad():
            module.tau.raw.fill_(-2.0)
    schedule.step()
    held.fill_(0.25)
    torch.manual_seed(5)
    expected = module(LOGITS)
    torch.manual_seed(5)
    if kind == "callable" or (how == "jit" and kind == "schedule"):
        (message,) = said
        assert message.startswith("GumbelSoftmax: a trace keeps the present tau")
    else:
        assert not said
        torch.testing.assert_close(traced(LOGITS), expected)
    if kind == "learnable":
        traced(LOGITS)[0, 0].backward()
        assert module.tau.raw.grad != 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_quantizer_follows_the_temperature():
    module = quantizer(1.0)
    module.hard = False
    traced = torch.jit.trace(module, LOGITS, check_trace=False)
    module.temperature = 0.25
    torch.manual_seed(5)
    expected = module(LOGITS)
    torch.manual_seed(5)
    torch.testing.assert_close(traced(LOGITS)[0], expected[0])


@pytest.mark.parametrize("eval_mode", ["argmax", "softmax", "sample"])
def test_other_modes_by_fx(eval_mode):
    for module in (ZGR(eval_mode=eval_mode).eval(), GumbelSoftmax(eval_mode=eval_mode).eval()):
        traced = torch.fx.symbolic_trace(module)
        torch.manual_seed(5)
        expected = module(LOGITS)
        torch.manual_seed(5)
        torch.testing.assert_close(traced(LOGITS), expected)


def test_a_function_of_a_temperature_alone_by_fx():
    """Whichever argument is traced."""
    traced = torch.fx.symbolic_trace(lambda tau: gumbel_softmax(LOGITS, tau, rng_state=rng_state()))
    torch.testing.assert_close(
        traced(torch.tensor(0.5)), gumbel_softmax(LOGITS, 0.5, rng_state=rng_state())
    )
