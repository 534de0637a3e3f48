"""The samplers as modules: training and evaluation, temperature, state."""

import copy
import io
import pickle

import pytest
import torch
from oracle import as_int64, rng_state

from gumbel_ext import gumbel_softmax, straight_through_softmax
from gumbel_ext.nn import GumbelSoftmax
from gumbel_ext.temperature import LearnableTemperature, LinearTemperature


def test_training_samples(hard, state, device):
    module = GumbelSoftmax(tau=0.4, hard=hard, dim=1).to(device)
    logits = torch.randn(3, 5, 2, device=device, requires_grad=True)
    mask = torch.rand(5, 1, device=device) < 0.7
    y, index = module(logits, mask=mask, return_index=True, rng_state=state)
    plain, plain_index = gumbel_softmax(
        logits, 0.4, hard, dim=1, mask=mask, return_index=True, rng_state=state
    )
    assert torch.equal(y, plain)
    assert torch.equal(index, plain_index)
    generators = [torch.Generator(device).manual_seed(7) for _ in range(2)]
    assert torch.equal(
        module(logits, generator=generators[0]),
        gumbel_softmax(logits, 0.4, hard, dim=1, generator=generators[1]),
    )
    assert not torch.equal(module(logits), module(logits))


def test_evaluation_as_chosen(state, device):
    logits = torch.randn(3, 5, device=device, requires_grad=True)
    mask = torch.ones(3, 5, dtype=torch.bool, device=device)
    mask[0, :3] = False
    mask[2] = False

    module = GumbelSoftmax(0.4).to(device).eval()
    y, index = module(logits, mask=mask, return_index=True)
    plain, plain_index = straight_through_softmax(logits, 0.4, mask=mask, return_index=True)
    assert torch.equal(y, plain)
    assert torch.equal(index, plain_index)
    (gradient,) = torch.autograd.grad(y, logits, torch.arange(15.0, device=device).view(3, 5))
    assert gradient[0, 3:].abs().min() > 0

    module = GumbelSoftmax(0.4, eval_mode="softmax").to(device).eval()
    assert torch.equal(module(logits), logits.softmax(-1))
    y, index = module(logits, mask=mask, return_index=True)
    assert torch.equal(index, plain_index)
    assert index[2] == -1
    torch.testing.assert_close(y[0, 3:], logits[0, 3:].softmax(-1))
    assert not y[2].any()
    assert (y[0, :3] == 0).all()
    (gradient,) = torch.autograd.grad(y, logits, torch.arange(15.0, device=device).view(3, 5))
    assert gradient.isfinite().all()

    module = GumbelSoftmax(0.4, eval_mode="sample").to(device).eval()
    assert torch.equal(
        module(logits, rng_state=state), gumbel_softmax(logits, 0.4, rng_state=state)
    )


def saved(module):
    stream = io.BytesIO()
    torch.save(module.state_dict(), stream)
    stream.seek(0)
    return torch.load(stream)


