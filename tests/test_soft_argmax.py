"""Expected positions under a softmax, along a dimension and over a map."""

import pytest
import torch
from oracle import DTYPES, DispatchLog, accumulation_eps, eps, layouts, smallest

from gumbel_ext import _reference, soft_argmax, soft_argmax_2d

_ops = torch.ops.gumbel_ext

# Chunks are of 1024 classes.
SHAPES = (((7, 5), -1), ((33, 16), 1), ((3, 2500), -1), ((2, 1024, 3), 1), ((1500, 4, 2), 0))


def feature(name, mode="eager"):
    return pytest.mark.feature(name, ops=("soft_argmax",), modes=(mode,))


def inputs(shape, dtype, device):
    return (3 * torch.randn(shape, dtype=torch.float64)).to(device=device, dtype=dtype)


def bound(logits, beta, extent):
    """Rounding of beta z and of a sum of weights, on positions as far apart as ``extent``."""
    size = logits.detach().double().abs()
    condition = 1 + abs(float(beta)) * float(size.masked_fill(size.isinf(), 0).max())
    return 4 * condition * accumulation_eps(logits.dtype) * extent


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("beta", [0.3, 20.0, -1.5])
def test_expected_index_and_its_gradient(shape, dim, dtype, beta, device):
    logits = inputs(shape, dtype, device).requires_grad_()
    expected_index = soft_argmax(logits, beta, dim)
    exact = logits.detach().cpu().double().requires_grad_()
    reference = _reference.soft_argmax(exact, beta, dim)
    assert expected_index.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    error = (expected_index.detach().cpu().double() - reference.detach()).abs()
    assert error.max() <= bound(logits, beta, shape[dim])

    grad = torch.randn(expected_index.shape, dtype=expected_index.dtype, device=device)
    (gradient,) = torch.autograd.grad(expected_index, logits, grad)
    (expected,) = torch.autograd.grad(reference, exact, grad.cpu().double())
    assert gradient.dtype == dtype
    # Relative to the largest entry of the row; what underflows is lost.
    size = expected.abs().amax(dim, keepdim=True)
    lost = smallest(dtype) * (1 + float(abs(beta) * shape[dim] * grad.abs().max()))
    off = (gradient.cpu().double() - expected).abs() - 2 * eps(dtype) * expected.abs() - lost
    assert (off <= bound(logits, beta, 1) * size).all()


def test_gradient_keeps_its_digits_where_one_class_has_all_the_weight(device):
    logits = torch.tensor([[0.0, 30.0, 1.0, 2.0]], device=device)
    logits = torch.cat([logits, torch.full((1, 3000), -5.0, device=device)], 1).requires_grad_()
    soft_argmax(logits).sum().backward()
    exact = logits.detach().cpu().double().requires_grad_()
    _reference.soft_argmax(exact).sum().backward()
    torch.testing.assert_close(logits.grad.cpu().double(), exact.grad, rtol=1e-5, atol=0)


def test_a_hundred_thousand_classes_cost_no_digits(device):
    """Each row is off by at most a unit in the last place of the largest index."""
    classes = 100_000
    logits = torch.randn(4, classes, device=device)
    logits[1] *= 20
    logits[2] = 0
    reference = _reference.soft_argmax(logits.cpu().double())
    error = (soft_argmax(logits).cpu().double() - reference).abs()
    assert (error <= torch.finfo(torch.float32).eps * classes / 2).all()
    assert soft_argmax(logits)[2] == (classes - 1) / 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_beta(dtype, device):
    logits = inputs((4, 2050, 3), dtype, device)
    logits[1, 5] = -torch.inf
    beta = (torch.rand(4, 1, 3, device=device) + 0.5).requires_grad_()
    grad = torch.randn(4, 3, dtype=torch.float64, device=device)
    expected_index = soft_argmax(logits, beta, 1)
    (gradient,) = torch.autograd.grad(expected_index, beta, grad.to(expected_index.dtype))
    exact = beta.detach().cpu().double().requires_grad_()
    reference = _reference.soft_argmax(logits.cpu().double(), exact, 1)
    (expected,) = torch.autograd.grad(reference, exact, grad.cpu())
    # Terms of both signs meet: relative to positions times logits.
    allowed = 64 * accumulation_eps(dtype) * 2050 * 12 + eps(torch.float32) * expected.abs()
    assert ((gradient.cpu().double() - expected).abs() <= allowed).all()
    assert expected.abs().max() > 100


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_a_negative_beta_is_that_of_negated_logits(shape, dim, dtype, device):
    """To the bit: numbers, tensors, and rows of either sign; values and all gradients."""
    logits = inputs(shape, dtype, device)
    rows = [1 if d == dim % len(shape) else extent for d, extent in enumerate(shape)]
    size = torch.rand(rows, device=device) + 0.5
    sign = torch.where(torch.rand(rows, device=device) < 0.5, -1.0, 1.0)
    grad = torch.randn(logits.select(dim, 0).shape, device=device)
    grad = grad.to(torch.promote_types(dtype, torch.float32))

    def results(x, beta):
        of = [t.detach().requires_grad_() for t in (x, beta) if isinstance(t, torch.Tensor)]
        expected = soft_argmax(of[0], of[1] if len(of) > 1 else beta, dim)
        return expected.detach(), *torch.autograd.grad(expected, of, grad)

    for beta, directed in (
        (-0.7, -1),
        (torch.tensor(-0.7, device=device), -1),
        (size * sign, sign),
    ):
        negated = results((logits * directed).to(dtype), beta * directed)
        expected, *gradients = results(logits, beta)
        assert torch.equal(expected, negated[0])
        for ours, of_negated in zip(gradients, negated[1:], strict=True):
            assert torch.equal(ours, (of_negated * directed).to(ours.dtype))


