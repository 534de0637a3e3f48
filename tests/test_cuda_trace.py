"""Every op traces for CUDA on a machine without a GPU: shapes, devices, graphs of one call each.

What draws has a call before it that draws its state.

Fake tensors have a device and no memory, so nothing here launches a kernel. Only autograd needs a
torch with CUDA, as one without ends the process, and autograd's engine a GPU.
"""

import operator

import pytest
import torch
from oracle import DTYPES, TORCH
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import gumbel_ext
from gumbel_ext import _C, _build_check, info

OPS = torch.ops.gumbel_ext
OP_NAMES = (
    "binary_concrete",
    "binary_concrete_backward",
    "concrete_log_prob",
    "concrete_log_prob_backward",
    "draw_rng_state",
    "gapped_straight_through_backward",
    "gumbel_argmax",
    "gumbel_embedding",
    "gumbel_embedding_backward",
    "gumbel_log_softmax",
    "gumbel_log_softmax_backward",
    "gumbel_noise",
    "gumbel_rao_backward",
    "gumbel_softmax",
    "gumbel_softmax_backward",
    "gumbel_softmax_hard_backward",
    "gumbel_topk",
    "logistic_noise",
    "noise_at",
    "reinmax_backward",
    "soft_argmax",
    "soft_argmax_backward",
    "straight_through_softmax",
    "straight_through_softmax_backward",
    "zgr_backward",
)
# In PyTorch's ops, or in ours, on every device but the CPU.
COMPOSITE_NAMES = (
    "decoupled_gumbel_softmax",
    "dot_chunks",
    "exponentiate_chunks",
    "gapped_straight_through",
    "gumbel_rao",
    "reinmax",
    "zgr",
)
CUDA_BUILD = _C.build_info()["cuda"]
# A second GPU tells the device of the arguments from the default one; a real one must exist.
CUDA = torch.device("cuda:0" if torch.cuda.is_available() else "cuda:1")

needs_cuda_build = pytest.mark.skipif(CUDA_BUILD is None, reason="gumbel_ext built without CUDA")
needs_cuda_torch = pytest.mark.skipif(
    torch.version.cuda is None or (TORCH < (2, 11) and not torch.cuda.is_available()),
    reason="autograd of CUDA tensors needs a torch with CUDA, and before 2.11 a GPU",
)


def needs_to_compile_fakes():
    if TORCH < (2, 11):
        pytest.skip("before torch 2.11 what is fake already does not compile")


@pytest.fixture(autouse=True)
def fake():
    torch.compiler.reset()
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        yield mode
    torch.compiler.reset()


def logits_of(*shape, dtype=torch.float32, **keywords):
    return torch.empty(shape, dtype=dtype, device=CUDA, **keywords)


def options(dtype=torch.float32):
    """``(tau, tau_tensor, mask)`` for logits of shape [4, 5, 6] with classes in dimension 1."""
    scalar, rows = logits_of(dtype=dtype), logits_of(4, 1, 6, dtype=dtype)
    mask, row_mask = logits_of(4, 5, 6, dtype=torch.bool), logits_of(5, 1, dtype=torch.bool)
    return {
        "plain": (0.7, None, None),
        "tau_scalar": (1.0, scalar, None),
        "tau_on_cpu": (1.0, torch.empty((), dtype=torch.float64), None),
        "tau_rows": (1.0, rows, None),
        "mask": (0.7, None, mask),
        "mask_and_tau": (1.0, rows, row_mask),
    }


OPTION_NAMES = ("plain", "tau_scalar", "tau_on_cpu", "tau_rows", "mask", "mask_and_tau")


def described(tensor):
    return tuple(tensor.shape), tensor.dtype, tensor.device


# ---- registration -------------------------------------------------------------------------------


def test_the_list_of_ops_is_complete():
    names = [schema.split("(")[0].removeprefix("gumbel_ext::") for schema in info.registered_ops()]
    assert sorted(names) == sorted((*OP_NAMES, *COMPOSITE_NAMES))


@pytest.mark.parametrize("name", OP_NAMES)
def test_cuda_kernels_are_registered_exactly_if_built(name):
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"gumbel_ext::{name}", "CUDA")
    assert registered == (CUDA_BUILD is not None)


