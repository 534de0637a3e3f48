"""A vector quantiser as in wav2vec 2.0, trained on patches of two photographs.

    python examples/vector_quantizer.py [--steps N] [--seed N] [--seeds N] [--threads N] [--out DIR]

An encoder makes a vector of each patch, of which a straight-through Gumbel-softmax sample chooses a
code from each of GROUPS codebooks, and a decoder makes the patch from the chosen codes' vectors
(Baevski et al. 2020, arXiv 2006.11477, section 2; the temperature falls from 2 to 0.5). The loss is
the squared error of the standardised pixels plus, times DIVERSITY_WEIGHT, the diversity loss

    (G V - sum_g exp(H(p_g))) / (G V),   p_g the mean of softmax(logits) of group g over the batch,

without which few codes may come into use. A test patch takes the codes of the largest logits.

The same model is trained with `gumbel_ext.nn.GumbelVectorQuantizer`, which looks up the rows, and
with what wav2vec 2.0's public code does: `F.gumbel_softmax`, times the codebook, summed over the
codes. benchmarks/cases/vector_quantizer.py measures the time of a step with each.

Data: the photographs china.jpg and flower.jpg that scikit-learn brings, 427 x 640 pixels, in
patches of 4 x 4 pixels of three colours; a fifth of them, chosen at random, is kept for the test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from digits import batches
from results import Column, Results, parse_arguments
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from gumbel_ext.nn import GumbelVectorQuantizer, QuantizedVectors
from gumbel_ext.temperature import ExponentialTemperature, TemperatureSchedule

SIDE = 4
PIXELS = SIDE * SIDE * 3

GROUPS = 2
CODES = 128
CODE_SIZE = 32  # of a group's vector
HIDDEN = 128

BATCH = 512
LEARNING_RATE = 2e-3
DIVERSITY_WEIGHT = 0.1
TAU_START, TAU_MIN = 2.0, 0.5
ANNEAL_UNTIL = 0.7  # of the training: from then on the temperature is TAU_MIN

SPLIT_SEED = 0

Lookup = Callable[[Tensor, Tensor], Tensor]
"""(one-hot (batch, groups, codes), codebook (groups, codes, size)) -> (batch, groups, size)."""


def multiply_and_sum(y: Tensor, codebook: Tensor) -> Tensor:
    """The chosen vectors by way of batch x codebook numbers in memory."""
    return (y.unsqueeze(-1) * codebook).sum(-2)


class CompositeQuantizer(nn.Module):
    """A quantiser's parameters in PyTorch's own operators: all codes take part in training."""

    def __init__(self, quantizer: GumbelVectorQuantizer, lookup: Lookup = multiply_and_sum) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.lookup = lookup

    def forward(self, x: Tensor) -> QuantizedVectors:
        """Returns what the quantiser does, with other noise; (batch, input_dim)."""
        own = self.quantizer
        if not self.training:
            evaluated: QuantizedVectors = own(x)
            return evaluated
        logits = own.weight_proj(x).unflatten(-1, (own.groups, own.num_vars))
        temperature = own.temperature
        assert isinstance(temperature, TemperatureSchedule)
        y = F.gumbel_softmax(logits, temperature.tau, hard=True)
        vectors = self.lookup(y, own.codevectors.view(own.groups, own.num_vars, -1))
        with torch.no_grad():
            code_perplexity = perplexity(y.mean(0)).sum()
        prob_perplexity = perplexity(logits.softmax(-1).mean(0)).sum()
        return QuantizedVectors(vectors.flatten(-2), y.argmax(-1), code_perplexity, prob_perplexity)


def perplexity(shares: Tensor) -> Tensor:
    """Returns exp(H) of each row of shares (groups, codes), which sum to 1: (groups,)."""
    of_groups: Tensor = torch.special.entr(shares).sum(-1).exp()
    return of_groups


@dataclass(frozen=True)
class Patches:
    """Standardised patches (patches, PIXELS), float32, and the standard deviation they had."""

    train: Tensor
    test: Tensor
    deviation: float  # of a pixel, where 1 is white


def load_patches() -> Patches:
    """Returns the patches to train on and to test on."""
    images = torch.stack([torch.tensor(image) for image in load_sample_images().images])
    images = images.float() / 255
    images = images[:, : images.shape[1] // SIDE * SIDE, : images.shape[2] // SIDE * SIDE]
    patches = images.unfold(1, SIDE, SIDE).unfold(2, SIDE, SIDE).reshape(-1, PIXELS)
    order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(SPLIT_SEED))
    patches = patches[order]
    kept = len(patches) // 5
    mean, deviation = patches[kept:].mean(), patches[kept:].std()
    patches = (patches - mean) / deviation
    return Patches(patches[kept:], patches[:kept], deviation.item())


class PatchCoder(nn.Module):
    """Encoder to vectors, quantiser, decoder from the chosen codes' vectors to pixels."""

    def __init__(
        self,
        temperature: TemperatureSchedule,
        codes: int = CODES,
        composite: Lookup | None = None,
    ) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN)
        )
        quantizer = GumbelVectorQuantizer(
            HIDDEN, codes, GROUPS, GROUPS * CODE_SIZE, temperature=temperature
        )
        # The unit normal weights of wav2vec 2.0 make certain choices of these vectors at once.
        nn.init.normal_(quantizer.weight_proj.weight, std=HIDDEN**-0.5)
        self.quantizer = CompositeQuantizer(quantizer, composite) if composite else quantizer
        self.decoder = nn.Sequential(
            nn.Linear(GROUPS * CODE_SIZE, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PIXELS)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, QuantizedVectors]:
        """Returns pixels (batch, PIXELS) and codes for patches (batch, PIXELS)."""
        quantized = self.quantizer(self.encoder(x))
        return self.decoder(quantized.codevectors), quantized


