"""Activation checkpointing recomputes with the noise of the forward, or says that it cannot.

With other noise a gradient is wrong and nothing tells: shapes and dtypes agree.
"""

import functools

import pytest
import torch
from oracle import default_rng_state
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import gumbel_ext

OPS = torch.ops.gumbel_ext
SOFTMAX = OPS.gumbel_softmax.default

OP_NAMES = ("gumbel_softmax", "gumbel_softmax_hard")
ALL_OP_NAMES = (*OP_NAMES, "gumbel_argmax", "gumbel_noise")


def feature(name, *modes, ops=OP_NAMES):
    return pytest.mark.feature(name, ops=ops, modes=modes)


@pytest.fixture(autouse=True)
def clean_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def block(x, hard, **randomness):
    """Operations around the sample keep it for their own gradients, so its noise matters twice."""
    y = gumbel_ext.gumbel_softmax(x.sin(), 0.5, hard, **randomness)
    return (y * x.cos()).exp()


def two_draws(x, hard, first, second):
    return block(block(x, hard, **first), hard, **second)


def with_every_op(x, hard, **randomness):
    """The index and the bare noise have no gradient of their own; their values count."""
    index = gumbel_ext.gumbel_argmax(x, keepdim=True, **randomness)
    noise = gumbel_ext.gumbel_noise(x.shape, device=x.device, **randomness)
    return block(x, hard, **randomness) + x * x.gather(-1, index) + (x * noise).sin()


def gradient(function, device):
    """Of a randomly weighted loss. The generators start anew, for the function as for its block."""
    torch.manual_seed(3)
    leaf, weight = torch.randn(2, 20, 10, device=device)
    leaf = leaf.clone().requires_grad_()
    (function(leaf) * weight).sum().backward()
    assert leaf.grad.abs().max() > 0.01
    return leaf.grad


reentrant = pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved", "reentrant"])

ways = pytest.mark.parametrize(
    ("use_reentrant", "compiled"),
    [
        pytest.param(
            False,
            False,
            id="non-reentrant",
            marks=feature("activation checkpointing, non-reentrant", "eager"),
        ),
        pytest.param(
            True,
            False,
            id="reentrant",
            marks=feature("activation checkpointing, reentrant", "eager"),
        ),
        pytest.param(
            False,
            True,
            id="compiled-non-reentrant",
            marks=feature("activation checkpointing, non-reentrant", "compiled"),
        ),
        pytest.param(
            True,
            True,
            id="compiled-reentrant",
            marks=feature("activation checkpointing, reentrant", "compiled"),
        ),
    ],
)


def maybe_compiled(function, compiled, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, backend=backend) if compiled else function


# ---- the default generator ----------------------------------------------------------------------


@ways
def test_gradients_are_those_without_checkpointing(device, hard, use_reentrant, compiled):
    function = functools.partial(with_every_op, hard=hard)

    def checkpointed(x):
        return checkpoint(function, x, use_reentrant=use_reentrant)

    actual = gradient(maybe_compiled(checkpointed, compiled), device)
    torch.testing.assert_close(actual, gradient(function, device), rtol=1e-5, atol=1e-6)


@feature("activation checkpointing, non-reentrant", "compiled")
def test_inductor_recomputes_with_the_same_noise(device, hard):
    function = functools.partial(block, hard=hard)

    def checkpointed(x):
        return checkpoint(function, x, use_reentrant=False)

    actual = gradient(maybe_compiled(checkpointed, True, "inductor"), device)
    torch.testing.assert_close(actual, gradient(function, device), rtol=1e-5, atol=1e-6)


@feature("checkpoint_sequential", "eager")
@reentrant
def test_checkpoint_sequential(device, hard, use_reentrant):
    class Layer(torch.nn.Module):
        def forward(self, x):
            return x + block(x, hard)

    layers = torch.nn.Sequential(*(Layer() for _ in range(4)))
    actual = gradient(lambda x: checkpoint_sequential(layers, 2, x, use_reentrant), device)
    assert torch.equal(actual, gradient(layers, device))


def test_recomputation_leaves_the_generator_alone(device, hard):
    torch.manual_seed(3)
    x = torch.randn(20, 10, device=device, requires_grad=True)
    y = checkpoint(block, x, hard, use_reentrant=False)
    before = default_rng_state(device)
    y.cos().sum().backward()
    assert torch.equal(default_rng_state(device), before)


# ---- selective ----------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Counts the forward calls of the op."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is SOFTMAX
        return func(*args, **(kwargs or {}))