def test_infinities_of_a_negative_beta(device):
    inf = torch.inf
    rows = [[0, torch.nan, 1], [0, -inf, 1], [inf, inf, inf], [inf, -1, inf], [inf, 0, 0]]
    logits = torch.tensor(rows, device=device, requires_grad=True)
    beta = torch.tensor(-2.0, device=device, requires_grad=True)
    expected = soft_argmax(logits, beta)
    assert expected[:3].isnan().all()
    assert expected[3:].tolist() == [1, 1.5]
    gradients = torch.autograd.grad(expected[3:].sum(), (logits, beta), create_graph=True)
    assert gradients[0][3:].isfinite().all()
    assert (gradients[0][3:, 0] == 0).all()
    rows = logits.detach()[3:].requires_grad_()
    first = torch.autograd.grad(soft_argmax(rows, beta).sum(), (rows, beta), create_graph=True)
    second = torch.autograd.grad(first[0].square().sum() + first[1].square(), (rows, beta))
    assert all(g.isfinite().all() for g in (*first, *second))


def test_derivatives_of_a_negative_beta(device):
    logits = inputs((3, 4), torch.float64, device).requires_grad_()
    beta = torch.tensor([[-1.3], [0.7], [-0.2]], dtype=torch.float64, device=device)
    beta.requires_grad_()
    positions = torch.randn(4, dtype=torch.float64, device=device, requires_grad=True)

    def call(z, b, p):
        return soft_argmax(z, b, positions=p)

    assert torch.autograd.gradcheck(call, (logits, beta, positions), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (logits, beta, positions))
    assert torch.autograd.gradgradcheck(soft_argmax, (logits, beta))
    each = torch.vmap(soft_argmax)(logits, beta)
    torch.testing.assert_close(each, soft_argmax(logits, beta))
    maps = logits.detach().view(3, 2, 2)
    torch.testing.assert_close(soft_argmax_2d(maps, -0.7), soft_argmax_2d(-maps, 0.7))
    torch.testing.assert_close(
        soft_argmax_2d(maps, beta.unsqueeze(-1)), soft_argmax_2d(maps * beta.unsqueeze(-1), 1)
    )


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("logits_dtype", DTYPES)
def test_integer_positions(dtype, logits_dtype, device):
    """As the same numbers in float64; of int64, also those that float32 cannot tell apart."""
    logits = inputs((5, 6), logits_dtype, device).requires_grad_()
    places = torch.randint(0, 100, (6,), device=device)
    if dtype == torch.int64:
        places += 2**40
    places = places.to(dtype)
    beta = torch.tensor(0.7, device=device, requires_grad=True)
    results = []
    for positions in (places, places.double()):
        expected = soft_argmax(logits, beta, positions=positions)
        results.append((expected, *torch.autograd.grad(expected.sum(), (logits, beta))))
    for ours, floating in zip(*results, strict=True):
        assert torch.equal(ours, floating)
    torch._dynamo.reset()
    compiled = torch.compile(soft_argmax, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, positions=places), soft_argmax(logits, positions=places))
    one_by_one = torch.vmap(lambda x: soft_argmax(x, positions=places))(logits)
    assert torch.equal(one_by_one, soft_argmax(logits, positions=places))


