"""The same seed gives the same bits: at any thread count, in any layout, on any instruction set."""

import hashlib
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from oracle import DTYPES, expanded, layouts, rng_state, runs_cpu_kernels

import gumbel_ext
from gumbel_ext import _C

# One case a regime: short rows, long rows, few rows split in columns, an inner dimension.
CASES = {
    "short_rows": ((3001, 10), -1),
    "long_rows": ((9, 5003), -1),
    "few_rows": ((2, 70001), -1),
    "one_row": ((1, 200_003), -1),
    "inner": ((3, 130, 37), 1),
    "long_inner": ((2, 1500, 33), 1),
    "first_dim": ((2500, 19), 0),
    "one_long_column": ((70001, 1), 0),
    "image": ((2, 33, 6, 7), 1),
}


def results(logits, dim, state, grad):
    """Everything that an op returns, forward and backward, for these logits."""
    out = []
    leaf = logits.detach().requires_grad_()
    for tau in (0.5, torch.tensor(0.5, device=logits.device, requires_grad=True)):
        for hard in (False, True):
            y, index = gumbel_ext.gumbel_softmax(
                leaf, tau, hard, dim=dim, return_index=True, rng_state=state
            )
            inputs = (leaf, tau) if isinstance(tau, torch.Tensor) else (leaf,)
            out += [y.detach(), index, *torch.autograd.grad(y, inputs, grad)]
    out.append(gumbel_ext.gumbel_argmax(logits, dim, rng_state=state))
    options = {"dtype": logits.dtype, "device": logits.device}
    out.append(gumbel_ext.gumbel_noise(logits.shape, **options, rng_state=state))
    return out


# Rows of one tile, rows of several chunks, one row for all threads, an inner dimension, slabs.
RELATIVE_CASES = ("short_rows", "long_rows", "one_row", "inner", "image")


def relative_results(logits, dim, state, grad):
    """Likewise of the relatives of :func:`gumbel_softmax`, with a temperature a row."""
    out = [gumbel_ext.gumbel_topk(logits, min(5, logits.shape[dim]), dim, rng_state=state)]
    # Positive, and in no type 0; by operations that PyTorch itself rounds alike on any thread.
    shares, exponents = grad.abs() + 0.01, -grad.abs()
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = logits.amax(dim, keepdim=True).to(wide)
    tau = rows.abs() / 4 + 0.3

    def add(function, *inputs):
        leaves = [x.detach().requires_grad_() for x in inputs]
        value = function(*leaves)
        incoming = grad if value.shape == grad.shape else rows.squeeze(dim)
        out.append(value.detach())
        out.extend(torch.autograd.grad(value, leaves, incoming.to(value.dtype)))

    add(lambda x, t: gumbel_ext.gumbel_log_softmax(x, t, dim, rng_state=state), logits, tau)
    add(lambda x, t: gumbel_ext.straight_through_softmax(x, t, dim), logits, tau)
    add(lambda x, b: gumbel_ext.soft_argmax(x, b, dim), logits, tau)
    fixed = tau.detach()
    add(lambda x: gumbel_ext.gumbel_rao(x, fixed, 3, dim, rng_state=state), logits)
    add(lambda x: gumbel_ext.zgr(x, dim, rng_state=state), logits)
    add(lambda x: gumbel_ext.reinmax(x, fixed, dim, rng_state=state), logits)
    for gap in (1.0, None):
        add(
            lambda x, gap=gap: gumbel_ext.gapped_straight_through(
                x, fixed, gap, dim, rng_state=state
            ),
            logits,
        )
    for value, log_space in ((shares, False), (exponents, True)):
        add(
            lambda v, x, t, log_space=log_space: gumbel_ext.concrete_log_prob(
                v, x, t, dim, log_space=log_space
            ),
            value,
            logits,
            tau,
        )
    return out


def assert_same(actual, expected, what):
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, b), f"{what}: result {i} differs in {int((a != b).sum())} elements"


