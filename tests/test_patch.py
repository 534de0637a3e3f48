"""patch_torch() puts our function in the place of F.gumbel_softmax, and takes it out again."""

import contextlib
import inspect
import pickle
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import gumbel_ext
import gumbel_ext.patch

ORIGINAL = F.gumbel_softmax
patched = pytest.mark.feature(
    "drop-in: patch_torch", ops=("gumbel_softmax", "gumbel_softmax_hard"), modes=("eager",)
)


@pytest.fixture(autouse=True)
def original_before_and_after():
    assert F.gumbel_softmax is ORIGINAL
    yield
    left = F.gumbel_softmax
    F.gumbel_softmax = ORIGINAL
    gumbel_ext.patch._handles.clear()
    assert left is ORIGINAL


@pytest.fixture
def patch():
    with gumbel_ext.patch_torch() as handle:
        yield handle


class CountedOps(TorchDispatchMode):
    """The ops of this package that run, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gumbel_ext":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def runs_ours():
    with CountedOps() as counted:
        F.gumbel_softmax(torch.zeros(2, 3))
    return counted.names == ["gumbel_softmax"]


# ---- on and off ---------------------------------------------------------------------------------


def test_handle_undoes_the_patch():
    assert not runs_ours()
    handle = gumbel_ext.patch_torch()
    assert runs_ours()
    assert torch.nn.functional.gumbel_softmax is not ORIGINAL
    handle.remove()
    assert F.gumbel_softmax is ORIGINAL
    handle.remove()
    assert not runs_ours()


def test_with_statement_undoes_the_patch_also_after_an_error():
    with gumbel_ext.patch_torch():
        assert runs_ours()
    assert F.gumbel_softmax is ORIGINAL
    with pytest.raises(KeyError), gumbel_ext.patch_torch():
        raise KeyError
    assert F.gumbel_softmax is ORIGINAL


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_patches_nest_and_end_in_any_order(order):
    handles = [gumbel_ext.patch_torch() for _ in range(3)]
    for i in order[:-1]:
        handles[i].remove()
        handles[i].remove()
        assert runs_ours()
    handles[order[-1]].remove()
    assert F.gumbel_softmax is ORIGINAL


def test_a_dropped_handle_leaves_the_patch():
    gumbel_ext.patch_torch()
    assert runs_ours()
    with gumbel_ext.patch_torch():
        pass
    assert runs_ours()
    F.gumbel_softmax = ORIGINAL


def test_what_somebody_else_put_there_is_kept():
    def theirs(logits):
        return logits

    F.gumbel_softmax = theirs
    with gumbel_ext.patch_torch():
        assert runs_ours()
    assert F.gumbel_softmax is theirs
    F.gumbel_softmax = ORIGINAL

    handle = gumbel_ext.patch_torch()
    F.gumbel_softmax = theirs
    with pytest.warns(RuntimeWarning, match=r"gumbel_softmax was replaced by .*theirs"):
        handle.remove()
    assert F.gumbel_softmax is theirs
    F.gumbel_softmax = ORIGINAL
    with gumbel_ext.patch_torch():
        assert runs_ours()


def test_all_threads_see_the_patch():
    seen = []
    with gumbel_ext.patch_torch():
        thread = threading.Thread(target=lambda: seen.append(F.gumbel_softmax))
        thread.start()
        thread.join()
    assert seen == [gumbel_ext.patch.gumbel_softmax]


def test_threads_may_patch_at_the_same_time():
    faults = []
    start = threading.Barrier(8)

    def work():
        start.wait()
        for _ in range(300):
            with gumbel_ext.patch_torch():
                if F.gumbel_softmax is ORIGINAL:
                    faults.append("undone by another thread")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert F.gumbel_softmax is ORIGINAL


# ---- the same call ------------------------------------------------------------------------------


def test_signature_is_the_original_one():
    def described(function):
        return [
            (p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()
        ]

    assert described(gumbel_ext.patch.gumbel_softmax) == described(ORIGINAL)


@patched
def test_every_spelling(device, patch):
    """Code that calls F.gumbel_softmax in any of its spellings runs ours, with that meaning."""
    logits = torch.randn(4, 6, device=device)
    for ours, options in (
        (lambda: F.gumbel_softmax(logits), {}),
        (lambda: F.gumbel_softmax(logits, 0.5), {"tau": 0.5}),
        (lambda: F.gumbel_softmax(logits, 0.5, True), {"tau": 0.5, "hard": True}),
        (lambda: F.gumbel_softmax(logits, 2, True, 1e-10, 0), {"tau": 2, "hard": True, "dim": 0}),
        (lambda: F.gumbel_softmax(logits=logits, tau=0.5, dim=0), {"tau": 0.5, "dim": 0}),
        (lambda: nn.functional.gumbel_softmax(logits, hard=True, eps=1e-10), {"hard": True}),
    ):
        torch.manual_seed(3)
        y = ours()
        torch.manual_seed(3)
        assert torch.equal(y, gumbel_ext.gumbel_softmax(logits, **options))


def test_eps_warns_where_it_is_called(patch):
    """In the original's words; the place must be the caller's, or its filters miss."""
    with pytest.warns(UserWarning, match=r"`eps` parameter is deprecated") as caught:
        F.gumbel_softmax(torch.zeros(2, 3), eps=1e-5)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.gumbel_softmax(torch.zeros(2, 3), eps=1e-10)


@patched
def test_temperatures_that_the_original_takes(device, patch, hard):
    """Whatever kind of number; tensors of a number, of rows, of ints, with a gradient."""
    logits = torch.randn(4, 6, device=device)
    rows = torch.full((4, 1), 2.0, device=device, requires_grad=True)
    torch.manual_seed(3)
    expected = F.gumbel_softmax(logits, 2, hard)
    for tau in (
        2.0,
        np.float32(2),
        np.float64(2),
        np.int64(2),
        torch.tensor(2),
        torch.tensor(2.0, device=device),
        torch.tensor([2], dtype=torch.int32, device=device),
        rows,
    ):
        torch.manual_seed(3)
        assert torch.equal(F.gumbel_softmax(logits, tau, hard), expected), tau
        assert ORIGINAL(logits, tau, hard).shape == logits.shape
    (F.gumbel_softmax(logits, rows, hard) * torch.randn(4, 6, device=device)).sum().backward()
    assert (rows.grad != 0).all()


@pytest.mark.parametrize(
    "tau",
    [0, 0.0, -1.0, float("nan"), float("inf"), True, torch.ones(6), torch.ones(4, 6)],
    ids=lambda tau: str(list(tau.shape)) if isinstance(tau, torch.Tensor) else str(tau),
)
def test_temperatures_that_are_refused(device, patch, tau):
    """The original gives NaN, other distributions, or tau a class: none of it Gumbel-softmax."""
    logits = torch.randn(4, 6, device=device)
    with pytest.raises((TypeError, ValueError), match="tau"):
        F.gumbel_softmax(logits, tau.to(device) if isinstance(tau, torch.Tensor) else tau)
    ORIGINAL(logits.cpu(), tau)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_logits_that_the_original_refuses_too(patch, dtype):
    logits = torch.ones(2, 3).to(dtype)
    with pytest.raises(TypeError, match="logits"):
        F.gumbel_softmax(logits)
    with pytest.raises((RuntimeError, TypeError)):
        ORIGINAL(logits)


def test_a_name_imported_before_is_out_of_reach(patch):
    """As the documentation says."""
    early = ORIGINAL
    with CountedOps() as counted:
        early(torch.zeros(2, 3))
    assert counted.names == []


def test_pickled_by_its_name(patch):
    assert pickle.loads(pickle.dumps(F.gumbel_softmax)) is gumbel_ext.patch.gumbel_softmax


# ---- compiled, scripted, traced -----------------------------------------------------------------


def count_ours(graph):
    return sum("gumbel_ext.gumbel_softmax" in str(node.target) for node in graph.nodes)


@pytest.mark.feature(
    "drop-in: patch_torch",
    ops=("gumbel_softmax", "gumbel_softmax_hard"),
    modes=("compiled",),
)
def test_compiled_code_follows_the_patch(device):
    """Compiled before, under, and after the patch: never the graph of the other state."""
    torch.compiler.reset()
    graphs = []

    def backend(module, inputs):
        graphs.append(count_ours(module.graph))
        return module

    counter = CompileCounterWithBackend("eager")
    logits = torch.randn(4, 5, device=device)

    def soft_and_hard(x):
        return F.gumbel_softmax(x, 0.5), torch.nn.functional.gumbel_softmax(x, 0.5, hard=True)

    recording = torch.compile(soft_and_hard, backend=backend, fullgraph=True)
    counting = torch.compile(soft_and_hard, backend=counter, fullgraph=True)

    def follows(function):
        """Same seed, same bits as eager code in the present state; the two states differ."""
        torch.manual_seed(1)
        soft = function(logits)[0]
        torch.manual_seed(1)
        return torch.equal(soft, F.gumbel_softmax(logits, 0.5))

    for _ in range(2):
        assert follows(recording)
        assert follows(counting)
        with gumbel_ext.patch_torch():
            assert follows(recording)
            assert follows(counting)
    assert graphs == [0, 2]
    assert counter.frame_count == 2
    torch.compiler.reset()


def test_compiled_equals_eager_under_the_patch(device, patch, hard):
    torch.compiler.reset()
    base, weight = torch.randn(2, 4, 5, device=device)

    def gradient(function):
        torch.manual_seed(1)
        leaf = base.clone().requires_grad_()
        y = function(leaf, 0.7, hard)
        (y * weight).sum().backward()
        return y.detach(), leaf.grad

    compiled = torch.compile(lambda *a: F.gumbel_softmax(*a), fullgraph=True, backend="aot_eager")
    for actual, expected in zip(gradient(compiled), gradient(F.gumbel_softmax), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    torch.compiler.reset()


@pytest.mark.feature(
    "torch.jit.script, torch.jit.trace",
    ops=("gumbel_softmax", "gumbel_softmax_hard"),
    modes=("exported",),
)
@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_scripted_and_traced(device, patch, how):
    """PyTorch scripts the original; a scripted or traced module must get ours."""

    class Gate(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.gumbel_softmax(x, tau=0.5) + F.gumbel_softmax(x, 0.5, True, 1e-10, 0)

    logits = torch.randn(4, 5, device=device)
    if how == "script":
        module = torch.jit.script(Gate())
    else:
        module = torch.jit.trace(Gate(), logits, check_trace=False)
    assert str(module.inlined_graph).count("gumbel_ext::gumbel_softmax(") == 2
    torch.manual_seed(1)
    y = module(logits)
    torch.manual_seed(1)
    assert torch.equal(y, Gate()(logits))
    leaf = logits.clone().requires_grad_()
    (module(leaf) * logits).sum().backward()
    assert leaf.grad.abs().max() > 0


def int_tau(x: torch.Tensor) -> torch.Tensor:
    return F.gumbel_softmax(x, 2)


def int_tau_hard(x: torch.Tensor) -> torch.Tensor:
    return F.gumbel_softmax(x, 1, True)


def float_tau_hard(x: torch.Tensor) -> torch.Tensor:
    return F.gumbel_softmax(x, tau=0.5, hard=True, eps=1e-10, dim=0)


def passed_on(x: torch.Tensor, tau: int = 2) -> torch.Tensor:
    return F.gumbel_softmax(x, tau, dim=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("gate", [int_tau, int_tau_hard, float_tau_hard, passed_on])
def test_scripts_temperatures_of_both_kinds(patch, gate):
    """An int is no float to TorchScript, and the original asks for one."""
    logits = torch.randn(4, 5)
    torch.manual_seed(1)
    y = torch.jit.script(gate)(logits)
    torch.manual_seed(1)
    assert torch.equal(y, gate(logits))


def test_what_python_takes_for_true(patch):
    """As the original, whose `if hard` takes anything."""
    for hard in ("yes", 2, [1], torch.tensor(True), np.bool_(True)):
        assert F.gumbel_softmax(torch.zeros(3, 4), 1, hard).max() == 1
    for hard in ("", None, 0, [], torch.tensor(False)):
        assert F.gumbel_softmax(torch.zeros(3, 4), 1, hard).max() < 1


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_logits_get_one_line(patch, layout):
    logits = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=layout)
    with pytest.raises(TypeError, match=r"\Agumbel_softmax: logits must be a dense .* nested.*\Z"):
        F.gumbel_softmax(logits)


# ---- overrides ----------------------------------------------------------------------------------


def calls_of(table, fallback):
    """A subclass that looks functions up in a table."""

    class Handling(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func in table:
                return table[func](*args, **(kwargs or {}))
            if fallback == "default":
                return super().__torch_function__(func, types, args, kwargs or {})
            return NotImplemented

    return Handling


def handler(logits, tau=1, hard=False, eps=1e-10, dim=-1):
    return ("handled", tau, hard, eps, dim)


@pytest.mark.parametrize("fallback", ["default", "NotImplemented"])
def test_handlers_registered_before_the_patch_match(fallback):
    table = {F.gumbel_softmax: handler}
    logits = torch.randn(3, 4).as_subclass(calls_of(table, fallback))
    expected = F.gumbel_softmax(logits, 0.5, True, dim=0)
    with gumbel_ext.patch_torch():
        assert F.gumbel_softmax(logits, 0.5, True, dim=0) == expected
    assert expected == ("handled", 0.5, True, 1e-10, 0)


def test_handlers_registered_under_the_patch_match(patch):
    table = {F.gumbel_softmax: handler}
    logits = torch.randn(3, 4).as_subclass(calls_of(table, "NotImplemented"))
    assert F.gumbel_softmax(logits, 0.5) == ("handled", 0.5, False, 1e-10, -1)


def test_what_nobody_handles_is_an_error(patch):
    logits = torch.randn(3, 4).as_subclass(calls_of({}, "NotImplemented"))
    with pytest.raises(TypeError, match="no implementation found"):
        F.gumbel_softmax(logits)

    class Failing(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            raise TypeError("its own")

    with pytest.raises(TypeError, match="its own"):
        F.gumbel_softmax(torch.randn(3, 4).as_subclass(Failing))


class Recording(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_the_function_of_torch():
    logits = torch.randn(3, 4)
    with gumbel_ext.patch_torch():
        with Recording() as mode, CountedOps() as counted:
            F.gumbel_softmax(logits, 0.5)
        assert counted.names == ["gumbel_softmax"]
        # Once: not as a function of this package besides.
        (seen,) = (func for func in mode.seen if "gumbel" in getattr(func, "__name__", ""))
        assert seen == F.gumbel_softmax
    assert seen == F.gumbel_softmax == ORIGINAL
    assert seen in {ORIGINAL}
    assert (seen.__module__, seen.__name__) == ("torch.nn.functional", "gumbel_softmax")
    assert inspect.signature(seen) == inspect.signature(ORIGINAL)
    assert torch.overrides.resolve_name(seen) == "torch.nn.functional.gumbel_softmax"


@pytest.mark.parametrize("among", ["tau", "logits"])
def test_a_subclass_without_handlers_runs_ours(patch, among):
    class Plain(torch.Tensor):
        pass

    logits, tau = torch.randn(3, 4), torch.full((3, 1), 0.5)
    arguments = {"logits": logits, "tau": tau}
    arguments[among] = arguments[among].as_subclass(Plain)
    with CountedOps() as counted:
        y = F.gumbel_softmax(**arguments)
    assert counted.names == ["gumbel_softmax"]
    assert type(y) is Plain
    with torch.device("cpu"), CountedOps() as counted:
        F.gumbel_softmax(logits)
    assert counted.names == ["gumbel_softmax"]


@pytest.mark.parametrize("patched_first", [False, True])
def test_overrides_of_torch(patched_first):
    """What PyTorch's own tests of overrides do with each of its functions."""
    handles = [gumbel_ext.patch_torch()] if patched_first else []
    torch.overrides.get_testing_overrides.cache_clear()
    torch.overrides._get_overridable_functions.cache_clear()
    try:
        overrides = torch.overrides.get_testing_overrides()
        function = F.gumbel_softmax
        assert function in overrides
        assert function in torch.overrides.get_overridable_functions()[torch.nn.functional]
        triggered = []

        class TensorLike:
            @classmethod
            def __torch_function__(cls, func, types, args=(), kwargs=None):
                if func not in overrides:
                    return NotImplemented
                triggered.append(func)
                return overrides[func](*args, **(kwargs or {}))

        if not handles:
            handles.append(gumbel_ext.patch_torch())
        assert F.gumbel_softmax(TensorLike()) == -1
        assert triggered == [function]
    finally:
        handles[0].remove()
        torch.overrides.get_testing_overrides.cache_clear()
        torch.overrides._get_overridable_functions.cache_clear()


