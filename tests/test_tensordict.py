"""The distributions in tensordict's modules, whose policies act by mode or at random."""

import pytest
import torch
from torch import distributions as td

from gumbel_ext import distributions as gd

tensordict = pytest.importorskip("tensordict", reason="needs tensordict: pip install tensordict")
from tensordict.nn import (  # noqa: E402
    InteractionType,
    ProbabilisticTensorDictModule,
    set_interaction_type,
)

PEERS = {
    gd.GumbelSoftmax: td.RelaxedOneHotCategorical,
    gd.BinaryConcrete: td.RelaxedBernoulli,
    gd.ExpGumbelSoftmax: None,
    gd.LogitBinaryConcrete: None,
    gd.StraightThroughGumbelSoftmax: None,
    gd.StraightThroughBinaryConcrete: None,
}
pytestmark = pytest.mark.cpu_only(reason="tensordict's side has no device")
every_class = pytest.mark.parametrize("cls", PEERS, ids=lambda cls: cls.__name__)


def act(cls, logits, how):
    module = ProbabilisticTensorDictModule(
        in_keys=["logits"],
        out_keys=["action"],
        distribution_class=cls,
        distribution_kwargs={"temperature": torch.tensor(0.5)},
        return_log_prob=True,
    )
    with set_interaction_type(how):
        return module(tensordict.TensorDict({"logits": logits}, [len(logits)]))["action"]


@every_class
@pytest.mark.parametrize("how", ["DETERMINISTIC", "MODE", "RANDOM"])
def test_every_way_to_act(cls, how):
    logits = torch.randn(5, 3)
    action = act(cls, logits, InteractionType[how])
    assert action.shape == logits.shape
    if how == "RANDOM":
        return
    assert torch.equal(action, cls(0.5, logits=logits).mode)
    if PEERS[cls] is not None:
        theirs = act(PEERS[cls], logits, InteractionType.DETERMINISTIC)
        assert torch.equal(action, theirs.to(action))


@every_class
def test_a_sample_overwritten_by_its_decision_keeps_its_gradient(cls):
    """As agents do: a relaxed sample becomes one-hot in its memory, behind autograd's back."""
    if cls is gd.ExpGumbelSoftmax:
        pytest.skip("a logarithm is not overwritten by a decision")
    logits = torch.randn(6, 4, requires_grad=True)
    weight = torch.randn(6, 4)
    gradients = []
    for overwrite in (False, True):
        torch.manual_seed(0)
        action = cls(1.0, logits=logits).rsample()
        if overwrite:
            action.data.copy_(action == action.amax(-1, keepdim=True))
        gradients.append(torch.autograd.grad((action * weight).sum(), logits)[0])
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)