def assert_same_in_another_layout(actual, expected, what):
    """The same bits on the CPU.  A CUDA kernel is chosen by the layout, and with it the order in
    which a row is added up: the same values to a few units, except where a near-tie falls.
    """
    if runs_cpu_kernels(expected[0].device):
        assert_same(actual, expected, what)
        return
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == b.dtype
        if a.dtype == torch.int64:
            assert int((a != b).sum()) <= 1, f"{what}: result {i}"
        else:
            # Gradients of a float32 temperature: float64 logits do not make them finer.
            unit = max(torch.finfo(t.dtype).eps for t in (a, expected[0]))
            few = 32 * unit * b.double().abs().max().clamp(min=1)
            off = (a.double() - b.double()).abs() > few
            assert int(off.sum()) <= 2, f"{what}: result {i} differs in {int(off.sum())} elements"


@pytest.mark.cpu_only(reason="threads of the CPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), CASES.values(), ids=CASES)
def test_thread_counts(shape, dim, dtype, thread_count):
    logits, grad = torch.randn(2, *shape).to(dtype)
    thread_count(1)
    expected = results(logits, dim, rng_state(), grad)
    for threads in (2, 7):
        thread_count(threads)
        assert_same(results(logits, dim, rng_state(), grad), expected, f"{threads} threads")


@pytest.mark.cpu_only(reason="threads of the CPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", RELATIVE_CASES)
def test_thread_counts_of_the_relatives(case, dtype, thread_count):
    shape, dim = CASES[case]
    logits, grad = torch.randn(2, *shape).to(dtype)
    thread_count(1)
    expected = relative_results(logits, dim, rng_state(), grad)
    for threads in (2, 7):
        thread_count(threads)
        mine = relative_results(logits, dim, rng_state(), grad)
        assert_same(mine, expected, f"{threads} threads")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), CASES.values(), ids=CASES)
def test_runs(device, state, shape, dim, dtype):
    logits, grad = torch.randn(2, *shape).to(device, dtype)
    expected = results(logits, dim, state, grad)
    assert_same(results(logits, dim, state, grad), expected, "second run")


LAYOUT_CASES = {
    "matrix": ((70, 35), -1),
    "matrix_first_dim": ((70, 35), 0),
    "wide": ((3, 2100), -1),
    "tall": ((2100, 3), 0),
    "inner": ((3, 40, 17), 1),
    "image_channels": ((2, 33, 6, 7), 1),
    "image_width": ((2, 3, 6, 37), 3),
    "image_height": ((2, 3, 20, 7), 2),
    "volume_channels": ((2, 20, 3, 4, 5), 1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), LAYOUT_CASES.values(), ids=LAYOUT_CASES)
