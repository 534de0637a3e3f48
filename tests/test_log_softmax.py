"""The log-space sample: values and gradients against float64 on the same noise."""

import math

import pytest
import torch
from oracle import (
    DTYPES,
    SIXTEEN_BIT,
    DispatchLog,
    accumulation_eps,
    condition,
    default_rng_state,
    eps,
    expanded,
    layouts,
    noise,
    relative_bound,
    row_error,
    smallest,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import gumbel_ext
from gumbel_ext import _reference, gumbel_log_softmax

OPS = torch.ops.gumbel_ext
CASES = {
    "short_rows": ((500, 10), -1),
    "odd_rows": ((41, 33), -1),
    "long_rows": ((20, 3001), -1),
    "one_row": ((1, 20_001), -1),
    "inner": ((6, 50, 33), 1),
    "first_dim": ((30, 17), 0),
    "one_class": ((5, 1), -1),
}
TAUS = (10.0, 1.0, 0.1, 0.01)


def feature(name, mode="eager"):
    return pytest.mark.feature(name, ops=("gumbel_log_softmax",), modes=(mode,))


def exact(logits, tau, dim=-1, mask=None, g=None):
    tau = tau.detach().cpu().double() if isinstance(tau, torch.Tensor) else tau
    g = noise(logits.shape) if g is None else g
    mask = None if mask is None else mask.cpu()
    return _reference.gumbel_log_softmax(
        logits.detach().cpu().double(), tau, dim, mask=mask, noise=g
    )


def assert_close(log_y, expected, logits, tau, dim, g):
    """The rounding of z, which the temperature magnifies, and once that of the result."""
    actual = log_y.detach().cpu().double()
    k = condition(logits, g, tau, dim)
    allowed = 16 * k * accumulation_eps(logits.dtype) + eps(logits.dtype) * expected.abs()
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    off = torch.where(finite, (actual - expected).abs() - allowed, 0.0)
    assert not (off > 0).any(), f"worst by {off.max():.3g}"


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), CASES.values(), ids=CASES)
def test_values(device, state, shape, dim, dtype, tau):
    logits = (2 * torch.randn(shape)).to(device, dtype)
    log_y = gumbel_log_softmax(logits, tau, dim, rng_state=state)
    assert log_y.dtype == dtype
    assert log_y.shape == logits.shape
    assert_close(log_y, exact(logits, tau, dim), logits, tau, dim, noise(shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_exponential_is_the_soft_sample(device, state, dtype):
    logits = torch.randn(40, 30).to(device, dtype)
    log_y = gumbel_log_softmax(logits, 0.7, rng_state=state).double()
    y = gumbel_ext.gumbel_softmax(logits, 0.7, rng_state=state).double()
    k = condition(logits, noise(logits.shape), 0.7).to(device)
    bound = relative_bound(dtype, k) + eps(dtype) * log_y.abs()
    assert ((log_y.exp() - y).abs() <= bound * y + smallest(dtype)).all()


def test_draws_one_state(device):
    """The state of one call, whatever the shape, as :func:`gumbel_softmax` draws it."""
    logits = torch.randn(7, 5, device=device)
    torch.manual_seed(3)
    a = gumbel_log_softmax(logits, 0.5)
    after = default_rng_state(device)
    torch.manual_seed(3)
    b = gumbel_ext.gumbel_softmax(logits, 0.5)
    assert torch.equal(after, default_rng_state(device))
    torch.testing.assert_close(a.exp(), b)
    generator = torch.Generator(device).manual_seed(3)
    assert torch.equal(gumbel_log_softmax(logits, 0.5, generator=generator), a)


def test_finite_where_the_sample_vanishes(device, state):
    logits = torch.randn(50, 20, device=device)
    assert (gumbel_ext.gumbel_softmax(logits, 0.01, rng_state=state) == 0).any()
    assert gumbel_log_softmax(logits, 0.01, rng_state=state).isfinite().all()


@pytest.mark.cpu_only(reason="layouts choose CUDA kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_layouts_give_the_same_bits(state, dtype, dim):
    logits, grad = torch.randn(2, 5, 9, 7).to(dtype)

    def results(x, dy):
        leaf = x.detach().requires_grad_()
        t = torch.tensor(0.5, requires_grad=True)
        log_y = gumbel_log_softmax(leaf, t, dim, rng_state=state)
        return [log_y.detach(), *torch.autograd.grad(log_y, (leaf, t), dy)]

    for name, x in layouts(logits):
        expected = results(logits.contiguous(), grad)
        for a, b in zip(results(x, grad), expected, strict=True):
            assert torch.equal(a, b), name
    for name, x in expanded(logits):
        for a, b in zip(results(x, grad), results(x.contiguous(), grad), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.cpu_only(reason="threads of the CPU")
@pytest.mark.parametrize(("shape", "dim"), CASES.values(), ids=CASES)
def test_threads_give_the_same_bits(state, thread_count, shape, dim):
    logits, grad = torch.randn(2, *shape)
    leaf = logits.requires_grad_()
    results = []
    for threads in (1, 2, 7):
        thread_count(threads)
        log_y = gumbel_log_softmax(leaf, 0.3, dim, rng_state=state)
        results.append((log_y.detach(), *torch.autograd.grad(log_y, leaf, grad)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- edges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_and_impossible_classes(device, state, dtype):
    """-inf, with gradient zero whatever gradient comes in; NaN nowhere."""
    logits = torch.randn(60, 12).to(device, dtype)
    mask = torch.rand(60, 12, device=device) < 0.6
    mask[:, 0] = True
    mask[7] = False
    logits[3, 4] = -math.inf
    t = torch.tensor(0.5, device=device, requires_grad=True)
    leaf = logits.requires_grad_()
    log_y = gumbel_log_softmax(leaf, t, mask=mask, rng_state=state)
    expected = exact(logits, 0.5, mask=mask)
    absent = ~mask
    absent[3, 4] = True
    assert torch.equal(log_y == -math.inf, absent)
    assert torch.equal(log_y.cpu() == -math.inf, expected == -math.inf)
    grad = torch.randn(60, 12).to(device, dtype).masked_fill(absent, 1e4)
    dl, dt = torch.autograd.grad(log_y, (leaf, t), grad)
    assert (dl[absent] == 0).all()
    assert not dl.isnan().any()
    assert dt.isfinite()
    reference = exact(logits.detach(), 0.5, mask=mask)
    assert_close(log_y, reference, logits.nan_to_num(neginf=0), 0.5, -1, noise(logits.shape))


def test_mask_along_any_dim(device, state):
    logits = torch.randn(6, 7, 5, device=device)
    mask = torch.rand(6, 7, 5, device=device) < 0.6
    for dim in range(3):
        log_y = gumbel_log_softmax(logits, 0.5, dim, mask=mask, rng_state=state)
        expected = exact(logits, 0.5, dim, mask=mask)
        assert_close(log_y, expected, logits, 0.5, dim, noise(logits.shape))


def test_rows_without_a_sample(device, state):
    logits = torch.zeros(4, 3, device=device)
    logits[0] = -math.inf
    logits[1, 1] = math.nan
    logits[2, 0] = math.inf
    mask = torch.ones(4, 3, dtype=torch.bool, device=device)
    mask[3] = False
    leaf = logits.requires_grad_()
    log_y = gumbel_log_softmax(leaf, 0.5, mask=mask, rng_state=state)
    assert log_y[:3].isnan().all()
    assert (log_y[3] == -math.inf).all()
    (grad,) = torch.autograd.grad(log_y, leaf, torch.ones_like(log_y))
    assert (grad[3] == 0).all()
    assert grad[:3].isnan().all()


@pytest.mark.parametrize("tau", [1e-40, 1e-6, 1e6, 3e38])
def test_extreme_temperatures(device, state, tau):
    logits = torch.randn(9, 6, device=device, requires_grad=True)
    log_y = gumbel_log_softmax(logits, tau, rng_state=state)
    assert not log_y.isnan().any()
    assert (log_y.amax(-1) <= 0).all()
    (grad,) = torch.autograd.grad(log_y.amax(-1).sum(), logits)
    assert not grad.isnan().any()


def test_scalars_and_empty_tensors(device, state):
    scalar = torch.tensor(0.3, device=device, requires_grad=True)
    log_y = gumbel_log_softmax(scalar, 0.5, rng_state=state)
    assert log_y.shape == ()
    assert log_y == 0
    log_y.backward()
    assert scalar.grad == 0
    for shape in ((0, 4), (4, 0), (0,)):
        x = torch.empty(shape, device=device, requires_grad=True)
        y = gumbel_log_softmax(x, 0.5, rng_state=state)
        assert y.shape == shape
        y.sum().backward()
        assert x.grad.shape == shape


def test_positions_of_a_part(device, state):
    """Noise is that of the whole tensor."""
    whole = torch.randn(6, 8, device=device)
    expected = gumbel_log_softmax(whole, 0.5, rng_state=state)[2:4]
    part, _ = OPS.gumbel_log_softmax(
        whole[2:4], 0.5, None, -1, None, None, state, positions=[16, 8, 1]
    )
    assert torch.equal(part, expected)
    columns, _ = OPS.gumbel_log_softmax(
        whole.mT, 0.5, None, 0, None, None, state, positions=[0, 1, 8]
    )
    torch.testing.assert_close(columns.mT, gumbel_log_softmax(whole, 0.5, rng_state=state))


def test_errors(device, state):
    logits = torch.randn(3, 4, device=device)
    with pytest.raises(TypeError, match=r"gumbel_log_softmax: logits must be a tensor, got list"):
        gumbel_log_softmax([1.0, 2.0])
    with pytest.raises(TypeError, match=r"gumbel_log_softmax: logits must have dtype"):
        gumbel_log_softmax(logits.int())
    with pytest.raises(ValueError, match=r"tau must be positive and finite, got 0"):
        gumbel_log_softmax(logits, 0.0)
    with pytest.raises(ValueError, match=r"tau must be positive and finite, got -1"):
        gumbel_log_softmax(logits, torch.tensor(-1.0))
    with pytest.raises(IndexError, match=r"gumbel_log_softmax: dim must be between -2 and 1"):
        gumbel_log_softmax(logits, dim=2)
    with pytest.raises(ValueError, match=r"not both"):
        gumbel_log_softmax(logits, rng_state=state, generator=torch.Generator(device))
    with pytest.raises(TypeError, match=r"log_y must have the dtype that grad is computed in"):
        OPS.gumbel_log_softmax_backward(logits.half(), logits.half(), 1.0, None, -1, False)


# ---- gradients ----------------------------------------------------------------------------------


def reference_gradients(logits, tau, dim, grad):
    leaf = logits.detach().cpu().double().requires_grad_()
    t = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
    log_y = _reference.gumbel_log_softmax(leaf, t, dim, noise=noise(logits.shape))
    return torch.autograd.grad(log_y, (leaf, t), grad.detach().cpu().double())


@pytest.mark.parametrize("loss", ["random", "likeliest"])
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), CASES.values(), ids=CASES)
def test_row_errors(device, state, shape, dim, dtype, tau, loss):
    """Every row has its full gradient, also where the likeliest class is nearly certain.

    The row error is that of a gradient whose terms are products of y: relative to the largest.
    """
    logits, grad = torch.randn(2, *shape).to(device, dtype)
    if loss == "likeliest":
        index = gumbel_ext.gumbel_argmax(logits, dim, True, rng_state=state)
        grad = torch.zeros_like(grad).scatter(dim, index, grad.gather(dim, index))
    leaf = logits.detach().requires_grad_()
    t = torch.tensor(tau, device=device, dtype=torch.float64, requires_grad=True)
    log_y = gumbel_log_softmax(leaf, t, dim, rng_state=state)
    dl, dt = torch.autograd.grad(log_y, (leaf, t), grad)
    expected, expected_tau = reference_gradients(logits, tau, dim, grad)
    assert dl.dtype == dtype
    k = condition(logits, noise(shape), tau, dim)
    size = grad.cpu().double().abs().sum(dim, keepdim=True) / tau
    floor = 4 * smallest(dtype) * (1 + size)
    error = row_error(dl, expected, dim, floor) / relative_bound(dtype, k)
    if loss == "random":
        # Of terms of both signs there may be nothing left: those rows are told by their terms.
        # With one entry there is none that could cancel, dy (1 - y) and -dy y.
        absolute = (dl.cpu().double() - expected).abs().amax(dim, keepdim=True)
        error = torch.minimum(error, absolute / (relative_bound(dtype, k) * size + floor) * 8)
    assert error.quantile(0.999) <= 1, f"{error.quantile(0.999):.3g} times the target"
    terms = (exact(logits, tau, dim).abs() * expected.abs() + size * eps(torch.float64)).sum()
    bound = relative_bound(dtype, k.max()) * 4
    assert (dt.cpu() - expected_tau).abs() <= bound * (terms + size.sum() * smallest(dtype))


def test_sixteen_bits_keep_every_row(device, state):
    """A gradient from a log y of 16 bits would be wrong by per cents."""
    logits = torch.randn(2000, 10, device=device)
    for dtype in SIXTEEN_BIT:
        low = logits.to(dtype).requires_grad_()
        log_y = gumbel_log_softmax(low, 0.1, rng_state=state)
        index = log_y.argmax(-1, keepdim=True)
        (actual,) = torch.autograd.grad(log_y.gather(-1, index).sum(), low)
        (expected, _) = reference_gradients(
            low, 0.1, -1, torch.zeros_like(low).scatter(-1, index, 1.0)
        )
        floor = 8 * smallest(dtype) / 0.1
        assert row_error(actual, expected, floor=floor).quantile(0.999) <= 8 * eps(dtype)


@pytest.mark.parametrize("tau_shape", [(), (3, 1), (4, 3, 1)])
@feature("gradcheck, gradgradcheck")
@feature("forward-mode AD, dual tensors")
def test_derivatives_of_two_orders(device, state, tau_shape):
    logits = torch.randn(4, 3, 5, dtype=torch.float64, device=device, requires_grad=True)
    tau = torch.rand(tau_shape, dtype=torch.float64, device=device).add(0.5).requires_grad_()
    mask = torch.ones(4, 3, 5, dtype=torch.bool, device=device)
    mask[:, 1, 2] = False

    def allowed(logits, tau):
        log_y = gumbel_log_softmax(logits, tau, mask=mask, rng_state=state)
        return log_y.masked_fill(~mask, 0.0)

    assert gradcheck(allowed, (logits, tau), check_forward_ad=True)
    assert gradgradcheck(allowed, (logits, tau))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@feature("torch.library.opcheck")
def test_opcheck(device, state, dtype):
    logits = torch.randn(4, 3, 6, device=device).to(dtype)
    for x in (logits, logits.movedim(0, 1), logits.requires_grad_()):
        for tau in (None, torch.tensor(0.5, device=device)):
            opcheck(OPS.gumbel_log_softmax, (x, 0.5, tau, 1, None, None, state))
    wide = torch.float32
    args = (torch.randn(4, 3, device=device).to(dtype), torch.randn(4, 3).to(device, wide))
    opcheck(OPS.gumbel_log_softmax_backward, (*args, 0.5, None, -1, True))


@feature("vmap with rng_state")
@feature("vmap randomness=error")
@feature("vmap randomness=different")
@feature("vmap of grad, per-sample gradients")
def test_vmap(device, state):
    x = torch.randn(4, 3, 5, device=device)
    tau = torch.rand(4, device=device) + 0.3
    single = torch.vmap(lambda a, t: gumbel_log_softmax(a, t, rng_state=state))(x, tau)
    for i in range(4):
        assert torch.equal(single[i], gumbel_log_softmax(x[i], tau[i], rng_state=state))
    torch.manual_seed(5)
    batch = torch.vmap(lambda a: gumbel_log_softmax(a, 0.5, 0), randomness="different")(x)
    torch.manual_seed(5)
    assert torch.equal(batch, gumbel_log_softmax(x, 0.5, 1))
    with pytest.raises(RuntimeError, match="randomness error mode"):
        torch.vmap(gumbel_log_softmax)(x)
    grads = torch.vmap(
        torch.func.grad(lambda a: gumbel_log_softmax(a, 0.5, rng_state=state)[..., 0].sum())
    )(x)
    leaf = x[2].clone().requires_grad_()
    gumbel_log_softmax(leaf, 0.5, rng_state=state)[..., 0].sum().backward()
    torch.testing.assert_close(grads[2], leaf.grad)


@pytest.mark.cpu_only(reason="compiled on the CPU is enough for the graph")
@feature("torch.compile(fullgraph=True), forward and backward", "compiled")
def test_compiles_whole(state):
    logits = torch.randn(8, 6, requires_grad=True)

    def loss(logits, tau):
        return (gumbel_log_softmax(logits, tau, rng_state=state) * torch.arange(6)).sum()

    compiled = torch.compile(loss, fullgraph=True)
    for tau in (0.5, 0.25):
        expected = torch.autograd.grad(loss(logits, tau), logits)[0]
        actual = torch.autograd.grad(compiled(logits, tau), logits)[0]
        torch.testing.assert_close(actual, expected)


def test_one_op_each_way(device, state):
    logits = torch.randn(8, 6, device=device, requires_grad=True)
    with DispatchLog() as log:
        gumbel_log_softmax(logits, 0.5, rng_state=state).sum().backward()
    assert log.names == ["gumbel_log_softmax", "gumbel_log_softmax_backward"]
