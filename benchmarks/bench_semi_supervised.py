"""Time of a training step on images without labels against the number of classes -> one JSON file.

python benchmarks/bench_semi_supervised.py [--quick] [--threads N] [--output FILE]

The step of examples/semi_supervised.py, forward, backward and Adam, for a batch of 100 images, with
the sum over the K classes and with one Gumbel-softmax sample of the class (Jang et al. 2016, arXiv
1611.01144, section 4.3). Images are the examples' digits, whatever K is: time alone is measured.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
from example_steps import Steps, main
from timing import Call

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import semi_supervised as example
from digits import batches, load_binary_digits

BATCHES = 14
TAU = 0.5

CONTENDERS: dict[str, example.Unlabelled] = {
    "Gumbel-softmax, straight-through": example.sampled_straight_through,
    "Gumbel-softmax, soft": example.sampled_soft,
    "sum over the classes": example.marginalised,
}


@functools.cache
def inputs() -> torch.Tensor:
    images = load_binary_digits().x_train
    return torch.stack([images[batch] for batch in batches(len(images), example.BATCH, BATCHES, 0)])


def training_step(method: example.Unlabelled, classes: int) -> Call:
    torch.manual_seed(0)
    model = example.StyleAndClass(classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=example.LEARNING_RATE, fused=True)
    x = inputs()

    def step(i: int) -> None:
        optimizer.zero_grad()
        method(model, x[i], TAU).mean().backward()
        optimizer.step()

    return step


def contenders(classes: int) -> tuple[dict[str, Call], int]:
    race = {name: training_step(method, classes) for name, method in CONTENDERS.items()}
    return race, BATCHES


STEPS = Steps(
    name="semi-supervised",
    batch=example.BATCH,
    classes=(2, 5, 10, 20, 50, 100),
    quick_classes=(10, 100),
    contenders=contenders,
)

if __name__ == "__main__":
    sys.exit(main(STEPS, __doc__.splitlines()[0]))
