"""One-hot vectors of the largest logit, with the gradient of a softmax."""

import pytest
import torch
from oracle import (
    DTYPES,
    DispatchLog,
    assert_one_hot,
    assert_row_errors,
    assert_tau_gradient_close,
    layouts,
)

import gumbel_ext
from gumbel_ext import _reference, straight_through_softmax

_ops = torch.ops.gumbel_ext

# Short, long, interleaved, many columns, dims that are not the last; several chunks.
SHAPES = (
    ((7, 5), -1),
    ((33, 16), 1),
    ((6, 300), -1),
    ((3, 2500), -1),
    ((2, 40, 3), 1),
    ((2, 9, 50), 1),
    ((1500, 4, 2), 0),
)


def feature(name, mode="eager"):
    return pytest.mark.feature(name, ops=("straight_through_softmax",), modes=(mode,))


def inputs(shape, dtype, device):
    return (
        (3 * torch.randn(shape, dtype=torch.float64)).to(device=device, dtype=dtype),
        torch.randn(shape, dtype=torch.float64).to(device=device, dtype=dtype),
    )


def expected_gradients(logits, grad, tau, dim, mask=None):
    """Of logits and tau, in float64."""
    exact = logits.detach().cpu().double().requires_grad_()
    if isinstance(tau, torch.Tensor):
        tau = tau.detach().cpu().double().requires_grad_()
    mask = None if mask is None else mask.cpu()
    y, _ = _reference.straight_through_softmax(exact, tau, dim, mask=mask)
    wanted = [exact, tau] if isinstance(tau, torch.Tensor) else [exact]
    return torch.autograd.grad((y * grad.cpu().double()).sum(), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_value_is_the_one_hot_vector_of_the_argmax(shape, dim, dtype, device):
    logits, _ = inputs(shape, dtype, device)
    y, index = straight_through_softmax(logits, 0.3, dim, return_index=True)
    # Of float16 and bfloat16 logits several may be the largest: the first.
    assert torch.equal(index, logits.argmax(dim))
    assert y.dtype == dtype
    assert_one_hot(y, index, dim)
    assert torch.equal(y, straight_through_softmax(logits, 7.0, dim))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("tau", [0.02, 1.3])
def test_gradient_is_that_of_the_softmax(shape, dim, dtype, tau, device):
    logits, grad = inputs(shape, dtype, device)
    logits.requires_grad_()
    straight_through_softmax(logits, tau, dim).backward(grad)
    (expected,) = expected_gradients(logits, grad, tau, dim)
    zeros = torch.zeros(shape, dtype=torch.float64)
    assert_row_errors(logits.grad, expected, logits, grad, tau, zeros, dim)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_with_mask_and_of_the_temperature(dtype, device):
    logits, grad = inputs((5, 8, 40), dtype, device)
    logits.requires_grad_()
    mask = torch.rand(8, 40, device=device) < 0.5
    mask[2] = False
    tau = (torch.rand(5, 1, 1, device=device) + 0.3).to(torch.promote_types(dtype, torch.float32))
    tau.requires_grad_()
    y, index = straight_through_softmax(logits, tau, mask=mask, return_index=True)
    assert torch.equal(index == -1, (~mask).all(-1).expand(5, 8))
    assert not (y.bool() & ~mask).any()
    y.backward(grad)
    expected, expected_tau = expected_gradients(logits, grad, tau, -1, mask)
    zeros = torch.zeros(logits.shape, dtype=torch.float64)
    assert_row_errors(logits.grad, expected, logits, grad, tau, zeros, mask=mask)
    assert (logits.grad[:, 2] == 0).all()
    assert_tau_gradient_close(tau.grad, expected_tau, expected, logits, grad, tau, zeros, mask=mask)


def test_rows_without_an_ordinary_winner(device):
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [[0, nan, nan], [inf, 1, inf], [-inf, -inf, -inf], [-inf, 2, -inf]], device=device
    )
    y, index = straight_through_softmax(logits, return_index=True)
    assert index.tolist() == [1, 0, 0, 1]
    assert y[0].isnan().all()
    assert y[1].tolist() == [1, 0, 0]
    assert y[2].isnan().all()
    assert y[3].tolist() == [0, 1, 0]
    mask = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 1, 1], [1, 0, 0]], device=device).bool()
    y, index = straight_through_softmax(logits, mask=mask, return_index=True)
    assert index.tolist() == [0, 2, 1, 0]
    assert y[0].tolist() == [1, 0, 0]
    assert y[2].isnan().all()
    assert y[3].isnan().all()
    scalar = torch.tensor(0.3, device=device, requires_grad=True)
    straight_through_softmax(scalar).backward()
    assert scalar.grad == 0
    y, index = straight_through_softmax(torch.ones(2, 0, device=device), return_index=True)
    assert y.shape == (2, 0)
    assert index.tolist() == [-1, -1]


