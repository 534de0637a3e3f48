"""What those who use F.gumbel_softmax and torch.distributions today rely on."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import integrate, stats
from torch import distributions, nn

import gumbel_ext

# ---- what PyTorch's own tests assert of F.gumbel_softmax ----------------------------------------

asserted = pytest.mark.feature(
    "PyTorch's own assertions", ops=("gumbel_softmax", "gumbel_softmax_hard"), modes=("eager",)
)


@asserted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [([5], 0), ([5], -1), ([5, 4], 1), ([5, 4, 3], 1), ([5, 4, 3], -1), ([5, 4, 3], 0)],
    ids=str,
)
def test_straight_through_shapes(device, shape, dim, dtype):
    """Rows of y are one-hot and the number of ones is the number of rows."""
    logits = torch.randn(shape).to(device, dtype)
    y = F.gumbel_softmax(logits, tau=1, hard=True, dim=dim)
    mine = gumbel_ext.gumbel_softmax(logits, tau=1, hard=True, dim=dim)
    assert mine.min() >= 0
    assert mine.shape == y.shape == logits.shape
    assert mine.sum() == y.sum() == math.prod(shape) // shape[dim]
    assert (mine.sum(dim) == 1).all()


@asserted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_straight_through_gradient_is_the_soft_one(device, dtype):
    """To an addition and a subtraction; weighted, since that of the sum of y is zero."""
    weight = torch.randn(10, 10, dtype=dtype, device=device)
    for logits in (torch.zeros_like(weight), torch.randn_like(weight)):
        gradients = []
        for hard in (False, True):
            leaf = logits.clone().requires_grad_()
            torch.manual_seed(4)
            (gumbel_ext.gumbel_softmax(leaf, hard=hard) * weight).sum().backward()
            gradients.append(leaf.grad)
        tolerance = 2 * torch.finfo(dtype).eps * weight.abs().max()
        assert (gradients[0] - gradients[1]).abs().max() <= tolerance
        assert gradients[0].abs().max() > 0.01


@asserted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_counts_follow_the_probabilities(device, dtype):
    """Two thousand trials; each class within 3.5 standard errors: alpha below 5e-3 for ten."""
    logits = torch.randn(1, 10).to(device, dtype)
    p = logits.double().softmax(-1).cpu()
    trials = 2000
    counts = torch.zeros(1, 10)
    for _ in range(trials):
        y = gumbel_ext.gumbel_softmax(logits, hard=True).cpu()
        assert y.min() >= 0
        counts += y
    assert counts.sum() == trials
    z = (counts - trials * p) / (trials * p * (1 - p)).sqrt()
    assert z.abs().max() < 3.5


def test_same_limits_as_the_original(device):
    """Both tend to softmax's behaviour: one-hot for small tau, even for large."""
    logits = torch.randn(50, 6).to(device)
    assert gumbel_ext.gumbel_softmax(logits, 1e-6).max(-1).values.min() > 0.999
    even = gumbel_ext.gumbel_softmax(logits, 1e6)
    torch.testing.assert_close(even, torch.full_like(even, 1 / 6), rtol=1e-4, atol=0)


# ---- torch.distributions ------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_density_of_two_classes(device, tau):
    """Samples have the density that RelaxedOneHotCategorical.log_prob gives (alpha = 1e-4)."""
    logits = torch.tensor([0.4, -0.3], dtype=torch.float64)
    torch.manual_seed(1)
    y = gumbel_ext.gumbel_softmax(logits.to(device).expand(20_000, 2), tau).cpu()
    relaxed = distributions.RelaxedOneHotCategorical(torch.tensor(tau).double(), logits=logits)

    # x = logit(y0) makes the density smooth on the line; dy0 = y0 (1 - y0) dx.
    x = torch.linspace(-40, 40, 8001, dtype=torch.float64)
    first = torch.sigmoid(x)
    second = torch.sigmoid(-x)
    density = relaxed.log_prob(torch.stack([first, second], -1)).exp() * first * second
    cumulative = integrate.cumulative_trapezoid(density.numpy(), x.numpy(), initial=0)
    assert cumulative[-1] == pytest.approx(1, abs=1e-6)
    sample = (y[:, 0].log() - y[:, 1].log()).numpy()
    uniform = np.interp(sample, x.numpy(), cumulative)
    assert stats.kstest(uniform, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_log_prob_of_many_classes(device, tau):
    """The mean log-density of our samples is that of the distribution's own (alpha = 1e-4)."""
    logits = torch.randn(6, dtype=torch.float64)
    relaxed = distributions.RelaxedOneHotCategorical(torch.tensor(tau).double(), logits=logits)
    draws = 20_000
    ours = gumbel_ext.gumbel_softmax(logits.to(device).expand(draws, 6), tau).cpu()
    a, b = relaxed.log_prob(ours), relaxed.log_prob(relaxed.sample((draws,)))
    assert a.isfinite().all()
    z = (a.mean() - b.mean()) / ((a.var() + b.var()) / draws).sqrt()
    assert z.abs() < stats.norm.isf(1e-4 / 2)


# ---- a quantiser --------------------------------------------------------------------------------


class Quantizer(nn.Module):
    """The shape of wav2vec 2.0's: groups of codes, hard samples, an annealed temperature."""

    def __init__(self, groups=2, codes=32, width=12):
        super().__init__()
        self.groups = groups
        self.project = nn.Linear(10, groups * codes)
        self.codes = nn.Parameter(torch.randn(groups * codes, width))

    def forward(self, x, tau):
        batch, time, _ = x.shape
        logits = self.project(x).view(batch * time * self.groups, -1)
        y = gumbel_ext.gumbel_softmax(logits.float(), tau=tau, hard=True).type_as(logits)
        y = y.view(batch * time, -1)
        vectors = (y.unsqueeze(-1) * self.codes).view(batch * time, self.groups, -1, 12).sum(-2)
        return vectors.view(batch, time, -1)


def test_quantizer_trains(device):
    torch.manual_seed(0)
    model = Quantizer().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    data = torch.randn(8, 20, 10, device=device)
    target = data.repeat(1, 1, 3)[..., :24]
    losses = []
    for i in range(60):
        loss = F.mse_loss(model(data, 2.0 * 0.97**i), target)
        optimizer.zero_grad()
        loss.backward()
        assert model.project.weight.grad.isfinite().all()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
