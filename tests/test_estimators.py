"""Hard samples with gradients of other estimators: Gumbel-Rao, ZGR, ReinMax, gapped."""

import functools
from dataclasses import dataclass, field

import pytest
import torch
from oracle import (
    DTYPES,
    DispatchLog,
    assert_one_hot,
    condition,
    eps,
    layouts,
    relative_bound,
    rng_state,
    row_error,
    smallest,
)

import gumbel_ext
from gumbel_ext import _reference

_ops = torch.ops.gumbel_ext

SHAPES = (
    ((7, 5), -1),
    ((33, 16), 1),
    ((70, 2), -1),
    ((6, 300), -1),
    ((2, 1300), -1),
    ((2, 40, 3), 1),
    ((150, 4, 2), 0),
)


@dataclass(frozen=True)
class Estimator:
    """A function, the op of its gradient, and its reference given the index."""

    name: str
    numbers: dict = field(default_factory=dict)
    tempered: bool = True

    def sample(self, logits, tau=1.0, dim=-1, **rest):
        numbers = {**self.numbers, **({"tau": tau} if self.tempered else {})}
        return getattr(gumbel_ext, self.name)(logits, dim=dim, **numbers, **rest)

    def reference(self, logits, index, tau=1.0, dim=-1, mask=None):
        args = {**self.numbers, **({"tau": tau} if self.tempered else {})}
        if self.name == "gumbel_rao":
            args["rng_state"] = rng_state()
        return getattr(_reference, self.name)(logits, index, dim=dim, mask=mask, **args)

    def __str__(self):
        return "-".join([self.name, *map(str, self.numbers.values())])


ESTIMATORS = (
    Estimator("gumbel_rao", {"k": 3}),
    Estimator("zgr", tempered=False),
    Estimator("reinmax"),
    Estimator("gapped_straight_through", {"gap": 1.0}),
    Estimator("gapped_straight_through", {"gap": None}),
)
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)


def inputs(shape, dtype, device, spread=2.0):
    return (
        (spread * torch.randn(shape, dtype=torch.float64)).to(device=device, dtype=dtype),
        torch.randn(shape, dtype=torch.float64).to(device=device, dtype=dtype),
    )


def feature(name, mode="eager"):
    names = ("gumbel_rao", "zgr", "reinmax", "gapped_straight_through")
    return pytest.mark.feature(name, ops=names, modes=(mode,))


def expected_gradient(estimator, logits, index, grad, tau, dim, mask=None):
    exact = logits.detach().cpu().double().requires_grad_()
    tau = tau.cpu().double() if isinstance(tau, torch.Tensor) else tau
    mask = None if mask is None else mask.cpu()
    y = estimator.reference(exact, index.cpu(), tau, dim, mask)
    return torch.autograd.grad((y * grad.cpu().double()).sum(), exact)[0]


def assert_close(actual, expected, logits, grad, tau, dim):
    """99.9 % of rows within the target for gradients; noise of a draw is hardly ever above 15.

    The float64 reference does not shift the gradient, so that terms of the size of the gradient
    cancel in it: that rounding is no error of the kernels. Nor is underflow.
    """
    assert actual.dtype == logits.dtype
    assert actual.shape == logits.shape
    size = grad.detach().cpu().double().abs().amax(dim, keepdim=True)
    coldest = torch.as_tensor(tau, dtype=torch.float64).cpu().clamp(max=1)
    floor = (16 * eps(torch.float64) * size + 4 * smallest(logits.dtype) * (1 + size)) / coldest
    bound = relative_bound(
        logits.dtype, condition(logits, torch.full(logits.shape, 15.0).double(), tau, dim)
    )
    excess = (row_error(actual, expected, dim, floor) / bound).flatten()
    assert not excess.isnan().any()
    assert excess.quantile(0.999) <= 1, f"{excess.quantile(0.999):.3g} times the target"


def check_gradient(estimator, logits, grad, tau, dim, mask=None):
    logits = logits.detach().requires_grad_()
    y, index = estimator.sample(
        logits, tau, dim, mask=mask, return_index=True, rng_state=rng_state()
    )
    y.backward(grad)
    expected = expected_gradient(estimator, logits, index, grad, tau, dim, mask)
    assert_close(logits.grad, expected, logits, grad, tau if estimator.tempered else 1.0, dim)


