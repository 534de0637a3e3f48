"""The distributions: shapes, checks and values as torch.distributions has them, densities of their
own samples at any temperature, many samples without copies of the logits."""

import copy
import gc
import math
import pickle
import weakref
from fractions import Fraction

import numpy as np
import oracle
import pytest
import scipy.stats
import torch
from oracle import eps, rng_state
from torch import distributions as td
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import gumbel_ext
from gumbel_ext import distributions as gd

CLASSES = {
    gd.GumbelSoftmax: td.RelaxedOneHotCategorical,
    gd.ExpGumbelSoftmax: td.relaxed_categorical.ExpRelaxedCategorical,
    gd.StraightThroughGumbelSoftmax: td.OneHotCategorical,
    gd.BinaryConcrete: td.RelaxedBernoulli,
    gd.LogitBinaryConcrete: td.relaxed_bernoulli.LogitRelaxedBernoulli,
    gd.StraightThroughBinaryConcrete: td.Bernoulli,
}
CATEGORICAL = (gd.GumbelSoftmax, gd.ExpGumbelSoftmax, gd.StraightThroughGumbelSoftmax)
# Relaxed samples that stay off a boundary, and those that have none.
BOUNDED = (gd.GumbelSoftmax, gd.BinaryConcrete)
LOG_SPACE = (gd.ExpGumbelSoftmax, gd.LogitBinaryConcrete)
RELAXED = (*BOUNDED, *LOG_SPACE)
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
    others = (logits.long(), logits.bool(), logits.cfloat(), logits.to(torch.float8_e5m2))
    for wrong in (*others, logits.to_sparse(), torch.nested.nested_tensor([logits, logits])):
        with pytest.raises(TypeError, match=f"^{name}: logits must (have dtype|be a dense)[^\n]*$"):
            cls(0.5, logits=wrong)
        if not (wrong.layout == torch.strided and wrong.is_nested):
            with pytest.raises(TypeError, match=f"^{name}: probs must (have dtype|be a dense)"):
                cls(0.5, probs=wrong)
    with pytest.raises(
        TypeError, match=f"{name}: probs must be (a number or )?a tensor, got .*str"
    ):
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
    for empty in (torch.tensor(0.0), torch.zeros(3, 0)):
        for cls in CATEGORICAL:
            with pytest.raises(ValueError, match="must have at least one class in the last dim"):
                cls(1.0, logits=empty)
    assert gd.GumbelSoftmax(torch.ones(1), logits=torch.zeros(3, 5)).batch_shape == (3,)


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls not in CATEGORICAL])
@pytest.mark.parametrize("tau", [0.5, np.float32(0.5), np.array(0.5), Fraction(1, 2)], ids=repr)
def test_numbers_as_parameters_of_gates(cls, tau):
    for given in ({"probs": 0.25}, {"logits": -1}, {"logits": np.array(0.5)}):
        ours = cls(tau, **given)
        assert ours.temperature == 0.5
        assert ours.batch_shape == ours.event_shape == ()
        assert ours.sample((7,)).shape == (7,)


@every_class
def test_values_outside_the_support_are_refused(cls):
    ours = cls(0.5, logits=logits_for(cls, 3), validate_args=True)
    inside = ours.sample()
    for nothing in (0.5, None, "text", [0.5]):
        with pytest.raises(TypeError, match=f"^{cls.__name__}: value must be a tensor, got"):
            ours.log_prob(nothing)
    with pytest.raises(ValueError, match="not broadcastable"):
        ours.log_prob(inside.expand(2, *inside.shape).transpose(0, 1))
    with pytest.raises(ValueError, match="to be within the support"):
        ours.log_prob(torch.full_like(inside, math.nan))
    if cls in CATEGORICAL:
        with pytest.raises(ValueError, match="must match event_shape"):
            ours.log_prob(inside[..., :4])
    if cls is gd.ExpGumbelSoftmax:
        for outside in (
            inside + 0.1,
            inside - 0.1,
            inside.exp(),
            torch.full_like(inside, -math.inf),
        ):
            with pytest.raises(ValueError, match="to be within the support"):
                ours.log_prob(outside)
    elif cls is not gd.LogitBinaryConcrete:
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
    if cls is gd.LogitBinaryConcrete:
        return  # has them all
    ours = cls(0.5, logits=logits_for(cls, 3))
    names = ("mean", "variance", "entropy") if cls in RELAXED else ()
    for name in (*names, "cdf", "icdf"):
        with pytest.raises(NotImplementedError):
            moment(ours, name)
    if cls in RELAXED:
        for other in (ours, cls(0.3, logits=logits_for(cls, 3, seed=1)), peer(ours)):
            with pytest.raises(NotImplementedError):
                td.kl_divergence(ours, other)


