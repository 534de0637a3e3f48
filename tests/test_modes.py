"""Every mode of PyTorch does to our ops what it does to softmax."""

import contextlib
import threading
import warnings
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, SIXTEEN_BIT, DispatchLog, rng_state
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.masked import masked_tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

import gumbel_ext

SOFTMAX = ("gumbel_softmax", "gumbel_softmax_hard")
ALL = (*SOFTMAX, "gumbel_argmax", "gumbel_noise")
INDEX = (*SOFTMAX, "gumbel_argmax")


def works(name, ops=SOFTMAX, modes=("eager",)):
    return pytest.mark.feature(name, ops=ops, modes=modes)


def weights_of(logits):
    """Of a fixed dtype: the tests change the default one."""
    count = torch.arange(logits.numel(), dtype=torch.float32, device=logits.device)
    return count.view(logits.shape).cos()


def results(logits, state=None, tau=0.7):
    """Soft and hard samples, their gradients of a weighted sum, index and noise."""
    weight = weights_of(logits)
    found = {}
    for hard in (False, True):
        leaf = logits.detach().clone().requires_grad_()
        learned = torch.full((), tau, dtype=torch.float64, device=logits.device)
        learned.requires_grad_()
        y, index = gumbel_ext.gumbel_softmax(
            leaf, learned, hard, return_index=True, rng_state=state
        )
        (y * weight).sum().backward()
        found |= {f"y {hard}": y.detach(), f"index {hard}": index}
        found |= {f"grad {hard}": leaf.grad, f"tau {hard}": learned.grad}
        found[f"number {hard}"] = gumbel_ext.gumbel_softmax(logits, tau, hard, rng_state=state)
    found["argmax"] = gumbel_ext.gumbel_argmax(logits, rng_state=state)
    found["noise"] = gumbel_ext.gumbel_noise(
        logits.shape, dtype=logits.dtype, device=logits.device, rng_state=state
    )
    return found


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


# ---- autocast -----------------------------------------------------------------------------------


@pytest.fixture
def no_autocast_after():
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    yield
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", dtype)


