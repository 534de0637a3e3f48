"""Gradients against float64 autograd of the reference, at every temperature and dtype."""

import json

import mpmath
import pytest
import torch
from oracle import (
    DTYPES,
    assert_row_errors,
    assert_tau_gradient_close,
    eps,
    layouts,
    noise,
    rng_state,
)
from torch.autograd import gradcheck, gradgradcheck

import gumbel_ext
from gumbel_ext import _reference

TAUS = (10.0, 1.0, 0.3, 0.1, 0.03, 1e-2, 1e-3)
CASES = {
    "short_rows": ((2000, 10), -1),
    "long_rows": ((40, 3001), -1),
    "few_rows": ((2, 70_001), -1),
    "inner": ((6, 50, 33), 1),
    "long_inner": ((2, 2100, 9), 1),
    "first_dim": ((30, 100), 0),
}


def reference_gradients(logits, tau, dim, grad, mask=None, g=None):
    """Gradients of ``(y * grad).sum()`` in float64; for hard they are the soft ones."""
    leaf = logits.detach().cpu().double().requires_grad_()
    if isinstance(tau, torch.Tensor):
        tau = tau.detach().cpu().double().requires_grad_()
    g = noise(logits.shape) if g is None else g
    mask = None if mask is None else mask.cpu()
    y, _ = _reference.gumbel_softmax(leaf, tau, dim=dim, mask=mask, noise=g)
    inputs = (leaf, tau) if isinstance(tau, torch.Tensor) else (leaf,)
    return torch.autograd.grad(y, inputs, grad.detach().cpu().double())


def gradients(logits, tau, hard, dim, grad, state, mask=None):
    leaf = logits.detach().requires_grad_()
    y = gumbel_ext.gumbel_softmax(leaf, tau, hard, dim=dim, mask=mask, rng_state=state)
    inputs = (leaf, tau) if isinstance(tau, torch.Tensor) else (leaf,)
    return torch.autograd.grad(y, inputs, grad)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), CASES.values(), ids=CASES)
def test_row_errors(device, state, hard, shape, dim, dtype, tau):
    """Page-wide target: the 99.9th percentile of the row error, at every tau and dtype.

    Without the shift of the incoming gradient by its value at the argmax 16 bits fail from tau = 1
    down, float32 and float64 from 0.3.
    """
    logits, grad = torch.randn(2, *shape).to(device, dtype)
    (expected,) = reference_gradients(logits, tau, dim, grad)
    (actual,) = gradients(logits, tau, hard, dim, grad, state)
    assert_row_errors(actual, expected, logits, grad, tau, noise(shape), dim)