@feature("activation checkpointing, selective", "eager")
@pytest.mark.parametrize("policy", ["MUST_SAVE", "MUST_RECOMPUTE"])
def test_selective(device, hard, policy):
    def decide(context, op, *args, **kwargs):
        return CheckpointPolicy[policy] if op is SOFTMAX else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, decide)
    function = functools.partial(two_draws, hard=hard, first={}, second={})
    with Calls() as calls:
        actual = gradient(
            lambda x: checkpoint(function, x, use_reentrant=False, context_fn=contexts), device
        )
    assert torch.equal(actual, gradient(function, device))
    assert calls.count == (2 if policy == "MUST_SAVE" else 4)


@feature("activation checkpointing, selective", "compiled")
@pytest.mark.parametrize("policy", ["MUST_SAVE", "MUST_RECOMPUTE"])
def test_selective_compiled(device, hard, policy):
    graphs = []

    def decide(context, op, *args, **kwargs):
        return CheckpointPolicy[policy] if op is SOFTMAX else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, decide)

    def function(x):
        return block(x, hard)

    def checkpointed(x):
        return checkpoint(function, x, use_reentrant=False, context_fn=contexts)

    def keep(graph, inputs):
        # A random op that is recomputed is an argument of one that keeps or restores the generator.
        nodes = graph.graph.nodes
        graphs.append(sum(SOFTMAX in (node.target, *node.args) for node in nodes))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition
    )
    actual = gradient(maybe_compiled(checkpointed, True, backend), device)
    torch.testing.assert_close(actual, gradient(function, device), rtol=1e-5, atol=1e-6)
    assert graphs == [1, 0 if policy == "MUST_SAVE" else 1]


# ---- generators of one's own --------------------------------------------------------------------


def own(device):
    return torch.Generator(device).manual_seed(11)


@feature(
    "activation checkpointing with an own generator, rng_state", "eager", "compiled", ops=OP_NAMES
)
@ways
def test_states_drawn_outside(device, hard, use_reentrant, compiled):
    def with_states(x, first, second):
        return two_draws(x, hard, {"rng_state": first}, {"rng_state": second})

    def checkpointed(x, first, second):
        return checkpoint(with_states, x, first, second, use_reentrant=use_reentrant)

    def run(function):
        generator = own(device)
        states = [gumbel_ext.draw_rng_state(generator) for _ in range(2)]
        return gradient(lambda x: function(x, *states), device)

    def directly(x):
        generator = own(device)
        return two_draws(x, hard, {"generator": generator}, {"generator": generator})

    expected = gradient(directly, device)
    actual = run(maybe_compiled(checkpointed, compiled))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(run(with_states), expected)


@feature("activation checkpointing with an own generator, context_fn", "eager", ops=ALL_OP_NAMES)
def test_replayed_generators(device, hard):
    """Two checkpoints that share generators; the backward runs them in the opposite order."""

    def twice(x, run):
        a, b = own(device), own(device).manual_seed(12)
        for generators in ((a, b), (b, a)):
            x = run(lambda x, g=generators: between(x, *g), x, generators)
        return x

    def between(x, a, b):
        # torch's own functions are replayed too.
        x = with_every_op(x, hard, generator=a) * torch.rand(x.shape, device=device, generator=b)
        return block(x, hard, generator=b)

    def checkpointed(function, x, generators):
        contexts = gumbel_ext.replay_generators(*generators)
        return checkpoint(function, x, use_reentrant=False, context_fn=contexts)

    actual = gradient(lambda x: twice(x, checkpointed), device)
    expected = gradient(lambda x: twice(x, lambda function, x, _: function(x)), device)
    assert torch.equal(actual, expected)


def test_replayed_generators_nested_and_retained(device, hard):
    """A checkpoint within another, and a second backward of the same graph."""

    def inner(x, generator):
        return block(x, hard, generator=generator)

    def outer(x, generator, nested):
        x = block(x, hard, generator=generator)
        x = nested(inner, x, generator)
        return block(x, hard, generator=generator)

    def directly(function, *args):
        return function(*args)

    def checkpointed(function, *args):
        contexts = gumbel_ext.replay_generators(args[1])
        return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)

    def gradients(run):
        torch.manual_seed(3)
        x, weight = torch.randn(2, 20, 10, device=device)
        x = x.clone().requires_grad_()
        generator = own(device)
        loss = (run(outer, x, generator, run) * weight).sum()
        generator.manual_seed(99)
        after = generator.get_state()
        (first,) = torch.autograd.grad(loss, x, retain_graph=True)
        (second,) = torch.autograd.grad(loss, x)
        assert torch.equal(generator.get_state(), after)
        return first, second

    first, second = gradients(checkpointed)
    expected, _ = gradients(directly)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


