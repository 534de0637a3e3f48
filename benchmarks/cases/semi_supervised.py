"""A training step on images without labels against the number of classes.

The step of examples/semi_supervised.py, forward, backward and Adam, for a batch of 100 images, with
the sum over the K classes and with one Gumbel-softmax sample of the class (Jang et al. 2016, arXiv
1611.01144, section 4.3). Images are the examples' digits, whatever K is: time alone is measured.
"""

from __future__ import annotations

import functools

import torch

from benchmarks.steps import Steps
from benchmarks.timing import Call

import semi_supervised as example  # isort: skip
from digits import batches, load_binary_digits  # isort: skip

THREADS = 1
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


STEPS = Steps(
    batch=example.BATCH,
    classes=(2, 5, 10, 20, 50, 100),
    quick_classes=(10, 100),
    inputs=BATCHES,
    contenders={
        name: functools.partial(training_step, method) for name, method in CONTENDERS.items()
    },
)
about, cases, measure = STEPS.about, STEPS.cases, STEPS.measure
