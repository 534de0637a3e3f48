"""torch.compile sees through every op: one graph, the noise of eager, right gradients."""

import subprocess
import sys

import pytest
import torch
from oracle import DTYPES, expanded, layouts, rng_state
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.library import opcheck

import gumbel_ext

OPS = torch.ops.gumbel_ext
RANDOM_OPS = ("gumbel_softmax", "gumbel_argmax", "gumbel_noise")
BACKWARD_OPS = ("gumbel_softmax_backward", "gumbel_softmax_hard_backward")
SOFTMAX = ("gumbel_softmax", "gumbel_softmax_hard")
ALL = (*SOFTMAX, "gumbel_argmax", "gumbel_noise")


def feature(name, ops, mode="compiled"):
    return pytest.mark.feature(name, ops=ops, modes=(mode,))


@pytest.fixture(autouse=True)
def clean_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# ---- registration -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RANDOM_OPS)
def test_random_ops_say_so(name):
    """Without the tag a compiled checkpoint silently draws other noise in the backward."""
    tags = getattr(OPS, name).default.tags
    assert torch.Tag.nondeterministic_seeded in tags
    assert torch.Tag.pt2_compliant_tag in tags


@pytest.mark.parametrize("name", BACKWARD_OPS)
def test_backward_ops_are_deterministic(name):
    tags = getattr(OPS, name).default.tags
    assert torch.Tag.nondeterministic_seeded not in tags
    assert torch.Tag.pt2_compliant_tag in tags


def options():
    """``(tau, tau_tensor, mask)`` for logits of shape [4, 5, 6] with classes in dimension 1."""
    yield "plain", 0.7, None, None
    yield "tau_scalar", 1.0, torch.tensor(0.7), None
    yield "tau_rows", 1.0, 0.5 + torch.rand(4, 1, 6), None
    yield "mask", 0.7, None, torch.rand(4, 5, 6) < 0.7
    yield "mask_and_tau", 1.0, 0.5 + torch.rand(4, 1, 1), torch.rand(5, 1) < 0.7


OPTIONS = {name: rest for name, *rest in options()}


