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