@pytest.mark.parametrize("tau", [0.2, 3.0])
def test_logit_of_a_gate_is_logistic(tau, device):
    logits = logits_for(gd.LogitBinaryConcrete, 4, device=device)
    ours = gd.LogitBinaryConcrete(tau, logits=logits)
    law = scipy.stats.logistic(loc=logits.cpu().numpy() / tau, scale=1 / tau)
    x = ours.sample((3,))
    p = torch.rand(3, 4, dtype=torch.float64)
    for got, expected in (
        (ours.mean, law.mean()),
        (ours.mode, law.mean()),
        (ours.variance, law.var()),
        (ours.entropy(), law.entropy()),
        (ours.cdf(x), law.cdf(x.cpu().numpy())),
        (ours.icdf(p.to(device)), law.ppf(p.numpy())),
        (ours.log_prob(x), law.logpdf(x.cpu().numpy())),
    ):
        torch.testing.assert_close(got.cpu(), torch.as_tensor(expected))


@every_class
@every_dtype
def test_modes(cls, dtype, device):
    ours = cls(0.3, logits=logits_for(cls, 6, dtype=dtype, device=device))
    mode = ours.mode
    assert mode.dtype == dtype
    assert torch.equal(ours.deterministic_sample, mode)
    if cls in LOG_SPACE:
        # Nowhere near is the density larger.
        best = ours.log_prob(mode)
        for _ in range(20):
            near = mode + 0.1 * torch.randn_like(mode)
            near = near.log_softmax(-1) if cls in CATEGORICAL else near
            assert (ours.log_prob(near) <= best + 8 * eps(dtype) * best.abs()).all()
    elif cls in CATEGORICAL:
        assert torch.equal(mode.argmax(-1), ours.logits.argmax(-1))
        assert (mode.sum(-1) == 1).all()
    else:
        assert torch.equal(mode, (ours.logits > 0).to(dtype))
    tied = cls(0.3, logits=torch.zeros(2, 3, dtype=dtype, device=device))
    assert not tied.deterministic_sample.isnan().any()


def test_mask_is_probability_zero(device):
    logits = logits_for(gd.GumbelSoftmax, 4, 3, device=device)
    mask = torch.rand(3, 5, device=device) < 0.5
    mask[:, 2] = True
    for cls in CATEGORICAL:
        kept = logits.clone().requires_grad_()
        ours = cls(0.4, logits=kept, mask=mask)
        by_hand = cls(0.4, logits=logits.masked_fill(~mask, -math.inf))
        z, same = (d.sample((6,), rng_state=rng_state(device=device)) for d in (ours, by_hand))
        assert torch.equal(z, same)
        assert torch.equal(ours.log_prob(z), by_hand.log_prob(z))
        density = ours.rsample() if cls is not gd.ExpGumbelSoftmax else ours.log_prob(z)
        (gradient,) = torch.autograd.grad((density * torch.randn_like(density)).sum(), kept)
        assert (gradient[~mask.expand_as(logits)] == 0).all()
        assert gradient[mask.expand_as(logits)].isfinite().all()
        probs = logits.softmax(-1)
        torch.testing.assert_close(
            cls(0.4, probs=probs, mask=mask).probs, ours.probs, check_dtype=False
        )
        name = cls.__name__
        for wrong, error in (
            (torch.ones(4, device=device, dtype=torch.bool), "must broadcast to the shape of log"),
            (torch.ones(2, 4, 3, 5, device=device, dtype=torch.bool), "must broadcast to the sh"),
        ):
            with pytest.raises(ValueError, match=f"{name}: mask {error}"):
                cls(0.4, logits=logits, mask=wrong)
        for wrong in (mask.float(), "all"):
            with pytest.raises(TypeError, match=f"{name}: mask must"):
                cls(0.4, logits=logits, mask=wrong)
        for given in ({"logits": logits}, {"probs": probs}):
            with pytest.raises(ValueError, match=f"^{name}: mask must allow a class in every row"):
                cls(0.4, mask=torch.zeros_like(mask), validate_args=True, **given)
        with pytest.raises(ValueError, match="satisfy the constraint"):
            cls(0.4, logits=torch.full((2, 3), -math.inf), validate_args=True)