@feature("torch.library.opcheck", SOFTMAX, "eager")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_opcheck_softmax(device, state, hard, option, dtype):
    tau, tau_tensor, mask = OPTIONS[option]
    logits = torch.randn(4, 5, 6).to(device, dtype)
    mask = None if mask is None else mask.to(device)
    for learn in (False, True):
        for laid in (logits, logits.mT.contiguous().mT):
            leaf = laid.detach().clone().requires_grad_(learn)
            if tau_tensor is not None:
                temperature = tau_tensor.to(device, dtype, copy=True).requires_grad_(learn)
            else:
                temperature = None
            opcheck(
                OPS.gumbel_softmax.default,
                (leaf, tau, temperature, hard, 1, mask, learn, None, state),
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_opcheck_backward(device, state, option, dtype):
    tau, tau_tensor, mask = OPTIONS[option]
    logits, grad = torch.randn(2, 4, 5, 6).to(device, dtype)
    mask = None if mask is None else mask.to(device)
    tau_tensor = None if tau_tensor is None else tau_tensor.to(device, dtype)
    y, index, used = OPS.gumbel_softmax(logits, tau, tau_tensor, False, 1, mask, True, None, state)
    for tau_grad in (False, True):
        opcheck(
            OPS.gumbel_softmax_backward.default,
            (grad, y, index, tau, tau_tensor, 1, tau_grad),
        )
        opcheck(
            OPS.gumbel_softmax_hard_backward.default,
            (grad, logits, index, tau, tau_tensor, 1, mask, used, tau_grad),
        )


@feature("torch.library.opcheck", ALL[2:], "eager")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_argmax_and_noise(device, state, dtype):
    logits = torch.randn(4, 5, 6).to(device, dtype)
    for dim in (0, 1, -1):
        for keepdim in (False, True):
            for mask in (None, logits > 0):
                opcheck(OPS.gumbel_argmax.default, (logits, dim, keepdim, mask, None, state))
    for size in ([3, 4], [0, 2], []):
        opcheck(OPS.gumbel_noise.default, (logits, size, None, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_tensors_have_the_strides_of_real_ones(device, state, hard, dtype):
    """Every layout, and expanded views: a wrong stride in a compiled graph is a wrong answer."""
    logits = torch.randn(3, 4, 5, 6).to(device, dtype)
    for name, laid in (*layouts(logits), *expanded(logits)):
        for return_index in (False, True):
            real = OPS.gumbel_softmax(laid, 0.5, None, hard, 1, None, return_index, None, state)
            mode = FakeTensorMode()
            with mode:
                fake = OPS.gumbel_softmax(
                    mode.from_tensor(laid),
                    0.5,
                    None,
                    hard,
                    1,
                    None,
                    return_index,
                    None,
                    mode.from_tensor(state),
                )
            for a, b in zip(real, fake, strict=True):
                assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), name
                assert a.device == b.device


@feature("meta tensors", SOFTMAX, "eager")
def test_meta_tensors_have_shapes(hard):
    logits = torch.empty(3, 40, 5, device="meta", dtype=torch.bfloat16)
    y, index = gumbel_ext.gumbel_softmax(logits, 0.5, hard, dim=1, return_index=True)
    assert y.device.type == index.device.type == "meta"
    assert (y.shape, y.dtype) == (logits.shape, logits.dtype)
    assert (index.shape, index.dtype) == ((3, 5), torch.int64)
    assert gumbel_ext.gumbel_argmax(logits, 1, keepdim=True).shape == (3, 1, 5)
    assert gumbel_ext.gumbel_noise((2, 3), device="meta").shape == (2, 3)


# ---- values -------------------------------------------------------------------------------------


def step(logits, tau, hard, mask, state=None):
    """Forward and backward with all results; weights make every gradient count."""
    weight = torch.arange(logits.numel(), device=logits.device).view(logits.shape).cos()
    y, index = gumbel_ext.gumbel_softmax(
        logits, tau, hard, dim=1, mask=mask, return_index=True, rng_state=state
    )
    return y, index, (y * weight).sum()


@feature("torch.compile(fullgraph=True), forward and backward", SOFTMAX)
@feature("torch.compile(dynamic=True)", SOFTMAX)
@feature("rng_state", SOFTMAX)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("stateless", [False, True], ids=["generator", "rng_state"])
@pytest.mark.parametrize("option", OPTIONS)
def test_equals_eager(device, hard, option, stateless, dynamic):
    """Same seed, same bits: the compiled graph calls the same kernels."""
    tau, tau_tensor, mask = OPTIONS[option]
    mask = None if mask is None else mask.to(device)
    state = rng_state(device=device) if stateless else None
    base = torch.randn(4, 5, 6, device=device)

    def run(function):
        torch.manual_seed(5)
        leaf = base.clone().requires_grad_()
        learned = None if tau_tensor is None else tau_tensor.to(device).detach().requires_grad_()
        y, index, loss = function(leaf, tau if learned is None else learned, hard, mask, state)
        loss.backward()
        return [y.detach(), index, leaf.grad] + ([] if learned is None else [learned.grad])

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for actual, expected in zip(run(compiled), run(step), strict=True):
        if actual.dtype == torch.int64:
            assert torch.equal(actual, expected)
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    y = run(compiled)[0]
    assert torch.equal(y, run(step)[0])


@feature("torch.compile(fullgraph=True), forward and backward", ALL[2:])
@feature("torch.compile(dynamic=True)", ALL[2:])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_argmax_and_noise_equal_eager(device, dynamic):
    def draw(logits):
        return gumbel_ext.gumbel_argmax(logits, 0, keepdim=True), gumbel_ext.gumbel_noise(
            logits.shape, device=logits.device
        )

    logits = torch.randn(7, 5, device=device)
    torch.manual_seed(1)
    expected = draw(logits)
    torch.manual_seed(1)
    actual = torch.compile(draw, fullgraph=True, dynamic=dynamic)(logits)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@feature("two calls in one graph draw different noise", ("gumbel_softmax", *ALL[2:]))
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_two_calls_in_one_graph_draw_different_noise(device, backend):
    """Common-subexpression elimination must not merge them; nor two runs of the graph."""

    @torch.compile(fullgraph=True, backend=backend)
    def twice(logits):
        return (
            gumbel_ext.gumbel_softmax(logits),
            gumbel_ext.gumbel_softmax(logits),
            gumbel_ext.gumbel_argmax(logits),
            gumbel_ext.gumbel_argmax(logits),
            gumbel_ext.gumbel_noise((100,), device=logits.device),
            gumbel_ext.gumbel_noise((100,), device=logits.device),
        )

    logits = torch.zeros(100, 50, device=device)
    first, second = twice(logits), twice(logits)
    for a, b in zip(first[0::2], first[1::2], strict=True):
        assert not torch.equal(a, b)
    for a, b in zip(first, second, strict=True):
        assert not torch.equal(a, b)


CALLED_DIRECTLY = """
import sys
import gumbel_ext
assert "torch._functorch.compile_utils" not in sys.modules
import torch

@torch.compile(fullgraph=True, backend="aot_eager_decomp_partition")
def twice(x):
    op = torch.ops.gumbel_ext.gumbel_softmax
    return [op(x, 1.0, None, False, -1, None, False, None, None)[0] * 1 for _ in range(2)]

first, second = twice(torch.zeros(4, 5, requires_grad=True))
assert not torch.equal(first, second)
assert torch._functorch.compile_utils.__loader__ is torch._functorch.compile_utils.__spec__.loader
assert len(sys.meta_path) == before
"""


@feature("two calls in one graph draw different noise", SOFTMAX)
def test_ops_called_directly_draw_different_noise():
    """As in a loaded program that is compiled for training, before any function is traced."""
    code = "import sys; before = len(sys.meta_path)" + CALLED_DIRECTLY
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_one_state_in_one_graph_draws_the_same_noise(device, state):
    @torch.compile(fullgraph=True)
    def twice(logits, state):
        return (
            gumbel_ext.gumbel_argmax(logits, rng_state=state),
            gumbel_ext.gumbel_argmax(logits, rng_state=state),
        )

    a, b = twice(torch.zeros(100, 50, device=device), state)
    assert torch.equal(a, b)


MODES = pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])