@needs_cuda_build
def test_build_names_its_cuda():
    assert CUDA_BUILD["version"].split(".")[0] == torch.version.cuda.split(".")[0]
    assert CUDA_BUILD["architectures"]
    for architecture in CUDA_BUILD["architectures"]:
        major, minor = architecture.removesuffix("+PTX").rstrip("af").split(".")
        assert int(major) >= 5
        assert int(minor) >= 0


# ---- shapes, dtypes, strides, devices -----------------------------------------------------------


@pytest.mark.parametrize("return_index", [False, True], ids=["", "index"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTION_NAMES)
def test_softmax(hard, option, dtype, return_index):
    tau, tau_tensor, mask = options(dtype)[option]
    dense, narrow = logits_of(4, 5, 6, dtype=dtype), logits_of(4, 5, 1, dtype=dtype)
    for logits in (dense, logits_of(4, 6, 5, dtype=dtype).mT, narrow.expand(4, 5, 6)):
        y, index, state = OPS.gumbel_softmax(
            logits, tau, tau_tensor, hard, 1, mask, return_index, None, None
        )
        assert described(y) == ((4, 5, 6), dtype, CUDA)
        assert y.stride() == torch.empty_like(logits).stride()
        assert described(index) == ((4, 6) if return_index else (0,), torch.int64, CUDA)
        assert described(state) == ((2,), torch.int64, CUDA)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_public_functions(hard, dtype):
    logits, state = logits_of(4, 5, 6, dtype=dtype), logits_of(2, dtype=torch.int64)
    mask = logits_of(6, dtype=torch.bool)
    y, index = gumbel_ext.gumbel_softmax(
        logits, 0.5, hard, mask=mask, return_index=True, rng_state=state
    )
    assert described(y) == ((4, 5, 6), dtype, CUDA)
    assert described(index) == ((4, 5), torch.int64, CUDA)
    for keepdim, shape in ((False, (4, 6)), (True, (4, 1, 6))):
        index = gumbel_ext.gumbel_argmax(logits, 1, keepdim, mask=mask, rng_state=state)
        assert described(index) == (shape, torch.int64, CUDA)
    for size in ((3, 4), (0, 2), ()):
        noise = gumbel_ext.gumbel_noise(size, dtype=dtype, device=CUDA)
        assert described(noise) == (size, dtype, CUDA)


@pytest.mark.parametrize("tau_grad", [False, True], ids=["", "tau_grad"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTION_NAMES)
def test_backward_ops(option, dtype, tau_grad):
    tau, tau_tensor, mask = options(dtype)[option]
    grad, values = logits_of(4, 5, 6, dtype=dtype), logits_of(4, 6, 5, dtype=dtype).mT
    index, state = logits_of(4, 6, dtype=torch.int64), logits_of(2, dtype=torch.int64)
    soft = OPS.gumbel_softmax_backward(grad, values, index, tau, tau_tensor, 1, tau_grad)
    hard = OPS.gumbel_softmax_hard_backward(
        grad, values, index, tau, tau_tensor, 1, mask, state, tau_grad
    )
    computed_in = torch.float64 if dtype == torch.float64 else torch.float32
    for grad_logits, grad_tau in (soft, hard):
        assert described(grad_logits) == ((4, 5, 6), dtype, CUDA)
        assert grad_logits.stride() == values.stride()
        assert described(grad_tau) == ((4, 1, 6) if tau_grad else (0,), computed_in, CUDA)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_binary_concrete(hard, dtype):
    state, computed_in = logits_of(2, dtype=torch.int64), torch.float32
    if dtype == torch.float64:
        computed_in = dtype
    for logits in (logits_of(4, 5, dtype=dtype), logits_of(5, 4, dtype=dtype).mT):
        for tau in (None, logits_of(5), torch.empty((), dtype=torch.float64)):
            y, used = OPS.binary_concrete(logits, 0.5, tau, hard, None, None)
            assert described(y) == ((4, 5), dtype, CUDA)
            assert y.stride() == logits.stride()
            assert described(used) == ((2,), torch.int64, CUDA)
            for tau_grad, shape in ((False, (0,)), (True, (4, 5))):
                grad, terms = OPS.binary_concrete_backward(y, logits, 0.5, tau, state, tau_grad)
                assert described(grad) == ((4, 5), dtype, CUDA)
                assert grad.stride() == logits.stride()
                assert described(terms) == (shape, computed_in, CUDA)
    noise = gumbel_ext.logistic_noise((3, 4), dtype=dtype, device=CUDA)
    assert described(noise) == ((3, 4), dtype, CUDA)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_softmax(dtype):
    computed_in = torch.float64 if dtype == torch.float64 else torch.float32
    for option in OPTION_NAMES:
        tau, tau_tensor, mask = options(dtype)[option]
        logits = logits_of(4, 6, 5, dtype=dtype).mT
        log_y, state = OPS.gumbel_log_softmax(logits, tau, tau_tensor, 1, mask, None, None)
        assert described(log_y) == ((4, 5, 6), dtype, CUDA)
        assert log_y.stride() == logits.stride()
        assert described(state) == ((2,), torch.int64, CUDA)
        for tau_grad, shape in ((False, (0,)), (True, (4, 1, 6))):
            grad, grad_tau = OPS.gumbel_log_softmax_backward(
                log_y, log_y.to(computed_in), tau, tau_tensor, 1, tau_grad
            )
            assert described(grad) == ((4, 5, 6), dtype, CUDA)
            assert described(grad_tau) == (shape, computed_in, CUDA)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_density(dtype):
    computed_in = torch.float64 if dtype == torch.float64 else torch.float32
    value, logits = logits_of(3, 4, 5, dtype=dtype), logits_of(4, 5, dtype=dtype)
    density = OPS.concrete_log_prob(value, logits, 0.5, None, -1, False)
    assert described(density) == ((3, 4), computed_in, CUDA)
    of_value, of_logits, of_tau = OPS.concrete_log_prob_backward(
        density, value, logits, 0.5, None, -1, False, True, True, True
    )
    assert described(of_value) == ((3, 4, 5), dtype, CUDA)
    # That of what is broadcast is summed by the caller, in the type computed in.
    assert described(of_logits) == ((3, 4, 5), computed_in, CUDA)
    assert described(of_tau) == ((3, 4, 1), computed_in, CUDA)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_straight_through_softmax(dtype):
    computed_in = torch.float64 if dtype == torch.float64 else torch.float32
    for option in OPTION_NAMES:
        tau, tau_tensor, mask = options(dtype)[option]
        logits = logits_of(4, 6, 5, dtype=dtype).mT
        y, index = OPS.straight_through_softmax(logits, tau, tau_tensor, 1, mask, True)
        assert described(y) == ((4, 5, 6), dtype, CUDA)
        assert y.stride() == logits.stride()
        assert described(index) == ((4, 6), torch.int64, CUDA)
        for tau_grad, shape in ((False, (0,)), (True, (4, 1, 6))):
            grad, grad_tau = OPS.straight_through_softmax_backward(
                y, logits, index, tau, tau_tensor, 1, mask, tau_grad
            )
            assert described(grad) == ((4, 5, 6), dtype, CUDA)
            assert described(grad_tau) == (shape, computed_in, CUDA)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_soft_argmax(dtype):
    computed_in = torch.float64 if dtype == torch.float64 else torch.float32
    positions = logits_of(2, 5, dtype=torch.float64)
    for option in ("plain", "tau_scalar", "tau_on_cpu", "tau_rows"):
        beta, beta_tensor, _ = options(dtype)[option]
        logits = logits_of(4, 6, 5, dtype=dtype).mT
        expected, state = OPS.soft_argmax(logits, beta, beta_tensor, 1, positions)
        assert described(expected) == ((4, 6, 2), computed_in, CUDA)
        assert described(state) == ((4, 6, 5), torch.float64, CUDA)
        for beta_grad, shape in ((False, (0,)), (True, (4, 1, 6))):
            grad, grad_beta = OPS.soft_argmax_backward(
                expected, logits, state, beta, beta_tensor, 1, positions, beta_grad
            )
            assert described(grad) == ((4, 5, 6), dtype, CUDA)
            assert described(grad_beta) == (shape, computed_in, CUDA)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding(hard, dtype, weight_dtype):
    computed_in = torch.float64 if dtype == torch.float64 else torch.float32
    logits, tau = logits_of(4, 5, 6, dtype=dtype).mT, logits_of(4, 1, 5)
    mask = logits_of(6, 1, dtype=torch.bool)
    for book, index_shape in (((6, 3), (4, 5)), ((2, 3, 7), (4, 2, 5))):
        weight = logits_of(*book, dtype=weight_dtype)
        args = (logits, weight, 1.0, tau, hard, 1, mask)
        out, index, state = OPS.gumbel_embedding(*args, None, None)
        assert described(out) == ((4, 3 if len(book) == 2 else 14, 5), weight_dtype, CUDA)
        assert out.is_contiguous()
        assert described(index) == (index_shape, torch.int64, CUDA)
        assert described(state) == ((2,), torch.int64, CUDA)
        rest = (out, logits, weight, index, 1.0, tau, hard, 1, mask, state)
        for wanted in (True, False):
            found = OPS.gumbel_embedding_backward(*rest, wanted, wanted, wanted)
            shapes = ((4, 6, 5), book, (4, 1 if len(book) == 2 else 2, 5))
            dtypes = (dtype, weight_dtype, computed_in)
            for gradient, shape, of in zip(found, shapes, dtypes, strict=True):
                assert described(gradient) == (shape if wanted else (0,), of, CUDA)
        assert OPS.gumbel_embedding_backward(*rest, True, True, True)[0].stride() == logits.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTION_NAMES)
def test_estimators(option, dtype):
    tau, tau_tensor, mask = options(dtype)[option]
    logits, grad = logits_of(4, 6, 5, dtype=dtype).mT, logits_of(4, 5, 6, dtype=dtype)
    index, state = logits_of(4, 6, dtype=torch.int64), logits_of(2, dtype=torch.int64)
    sampling = (1, mask, True, None, state)
    y, chosen, used = OPS.gumbel_rao(logits, tau, tau_tensor, 10, *sampling)
    assert described(used) == ((2,), torch.int64, CUDA)
    samples = [
        (y, chosen),
        OPS.zgr(logits, *sampling),
        OPS.reinmax(logits, tau, tau_tensor, *sampling),
        OPS.gapped_straight_through(logits, tau, tau_tensor, 1.0, *sampling),
    ]
    for y, chosen in samples:
        assert described(y) == ((4, 5, 6), dtype, CUDA)
        assert y.stride() == logits.stride()
        assert described(chosen) == ((4, 6), torch.int64, CUDA)
    given = (grad, logits, index)
    gradients = [
        OPS.gumbel_rao_backward(*given, tau, tau_tensor, 10, 1, mask, state),
        OPS.zgr_backward(*given, 1, mask),
        OPS.reinmax_backward(*given, tau, tau_tensor, 1, mask),
        OPS.gapped_straight_through_backward(*given, tau, tau_tensor, None, 1, mask),
    ]
    for gradient in gradients:
        assert described(gradient) == ((4, 5, 6), dtype, CUDA)
        assert gradient.stride() == logits.stride()


def test_bad_arguments_are_named_while_tracing():
    logits = logits_of(4, 5, 6)
    with pytest.raises(ValueError, match=r"mask must broadcast .* got shape \[7\]"):
        gumbel_ext.gumbel_softmax(logits, mask=logits_of(7, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must have dtype bool"):
        gumbel_ext.gumbel_argmax(logits, mask=logits_of(6))
    with pytest.raises(ValueError, match=r"tau must broadcast to \[4, 5, 1\]"):
        gumbel_ext.gumbel_softmax(logits, logits_of(6))
    with pytest.raises(TypeError, match="logits must have dtype"):
        gumbel_ext.gumbel_softmax(logits_of(4, dtype=torch.int64))


# ---- graphs -------------------------------------------------------------------------------------

# What turns a number for tau into an input of the graph: see functional.py.
PRODUCT = {"aten.ones.default", "aten.mul.Tensor"}


STATE = "gumbel_ext.draw_rng_state.default"


def calls(graph_module):
    """The ops that a graph calls, in its order, less those that do no work on a device."""
    return [
        str(node.target)
        for node in graph_module.graph.nodes
        if node.op == "call_function"
        and node.target is not operator.getitem
        and not str(node.target).startswith(("aten.sym_size", "aten.detach"))
    ]


def split(graph_module):
    """The names of our ops that a graph calls, less those that draw states, and of all others."""
    called = calls(graph_module)
    ours = [name for name in called if name.startswith("gumbel_ext.")]
    others = {name for name in called if name not in ours}
    return [name for name in ours if name != STATE], others


def results(graph_module):
    """What a graph returns, as fake tensors."""
    (output,) = [node for node in graph_module.graph.nodes if node.op == "output"]
    return [node.meta["val"] for node in output.args[0] if node is not None]


def export(strict, **keywords):
    def capture(module, arguments):
        exported = torch.export.export(module, arguments, strict=strict, **keywords)
        return exported.graph_module

    return capture


def compile_to_graphs(module, arguments, dynamic=False):
    """The forward and, where a gradient is wanted, backward graph that a compiler would get."""
    needs_to_compile_fakes()
    graphs = []

    def keep(graph_module, example_inputs):
        graphs.append(graph_module)
        return make_boxed_func(graph_module.forward)

    # The partition that Inductor uses.
    backend = aot_autograd(
        fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition
    )
    function = torch.compile(module, backend=backend, fullgraph=True, dynamic=dynamic)
    y, *_ = function(*arguments)
    if y.requires_grad:
        # The backward graph may be left until it is wanted.
        y.backward(torch.empty_like(y))
    return graphs


def compiled(module, arguments):
    (graph,) = compile_to_graphs(module, arguments)
    return graph


CAPTURES = {
    "compile": compiled,
    "export": export(strict=False),
    "export_strict": export(strict=True),
    "make_fx": lambda module, arguments: make_fx(module)(*arguments),
}


class Sample(torch.nn.Module):
    def __init__(self, **keywords):
        super().__init__()
        self.keywords = keywords

    def forward(self, logits, tau=0.5, mask=None, state=None):
        y = gumbel_ext.gumbel_softmax(
            logits, tau, dim=1, mask=mask, rng_state=state, **self.keywords
        )
        return y if isinstance(y, tuple) else (y,)


class Argmax(torch.nn.Module):
    def forward(self, logits, mask=None):
        return (gumbel_ext.gumbel_argmax(logits, 1, mask=mask),)


class Noise(torch.nn.Module):
    def forward(self, logits):
        return (gumbel_ext.gumbel_noise(logits.shape, dtype=logits.dtype, device=logits.device),)


class LogSample(torch.nn.Module):
    def forward(self, logits, tau=0.5):
        return (gumbel_ext.gumbel_log_softmax(logits, tau, 1),)


class Gate(torch.nn.Module):
    def __init__(self, hard=False):
        super().__init__()
        self.hard = hard

    def forward(self, logits, tau=0.5):
        return (gumbel_ext.binary_concrete(logits, tau, self.hard),)


def cases():
    """``module, arguments, op`` with logits of shape [4, 5, 6] in bfloat16."""
    logits = logits_of(4, 5, 6, dtype=torch.bfloat16)
    mask, rows = logits_of(5, 1, dtype=torch.bool), logits_of(4, 1, 6)
    state = logits_of(2, dtype=torch.int64)
    return {
        "soft": (Sample(), (logits,), "gumbel_softmax"),
        "hard": (Sample(hard=True), (logits,), "gumbel_softmax"),
        "index": (Sample(return_index=True), (logits,), "gumbel_softmax"),
        "hard_index": (Sample(hard=True, return_index=True), (logits,), "gumbel_softmax"),
        "mask": (Sample(), (logits, 0.5, mask), "gumbel_softmax"),
        "tau_rows": (Sample(), (logits, rows), "gumbel_softmax"),
        "all": (
            Sample(hard=True, return_index=True),
            (logits, rows, mask, state),
            "gumbel_softmax",
        ),
        "argmax": (Argmax(), (logits,), "gumbel_argmax"),
        "argmax_mask": (Argmax(), (logits, mask), "gumbel_argmax"),
        "noise": (Noise(), (logits,), "gumbel_noise"),
        "log": (LogSample(), (logits,), "gumbel_log_softmax"),
        "log_tau": (LogSample(), (logits, rows), "gumbel_log_softmax"),
        "binary": (Gate(), (logits,), "binary_concrete"),
        "binary_hard_tau": (Gate(hard=True), (logits, rows), "binary_concrete"),
    }


CASE_NAMES = (
    *("soft", "hard", "index", "hard_index", "mask", "tau_rows", "all"),
    *("argmax", "argmax_mask", "noise", "log", "log_tau", "binary", "binary_hard_tau"),
)


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("case", CASE_NAMES)
def test_graph_is_one_call(case, capture):
    module, arguments, op = cases()[case]
    graph = CAPTURES[capture](module, arguments)
    ours, others = split(graph)
    assert ours == [f"gumbel_ext.{op}.default"]
    # The case of all arguments is given a state; what is exported keeps an op as it was called.
    draws = case != "all" and capture in ("compile", "make_fx")
    assert calls(graph).count(STATE) == draws
    # The noise takes the device and dtype of an empty tensor.
    number = len(arguments) < 2 or not isinstance(arguments[1], torch.Tensor)
    allowed = {"aten.empty.memory_format"} if op == "gumbel_noise" else PRODUCT if number else set()
    assert others <= allowed
    sample = ((4, 5, 6), torch.bfloat16, CUDA)
    index = ((4, 6), torch.int64, CUDA)
    expected = [index if op == "gumbel_argmax" else sample]
    if "index" in case or case == "all":
        expected.append(index)
    assert [described(value) for value in results(graph)] == expected


@pytest.mark.parametrize("strict", [False, True], ids=["export", "export_strict"])
def test_export_keeps_the_batch_size_symbolic(hard, strict):
    rows = torch.export.Dim("rows", min=2, max=1 << 20)
    logits = logits_of(4, 5, 6)
    graph = export(strict, dynamic_shapes=({0: rows},))(Sample(hard=hard), (logits,))
    (y,) = results(graph)
    assert isinstance(y.shape[0], torch.SymInt)
    assert (y.shape[1:], y.device) == ((5, 6), CUDA)
    assert split(graph)[0] == ["gumbel_ext.gumbel_softmax.default"]


def test_compile_with_aot_eager(hard):
    needs_to_compile_fakes()
    logits, tau = logits_of(4, 5, 6), logits_of()
    function = torch.compile(Sample(hard=hard, return_index=True), backend="aot_eager")
    y, index = function(logits, tau)
    assert described(y) == ((4, 5, 6), torch.float32, CUDA)
    assert described(index) == ((4, 6), torch.int64, CUDA)


# ---- gradients ----------------------------------------------------------------------------------


def backward_name(hard):
    return f"gumbel_ext.gumbel_softmax{'_hard' if hard else ''}_backward.default"


def gradients_by_node(hard, differentiable):
    """Forward and backward without the autograd engine, which needs a GPU; the node does not."""

    def function(logits, tau, mask, grad, *ignored):
        y, _, _ = OPS.gumbel_softmax(logits, 1.0, tau, hard, 1, mask, False, None, None)
        with torch.set_grad_enabled(differentiable):
            return y.grad_fn(grad, *ignored)

    return function


def gradient_arguments(dtype=torch.float32):
    """Logits, tau, mask, and a gradient for each output; those of the integers are not read."""
    return (
        logits_of(4, 5, 6, dtype=dtype, requires_grad=True),
        logits_of(4, 1, 1, dtype=dtype, requires_grad=True),
        logits_of(5, 1, dtype=torch.bool),
        logits_of(4, 5, 6, dtype=dtype),
        logits_of(4, 6, dtype=torch.int64),
        logits_of(2, dtype=torch.int64),
    )


@needs_cuda_torch
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_one_call(hard, dtype):
    graph = make_fx(gradients_by_node(hard, False))(*gradient_arguments(dtype))
    ours, others = split(graph)
    assert ours == ["gumbel_ext.gumbel_softmax.default", backward_name(hard)]
    # The gradient of tau is summed over the rows that share it, and rounded; an index that was not
    # asked for is an empty tensor.
    assert others <= {
        "aten.alias.default",  # of a saved tensor, since torch 2.14
        "aten.empty.memory_format",
        "aten.sum.dim_IntList",
        "aten._to_copy.default",
    }
    assert [described(value) for value in results(graph)] == [
        ((4, 5, 6), dtype, CUDA),
        ((4, 1, 1), dtype, CUDA),
    ]


@needs_cuda_torch
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_to_differentiate_again(hard, dtype):
    """The backward of a soft sample, which a hard one has to draw again."""
    graph = make_fx(gradients_by_node(hard, True))(*gradient_arguments(dtype))
    draws = ["gumbel_ext.gumbel_softmax.default"] * (2 if hard else 1)
    assert split(graph)[0] == [*draws, backward_name(False)]
    if hard:
        _, first, second, _ = [n for n in graph.graph.nodes if "gumbel_ext" in str(n.target)]
        state = second.args[8]
        assert (state.target, state.args) == (operator.getitem, (first, 2))
    assert [described(value) for value in results(graph)] == [
        ((4, 5, 6), dtype, CUDA),
        ((4, 1, 1), dtype, CUDA),
    ]


PLACES = [torch.device("cpu"), pytest.param(CUDA, marks=pytest.mark.cuda_only)]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.type)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_backward_is_one_call(hard, dynamic, place):
    logits = torch.empty(4, 5, 6, device=place, dtype=torch.bfloat16, requires_grad=True)
    tau = torch.empty(4, 1, 1, device=place, requires_grad=True)
    mask = torch.empty(5, 1, device=place, dtype=torch.bool)
    forward, backward = compile_to_graphs(Sample(hard=hard), (logits, tau, mask), dynamic)
    assert calls(forward) == [STATE, "gumbel_ext.gumbel_softmax.default"]
    ours, others = split(backward)
    assert ours == [backward_name(hard)]
    assert others <= {"aten.sum.dim_IntList"}
    grads = [(value.dtype, value.device.type, value.dim()) for value in results(backward)]
    assert grads == [(torch.bfloat16, place.type, 3), (torch.float32, place.type, 3)]
    # What a hard sample keeps for the backward: nothing of the size of y but the logits.
    (output,) = [node for node in forward.graph.nodes if node.op == "output"]
    _, *saved = output.args[0]
    computed = [n for n in saved if n.op != "placeholder" and not n.name.startswith("sym_size")]
    assert any(node.meta["val"].dim() == 3 for node in computed) == (not hard)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.type)
def test_compiled_binary_backward_is_one_call(hard, place):
    logits = torch.empty(4, 5, 6, device=place, dtype=torch.bfloat16, requires_grad=True)
    tau = torch.empty(4, 1, 1, device=place, requires_grad=True)
    forward, backward = compile_to_graphs(Gate(hard), (logits, tau))
    assert calls(forward) == [STATE, "gumbel_ext.binary_concrete.default"]
    ours, others = split(backward)
    assert ours == ["gumbel_ext.binary_concrete_backward.default"]
    assert others <= {"aten.sum.dim_IntList"}
    # Kept for the backward: inputs and the state.
    (output,) = [node for node in forward.graph.nodes if node.op == "output"]
    computed = [n for n in output.args[0][1:] if n.op != "placeholder"]
    assert [node.meta["val"].dim() for node in computed] == [1]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.type)