@every_class
@pytest.mark.parametrize("validate", [True, False])
def test_values_of_other_types(cls, validate, device):
    """Whole numbers are values of discrete distributions alone."""
    ours = cls(0.5, logits=logits_for(cls, 3, device=device), validate_args=validate)
    value = torch.zeros(ours.param_shape, dtype=torch.long, device=device)
    value[..., :1] = 1
    others = [value.bool(), value.cfloat(), value.to(torch.float8_e4m3fn), value.to_sparse()]
    if cls in STRAIGHT_THROUGH:
        torch.testing.assert_close(ours.log_prob(value), ours.log_prob(value.to(ours.logits)))
    else:
        others.append(value)
    for wrong in others:
        with pytest.raises(
            TypeError, match=f"^{cls.__name__}: value must (have dtype|be a dense) [^\n]*$"
        ):
            ours.log_prob(wrong)


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
    gd.LogitBinaryConcrete: gumbel_ext.logit_binary_concrete,
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
    # A gate is the sigmoid of its log-odds by PyTorch's operations.
    rounding = 4 * eps(dtype) if cls is gd.BinaryConcrete else 0
    torch.testing.assert_close(y, expected, rtol=rounding, atol=rounding)
    assert torch.equal(ours.sample((8,), rng_state=state), y)
    assert not ours.sample((8,), rng_state=state).requires_grad
    weight = torch.randn(y.shape, device=device).to(dtype)
    got = torch.autograd.grad((y * weight).sum(), (logits, tau))
    of_all, of_tau = torch.autograd.grad((expected * weight).sum(), (same, tau))
    torch.testing.assert_close(got[0], of_all.sum(0), rtol=4 * rounding, atol=16 * rounding)
    torch.testing.assert_close(got[1], of_tau, rtol=4 * rounding, atol=64 * rounding)
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
    # Classes moved off the boundary are one more. Log-odds are made by PyTorch's operations.
    gates = cls in (gd.BinaryConcrete, gd.LogitBinaryConcrete)
    samples = {gd.GumbelSoftmax: 2, gd.BinaryConcrete: 11, gd.LogitBinaryConcrete: 6}.get(cls, 1)
    assert [n for n in forward.elements if n >= many] == samples * [many]
    # A straight-through sample keeps one copy of the leaf.
    assert sum(forward.elements) <= samples * many + 100 * 32 + 5 * logits.numel() + 100
    weight = torch.randn_like(y)
    with Allocated() as backward:
        torch.autograd.grad(y, logits, weight)
    most = 9 if gates else 6 if cls is gd.GumbelSoftmax else 1  # a clamp's derivative
    assert len([n for n in backward.elements if n >= many]) <= most


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
    for cls in (gd.BinaryConcrete, gd.LogitBinaryConcrete, gd.StraightThroughBinaryConcrete):
        ours = cls(0.5, probs=probs, validate_args=True)
        y = ours.rsample((100,))
        ends = (-math.inf, math.inf) if cls is gd.LogitBinaryConcrete else (0, 1)
        assert (y[:, 0] == ends[0]).all()
        assert (y[:, 2] == ends[1]).all()
        weighted = y.masked_fill(y.isinf(), 0.0) * torch.randn_like(y)
        (gradient,) = torch.autograd.grad(weighted.sum(), probs)
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
    if cls in LOG_SPACE:
        value = value.log() if cls in CATEGORICAL else value.logit()
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
    if cls is gd.LogitBinaryConcrete:
        d = scored_tau * (logits + noise) / tau - scored
        zero = torch.zeros_like(d)
        return scored_tau.log() - torch.logaddexp(d, zero) - torch.logaddexp(-d, zero)
    x = torch.log_softmax((logits + noise) / tau, -1)
    count = logits.shape[-1]
    constant = math.lgamma(count) + (count - 1) * scored_tau.log()
    return constant + torch.log_softmax(scored - scored_tau * x, -1).sum(-1)


