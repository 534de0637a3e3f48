"""A training step of a vector quantiser against the number of codes.

The step of examples/vector_quantizer.py, forward, backward and Adam, for a batch of 512 patches:
with `gumbel_ext.nn.GumbelVectorQuantizer`, with the multiplication and sum of wav2vec 2.0's public
code, and with the one-hot sample times the codebook as a matrix product.
"""

from __future__ import annotations

import functools

import torch

from benchmarks.steps import Steps
from benchmarks.timing import Call
from gumbel_ext.temperature import LinearTemperature

import vector_quantizer as example  # isort: skip
from digits import batches  # isort: skip

THREADS = 1
BATCHES = 40
TAU = 0.5


def matrix_product(y: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return torch.bmm(y.transpose(0, 1), codebook).transpose(0, 1)


CONTENDERS: dict[str, example.Lookup | None] = {
    "GumbelVectorQuantizer": None,
    "F.gumbel_softmax, multiply and sum": example.multiply_and_sum,
    "F.gumbel_softmax, matrix product": matrix_product,
}


@functools.cache
def inputs() -> torch.Tensor:
    patches = example.load_patches().train
    order = batches(len(patches), example.BATCH, BATCHES, 0)
    return torch.stack([patches[batch] for batch in order])


def training_step(composite: example.Lookup | None, codes: int) -> Call:
    torch.manual_seed(0)
    model = example.PatchCoder(LinearTemperature(TAU, TAU, 1), codes, composite)
    optimizer = torch.optim.Adam(model.parameters(), lr=example.LEARNING_RATE, fused=True)
    x = inputs()

    def step(i: int) -> None:
        optimizer.zero_grad()
        example.training_loss(model, x[i], example.DIVERSITY_WEIGHT, codes).backward()
        optimizer.step()

    return step


STEPS = Steps(
    batch=example.BATCH,
    classes=(32, 64, 128, 320, 1024),
    quick_classes=(128, 320),
    inputs=BATCHES,
    contenders={
        name: functools.partial(training_step, composite) for name, composite in CONTENDERS.items()
    },
)
about, cases, measure = STEPS.about, STEPS.cases, STEPS.measure
