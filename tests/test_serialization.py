"""Modules that hold the ops can be copied, saved, packaged, traced and sent to other processes."""

import copy
import io
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch

import gumbel_ext

OP_NAMES = ("gumbel_softmax", "gumbel_softmax_hard", "gumbel_argmax", "gumbel_noise")


def feature(name, ops=OP_NAMES, mode="eager"):
    return pytest.mark.feature(name, ops=ops, modes=(mode,))


class Quantiser(torch.nn.Module):
    """A module like a user's: parameters, a temperature, functions of the package as attributes."""

    def __init__(self, hard):
        super().__init__()
        self.project = torch.nn.Linear(6, 8)
        self.log_tau = torch.nn.Parameter(torch.tensor(-0.5))
        self.hard = hard
        self.sample = gumbel_ext.gumbel_softmax
        self.choose = gumbel_ext.gumbel_argmax

    def forward(self, x):
        logits = self.project(x)
        y = self.sample(logits, self.log_tau.exp(), self.hard)
        noise = gumbel_ext.gumbel_noise(logits.shape, device=logits.device)
        return y, self.choose(logits), noise


def through_pickle(module, tmp_path):
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module, tmp_path):
    torch.save(module, tmp_path / "module.pt")
    return torch.load(tmp_path / "module.pt", weights_only=False)


def through_state_dict(module, tmp_path):
    torch.save(module.state_dict(), tmp_path / "state.pt")
    other = Quantiser(module.hard)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    return other.to(module.log_tau.device)


def through_deepcopy(module, tmp_path):
    return copy.deepcopy(module)


def results(module, x):
    """Outputs and gradients for one seed."""
    torch.manual_seed(4)
    module.zero_grad()
    y, index, noise = module(x)
    (y * torch.arange(y.numel(), device=y.device).view(y.shape).cos()).sum().backward()
    return [y, index, noise, *(parameter.grad for parameter in module.parameters())]


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    assert expected[-1].abs().max() > 1e-4


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(through_deepcopy, marks=feature("copy.deepcopy of a module")),
        pytest.param(through_pickle, marks=feature("pickle of a module")),
        pytest.param(through_torch_save, marks=feature("torch.save, torch.load of a module")),
        pytest.param(through_state_dict, marks=feature("state_dict of a module")),
    ],
    ids=lambda way: way.__name__,
)
def test_copies_behave_alike(device, hard, way, tmp_path):
    module = Quantiser(hard).to(device)
    x = torch.randn(5, 6, device=device)
    other = way(module, tmp_path)
    assert other is not module
    assert_same(results(other, x), results(module, x))


def test_copies_are_independent(device, hard):
    module = Quantiser(hard).to(device)
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.project.bias.add_(torch.randn(8, device=device) * 5)
    x = torch.randn(50, 6, device=device)
    assert not torch.equal(results(other, x)[1], results(module, x)[1])


@feature("pickle of the functions")
@pytest.mark.parametrize("name", ["gumbel_softmax", "gumbel_argmax", "gumbel_noise"])
def test_functions_are_pickled_by_name(name):
    function = getattr(gumbel_ext, name)
    assert pickle.loads(pickle.dumps(function)) is function
    assert copy.deepcopy(function) is function


def test_results_are_pickled(device, hard):
    """Without the graph, as for every tensor that is no leaf; deepcopy refuses it alike."""
    logits = torch.randn(5, 6, device=device, requires_grad=True)
    y = gumbel_ext.gumbel_softmax(logits, 0.5, hard)
    buffer = io.BytesIO()
    torch.save(y, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True), y)
    with pytest.raises(RuntimeError, match="deepcopy protocol"):
        copy.deepcopy(y)


# ---- torch.package ------------------------------------------------------------------------------


MODEL_SOURCE = """
import torch
import gumbel_ext


class Sampler(torch.nn.Module):
    def __init__(self, hard):
        super().__init__()
        self.project = torch.nn.Linear(6, 8)
        self.hard = hard

    def forward(self, x):
        logits = self.project(x)
        y = gumbel_ext.gumbel_softmax(logits, 0.5, self.hard)
        noise = gumbel_ext.gumbel_noise(x.shape, device=x.device)
        return y, gumbel_ext.gumbel_argmax(logits), noise
"""