@pytest.mark.parametrize("cls", LOG_SPACE, ids=lambda cls: cls.__name__)
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
    got = torch.stack([q.log_prob(z), p.log_prob(z)]).double()
    weight = torch.randn_like(got)
    gradients = torch.autograd.grad((got * weight).sum(), inputs)

    wide = [t.detach().double().requires_grad_() for t in inputs]
    draw = gumbel_ext.gumbel_noise if cls in CATEGORICAL else gumbel_ext.logistic_noise
    noise = draw(z.shape, dtype=torch.float64, device=device, rng_state=state)
    a, b, t = wide
    expected = torch.stack(
        [
            float64_density(cls, a, t[0], a, t[0], noise),
            float64_density(cls, a, t[0], b, t[1], noise),
        ]
    )
    assert got.isfinite().all()
    # What is scored is the logarithm that was returned, rounded.
    size = 10 * noise.abs().max() / tau
    allowed = 8 * eps(dtype) * size + 2 * eps(dtype) * expected.abs()
    assert ((got - expected).abs() <= allowed).all()
    for got_one, expected_one in zip(
        gradients, torch.autograd.grad((expected * weight).sum(), wide), strict=True
    ):
        scale = expected_one.abs().max()
        assert ((got_one.double() - expected_one).abs() <= 64 * eps(dtype) / tau * scale).all()


@pytest.mark.parametrize("cls", BOUNDED, ids=lambda cls: cls.__name__)
@every_dtype
@pytest.mark.parametrize("tau", [0.02, 0.1, 0.7])
def test_samples_stay_off_the_boundary(cls, dtype, tau, device, state):
    """Where the density is finite, and that of the value that the sample has."""
    logits = 2 * logits_for(cls, 400, dtype=dtype, device=device, classes=10)
    q = cls(tau, logits=logits.requires_grad_())
    z = q.rsample((3,), rng_state=state)
    exact = SAMPLERS[cls](logits.detach().expand_as(z), tau, rng_state=state)
    if tau == 0.02:
        assert ((exact == 0) | (exact == 1)).any()  # else nothing is shown
    assert torch.equal(q.sample((3,), rng_state=state), z)
    assert torch.allclose(z, exact, rtol=0, atol=4 * eps(dtype))
    assert q.support.check(z).all()
    p = cls(0.5, logits=torch.zeros_like(logits))
    for d in (q, p):
        density = d.log_prob(z)
        exact = cls(d.temperature, logits=d.logits.detach().double(), validate_args=False)
        assert density.isfinite().all()
        bound = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(
            density.double(), exact.log_prob(z.double()), rtol=bound, atol=10 * bound
        )
    if cls is gd.BinaryConcrete or dtype != torch.float16:  # where 1 / y overflows: see the page
        elbo = p.log_prob(z) - q.log_prob(z)
        (gradient,) = torch.autograd.grad((elbo * torch.randn_like(elbo)).sum(), logits)
        assert gradient.isfinite().all()


# Of an objective in y, relative to float64 in log space: docs/distributions.md has the figures.
SCORED_IN_Y = {
    (gd.GumbelSoftmax, 0.5): (1e-6, 1e-6),
    (gd.GumbelSoftmax, 0.2): (1e-6, 1e-6),
    (gd.GumbelSoftmax, 0.1): (0.05, 0.15),
    (gd.GumbelSoftmax, 0.05): (0.6, 1.02),
    (gd.BinaryConcrete, 0.5): (5e-6, 5e-6),
    (gd.BinaryConcrete, 0.2): (0.06, 2e-4),
    (gd.BinaryConcrete, 0.1): (0.2, 5e-4),
    (gd.BinaryConcrete, 0.05): (0.36, 1e-3),
}


