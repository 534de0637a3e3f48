"""The distributions: shapes, checks and values as torch.distributions has them, densities of their
own samples at any temperature, many samples without copies of the logits."""

import copy
import gc
import io
import math
import pickle

import oracle
import pytest
import scipy.stats
import torch
from oracle import eps, rng_state
from torch import distributions as td
from torch.utils._python_dispatch import TorchDispatchMode

import gumbel_ext
from gumbel_ext import _sample_origin
from gumbel_ext import distributions as gd

CLASSES = {
    gd.GumbelSoftmax: td.RelaxedOneHotCategorical,
    gd.ExpGumbelSoftmax: td.relaxed_categorical.ExpRelaxedCategorical,
    gd.StraightThroughGumbelSoftmax: td.OneHotCategorical,
    gd.BinaryConcrete: td.RelaxedBernoulli,
    gd.StraightThroughBinaryConcrete: td.Bernoulli,
}
CATEGORICAL = (gd.GumbelSoftmax, gd.ExpGumbelSoftmax, gd.StraightThroughGumbelSoftmax)
RELAXED = (gd.GumbelSoftmax, gd.ExpGumbelSoftmax, gd.BinaryConcrete)
STRAIGHT_THROUGH = (gd.StraightThroughGumbelSoftmax, gd.StraightThroughBinaryConcrete)
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
every_dtype = pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)


def peer(distribution, **changes):
    """torch's distribution with the same parameters."""
    cls = CLASSES[type(distribution)]
    given = {"logits": distribution.logits, "validate_args": False, **changes}
    if cls in (td.OneHotCategorical, td.Bernoulli):
        return cls(**given)
    temperature = torch.as_tensor(distribution.temperature, dtype=distribution.logits.dtype)
    return cls(temperature, **given)