def test_state_restores_an_annealed_temperature():
    module = GumbelSoftmax(1.0)
    module.tau.fill_(0.3)
    other = GumbelSoftmax(1.0)
    other.load_state_dict(saved(module))
    assert other.temperature() == 0.3
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert copied.temperature() == 0.3

    schedule = LinearTemperature(1.0, 0.5, 10)
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), GumbelSoftmax(schedule))
    for _ in range(4):
        schedule.step()
    state = saved(module)
    assert state["1.tau"].item() == schedule.tau == pytest.approx(0.8)
    other = torch.nn.Sequential(torch.nn.Linear(3, 3), GumbelSoftmax(LinearTemperature(1, 0.5, 10)))
    other.load_state_dict(state)
    assert other[1].temperature() == schedule.tau
    # The entry is the same whoever makes the temperature.
    plain = torch.nn.Sequential(torch.nn.Linear(3, 3), GumbelSoftmax(1.0))
    plain.load_state_dict(state)
    assert plain[1].temperature() == schedule.tau
    del state["1.tau"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "1.tau"'):
        other.load_state_dict(state)
    # A copy has a schedule of its own.
    copied = copy.deepcopy(module)
    copied[1].tau.step()
    assert copied[1].temperature() != module[1].temperature() == schedule.tau

    module = GumbelSoftmax(LearnableTemperature(0.4))
    assert list(module.state_dict()) == ["tau.raw"]
    other = GumbelSoftmax(LearnableTemperature(1.0))
    other.load_state_dict(saved(module))
    assert torch.equal(other.temperature(), module.temperature())


def test_temperature_keeps_its_digits_in_a_module_of_16_bits():
    module = torch.nn.Sequential(GumbelSoftmax(0.3)).to(torch.bfloat16)
    assert module[0].tau.dtype == torch.float64
    assert module[0].temperature() == 0.3
    assert module.double()[0].temperature() == 0.3
    assert module.to("meta")[0].tau.device.type == "meta"


@pytest.mark.parametrize(
    "make",
    [
        lambda: 0.5,
        lambda: LinearTemperature(0.5, 0.1, 10),
        lambda: LearnableTemperature(0.5),
        lambda: lambda: torch.tensor(0.5, dtype=torch.float64),
    ],
    ids=["number", "schedule", "learnable", "callable"],
)
def test_temperature_from_anywhere(make, state):
    module = GumbelSoftmax(make())
    logits = torch.randn(3, 5)
    torch.testing.assert_close(
        module(logits, rng_state=state), gumbel_softmax(logits, 0.5, rng_state=state)
    )


def test_gradient_reaches_a_learnable_temperature(hard, state):
    module = GumbelSoftmax(LearnableTemperature(0.5), hard=hard)
    y = module(torch.randn(3, 5), rng_state=state)
    (y * torch.randn(3, 5)).sum().backward()
    assert module.tau.raw.grad.abs() > 1e-4


def test_gradient_reaches_a_temperature_given_for_a_call(state):
    module, logits = GumbelSoftmax(0.5), torch.randn(3, 5)

    def loss(tau):
        y = torch.func.functional_call(module, {"tau": tau}, (logits,), {"rng_state": state})
        return y.square().sum()

    tau = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(
        gumbel_softmax(logits, tau, rng_state=state).square().sum(), tau
    )
    torch.testing.assert_close(torch.autograd.grad(loss(tau), tau)[0], expected)
    torch.testing.assert_close(torch.func.grad(loss)(tau.detach()), expected)


@pytest.mark.parametrize("kind", ["number", "schedule"])
def test_annealing_compiles_once(kind):
    compiles = 0

    def count(graph, _):
        nonlocal compiles
        compiles += 1
        return graph

    schedule = LinearTemperature(1.0, 0.2, 8)
    module = GumbelSoftmax(schedule if kind == "schedule" else 1.0)
    compiled = torch.compile(module, fullgraph=True, backend=count)
    state = torch.tensor([as_int64(1 << 63), 5])
    logits = torch.randn(3, 5)
    for _ in range(5):
        expected = gumbel_softmax(logits, schedule.tau, rng_state=state)
        assert torch.equal(compiled(logits, rng_state=state), expected)
        schedule.step()
        if kind == "number":
            module.tau.fill_(schedule.tau)
    assert compiles == 1


@pytest.mark.parametrize("eval_mode", ["argmax", "softmax"])
def test_exported_in_evaluation(eval_mode):
    module = GumbelSoftmax(0.5, eval_mode=eval_mode).eval()
    logits = torch.randn(3, 5)
    program = torch.export.export(module, (logits,))
    other = torch.randn(3, 5)
    assert torch.equal(program.module()(other), module(other))


def test_repr():
    assert repr(GumbelSoftmax(0.5, True)) == (
        "GumbelSoftmax(tau=0.5, hard=True, dim=-1, eval_mode='argmax')"
    )
    assert "tau=LinearTemperature(start=1.0" in repr(GumbelSoftmax(LinearTemperature(1, 0.5, 9)))
    assert "(tau): LearnableTemperature" in repr(GumbelSoftmax(LearnableTemperature(0.5)))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"tau": 0.0}, ValueError, "tau must be positive and finite, got 0.0"),
        (
            {"tau": "1"},
            TypeError,
            "tau must be a number, a TemperatureSchedule, a callable or a tensor",
        ),
        ({"dim": 1.0}, TypeError, "dim must be an int, got 1.0"),
        ({"eval_mode": "mean"}, ValueError, "eval_mode must be one of .* got 'mean'"),
    ],
)
def test_errors_name_the_argument_and_its_value(arguments, error, words):
    with pytest.raises(error, match=f"GumbelSoftmax: {words}"):
        GumbelSoftmax(**arguments)


def test_temperature_written_in_place_is_checked():
    module = GumbelSoftmax()
    module.tau.fill_(-1.0)
    with pytest.raises(ValueError, match="tau must be positive and finite, got -1"):
        module(torch.randn(3), rng_state=rng_state())