@every_estimator
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_gradient_is_that_of_the_reference(estimator, shape, dim, dtype, device):
    check_gradient(estimator, *inputs(shape, dtype, device), 0.7, dim)


@every_estimator
@pytest.mark.parametrize("tau", [0.05, 0.5, 1.0, 30.0])
def test_gradient_at_the_ends_of_temperature(estimator, tau, device):
    check_gradient(estimator, *inputs((40, 17), torch.float32, device), tau, -1)


@every_estimator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gradient_of_rows_with_hardly_possible_classes(estimator, dtype, device):
    """Probabilities far below the smallest number, at a temperature where they count."""
    check_gradient(estimator, *inputs((30, 12), dtype, device, spread=60.0), 25.0, -1)


@every_estimator
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_with_mask_and_temperatures_of_rows(estimator, dtype, device):
    logits, grad = inputs((5, 8, 40), dtype, device)
    mask = torch.rand(8, 40, device=device) < 0.4
    mask[2] = False
    mask[3] = False
    mask[3, 7] = True
    tau = torch.rand(5, 1, 1, device=device) + 0.2
    check_gradient(estimator, logits, grad, tau, -1, mask)
    transposed = [t.mT for t in (logits, grad, mask)]
    check_gradient(estimator, *transposed[:2], tau, 1, transposed[2])
    logits = logits.clone().requires_grad_()
    y, index = estimator.sample(logits, tau, mask=mask, return_index=True)
    y.backward(grad)
    assert (index[:, 2] == -1).all()
    assert not logits.grad[:, 2].any()
    assert not logits.grad[:, 3].any()
    assert not logits.grad.masked_select(~mask).any()


@every_estimator
@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_is_the_hard_gumbel_softmax(estimator, dtype, device):
    logits, _ = inputs((6, 40, 3), dtype, device)
    y, index = estimator.sample(logits, 0.3, 1, return_index=True, rng_state=rng_state())
    expected, expected_index = gumbel_ext.gumbel_softmax(
        logits, hard=True, dim=1, return_index=True, rng_state=rng_state()
    )
    assert torch.equal(y, expected)
    assert torch.equal(index, expected_index)
    assert_one_hot(y, index, 1)
    torch.manual_seed(3)
    drawn = estimator.sample(logits, dim=1)
    torch.manual_seed(3)
    assert torch.equal(drawn, gumbel_ext.gumbel_softmax(logits, hard=True, dim=1))
    assert not torch.equal(drawn, estimator.sample(logits, dim=1))


@every_estimator
def test_every_layout_gives_the_same_bits(estimator, device):
    logits, grad = inputs((4, 9, 6), torch.float32, device)
    mask = torch.rand(4, 9, 6, device=device) < 0.8

    def gradient(logits, grad, mask, dim):
        logits = logits.detach().requires_grad_()
        y = estimator.sample(logits, 0.5, dim, mask=mask, rng_state=rng_state())
        return torch.autograd.grad(y, logits, grad)[0]

    for dim in (-1, 1):
        expected = gradient(logits, grad, mask, dim)
        for (name, laid), (_, laid_grad), (_, laid_mask) in zip(
            layouts(logits), layouts(grad), layouts(mask), strict=True
        ):
            assert torch.equal(gradient(laid, laid_grad, laid_mask, dim), expected), name
        one = gradient(logits[:, :1].expand(4, 9, 6).contiguous(), grad, mask, dim)
        same = gradient(logits[:, :1].expand(4, 9, 6), grad[:1].expand(4, 9, 6), mask, dim)
        assert same.shape == one.shape
        again = gradient(
            logits[:, :1].expand(4, 9, 6).contiguous(), grad[:1].repeat(4, 1, 1), mask, dim
        )
        assert torch.equal(same, again)


@every_estimator
def test_rows_that_are_not_ordinary(estimator, device):
    inf, nan = torch.inf, torch.nan
    rows = torch.tensor(
        [[0, nan, 1], [-inf, -inf, -inf], [0, inf, 1], [0, -inf, 1.0]],
        device=device,
        requires_grad=True,
    )
    y = estimator.sample(rows, rng_state=rng_state())
    expected = gumbel_ext.gumbel_softmax(rows, hard=True, rng_state=rng_state())
    weight = torch.tensor([1.0, 2.0, 4.0], device=device)
    theirs = torch.autograd.grad((expected * weight).sum(), rows)[0]
    ours = torch.autograd.grad((y * weight).sum(), rows)[0]
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert ours[3, 1] == 0
    assert ours[3].any()