@pytest.mark.cpu_only(reason="about the CPU's threads and layouts")
def test_same_bits_in_every_layout_and_at_every_number_of_threads(thread_count):
    for shape, dim in (((3, 70000), -1), ((4, 600, 20), 1), ((4, 30, 3), 1)):
        logits, grad = inputs(shape, torch.float32, "cpu")
        thread_count(1)
        state = (logits, 0.7, None, dim, None)
        y, index = _ops.straight_through_softmax(*state, True)
        backward = _ops.straight_through_softmax_backward
        expected, _ = backward(grad, logits, index, 0.7, None, dim, None, False)
        thread_count(2)
        for _, laid in layouts(logits):
            again, again_index = _ops.straight_through_softmax(laid, 0.7, None, dim, None, True)
            assert torch.equal(again, y)
            assert torch.equal(again_index, index)
            gradient, _ = backward(grad, laid, index, 0.7, None, dim, None, False)
            assert torch.equal(gradient, expected)


def test_backward_stores_nothing_of_the_size_of_the_softmax(device):
    logits = torch.randn(4, 9, device=device, requires_grad=True)
    with DispatchLog() as log:
        straight_through_softmax(logits).sum().backward()
    assert log.names == ["straight_through_softmax", "straight_through_softmax_backward"]


def weighted(function, grad):
    return lambda logits, tau: (function(logits, tau) * grad).sum()


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("autograd", marks=feature("autograd.functional hessian")),
        pytest.param("func", marks=feature("torch.func forward over reverse")),
    ],
)
def test_derivatives_of_higher_order_are_those_of_the_reference(mode, device):
    logits, grad = inputs((3, 6), torch.float64, device)
    tau = torch.tensor([[0.5], [0.9], [1.4]], dtype=torch.float64, device=device)
    ours = weighted(straight_through_softmax, grad)
    plain = weighted(lambda z, t: _reference.straight_through_softmax(z, t)[0], grad)
    if mode == "func":
        hessian = torch.func.jacfwd(torch.func.jacrev(ours, argnums=(0, 1)), argnums=(0, 1))
    else:

        def hessian(*args):
            return torch.autograd.functional.hessian(ours, args)

    expected = torch.autograd.functional.hessian(plain, (logits, tau))
    for row, expected_row in zip(hessian(logits, tau), expected, strict=True):
        for block, expected_block in zip(row, expected_row, strict=True):
            assert expected_block.abs().max() > 1e-3
            torch.testing.assert_close(block, expected_block, rtol=1e-9, atol=1e-12)


@feature("torch.func jvp")
def test_forward_mode(device):
    logits, direction = inputs((3, 6), torch.float64, device)
    ours = torch.func.jvp(lambda z: straight_through_softmax(z, 0.6), (logits,), (direction,))
    plain = torch.func.jvp(lambda z: torch.softmax(z / 0.6, -1), (logits,), (direction,))
    assert torch.equal(ours[0], straight_through_softmax(logits))
    torch.testing.assert_close(ours[1], plain[1])


@feature("vmap of grad, per-sample gradients")
def test_vmap_is_a_loop(device):
    logits, grad = inputs((4, 5, 7), torch.float32, device)
    taus = torch.rand(4, device=device) + 0.5
    mask = torch.rand(4, 7, device=device) < 0.7

    def loss(z, t, m, g):
        return (straight_through_softmax(z, t, 0, mask=m.unsqueeze(0).expand(5, 7)) * g).sum()

    arguments = (logits, taus, mask, grad)
    for function in (loss, torch.func.grad(loss)):
        together = torch.vmap(function)(*arguments)
        one_by_one = torch.stack([function(*example) for example in zip(*arguments, strict=True)])
        torch.testing.assert_close(together, one_by_one)
    scalars = torch.vmap(lambda z: straight_through_softmax(z, return_index=True))(logits[0, 0])
    assert scalars[0].tolist() == [1] * 7
    assert scalars[1].tolist() == [0] * 7