@reentrant
@pytest.mark.parametrize(
    "call",
    [
        lambda x, **r: gumbel_ext.gumbel_softmax(x, 0.5, **r),
        lambda x, **r: gumbel_ext.gumbel_softmax(x, 0.5, hard=True, **r),
        lambda x, **r: x * gumbel_ext.gumbel_argmax(x, keepdim=True, **r),
        lambda x, **r: x * gumbel_ext.gumbel_noise(x.shape, device=x.device, **r),
        lambda x, **r: gumbel_ext.gumbel_softmax(
            x, rng_state=gumbel_ext.draw_rng_state(r["generator"])
        ),
    ],
    ids=[
        "gumbel_softmax",
        "gumbel_softmax-hard",
        "gumbel_argmax",
        "gumbel_noise",
        "draw_rng_state",
    ],
)
def test_a_generator_that_nothing_replays_is_an_error(device, call, use_reentrant):
    generator = own(device)
    x = torch.randn(20, 10, device=device, requires_grad=True)
    y = checkpoint(lambda x: call(x, generator=generator).exp(), x, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match=r"generator is read again .*replay_generators"):
        y.sum().backward()


@reentrant
def test_the_default_generator_by_name_is_replayed(device, hard, use_reentrant):
    """Checkpointing restores it, whoever passes it."""
    generator = torch.cuda.default_generators[0] if device == "cuda" else torch.default_generator
    function = functools.partial(block, hard=hard, generator=generator)
    actual = gradient(lambda x: checkpoint(function, x, use_reentrant=use_reentrant), device)
    assert torch.equal(actual, gradient(function, device))


def test_a_generator_in_a_plain_backward_is_no_error(device):
    """A backward that samples, as a custom function's may, is not a recomputation."""

    class Noisy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad + gumbel_ext.gumbel_noise(
                grad.shape, device=grad.device, generator=generator
            )

    generator = own(device)
    x = torch.randn(20, 10, device=device, requires_grad=True)
    Noisy.apply(x).sum().backward()
    assert torch.equal(
        x.grad, 1 + gumbel_ext.gumbel_noise(x.shape, device=device, generator=own(device))
    )


def test_replay_generators_checks_its_arguments(device):
    with pytest.raises(TypeError, match=r"generators must be .*, got int"):
        gumbel_ext.replay_generators(own(device), 3)


# ---- draw_rng_state -----------------------------------------------------------------------------


@feature("draw_rng_state", "eager", ops=ALL_OP_NAMES)
def test_a_drawn_state_is_that_of_a_call(device, hard):
    """The generator advances alike and the noise is the same, whichever op it was meant for."""
    x = torch.randn(20, 10, device=device)
    for call in (
        lambda **r: gumbel_ext.gumbel_softmax(x, 0.5, hard, **r),
        lambda **r: gumbel_ext.gumbel_argmax(x, **r),
        lambda **r: gumbel_ext.gumbel_noise((5, 7), device=device, **r),
    ):
        one, other = own(device), own(device)
        for _ in range(3):
            state = gumbel_ext.draw_rng_state(other)
            assert (state.shape, state.dtype, state.device.type) == ((2,), torch.int64, device)
            assert torch.equal(call(generator=one), call(rng_state=state))
            assert torch.equal(one.get_state(), other.get_state())

        torch.manual_seed(8)
        expected = call()
        torch.manual_seed(8)
        assert torch.equal(call(rng_state=gumbel_ext.draw_rng_state(device=device)), expected)


@feature("draw_rng_state", "compiled", ops=ALL_OP_NAMES)
def test_a_state_is_drawn_in_a_graph(device):
    def draw(x):
        a, b = (gumbel_ext.draw_rng_state(device=x.device) for _ in range(2))
        return gumbel_ext.gumbel_softmax(x, rng_state=a), gumbel_ext.gumbel_argmax(x, rng_state=b)

    x = torch.zeros(20, 10, device=device)
    torch.manual_seed(8)
    expected = draw(x)
    torch.manual_seed(8)
    y, index = torch.compile(draw, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, expected[0])
    assert torch.equal(index, expected[1])
    assert not torch.equal(y.argmax(-1), index)


def test_draw_rng_state_checks_its_arguments():
    with pytest.raises(TypeError, match=r"generator must be .*, got int"):
        gumbel_ext.draw_rng_state(3)
    with pytest.raises(ValueError, match="generator must be on the device of the result"):
        gumbel_ext.draw_rng_state(torch.Generator(), device="meta")