@pytest.mark.parametrize(("cls", "tau"), SCORED_IN_Y, ids=lambda x: getattr(x, "__name__", str(x)))
def test_an_objective_scored_in_y_beside_log_space(cls, tau, device):
    def objective(cls, logits):
        q, p = (
            cls(t, logits=at, validate_args=False)
            for t, at in ((tau, logits), (0.5, torch.zeros_like(logits)))
        )
        z = q.rsample((20_000,), rng_state=torch.tensor([1, 2]))
        value = (q.log_prob(z) - p.log_prob(z)).mean(0).sum()
        return value.detach(), torch.autograd.grad(value, logits)[0].double()

    logits = torch.randn(10, generator=torch.Generator().manual_seed(0)).to(device)
    in_log_space = LOG_SPACE[BOUNDED.index(cls)]
    value, gradient = objective(in_log_space, logits.double().requires_grad_())
    for scored, bounds in ((cls, SCORED_IN_Y[cls, tau]), (in_log_space, (5e-6, 5e-6))):
        got, got_gradient = objective(scored, logits.clone().requires_grad_())
        assert abs(got - value) <= bounds[0] * abs(value)
        assert (got_gradient - gradient).norm() <= bounds[1] * gradient.norm()


def contexts(loss, x):
    """Value and gradient of ``loss`` at ``x``, by every way to have them."""

    def reverse(function):
        leaf = x.clone().requires_grad_()
        value = function(leaf)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    yield "eager", reverse(loss)
    torch._dynamo.reset()
    yield "compiled", reverse(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    yield "torch.func", torch.func.grad_and_value(loss)(x)[::-1]
    # Traced on another input, whose values must not stay in the program.
    example = torch.randn_like(x).requires_grad_()
    yield "jit.trace", reverse(torch.jit.trace(loss, (example,), check_trace=False))
    # With its gradient: since torch 2.14 such a graph has no detach().
    yield "make_fx", make_fx(torch.func.grad_and_value(loss))(example.detach())(x)[::-1]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("tau", [0.1, 0.5])
@pytest.mark.cpu_only(reason="one compiler is enough")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_an_elbo_is_the_same_in_every_context(cls, tau, state):
    scale = torch.randn(7, generator=torch.Generator().manual_seed(2))

    def loss(logits):
        q = cls(tau, logits=logits, validate_args=False)
        p = cls(0.5, logits=torch.zeros_like(logits), validate_args=False)
        z = q.rsample((7,), rng_state=state)
        kl = q.log_prob(z) - p.log_prob(z)
        return (kl.flatten(1).sum(-1) * scale).sum()

    logits = 2 * logits_for(cls, 30, 6, dtype=torch.float32)
    (_, (value, gradient)), *others = contexts(loss, logits)
    assert value.isfinite()
    assert gradient.isfinite().all()
    for name, (other_value, other_gradient) in others:
        for got, expected in ((other_value, value), (other_gradient, gradient)):
            scale_of = expected.abs().max()
            assert ((got - expected).abs() <= 1e-4 * scale_of).all(), name


@every_class
def test_log_prob_is_a_function_of_its_argument_alone(cls, device, state):
    """Whatever made the sample, and whatever changed it or its parameters since."""
    parameter = torch.nn.Parameter(logits_for(cls, 8, dtype=torch.float32, device=device))
    q = cls(0.2, logits=parameter, validate_args=False)
    z = q.rsample(rng_state=state)
    expected = q.log_prob(z)
    for same in (z.clone(), z.detach(), z[:], z.detach().requires_grad_()):
        assert torch.equal(q.log_prob(same), expected)

    # The gradient goes through z, where hooks see it.
    weight = torch.randn_like(expected)
    (through,) = torch.autograd.grad((expected * weight).sum(), z, retain_graph=True)
    seen = []
    z.register_hook(lambda gradient: seen.append(gradient) or torch.zeros_like(gradient))
    (direct,) = torch.autograd.grad((q.log_prob(z) * weight).sum(), parameter)
    assert torch.equal(seen[0], through)
    (alone,) = torch.autograd.grad((q.log_prob(z.detach()) * weight).sum(), parameter)
    torch.testing.assert_close(direct, alone)

    # Values, as they are now.
    other = q.sample(rng_state=rng_state(seed=77, device=device))
    want = q.log_prob(other)

    def by_numpy(held):
        held.numpy()[:] = other.numpy()

    writes = [
        lambda held: held.copy_(other),
        lambda held: held.data.copy_(other),
        lambda held: setattr(held, "data", other),
        lambda held: held.data.__setitem__(slice(None), other),
    ]
    for write in [*writes, by_numpy] if device == "cpu" else writes:
        held = q.sample(rng_state=state)
        q.log_prob(held)
        write(held)
        assert torch.equal(q.log_prob(held), want)

    # Parameters, as they are now.
    for kind in ("SGD", "Adam", "AdamW", "Adagrad"):
        held = q.sample(rng_state=state)
        parameter.grad = torch.randn_like(parameter)
        getattr(torch.optim, kind)([parameter], lr=0.1, fused=True).step()
        fresh = cls(0.2, logits=parameter.detach().clone(), validate_args=False)
        assert torch.equal(q.log_prob(held), fresh.log_prob(held))
    parameter.data.add_(1 + torch.randn_like(parameter))
    fresh = cls(0.2, logits=parameter.detach().clone(), validate_args=False)
    assert torch.equal(q.log_prob(held), fresh.log_prob(held))


@every_class
def test_samples_hold_no_graph(cls):
    """A buffer of samples keeps neither the network's activations nor its parameters alive."""
    inner = torch.randn(4, 3, requires_grad=True)
    hidden = inner * 2  # an activation
    q = cls(0.5, logits=hidden.exp())
    wide = q.expand((2, *q.batch_shape))
    samples = [q.sample(), q.sample((3,)), wide.sample(), q.mode.detach(), wide.sample((2,))]
    if cls in STRAIGHT_THROUGH:
        samples.append(q.enumerate_support())
    alive = [weakref.ref(t) for t in (hidden, q.logits)]
    del q, wide, hidden
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    assert not any(z.requires_grad for z in samples)


def test_values_on_the_boundary_have_the_limit(device):
    logits = torch.zeros(3, device=device)
    vertex = torch.tensor([1.0, 0.0, 0.0], device=device)
    for tau, limit in ((0.2, math.inf), (3.0, -math.inf)):
        assert gd.GumbelSoftmax(tau, logits=logits).log_prob(vertex) == limit
        assert (gd.BinaryConcrete(tau, logits=logits).log_prob(vertex) == -limit).sum() == 0
        ends = gd.BinaryConcrete(tau, logits=logits).log_prob(vertex)
        assert (ends == (math.inf if tau < 1 else -math.inf)).all()
    log_vertex = torch.tensor([0.0, -math.inf, -math.inf], device=device)
    assert gd.ExpGumbelSoftmax(0.2, logits=logits).log_prob(log_vertex) == -math.inf
    x = torch.tensor([math.inf, -math.inf, 0.0], device=device)
    density = gd.LogitBinaryConcrete(0.2, logits=logits).log_prob(x)
    assert (density[:2] == -math.inf).all()
    assert density[2].isfinite()


def test_a_prior_that_allows_what_the_sample_excludes(device):
    """The sample lies on a face of the prior's simplex, where the density is 0 or infinite."""
    excluding = torch.tensor([[0.0, -math.inf, 0.5], [0.0, 1.0, 2.0]], device=device)
    excluding.requires_grad_()
    q = gd.GumbelSoftmax(0.05, logits=excluding)
    z = q.rsample((50,))
    for tau, limit in ((0.2, math.inf), (3.0, -math.inf)):
        logits = torch.zeros(3, device=device, requires_grad=True)
        density = gd.GumbelSoftmax(tau, logits=logits).log_prob(z)
        assert (density[:, 0] == limit).all()
        assert density[:, 1].isfinite().all()
        inputs = (logits, excluding)
        for gradient in torch.autograd.grad(density[:, 1].sum(), inputs, retain_graph=True):
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
    of_other = (
        gd.StraightThroughGumbelSoftmax(9.0, logits=other),
        td.OneHotCategorical(logits=other),
        td.OneHotCategoricalStraightThrough(logits=other),
    )
    for q in of_other:
        torch.testing.assert_close(td.kl_divergence(ours, q), expected)
    for p in (theirs, td.OneHotCategoricalStraightThrough(logits=logits)):
        torch.testing.assert_close(td.kl_divergence(p, of_other[0]), expected)
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
    ours_of_other = gd.StraightThroughBinaryConcrete(9.0, logits=other)
    for q in (ours_of_other, td.Bernoulli(logits=other)):
        torch.testing.assert_close(td.kl_divergence(ours, q), expected)
    torch.testing.assert_close(td.kl_divergence(theirs, ours_of_other), expected)
    z = ours.rsample(rng_state=rng_state(device=device))
    (of_z,) = torch.autograd.grad(ours.log_prob(z).sum(), z, retain_graph=True)
    torch.testing.assert_close(of_z, logits)


def divergences(p, q):
    """Every pair of our class and torch's with these probabilities, and torch's own."""
    classes = p.shape[-1] > 1
    ours = gd.StraightThroughGumbelSoftmax if classes else gd.StraightThroughBinaryConcrete
    theirs = td.OneHotCategorical if classes else td.Bernoulli
    if not classes:
        p, q = p[..., 0], q[..., 0]
    expected = td.kl_divergence(*(theirs(probs=x, validate_args=False) for x in (p, q)))
    pairs = ((ours, ours), (ours, theirs), (theirs, ours))
    for kinds in pairs:
        yield (
            td.kl_divergence(
                *(
                    kind(0.5, probs=x) if kind is ours else kind(probs=x, validate_args=False)
                    for kind, x in zip(kinds, (p, q), strict=True)
                )
            ),
            expected,
        )


@pytest.mark.parametrize(
    ("p", "q"),
    [
        ([0.3, 0.7, 0.0], [0.5, 0.5, 0.0]),
        ([0.3, 0.7, 0.0], [0.5, 0.0, 0.5]),
        ([0.3, 0.7, 0.0], [0.2, 0.3, 0.5]),
        ([0.0], [0.0]),
        ([1.0], [1.0]),
        ([0.5], [0.0]),
        ([0.5], [1.0]),
        ([1.0], [0.25]),
    ],
    ids=str,
)
def test_divergences_where_a_probability_is_zero(p, q):
    """In 64 bits, where torch's clamp of a logarithm is nothing beside what is compared."""
    for got, expected in divergences(*(torch.tensor(x, dtype=torch.float64) for x in (p, q))):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


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
        maps = {gd.ExpGumbelSoftmax: torch.exp, gd.LogitBinaryConcrete: torch.sigmoid}
        x = maps.get(cls, torch.Tensor.clone)(z) @ weights
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


@every_class
def test_vmap_over_temperatures(cls, device, state):
    """A temperature an example, whose values nobody can look at."""
    logits = logits_for(cls, 5, 4, device=device)
    taus = torch.rand(5, dtype=logits.dtype, device=device) + 0.3

    def score(row, tau):
        d = cls(tau, logits=row)
        z = d.rsample(rng_state=state)
        return z, d.log_prob(z)

    both = torch.vmap(score)(logits, taus)
    for i in range(5):
        for got, expected in zip(both, score(logits[i], taus[i]), strict=True):
            torch.testing.assert_close(got[i], expected)


@every_class
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_sample_has_no_gradient(cls, state):
    def score(logits):
        d = cls(0.5, logits=logits, validate_args=False)
        return d.log_prob(d.sample(rng_state=state))

    logits = logits_for(cls, 4)
    traced = torch.jit.trace(score, (torch.randn_like(logits).requires_grad_(),))
    gradients = []
    for function in (score, traced):
        leaf = logits.clone().requires_grad_()
        density = function(leaf)
        weight = torch.arange(1.0, 1 + density.numel()).view_as(density)
        gradients.append(torch.autograd.grad((density * weight).sum(), leaf)[0])
    torch.testing.assert_close(*gradients)


@every_class
def test_temperatures_of_other_types(cls, device):
    logits = logits_for(cls, 3, device=device)
    assert cls(torch.tensor(1, device=device), logits=logits).sample().shape == logits.shape
    for wrong in (1j, True):
        with pytest.raises(TypeError, match=f"^{cls.__name__}: temperature must have dtype"):
            cls(torch.tensor(wrong), logits=logits)
    for wrong in (torch.tensor(0.5).to(torch.float8_e5m2), torch.ones(1).to_sparse()):
        with pytest.raises(TypeError, match=f"^{cls.__name__}: temperature must (have|be a dense)"):
            cls(wrong, logits=logits)


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
