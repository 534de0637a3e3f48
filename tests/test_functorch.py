"""Derivatives of any order, in forward and reverse mode, are those of the composite reference."""

import pytest
import torch
from oracle import DTYPES, TORCH, assert_row_errors, eps, noise, reference, row_error
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    vjp,
)
from torch.utils._pytree import tree_leaves

import gumbel_ext
from gumbel_ext import _reference

SHAPE = (3, 5, 2)
TAUS = {
    "number": 0.7,
    "scalar": torch.tensor(0.7, dtype=torch.float64),
    "rows": torch.tensor([[0.4], [0.9], [1.6]], dtype=torch.float64).view(3, 1, 1),
}


def example(device, masked):
    """Logits, a weight for the loss, a tangent and a mask that forbids all of one row."""
    logits, weight, tangent = torch.randn(3, *SHAPE, dtype=torch.float64, device=device)
    mask = torch.rand(SHAPE, device=device) < 0.7
    mask[1, :, 0] = False
    return logits, weight, tangent, mask if masked else None


def functions(hard, mask, state, tau):
    """The op and the reference as functions of what may be differentiated."""

    def ours(logits, tau=tau):
        return gumbel_ext.gumbel_softmax(logits, tau, hard, dim=1, mask=mask, rng_state=state)

    def theirs(logits, tau=tau):
        return _reference.gumbel_softmax(
            logits, tau, hard, dim=1, mask=mask, rng_state=state.to(logits.device)
        )[0]

    return ours, theirs


def assert_equal_trees(actual, expected, rtol=1e-9, atol=1e-11):
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# ---- transforms ---------------------------------------------------------------------------------


def losses(f, weight):
    """Not linear in y, so that second derivatives meet those of y with others."""
    return lambda *args: (f(*args).sin() * weight * args[0]).sum()


def numbers(args):
    return tuple(range(len(args)))


def contract(f, weight):
    """A loss of the first derivatives, which takes them one order further."""
    return lambda *args: sum(
        (g * weight.sum_to_size(g.shape)).sum()
        for g in grad(losses(f, weight), numbers(args))(*args)
    )


def directions(tangent, args):
    return tuple(tangent.sum_to_size(a.shape) for a in args)


TRANSFORMS = {
    "grad": lambda f, w, v, a: grad(losses(f, w), numbers(a))(*a),
    "vjp": lambda f, w, v, a: vjp(f, *a)[1](w),
    "jvp": lambda f, w, v, a: jvp(f, a, directions(v, a)),
    "jacrev": lambda f, w, v, a: jacrev(f, numbers(a))(*a),
    "jacfwd": lambda f, w, v, a: jacfwd(f, numbers(a))(*a),
    "hessian": lambda f, w, v, a: hessian(losses(f, w), numbers(a))(*a),
    "reverse over reverse": lambda f, w, v, a: grad(contract(f, w), numbers(a))(*a),
    "forward over reverse": lambda f, w, v, a: jvp(
        grad(losses(f, w), numbers(a)), a, directions(v, a)
    ),
    "reverse over forward": lambda f, w, v, a: grad(
        lambda *b: (jvp(f, b, directions(v, b))[1].sin() * w).sum(), numbers(a)
    )(*a),
    "forward over forward": lambda f, w, v, a: jvp(
        lambda *b: jvp(f, b, directions(v, b))[1], a, directions(v, a)
    ),
    "third order": lambda f, w, v, a: jvp(grad(contract(f, w), numbers(a)), a, directions(v, a)),
}


def transforms(*modes):
    for name in TRANSFORMS:
        mark = pytest.mark.feature(f"torch.func {name}", ops=("gumbel_softmax",), modes=modes)
        yield pytest.param(name, marks=mark, id=name.replace(" ", "_"))


def run(name, f, weight, tangent, logits, tau):
    args = (logits, tau) if isinstance(tau, torch.Tensor) else (logits,)
    return TRANSFORMS[name](f, weight, tangent, args)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("name", list(transforms("eager")))
def test_transforms(device, state, hard, name, tau, masked):
    logits, weight, tangent, mask = example(device, masked)
    tau = TAUS[tau].to(device) if tau != "number" else TAUS[tau]
    results = [
        run(name, f, weight, tangent, logits, tau) for f in functions(hard, mask, state, tau)
    ]
    assert_equal_trees(*results)
    assert max(leaf.abs().max() for leaf in tree_leaves(results[0])) > 1e-3