@pytest.mark.parametrize("traced_under_the_patch", [False, True])
def test_traced_by_fx(traced_under_the_patch):
    def gate(x):
        return F.gumbel_softmax(x, 0.5, dim=0)

    with gumbel_ext.patch_torch() if traced_under_the_patch else contextlib.nullcontext():
        graph = torch.fx.symbolic_trace(gate)
    (node,) = (node for node in graph.graph.nodes if node.op == "call_function")
    assert node.target == ORIGINAL
    for module in (graph, pickle.loads(pickle.dumps(graph))):
        torch.testing.assert_close(module(torch.randn(3, 4)).sum(0), torch.ones(4))


@pytest.mark.cpu_only(reason="one compiler is enough")
def test_overrides_of_a_subclass_in_compiled_code():
    """A handler registered before the patch is found in a compiled function, too."""
    handlers = {F.gumbel_softmax: lambda *args, **kwargs: torch.full((2,), 9.0)}

    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func in handlers:
                return handlers[func](*args, **(kwargs or {}))
            return super().__torch_function__(func, types, args, kwargs or {})

    logits = torch.randn(3, 4).as_subclass(Own)

    def sample(x):
        return F.gumbel_softmax(x, 0.5, True)

    torch.compiler.reset()
    with gumbel_ext.patch_torch():
        assert torch.equal(torch.compile(sample, backend="eager")(logits), torch.full((2,), 9.0))