def logits_for(cls, *batch, dtype=torch.float64, device="cpu", classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (*batch, classes) if cls in CATEGORICAL else batch
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


# ---- shapes, parameters, checks -----------------------------------------------------------------


@every_class
@pytest.mark.parametrize("batch", [(), (3,), (2, 1, 3)], ids=str)
def test_shapes_are_those_of_torch(cls, batch, device):
    logits = logits_for(cls, *batch, device=device)
    ours = cls(0.7, logits=logits, validate_args=True)
    theirs = peer(ours)
    assert ours.batch_shape == theirs.batch_shape == batch
    assert ours.event_shape == theirs.event_shape
    assert ours.event_dim == ours.support.event_dim == len(ours.event_shape)
    assert ours.param_shape == logits.shape
    assert ours.has_rsample
    assert ours.support.is_discrete == theirs.support.is_discrete
    for sample_shape in ((), (4,), torch.Size((2, 3)), (0,)):
        value = ours.rsample(sample_shape)
        assert value.shape == theirs._extended_shape(sample_shape)
        assert value.dtype == logits.dtype
        assert ours.log_prob(value).shape == (*sample_shape, *batch)
    torch.testing.assert_close(ours.probs, theirs.probs)


@every_class
def test_parameters_by_probs(cls, device):
    probs = torch.rand_like(logits_for(cls, 3, device=device)).requires_grad_()
    ours, theirs = cls(0.7, probs=probs), peer(cls(0.7, logits=probs), logits=None, probs=probs)
    torch.testing.assert_close(ours.probs, theirs.probs)
    weight = torch.randn_like(probs)
    expected = torch.autograd.grad((theirs.probs * weight).sum(), probs)[0]
    torch.testing.assert_close(torch.autograd.grad((ours.probs * weight).sum(), probs)[0], expected)
    value = ours.sample((6,)).clone()
    torch.testing.assert_close(ours.log_prob(value), theirs.log_prob(value))
    with_logits = cls(0.7, logits=ours.logits)
    torch.testing.assert_close(with_logits.log_prob(value), ours.log_prob(value))


@every_class
def test_expand(cls, device):
    logits = logits_for(cls, 3, 1, device=device)
    tau = torch.rand(3, 1, *[1] * (cls in CATEGORICAL), device=device, dtype=logits.dtype) + 0.5
    for ours in (
        cls(tau, logits=logits),
        cls(0.7, logits=logits),
        cls(tau, probs=logits.sigmoid()),
    ):
        expanded = ours.expand((2, 3, 4))
        assert type(expanded) is cls
        assert expanded.batch_shape == (2, 3, 4)
        assert expanded.event_shape == ours.event_shape
        assert expanded.logits.data_ptr() == ours.logits.data_ptr()
        if isinstance(ours.temperature, torch.Tensor):
            assert expanded.temperature.shape[:3] == (2, 3, 4)
        value = expanded.sample()
        assert value.shape == expanded.param_shape
        torch.testing.assert_close(expanded.log_prob(value.clone()), ours.log_prob(value.clone()))
        torch.testing.assert_close(expanded.probs, ours.probs.expand(expanded.param_shape))
        # The other direction is refused, as torch does.
        with pytest.raises(RuntimeError):
            ours.expand((2, 1))


def test_expand_of_a_subclass_with_arguments_of_its_own_must_be_its_own():
    class Own(gd.GumbelSoftmax):
        def __init__(self, logits):
            super().__init__(0.5, logits=logits)

    with pytest.raises(NotImplementedError, match="must also define a custom"):
        Own(torch.zeros(3)).expand((2,))


@every_class
def test_a_temperature_a_row_has_a_density_a_row(cls, device):
    """Of shape [B, 1] beside [B, K]; torch's density is then of shape [B, B]."""
    logits = logits_for(cls, 4, device=device)
    tau = torch.rand(4, *[1] * (cls in CATEGORICAL), device=device, dtype=logits.dtype) + 0.5
    ours = cls(tau, logits=logits)
    value = ours.sample((3,)).clone()
    density = ours.log_prob(value)
    assert density.shape == (3, 4)
    for i in range(4):
        row = cls(tau[i], logits=logits[i])
        torch.testing.assert_close(density[:, i], row.log_prob(value[:, i]))


@every_class
def test_a_temperature_may_widen_the_batch(cls):
    tau = torch.full((3, 1, *[1] * (cls in CATEGORICAL)), 0.5)
    ours = cls(tau, logits=logits_for(cls, 2, dtype=torch.float32))
    assert ours.batch_shape == (3, 2)
    assert ours.log_prob(ours.rsample((4,))).shape == (4, 3, 2)


@every_class
def test_what_the_constructor_refuses(cls):
    logits = logits_for(cls, 3)
    name = cls.__name__
    for given in ({}, {"logits": logits, "probs": logits.sigmoid()}):
        with pytest.raises(ValueError, match=f"{name}: exactly one of probs and logits"):
            cls(0.5, **given)
    for tau in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"{name}: temperature must be positive and finite"):
            cls(tau, logits=logits)
        with pytest.raises(ValueError, match=f"{name}: temperature must be positive and finite"):
            cls(torch.tensor(tau), logits=logits, validate_args=True)
    for tau in ("1", True, None):
        with pytest.raises(TypeError, match=f"{name}: temperature must be a number or a tensor"):
            cls(tau, logits=logits)
    with pytest.raises(TypeError, match=f"{name}: logits must be a floating-point tensor, got"):
        cls(0.5, logits=logits.long())
    with pytest.raises(TypeError, match=f"{name}: probs must be a tensor, got str"):
        cls(0.5, probs="half")
    with pytest.raises(ValueError, match="parameter logits"):
        cls(0.5, logits=logits.fill_(math.nan), validate_args=True)
    with pytest.raises(ValueError, match="parameter probs"):
        cls(0.5, probs=logits.fill_(-1.0), validate_args=True)
    with pytest.raises(ValueError, match=f"{name}: temperature must broadcast to the shape of"):
        cls(torch.ones(2, *[1] * (cls in CATEGORICAL)), logits=logits)


@every_class
def test_nothing_to_draw(cls):
    for batch, sample_shape in (((0,), ()), ((2, 0), (3,)), ((2,), (0,))):
        logits = logits_for(cls, *batch, dtype=torch.float32).requires_grad_()
        ours = cls(0.5, logits=logits, validate_args=True)
        value = ours.rsample(sample_shape)
        density = ours.log_prob(value)
        assert value.shape == (*sample_shape, *ours.param_shape)
        assert density.shape == (*sample_shape, *batch)
        (gradient,) = torch.autograd.grad(value.sum() + density.sum(), logits)
        assert (gradient == 0).all()


def test_a_temperature_beside_classes_has_a_last_dimension_of_one():
    with pytest.raises(ValueError, match=r"temperature must have a last dimension of 1.*\(5,\)"):
        gd.GumbelSoftmax(torch.ones(5), logits=torch.zeros(3, 5))
    with pytest.raises(ValueError, match="logits must have a dimension of classes"):
        gd.GumbelSoftmax(1.0, logits=torch.tensor(0.0))
    assert gd.GumbelSoftmax(torch.ones(1), logits=torch.zeros(3, 5)).batch_shape == (3,)


@pytest.mark.parametrize("cls", [gd.BinaryConcrete, gd.StraightThroughBinaryConcrete])
def test_numbers_as_parameters_of_gates(cls):
    for given in ({"probs": 0.25}, {"logits": -1}):
        ours = cls(0.5, **given)
        assert ours.batch_shape == ours.event_shape == ()
        assert ours.sample((7,)).shape == (7,)


