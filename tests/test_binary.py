"""Binary concrete samples: values, gradients and states against float64 on the same noise."""

import math
import os
import pathlib
import subprocess
import sys

import mpmath
import pytest
import torch
from oracle import (
    DTYPES,
    SIXTEEN_BIT,
    DispatchLog,
    accumulation_eps,
    default_rng_state,
    eps,
    expanded,
    layouts,
    relative_bound,
    rng_state,
    runs_cpu_kernels,
    smallest,
)

import gumbel_ext
from gumbel_ext import _C, _reference, binary_concrete, logistic_noise

OPS = torch.ops.gumbel_ext
WORD = 0xFFFFFFFF
TAIL = 1 << 20
SHAPES = {
    "scalar": (),
    "one": (1,),
    "odd": (7,),
    "vector": (1025,),
    "matrix": (33, 65),
    "threads": (3, 7001),
    "four_dims": (2, 3, 5, 7),
    "empty": (0, 4),
}


def noise(shape):
    return _reference.logistic_noise(shape, rng_state())


def samples(shape, dtype, device, scale=2.0):
    return (scale * torch.randn(shape)).to(device, dtype)


def exact(logits, tau):
    """``(y, slope, z)`` in float64; the slope from the smaller of y and 1 - y."""
    tau = tau.detach().cpu().double() if isinstance(tau, torch.Tensor) else tau
    z = (logits.detach().cpu().double() + noise(logits.shape)) / tau
    small = torch.special.expit(-z.abs())
    return torch.special.expit(z), small * (1 - small), z


def condition(logits, tau):
    """How far z magnifies the rounding of the score, an element."""
    tau = tau.detach().cpu().double() if isinstance(tau, torch.Tensor) else tau
    return 1 + (logits.detach().cpu().double().abs() + noise(logits.shape).abs()) / tau


def accumulation_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_close(actual, expected, bound, floor):
    error = (actual.detach().cpu().double() - expected).abs()
    allowed = bound * expected.abs() + floor
    assert not (error > allowed).any(), f"worst by {(error - allowed).max():.3g}"
    assert torch.equal(actual.cpu().isnan(), expected.isnan())


# ---- noise --------------------------------------------------------------------------------------


def words(count=1 << 14):
    """Pairs of words that reach every magnitude at both ends, the tails' edges and the middle."""
    source = torch.Generator().manual_seed(5)
    anywhere = torch.randint(0, 1 << 32, (count,), generator=source)
    shift = torch.randint(0, 32, (count,), generator=source)
    edges = torch.cat([TAIL + torch.arange(-500, 500), (1 << 31) + torch.arange(-500, 500)])
    hi = torch.cat([anywhere, anywhere >> shift, edges, torch.zeros(count, dtype=torch.int64)])
    lo = torch.randint(0, 1 << 32, hi.shape, generator=source)
    lo[-count:] >>= shift
    lo[-3:] = torch.tensor([0, WORD, 1])
    return torch.cat([hi, WORD - hi]), torch.cat([lo, WORD - lo])


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_noise_of_words(dtype):
    hi, lo = words()
    actual = _C.logistic_from_words(hi, lo, dtype)
    assert actual.dtype == dtype
    assert actual.isfinite().all()
    expected = _reference.logistic(hi, lo)
    allowed = 3 * eps(dtype) * expected.abs().clamp(min=1)
    if dtype == torch.float32:
        # Outside the tails float32 reads hi alone: v is known to 2^-33, at least 2^-12 of it.
        v = (hi.double() + 0.5) * 2.0**-32
        in_tail = (hi < TAIL) | (hi >= (1 << 32) - TAIL)
        allowed = allowed + torch.where(in_tail, 0.0, 2.0**-33 / (v * (1 - v)))
        assert (allowed <= 8 * eps(dtype) * expected.abs().clamp(min=1)).all()
    assert ((actual.double() - expected).abs() <= allowed).all()
    # Odd about the middle, to the bit: both ends are the same tail.
    assert torch.equal(_C.logistic_from_words(WORD - hi, WORD - lo, dtype), -actual)