@pytest.mark.parametrize("tau", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "dim"), CASES.values(), ids=CASES)
def test_hard_and_soft_gradients_are_the_same_bits(device, state, shape, dim, dtype, tau):
    """Hard recomputes y, soft saved it: one inline function, so no bit may differ."""
    logits, grad = torch.randn(2, *shape).to(device, dtype)
    for t in (tau, torch.tensor(tau, dtype=dtype, device=device, requires_grad=True)):
        soft = gradients(logits, t, False, dim, grad, state)
        hard = gradients(logits, t, True, dim, grad, state)
        for a, b in zip(soft, hard, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_generator_calls_recompute_their_own_noise(device, hard, dtype):
    """The backward runs after other draws, twice, and still sees the noise of its forward."""
    logits, grad = torch.randn(2, 50, 30).to(device, dtype)
    leaf = logits.requires_grad_()
    y, _, used = torch.ops.gumbel_ext.gumbel_softmax(
        leaf, 0.5, None, hard, -1, None, True, None, None
    )
    gumbel_ext.gumbel_noise(100, device=device)
    first = torch.autograd.grad(y, leaf, grad, retain_graph=True)[0]
    torch.manual_seed(1)
    assert torch.equal(torch.autograd.grad(y, leaf, grad)[0], first)
    assert torch.equal(first, gradients(logits, 0.5, hard, -1, grad, used)[0])


def test_rng_state_is_copied(device, hard):
    """A caller may step the offset in place between forward and backward."""
    logits = torch.randn(5, 6, device=device, requires_grad=True)
    grad = torch.randn(5, 6, device=device)
    state = rng_state(device=device)
    y = gumbel_ext.gumbel_softmax(logits, 0.5, hard, rng_state=state)
    state += 2
    actual = torch.autograd.grad(y, logits, grad)[0]
    expected = gradients(logits, 0.5, hard, -1, grad, rng_state(device=device))[0]
    assert torch.equal(actual, expected)


def test_reference_gradient_against_sixty_digits():
    """The oracle must be right where y is one-hot to the last bit of a double, too."""
    scores, grad = [0.3, -2.1, 5.2, 0.0], [1.0, -0.5, 0.25, 2.0]
    for tau in (1.0, 0.1, 0.02):
        with mpmath.workdps(200):
            e = [mpmath.exp(mpmath.mpf(s) / mpmath.mpf(tau)) for s in scores]
            y = [x / sum(e) for x in e]
            mean = sum(a * b for a, b in zip(y, grad, strict=True))
            exact = [float(a * (b - mean) / mpmath.mpf(tau)) for a, b in zip(y, grad, strict=True)]
        leaf = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
        y, _ = _reference.gumbel_softmax(leaf, tau, noise=torch.zeros(4, dtype=torch.float64))
        (actual,) = torch.autograd.grad(y, leaf, torch.tensor(grad, dtype=torch.float64))
        torch.testing.assert_close(
            actual, torch.tensor(exact, dtype=torch.float64), rtol=1e-12, atol=0.0
        )


# ---- temperature --------------------------------------------------------------------------------

TAU_SHAPES = {
    "scalar": ((), -1),
    "single": ((1,), -1),
    "per_row": ((12, 20, 1), -1),
    "per_outer": ((12, 1, 1), -1),
    "per_inner_row": ((20, 1), -1),
    "per_pixel": ((12, 1, 30), 1),
    "per_column": ((1, 30), 1),
    "first_dim": ((1, 20, 30), 0),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tau_shape", "dim"), TAU_SHAPES.values(), ids=TAU_SHAPES)
def test_tau_gradient(device, state, hard, tau_shape, dim, dtype):
    shape = (12, 20, 30)
    logits, grad = torch.randn(2, *shape).to(device, dtype)
    tau = (0.2 + torch.rand(tau_shape)).to(device, dtype).requires_grad_()
    expected_logits, expected_tau = reference_gradients(logits, tau, dim, grad)
    actual_logits, actual_tau = gradients(logits, tau, hard, dim, grad, state)
    assert actual_tau.shape == tau.shape
    assert actual_tau.dtype == tau.dtype
    assert_row_errors(actual_logits, expected_logits, logits, grad, tau, noise(shape), dim)
    assert_tau_gradient_close(
        actual_tau, expected_tau, expected_logits, logits, grad, tau, noise(shape), dim
    )


def test_tau_gradient_alone(device, state, hard):
    """Logits that need no gradient, as where only the temperature is learned."""
    logits, grad = torch.randn(2, 30, 7, device=device)
    tau = torch.tensor(0.7, device=device, requires_grad=True)
    y = gumbel_ext.gumbel_softmax(logits, tau, hard, rng_state=state)
    (actual,) = torch.autograd.grad(y, tau, grad)
    expected = reference_gradients(logits, tau, -1, grad)[1]
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-4, atol=1e-5)


def test_tau_gradient_where_probabilities_vanish(device, state, hard):
    """0 * log 0 = 0: entries that underflow add nothing, not NaN."""
    logits, grad = torch.randn(2, 40, 50, dtype=torch.float64, device=device)
    logits = logits * 1000
    tau = torch.tensor(0.05, dtype=torch.float64, device=device, requires_grad=True)
    actual = gradients(logits, tau, hard, -1, grad, state)
    expected = reference_gradients(logits, tau, -1, grad)
    assert actual[1].isfinite()
    torch.testing.assert_close(actual[1].cpu(), expected[1], rtol=1e-9, atol=1e-9)


# ---- finite differences -------------------------------------------------------------------------

CHECKED = {
    "last_dim": ((3, 5), -1, ()),
    "first_dim": ((4, 3), 0, (1, 3)),
    "middle_dim": ((2, 4, 3), 1, (2, 1, 3)),
    "broadcast_tau": ((2, 4, 3), 1, (3,)),
    "vector": ((6,), 0, (1,)),
    "one_class": ((3, 1), -1, (3, 1)),
}


def surrogate(hard, dim, state, mask=None):
    """The function whose derivatives autograd is to return.

    For hard the value is a constant, so finite differences see nothing.  Adding soft minus hard
    as constants of the derivative gives the straight-through surrogate: soft values, hard's
    gradient.
    """

    def soft(logits, tau):
        return gumbel_ext.gumbel_softmax(logits, tau, dim=dim, mask=mask, rng_state=state)

    def straight_through(logits, tau):
        one_hot = gumbel_ext.gumbel_softmax(logits, tau, True, dim=dim, mask=mask, rng_state=state)
        with torch.no_grad():
            lift = soft(logits, tau) - one_hot
        return one_hot + lift

    return straight_through if hard else soft


@pytest.mark.parametrize("masked", [False, True], ids=("unmasked", "masked"))
@pytest.mark.parametrize(("shape", "dim", "tau_shape"), CHECKED.values(), ids=CHECKED)
def test_gradcheck(device, state, hard, shape, dim, tau_shape, masked):
    logits = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    tau = 0.5 + torch.rand(tau_shape, dtype=torch.float64, device=device)
    tau = tau.requires_grad_()
    mask = None
    if masked:
        mask = torch.rand(shape, device=device) < 0.7
        mask.select(dim, 0).fill_(True)
        mask.movedim(dim, -1).reshape(-1, shape[dim])
    function = surrogate(hard, dim, state, mask)
    assert gradcheck(function, (logits, tau))
    if not hard:
        assert gradgradcheck(function, (logits, tau))
    assert gradcheck(lambda x: surrogate(hard, dim, state, mask)(x, 0.7), (logits,))


@pytest.mark.parametrize(("shape", "dim", "tau_shape"), CHECKED.values(), ids=CHECKED)
def test_double_backward(device, state, hard, shape, dim, tau_shape):
    """First and second derivatives in logits, tau and the incoming gradient, of soft and hard.

    Second derivatives of hard are those of the soft surrogate, which eager has too.
    """
    logits = torch.randn(shape, dtype=torch.float64)
    tau = 0.5 + torch.rand(tau_shape, dtype=torch.float64)
    grad, weight = torch.randn(2, *shape, dtype=torch.float64)
    tau_weight = torch.randn(tau_shape, dtype=torch.float64)

    def second(function, to):
        leaves = [t.to(to).requires_grad_() for t in (logits, tau, grad)]
        y = function(leaves[0], leaves[1])
        first = torch.autograd.grad(y, leaves[:2], leaves[2], create_graph=True)
        loss = (first[0] * weight.to(to)).sum() + (first[1] * tau_weight.to(to)).sum()
        return [*first, *torch.autograd.grad(loss, leaves)]

    actual = second(
        lambda x, t: gumbel_ext.gumbel_softmax(x, t, hard, dim=dim, rng_state=state), device
    )
    expected = second(lambda x, t: reference_of(x, t, hard, dim), "cpu")
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-11)