@every_class
def test_values_outside_the_support_are_refused(cls):
    ours = cls(0.5, logits=logits_for(cls, 3), validate_args=True)
    inside = ours.sample()
    with pytest.raises(ValueError, match="must be a Tensor"):
        ours.log_prob(0.5)
    with pytest.raises(ValueError, match="not broadcastable"):
        ours.log_prob(inside.expand(2, *inside.shape).transpose(0, 1))
    with pytest.raises(ValueError, match="to be within the support"):
        ours.log_prob(torch.full_like(inside, math.nan))
    if cls in CATEGORICAL:
        with pytest.raises(ValueError, match="must match event_shape"):
            ours.log_prob(inside[..., :4])
    if cls is not gd.ExpGumbelSoftmax:
        beyond = (inside * 1.01, inside - 0.01) if cls in CATEGORICAL else (inside + 1.5,)
        for outside in (*beyond, inside - 1.5):
            with pytest.raises(ValueError, match="to be within the support"):
                ours.log_prob(outside)


@every_dtype
@pytest.mark.parametrize("classes", [2, 1000])
def test_samples_of_every_dtype_are_in_the_support(dtype, classes, device):
    logits = 3 * logits_for(gd.GumbelSoftmax, 50, dtype=dtype, device=device, classes=classes)
    for tau in (0.1, 1.0, 10.0):
        for cls in (gd.GumbelSoftmax, gd.StraightThroughGumbelSoftmax):
            ours = cls(tau, logits=logits, validate_args=True)
            assert not ours.log_prob(ours.sample((4,)).clone()).isnan().any()
    # A bound that grew with the dtype's range would let anything through.
    assert not gd.GumbelSoftmax.support.check(torch.full((classes,), 1.02 / classes, dtype=dtype))


def test_probs_of_16_bits_are_accepted(device):
    for dtype in oracle.SIXTEEN_BIT:
        probs = torch.rand(7, 300, device=device).to(dtype)
        ours = gd.GumbelSoftmax(0.5, probs=probs, validate_args=True)
        assert ours.logits.dtype == dtype
        expected = (probs.double() / probs.double().sum(-1, keepdim=True)).log()
        torch.testing.assert_close(ours.logits.double(), expected, rtol=eps(dtype), atol=1e-6)


def moment(distribution, name):
    value = getattr(distribution, name)
    if name == "entropy":
        return value()
    return value(distribution.sample()) if "cdf" in name else value


@every_class
def test_moments_without_a_closed_form_say_so(cls):
    ours = cls(0.5, logits=logits_for(cls, 3))
    names = ("mean", "variance", "mode", "entropy") if cls in RELAXED else ()
    for name in (*names, "cdf", "icdf"):
        with pytest.raises(NotImplementedError):
            moment(ours, name)


@every_class
def test_support_and_parameters_have_transforms(cls):
    """What automatic guides and samplers of Pyro look up."""
    ours = cls(0.5, probs=logits_for(cls, 3).sigmoid())
    for constraint in (*ours.arg_constraints.values(), ours.support):
        if not constraint.is_discrete:
            for registry in (td.biject_to, td.transform_to):
                assert registry(constraint).codomain.event_dim == constraint.event_dim
    theirs = td.transform_to(td.constraints.simplex)
    assert td.transform_to(gd.GumbelSoftmax.support) == theirs


@every_class
def test_repr_and_pickle(cls):
    by_logits = cls(0.5, logits=logits_for(cls, 3))
    shape = tuple(by_logits.param_shape)
    assert repr(by_logits) == f"{cls.__name__}(temperature: 0.5, logits: {shape})"
    tau = torch.ones(3, *[1] * (cls in CATEGORICAL))
    by_probs = cls(tau, probs=by_logits.probs)
    assert repr(by_probs) == (
        f"{cls.__name__}(temperature: {tuple(tau.shape)}, probs: {tuple(by_probs.probs.shape)})"
    )
    for ours in (by_logits, by_probs):
        for again in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
            assert repr(again) == repr(ours)
            assert torch.equal(
                again.sample(rng_state=rng_state()), ours.sample(rng_state=rng_state())
            )


# ---- samples ------------------------------------------------------------------------------------


SAMPLERS = {
    gd.GumbelSoftmax: gumbel_ext.gumbel_softmax,
    gd.ExpGumbelSoftmax: gumbel_ext.gumbel_log_softmax,
    gd.StraightThroughGumbelSoftmax: lambda *args, **kwargs: gumbel_ext.gumbel_softmax(
        *args, hard=True, **kwargs
    ),
    gd.BinaryConcrete: gumbel_ext.binary_concrete,
    gd.StraightThroughBinaryConcrete: lambda *args, **kwargs: gumbel_ext.binary_concrete(
        *args, hard=True, **kwargs
    ),
}