def test_vmap_of_the_backward_op(device):
    logits, grads = inputs((4, 5, 7), torch.float32, device)
    taus = torch.rand(4, 5, 1, device=device) + 0.5
    masks = torch.rand(4, 5, 7, device=device) < 0.7
    indices = straight_through_softmax(logits, mask=masks, return_index=True)[1]

    def backward(g, z, index, t, m):
        return _ops.straight_through_softmax_backward(g, z, index, 1.0, t, 1, m, True)

    arguments = (grads, logits, indices, taus, masks)
    together = torch.vmap(backward)(*arguments)
    for i, example in enumerate(zip(*arguments, strict=True)):
        for batch, alone in zip(together, backward(*example), strict=True):
            torch.testing.assert_close(batch[i], alone)


@feature("torch.compile(fullgraph=True), forward and backward", "compiled")
@feature("no recompilation for a new temperature", "compiled")
def test_compiled_once_for_every_temperature(device):
    compiles = 0

    def count(graph, _):
        nonlocal compiles
        compiles += 1
        return graph

    compiled = torch.compile(straight_through_softmax, fullgraph=True, backend=count)
    logits = torch.randn(4, 9, device=device)
    for tau in (1.0, 0.7, 0.4):
        assert torch.equal(compiled(logits, tau), straight_through_softmax(logits))
    # A number in the first call may be specialised, and is an input from the second on.
    assert compiles <= 2

    compiled = torch.compile(straight_through_softmax, fullgraph=True, backend="aot_eager")
    logits.requires_grad_()
    grad = torch.randn_like(logits)
    (gradient,) = torch.autograd.grad(compiled(logits, 0.7), logits, grad)
    (expected,) = torch.autograd.grad(straight_through_softmax(logits, 0.7), logits, grad)
    assert torch.equal(gradient, expected)


@feature("torch.library.opcheck")
def test_opcheck(device):
    logits = torch.randn(3, 5, device=device, requires_grad=True)
    tau = torch.rand(3, 1, device=device).add(0.5).requires_grad_()
    mask = torch.rand(5, device=device) < 0.7
    torch.library.opcheck(_ops.straight_through_softmax.default, (logits, 1.0, tau, 1, mask, True))
    index = straight_through_softmax(logits, mask=mask, return_index=True)[1]
    torch.library.opcheck(
        _ops.straight_through_softmax_backward.default,
        (torch.randn(3, 5, device=device), logits, index, 1.0, tau, 1, mask, True),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_form_for_devices_without_a_kernel(dtype, device):
    """The one in PyTorch's operators; here on any device."""
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    forward = _ops.straight_through_softmax.default
    backward = _ops.straight_through_softmax_backward.default
    logits, grad = inputs((5, 8, 40), dtype, device)
    logits[0, 0, 3] = torch.nan
    logits[1, 1] = -torch.inf
    logits[2, 2, 5] = torch.inf
    mask = torch.rand(8, 40, device=device) < 0.5
    mask[3] = False
    tau = torch.rand(5, 1, 40, device=device) + 0.5
    for args in ((1, None), (1, mask), (2, mask)):
        t = tau if args[0] == 1 else None
        y, index = forward._op_dk(key, logits, 0.8, t, *args, True)
        exact_y, exact_index = forward(logits, 0.8, t, *args, True)
        torch.testing.assert_close(y, exact_y, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(index, exact_index)
        rest = (grad, logits, index, 0.8, t, *args, True)
        for ours, other in zip(backward(*rest), backward._op_dk(key, *rest), strict=True):
            assert ours.dtype == other.dtype
            torch.testing.assert_close(ours, other, equal_nan=True)
    assert forward._op_dk(key, logits[:0], 1.0, None, 1, None, True)[1].shape == (0, 40)


def test_autocast_leaves_the_dtype_on_the_cpu():
    with torch.autocast("cpu", torch.bfloat16):
        assert straight_through_softmax(torch.randn(2, 3)).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"tau": 0.0}, ValueError, "tau must be positive and finite, got 0"),
        ({"tau": torch.tensor([-1.0])}, ValueError, "tau must be positive and finite, got -1"),
        ({"tau": "1"}, TypeError, "tau must be a number or a tensor, got '1'"),
        ({"dim": 2}, IndexError, "dim must be between -2 and 1"),
        ({"mask": torch.ones(3)}, TypeError, "mask must have dtype bool"),
        ({"mask": torch.ones(4, 3).bool()}, ValueError, "mask must broadcast"),
    ],
)
def test_errors_name_the_argument_and_its_value(arguments, error, words):
    with pytest.raises(error, match=f"straight_through_softmax: {words}"):
        straight_through_softmax(torch.randn(2, 3), **arguments)
    with pytest.raises(TypeError, match="straight_through_softmax: logits must be a tensor, got"):
        straight_through_softmax([1.0, 2.0])
    assert "straight_through_softmax" in gumbel_ext.__all__