def test_two_samples_for_training_stay_two_calls(hard, place):
    """A graph with a gradient goes through common-subexpression elimination."""

    class Twice(torch.nn.Module):
        def forward(self, logits, tau):
            first = gumbel_ext.gumbel_softmax(logits, tau, hard)
            second = gumbel_ext.gumbel_softmax(logits, tau, hard)
            return (first.sin() + second.cos(),)

    logits = torch.empty(4, 5, device=place, requires_grad=True)
    forward, _ = compile_to_graphs(Twice(), (logits, torch.empty((), device=place)))
    assert split(forward)[0] == ["gumbel_ext.gumbel_softmax.default"] * 2
    assert calls(forward).count(STATE) == 2


# ---- what the build says ------------------------------------------------------------------------


@pytest.mark.parametrize("running", [None, "12.8", "13.0"])
def test_a_build_without_cuda_goes_with_every_torch(running):
    _build_check.check_cuda_version(running, None)


@pytest.mark.parametrize("running", ["13.0", "13.2"])
def test_a_build_goes_with_its_cuda_release(running):
    _build_check.check_cuda_version(running, "13.0")


@pytest.mark.parametrize(
    ("running", "found"), [(None, "built without CUDA"), ("12.8", "built for CUDA 12.8")]
)
def test_another_cuda_release_is_one_clear_error(running, found):
    with pytest.raises(ImportError) as caught:
        _build_check.check_cuda_version(running, "13.0")
    message = str(caught.value)
    assert message.startswith("gumbel_ext was built for CUDA 13.0, found torch ")
    assert found in message
    assert message.endswith(f"; run: {_build_check.install_command()}")
    assert "\n" not in message


def test_info_says_how_to_get_cuda():
    without = info.cuda_sentence(None, None, 0)
    assert "install a torch with CUDA" in without
    assert "FORCE_CUDA=1 pip install" in without
    assert "install a CUDA 13 toolkit" in info.cuda_sentence(None, "13.0", 1)
    assert "no GPU" in info.cuda_sentence("13.0", "13.0", 0)
    assert "pip" not in info.cuda_sentence("13.0", "13.0", 2)


def test_info_shows_the_build():
    collected = info.collect()
    assert collected["error"] is None
    assert collected["build"]["cuda"] == CUDA_BUILD
    table = info.as_table(collected)
    assert collected["cuda"] in table
    assert ("architectures" in table) == (CUDA_BUILD is not None)