@every_class
@every_dtype
def test_samples_and_gradients_are_those_of_the_functions(cls, dtype, device, state):
    logits = logits_for(cls, 6, dtype=dtype, device=device).requires_grad_()
    tau = torch.tensor(0.6, device=device, requires_grad=True)
    ours = cls(tau, logits=logits)
    y = ours.rsample((8,), rng_state=state)
    same = logits.detach().expand(8, *logits.shape).contiguous().requires_grad_()
    expected = SAMPLERS[cls](same, tau, rng_state=state)
    assert torch.equal(y, expected)
    assert torch.equal(ours.sample((8,), rng_state=state), y)
    assert not ours.sample((8,), rng_state=state).requires_grad
    weight = torch.randn(y.shape, device=device).to(dtype)
    got = torch.autograd.grad((y * weight).sum(), (logits, tau))
    of_all, of_tau = torch.autograd.grad((expected * weight).sum(), (same, tau))
    assert torch.equal(got[0], of_all.sum(0))
    assert torch.equal(got[1], of_tau)
    assert got[0].abs().sum() > 0


@every_class
def test_generators(cls, device):
    ours = cls(0.5, logits=logits_for(cls, 4, device=device))

    def generator():
        return torch.Generator(device).manual_seed(3)

    seeded = generator()
    first, second = ours.sample((2,), generator=seeded), ours.rsample((2,), generator=seeded)
    assert not torch.equal(first, second)
    assert torch.equal(ours.rsample((2,), generator=generator()), first)
    # One state a call, as the functions draw.
    sampled = generator()
    SAMPLERS[cls](ours.logits, 0.5, generator=sampled)
    SAMPLERS[cls](ours.logits, 0.5, generator=sampled)
    assert torch.equal(sampled.get_state(), seeded.get_state())
    after = []
    for draw in (ours.rsample, lambda: SAMPLERS[cls](ours.logits, 0.5)):
        torch.manual_seed(4)
        draw()
        after.append(oracle.default_rng_state(device))
    assert torch.equal(*after)
    # Nothing of the default generator where the randomness is given.
    for given in ({"generator": generator()}, {"rng_state": rng_state(device=device)}):
        ours.rsample(**given)
        assert torch.equal(oracle.default_rng_state(device), after[0])
    with pytest.raises(ValueError, match="generator or rng_state, not both"):
        ours.rsample(generator=seeded, rng_state=rng_state(device=device))