@every_estimator
def test_impossible_classes_and_indices(estimator, device):
    """A gradient that arrives at a class without probability is not looked at; an index past the
    classes makes the row NaN."""
    logits, grad = inputs((6, 21), torch.float32, device)
    logits[:, 4] = -torch.inf
    mask = torch.arange(21, device=device) != 9
    leaf = logits.clone().requires_grad_()
    y, index = estimator.sample(leaf, mask=mask, return_index=True, rng_state=rng_state())
    (expected,) = torch.autograd.grad(y, leaf, grad, retain_graph=True)
    for bad in (torch.nan, torch.inf):
        spoilt = grad.clone()
        spoilt[:, [4, 9]] = bad
        (found,) = torch.autograd.grad(y, leaf, spoilt, retain_graph=True)
        assert torch.equal(found, expected)
    assert not expected[:, [4, 9]].any()

    index[2] = 21
    backward = getattr(_ops, f"{estimator.name}_backward")
    rest = {
        "gumbel_rao": (1.0, None, 3, -1, mask, rng_state()),
        "zgr": (-1, mask),
        "reinmax": (1.0, None, -1, mask),
        "gapped_straight_through": (1.0, None, estimator.numbers.get("gap"), -1, mask),
    }[estimator.name]
    found = backward(grad, logits, index, *rest)
    assert found[2].isnan().all()
    others = torch.arange(6) != 2
    assert torch.equal(found[others], expected[others])


@every_estimator
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 0, 2), ()])
def test_empty_and_zero_dimensional(estimator, shape, device):
    logits = torch.randn(shape, device=device, requires_grad=True)
    y, index = estimator.sample(logits, return_index=True)
    assert y.shape == logits.shape
    assert index.shape == logits.shape[:-1]
    y.sum().backward()
    assert logits.grad.shape == logits.shape
    assert not logits.grad.any()


@feature("torch.func grad")
@feature("torch.func jvp")
@every_estimator
def test_derivatives_of_the_gradient(estimator, device):
    """The product is linear in the incoming gradient and symmetric; no other derivative is made."""
    logits, grad = inputs((4, 6), torch.float64, device)
    logits.requires_grad_()
    grad.requires_grad_()
    sample = functools.partial(estimator.sample, tau=0.6, rng_state=rng_state())
    (first,) = torch.autograd.grad(sample(logits), logits, grad, create_graph=True)
    v = torch.randn_like(grad)
    (second,) = torch.autograd.grad(first, grad, v, retain_graph=True)
    (expected,) = torch.autograd.grad(sample(logits), logits, v)
    assert torch.equal(second, expected)
    with pytest.raises(NotImplementedError, match=f"{estimator.name}: .* derivative in logits"):
        torch.autograd.grad(first.sum(), logits)

    _, tangent = torch.func.jvp(sample, (logits.detach(),), (v,))
    assert torch.equal(tangent, expected)
    with pytest.raises(NotImplementedError, match="derivative in logits"):
        torch.func.jvp(
            torch.func.grad(lambda x: (sample(x) * grad.detach()).sum()), (logits.detach(),), (v,)
        )
    nested = torch.func.grad(lambda x: (sample(x) * grad.detach()).sum())(logits.detach())
    assert torch.equal(nested, first.detach())
    with torch.no_grad():
        assert not sample(logits).requires_grad


@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if e.tempered], ids=str)
def test_a_gradient_of_tau_is_refused(estimator, device):
    logits = torch.randn(3, 4, device=device)
    tau = torch.tensor(0.5, device=device, requires_grad=True)
    with pytest.raises(ValueError, match=f"{estimator.name}: tau must not require a gradient"):
        estimator.sample(logits, tau)
    with torch.no_grad():
        estimator.sample(logits, tau)
    with pytest.raises(ValueError, match="tau must not require a gradient"):
        torch.func.grad(lambda t: estimator.sample(logits, t).sum())(tau.detach())


