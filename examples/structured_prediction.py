"""The lower half of a handwritten digit, predicted from its upper half by stochastic hidden units.

    python examples/structured_prediction.py [--steps N] [--seed N] [--seeds N] [--threads N]
                                             [--out DIR]

The task of Raiko et al. 2014 (arXiv 1406.2989) and Jang et al. 2016 (arXiv 1611.01144, section
4.1). Two layers of stochastic units z lie between the upper half x (32 pixels) and the lower half y
(32 pixels), with linear maps between the layers, so that what is not linear is the sampling: 20
categorical variables of 10 classes in each, or 200 binary ones. Objective:

    -log 1/m sum_i p(y|z_i),   z_i drawn from p(z|x),

a bound on -log p(y|x) that tightens as m grows (Raiko et al., section 2). The models are trained
with m = 1 and m = 5 on soft or on straight-through samples; the temperature is annealed as in
examples/categorical_vae.py. They are tested with discrete samples, m = 1 and m = 1000.

A binary variable is a categorical one of two classes with the logits (l, 0): its Gumbel-softmax
sample is the binary concrete one, sigmoid((l + logistic noise) / tau) (Maddison et al. 2016, arXiv
1611.00712, appendix B), because the difference of two Gumbel variables is logistic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from categorical_vae import BATCH, temperature
from digits import PIXELS, batches, load_binary_digits, negative_log_likelihood
from results import Column, Results, parse_arguments
from torch import Tensor, nn

import gumbel_ext

HALF = PIXELS // 2
UNITS = 200
CLASSES = 10

LEARNING_RATE = 2e-3
TRAINING_SAMPLES = (1, 5)
TEST_SAMPLES = 1000
SAMPLES_AT_A_TIME = 50
TEST_SEED = 1


def sample_categorical(logits: Tensor, tau: float, hard: bool) -> Tensor:
    """Returns UNITS numbers, groups of CLASSES that each sum to 1."""
    grouped = logits.unflatten(-1, (-1, CLASSES))
    return gumbel_ext.gumbel_softmax(grouped, tau, hard).flatten(-2)


def sample_binary(logits: Tensor, tau: float, hard: bool) -> Tensor:
    """Returns UNITS numbers between 0 and 1; hard, each is 1 with probability sigmoid(logits)."""
    pairs = torch.stack([logits, torch.zeros_like(logits)], -1)
    return gumbel_ext.gumbel_softmax(pairs, tau, hard)[..., 0]


SAMPLERS = {"categorical": sample_categorical, "binary": sample_binary}


class StochasticNetwork(nn.Module):
    """Upper half -> two layers of stochastic units -> logits of the pixels of the lower half."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.sample = SAMPLERS[kind]
        self.first = nn.Linear(HALF, UNITS)
        self.second = nn.Linear(UNITS, UNITS)
        self.output = nn.Linear(UNITS, HALF)

    def forward(self, x: Tensor, samples: int, tau: float, hard: bool) -> Tensor:
        """Returns pixel logits, (samples, batch, HALF) for x of (batch, HALF)."""
        first = self.first(x)
        z = self.sample(first.expand(samples, *first.shape), tau, hard)
        z = self.sample(self.second(z), tau, hard)
        pixel_logits: Tensor = self.output(z)
        return pixel_logits


def multi_sample_loss(losses: Tensor) -> Tensor:
    """Returns -log 1/m sum_i p(y|z_i) in nats: (batch,) for losses -log p(y|z_i), (m, batch)."""
    return math.log(len(losses)) - (-losses).logsumexp(0)


def train(kind: str, hard: bool, samples: int, halves: Tensor, steps: int, seed: int) -> nn.Module:
    """Returns the network after `steps` steps; `halves` is (images, 2, HALF)."""
    torch.manual_seed(seed)
    network = StochasticNetwork(kind)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, fused=True)
    for step, batch in enumerate(batches(len(halves), BATCH, steps, seed)):
        x, y = halves[batch].unbind(1)
        pixel_logits = network(x, samples, temperature(step, steps), hard)
        loss = multi_sample_loss(negative_log_likelihood(pixel_logits, y)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


@torch.no_grad()
def test_losses(network: nn.Module, halves: Tensor, samples: int) -> tuple[float, float]:
    """Returns the mean loss in nats with one discrete sample and with `samples` of them."""
    x, y = halves.unbind(1)
    torch.manual_seed(TEST_SEED)
    pieces = []
    for done in range(0, samples, SAMPLES_AT_A_TIME):
        count = min(SAMPLES_AT_A_TIME, samples - done)
        pieces.append(negative_log_likelihood(network(x, count, 1.0, True), y))
    losses = torch.cat(pieces)
    # The mean over all samples is that of losses with one sample each.
    return losses.mean().item(), multi_sample_loss(losses).mean().item()


def main(argv: Sequence[str] | None = None) -> None:
    """Trains every network for every seed, prints the table, writes the file."""
    arguments = parse_arguments(
        "Lower half of 8x8 digits from the upper half, by stochastic units.", argv, 1200, seeds=3
    )
    digits = load_binary_digits()
    x_train, x_test = (x.unflatten(-1, (2, HALF)) for x in (digits.x_train, digits.x_test))
    results = Results(
        "structured_prediction",
        [
            Column("one", "test, 1 sample, nats", 2),
            Column("many", f"test, {TEST_SAMPLES} samples, nats", 2),
        ],
        arguments.seeds,
        {"steps": arguments.steps, "threads": arguments.threads},
    )
    rows = [
        (kind, hard, samples)
        for kind in SAMPLERS
        for samples in TRAINING_SAMPLES
        for hard in (False, True)
    ]
    for seed in results.each_seed(arguments.out):
        for kind, hard, samples in rows:
            network = train(kind, hard, samples, x_train, arguments.steps, seed)
            one, many = test_losses(network, x_test, TEST_SAMPLES)
            name = f"{kind}, {'straight-through' if hard else 'soft'}, trained with m = {samples}"
            results.add(name, one=one, many=many)
    results.show()


if __name__ == "__main__":
    main()