class Allocated(TorchDispatchMode):
    """Sizes of the storages that ops return and did not get."""

    def __init__(self):
        super().__init__()
        self.elements = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in given:
                    self.elements.append(storage.nbytes() // tensor.element_size())
        return out


@every_class
def test_many_samples_do_not_copy_the_logits(cls, device):
    """Of the size of the samples there are the samples, and in the backward their gradient."""
    logits = logits_for(cls, 32, dtype=torch.float32, device=device, classes=16).requires_grad_()
    ours = cls(0.5, logits=logits, validate_args=False)
    many = 100 * logits.numel()
    with Allocated() as forward:
        y = ours.rsample((100,))
    assert [n for n in forward.elements if n >= many] == [many]
    # A straight-through sample keeps one copy of the leaf.
    assert sum(forward.elements) <= many + logits.numel() + 100 * 32 + 100
    weight = torch.randn_like(y)
    with Allocated() as backward:
        torch.autograd.grad(y, logits, weight)
    assert [n for n in backward.elements if n >= many] == [many]


@pytest.mark.parametrize("cls", RELAXED, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_keep_their_gradient_at_low_temperature(cls, dtype, device):
    """Clamps and 16-bit noise cost others 20 to 80 % of the rows (docs/distributions.md)."""
    noise_state = rng_state(seed=5, device=device)
    zero = {}
    for kind in (torch.float64, dtype):
        logits = logits_for(cls, 5000, dtype=dtype, device=device, classes=10).to(kind)
        logits.requires_grad_()
        y = cls(0.1, logits=logits).rsample(rng_state=noise_state)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        (gradient,) = torch.autograd.grad((y * weight).sum(), logits)
        zero[kind] = (gradient == 0).view(5000, -1).all(-1)
    assert zero[torch.float64].sum() == 0
    assert zero[dtype].double().mean() <= 1e-3


def test_probability_zero_is_never_chosen_and_has_no_gradient(device):
    probs = torch.tensor([0.5, 0.0, 0.25, 0.25], device=device, requires_grad=True)
    for cls in CATEGORICAL:
        for tau in (0.1, 2.0):
            ours = cls(tau, probs=probs, validate_args=True)
            assert ours.logits[1] == -math.inf
            y = ours.rsample((500,))
            assert (y[:, 1] == (-math.inf if cls is gd.ExpGumbelSoftmax else 0)).all()
            density = ours.log_prob(y)
            assert density.isfinite().all()
            weight = torch.randn_like(y)
            loss = (y.masked_fill(y.isinf(), 0.0) * weight).sum() + density.sum()
            (gradient,) = torch.autograd.grad(loss, probs)
            assert gradient.isfinite().all()
            # That of the sum they are divided by is left, which is rounding.
            assert abs(gradient[1]) <= 1e-4 * gradient.abs().max()
            assert (gradient[[0, 2, 3]] != 0).all()
            # The same as without that class.
            expected = cls(tau, probs=probs[[0, 2, 3]]).log_prob(y[:, [0, 2, 3]])
            inside = expected.isfinite()
            assert inside.double().mean() > 0.9
            torch.testing.assert_close(density[inside], expected[inside], rtol=1e-4, atol=0.01)


def test_gates_with_probability_zero_and_one(device):
    probs = torch.tensor([0.0, 0.5, 1.0], device=device, requires_grad=True)
    for cls in (gd.BinaryConcrete, gd.StraightThroughBinaryConcrete):
        ours = cls(0.5, probs=probs, validate_args=True)
        y = ours.rsample((100,))
        assert (y[:, 0] == 0).all()
        assert (y[:, 2] == 1).all()
        (gradient,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), probs)
        assert gradient.isfinite().all()
        assert gradient[1] != 0
        density = ours.log_prob(y)
        assert density[:, 1].isfinite().all()
        assert not density.isnan().any()


# ---- densities ----------------------------------------------------------------------------------


@every_class
@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0])
def test_log_prob_is_that_of_torch_inside(cls, tau, device):
    logits = logits_for(cls, 3, device=device).requires_grad_()
    temperature = torch.tensor(tau, device=device, dtype=torch.float64, requires_grad=True)
    ours = cls(temperature, logits=logits)
    value = logits_for(cls, 7, 3, device=device, seed=1)
    value = value.softmax(-1) if cls in CATEGORICAL else value.sigmoid()
    if cls is gd.ExpGumbelSoftmax:
        value = value.log()
    if cls in STRAIGHT_THROUGH:
        value = ours.sample((7,))
    value.requires_grad_()
    theirs = peer(ours).log_prob(value)
    density = ours.log_prob(value)
    torch.testing.assert_close(density, theirs)
    weight = torch.randn_like(density)
    of = (logits,) if cls in STRAIGHT_THROUGH else (logits, temperature, value)
    expected = torch.autograd.grad((theirs * weight).sum(), of)
    if cls in STRAIGHT_THROUGH:
        theirs_are = torch.autograd.grad((density * weight).sum(), of)
        torch.testing.assert_close(theirs_are, expected)
        return
    torch.testing.assert_close(torch.autograd.grad((density * weight).sum(), of), expected)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_densities_integrate_to_one(tau):
    # In the logit of y, where nothing is singular; further out 1 - y is 0 in float64.
    x = torch.linspace(-36, 36, 100001, dtype=torch.float64)
    y = torch.stack([x.sigmoid(), (-x).sigmoid()], -1)
    logits = torch.tensor([0.3, -0.6], dtype=torch.float64)
    for density in (
        gd.GumbelSoftmax(tau, logits=logits, validate_args=False).log_prob(y),
        gd.BinaryConcrete(tau, logits=logits[0] - logits[1]).log_prob(y[:, 0]),
    ):
        mass = torch.trapezoid((density + y.log().sum(-1)).exp(), x)
        assert abs(mass - 1) < 1e-6


def float64_density(cls, logits, tau, scored, scored_tau, noise):
    """log p(y) by ``scored`` of the sample that ``logits`` and ``noise`` make, by formula."""
    if cls is gd.BinaryConcrete:
        x = (logits + noise) / tau
        d = scored_tau * x - scored
        zero = torch.zeros_like(x)
        jacobian = torch.logaddexp(x, zero) + torch.logaddexp(-x, zero)
        return scored_tau.log() - torch.logaddexp(d, zero) - torch.logaddexp(-d, zero) + jacobian
    x = torch.log_softmax((logits + noise) / tau, -1)
    count = logits.shape[-1]
    constant = math.lgamma(count) + (count - 1) * scored_tau.log()
    inside = constant + torch.log_softmax(scored - scored_tau * x, -1).sum(-1)
    return inside - x.sum(-1) if cls is gd.GumbelSoftmax else inside


