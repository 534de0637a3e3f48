"""Pyro takes the distributions as its own: sites, plates, to_event, masks, and SVI that learns."""

import math
import sys

import pytest
import torch

from gumbel_ext import distributions as gd

pyro = pytest.importorskip("pyro", reason="needs Pyro: pip install pyro-ppl")
from pyro import distributions as dist  # noqa: E402
from pyro import poutine  # noqa: E402
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO, TraceMeanField_ELBO  # noqa: E402
from pyro.infer.reparam import AutoReparam, GumbelSoftmaxReparam  # noqa: E402

CLASSES = (
    gd.GumbelSoftmax,
    gd.ExpGumbelSoftmax,
    gd.StraightThroughGumbelSoftmax,
    gd.BinaryConcrete,
    gd.LogitBinaryConcrete,
    gd.StraightThroughBinaryConcrete,
)
RELAXED = (gd.GumbelSoftmax, gd.ExpGumbelSoftmax, gd.BinaryConcrete, gd.LogitBinaryConcrete)
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
pytestmark = pytest.mark.cpu_only(reason="Pyro's side has no device")


@pytest.fixture(autouse=True)
def fresh_parameters():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def of_batch(cls, *batch):
    event = (5,) * cls.support.event_dim
    return cls(0.7, logits=torch.randn((*batch, *event)))


@every_class
def test_sites_have_the_shapes_of_pyros_own(cls):
    d = of_batch(cls, 4, 3)
    event = tuple(d.event_shape)
    assert pyro.sample("outside of inference", d).shape == (4, 3, *event)
    assert d.shape((2,)) == (2, 4, 3, *event)

    def model():
        with pyro.plate("plate of rows", 4, dim=-1):
            pyro.sample("joint", d.to_event(1))
            pyro.sample("masked", of_batch(cls, 4).mask(torch.arange(4) < 2))
            pyro.sample("widened", of_batch(cls))
        with pyro.plate("outer plate", 4, dim=-2), pyro.plate("inner plate", 3, dim=-1):
            pyro.sample("both", d)
        pyro.sample("by", of_batch(cls).expand_by([6]).to_event(1))

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    shapes = {
        name: (tuple(site["value"].shape), tuple(site["log_prob"].shape))
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and "plate" not in name
    }
    assert shapes == {
        "joint": ((4, 3, *event), (4,)),
        "masked": ((4, *event), (4,)),
        "widened": ((4, *event), (4,)),
        "both": ((4, 3, *event), (4, 3)),
        "by": ((6, *event), ()),
    }
    assert (trace.nodes["masked"]["log_prob"][2:] == 0).all()


@every_class
def test_score_parts_are_those_of_a_reparameterised_distribution(cls):
    d = of_batch(cls, 3)
    z = d.rsample()
    parts = d.score_parts(z)
    assert torch.equal(parts.entropy_term, parts.log_prob)
    assert parts.score_function == 0
    without = of_batch(cls, 3).has_rsample_(False)
    assert not without().requires_grad
    assert torch.equal(*(without.score_parts(without())[i] * 0 for i in (0, 1)))


TARGET = torch.tensor([0, 2, 1, 2, 0, 1, 1, 2])


def clusters(count):
    """Points around three centres; their clusters are to be found."""
    centres = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 4.0]])
    labels = TARGET.repeat(count // 8)
    return centres, centres[labels] + 0.3 * torch.randn(count, 2), labels


@pytest.mark.parametrize(
    "cls",
    [gd.GumbelSoftmax, gd.ExpGumbelSoftmax, gd.StraightThroughGumbelSoftmax],
    ids=lambda cls: cls.__name__,
)
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_svi_finds_the_clusters(cls, elbo):
    """At tau = 0.1 samples have entries that underflow, where a naive density is not finite."""
    centres, data, labels = clusters(40)

    def model(data):
        with pyro.plate("points", len(data)):
            z = pyro.sample("z", cls(0.5, logits=torch.zeros(3)))
            z = z.exp() if cls is gd.ExpGumbelSoftmax else z
            pyro.sample("x", dist.Normal(z @ centres, 0.5).to_event(1), obs=data)

    def guide(data):
        logits = pyro.param("logits", torch.zeros(len(data), 3))
        with pyro.plate("points", len(data)):
            pyro.sample("z", cls(0.1, logits=logits))

    estimator = elbo(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.2}), estimator)
    losses = []
    for _ in range(60):
        losses.append(svi.step(data))
        assert math.isfinite(losses[-1])
        assert pyro.param("logits").isfinite().all()
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    assert (pyro.param("logits").argmax(-1) == labels).double().mean() > 0.9


@pytest.mark.parametrize(
    "cls",
    [gd.BinaryConcrete, gd.LogitBinaryConcrete, gd.StraightThroughBinaryConcrete],
    ids=lambda cls: cls.__name__,
)
def test_svi_finds_the_gates(cls):
    weights = torch.randn(6, 12)
    gates = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])

    def model():
        z = pyro.sample("z", cls(0.5, logits=torch.zeros(6)).to_event(1))
        z = z.sigmoid() if cls is gd.LogitBinaryConcrete else z
        pyro.sample("x", dist.Normal(z @ weights, 0.5).to_event(1), obs=gates @ weights)

    def guide():
        logits = pyro.param("logits", torch.zeros(6))
        pyro.sample("z", cls(0.1, logits=logits).to_event(1))

    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), elbo)
    losses = [svi.step() for _ in range(80)]
    assert all(map(math.isfinite, losses))
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    assert ((pyro.param("logits") > 0) == (gates > 0)).all()