@feature("torch.library.opcheck")
@every_estimator
def test_opcheck(estimator, device):
    logits, grad = inputs((3, 5), torch.float32, device)
    logits.requires_grad_()
    tau = torch.rand(3, 1, device=device) + 0.5
    mask = torch.tensor([[True, True, False, True, True]], device=device)
    index = torch.tensor([0, 3, -1], device=device)
    numbers = list(estimator.numbers.values())
    tempered = [1.0, tau] if estimator.tempered else []
    sample, product = getattr(_ops, estimator.name), getattr(_ops, f"{estimator.name}_backward")
    state = rng_state(device=device)
    torch.library.opcheck(
        sample.default, (logits, *tempered, *numbers, -1, mask, True, None, state)
    )
    rest = [state] if estimator.name == "gumbel_rao" else []
    torch.library.opcheck(
        product.default,
        (grad.requires_grad_(), logits.detach(), index, *tempered, *numbers, -1, mask, *rest),
    )


@feature("torch.compile(fullgraph=True), forward and backward", "compiled")
@feature("torch.compile(dynamic=True)", "compiled")
@every_estimator
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph(estimator, dynamic, device):
    logits, grad = inputs((6, 11), torch.float32, device)
    logits.requires_grad_()

    def loss(logits, tau, state):
        y, index = estimator.sample(logits, tau, return_index=True, rng_state=state)
        return (y * grad).sum() + 0 * index.sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tau in (0.5, 0.25):
        found = torch.autograd.grad(compiled(logits, tau, rng_state()), logits)[0]
        expected = torch.autograd.grad(loss(logits, tau, rng_state()), logits)[0]
        assert torch.equal(found, expected)

    def two(logits):
        return estimator.sample(logits), estimator.sample(logits)

    a, b = torch.compile(two, fullgraph=True, backend="aot_eager")(
        torch.zeros(400, 11, device=device, requires_grad=True)
    )
    assert not torch.equal(a, b)


@feature("vmap randomness=error")
@feature("vmap randomness=same")
@feature("vmap randomness=different")
@feature("vmap with rng_state")
@feature("vmap over rng_state")
@feature("vmap of grad, per-sample gradients")
@feature("grad of vmap")
@feature("vmap in_dims, out_dims")
@every_estimator
def test_vmap(estimator, device):
    logits, grad = inputs((3, 4, 6), torch.float64, device)

    def gradient(logits, grad, state):
        return torch.func.grad(lambda x: (estimator.sample(x, 0.6, rng_state=state) * grad).sum())(
            logits
        )

    states = torch.stack([rng_state(seed=seed) for seed in (1, 2, 3)])
    for in_dims, args in (
        ((0, 0, None), (logits, grad, rng_state())),
        ((0, 0, 0), (logits, grad, states)),
        ((None, 0, None), (logits[0], grad, rng_state())),
        ((2, 2, None), (logits.movedim(0, 2), grad.movedim(0, 2), rng_state())),
    ):
        found = torch.vmap(gradient, in_dims=in_dims)(*args)
        for i in range(3):
            example = [
                a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)
            ]
            assert torch.allclose(found[i], gradient(*example), rtol=1e-12, atol=1e-14)

    torch.manual_seed(0)
    sample = functools.partial(estimator.sample, tau=0.6)
    zeros = torch.zeros(3, 200, 6, device=device)
    different = torch.vmap(sample, randomness="different")(zeros)
    assert not torch.equal(different[0], different[1])
    same = torch.vmap(sample, randomness="same")(zeros)
    assert torch.equal(same[0], same[1])
    with pytest.raises(RuntimeError, match="randomness error mode"):
        torch.vmap(sample)(zeros)

    # The noise of the gradient is that of the example's sample: the gradient at the sample is of
    # one sign, that of the others of the other, if the incoming one is 1 there alone.
    def consistent(logits):
        y, pull = torch.func.vjp(sample, logits)
        return y, pull(y.detach())[0]

    y, gradient_of_y = torch.vmap(consistent, randomness="different")(zeros.double())
    chosen = y.bool()
    assert (gradient_of_y[chosen] > 0).all()
    assert (gradient_of_y[~chosen] <= 0).all()

    outer = torch.func.grad(lambda x: (torch.vmap(sample, randomness="different")(x) * grad).sum())(
        logits
    )
    assert outer.shape == logits.shape
    assert outer.any()
    assert torch.vmap(gradient, in_dims=(0, 0, None))(logits[:0], grad[:0], rng_state()).shape == (
        0,
        4,
        6,
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f, x: f.gumbel_rao(x, k=0), ValueError, "gumbel_rao: k must be at least 1, got 0"),
        (lambda f, x: f.gumbel_rao(x, k=1.5), TypeError, "gumbel_rao: k must be an int, got 1.5"),
        (lambda f, x: f.gumbel_rao(x, tau=0), ValueError, "gumbel_rao: tau must be positive"),
        (
            lambda f, x: f.gapped_straight_through(x, gap=-1),
            ValueError,
            "gapped_straight_through: gap must be positive and finite, or None, got -1",
        ),
        (
            lambda f, x: f.gapped_straight_through(x, gap="p"),
            TypeError,
            "gapped_straight_through: gap must be a number or None, got 'p'",
        ),
        (lambda f, x: f.zgr(x.long()), TypeError, "zgr: logits must have dtype float16"),
        (lambda f, x: f.zgr([1.0]), TypeError, "zgr: logits must be a tensor, got list"),
        (lambda f, x: f.reinmax(x, dim=2), IndexError, "reinmax: dim must be between -2 and 1"),
        (lambda f, x: f.reinmax(x, dim=0.5), TypeError, "reinmax: dim must be an int, got 0.5"),
        (
            lambda f, x: f.reinmax(x, tau=torch.tensor([0.5, -1.0]).unsqueeze(1)),
            ValueError,
            "reinmax: tau must be positive and finite, got -1",
        ),
        (
            lambda f, x: f.zgr(x, mask=torch.ones(5, dtype=torch.bool)),
            ValueError,
            "zgr: mask must broadcast",
        ),
        (
            lambda f, x: f.zgr(x, rng_state=rng_state(), generator=torch.Generator()),
            ValueError,
            "zgr: give either generator or rng_state",
        ),
        (lambda f, x: f.zgr(x.to_sparse()), TypeError, "zgr: logits must be a dense"),
    ],
)
@pytest.mark.cpu_only(reason="the arguments are on the CPU")
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(gumbel_ext, torch.zeros(2, 3))