@pytest.mark.parametrize("cls", RELAXED, ids=lambda cls: cls.__name__)
@every_dtype
@pytest.mark.parametrize("tau", [0.05, 0.7])
def test_density_of_own_samples_at_any_temperature(cls, dtype, tau, device, state):
    """Values and gradients of posterior and prior, as an ELBO has them, against float64."""
    logits = logits_for(cls, 40, dtype=dtype, device=device, classes=10)
    prior = logits_for(cls, 40, dtype=dtype, device=device, classes=10, seed=9)
    taus = torch.tensor([tau, 0.5], device=device, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (logits, prior, taus)]
    q, p = cls(taus[0], logits=logits), cls(taus[1], logits=prior)
    z = q.rsample((5,), rng_state=state)
    if cls is gd.GumbelSoftmax and tau == 0.05 and dtype != torch.float64:
        assert (z == 0).any()  # else nothing is shown
        assert not q.log_prob(z.clone()).isfinite().all()
    got = torch.stack([q.log_prob(z), p.log_prob(z)]).double()
    weight = torch.randn_like(got)
    gradients = torch.autograd.grad((got * weight).sum(), inputs)

    wide = [t.detach().double().requires_grad_() for t in inputs]
    draw = gumbel_ext.logistic_noise if cls is gd.BinaryConcrete else gumbel_ext.gumbel_noise
    noise = draw(z.shape, dtype=torch.float64, device=device, rng_state=state)
    a, b, t = wide
    expected = torch.stack(
        [
            float64_density(cls, a, t[0], a, t[0], noise),
            float64_density(cls, a, t[0], b, t[1], noise),
        ]
    )
    assert got.isfinite().all()
    # ExpGumbelSoftmax scores the rounded logarithm it returned; the others make it again.
    rounding = eps(dtype) if cls is gd.ExpGumbelSoftmax else eps(torch.float32)
    if dtype == torch.float64:
        rounding = eps(dtype)
    size = 10 * noise.abs().max() / tau
    allowed = 8 * rounding * size + 2 * eps(dtype) * expected.abs()
    assert ((got - expected).abs() <= allowed).all()
    for got_one, expected_one in zip(
        gradients, torch.autograd.grad((expected * weight).sum(), wide), strict=True
    ):
        scale = expected_one.abs().max()
        assert ((got_one.double() - expected_one).abs() <= 64 * eps(dtype) / tau * scale).all()


def test_log_prob_of_what_is_not_the_sample_itself(device, state):
    logits = logits_for(gd.GumbelSoftmax, 200, dtype=torch.float32, device=device, classes=10)
    parameter = torch.nn.Parameter(logits)
    q = gd.GumbelSoftmax(0.05, logits=parameter, validate_args=False)

    def finite(value):
        return bool(q.log_prob(value).isfinite().all())

    z = q.rsample(rng_state=state)
    assert (z == 0).any()
    assert finite(z)
    assert not finite(z.clone())
    assert not finite(z.detach())
    assert not finite(z[:])

    # Changed in place, it is another value.
    changed = q.sample(rng_state=state)
    assert finite(changed)
    changed.copy_(changed.flip(0))
    assert not finite(changed)

    # Whoever asks for the gradient of the sample gets it, infinite as it is.
    kept = q.rsample(rng_state=state)
    kept.retain_grad()
    q.log_prob(kept).sum().backward()
    assert kept.grad is not None
    leaf = q.sample(rng_state=state).requires_grad_()
    assert torch.autograd.grad(q.log_prob(leaf).sum(), leaf)[0] is not None

    # A sample without gradient has a density without gradient by way of it.
    tau = torch.tensor(0.05, device=device, requires_grad=True)
    drawn = gd.GumbelSoftmax(tau, logits=parameter).sample(rng_state=state)
    log_z = gd.ExpGumbelSoftmax(tau, logits=parameter).sample(rng_state=state)
    got = torch.autograd.grad(
        gd.GumbelSoftmax(tau, logits=parameter).log_prob(drawn).sum(), (parameter, tau)
    )
    expected = torch.autograd.grad(
        gd.ExpGumbelSoftmax(tau, logits=parameter).log_prob(log_z).sum(), (parameter, tau)
    )
    torch.testing.assert_close(got, expected)

    # Parameters that an optimizer has moved, and states that were counted on, make other noise.
    for moved in (parameter, state):
        z = q.sample(rng_state=state)
        with torch.no_grad():
            moved.add_(1)
        assert not finite(z)


def test_origins_live_as_long_as_samples(device):
    q = gd.GumbelSoftmax(0.5, logits=torch.zeros(4, 3, device=device, requires_grad=True))
    gc.collect()
    before = len(_sample_origin._origins)
    z = q.rsample((10,))
    assert len(_sample_origin._origins) == before + 1
    q.log_prob(z).sum().backward()
    origin = _sample_origin.recall(z)
    assert origin.logits.untyped_storage().data_ptr() == q.logits.untyped_storage().data_ptr()
    del origin
    buffer = io.BytesIO()
    torch.save(z.detach(), buffer)
    assert pickle.loads(pickle.dumps(q.sample())).shape == (4, 3)
    del z
    assert len(_sample_origin._origins) == before