@every_class
@pytest.mark.parametrize("batch", [(), (3,), (2, 1, 3)], ids=str)
def test_shapes_are_inferred_from_those_of_the_arguments(cls, batch):
    event = (5,) * cls.support.event_dim
    logits = torch.zeros((*batch, *event))
    for tau in (0.5, torch.tensor(0.5), torch.ones(4, 1, 1, 1, *[1] * len(event))):
        d = cls(tau, logits=logits)
        shape = tau.shape if isinstance(tau, torch.Tensor) else ()
        for given in ("logits", "probs"):
            inferred = cls.infer_shapes(temperature=shape, **{given: logits.shape})
            assert inferred == (d.batch_shape, d.event_shape)
    assert cls.infer_shapes(logits=logits.shape) == (batch, event)
    with pytest.raises(ValueError, match=f"{cls.__name__}: exactly one of probs and logits"):
        cls.infer_shapes(temperature=())


@pytest.mark.parametrize("how", ["by name", "automatic"])
def test_reparametrisers_take_it_for_the_relaxed_categorical(how):
    def model():
        with pyro.plate("rows", 20_000):
            pyro.sample("z", gd.GumbelSoftmax(0.7, logits=logits))

    logits = torch.tensor([0.5, -1.0, 0.2], requires_grad=True)
    config = AutoReparam() if how == "automatic" else {"z": GumbelSoftmaxReparam()}
    trace = poutine.trace(poutine.reparam(model, config)).get_trace()
    assert "z_uniform" in trace.nodes
    plain = poutine.trace(model).get_trace()
    moments = [
        torch.stack([z.mean(0), z.square().mean(0)])
        for z in (trace.nodes["z"]["value"], plain.nodes["z"]["value"])
    ]
    torch.testing.assert_close(*moments, atol=0.02, rtol=0)
    weight = torch.randn_like(moments[0])
    gradients = [torch.autograd.grad((m * weight).sum(), logits)[0] for m in moments]
    torch.testing.assert_close(*gradients, atol=0.05, rtol=0)
    assert isinstance(gd.BinaryConcrete(0.5, logits=0.0), dist.RelaxedBernoulli)
    assert not isinstance(gd.ExpGumbelSoftmax(0.5, logits=logits), dist.RelaxedOneHotCategorical)


@every_class
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_compiled_elbo_scores_the_data_it_is_given(cls):
    prior = of_batch(cls, 3)

    def model(data):
        pyro.sample("x", prior.to_event(1), obs=data)

    def guide(data):
        pass

    compiled, plain = JitTrace_ELBO(), Trace_ELBO()
    for _ in range(3):
        data = of_batch(cls, 3).sample()
        loss = compiled.loss(model, guide, data)
        assert loss == pytest.approx(plain.loss(model, guide, data), rel=1e-5)
        assert loss == pytest.approx(-prior.log_prob(data).sum().item(), rel=1e-5)


@pytest.mark.parametrize("cls", RELAXED, ids=lambda cls: cls.__name__)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_compiled_elbo_learns(cls):
    def over(tau, logits):
        d = cls(tau, logits=logits)
        return d.to_event(2 - len(d.event_shape))

    def model():
        pyro.sample("z", over(0.5, torch.zeros(4, 5)))

    def guide():
        start = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
        pyro.sample("z", over(0.2, pyro.param("logits", 2 * start)))

    elbo = JitTrace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), elbo)
    losses = [svi.step() for _ in range(60)]
    assert all(map(math.isfinite, losses))
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@pytest.mark.parametrize("gates", [False, True], ids=["classes", "gates"])
def test_straight_through_guides_learn_by_the_analytic_divergence(gates):
    """TraceMeanField_ELBO: no sample is in the objective, and so no noise in its gradient."""
    target = torch.tensor(0.25) if gates else torch.full((4,), 0.25)

    def model():
        pyro.sample("z", dist.Bernoulli(target) if gates else dist.OneHotCategorical(target))

    def guide():
        logits = pyro.param("logits", torch.tensor(0.4) if gates else torch.arange(4.0))
        cls = gd.StraightThroughBinaryConcrete if gates else gd.StraightThroughGumbelSoftmax
        pyro.sample("z", cls(0.1, logits=logits))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), TraceMeanField_ELBO())
    for _ in range(300):
        svi.step()
    logits = pyro.param("logits")
    found = logits.sigmoid() if gates else logits.softmax(-1)
    torch.testing.assert_close(found, target, atol=0.01, rtol=0)


def test_without_pyro_there_are_no_methods_of_pyro(monkeypatch):
    d = of_batch(gd.GumbelSoftmax, 3)
    assert d.to_event(1).event_shape == (3, 5)
    monkeypatch.delitem(sys.modules, "pyro.distributions.torch_distribution")
    with pytest.raises(AttributeError, match="'GumbelSoftmax' object has no attribute 'to_event'"):
        d.to_event(1)
    assert not hasattr(d, "no_such_thing")
