"""Pyro takes the distributions as its own: sites, plates, to_event, masks, and SVI that learns."""

import math
import sys

import pytest
import torch

from gumbel_ext import distributions as gd

pyro = pytest.importorskip("pyro", reason="needs Pyro: pip install pyro-ppl")
from pyro import distributions as dist  # noqa: E402
from pyro import poutine  # noqa: E402
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO  # noqa: E402

CLASSES = (
    gd.GumbelSoftmax,
    gd.ExpGumbelSoftmax,
    gd.StraightThroughGumbelSoftmax,
    gd.BinaryConcrete,
    gd.StraightThroughBinaryConcrete,
)
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
    "cls", [gd.BinaryConcrete, gd.StraightThroughBinaryConcrete], ids=lambda cls: cls.__name__
)
def test_svi_finds_the_gates(cls):
    weights = torch.randn(6, 12)
    gates = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])

    def model():
        z = pyro.sample("z", cls(0.5, logits=torch.zeros(6)).to_event(1))
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


def test_without_pyro_there_are_no_methods_of_pyro(monkeypatch):
    d = of_batch(gd.GumbelSoftmax, 3)
    assert d.to_event(1).event_shape == (3, 5)
    monkeypatch.delitem(sys.modules, "pyro.distributions.torch_distribution")
    with pytest.raises(AttributeError, match="'GumbelSoftmax' object has no attribute 'to_event'"):
        d.to_event(1)
    assert not hasattr(d, "no_such_thing")