def test_a_prior_that_allows_what_the_sample_excludes(device):
    """The sample lies on a face of the prior's simplex, where the density is 0 or infinite."""
    excluding = torch.tensor([[0.0, -math.inf, 0.5], [0.0, 1.0, 2.0]], device=device)
    excluding.requires_grad_()
    q = gd.GumbelSoftmax(0.05, logits=excluding)
    z = q.rsample((50,))
    assert (z[:, 1] == 0).any()
    for tau, limit in ((0.2, math.inf), (3.0, -math.inf)):
        logits = torch.zeros(3, device=device, requires_grad=True)
        density = gd.GumbelSoftmax(tau, logits=logits).log_prob(z)
        assert (density[:, 0] == limit).all()
        assert density[:, 1].isfinite().all()
        for gradient in torch.autograd.grad(density[:, 1].sum(), (logits, excluding)):
            assert gradient.isfinite().all()


def test_straight_through_is_the_categorical(device):
    logits = logits_for(gd.StraightThroughGumbelSoftmax, 3, 4, device=device).requires_grad_()
    ours, theirs = (
        gd.StraightThroughGumbelSoftmax(0.3, logits=logits),
        td.OneHotCategorical(logits=logits, validate_args=False),
    )
    other = torch.randn_like(logits)
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    torch.testing.assert_close(ours.mean, theirs.mean)
    torch.testing.assert_close(ours.variance, theirs.variance)
    assert torch.equal(ours.mode, theirs.mode)
    for expand in (True, False):
        assert torch.equal(ours.enumerate_support(expand), theirs.enumerate_support(expand))
    expected = td.kl_divergence(theirs, td.OneHotCategorical(logits=other))
    for q in (
        gd.StraightThroughGumbelSoftmax(9.0, logits=other),
        td.OneHotCategorical(logits=other),
    ):
        torch.testing.assert_close(td.kl_divergence(ours, q), expected)
    # The samples' gradient goes on through the density: that of a linear function of them.
    z = ours.rsample(rng_state=rng_state(device=device))
    weight = torch.randn_like(z[..., 0])
    (of_z,) = torch.autograd.grad((ours.log_prob(z) * weight).sum(), z, retain_graph=True)
    torch.testing.assert_close(of_z, weight.unsqueeze(-1) * logits.log_softmax(-1))