def training_loss(model: PatchCoder, x: Tensor, diversity_weight: float, codes: int) -> Tensor:
    """Returns squared error and diversity loss of a batch."""
    pixels, quantized = model(x)
    unused = (GROUPS * codes - quantized.prob_perplexity) / (GROUPS * codes)
    loss: Tensor = F.mse_loss(pixels, x) + diversity_weight * unused
    return loss


def train(
    composite: Lookup | None, diversity_weight: float, x_train: Tensor, steps: int, seed: int
) -> PatchCoder:
    """Returns the model after `steps` steps; weights, batches and samples are those of `seed`."""
    torch.manual_seed(seed)
    rate = math.log(TAU_START / TAU_MIN) / (ANNEAL_UNTIL * steps)
    schedule = ExponentialTemperature(rate, minimum=TAU_MIN, start=TAU_START)
    model = PatchCoder(schedule, composite=composite)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    for batch in batches(len(x_train), BATCH, steps, seed):
        loss = training_loss(model, x_train[batch], diversity_weight, CODES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def evaluate(model: PatchCoder, patches: Patches) -> dict[str, float]:
    """Returns the test error, and how the test patches use the codes."""
    pixels, quantized = model(patches.test)
    error = F.mse_loss(pixels, patches.test).item() * patches.deviation**2
    counts = F.one_hot(quantized.codes, CODES).sum(0).double()
    return {
        "psnr": -10 * math.log10(error),
        "perplexity": perplexity(counts / len(patches.test)).mean().item(),
        "used": 100 * (counts > 0).double().mean().item(),
    }


METHODS: dict[str, tuple[Lookup | None, float]] = {
    "GumbelVectorQuantizer": (None, DIVERSITY_WEIGHT),
    "F.gumbel_softmax, multiply and sum": (multiply_and_sum, DIVERSITY_WEIGHT),
    "GumbelVectorQuantizer, without the diversity loss": (None, 0.0),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Trains with every method and seed, prints the table, writes the file."""
    arguments = parse_arguments(
        "Gumbel vector quantiser on patches of photographs.", argv, steps=1500, seeds=3
    )
    patches = load_patches()
    results = Results(
        "vector_quantizer",
        [
            Column("psnr", "PSNR, dB", 2),
            Column("perplexity", f"perplexity, of {CODES}", 1),
            Column("used", "codes used, %", 1),
        ],
        arguments.seeds,
        {"steps": arguments.steps, "threads": arguments.threads},
    )
    for seed in results.each_seed(arguments.out):
        for name, (composite, weight) in METHODS.items():
            model = train(composite, weight, patches.train, arguments.steps, seed)
            results.add(name, **evaluate(model, patches))
    results.show()


if __name__ == "__main__":
    main()