@works("autocast", ALL)
@pytest.mark.parametrize("region", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_gives_the_dtype_of_softmax(device, state, dtype, region, hard):
    logits = torch.randn(4, 5).to(device, dtype).requires_grad_()
    tau = torch.full((4, 1), 0.5, device=device, requires_grad=True)
    with torch.autocast(device, region):
        expected = logits.softmax(-1).dtype
        assert F.gumbel_softmax(logits, 0.5, hard).dtype == expected
        y, index = gumbel_ext.gumbel_softmax(logits, tau, hard, return_index=True, rng_state=state)
        number = gumbel_ext.gumbel_softmax(logits, 0.5, hard, rng_state=state)
        argmax = gumbel_ext.gumbel_argmax(logits, rng_state=state)
        noise = gumbel_ext.gumbel_noise((4, 5), dtype=dtype, device=device, rng_state=state)
        (y * torch.randn(4, 5, device=device)).sum().backward()
    assert y.dtype == number.dtype == expected
    assert torch.equal(y, number)
    cast = logits.to(expected)
    assert torch.equal(y, gumbel_ext.gumbel_softmax(cast, 0.5, hard, rng_state=state))
    assert torch.equal(index, argmax)
    assert noise.dtype == dtype
    assert (logits.grad.dtype, tau.grad.dtype) == (dtype, torch.float32)
    assert tau.grad.isfinite().all()


@works("autocast")
@pytest.mark.parametrize("region", SIXTEEN_BIT, ids=str)
def test_autocast_around_a_model(device, region, hard):
    """A linear layer gives 16-bit logits; the temperature and the loss stay float32."""
    model = nn.Linear(6, 5).to(device)
    tau = nn.Parameter(torch.tensor(0.5, device=device))
    data, target = torch.randn(8, 6, device=device), torch.randn(8, 5, device=device)
    with torch.autocast(device, region):
        logits = model(data)
        y = gumbel_ext.gumbel_softmax(logits, tau, hard, mask=target > -9)
        loss = F.mse_loss(y.float(), target)
        assert logits.dtype == region
        assert y.dtype == logits.softmax(-1).dtype
    loss.backward()
    for gradient in (model.weight.grad, tau.grad):
        assert gradient.dtype == torch.float32
        assert gradient.abs().max() > 0


@works("autocast", SOFTMAX, ("compiled",))
@pytest.mark.parametrize("region", SIXTEEN_BIT, ids=str)
def test_autocast_compiled(device, state, region, hard):
    torch.compiler.reset()
    model = nn.Linear(6, 5).to(device)

    def inside(x):
        with torch.autocast(device, region):
            return gumbel_ext.gumbel_softmax(model(x), 0.5, hard, rng_state=state)

    data = torch.randn(8, 6, device=device)
    compiled = torch.compile(inside, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(data), inside(data))
    assert compiled(data).dtype == inside(data).dtype
    torch.compiler.reset()


@works("autocast", INDEX)
@pytest.mark.cpu_only(reason="fake tensors of a GPU that is not there")
@pytest.mark.parametrize("region", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("no_autocast_after")
def test_autocast_for_cuda_gives_the_dtype_of_softmax(dtype, region, hard):
    """There, and not on the CPU, softmax of 16-bit logits is float32."""
    # torch.autocast("cuda") does nothing without a GPU; these calls are what it is made of.
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", region)
    with FakeTensorMode():
        logits = torch.empty(4, 5, dtype=dtype, device="cuda:1")
        softmax = logits.softmax(-1)
        y = gumbel_ext.gumbel_softmax(logits, 0.5, hard)
        assert softmax.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert y.dtype == softmax.dtype == F.gumbel_softmax(logits, 0.5, hard).dtype
        assert gumbel_ext.gumbel_argmax(logits).dtype == torch.int64
        noise = gumbel_ext.gumbel_noise(3, dtype=dtype, device="cuda:1")
        assert noise.dtype == dtype
    # Tensors of the CPU are none of its business.
    logits = torch.randn(4, 5).to(dtype)
    assert gumbel_ext.gumbel_softmax(logits, 0.5, hard).dtype == dtype == logits.softmax(-1).dtype


# ---- inference mode, no_grad --------------------------------------------------------------------


@works("inference_mode", INDEX)
@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode(device, state, hard, made_inside):
    outside = torch.randn(4, 5, device=device, requires_grad=True)
    tau = torch.full((4, 1), 0.5, device=device)
    with torch.inference_mode():
        logits = outside.clone() if made_inside else outside
        y, index = gumbel_ext.gumbel_softmax(logits, tau, hard, return_index=True, rng_state=state)
        argmax = gumbel_ext.gumbel_argmax(logits, rng_state=state)
        noise = gumbel_ext.gumbel_noise(3, device=device)
    for tensor in (y, index, argmax, noise):
        assert tensor.is_inference()
        assert not tensor.requires_grad
    expected = gumbel_ext.gumbel_softmax(outside, 0.5, hard, rng_state=state)
    assert torch.equal(y, expected)
    assert torch.equal(index, argmax)


@works("inference_mode")
def test_inference_tensors_in_autograd_are_refused_as_by_softmax(device, hard):
    with torch.inference_mode():
        logits = torch.randn(4, 5, device=device)
    tau = torch.full((4, 1), 0.5, device=device, requires_grad=True)
    if hard:  # needs the logits in the backward
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            gumbel_ext.gumbel_softmax(logits, tau, hard)
    else:
        gumbel_ext.gumbel_softmax(logits, tau).square().sum().backward()
        assert tau.grad.abs().max() > 0
    assert not gumbel_ext.gumbel_softmax(logits, 0.5, hard).requires_grad
    assert not logits.softmax(-1).requires_grad


@works("no_grad")
def test_no_grad(device, state, hard):
    logits = torch.randn(4, 5, device=device, requires_grad=True)
    with torch.no_grad():
        y = gumbel_ext.gumbel_softmax(logits, 0.5, hard, rng_state=state)
    assert not y.requires_grad
    with_grad = gumbel_ext.gumbel_softmax(logits, 0.5, hard, rng_state=state)
    assert with_grad.requires_grad
    assert torch.equal(y, with_grad)


# ---- deterministic mode -------------------------------------------------------------------------


@works("use_deterministic_algorithms", ALL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_mode(device, state, dtype):
    """Nothing refuses, and memory that the mode fills with NaN is nowhere read."""
    logits = torch.randn(7, 33).to(device, dtype)
    expected = results(logits, state)
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        assert_same_bits(results(logits, state), expected)
    finally:
        torch.use_deterministic_algorithms(False)


# ---- default dtype and device -------------------------------------------------------------------


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@works("set_default_dtype", ALL)
@pytest.mark.parametrize("default", DTYPES, ids=str)
def test_default_dtype(device, state, default_dtype, default):
    """It decides the dtype of gumbel_noise alone; 0.1 stays 0.1 where float16 is the default."""
    logits = torch.randn(7, 33, device=device)
    expected = results(logits, state, tau=0.1)
    default_dtype(default)
    assert_same_bits(results(logits, state, tau=0.1), expected)
    assert gumbel_ext.gumbel_noise(3, device=device).dtype == default == torch.randn(3).dtype


@works("set_default_dtype", SOFTMAX, ("compiled",))
def test_default_dtype_compiled(device, state, default_dtype, hard):
    torch.compiler.reset()
    logits = torch.randn(7, 33, device=device)
    function = torch.compile(
        lambda x, tau: gumbel_ext.gumbel_softmax(x, tau, hard, rng_state=state),
        backend="aot_eager",
        fullgraph=True,
    )
    default_dtype(torch.bfloat16)
    expected = gumbel_ext.gumbel_softmax(logits, 0.1, hard, rng_state=state)
    assert torch.equal(function(logits, 0.1), expected)
    torch.compiler.reset()


@pytest.fixture(params=["context", "set_default_device"])
def default_device(request):
    if request.param == "context":
        yield torch.device
    else:
        yield lambda device: torch.set_default_device(device) or contextlib.nullcontext()
        torch.set_default_device(None)
        # A None stays behind, which get_default_device() of torch 2.8 trips over.
        del torch._GLOBAL_DEVICE_CONTEXT.device_context


@works("torch.device context, set_default_device", ALL)
def test_default_device(device, state, default_device):
    """It decides the device of gumbel_noise alone."""
    logits = torch.randn(7, 33, device=device)
    expected = results(logits, state)
    with default_device("meta"):
        assert gumbel_ext.gumbel_noise(3).device.type == "meta"
        assert gumbel_ext.gumbel_noise(3, device=device).device.type == device
        on_meta = torch.randn(4, 5)
        assert gumbel_ext.gumbel_softmax(on_meta, 0.5).device.type == "meta"
        for hard in (False, True):
            y = gumbel_ext.gumbel_softmax(logits, 0.7, hard, rng_state=state)
            assert torch.equal(y, expected[f"y {hard}"])
        assert torch.equal(gumbel_ext.gumbel_argmax(logits, rng_state=state), expected["argmax"])


@works("torch.device context, set_default_device", SOFTMAX, ("compiled",))
def test_default_device_compiled(device, state, default_device, hard):
    """The temperature that the graph makes of a number must not land on the default device."""
    torch.compiler.reset()
    logits = torch.randn(7, 33, device=device)
    expected = gumbel_ext.gumbel_softmax(logits, 0.7, hard, rng_state=state)
    function = torch.compile(
        lambda x, tau: gumbel_ext.gumbel_softmax(x, tau, hard, rng_state=state),
        backend="eager",
        fullgraph=True,
    )
    with default_device("meta"):
        assert torch.equal(function(logits, 0.7), expected)
    torch.compiler.reset()


# ---- tensor subclasses, modes of Python ---------------------------------------------------------


class Labelled(torch.Tensor):
    """A subclass that only has a type, as torchvision's and fastai's."""


class Recording(torch.Tensor):
    calls: ClassVar = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append((func, args, kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


class Duck:
    """No tensor at all, but it answers for the functions of torch."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return func.__name__


@works("tensor subclasses: __torch_function__", INDEX)
def test_type_of_a_subclass_is_kept(device, state, hard):
    plain = torch.randn(4, 5, device=device)
    logits = plain.as_subclass(Labelled).requires_grad_()
    y, index = gumbel_ext.gumbel_softmax(logits, 0.5, hard, return_index=True, rng_state=state)
    argmax = gumbel_ext.gumbel_argmax(logits, rng_state=state)
    assert type(y) is type(index) is type(argmax) is type(logits.softmax(-1)) is Labelled
    expected = gumbel_ext.gumbel_softmax(plain, 0.5, hard, rng_state=state)
    assert torch.equal(y.as_subclass(torch.Tensor), expected)
    (y * torch.randn(4, 5, device=device)).sum().backward()
    assert logits.grad.abs().max() > 0


@works("tensor subclasses: __torch_function__", INDEX)
def test_handlers_see_the_function_and_every_argument(device, state):
    logits = torch.randn(4, 5, device=device).as_subclass(Recording)
    mask = torch.ones(4, 5, dtype=torch.bool, device=device)
    Recording.calls.clear()
    gumbel_ext.gumbel_softmax(logits, 0.5, True, dim=0, mask=mask, rng_state=state)
    gumbel_ext.gumbel_argmax(logits, 0, True, mask=mask, rng_state=state)
    (softmax, *first), (argmax, *second) = Recording.calls
    assert softmax is gumbel_ext.gumbel_softmax
    assert argmax is gumbel_ext.gumbel_argmax
    assert first[0][1:] == (0.5, True, 1e-10, 0)
    assert second[0][1:] == (0, True)
    for _, keywords in (first, second):
        assert keywords["mask"] is mask
        assert keywords["rng_state"] is state


@works("tensor subclasses: __torch_function__", INDEX)
def test_objects_that_are_no_tensors_may_answer():
    assert gumbel_ext.gumbel_softmax(Duck()) == "gumbel_softmax"
    assert gumbel_ext.gumbel_argmax(Duck()) == "gumbel_argmax"


@works("tensor subclasses: __torch_function__")
def test_subclasses_as_other_arguments(device, state, hard):
    logits = torch.randn(4, 5, device=device)
    tau = torch.full((4, 1), 0.5, device=device)
    mask = torch.rand(4, 5, device=device) < 0.8
    expected = gumbel_ext.gumbel_softmax(logits, tau, hard, mask=mask, rng_state=state)
    y = gumbel_ext.gumbel_softmax(
        logits,
        tau.as_subclass(Labelled),
        hard,
        mask=mask.as_subclass(Labelled),
        rng_state=state,
    )
    assert torch.equal(y.as_subclass(torch.Tensor), expected)


@works("nn.Parameter")
def test_parameters_give_tensors(device, hard):
    logits = nn.Parameter(torch.randn(4, 5, device=device))
    tau = nn.Parameter(torch.ones((), device=device))
    y = gumbel_ext.gumbel_softmax(logits, tau, hard)
    assert type(y) is torch.Tensor
    (y * torch.randn(4, 5, device=device)).sum().backward()
    assert logits.grad.abs().max() > 0
    assert tau.grad != 0


class FunctionLog(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


@works("TorchFunctionMode", ALL)
def test_function_mode_sees_one_call(device, state, hard):
    logits = torch.randn(4, 5, device=device)
    expected = gumbel_ext.gumbel_softmax(logits, 0.5, hard, rng_state=state)
    with FunctionLog() as log:
        y = gumbel_ext.gumbel_softmax(logits, 0.5, hard, rng_state=state)
        gumbel_ext.gumbel_argmax(logits, rng_state=state)
    assert log.calls == [gumbel_ext.gumbel_softmax, gumbel_ext.gumbel_argmax]
    assert torch.equal(y, expected)
    with FunctionLog() as log:
        gumbel_ext.gumbel_noise(3, device=device)
    assert log.calls[-1] is torch.ops.gumbel_ext.gumbel_noise.default


@works("TorchDispatchMode", ALL)
def test_dispatch_mode_sees_forward_and_backward(device, hard):
    logits = torch.randn(4, 5, device=device, requires_grad=True)
    with DispatchLog() as log:
        y = gumbel_ext.gumbel_softmax(logits, 0.5, hard)
        (y * torch.randn(4, 5, device=device)).sum().backward()
        gumbel_ext.gumbel_argmax(logits)
        gumbel_ext.gumbel_noise(3, device=device)
    backward = "gumbel_softmax_hard_backward" if hard else "gumbel_softmax_backward"
    assert log.names == ["gumbel_softmax", backward, "gumbel_argmax", "gumbel_noise"]


class Wrapper(torch.Tensor):
    """A tensor that holds another and passes every op on to it."""

    seen: ClassVar = []

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            dtype=inner.dtype,
            device=inner.device,
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner):
        self.inner = inner.detach()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func.name())
        args, kwargs = tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, cls, func(*args, **kwargs))


@works("tensor subclasses: __torch_dispatch__", INDEX)
def test_wrapper_subclass(device, state, hard):
    plain, weight = torch.randn(2, 4, 5, device=device)

    def gradient(wrap):
        leaf = wrap(plain.clone().requires_grad_())
        y = gumbel_ext.gumbel_softmax(leaf, 0.5, hard, rng_state=state)
        (y * weight).sum().backward()
        return y.detach(), leaf.grad, gumbel_ext.gumbel_argmax(leaf, rng_state=state)

    Wrapper.seen.clear()
    wrapped = gradient(Wrapper)
    for actual, expected in zip(wrapped, gradient(lambda t: t), strict=True):
        assert type(actual) is Wrapper
        assert torch.equal(actual.inner, expected)
    backward = "gumbel_softmax_hard_backward" if hard else "gumbel_softmax_backward"
    for name in ("gumbel_softmax", backward, "gumbel_argmax"):
        assert f"gumbel_ext::{name}" in Wrapper.seen


def of_another_kind():
    dense = torch.randn(3, 4)
    yield "sparse_coo", dense.to_sparse, "Sparse"
    yield "sparse_csr", dense.to_sparse_csr, "SparseCsr"
    if torch.backends.mkldnn.is_available():
        yield "mkldnn", dense.to_mkldnn, "Mkldnn"
    yield "nested", lambda: torch.nested.nested_tensor([dense, dense[:2]]), "nested"
    yield (
        "quantized",
        lambda: torch.quantize_per_tensor(dense, 0.1, 0, torch.quint8),
        "quantized",
    )


KINDS = {name: rest for name, *rest in of_another_kind()}


@pytest.mark.cpu_only(reason="made on the CPU")
@pytest.mark.parametrize("kind", KINDS)
def test_other_layouts_get_one_line(kind, hard):
    make, word = KINDS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits = make()
        for call in (
            lambda: gumbel_ext.gumbel_softmax(logits, hard=hard),
            lambda: gumbel_ext.gumbel_argmax(logits),
        ):
            with pytest.raises(TypeError, match=rf"\Agumbel_\w+: logits must be .*{word}.*\Z"):
                call()
        if kind != "nested":
            with pytest.raises((TypeError, RuntimeError)):
                gumbel_ext.gumbel_softmax(torch.randn(3, 4), hard=hard, mask=logits)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_subclasses_without_a_rule_say_so():
    """As F.gumbel_softmax of them; torch.softmax has rules of its own for both."""
    masked = masked_tensor(torch.randn(3, 4), torch.rand(3, 4) > 0.5)
    jagged = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)
    for logits in (masked, jagged):
        for function in (gumbel_ext.gumbel_softmax, gumbel_ext.gumbel_argmax):
            with pytest.raises((TypeError, NotImplementedError), match=function.__name__):
                function(logits)
        with pytest.raises((TypeError, NotImplementedError)):
            F.gumbel_softmax(logits)


# ---- autograd's own modes and tools -------------------------------------------------------------


def weighted(logits, state, hard, tau=0.5):
    weight = weights_of(logits)
    return (gumbel_ext.gumbel_softmax(logits, tau, hard, rng_state=state) * weight).sum()


def plain_gradient(logits, state, hard):
    return torch.autograd.grad(weighted(logits, state, hard), logits)[0]


@works("detect_anomaly")
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_mode(device, state, hard):
    logits = torch.randn(4, 5, device=device, requires_grad=True)
    expected = plain_gradient(logits, state, hard)
    with torch.autograd.detect_anomaly():
        assert torch.equal(plain_gradient(logits, state, hard), expected)
        y = gumbel_ext.gumbel_softmax(logits, 0.5, hard)
        with (
            pytest.warns(UserWarning, match="Traceback of forward call"),
            pytest.raises(RuntimeError, match=r"GumbelSoftmax.* returned nan values"),
        ):
            (y * float("inf")).sum().backward()


@works("hooks, retain_grad")
def test_hooks_on_the_sample(device, state, hard):
    logits = torch.randn(4, 5, device=device, requires_grad=True)
    weight = torch.randn(4, 5, device=device)
    y = gumbel_ext.gumbel_softmax(logits, 0.5, hard, rng_state=state)
    y.retain_grad()
    y.register_hook(lambda grad: grad * weight)
    y.sum().backward()
    assert torch.equal(y.grad, weight)
    leaf = logits.detach().clone().requires_grad_()
    (gumbel_ext.gumbel_softmax(leaf, 0.5, hard, rng_state=state) * weight).sum().backward()
    assert torch.equal(logits.grad, leaf.grad)


@works("retain_graph")
def test_backward_twice(device, state, hard):
    logits = torch.randn(4, 5, device=device, requires_grad=True)
    loss = weighted(logits, state, hard)
    loss.backward(retain_graph=True)
    once = logits.grad.clone()
    loss.backward()
    assert torch.equal(logits.grad, 2 * once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@works("allow_unused, materialize_grads")
def test_gradients_of_what_is_not_used(device, state, hard):
    logits = torch.randn(4, 5, device=device, requires_grad=True)
    tau = torch.full((4, 1), 0.5, device=device, requires_grad=True)
    other = torch.ones((), device=device, requires_grad=True)
    loss = weighted(logits, state, hard)
    grads = torch.autograd.grad(loss, [logits, tau, other], allow_unused=True, retain_graph=True)
    assert torch.equal(grads[0], plain_gradient(logits, state, hard))
    assert grads[1] is grads[2] is None
    zeros = torch.autograd.grad(loss, [tau, other], materialize_grads=True)
    assert all((zero == 0).all() for zero in zeros)
    # A temperature alone.
    fixed = logits.detach()
    (alone,) = torch.autograd.grad(weighted(fixed, state, hard, tau), tau)
    both = torch.autograd.grad(weighted(logits, state, hard, tau), [logits, tau])
    assert torch.equal(alone, both[1])
    index = gumbel_ext.gumbel_softmax(logits, hard=hard, return_index=True)[1]
    assert not index.requires_grad
    assert not gumbel_ext.gumbel_argmax(logits).requires_grad


@works("is_grads_batched")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_gradients(device, state, hard):
    logits = torch.randn(4, 5, device=device, requires_grad=True)
    y = gumbel_ext.gumbel_softmax(logits, 0.5, hard, rng_state=state)
    vectors = torch.randn(3, 4, 5, device=device)
    (batched,) = torch.autograd.grad(y, logits, vectors, is_grads_batched=True, retain_graph=True)
    for vector, actual in zip(vectors, batched, strict=True):
        (expected,) = torch.autograd.grad(y, logits, vector, retain_graph=True)
        torch.testing.assert_close(actual, expected)


@works("saved_tensors_hooks")
def test_saved_tensors_pass_through_hooks(device, state, hard):
    """And are few: one tensor of the size of the logits, the index, a straight-through state."""
    logits = torch.randn(40, 50, device=device, requires_grad=True)
    expected = plain_gradient(logits, state, hard)
    packed, unpacked = [], []

    def pack(tensor):
        packed.append(tensor)
        return tensor.clone()

    def unpack(tensor):
        unpacked.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = gumbel_ext.gumbel_softmax(logits, 0.5, hard, rng_state=state)
    sizes = [tensor.numel() for tensor in packed]
    assert sizes == ([40, 2000, 2] if hard else [40, 2000])
    (actual,) = torch.autograd.grad((y * weights_of(logits)).sum(), logits)
    assert torch.equal(actual, expected)
    assert len(unpacked) == len(packed)


@works("save_on_cpu")
def test_save_on_cpu(device, state, hard):
    logits = torch.randn(4, 5, device=device, requires_grad=True)
    expected = plain_gradient(logits, state, hard)
    with torch.autograd.graph.save_on_cpu():
        actual = plain_gradient(logits, state, hard)
    assert torch.equal(actual, expected)


@works("disable_saved_tensors_hooks")
def test_saved_tensors_hooks_disabled(device, state, hard):
    logits = torch.randn(4, 5, device=device, requires_grad=True)
    with torch.autograd.graph.disable_saved_tensors_hooks("no hooks here"):
        plain_gradient(logits, state, hard)
        with pytest.raises(RuntimeError, match="no hooks here"), torch.autograd.graph.save_on_cpu():
            pass


@works("multi-threaded backward")
def test_backward_in_many_threads(device, hard):
    """Threads share a leaf and add to its gradient; an extra leaf a thread shows their own."""
    shared = torch.randn(64, 33, device=device, requires_grad=True)
    states = [rng_state(seed=i, device=device) for i in range(8)]
    found = [None] * len(states)

    def work(i):
        own = torch.zeros(64, 33, device=device, requires_grad=True)
        weighted(shared + own, states[i], hard).backward()
        found[i] = own.grad

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(states))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, gradient in enumerate(found):
        assert torch.equal(gradient, plain_gradient(shared, states[i], hard))
    torch.testing.assert_close(shared.grad, sum(found), rtol=1e-5, atol=1e-5)


@works("in-place changes are noticed")
def test_saved_tensors_changed_in_place(device, hard):
    """A straight-through sample saves its logits, a soft one itself; tau both; leaves as copies."""
    base = torch.randn(4, 5, device=device, requires_grad=True)
    changed = "modified by an inplace operation"

    logits = base * 1
    y = gumbel_ext.gumbel_softmax(logits, 0.5, hard)
    logits.add_(1)
    if hard:
        with pytest.raises(RuntimeError, match=changed):
            y.square().sum().backward()
    else:
        y.square().sum().backward()

    y = gumbel_ext.gumbel_softmax(base * 1, 0.5, hard)
    y.mul_(2)
    if hard:
        (y * torch.randn(4, 5, device=device)).sum().backward()
    else:
        with pytest.raises(RuntimeError, match=changed):
            (y * torch.randn(4, 5, device=device)).sum().backward()

    tau = torch.full((4, 1), 0.5, device=device, requires_grad=True) * 1
    y = gumbel_ext.gumbel_softmax(base, tau, hard)
    with torch.no_grad():
        tau.mul_(0.9)
    with pytest.raises(RuntimeError, match=changed):
        (y * torch.randn(4, 5, device=device)).sum().backward()