def test_straight_through_gates_are_bernoulli(device):
    logits = logits_for(gd.StraightThroughBinaryConcrete, 3, 4, device=device).requires_grad_()
    ours = gd.StraightThroughBinaryConcrete(0.3, logits=logits)
    theirs = td.Bernoulli(logits=logits, validate_args=False)
    other = torch.randn_like(logits)
    for name in ("mean", "variance", "mode"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    for expand in (True, False):
        assert torch.equal(ours.enumerate_support(expand), theirs.enumerate_support(expand))
    expected = td.kl_divergence(theirs, td.Bernoulli(logits=other))
    for q in (gd.StraightThroughBinaryConcrete(9.0, logits=other), td.Bernoulli(logits=other)):
        torch.testing.assert_close(td.kl_divergence(ours, q), expected)
    z = ours.rsample(rng_state=rng_state(device=device))
    (of_z,) = torch.autograd.grad(ours.log_prob(z).sum(), z, retain_graph=True)
    torch.testing.assert_close(of_z, logits)


def test_straight_through_with_impossible_classes(device):
    logits = torch.tensor([0.0, -math.inf, 1.0], device=device, requires_grad=True)
    ours = gd.StraightThroughGumbelSoftmax(0.5, logits=logits)
    z = ours.rsample((20,))
    everything = ours.log_prob(z).sum() + ours.entropy() + td.kl_divergence(ours, ours)
    assert everything.isfinite()
    (gradient,) = torch.autograd.grad(everything, logits)
    assert gradient.isfinite().all()
    impossible = torch.tensor([0.0, 1.0, 0.0], device=device)
    assert ours.log_prob(impossible) == -math.inf
    allows = gd.StraightThroughGumbelSoftmax(0.5, logits=torch.zeros(3, device=device))
    assert td.kl_divergence(allows, ours) == math.inf


# ---- statistics: alpha = 1e-4 each, fixed seeds -------------------------------------------------


ALPHA = 1e-4


def test_classes_have_their_probabilities(device):
    logits = logits_for(gd.GumbelSoftmax, dtype=torch.float32, device=device, classes=8)
    for cls in (gd.StraightThroughGumbelSoftmax, gd.GumbelSoftmax):
        ours = cls(0.5, logits=logits)
        index = ours.sample((50_000,)).argmax(-1).cpu()
        expected = ours.probs.double().cpu() * 50_000
        found = torch.bincount(index, minlength=8).double()
        assert (
            scipy.stats.chisquare(found, expected * (found.sum() / expected.sum())).pvalue > ALPHA
        )


def test_gates_are_one_with_their_probability(device):
    for p in (0.01, 0.5, 0.9):
        for cls in (gd.StraightThroughBinaryConcrete, gd.BinaryConcrete):
            ones = int((cls(0.5, probs=p).sample((50_000,)) > 0.5).sum())
            assert scipy.stats.binomtest(ones, 50_000, p).pvalue > ALPHA


@pytest.mark.parametrize("tau", [0.1, 2.0])
def test_samples_have_the_distribution_they_claim(tau, device):
    """Two classes and a gate: tau logit(y) is logistic around the log-odds."""
    pair = torch.tensor([0.4, -0.7], device=device, dtype=torch.float64)
    log_y = gd.ExpGumbelSoftmax(tau, logits=pair).sample((20_000,))
    y = gd.GumbelSoftmax(tau, logits=pair).sample((20_000,))
    gate = gd.BinaryConcrete(tau, logits=pair[0] - pair[1]).sample((20_000,))
    logits_of = [log_y[:, 0] - log_y[:, 1]]
    if tau > 1:  # else some are rounded to 0 and 1
        logits_of += [y[:, 0].log() - y[:, 1].log(), gate.logit()]
    law = scipy.stats.logistic(loc=1.1)
    for x in logits_of:
        assert scipy.stats.kstest((tau * x).cpu().numpy(), law.cdf).pvalue > ALPHA


# ---- training and transforms --------------------------------------------------------------------


@pytest.mark.parametrize("cls", [*RELAXED, *STRAIGHT_THROUGH], ids=lambda cls: cls.__name__)
def test_an_elbo_at_low_temperature_trains(cls, device):
    """log p(x|z) + log p(z) - log q(z) at tau = 0.1, in float32: finite, and it rises."""
    weights = torch.randn(8, 6, generator=torch.Generator().manual_seed(3)).to(device)
    target = weights[torch.arange(20, device=device) % 8]
    shape = (20, 8)
    logits = torch.zeros(shape, device=device, requires_grad=True)
    prior_logits = torch.zeros(shape, device=device)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    losses = []
    for _ in range(80):
        q, prior = cls(0.1, logits=logits), cls(0.5, logits=prior_logits)
        z = q.rsample((16,))
        x = (z.exp() if cls is gd.ExpGumbelSoftmax else z) @ weights
        kl = q.log_prob(z) - prior.log_prob(z)
        if cls not in CATEGORICAL:
            kl = kl.sum(-1)
        loss = (10 * (x - target).square().sum(-1) + kl).mean()
        optimizer.zero_grad()
        loss.backward()
        assert loss.isfinite()
        assert logits.grad.isfinite().all()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    if cls in CATEGORICAL:
        found = logits.argmax(-1) == torch.arange(20, device=device) % 8
        assert found.double().mean() > 0.9


@every_class
@pytest.mark.cpu_only(reason="one compiler is enough")
def test_whole_in_one_compiled_graph(cls):
    def elbo(logits, tau, state):
        q = cls(tau, logits=logits)
        z = q.rsample((6,), rng_state=state)
        return (z * torch.arange(z.numel()).view_as(z)).sum() + q.log_prob(z).sum()

    logits = logits_for(cls, 3).requires_grad_()
    tau = torch.tensor(0.7, dtype=torch.float64)
    state = rng_state()
    expected = elbo(logits, tau, state)
    compiled = torch.compile(elbo, fullgraph=True, backend="aot_eager")(logits, tau, state)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(
        torch.autograd.grad(compiled, logits), torch.autograd.grad(expected, logits)
    )


@every_class
def test_vmap_keeps_its_rules_of_randomness(cls, device):
    logits = logits_for(cls, 5, 4, device=device)

    def draw(row):
        return cls(0.5, logits=row, validate_args=False).rsample()

    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(draw)(logits)
    same = torch.vmap(draw, randomness="same")(logits[:1].expand_as(logits))
    assert torch.equal(same[0], same[1])
    different = torch.vmap(draw, randomness="different")(logits[:1].expand_as(logits))
    assert not torch.equal(different[0], different[1])


def test_gradients_by_torch_func(device, state):
    logits = logits_for(gd.GumbelSoftmax, 5, device=device)
    weight = torch.randn_like(logits)

    def loss(logits):
        q = gd.GumbelSoftmax(0.7, logits=logits, validate_args=False)
        z = q.rsample(rng_state=state)
        return (z * weight).sum() + q.log_prob(z).sum()

    got = torch.func.grad(loss)(logits)
    leaf = logits.clone().requires_grad_()
    torch.testing.assert_close(got, torch.autograd.grad(loss(leaf), leaf)[0])
