"""Time of a training step of a vector quantiser against the number of codes -> one JSON file.

python benchmarks/bench_vector_quantizer.py [--quick] [--threads N] [--output FILE]

The step of examples/vector_quantizer.py, forward, backward and Adam, for a batch of 512 patches:
with `gumbel_ext.nn.GumbelVectorQuantizer`, with the multiplication and sum of wav2vec 2.0's public
code, and with the one-hot sample times the codebook as a matrix product.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
from example_steps import Steps, main
from timing import Call

from gumbel_ext.temperature import LinearTemperature

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import vector_quantizer as example
from digits import batches

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


def contenders(codes: int) -> tuple[dict[str, Call], int]:
    race = {name: training_step(composite, codes) for name, composite in CONTENDERS.items()}
    return race, BATCHES


STEPS = Steps(
    name="vector-quantizer",
    batch=example.BATCH,
    classes=(32, 64, 128, 320, 1024),
    quick_classes=(128, 320),
    contenders=contenders,
)

if __name__ == "__main__":
    sys.exit(main(STEPS, __doc__.splitlines()[0]))