# Dynamo cannot trace a jvp of a jvp, of softmax either.
UNTRACEABLE = {"forward over forward", "third order"}
if TORCH < (2, 13):  # nor a jacfwd in several arguments
    UNTRACEABLE |= {"jacfwd", "hessian"}
COMPILED = [name for name in TRANSFORMS if name not in UNTRACEABLE]


def compiled_features(test):
    for name in COMPILED:
        mark = pytest.mark.feature(
            f"torch.func {name}", ops=("gumbel_softmax",), modes=("compiled",)
        )
        test = mark(test)
    return test


@compiled_features
def test_transforms_compiled(device, state, hard):
    torch.compiler.reset()
    logits, weight, tangent, mask = example(device, masked=True)
    tau = TAUS["rows"].to(device)
    ours, theirs = functions(hard, mask, state, tau)

    # In one graph, which takes less time than one each.
    def all_of(f, logits, tau):
        return [run(name, f, weight, tangent, logits, tau) for name in COMPILED]

    compiled = torch.compile(all_of, fullgraph=True, backend="aot_eager")
    assert_equal_trees(compiled(ours, logits, tau), all_of(theirs, logits, tau))


def test_compiled_by_inductor(device):
    """The kernels that inductor makes of the formulas, with a generator's noise inside."""
    torch.compiler.reset()
    logits, weight, _, _ = example(device, masked=False)

    def loss(logits, tau):
        return (gumbel_ext.gumbel_softmax(logits, tau, hard=True) * logits * weight).sum()

    def step(logits, tau):
        return grad_and_value(loss, (0, 1))(logits, tau)

    tau = torch.tensor(0.7, dtype=torch.float64, device=device)
    torch.manual_seed(3)
    actual = torch.compile(step, fullgraph=True)(logits, tau)
    torch.manual_seed(3)
    assert_equal_trees(actual, step(logits, tau))


# ---- values, randomness -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_those_of_the_plain_call(device, hard, dtype):
    """Bit for bit, index included, and one seed drawn from the generator."""
    logits = torch.randn(20, 10, device=device).to(dtype)
    mask = torch.rand(20, 10, device=device) < 0.6

    def draw(logits):
        return gumbel_ext.gumbel_softmax(logits, 0.5, hard, mask=mask, return_index=True)

    def loss(logits):
        y, index = draw(logits)
        return y.float().square().sum(), (y, index)

    torch.manual_seed(7)
    expected = draw(logits)
    after = torch.rand(1)
    for transform in (
        lambda: vjp(loss, logits, has_aux=True)[2],
        lambda: jvp(draw, (logits,), (torch.ones_like(logits),))[0],
        lambda: grad(loss, has_aux=True)(logits)[1],
    ):
        torch.manual_seed(7)
        for a, b in zip(transform(), expected, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(torch.rand(1), after)


@pytest.mark.feature("torch.func grad, has_aux index", ops=("gumbel_argmax",), modes=("eager",))
@pytest.mark.feature("torch.func jvp", ops=("gumbel_argmax", "gumbel_noise"), modes=("eager",))
@pytest.mark.feature("torch.func grad", ops=("gumbel_noise",), modes=("eager",))
def test_index_and_noise_have_no_derivative(device, state):
    logits, tangent = torch.randn(2, 20, 10, device=device)
    index = gumbel_ext.gumbel_argmax(logits, rng_state=state)

    def draw(x):
        return gumbel_ext.gumbel_argmax(x, rng_state=state)

    def perturbed(x):
        return x + gumbel_ext.gumbel_noise(x.shape, device=device, rng_state=state)

    slope, aux = grad(lambda x: (x.square().sum(), draw(x)), has_aux=True)(logits)
    assert torch.equal(slope, 2 * logits)
    assert torch.equal(aux, index)
    _, aux = jacrev(lambda x: (x.sin(), draw(x)), has_aux=True)(logits[:2])
    assert torch.equal(aux, gumbel_ext.gumbel_argmax(logits[:2], rng_state=state))
    value, none = jvp(draw, (logits,), (tangent,))
    assert torch.equal(value, index)
    assert not none.any()
    value, moved = jvp(perturbed, (logits,), (tangent,))
    assert torch.equal(value, perturbed(logits))
    assert torch.equal(moved, tangent)
    assert torch.equal(grad(lambda x: (perturbed(x) * tangent).sum())(logits), tangent)


# ---- torch.autograd -----------------------------------------------------------------------------


def dual_results(f, logits, tau, tangents):
    """Value, tangent, gradients and the gradients' tangents, all of one level."""
    with forward_ad.dual_level():
        leaves = [x.clone().requires_grad_() for x in (logits, tau)]
        duals = [forward_ad.make_dual(x, v) for x, v in zip(leaves, tangents, strict=True)]
        out = f(*duals)
        slopes = torch.autograd.grad(out.sin().square().sum(), duals, create_graph=True)
        results = [part for x in (out, *slopes) for part in forward_ad.unpack_dual(x)]
        return leaves, results


@pytest.mark.feature("forward-mode AD, dual tensors", ops=("gumbel_softmax",), modes=("eager",))
def test_dual_tensors(device, state, hard):
    logits, weight, tangent, mask = example(device, masked=True)
    tau = TAUS["rows"].to(device)
    ours, theirs = functions(hard, mask, state, tau)
    tangents = (tangent, weight.sum_to_size(tau.shape))
    leaves, actual = dual_results(ours, logits, tau, tangents)
    _, expected = dual_results(theirs, logits, tau, tangents)
    assert_equal_trees(actual, expected)
    # The tangent can be differentiated in turn. That of torch.softmax cannot, but by torch.func.
    assert_equal_trees(
        torch.autograd.grad((actual[1].sin() * weight).sum(), leaves),
        grad(lambda *a: (jvp(theirs, a, tangents)[1].sin() * weight).sum(), (0, 1))(logits, tau),
    )


@pytest.mark.feature("forward-mode AD, dual tensors", ops=("gumbel_softmax",), modes=("compiled",))
def test_dual_tensors_compiled(device, state, hard):
    torch.compiler.reset()
    logits, _, tangent, mask = example(device, masked=True)
    ours, theirs = functions(hard, mask, state, 0.7)

    def tangent_of(f, logits, tangent):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(logits, tangent))).tangent

    compiled = torch.compile(tangent_of, fullgraph=True, backend="aot_eager")
    assert_equal_trees(compiled(ours, logits, tangent), tangent_of(theirs, logits, tangent))


