"""The binary concrete's ops inside PyTorch: derivatives of any order, vmap, compilation, modes."""

import pytest
import torch
from oracle import DTYPES, TORCH, DispatchLog, rng_state
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import gumbel_ext
from gumbel_ext import _reference, binary_concrete, logistic_noise

OPS = torch.ops.gumbel_ext


def feature(name, mode="eager"):
    return pytest.mark.feature(name, ops=("binary_concrete",), modes=(mode,))


def inputs(device, *shape, tau=(4, 1)):
    logits = torch.randn(shape or (4, 5), dtype=torch.float64, device=device, requires_grad=True)
    temperature = torch.rand(tau, dtype=torch.float64, device=device) + 0.5
    return logits, temperature.requires_grad_()


# ---- registration -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@feature("torch.library.opcheck")
def test_opcheck(device, state, hard, dtype):
    logits = torch.randn(4, 5, device=device).to(dtype).requires_grad_()
    tau = torch.rand(4, 1, device=device, requires_grad=True)
    for arguments in (
        (logits, 0.7, None, hard, None, state),
        (logits, 1.0, tau, hard, None, state),
        (logits.detach().mT, 0.7, None, hard, None, state, [3, 1, 7]),
        (logits.detach()[:0], 0.7, None, hard, None, state),
        (logits.detach()[0, 0], 0.7, None, hard, None, state),
    ):
        opcheck(OPS.binary_concrete.default, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_backward_and_noise(device, state, dtype):
    logits = torch.randn(4, 5, device=device).to(dtype)
    dy, tau = torch.randn_like(logits), torch.rand(5, device=device)
    for tau_grad in (False, True):
        opcheck(OPS.binary_concrete_backward.default, (dy, logits, 1.0, tau, state, tau_grad))
    opcheck(OPS.logistic_noise.default, (logits, (3, 4), None, state))
    opcheck(OPS.logistic_noise.default, (logits, (3, 4), None, state, [9, 0, 2]))


# ---- derivatives --------------------------------------------------------------------------------


@feature("gradcheck, gradgradcheck")
@feature("forward-mode AD, dual tensors")
def test_gradcheck(device, state):
    for shape, tau in (((4, 5), (4, 1)), ((3,), ()), ((), ())):
        arguments = inputs(device, *shape, tau=tau)

        def sample(logits, temperature):
            return binary_concrete(logits, temperature, rng_state=state)

        assert torch.autograd.gradcheck(
            sample, arguments, check_forward_ad=True, check_batched_grad=True
        )
        assert torch.autograd.gradgradcheck(sample, arguments, check_fwd_over_rev=True)


def reference_derivatives(logits, tau, weights, state):
    y = _reference.binary_concrete(logits, tau, rng_state=state)
    first = torch.autograd.grad((y * weights).sum(), (logits, tau), create_graph=True)
    second = torch.autograd.grad((first[0].sin().sum() + first[1].cos().sum()), (logits, tau))
    return (*first, *second)


def test_derivatives_are_those_of_the_soft_sample(device, state, hard):
    logits, tau = inputs(device)
    weights = torch.randn(4, 5, dtype=torch.float64, device=device)
    expected = reference_derivatives(logits, tau, weights, state)
    y = binary_concrete(logits, tau, hard, rng_state=state)
    first = torch.autograd.grad((y * weights).sum(), (logits, tau), create_graph=True)
    second = torch.autograd.grad((first[0].sin().sum() + first[1].cos().sum()), (logits, tau))
    for actual, wanted in zip((*first, *second), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@feature("torch.func grad")
@feature("torch.func jacrev")
@feature("torch.func jvp")
@feature("torch.func vjp")
def test_torch_func(device, state, hard):
    """Each transform, and one in another, against torch.autograd on the reference."""
    logits, tau = (t.detach() for t in inputs(device))
    weights, tangent = torch.randn(2, 4, 5, dtype=torch.float64, device=device)

    def loss(x, t):
        return (binary_concrete(x, t, hard, rng_state=state) * weights).sum()

    def soft(x, t):
        return (_reference.binary_concrete(x, t, rng_state=state) * weights).sum()

    for argnums in (0, 1):
        wanted = grad(soft, argnums)(logits, tau)
        torch.testing.assert_close(grad(loss, argnums)(logits, tau), wanted)
        torch.testing.assert_close(jacrev(loss, argnums)(logits, tau), wanted)
    value, slope = jvp(lambda x: loss(x, tau), (logits,), (tangent,))
    torch.testing.assert_close(value, loss(logits, tau))
    torch.testing.assert_close(slope, jvp(lambda x: soft(x, tau), (logits,), (tangent,))[1])

    def norm(function):
        return lambda x: grad(function)(x, tau).square().sum()

    torch.testing.assert_close(grad(norm(loss))(logits), grad(norm(soft))(logits))
    _, pull = vjp(lambda x: grad(loss)(x, tau), logits)
    _, wanted = vjp(lambda x: grad(soft)(x, tau), logits)
    torch.testing.assert_close(pull(tangent)[0], wanted(tangent)[0])


def test_gradient_under_a_transform_where_the_sample_has_rounded(device, state):
    logits = torch.linspace(-50, 50, 101, device=device)
    actual = grad(lambda x: binary_concrete(x, rng_state=state).sum())(logits)
    wide = logits.double().requires_grad_()
    z = wide + _reference.logistic_noise((101,), rng_state(device=device))
    slope = torch.sigmoid(-z.abs()) * (1 - torch.sigmoid(-z.abs()))
    torch.testing.assert_close(actual.double(), slope, rtol=1e-5, atol=0)


# ---- vmap ---------------------------------------------------------------------------------------


@feature("vmap with rng_state")
def test_vmap_with_a_state_is_the_single_call(device, state, hard):
    logits = torch.randn(6, 4, 5, device=device)
    tau = torch.rand(6, device=device) + 0.5
    for mode in ("error", "same", "different"):
        actual = vmap(lambda x, t: binary_concrete(x, t, hard, rng_state=state), randomness=mode)(
            logits, tau
        )
        for i in range(6):
            assert torch.equal(actual[i], binary_concrete(logits[i], tau[i], hard, rng_state=state))
    # Of scalars, in another dimension, and of the temperature alone.
    actual = vmap(lambda x: binary_concrete(x, 0.5, hard, rng_state=state))(logits[:, 0, 0])
    for i in range(6):
        assert torch.equal(actual[i], binary_concrete(logits[i, 0, 0], 0.5, hard, rng_state=state))
    actual = vmap(lambda x: binary_concrete(x, 0.5, hard, rng_state=state), in_dims=2, out_dims=2)(
        logits
    )
    assert torch.equal(actual[..., 3], binary_concrete(logits[..., 3], 0.5, hard, rng_state=state))
    actual = vmap(lambda t: binary_concrete(logits[0], t, hard, rng_state=state))(tau)
    assert torch.equal(actual[3], binary_concrete(logits[0], tau[3], hard, rng_state=state))


@feature("vmap over rng_state")
def test_vmap_over_states(device, hard):
    states = torch.tensor([[1, 2], [3, 4], [5, 6]], device=device)
    logits = torch.randn(4, device=device)
    actual = vmap(lambda s: binary_concrete(logits, 0.5, hard, rng_state=s))(states)
    noise = vmap(lambda s: logistic_noise(4, device=device, rng_state=s))(states)
    for i in range(3):
        assert torch.equal(actual[i], binary_concrete(logits, 0.5, hard, rng_state=states[i]))
        assert torch.equal(noise[i], logistic_noise(4, device=device, rng_state=states[i]))


@feature("vmap randomness=error")
@feature("vmap randomness=same")
@feature("vmap randomness=different")
def test_vmap_that_draws(device, hard):
    logits = torch.randn(6, 4, 5, device=device)

    def draw(x):
        return binary_concrete(x, 0.5, hard)

    def seeded(function):
        torch.manual_seed(4)
        return function()

    with pytest.raises(RuntimeError, match="randomness error mode"):
        vmap(draw)(logits)
    with pytest.raises(RuntimeError, match="randomness error mode"):
        vmap(lambda _: logistic_noise(3, device=device))(logits)
    different = seeded(lambda: vmap(draw, randomness="different")(logits))
    assert torch.equal(different, seeded(lambda: draw(logits)))
    same = seeded(lambda: vmap(draw, randomness="same")(logits))
    for i in range(6):
        assert torch.equal(same[i], seeded(lambda i=i: draw(logits[i])))
    noise = seeded(
        lambda: vmap(lambda _: logistic_noise(3, device=device), randomness="different")(logits)
    )
    assert torch.equal(noise, seeded(lambda: logistic_noise((6, 3), device=device)))
    noise = seeded(
        lambda: vmap(lambda _: logistic_noise(3, device=device), randomness="same")(logits)
    )
    assert torch.equal(noise, seeded(lambda: logistic_noise(3, device=device)).expand(6, 3))


@pytest.mark.parametrize("mode", ["same", "different"])
@feature("vmap of grad, per-sample gradients")
def test_per_example_gradients(device, mode, hard):
    """Each with the noise of its own sample, also where the one state that was drawn is not it."""
    logits = torch.randn(6, 4, device=device, dtype=torch.float64)
    tau = torch.tensor(0.6, device=device, dtype=torch.float64)

    def loss(x, t):
        return binary_concrete(x, t, hard).square().sum() + binary_concrete(x, t).sum()

    def soft(x, t, drawn):
        y = [
            _reference.binary_concrete(x, t, h, noise=n)
            for h, n in zip((hard, False), drawn, strict=False)
        ]
        return y[0].square().sum() + y[1].sum()

    torch.manual_seed(3)
    actual = vmap(grad(loss, (0, 1)), in_dims=(0, None), randomness=mode)(logits, tau)
    torch.manual_seed(3)
    shape = (6, 4) if mode == "different" else (4,)
    drawn = [logistic_noise(shape, dtype=torch.float64, device=device) for _ in range(2)]
    for i in range(6):
        own = [n[i] if mode == "different" else n for n in drawn]
        expected = grad(soft, (0, 1))(logits[i], tau, own)
        for mine, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(mine[i], wanted)


@feature("grad of vmap")
def test_gradient_through_vmap(device, state, hard):
    logits, tau = inputs(device, 6, 4, tau=())
    weights = torch.randn(6, 4, dtype=torch.float64, device=device)
    y = vmap(lambda x: binary_concrete(x, tau, hard, rng_state=state))(logits)
    actual = torch.autograd.grad((y * weights).sum(), (logits, tau))
    rows = [_reference.binary_concrete(x, tau, rng_state=state) for x in logits]
    expected = torch.autograd.grad((torch.stack(rows) * weights).sum(), (logits, tau))
    for mine, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, wanted)


# ---- compilation --------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@feature("torch.compile(fullgraph=True), forward and backward", "compiled")
@feature("torch.compile(dynamic=True)", "compiled")
def test_compiled(device, state, hard, dynamic):
    def function(x, t, s):
        return binary_concrete(x, t, hard, rng_state=s) * 2

    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for shape in ((4, 5), (7, 5)):
        logits = torch.randn(shape, device=device, requires_grad=True)
        tau = torch.tensor(0.7, device=device, requires_grad=True)
        weights = torch.randn(shape, device=device)
        expected, actual = (f(logits, tau, state) for f in (function, compiled))
        assert torch.equal(actual, expected)
        results = [
            torch.autograd.grad((y * weights).sum(), (logits, tau)) for y in (expected, actual)
        ]
        for wanted, mine in zip(*results, strict=True):
            assert torch.equal(mine, wanted)
        assert torch.equal(compiled(logits, 0.3, state), function(logits, 0.3, state))


@feature("two calls in one graph draw different noise", "compiled")
def test_two_draws_stay_two(device):
    """A graph with a gradient goes through common-subexpression elimination."""

    def function(x):
        return binary_concrete(x, 0.5), binary_concrete(x, 0.5), logistic_noise(4, device=device)

    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    logits = torch.zeros(4, device=device, requires_grad=True)
    torch.manual_seed(1)
    results = compiled(logits)
    torch.manual_seed(1)
    for mine, wanted in zip(results, function(logits), strict=True):
        assert torch.equal(mine, wanted)
    assert not torch.equal(results[0], results[1])


@feature("activation checkpointing, non-reentrant")
@feature("activation checkpointing, non-reentrant", "compiled")
def test_compiled_checkpoint_replays_the_noise(device):
    """Without its tag an op is recomputed with other noise."""

    def loss(x):
        return checkpoint(lambda v: binary_concrete(v, 0.5).sin(), x, use_reentrant=False)

    torch.compiler.reset()
    logits = torch.randn(1000, device=device, requires_grad=True)
    for function in (loss, torch.compile(loss, backend="aot_eager")):
        torch.manual_seed(2)
        y = function(logits)
        (actual,) = torch.autograd.grad(y.sum(), logits)
        torch.manual_seed(2)
        (expected,) = torch.autograd.grad(binary_concrete(logits, 0.5).sin().sum(), logits)
        torch.testing.assert_close(actual, expected)


class Gate(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tau = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, logits, state):
        return binary_concrete(logits, self.tau, hard=True, rng_state=state)


@feature("torch.export non-strict", "exported")
def test_exported(device, state):
    module, logits = Gate().to(device), torch.randn(3, 4, device=device)
    program = torch.export.export(module, (logits, state), strict=False)
    assert torch.equal(program.module()(logits, state), module(logits, state))
    calls = [str(n.target) for n in program.graph.nodes if "gumbel_ext" in str(n.target)]
    assert calls == ["gumbel_ext.binary_concrete.default"]


@feature("torch.func functional_call")
def test_functional_call(device, state):
    module, logits = Gate().to(device), torch.randn(3, 4, device=device)
    tau = torch.tensor(0.9, device=device)
    actual = grad(lambda t: functional_call(module, {"tau": t}, (logits, state)).sum())(tau)
    tau.requires_grad_()
    soft = _reference.binary_concrete(logits, tau, rng_state=state).sum()
    torch.testing.assert_close(actual, torch.autograd.grad(soft, tau)[0])


# ---- modes --------------------------------------------------------------------------------------


def test_autocast_leaves_the_dtype_as_sigmoid_does(device, state):
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(3, 4, device=device, dtype=dtype)
        with torch.autocast(device, dtype=torch.bfloat16):
            y = binary_concrete(logits, rng_state=state)
            assert y.dtype == torch.sigmoid(logits).dtype == dtype
        assert torch.equal(y, binary_concrete(logits, rng_state=state))


def test_inference_mode_and_no_grad(device, state):
    logits = torch.randn(3, 4, device=device, requires_grad=True)
    expected = binary_concrete(logits, rng_state=state)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            y = binary_concrete(logits, rng_state=state)
        assert not y.requires_grad
        assert torch.equal(y, expected)


def test_subclasses_see_the_call(device):
    calls = []

    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            calls.append(function)
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))

    binary_concrete(torch.zeros(3, device=device).as_subclass(Logged))
    assert calls == [binary_concrete]


def test_one_op_a_call(device):
    with DispatchLog() as log:
        binary_concrete(torch.zeros(3, device=device))
        gumbel_ext.logistic_noise(3, device=device)
    assert log.names == ["binary_concrete", "logistic_noise"]


@pytest.mark.skipif(TORCH < (2, 11), reason="before torch 2.11 what is fake does not compile")
@feature("meta tensors")
def test_meta_tensors():
    for logits in (torch.empty(3, 4, device="meta"), torch.empty(4, 3, device="meta").mT):
        y = binary_concrete(logits, torch.empty(4, device="meta"))
        assert (y.shape, y.stride(), y.device.type) == ((3, 4), logits.stride(), "meta")