def reference_of(logits, tau, hard, dim):
    return _reference.gumbel_softmax(logits, tau, hard, dim, noise=noise(logits.shape))[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_double_backward_in_every_dtype(device, state, hard, dtype):
    """A gradient penalty, as of a critic that reads relaxed samples."""
    logits, grad, weight = torch.randn(3, 20, 9).to(device, dtype)

    def penalty(function, leaf, grad, weight):
        (first,) = torch.autograd.grad(function(leaf), leaf, grad, create_graph=True)
        return torch.autograd.grad((first * weight).sum(), leaf)[0]

    actual = penalty(
        lambda x: gumbel_ext.gumbel_softmax(x, 0.8, hard, rng_state=state),
        logits.clone().requires_grad_(),
        grad,
        weight,
    )
    expected = penalty(
        lambda x: reference_of(x, 0.8, hard, -1),
        logits.cpu().double().requires_grad_(),
        grad.cpu().double(),
        weight.cpu().double(),
    )
    scale = expected.abs().max()
    assert (actual.cpu().double() - expected).abs().max() <= 100 * eps(dtype) * scale


# ---- layouts of the gradient --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_gradient_of_any_layout(device, state, hard, dim, dtype):
    logits, grad = torch.randn(2, 6, 14, 10).to(device, dtype)
    (expected,) = reference_gradients(logits, 0.5, dim, grad)
    for _, laid in layouts(grad):
        (actual,) = gradients(logits, 0.5, hard, dim, laid, state)
        assert_row_errors(actual, expected, logits, grad, 0.5, noise(logits.shape), dim)


def test_gradient_with_stride_zero(device, state, hard):
    """``y[:, 0].sum()`` and ``y.mean()`` send gradients that are views of one number."""
    logits = torch.randn(4, 5, dtype=torch.float64, device=device, requires_grad=True)
    for loss in (
        lambda y: (y * torch.arange(5.0, device=device)).sum(-1).mean(),
        lambda y: y[:, 0].sum(),
        lambda y: y.T[2].sum() + y.mean(),
    ):
        y = gumbel_ext.gumbel_softmax(logits, 0.5, hard, rng_state=state)
        (actual,) = torch.autograd.grad(loss(y), logits)
        leaf = logits.detach().cpu().requires_grad_()
        y = reference_of(leaf, 0.5, hard, -1).to(device)
        (expected,) = torch.autograd.grad(loss(y), leaf)
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-12, atol=1e-14)