@pytest.mark.feature("gradcheck, gradgradcheck", ops=("gumbel_softmax",), modes=("eager",))
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_gradcheck(device, state, masked):
    """By finite differences, in both modes and under batches of gradients and tangents."""
    logits, _, _, mask = example(device, masked)
    tau = TAUS["rows"].to(device).clone().requires_grad_()
    soft, _ = functions(False, mask, state, tau)
    args = (logits.requires_grad_(), tau)
    assert torch.autograd.gradcheck(
        soft,
        args,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        fast_mode=True,
    )
    assert torch.autograd.gradgradcheck(
        soft, args, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True
    )


@pytest.mark.feature("autograd.functional jacobian", ops=("gumbel_softmax",), modes=("eager",))
@pytest.mark.feature("autograd.functional hessian", ops=("gumbel_softmax",), modes=("eager",))
@pytest.mark.parametrize("mode", ["loop", "reverse", "forward"])
def test_autograd_functional(device, state, hard, mode):
    logits, weight, _, mask = example(device, masked=True)
    tau = TAUS["rows"].to(device)
    ours, theirs = functions(hard, mask, state, tau)
    inner, outer = {}, {}
    if mode == "reverse":
        inner = outer = {"vectorize": True}
    if mode == "forward":
        inner = {"vectorize": True, "strategy": "forward-mode"}
        outer = {"vectorize": True, "outer_jacobian_strategy": "forward-mode"}
    assert_equal_trees(
        torch.autograd.functional.jacobian(ours, (logits, tau), **inner),
        jacrev(theirs, (0, 1))(logits, tau),
    )
    assert_equal_trees(
        torch.autograd.functional.hessian(losses(ours, weight), (logits, tau), **outer),
        hessian(losses(theirs, weight), (0, 1))(logits, tau),
    )


# ---- the rest of torch.func ---------------------------------------------------------------------


@pytest.mark.feature("torch.func linearize", ops=("gumbel_softmax",), modes=("eager",))
def test_linearize(device, state, hard):
    logits, weight, tangent, mask = example(device, masked=True)
    ours, theirs = functions(hard, mask, state, 0.7)
    value, along = linearize(ours, logits)
    assert torch.equal(value, ours(logits))
    for v in (tangent, weight):
        assert_equal_trees(along(v), jvp(theirs, (logits,), (v,))[1])


class Quantiser(torch.nn.Module):
    def __init__(self, sample):
        super().__init__()
        self.encoder = torch.nn.Linear(4, 12, dtype=torch.float64)
        self.decoder = torch.nn.Linear(12, 4, dtype=torch.float64)
        self.tau = torch.nn.Parameter(torch.tensor(0.8, dtype=torch.float64))
        self.sample = sample

    def forward(self, x):
        codes = self.sample(self.encoder(x).view(-1, 3, 4), self.tau)
        return self.decoder(codes.flatten(1))