@every_estimator
def test_one_op_forward_and_one_backward(estimator, device):
    logits = torch.randn(4, 5, device=device, requires_grad=True)
    with DispatchLog() as log:
        estimator.sample(logits).sum().backward()
    assert log.names[-1] == f"{estimator.name}_backward"
    assert set(log.names) <= {estimator.name, "gumbel_softmax", f"{estimator.name}_backward"}


@pytest.mark.cpu_only(reason="modules are tested on the CPU")
@pytest.mark.parametrize(
    ("module", "function"),
    [
        (gumbel_ext.nn.GumbelRao(0.5, k=3), functools.partial(gumbel_ext.gumbel_rao, tau=0.5, k=3)),
        (gumbel_ext.nn.ZGR(), gumbel_ext.zgr),
        (gumbel_ext.nn.ReinMax(1.1), functools.partial(gumbel_ext.reinmax, tau=1.1)),
        (
            gumbel_ext.nn.GappedStraightThrough(0.5, gap=None),
            functools.partial(gumbel_ext.gapped_straight_through, tau=0.5, gap=None),
        ),
    ],
    ids=["GumbelRao", "ZGR", "ReinMax", "GappedStraightThrough"],
)
def test_modules(module, function):
    logits, grad = inputs((5, 8), torch.float32, "cpu")
    logits.requires_grad_()

    def both(sample):
        y, index = sample(logits, return_index=True, rng_state=rng_state())
        return y, index, torch.autograd.grad(y, logits, grad)[0]

    for ours, theirs in zip(both(module.train()), both(function), strict=True):
        assert torch.equal(ours, theirs)
    module.eval()
    assert torch.equal(module(logits).argmax(-1), logits.argmax(-1))
    module.load_state_dict(module.state_dict())
    assert set(module.state_dict()) == (set() if isinstance(module, gumbel_ext.nn.ZGR) else {"tau"})
    assert "eval_mode='argmax'" in repr(module)
    with pytest.raises(TypeError, match=f"{type(module).__name__}: dim must be an int"):
        type(module)(dim="last")