def test_positions_in_place_of_indices(device):
    logits = inputs((5, 6), torch.float32, device)
    positions = 1e6 + torch.rand(6, dtype=torch.float64, device=device)
    positions.requires_grad_()
    expected = _reference.soft_argmax(logits.cpu().double(), positions=positions.cpu())
    detached = soft_argmax(logits, positions=positions.detach())
    # Not to the float32 that 1e6 + x rounds to, but to that of the result.
    torch.testing.assert_close(detached.cpu(), expected.float(), rtol=0, atol=0.0625)
    torch.testing.assert_close(soft_argmax(logits, positions=positions), detached)
    logits = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z, p: soft_argmax(z, 0.7, positions=p - 1e6), (logits, positions)
    )


@pytest.mark.parametrize("coordinates", [1, 2, 3])
def test_gradient_in_every_number_of_coordinates(coordinates, device):
    logits = inputs((4, 37), torch.float64, device).requires_grad_()
    beta = torch.tensor(0.7, dtype=torch.float64, device=device, requires_grad=True)
    positions = torch.randn(coordinates, 37, dtype=torch.float64, device=device)
    expected = torch.softmax(beta * logits, -1) @ positions.T
    actual = _ops.soft_argmax(logits, 1.0, beta, -1, positions)[0]
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected)
    for ours, plain in zip(
        torch.autograd.grad(actual, (logits, beta), grad),
        torch.autograd.grad(expected, (logits, beta), grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain)


def test_keepdim_scalars_and_empty_batches(device):
    logits = inputs((2, 3, 4), torch.float32, device)
    assert torch.equal(
        soft_argmax(logits, dim=1, keepdim=True).squeeze(1), soft_argmax(logits, dim=1)
    )
    scalar = torch.tensor(2.0, device=device, requires_grad=True)
    soft_argmax(scalar).backward()
    assert soft_argmax(scalar, keepdim=True).item() == 0
    assert scalar.grad == 0
    assert soft_argmax(logits[:0]).shape == (0, 3)
    empty = logits[:0].clone().requires_grad_()
    soft_argmax(empty).sum().backward()
    assert empty.grad.shape == (0, 3, 4)


def test_rows_that_have_no_softmax(device):
    inf = torch.inf
    rows = [[0, torch.nan, 1], [0, inf, 1], [-inf, -inf, -inf], [-inf, 1, -inf]]
    for classes in (3, 2500):
        logits = torch.zeros(4, classes, device=device)
        logits[3] = -inf
        logits[2] = -inf
        logits[:, -3:] = torch.tensor(rows, device=device)
        expected = soft_argmax(logits)
        assert expected[:3].isnan().all()
        assert expected[3] == classes - 2


@pytest.mark.cpu_only(reason="about the CPU's threads and layouts")
def test_same_bits_in_every_layout_and_at_every_number_of_threads(thread_count):
    for shape, dim in (((3, 70000), -1), ((4, 600, 20), 1)):
        logits = inputs(shape, torch.float32, "cpu")
        grad = torch.randn_like(logits.select(dim, 0))
        results = []
        for threads in (1, 2):
            thread_count(threads)
            for _, laid in layouts(logits):
                laid = laid.detach().requires_grad_()
                expected = soft_argmax(laid, 0.7, dim)
                results.append((expected, *torch.autograd.grad(expected, laid, grad)))
        for result in results[1:]:
            assert torch.equal(result[0], results[0][0])
            assert torch.equal(result[1], results[0][1])


def test_backward_recomputes_the_softmax(device):
    logits = torch.randn(4, 9, device=device, requires_grad=True)
    with DispatchLog() as log:
        soft_argmax(logits).sum().backward()
    assert log.names == ["soft_argmax", "soft_argmax_backward"]


# ---- maps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalized", [False, True])
def test_coordinates_of_a_map(dtype, normalized, device):
    maps = inputs((2, 3, 37, 45), dtype, device).requires_grad_()
    beta = (torch.rand(3, 1, 1, device=device) + 0.5).to(torch.promote_types(dtype, torch.float32))
    beta.requires_grad_()
    found = soft_argmax_2d(maps, beta, normalized=normalized)
    assert found.shape == (2, 3, 2)
    grad = torch.randn(found.shape, dtype=found.dtype, device=device)
    gradients = torch.autograd.grad(found, (maps, beta), grad)

    exact = maps.detach().cpu().double().requires_grad_()
    exact_beta = beta.detach().cpu().double().requires_grad_()
    x, y = torch.arange(45.0).double(), torch.arange(37.0).double()
    if normalized:
        x, y = 2 * x / 44 - 1, 2 * y / 36 - 1
    columns, rows = x.expand(37, 45).flatten(), y.unsqueeze(1).expand(37, 45).flatten()
    reference = torch.stack(
        [
            _reference.soft_argmax(exact.flatten(-2), exact_beta.squeeze(-1), positions=places)
            for places in (columns, rows)
        ],
        -1,
    )
    extent = 2 if normalized else 45
    error = (found.detach().cpu().double() - reference).abs().max()
    assert error <= bound(maps, 1.5, extent)
    expected = torch.autograd.grad(reference, (exact, exact_beta), grad.cpu().double())
    off = (gradients[0].cpu().double() - expected[0]).abs()
    allowed = bound(maps, 1.5, 1) + 2 * eps(dtype)
    lost = smallest(dtype) * (1 + float(1.5 * extent * grad.abs().max()))
    assert (off - lost <= allowed * expected[0].abs().amax((-1, -2), keepdim=True)).all()
    assert (gradients[1].cpu() - expected[1]).abs().max() <= bound(maps, 1.5, extent) * 24


def test_order_and_ends_of_coordinates(device):
    maps = torch.zeros(5, 7, device=device)
    maps[1, 6] = 90.0
    assert soft_argmax_2d(maps, normalized=False).tolist() == [6, 1]
    assert soft_argmax_2d(maps).tolist() == [1, -0.5]
    assert soft_argmax_2d(torch.zeros(2, 1, 1, device=device)).tolist() == [[0, 0], [0, 0]]


# ---- derivatives and transforms ------------------------------------------------------------------


@feature("gradcheck, gradgradcheck")
@feature("forward-mode AD, dual tensors")
@feature("torch.func hessian")
def test_derivatives_of_higher_order(device):
    logits = inputs((3, 6), torch.float64, device).requires_grad_()
    beta = torch.tensor([[0.5], [0.9], [1.4]], dtype=torch.float64, device=device)
    beta.requires_grad_()
    function = soft_argmax
    assert torch.autograd.gradcheck(function, (logits, beta), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (logits, beta), check_fwd_over_rev=True)
    hessian = torch.func.hessian(lambda z: soft_argmax(z, 0.7).square().sum())(logits.detach())
    expected = torch.autograd.functional.hessian(
        lambda z: _reference.soft_argmax(z, 0.7).square().sum(), logits.detach()
    )
    torch.testing.assert_close(hessian, expected)


@feature("vmap of grad, per-sample gradients")
@feature("batched gradients (is_grads_batched)")
def test_vmap_is_a_loop(device):
    logits, betas = torch.randn(4, 5, 7, device=device), torch.rand(4, device=device) + 0.5
    positions = torch.randn(4, 7, device=device)

    def loss(z, b, x):
        return soft_argmax(z, b, 1).square().sum() + soft_argmax(z, positions=x).sum()

    for function in (loss, torch.func.grad(loss)):
        arguments = (logits, betas, positions)
        together = torch.vmap(function)(*arguments)
        one_by_one = [function(*example) for example in zip(*arguments, strict=True)]
        torch.testing.assert_close(together, torch.stack(one_by_one))
    scalars = torch.vmap(soft_argmax)(logits[0, 0])
    assert scalars.tolist() == [0] * 7

    # A backward that is itself vmapped.
    logits.requires_grad_()
    expected = soft_argmax(logits, betas.view(4, 1, 1), 1)
    grads = torch.randn(3, 4, 7, device=device)
    (many,) = torch.autograd.grad(expected, logits, grads, retain_graph=True, is_grads_batched=True)
    for grad, of_it in zip(grads, many, strict=True):
        torch.testing.assert_close(
            torch.autograd.grad(expected, logits, grad, retain_graph=True)[0], of_it
        )


def test_vmap_of_the_backward_op(device):
    logits, betas = torch.randn(4, 5, 7, device=device), torch.rand(4, 5, 1, device=device) + 0.5
    positions = torch.randn(2, 7, device=device)
    states = torch.stack(
        [_ops.soft_argmax(z, 1.0, b, 1, positions)[1] for z, b in zip(logits, betas, strict=True)]
    )
    grads = torch.randn(4, 5, 2, device=device)

    def backward(g, z, state, b):
        return _ops.soft_argmax_backward(g, z, state, 1.0, b, 1, positions, True)

    together = torch.vmap(backward)(grads, logits, states, betas)
    for i, example in enumerate(zip(grads, logits, states, betas, strict=True)):
        for batch, alone in zip(together, backward(*example), strict=True):
            torch.testing.assert_close(batch[i], alone)


@feature("torch.compile(fullgraph=True), forward and backward", "compiled")
def test_compiled(device):
    compiled = torch.compile(soft_argmax_2d, fullgraph=True, backend="aot_eager")
    maps = torch.randn(2, 5, 6, device=device, requires_grad=True)
    found = compiled(maps, 1.5)
    grad = torch.randn_like(found)
    assert torch.equal(found, soft_argmax_2d(maps, 1.5))
    (gradient,) = torch.autograd.grad(found, maps, grad)
    assert torch.equal(gradient, torch.autograd.grad(soft_argmax_2d(maps, 1.5), maps, grad)[0])


@feature("torch.library.opcheck")
def test_opcheck(device):
    logits = torch.randn(3, 5, 4, device=device, requires_grad=True)
    beta = torch.rand(3, 1, 4, device=device).add(0.5).requires_grad_()
    positions = torch.randn(2, 5, device=device)
    torch.library.opcheck(_ops.soft_argmax.default, (logits, 1.0, beta, 1, positions))
    expected, state = _ops.soft_argmax(logits.detach(), 1.0, beta.detach(), 1, positions)
    torch.library.opcheck(
        _ops.soft_argmax_backward.default,
        (torch.randn_like(expected), logits, state, 1.0, beta, 1, positions, True),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_form_for_devices_without_a_kernel(dtype, device):
    """The one in PyTorch's operators; here on any device."""
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    logits = inputs((5, 300, 4), dtype, device)
    logits[1, 7, 2] = -torch.inf
    positions = torch.randn(2, 300, device=device)
    beta = torch.rand(5, 1, 4, device=device) + 0.5
    args = (1.0, beta, 1, positions)
    expected, state = _ops.soft_argmax.default(logits, *args)
    other = _ops.soft_argmax.default._op_dk(key, logits, *args)
    torch.testing.assert_close(other[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other[1], state, rtol=1e-4, atol=1e-5)
    rest = (torch.randn_like(expected), logits, state, *args, True)
    gradients = _ops.soft_argmax_backward.default(*rest)
    others = _ops.soft_argmax_backward.default._op_dk(key, *rest)
    assert others[0].dtype == dtype
    torch.testing.assert_close(others[0], gradients[0], rtol=4 * eps(dtype), atol=1e-6)
    torch.testing.assert_close(others[1], gradients[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"beta": 0.0}, ValueError, "beta must be finite and not 0, got 0"),
        ({"beta": -torch.inf}, ValueError, "beta must be finite and not 0, got -inf"),
        ({"beta": torch.tensor([0.0])}, ValueError, "beta must be finite and not 0, got 0"),
        ({"beta": torch.tensor([torch.nan])}, ValueError, "beta must be finite and not 0, got nan"),
        ({"beta": "1"}, TypeError, "beta must be a number or a tensor, got '1'"),
        ({"dim": 2}, IndexError, "dim must be between -2 and 1"),
        ({"positions": torch.ones(2)}, ValueError, r"positions must be of shape \[3\], got \[2\]"),
        (
            {"positions": torch.ones(3).bool()},
            TypeError,
            "positions must have an integer or floating-point dtype, got Bool",
        ),
        ({"positions": [0.0, 1.0, 2.0]}, TypeError, "positions must be a tensor, got list"),
    ],
)
def test_errors_name_the_argument_and_its_value(arguments, error, words):
    with pytest.raises(error, match=f"soft_argmax: {words}"):
        soft_argmax(torch.randn(2, 3), **arguments)


def test_errors_of_shapes_and_types():
    with pytest.raises(ValueError, match="soft_argmax: logits must have at least one class"):
        soft_argmax(torch.randn(2, 0))
    with pytest.raises(TypeError, match="soft_argmax: logits must have dtype float16"):
        soft_argmax(torch.arange(3))
    with pytest.raises(ValueError, match="soft_argmax_2d: maps must have at least two dimensions"):
        soft_argmax_2d(torch.randn(4))
    with pytest.raises(ValueError, match="soft_argmax_2d: maps must have pixels, got shape"):
        soft_argmax_2d(torch.randn(4, 0, 3))
    with pytest.raises(ValueError, match=r"soft_argmax_2d: beta must broadcast to \[..., 1, 1\]"):
        soft_argmax_2d(torch.randn(2, 4, 3), torch.ones(2))