@pytest.mark.cpu_only
@pytest.mark.parametrize("source", ["compiled", "reference"])
def test_noise_against_sixty_digits(source):
    cases = [(0, 0), (0, WORD), (0, 1 << 31), (1, 0), (TAIL, 0), (TAIL - 1, WORD), (1 << 31, 0)]
    cases += [*zip(*(part[:: part.numel() // 150].tolist() for part in words()), strict=True)]
    cases += [(WORD - hi, WORD - lo) for hi, lo in cases]
    hi, lo = torch.tensor(cases).T.contiguous()
    if source == "compiled":
        actual = _C.logistic_from_words(hi, lo, torch.float64)
    else:
        actual = _reference.logistic(hi, lo)
    with mpmath.workdps(60):
        for value, (high, low) in zip(actual.tolist(), cases, strict=True):
            v = (mpmath.mpf(high) * 2**32 + low + mpmath.mpf(1) / 2) / mpmath.mpf(2) ** 64
            true = mpmath.log1p(-v) - mpmath.log(v)
            assert abs(value - true) <= 3 * eps(torch.float64) * max(1, abs(true)), (high, low)


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_noise_at_the_end_points(dtype):
    ends = torch.tensor([0, WORD])
    largest, least = _C.logistic_from_words(ends, ends, dtype).tolist()
    assert largest == pytest.approx(65 * math.log(2), rel=eps(dtype))
    assert least == -largest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_noise_equals_reference(device, state, shape, dtype):
    actual = logistic_noise(shape, dtype=dtype, device=device, rng_state=state)
    assert (actual.shape, actual.dtype, actual.device.type) == (shape, dtype, device)
    assert actual.is_contiguous()
    expected = noise(shape)
    few = 4 if runs_cpu_kernels(device) else 8
    bound = few * accumulation_eps(dtype) * expected.abs().clamp(min=1)
    allowed = 0.5 * eps(dtype) * expected.abs() + bound
    assert ((actual.cpu().double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_sixteen_bits_are_float32_rounded_once(device, state, dtype):
    single = logistic_noise(1 << 14, dtype=torch.float32, device=device, rng_state=state)
    half = logistic_noise(1 << 14, dtype=dtype, device=device, rng_state=state)
    assert torch.equal(half, single.to(dtype))
    y = binary_concrete(single.to(dtype), 0.7, rng_state=state)
    assert torch.equal(y, binary_concrete(single.to(dtype).float(), 0.7, rng_state=state).to(dtype))


def test_noise_has_the_bits_of_the_gumbel_noise(device, state):
    """One v makes both: g = -log(-log1p(-v)) gives v, and with it L."""
    g = gumbel_ext.gumbel_noise(5000, dtype=torch.float64, device=device, rng_state=state)
    logistic = logistic_noise(5000, dtype=torch.float64, device=device, rng_state=state)
    rate = torch.exp(-g)
    torch.testing.assert_close(logistic, -rate - torch.log(-torch.expm1(-rate)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_depends_on_position_alone(device, state, dtype, thread_count):
    logits = samples((70001,), dtype, device)
    grad = samples((70001,), dtype, device)
    whole = binary_concrete(logits, 0.5, rng_state=state)
    gradient, _ = OPS.binary_concrete_backward(grad, logits, 0.5, None, state, False)
    for size in ((70000,), (7, 10000), (35, 4, 500), (13,), (1, 1)):
        count = math.prod(size)
        part = binary_concrete(logits[:count].view(size), 0.5, rng_state=state)
        assert torch.equal(part.flatten(), whole[:count])
    for threads in (1, 2, 7):
        thread_count(threads)
        assert torch.equal(binary_concrete(logits, 0.5, rng_state=state), whole)
        again, _ = OPS.binary_concrete_backward(grad, logits, 0.5, None, state, False)
        assert torch.equal(again, gradient)


@pytest.mark.cpu_only(reason="threads of the CPU")
def test_threads_begin_anywhere_in_a_run(state, thread_count):
    """Also with a temperature an element, of which each thread reads its own."""
    logits, tau, grad = torch.randn(3, 60_001)
    tau = tau.abs() + 0.3
    results = []
    for threads in (1, 2, 7):
        thread_count(threads)
        y = binary_concrete(logits, tau, rng_state=state)
        backward = OPS.binary_concrete_backward(grad, logits, 1.0, tau, state, True)
        results.append((y, *backward))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradient_of_a_temperature_that_makes_scores_infinite(device, state):
    logits = torch.tensor([100.0, -100.0], device=device)
    _, of_tau = OPS.binary_concrete_backward(
        torch.ones_like(logits), logits, 1e-37, None, state, True
    )
    assert of_tau.tolist() == [0, 0]


def test_positions_of_a_part(device, state):
    whole = samples((6, 5, 40), torch.float32, device)
    y, grad = binary_concrete(whole, 0.4, rng_state=state), torch.randn_like(whole)
    gradient, _ = OPS.binary_concrete_backward(grad, whole, 0.4, None, state, False)
    drawn = logistic_noise(whole.shape, device=device, rng_state=state)
    for slices in (
        (slice(2, 5), slice(0, 5), slice(0, 40)),
        (slice(1, 6), slice(1, 4), slice(13, 30)),
        (slice(0, 6), slice(4, 5), slice(7, 8)),
    ):
        part = whole[slices]
        base = slices[0].start * 200 + slices[1].start * 40 + slices[2].start
        positions = [base, 200, 40, 1]
        actual, _ = OPS.binary_concrete(part, 0.4, None, False, None, state, positions)
        assert torch.equal(actual, y[slices])
        actual, _ = OPS.binary_concrete_backward(
            grad[slices], part, 0.4, None, state, False, positions
        )
        assert torch.equal(actual, gradient[slices])
        actual, _ = OPS.logistic_noise(part, part.shape, None, state, positions)
        assert torch.equal(actual, drawn[slices])
    # Backwards, and all elements with one noise.
    reverse, _ = OPS.binary_concrete(whole.flatten(), 0.4, None, False, None, state, [1199, -1])
    assert torch.equal(
        reverse, binary_concrete(whole.flatten().flip(0), 0.4, rng_state=state).flip(0)
    )
    same, _ = OPS.logistic_noise(whole, (3, 4), None, state, [7, 0, 0])
    assert torch.equal(same, drawn.flatten()[7].expand(3, 4))


# ---- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tau", [0.1, 0.67, 1.0, 10.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_soft_sample(device, state, shape, tau, dtype):
    logits = samples(shape, dtype, device)
    y = binary_concrete(logits, tau, rng_state=state)
    assert (y.shape, y.dtype, y.device) == (logits.shape, dtype, logits.device)
    expected, _, _ = exact(logits, tau)
    assert_close(y, expected, relative_bound(dtype, condition(logits, tau)), smallest(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_sample(device, state, dtype):
    logits = samples((33, 650), dtype, device)
    y = binary_concrete(logits, 0.3, hard=True, rng_state=state)
    scores = logits.cpu().double() + noise(logits.shape)
    clear = scores.abs() > 8 * accumulation_eps(dtype) * (1 + noise(logits.shape).abs())
    assert clear.double().mean() > 0.999
    assert torch.equal(y.cpu().double()[clear], (scores > 0).double()[clear])
    assert ((y == 0) | (y == 1)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_is_the_equation(dtype):
    """The oracle itself, against the equation as one would write it."""
    logits, tau = samples((4, 50), dtype, "cpu"), torch.tensor([[0.5], [1.0], [2.0], [0.9]])
    wide = logits.double()
    y = _reference.binary_concrete(wide, tau, rng_state=rng_state())
    torch.testing.assert_close(y, torch.sigmoid((wide + noise(wide.shape)) / tau))
    hard = _reference.binary_concrete(wide, tau, True, rng_state=rng_state())
    assert torch.equal(hard, (wide + noise(wide.shape) > 0).double())


def tensor_taus(device):
    return {
        "scalar": torch.tensor(0.6, device=device),
        "rows": torch.rand(6, 1, device=device) + 0.3,
        "columns": torch.rand(80, device=device) + 0.3,
        "all": torch.rand(6, 80, device=device) + 0.3,
        "float64": torch.rand(80, device=device, dtype=torch.float64) + 0.3,
        "int": torch.tensor(2, device=device),
        "transposed": (torch.rand(80, 6, device=device) + 0.3).mT,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", tensor_taus("cpu"))
def test_tensor_temperatures(device, state, kind, dtype):
    tau, logits = tensor_taus(device)[kind], samples((6, 80), dtype, device)
    y = binary_concrete(logits, tau, rng_state=state)
    expected, _, _ = exact(logits, tau)
    assert_close(y, expected, relative_bound(dtype, condition(logits, tau)), smallest(dtype))
    if kind == "scalar":
        assert torch.equal(y, binary_concrete(logits, tau.item(), rng_state=state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 70), (3, 4, 5, 70), (2, 3, 2, 3, 40)], ids=str)
def test_memory_layouts(device, state, shape, dtype):
    logits, grad = samples((2, *shape), dtype, device)
    tau = torch.rand(shape[-1], device=device) + 0.5
    y, _ = OPS.binary_concrete(logits, 1.0, tau, False, None, state)
    gradient, terms = OPS.binary_concrete_backward(grad, logits, 1.0, tau, state, True)
    for (name, laid), (_, other) in zip(layouts(logits), layouts(grad), strict=True):
        actual, _ = OPS.binary_concrete(laid, 1.0, tau, False, None, state)
        assert torch.equal(actual, y), name
        assert actual.stride() == torch.empty_like(laid).stride(), name
        results = OPS.binary_concrete_backward(other, laid, 1.0, tau, state, True)
        assert torch.equal(results[0], gradient), name
        assert torch.equal(results[1], terms), name
        assert results[0].stride() == torch.empty_like(laid).stride(), name
    for (name, view), (_, other) in zip(expanded(logits), expanded(grad), strict=True):
        copied = view.contiguous(), other.contiguous()
        y, _ = OPS.binary_concrete(copied[0], 1.0, tau, False, None, state)
        assert torch.equal(OPS.binary_concrete(view, 1.0, tau, False, None, state)[0], y), name
        expected = OPS.binary_concrete_backward(copied[1], copied[0], 1.0, tau, state, True)
        actual = OPS.binary_concrete_backward(other, view, 1.0, tau, state, True)
        assert torch.equal(actual[0], expected[0]), name
        assert torch.equal(actual[1], expected[1]), name


# ---- instruction sets ---------------------------------------------------------------------------


def instruction_set_results():
    source = torch.Generator().manual_seed(9)
    for dtype in DTYPES:
        logits, dy = (2 * torch.randn(2, 3, 1031, generator=source)).to(dtype)
        yield dtype, binary_concrete(logits, 0.7, rng_state=rng_state())
        backward = OPS.binary_concrete_backward(dy, logits, 0.7, None, rng_state(), True)
        yield from ((result.dtype, result) for result in backward)
        yield dtype, logistic_noise(1031, dtype=dtype, rng_state=rng_state())


def run_with(capability, path):
    environment = os.environ | {"GUMBEL_EXT_CPU_CAPABILITY": capability}
    here = str(pathlib.Path(__file__).parent)
    environment["PYTHONPATH"] = os.pathsep.join([here, *filter(None, sys.path)])
    code = "import test_binary as t, torch\n"
    code += f"torch.save([*t.instruction_set_results()], {str(path)!r})"
    subprocess.run([sys.executable, "-c", code], env=environment, timeout=300, check=True)
    return torch.load(path)


@pytest.mark.cpu_only(reason="instruction sets of the CPU")
@pytest.mark.parametrize("capability", _C.cpu_capabilities()[1:])
def test_instruction_sets_agree(capability, tmp_path):
    theirs = run_with(capability, tmp_path / "results.pt")
    for (dtype, mine), (_, other) in zip(instruction_set_results(), theirs, strict=True):
        if capability != "generic":
            assert torch.equal(mine, other)
        else:
            # Generic code has no fma of its own.
            loose = 64 * eps(dtype)
            torch.testing.assert_close(mine, other, rtol=loose, atol=loose)


# ---- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tau", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("shape", [(), (7,), (33, 650)], ids=str)
def test_gradient(device, state, hard, shape, tau, dtype):
    logits = samples(shape, dtype, device).requires_grad_()
    temperature = torch.tensor(tau, device=device, dtype=torch.float64, requires_grad=True)
    grad = samples(shape, dtype, device)
    y = binary_concrete(logits, temperature, hard, rng_state=state)
    actual, actual_tau = torch.autograd.grad(y, (logits, temperature), grad)
    _, slope, z = exact(logits, tau)
    wide = grad.cpu().double()
    expected = wide * slope / tau
    k = relative_bound(dtype, condition(logits, tau))
    floor = smallest(dtype) + smallest(torch.float32) * wide.abs() / tau
    assert (actual.dtype, actual.shape) == (dtype, logits.shape)
    assert_close(actual, expected, k, floor)
    # Terms of both signs meet in the gradient of tau, which comes back in the dtype computed in:
    # the error is relative to their sizes.
    terms = expected * z
    k = relative_bound(accumulation_dtype(dtype), condition(logits, tau))
    allowed = (k * terms.abs() + floor * z.abs()).sum()
    assert (actual_tau.cpu() + terms.sum()).abs() <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_tensor_temperatures(device, state, hard, dtype):
    logits, grad = samples((2, 6, 80), dtype, device)
    for kind, tau in tensor_taus(device).items():
        if not tau.is_floating_point():
            continue
        tau = tau.detach().to(torch.float64).requires_grad_()
        y = binary_concrete(logits, tau, hard, rng_state=state)
        (actual,) = torch.autograd.grad(y, tau, grad)
        _, slope, z = exact(logits, tau)
        weights = grad.cpu().double() * slope / tau.detach().cpu()
        terms = -weights * z
        k = relative_bound(accumulation_dtype(dtype), condition(logits, tau))
        expected = terms.sum_to_size(tau.shape)
        allowed = k * terms.abs() + smallest(dtype)
        if not runs_cpu_kernels(device):
            # There small noise is right to so much absolutely, and z may be smaller than it.
            of_noise = 8 * accumulation_eps(dtype) * noise(logits.shape).abs().clamp(min=1)
            allowed = allowed + weights.abs() * of_noise / tau.detach().cpu()
        allowed = allowed.sum_to_size(tau.shape)
        assert ((actual.cpu() - expected).abs() <= allowed).all(), kind


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_where_the_sample_has_rounded(device, state, dtype):
    """y is 0 or 1 to its last bit there, and says nothing about the slope."""
    logits = torch.linspace(-60, 60, 2001).to(device, dtype).requires_grad_()
    y = binary_concrete(logits, 1.0, rng_state=state)
    rounded = ((y == 0) | (y == 1)).cpu()
    assert rounded.sum() > 300
    (actual,) = torch.autograd.grad(y, logits, torch.ones_like(y))
    _, slope, _ = exact(logits, 1.0)
    assert_close(actual, slope, relative_bound(dtype, condition(logits, 1.0)), smallest(dtype))
    assert (actual.cpu()[rounded] > 0).sum() > 100


def test_second_derivatives_where_the_sample_has_rounded(device, state):
    logits = torch.linspace(-60, 60, 501, device=device, requires_grad=True)
    tau = torch.tensor(0.9, device=device, requires_grad=True)
    y = binary_concrete(logits, tau, rng_state=state)
    first = torch.autograd.grad(y.sum(), (logits, tau), create_graph=True)
    weights = torch.randn(501, device=device)
    actual, actual_tau = torch.autograd.grad((weights * first[0]).sum(), (logits, tau))
    _, slope, z = exact(logits, 0.9)
    change = slope * -torch.tanh(z / 2) / 0.81  # s'' = s' (1 - 2 s)
    bound = relative_bound(torch.float32, condition(logits, 0.9))
    weights = weights.cpu().double()
    assert_close(actual, weights * change, 4 * bound, 1e-30)
    # d/dtau of s'(z) / tau, z = x / tau.
    expected = -(weights * (change * z + slope / 0.81)).sum()
    torch.testing.assert_close(actual_tau.cpu().double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_kept_but_inputs_and_state(device, hard, dtype):
    logits = samples((33, 65), dtype, device).requires_grad_().clone()
    tau = torch.tensor(0.5, device=device, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = binary_concrete(logits, tau, hard)
    pointers = {t.data_ptr() for t in kept if t.numel() > 2}
    assert pointers == {logits.data_ptr()}
    with DispatchLog() as log:
        y.sum().backward()
    assert log.names == ["binary_concrete_backward"]


# ---- edges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_logits(device, state, hard, dtype):
    values = [math.inf, -math.inf, math.nan, torch.finfo(dtype).max, torch.finfo(dtype).min]
    logits = torch.tensor(values * 5, device=device, dtype=dtype, requires_grad=True)
    for tau in (1.0, 1e-300, 5e-324, 1e300, torch.tensor(1e-45, device=device)):
        temperature = torch.as_tensor(tau, dtype=torch.float64).to(device).requires_grad_()
        y = binary_concrete(logits, temperature, hard, rng_state=state)
        actual = y.detach().cpu().view(5, 5)
        assert (actual[:, 0] == 1).all()
        assert (actual[:, 1] == 0).all()
        assert actual[:, 2].isnan().all()
        grads = torch.autograd.grad(y, (logits, temperature), torch.randn_like(y))
        assert (grads[0].view(5, 5)[:, :2] == 0).all()
        assert grads[0].view(5, 5)[:, 2].isnan().all()
        assert grads[1].isnan()
        if float(tau) < 1:
            assert (actual[:, 3] == 1).all()
            assert (actual[:, 4] == 0).all()
            assert (grads[0].view(5, 5)[:, 3:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_logits_leave_other_derivatives_alone(device, state, dtype):
    """Of first and second order, also in a temperature that they share with finite ones."""
    logits = torch.tensor([math.inf, -math.inf, 0.5, 300], device=device, dtype=dtype)
    logits.requires_grad_()
    tau = torch.tensor(1e-3, device=device, requires_grad=True)
    first = torch.autograd.grad(
        binary_concrete(logits, tau, rng_state=state).sum(), (logits, tau), create_graph=True
    )
    second = torch.autograd.grad(sum(g.sum() for g in first), (logits, tau))
    for result in (*first, *second):
        assert result.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tau", [5e-324, 1e-300, 1e-45, 1e-30])
def test_smallest_temperatures(device, state, tau, dtype):
    logits = samples((1000,), dtype, device).requires_grad_()
    y = binary_concrete(logits, tau, rng_state=state)
    assert torch.equal(y, binary_concrete(logits, tau, hard=True, rng_state=state))
    (grad,) = torch.autograd.grad(y, logits, torch.randn_like(y))
    assert (grad == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_largest_temperatures(device, state, dtype):
    logits = samples((1000,), dtype, device).requires_grad_()
    for tau in (1e30, 1e300, torch.finfo(torch.float64).max):
        y = binary_concrete(logits, tau, rng_state=state)
        # A GPU's exponential of nearly 0 may be off by two units, of which y takes a quarter.
        allowed = 0 if runs_cpu_kernels(device) else eps(accumulation_dtype(dtype)) / 2
        assert ((y.double() - 0.5).abs() <= allowed).all()
        (grad,) = torch.autograd.grad(y, logits, torch.randn_like(y))
        assert grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0,), (4, 0, 3)], ids=str)
def test_empty(device, hard, shape):
    before = default_rng_state(device)
    logits = torch.empty(shape, device=device, requires_grad=True)
    tau = torch.tensor(0.5, device=device, requires_grad=True)
    y = binary_concrete(logits, tau, hard)
    y.sum().backward()
    assert y.shape == logits.grad.shape == shape
    assert tau.grad == 0
    assert logistic_noise(shape, device=device).shape == shape
    assert torch.equal(default_rng_state(device), before)


# ---- the generator ------------------------------------------------------------------------------


def test_a_call_draws_one_seed(device):
    """The one that a call of any other function draws."""
    for call in (
        lambda generator: binary_concrete(torch.zeros(50, device=device), generator=generator),
        lambda generator: binary_concrete(
            torch.zeros(3, device=device, dtype=torch.float64), hard=True, generator=generator
        ),
        lambda generator: logistic_noise((2, 3), device=device, generator=generator),
    ):
        mine, other = (torch.Generator(device).manual_seed(3) for _ in range(2))
        call(mine)
        gumbel_ext.gumbel_noise(1, device=device, generator=other)
        assert torch.equal(mine.get_state(), other.get_state())


def test_used_state_repeats_the_draw(device):
    logits = torch.randn(999, device=device)
    y, used = OPS.binary_concrete(logits, 0.5, None, False, None, None)
    assert torch.equal(binary_concrete(logits, 0.5, rng_state=used), y)
    drawn, used = OPS.logistic_noise(logits, (999,), None, None)
    assert torch.equal(logistic_noise(999, device=device, rng_state=used), drawn)
    # A drawn state gives the draw that the generator would have given.
    torch.manual_seed(8)
    expected = binary_concrete(logits, 0.5)
    torch.manual_seed(8)
    drawn_state = gumbel_ext.draw_rng_state(device=device)
    assert torch.equal(binary_concrete(logits, 0.5, rng_state=drawn_state), expected)
    assert not torch.equal(binary_concrete(logits, 0.5), expected)


# ---- statistics ---------------------------------------------------------------------------------


def test_hard_samples_are_bernoulli(device):
    """A two-sided test for each of 41 log-odds, together at alpha = 1e-6."""
    odds = torch.linspace(-8, 8, 41, dtype=torch.float64)
    count = 200_000
    logits = odds.to(device, torch.float32).expand(count, 41)
    ones = binary_concrete(logits, hard=True, rng_state=rng_state(12, 34, device))
    frequency = ones.mean(0, dtype=torch.float64).cpu()
    p = torch.sigmoid(odds)
    z = (frequency - p) / (p * (1 - p) / count).sqrt()
    assert z.abs().max() < 5.8  # P(|z| > 5.8) < 1e-6 / 41 for a normal; the rarest p has 67 counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_noise_is_logistic(device, dtype):
    """Kolmogorov-Smirnov at alpha = 1e-6: sqrt(n) D < 2.69."""
    count = 1_000_000
    drawn = logistic_noise(count, dtype=dtype, device=device, rng_state=rng_state(5, 6, device))
    ordered = drawn.cpu().double().sort().values
    law = torch.sigmoid(ordered)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    if dtype == torch.bfloat16:
        # Between the edges of what rounds to one number; an even one has ties on its side.
        last = ordered.diff(append=torch.tensor([math.inf])) > 0
        following = torch.nextafter(ordered[last].to(dtype), torch.tensor(math.inf, dtype=dtype))
        law = torch.sigmoid((ordered[last] + following.double()) / 2)
        distance = (law - steps[1:][last]).abs().max()
    else:
        distance = torch.maximum(law - steps[:-1], steps[1:] - law).max()
    assert distance * math.sqrt(count) < 2.69


def test_soft_samples_have_the_density(device):
    """P(y < 0.2) and P(y > 0.9) by the distribution function, at alpha = 1e-6 together."""
    logit, tau, count = 0.7, 0.6, 500_000
    logits = torch.full((count,), logit, device=device)
    y = binary_concrete(logits, tau, rng_state=rng_state(7, 8, device)).cpu().double()
    for edge in (0.2, 0.9):
        p = 1 / (1 + math.exp(logit - tau * math.log(edge / (1 - edge))))
        z = ((y < edge).double().mean() - p) / math.sqrt(p * (1 - p) / count)
        assert abs(z) < 5.0


# ---- errors -------------------------------------------------------------------------------------

BAD = {
    "tau_zero": (ValueError, "tau must be positive and finite, got 0", lambda x: (x, 0)),
    "tau_negative": (ValueError, "tau must be positive .* got -1", lambda x: (x, -1.0)),
    "tau_nan": (ValueError, "tau must be positive .* got nan", lambda x: (x, math.nan)),
    "tau_infinite": (ValueError, "tau must be positive .* got inf", lambda x: (x, math.inf)),
    "tau_text": (TypeError, "tau must be a number or a tensor, got 'a'", lambda x: (x, "a")),
    "tau_bool": (TypeError, "tau must be a number", lambda x: (x, True)),
    "tau_shape": (
        ValueError,
        r"tau must broadcast to \[3, 4\], the shape of logits, got shape \[3\]",
        lambda x: (x, torch.ones(3, device=x.device)),
    ),
    "tau_dtype": (TypeError, "a tau tensor must have dtype", lambda x: (x, x > 0)),
    "logits_dtype": (TypeError, "logits must have dtype .* got Long", lambda x: (x.long(),)),
    "logits_list": (TypeError, "logits must be a tensor, got list", lambda x: ([0.5],)),
    "sparse": (TypeError, "logits must be a dense", lambda x: (x.to_sparse(),)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(device, case):
    error, message, arguments = BAD[case]
    with pytest.raises(error, match=f"^binary_concrete: {message}"):
        binary_concrete(*arguments(torch.ones(3, 4, device=device)))


@pytest.mark.cpu_only(reason="values on a GPU are not looked at")
def test_bad_temperature_values():
    with pytest.raises(ValueError, match=r"^binary_concrete: tau must be positive .* got -2"):
        binary_concrete(torch.ones(3), torch.tensor([1.0, -2.0, 1.0]))


def test_bad_randomness(device):
    logits = torch.ones(3, device=device)
    state = rng_state(device=device)
    with pytest.raises(ValueError, match=r"^binary_concrete: give either generator or rng_state"):
        binary_concrete(logits, generator=torch.Generator(device), rng_state=state)
    with pytest.raises(ValueError, match=r"^binary_concrete: rng_state .* got shape \[1\]"):
        binary_concrete(logits, rng_state=state[:1])
    with pytest.raises(TypeError, match=r"^logistic_noise: generator must be"):
        logistic_noise(3, device=device, generator=4)
    with pytest.raises(TypeError, match=r"^logistic_noise: size must be"):
        logistic_noise((2.5,), device=device)
    with pytest.raises(ValueError, match=r"^logistic_noise: size must be at least 0, got -1"):
        logistic_noise((3, -1), device=device)


def test_bad_gradients(device, state):
    logits = torch.ones(3, 4, device=device)
    with pytest.raises(ValueError, match=r"^binary_concrete_backward: grad must have shape"):
        OPS.binary_concrete_backward(logits[:2], logits, 1.0, None, state, False)
    with pytest.raises(TypeError, match=r"^binary_concrete_backward: grad must have dtype"):
        OPS.binary_concrete_backward(logits.double(), logits, 1.0, None, state, False)
