"""A compiled backward has the noise of its forward, whatever the compiler merges or recomputes."""

import sys
from functools import partial

import graph_calls
import pytest
import torch
from torch._functorch import config
from torch._library.simple_registry import find_torch_dispatch_rule
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, make_fx

import gumbel_ext
from gumbel_ext._ops import random_ops

OPS = torch.ops.gumbel_ext
# Partitions as Inductor does, and runs the graphs as they are.
PARTITIONED = "aot_eager_decomp_partition"
SETTINGS = {
    "budget_0.5": {"activation_memory_budget": 0.5},
    "budget_0.3": {"activation_memory_budget": 0.3},
    "aggressive": {"aggressive_recomputation": True},
}


@pytest.fixture(autouse=True)
def clean_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def inputs(device):
    """Logits, their classes in dimension 1, and weights."""
    generator = torch.Generator().manual_seed(3)
    x, w = torch.randn(2, 6, 8, 10, generator=generator).to(device)
    return x.requires_grad_(), w.requires_grad_()


def draw_of(name):
    return partial(graph_calls.DRAWING[name], dim=1)


def training_step(draw):
    """Operations around the sample that keep it, or recompute it, for their own gradients."""

    def step(x, w):
        y = draw(x)
        scale = w if y.shape == w.shape else w.mean()
        # What is returned is a product, not the sample, which would be kept anyway.
        return (torch.sin(y * scale).cos() * torch.exp(0.1 * y)).sum(), y * 1

    return step


def run(function, device, seed=5):
    x, w = inputs(device)
    torch.manual_seed(seed)
    loss, y = function(x, w)
    return y.detach(), *torch.autograd.grad(loss, (x, w))


def assert_like_eager(step, device, backend):
    actual = run(torch.compile(step, fullgraph=True, backend=backend), device)
    for a, b in zip(actual, run(step, device), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", graph_calls.DRAWING)
def test_gradients_are_those_of_the_sample(device, name, setting):
    with config.patch(SETTINGS[setting]):
        assert_like_eager(training_step(draw_of(name)), device, PARTITIONED)


@pytest.mark.parametrize("setting", ["budget_0.3", "aggressive"])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_gradients_with_inductor(device, hard, setting):
    def draw(x):
        return gumbel_ext.gumbel_softmax(x, 0.7, hard, dim=1)

    with config.patch(SETTINGS[setting]):
        assert_like_eager(training_step(draw), device, "inductor")


def graph_of(draw, device):
    """As AOTAutograd traces a call: its forward and backward, in operators."""
    x, _ = inputs(device)

    def joint(x):
        return torch.autograd.grad(draw(x).sum(), x)

    return make_fx(joint, tracing_mode="fake")(x).graph


def test_the_calls_are_of_every_op_that_draws(device):
    """So that an op that is added is tested here, or this fails."""
    called = {
        node.target
        for name in graph_calls.DRAWING
        for node in graph_of(draw_of(name), device).nodes
        if node.op == "call_function"
    }
    # It is made of the others.
    assert set(random_ops().values()) - called == {OPS.decoupled_gumbel_softmax.default}


@pytest.mark.parametrize("name", graph_calls.DRAWING)
def test_a_graph_draws_states_alone(device, name):
    graph = graph_of(draw_of(name), device)
    drawing = [node for node in graph.nodes if node.target in random_ops().values()]
    states = [node for node in drawing if node.target is OPS.draw_rng_state.default]
    assert states
    for node in drawing:
        if node not in states:
            names = [argument.name for argument in node.target._schema.arguments]
            assert node.args[names.index("rng_state")] is not None
            assert node.args[names.index("generator")] is None


@pytest.mark.parametrize("name", graph_calls.DRAWING)
def test_equal_calls_draw_twice(device, name):
    """In a training graph, whose common subexpressions are merged."""
    draw = draw_of(name)
    zeros = torch.zeros(6, 8, 500, device=device)

    @torch.compile(fullgraph=True, backend=PARTITIONED)
    def twice(zeros, logits):
        # Indices differ in what they choose.
        x = zeros + torch.arange(8.0, device=zeros.device).view(8, 1) / 100 + logits
        return draw(x) * 1, draw(x) * 1

    first, second = twice(zeros, zeros.clone().requires_grad_())
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", graph_calls.OF_A_STATE)
def test_calls_of_one_state_are_equal(device, state, name):
    draw = draw_of(name)

    @torch.compile(fullgraph=True, backend=PARTITIONED)
    def twice(x, state):
        return draw(x, rng_state=state) * 1, draw(x, rng_state=state) * 1

    first, second = twice(inputs(device)[0], state)
    assert torch.equal(first, second)
    expected = draw(inputs(device)[0], rng_state=state)
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-6)


def several(x):
    """Draws that depend on one another in another order than they are written in."""
    a = gumbel_ext.gumbel_noise(x.shape, device=x.device)
    b = gumbel_ext.gumbel_softmax(x, 0.5, hard=True)
    c = gumbel_ext.binary_concrete(x.sin(), 0.5)
    d = gumbel_ext.gumbel_softmax(c + b, 0.5)
    e = gumbel_ext.gumbel_log_softmax(x, 0.5)
    return d.exp() + e, a * c, b


@pytest.mark.parametrize("backend", ["aot_eager", PARTITIONED, "inductor", "reduce-overhead"])
def test_several_draws_keep_their_order(device, backend):
    how = {"mode": backend} if backend == "reduce-overhead" else {"backend": backend}
    for learn in (False, True):
        torch.compiler.reset()
        x = inputs(device)[0].detach().requires_grad_(learn)
        torch.manual_seed(2)
        expected = several(x)
        torch.manual_seed(2)
        actual = torch.compile(several, fullgraph=True, **how)(x)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["soft", "gumbel_noise", "topk_of_none"])
def test_a_call_of_nothing_draws_nothing(device, name):
    """As in eager: what follows has the noise that it has there."""
    draws = {
        "soft": lambda x: gumbel_ext.gumbel_softmax(x[:0]),
        "gumbel_noise": lambda x: gumbel_ext.gumbel_noise((0, 3), device=x.device),
        "topk_of_none": lambda x: gumbel_ext.gumbel_topk(x, 0),
    }

    def sample(x):
        return draws[name](x), gumbel_ext.gumbel_softmax(x)

    x = inputs(device)[0]
    for dynamic in (False, True):
        torch.compiler.reset()
        torch.manual_seed(2)
        expected = sample(x)[1]
        torch.manual_seed(2)
        compiled = torch.compile(sample, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        assert torch.equal(compiled(x)[1], expected)


def test_a_draw_in_a_checkpointed_block(device):
    """Whose operations are recomputed by order; the state is kept."""

    def step(x, w):
        def block(x):
            return gumbel_ext.gumbel_softmax(x, 0.7, dim=1).exp()

        y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return (y * w).sin().sum(), y

    for setting in SETTINGS.values():
        torch.compiler.reset()
        with config.patch(setting):
            assert_like_eager(step, device, PARTITIONED)


def test_registration_is_of_every_op_and_leaves_nothing_else():
    for op in random_ops().values():
        assert find_torch_dispatch_rule(op, ProxyTorchDispatchMode) is not None
    assert not [finder for finder in sys.meta_path if "gumbel_ext" in type(finder).__module__]