def test_expanded_logits_collect_their_gradient(device, state, hard):
    """One set of logits, several samples: the gradient is the sum over the samples."""
    base = torch.randn(1, 4, 7, dtype=torch.float64, device=device, requires_grad=True)
    grad = torch.randn(5, 4, 7, dtype=torch.float64, device=device)
    y = gumbel_ext.gumbel_softmax(base.expand(5, 4, 7), 0.5, hard, rng_state=state)
    (actual,) = torch.autograd.grad(y, base, grad)
    (expected,) = reference_gradients(base.expand(5, 4, 7), 0.5, -1, grad)
    torch.testing.assert_close(actual.cpu(), expected.sum(0, keepdim=True))


# ---- what is not differentiable, what is not asked for ------------------------------------------


def test_index_has_no_gradient(device, hard):
    logits = torch.randn(3, 4, device=device, requires_grad=True)
    y, index = gumbel_ext.gumbel_softmax(logits, 0.5, hard, return_index=True)
    assert y.requires_grad
    assert not index.requires_grad
    assert not gumbel_ext.gumbel_argmax(logits).requires_grad
    assert not gumbel_ext.gumbel_noise(3, device=device).requires_grad


def test_no_graph_without_a_need(device, hard):
    logits = torch.randn(3, 4, device=device)
    assert not gumbel_ext.gumbel_softmax(logits, 0.5, hard).requires_grad
    with torch.no_grad():
        assert not gumbel_ext.gumbel_softmax(logits.requires_grad_(), 0.5, hard).requires_grad
    with torch.inference_mode():
        assert gumbel_ext.gumbel_softmax(logits, 0.5, hard).shape == (3, 4)


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("learn_tau", [False, True], ids=("tau_number", "tau_tensor"))
@pytest.mark.parametrize("leaf", [False, True], ids=("logits_of_a_network", "leaf"))
def test_saved_memory(device, hard, leaf, learn_tau, dtype):
    """Hard saves O(rows) beyond the logits, soft O(rows) beyond y: no tensor of size N more.

    But for a copy of logits that are a leaf.  Eager keeps y_soft, and the exponential draws and
    more besides.
    """
    rows, classes = 64, 1000
    logits = torch.randn(rows, classes).to(device, dtype).requires_grad_()
    logits = logits if leaf else logits.clone()
    tau = torch.tensor(0.5, dtype=dtype, device=device, requires_grad=True) if learn_tau else 0.5
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = gumbel_ext.gumbel_softmax(logits, tau, hard)
    assert saved, "the hooks see what is saved"
    allowed = logits if hard else y
    saved.pop(allowed.untyped_storage().data_ptr(), None)
    copies = logits.nbytes if hard and leaf else 0
    assert copies <= sum(saved.values()) <= copies + 16 * rows + 64


@pytest.mark.cpu_only(reason="the profiler's record of the CPU allocator")
@pytest.mark.parametrize("dtype", DTYPES)
def test_peak_memory_is_output_and_gradient(hard, dtype, tmp_path):
    """Every allocation of forward and backward, as the profiler saw it."""
    leaf, grad = torch.randn(2, 64, 5000).to(dtype)
    logits = leaf.requires_grad_().clone()
    with torch.profiler.profile(profile_memory=True) as profile:
        y = gumbel_ext.gumbel_softmax(logits, 0.5, hard)
        gradient = torch.autograd.grad(y, logits, grad)[0]
    path = tmp_path / "trace.json"
    profile.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    memory = [e["args"] for e in events if e["name"] == "[memory]" and e["args"]["Device Id"] == -1]
    before = memory[0]["Total Allocated"] - memory[0]["Bytes"]
    peak = max(event["Total Allocated"] for event in memory) - before
    size = gradient.numel() * gradient.element_size()
    assert 2 * size <= peak <= 2.2 * size