@feature('torch.compile(mode="reduce-overhead")', SOFTMAX)
@MODES
def test_modes_equal_eager(device, hard, mode):
    """Forward and backward twice: where there are CUDA graphs, the second is a replay."""

    def sample(x):
        y, index = gumbel_ext.gumbel_softmax(x.sin(), 0.5, hard, return_index=True)
        return y, index, (y * x.detach().cos()).exp().sum()

    def runs(function):
        torch.manual_seed(5)
        outputs = []
        for _ in range(2):
            x = torch.linspace(-2, 2, 30, device=device).view(5, 6).requires_grad_()
            *values, loss = function(x)
            loss.backward()
            outputs += [value.detach().clone() for value in (*values, loss, x.grad)]
        return outputs

    actual, expected = runs(torch.compile(sample, mode=mode)), runs(sample)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not torch.equal(actual[0], actual[4])


@feature('torch.compile(mode="reduce-overhead")', ALL[2:])
@MODES
def test_modes_of_argmax_and_noise_equal_eager(device, mode):
    x = torch.zeros(5, 6, device=device)
    for draw in (
        lambda x: gumbel_ext.gumbel_argmax(x, 0),
        lambda x: gumbel_ext.gumbel_noise(x.shape, device=x.device),
    ):
        compiled = torch.compile(draw, mode=mode)
        torch.manual_seed(5)
        actual = [compiled(x).clone() for _ in range(2)]
        torch.manual_seed(5)
        for y in actual:
            assert torch.equal(y, draw(x))
        assert not torch.equal(*actual)


def test_a_generator_breaks_the_graph(device, hard):
    """Dynamo has no generators: what reads one runs outside of the graphs, and right."""

    def sample(x, generator):
        return gumbel_ext.gumbel_softmax(x.sin(), 0.5, hard, generator=generator).exp()

    x = torch.randn(5, 6, device=device)
    own = [torch.Generator(device).manual_seed(3) for _ in range(2)]
    compiled = torch.compile(sample, backend="eager")
    for _ in range(2):
        assert torch.equal(compiled(x, own[0]), sample(x, own[1]))
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(sample, backend="eager", fullgraph=True)(x, own[0])