@pytest.mark.feature("torch.func functional_call", ops=("gumbel_softmax",), modes=("eager",))
def test_functional_call(device, state, hard):
    data = torch.randn(6, 4, dtype=torch.float64, device=device)
    model = Quantiser(None).to(device)
    parameters = dict(model.named_parameters())

    def slopes(sample):
        model.sample = sample
        return grad(lambda p: (functional_call(model, p, (data,)) - data).square().mean())(
            {name: p.detach() for name, p in parameters.items()}
        )

    assert_equal_trees(
        slopes(lambda x, tau: gumbel_ext.gumbel_softmax(x, tau, hard, rng_state=state)),
        slopes(lambda x, tau: _reference.gumbel_softmax(x, tau, hard, rng_state=state)[0]),
    )


# ---- accuracy, edges ----------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_of_each_dtype(device, state, hard, dtype, tau):
    """Within the bounds of the plain backward.

    The Jacobian of softmax is symmetric: a tangent obeys the bounds of an incoming gradient.
    """
    logits, v = (torch.randn(2, 400, 16, device=device) * 2).to(dtype)
    sample = noise(logits.shape)

    def ours(x):
        return gumbel_ext.gumbel_softmax(x, tau, hard, rng_state=state)

    expected = vjp(
        lambda x: _reference.gumbel_softmax(x, tau, noise=sample)[0], logits.cpu().double()
    )[1](v.cpu().double())[0]
    for actual in (jvp(ours, (logits,), (v,))[1], vjp(ours, logits)[1](v)[0]):
        assert_row_errors(actual, expected, logits, v, tau, sample)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tangent_of_the_temperature(device, state, hard, dtype):
    logits = torch.randn(400, 16, device=device).to(dtype)
    tau = (0.5 + torch.rand(400, 1, device=device)).to(dtype)
    v = torch.randn_like(tau)
    sample = noise(logits.shape)
    actual = jvp(
        lambda t: gumbel_ext.gumbel_softmax(logits, t, hard, rng_state=state), (tau,), (v,)
    )[1]
    expected = jvp(
        lambda t: reference(logits, t, noise=sample)[0], (tau.cpu().double(),), (v.cpu().double(),)
    )[1]
    assert actual.dtype == dtype
    # log y loses what the rounding of y to 16 bits does, 1/2 eps where y is near 1.
    assert row_error(actual, expected).median() <= 8 * eps(dtype)
    assert row_error(actual, expected, floor=64 * eps(dtype)).max() <= 64 * eps(dtype)


def test_scalars_and_empty_tensors(device, state, hard):
    def sample(x, tau):
        return gumbel_ext.gumbel_softmax(x, tau, hard, rng_state=state)

    one = torch.tensor(1.5, device=device)
    assert sample(one, one) == 1
    for transform in (grad, jacrev, jacfwd, hessian):
        assert all(not leaf.any() for leaf in tree_leaves(transform(sample, (0, 1))(one, one)))
    value, tangent = jvp(sample, (one, one), (one, one))
    assert (value, tangent) == (1, 0)
    for shape in ((0, 5), (3, 0)):
        empty = torch.zeros(shape, device=device)
        value, tangent = jvp(sample, (empty, one), (empty, one))
        assert value.shape == tangent.shape == shape
        assert grad(lambda x: sample(x, one).sum())(empty).shape == shape
        assert jacrev(sample)(torch.zeros(0, 5, device=device), one).shape == (0, 5, 0, 5)


def test_logits_that_are_not_finite(device, state, hard):
    """Values as without a transform; entries at -inf are constants."""
    inf = torch.inf
    logits = torch.tensor(
        [[1.0, -inf, 0.0], [1.0, torch.nan, 0.0], [1.0, inf, inf], [-inf, -inf, 0.0]], device=device
    )
    v = torch.arange(1.0, 13.0, device=device).view(4, 3)

    def sample(x):
        return gumbel_ext.gumbel_softmax(x, 0.7, hard, rng_state=state)

    value, tangent = jvp(sample, (logits,), (v,))
    torch.testing.assert_close(value, sample(logits), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(value.isnan().any(1).cpu(), torch.tensor([False, True, not hard, False]))
    (gradient,) = vjp(sample, logits)[1](v)
    for derivative in (tangent, gradient):
        assert derivative[1].isnan().all()
        assert derivative[0].isfinite().all()
        assert derivative[0, 1] == 0
        assert not derivative[3].any()