@feature("torch.package, extern gumbel_ext")
def test_torch_package(device, hard, tmp_path, monkeypatch):
    """The model's source goes into the package; gumbel_ext, compiled, is where it is loaded."""
    Path(tmp_path, "packaged_model.py").write_text(MODEL_SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    import packaged_model

    module = packaged_model.Sampler(hard).to(device)
    with torch.package.PackageExporter(tmp_path / "model.pt") as exporter:
        exporter.extern(["gumbel_ext.**", "numpy.**"])
        exporter.intern("packaged_model")
        exporter.save_pickle("model", "model.pkl", module)
    del sys.modules["packaged_model"]
    monkeypatch.undo()

    other = torch.package.PackageImporter(tmp_path / "model.pt").load_pickle("model", "model.pkl")
    assert type(other).__module__.endswith("packaged_model")
    assert "packaged_model" not in sys.modules
    x = torch.randn(5, 6, device=device)
    assert_same(results(other, x), results(module, x))


# ---- TorchScript --------------------------------------------------------------------------------


@feature("torch.jit.trace", mode="exported")
@pytest.mark.parametrize(
    "draw",
    [
        lambda x: gumbel_ext.gumbel_softmax(x.sin(), 0.5),
        lambda x: gumbel_ext.gumbel_softmax(x.sin(), 0.5, hard=True),
        lambda x: gumbel_ext.gumbel_argmax(x.sin()),
        lambda x: gumbel_ext.gumbel_noise(x.shape, device=x.device),
        lambda x: gumbel_ext.draw_rng_state(device=x.device),
    ],
    ids=["soft", "hard", "gumbel_argmax", "gumbel_noise", "draw_rng_state"],
)
def test_jit_trace(device, draw, tmp_path):
    """A trace draws anew at each run, also when TorchScript has optimised it, and can be saved."""
    x = torch.randn(50, 6, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(draw, x, check_trace=False)
        torch.jit.save(traced, str(tmp_path / "traced.pt"))
        loaded = torch.jit.load(str(tmp_path / "traced.pt"))
    for run in (traced, loaded):
        for _ in range(3):
            torch.manual_seed(4)
            first, second = run(x), run(x)
            torch.manual_seed(4)
            assert torch.equal(first, draw(x))
            assert torch.equal(second, draw(x))
            assert not torch.equal(first, second)


def topk(x, rng_state=None, **keywords):
    return gumbel_ext.gumbel_topk(x, 3, return_log_prob=True, rng_state=rng_state, **keywords)


def of_mask(function, *arguments, **keywords):
    """With a mask that the trace computes from its input."""
    return lambda x, rng_state=None: function(
        x, *arguments, mask=x > -1, rng_state=rng_state, **keywords
    )


def of_state(function, *arguments, **keywords):
    return lambda x, rng_state=None: function(x, *arguments, rng_state=rng_state, **keywords)


def density(function, value):
    return lambda x, rng_state=None: function(value(x), x, torch.exp(x.detach().mean()))


def module(made):
    return lambda x, rng_state=None: made(x, rng_state=rng_state)


def embedding(x, rng_state=None, hard=False):
    return gumbel_ext.gumbel_embedding(x, x.detach().mT[:, :2], 0.7, hard, rng_state=rng_state)


def quantise(quantiser):
    def call(x, rng_state=None):
        quantised = quantiser.to(x.device)(x, rng_state=rng_state)
        return quantised.codevectors, quantised.codes

    return call


def traced_calls():
    tau = 0.7
    calls = {
        "gumbel_softmax": of_mask(gumbel_ext.gumbel_softmax, tau, return_index=True),
        "gumbel_softmax, hard": of_mask(gumbel_ext.gumbel_softmax, tau, True),
        "gumbel_argmax": of_mask(gumbel_ext.gumbel_argmax),
        "gumbel_topk": topk,
        "gumbel_topk, masked": of_mask(topk),
        "gumbel_topk, dim": of_state(topk, dim=0),
        "relaxed_topk": of_state(gumbel_ext.relaxed_topk, 3, tau),
        "relaxed_topk, one": of_state(gumbel_ext.relaxed_topk, 1, tau),
        "relaxed_topk, hard": of_mask(gumbel_ext.relaxed_topk, 3, tau, True),
        "relaxed_topk, tau": lambda x, rng_state=None: gumbel_ext.relaxed_topk(
            x, 3, x.detach().exp().mean(-1, keepdim=True), rng_state=rng_state
        ),
        "gumbel_log_softmax": of_mask(gumbel_ext.gumbel_log_softmax, tau),
        "concrete_log_prob": density(
            gumbel_ext.concrete_log_prob, lambda x: x.detach().sin().softmax(-1)
        ),
        "binary_concrete": of_state(gumbel_ext.binary_concrete, tau),
        "binary_concrete, hard": of_state(gumbel_ext.binary_concrete, tau, True),
        "binary_concrete_log_prob": density(
            gumbel_ext.binary_concrete_log_prob, lambda x: x.detach().sin().sigmoid()
        ),
        "decoupled_gumbel_softmax": of_mask(gumbel_ext.decoupled_gumbel_softmax, tau, 0.5),
        "straight_through_softmax": lambda x, rng_state=None: gumbel_ext.straight_through_softmax(
            x, tau, mask=x > -1, return_index=True
        ),
        "soft_argmax": lambda x, rng_state=None: gumbel_ext.soft_argmax(x, tau),
        "soft_argmax_2d": lambda x, rng_state=None: gumbel_ext.soft_argmax_2d(x, tau),
        "gumbel_embedding": embedding,
        "gumbel_embedding, hard": lambda x, rng_state=None: embedding(x, rng_state, True),
        "gumbel_rao": of_mask(gumbel_ext.gumbel_rao, tau),
        "zgr": of_mask(gumbel_ext.zgr),
        "reinmax": of_mask(gumbel_ext.reinmax, tau),
        "gapped_straight_through": of_mask(gumbel_ext.gapped_straight_through, tau),
        "GumbelVectorQuantizer": quantise(
            gumbel_ext.nn.GumbelVectorQuantizer(6, 5, 2, 4).requires_grad_(False)
        ),
    }
    for name in ("GumbelSoftmax", "GumbelRao", "ZGR", "ReinMax", "GappedStraightThrough"):
        calls[name] = module(getattr(gumbel_ext.nn, name)())
        for mode in ("argmax", "softmax", "sample"):
            calls[f"{name}, {mode}"] = module(getattr(gumbel_ext.nn, name)(eval_mode=mode).eval())
    return calls


TRACED = traced_calls()


def values_and_gradient(call, x, *state):
    """All that a call returns, and the gradient of what has one."""
    x = x.detach().requires_grad_()
    out = call(x, *state)
    out = out if isinstance(out, tuple) else (out,)
    smooth = [y for y in out if y.requires_grad]
    weights = [torch.arange(y.numel(), device=y.device).sin().view(y.shape) for y in smooth]
    gradient = torch.autograd.grad(smooth, x, weights) if smooth else ()
    return [y.detach() for y in (*out, *gradient)]


@pytest.mark.parametrize("given_state", [True, False], ids=["rng_state", "generator"])
@pytest.mark.parametrize("name", TRACED)
def test_a_trace_is_right_on_another_input(device, name, given_state):
    """Of every function and module: values, gradients, and the noise of another state."""
    # The noise of relaxed_topk has the size that was traced.
    rows = 8 if name.startswith("relaxed_topk") else 11
    x, other = torch.randn(8, 6, device=device), torch.randn(rows, 6, device=device)
    states = ([3, 0], [4, 1])
    states = [(torch.tensor(s, device=device),) if given_state else () for s in states]
    call = TRACED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(call, (x.requires_grad_(), *states[0]), check_trace=False)
    for state in states:
        torch.manual_seed(5)
        actual = values_and_gradient(traced, other, *state)
        torch.manual_seed(5)
        expected = values_and_gradient(call, other, *state)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


def scripted(x: torch.Tensor) -> torch.Tensor:
    return gumbel_ext.gumbel_softmax(x)


def scripted_op(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.gumbel_ext.gumbel_softmax(x, 0.5, None, False, -1, None, False, None, None)[0]


def test_jit_script_takes_the_ops_and_names_what_it_cannot_take(device):
    """It compiles Python's source, and has no words for that of the functions."""
    x = torch.randn(5, 6, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(torch.jit.frontend.NotSupportedError, match="keyword-only arguments"):
            torch.jit.script(scripted)
        compiled = torch.jit.script(scripted_op)
    torch.manual_seed(4)
    y = compiled(x)
    torch.manual_seed(4)
    assert torch.equal(y, gumbel_ext.gumbel_softmax(x, 0.5))


# ---- processes ----------------------------------------------------------------------------------


def child(modules, x, state, queue):
    """Results for one seed, and for a state that came along."""
    torch.set_num_threads(1)
    outputs = [tensor for module in modules for tensor in results(module, x)]
    outputs.append(gumbel_ext.gumbel_softmax(modules[0].project(x), 0.5, rng_state=state))
    queue.put([tensor.detach().numpy() for tensor in outputs])


@feature("multiprocessing, spawn")
@pytest.mark.cpu_only(reason="sharing tensors of a GPU with a process is torch's business")
def test_spawned_process():
    modules = [Quantiser(hard=False), Quantiser(hard=True)]
    x, state = torch.randn(5, 6), torch.tensor([3, 4])
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(modules, x, state, queue))
    process.start()
    received = queue.get()
    process.join(60)
    assert process.exitcode == 0
    expected = [tensor for module in modules for tensor in results(module, x)]
    expected.append(gumbel_ext.gumbel_softmax(modules[0].project(x), 0.5, rng_state=state))
    for a, b in zip(received, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b.detach(), rtol=1e-6, atol=1e-7)