@pytest.mark.cpu_only(reason="fake tensors of a GPU need none")
def test_a_state_on_the_cpu_goes_to_the_logits():
    """Eager reads it where it is; fake tensors do not, so a traced program must move it."""

    class Sampler(torch.nn.Module):
        def forward(self, x, state):
            return (
                gumbel_ext.gumbel_softmax(x, 0.5, rng_state=state),
                gumbel_ext.gumbel_argmax(x, rng_state=state),
                gumbel_ext.gumbel_noise((3,), device=x.device, rng_state=state),
            )

    with FakeTensorMode(shape_env=ShapeEnv()):
        inputs = torch.empty(3, 4, device="cuda:1"), torch.empty(2, dtype=torch.int64)
    program = torch.export.export(Sampler(), inputs, strict=False)
    outputs = [node.meta["val"] for node in program.graph.find_nodes(op="output")[0].args[0]]
    assert [tuple(y.shape) for y in outputs] == [(3, 4), (3,), (3,)]
    assert {y.device.type for y in outputs} == {"cuda"}


# ---- recompilation ------------------------------------------------------------------------------


@feature("no recompilation for a new temperature", SOFTMAX)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_annealed_temperature_does_not_recompile(device, hard, dynamic, backend):
    """A schedule gives a new number each step; a limit of 8 recompilations would end compiling.

    A number that Dynamo keeps symbolic AOTAutograd may still make a constant: both are counted.
    """
    counter = CompileCounterWithBackend(backend)

    def train(logits, tau):
        return gumbel_ext.gumbel_softmax(logits, tau, hard).cos()

    compiled = torch.compile(train, backend=counter, fullgraph=True, dynamic=dynamic)
    logits = torch.randn(5, 6, device=device, requires_grad=True)
    for i in range(20):
        tau = 1.0 - 0.04 * i
        torch.manual_seed(i)
        actual = compiled(logits, tau)
        torch.manual_seed(i)
        assert torch.equal(actual, train(logits, tau))
        actual.sum().backward()
    assert counter.frame_count <= 3


def test_temperature_tensor_does_not_recompile(device, hard):
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(
        lambda x, tau: gumbel_ext.gumbel_softmax(x, tau, hard), backend=counter, fullgraph=True
    )
    logits = torch.randn(5, 6, device=device)
    for i in range(20):
        compiled(logits, torch.tensor(1.0 - 0.04 * i, device=device))
    assert counter.frame_count == 1


@feature("no recompilation for a new batch size", SOFTMAX)
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_batch_size_does_not_recompile(device, hard, dynamic):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x: gumbel_ext.gumbel_softmax(x, 0.5, hard, return_index=True),
        backend=counter,
        fullgraph=True,
        dynamic=dynamic,
    )
    for rows in (5, 6, 7, 19, 64, 3):
        logits = torch.randn(rows, 8, 6, device=device, requires_grad=True)
        y, index = compiled(logits)
        assert y.shape == logits.shape
        assert index.shape == (rows, 8)
        y.square().sum().backward()
    assert counter.frame_count <= 2


# ---- a model ------------------------------------------------------------------------------------


def test_compiled_training_follows_eager(device, hard):
    """Ten steps of a small model: the same losses, to rounding, as eager with the same seed."""

    def losses(compile_it):
        torch.manual_seed(0)
        encoder = torch.nn.Linear(12, 5 * 8).to(device)
        decoder = torch.nn.Linear(5 * 8, 12).to(device)
        optimizer = torch.optim.SGD([*encoder.parameters(), *decoder.parameters()], lr=0.5)
        data = torch.randn(64, 12, device=device)

        def loss_of(x, tau):
            codes = gumbel_ext.gumbel_softmax(encoder(x).view(-1, 5, 8), tau, hard)
            return torch.nn.functional.mse_loss(decoder(codes.flatten(1)), x)

        function = torch.compile(loss_of, fullgraph=True) if compile_it else loss_of
        history = []
        for i in range(10):
            loss = function(data, 1.0 - 0.05 * i)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        return torch.tensor(history)

    actual, expected = losses(True), losses(False)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert actual.unique().numel() == 10