def test_layouts(device, state, shape, dim, dtype):
    """Of the logits, of the incoming gradient, and of both."""
    logits, grad = torch.randn(2, *shape).to(device, dtype)
    expected = results(logits, dim, state, grad)
    laid_grads = dict(layouts(grad))
    for name, laid in layouts(logits):
        mine = results(laid, dim, state, grad)
        assert_same_in_another_layout(mine, expected, f"logits {name}")
        mine = results(laid, dim, state, laid_grads[name])
        assert_same_in_another_layout(mine, expected, f"both {name}")
    for name, laid in laid_grads.items():
        assert_same(results(logits, dim, state, laid), expected, f"grad {name}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), LAYOUT_CASES.values(), ids=LAYOUT_CASES)
def test_expanded(device, state, shape, dim, dtype):
    logits, grad = torch.randn(2, *shape).to(device, dtype)
    # Views with stride 0 pair up: both tensors are expanded over the same dimensions.
    for (name, view), (_, grad_view) in zip(expanded(logits), expanded(grad), strict=True):
        expected = results(view.contiguous(), dim, state, grad_view.contiguous())
        assert_same(results(view, dim, state, grad_view), expected, name)


@pytest.mark.parametrize("shape", [(6, 50), (2, 2100), (3, 5, 40)], ids=str)
def test_dim_may_count_from_either_end(device, state, shape):
    logits, grad = torch.randn(2, *shape).to(device)
    for dim in range(len(shape)):
        assert_same(
            results(logits, dim - len(shape), state, grad), results(logits, dim, state, grad), dim
        )


@pytest.mark.parametrize("classes", [3, 40, 1500], ids=str)
def test_row_of_a_batch_equals_the_row_alone(device, state, classes):
    """The first row's positions are the same: how many rows follow must not change its bits."""
    logits = torch.randn(200, classes, device=device)
    whole = gumbel_ext.gumbel_softmax(logits, 0.5, rng_state=state)
    for rows in (1, 2, 3, 17):
        part = gumbel_ext.gumbel_softmax(logits[:rows], 0.5, rng_state=state)
        assert torch.equal(part, whole[:rows])


def test_class_dimension_may_lie_anywhere(device, state):
    """One row's sums do not depend on which dimension holds the classes.

    With a single row the positions agree for every place of the class dimension.
    """
    for classes in (10, 1000, 2500):
        row = torch.randn(classes, device=device)
        expected = gumbel_ext.gumbel_softmax(row, 0.3, rng_state=state)
        for shape, dim in (((1, classes), 1), ((classes, 1), 0), ((1, classes, 1), 1)):
            y = gumbel_ext.gumbel_softmax(row.view(shape), 0.3, dim=dim, rng_state=state)
            assert torch.equal(y.flatten(), expected), shape


# ---- instruction sets ---------------------------------------------------------------------------

instruction_sets = pytest.mark.cpu_only(reason="instruction sets of the CPU")


def instruction_set_results():
    source = torch.Generator().manual_seed(9)
    for case, (shape, dim) in CASES.items():
        for dtype in DTYPES:
            logits, grad = torch.randn(2, *shape, generator=source).to(dtype)
            for result in results(logits, dim, rng_state(), grad):
                yield shape, dim, dtype, result
            if case in ("long_rows", "inner", "image"):
                for result in relative_results(logits, dim, rng_state(), grad):
                    yield shape, dim, dtype, result


def bytes_of(tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def digests():
    """Executed in a process of its own, because the capability is read once."""
    return [hashlib.sha256(bytes_of(r)).hexdigest() for *_, r in instruction_set_results()]


def run_with(capability, code):
    environment = os.environ | {"GUMBEL_EXT_CPU_CAPABILITY": capability}
    here = str(pathlib.Path(__file__).parent)
    environment["PYTHONPATH"] = os.pathsep.join([here, *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", f"from gumbel_ext import _C\nimport test_bits\n{code}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


# Generic code has no fma of its own; it is compared by value.
WITH_FMA = [c for c in _C.cpu_capabilities() if c != "generic"]


@instruction_sets
@pytest.mark.parametrize("capability", _C.cpu_capabilities())
def test_the_environment_chooses_the_instruction_set(capability):
    assert run_with(capability, "print(_C.cpu_capability())") == [capability]


@instruction_sets
@pytest.mark.parametrize("capability", WITH_FMA)
def test_instruction_sets_with_fma_agree(capability):
    assert run_with(capability, "print(*test_bits.digests())") == digests()


@instruction_sets
def test_generic_is_close(tmp_path):
    path = tmp_path / "generic.pt"
    code = f"import torch\ntorch.save([*test_bits.instruction_set_results()], {str(path)!r})"
    run_with("generic", code)
    for (shape, dim, dtype, mine), (*_, theirs) in zip(
        instruction_set_results(), torch.load(path), strict=True
    ):
        case = f"{shape} dim {dim} {dtype}"
        if mine.dtype == torch.int64:
            assert (mine == theirs).float().mean() > 0.999, case
        else:
            loose = 64 * torch.finfo(dtype).eps
            # Where terms of both signs meet, what is left is told by the largest around it.
            torch.testing.assert_close(
                mine,
                theirs,
                rtol=loose,
                atol=loose * max(1.0, float(mine.abs().max())),
                msg=lambda text, case=case: f"{case}: {text}",
            )
