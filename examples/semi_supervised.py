"""Handwritten digits with few labels: a sampled class against the sum over all classes.

    python examples/semi_supervised.py [--steps N] [--seed N] [--seeds N] [--threads N] [--out DIR]

The model of Kingma et al. 2014 (arXiv 1406.5298, "M2"): an image x comes from a class y, uniform
over K, and a style z ~ N(0, I), through p(x|y,z); q(y|x) is the classifier, q(z|x,y) Gaussian. With

    L(x, y) = E_q(z|x,y)[-log p(x|y,z)] + KL(q(z|x,y) || N(0, I)) + log K,

an image with a label costs L(x, y), and CLASSIFIER_WEIGHT times -log q(y|x); one without costs

    U(x) = sum_y q(y|x) L(x, y) - H(q(y|x)).

The sum needs K passes through encoder and decoder. Jang et al. 2016 (arXiv 1611.01144, section 4.3)
replace it by one pass at a Gumbel-softmax sample of q(y|x). Here are both, the sample soft and
straight-through, and the classifier alone, trained on the labelled images only.
benchmarks/cases/semi_supervised.py measures the time of a training step against K.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from categorical_vae import ANNEAL_UNTIL, perceptron, temperature
from digits import (
    CLASSES,
    PIXELS,
    Digits,
    batches,
    load_binary_digits,
    negative_log_likelihood,
)
from results import Column, Results, parse_arguments
from torch import Tensor, nn

import gumbel_ext

STYLES = 8
BATCH = 100
LABELS_PER_CLASS = 5
LEARNING_RATE = 1e-3
CLASSIFIER_WEIGHT = 20.0
TEST_SEED = 1


class StyleAndClass(nn.Module):
    """q(y|x), q(z|x,y) and p(x|y,z) with `classes` classes; y is one-hot, or a relaxed sample."""

    def __init__(self, classes: int = CLASSES, hidden: int = 128) -> None:
        super().__init__()
        self.classes = classes
        self.classifier = perceptron(PIXELS, hidden, classes)
        self.encoder = perceptron(PIXELS + classes, hidden, 2 * STYLES)
        self.decoder = perceptron(STYLES + classes, hidden, PIXELS)

    def bound(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns L(x, y) with one sample of z: (...) for x (..., PIXELS), y (..., classes)."""
        mean, log_variance = self.encoder(torch.cat([x, y], -1)).chunk(2, -1)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)
        pixel_logits = self.decoder(torch.cat([z, y], -1))
        bound: Tensor = negative_log_likelihood(pixel_logits, x) + kl + math.log(self.classes)
        return bound


Unlabelled = Callable[[StyleAndClass, Tensor, float], Tensor]
"""(model, x, tau) -> U(x) or an estimate of it, (batch,)."""


def negative_entropy(logits: Tensor) -> Tensor:
    """Returns -H(q(y|x)) in nats: (batch,)."""
    log_q = F.log_softmax(logits, -1)
    return (log_q.exp() * log_q).sum(-1)


def marginalised(model: StyleAndClass, x: Tensor, tau: float) -> Tensor:
    """The sum over the classes, as one batch of classes x images; the temperature has no effect."""
    logits = model.classifier(x)
    q = F.softmax(logits, -1)
    each = torch.eye(model.classes, dtype=x.dtype).unsqueeze(1).expand(-1, len(x), -1)
    bounds = model.bound(x.expand(model.classes, *x.shape), each)
    return (q.T * bounds).sum(0) + negative_entropy(logits)


def sampled_soft(model: StyleAndClass, x: Tensor, tau: float) -> Tensor:
    """L at a Gumbel-softmax sample of q(y|x)."""
    logits = model.classifier(x)
    y = gumbel_ext.gumbel_softmax(logits, tau)
    return model.bound(x, y) + negative_entropy(logits)


def sampled_straight_through(model: StyleAndClass, x: Tensor, tau: float) -> Tensor:
    """L at a one-hot sample of q(y|x), with the straight-through gradient."""
    logits = model.classifier(x)
    y = gumbel_ext.gumbel_softmax(logits, tau, hard=True)
    return model.bound(x, y) + negative_entropy(logits)


METHODS: dict[str, Unlabelled | None] = {
    "classifier alone, labelled images only": None,
    "sum over the classes": marginalised,
    "Gumbel-softmax, soft": sampled_soft,
    "Gumbel-softmax, straight-through": sampled_straight_through,
}


def choose_labelled(labels: Tensor, seed: int) -> Tensor:
    """Returns the positions of LABELS_PER_CLASS images of every class."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    chosen = [order[labels[order] == label][:LABELS_PER_CLASS] for label in range(CLASSES)]
    return torch.cat(chosen)


def train(method: Unlabelled | None, digits: Digits, steps: int, seed: int) -> StyleAndClass:
    """Returns the model after `steps` steps; `seed` chooses the labelled images, too."""
    torch.manual_seed(seed)
    model = StyleAndClass()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    labelled = choose_labelled(digits.labels_train, seed)
    x_labelled, labels = digits.x_train[labelled], digits.labels_train[labelled]
    y_labelled = F.one_hot(labels, CLASSES).to(x_labelled.dtype)
    for step, batch in enumerate(batches(len(digits.x_train), BATCH, steps, seed)):
        loss = CLASSIFIER_WEIGHT * F.cross_entropy(model.classifier(x_labelled), labels)
        if method is not None:
            # The bound counts fully only when the labels have given the classes their meaning.
            weight = min(1.0, step / (ANNEAL_UNTIL * steps))
            tau = temperature(step, steps)
            unlabelled = method(model, digits.x_train[batch], tau).mean()
            loss = loss + weight * (unlabelled + model.bound(x_labelled, y_labelled).mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def test(model: StyleAndClass, digits: Digits) -> tuple[float, float]:
    """Returns the accuracy in percent and the mean of U(x) in nats, summed over the classes."""
    torch.manual_seed(TEST_SEED)
    right = model.classifier(digits.x_test).argmax(-1) == digits.labels_test
    return 100 * right.double().mean().item(), marginalised(model, digits.x_test, 1.0).mean().item()


def main(argv: Sequence[str] | None = None) -> None:
    """Trains with every method and seed, prints the table, writes the file."""
    arguments = parse_arguments("8x8 digits with few labels.", argv, steps=1500, seeds=5)
    digits = load_binary_digits()
    results = Results(
        "semi_supervised",
        [
            Column("accuracy", "test accuracy, %", 1),
            Column("test_nats", "test bound, nats", 2),
        ],
        arguments.seeds,
        {
            "steps": arguments.steps,
            "threads": arguments.threads,
            "labels": LABELS_PER_CLASS * CLASSES,
        },
    )
    for seed in results.each_seed(arguments.out):
        for name, method in METHODS.items():
            model = train(method, digits, arguments.steps, seed)
            accuracy, nats = test(model, digits)
            results.add(name, accuracy=accuracy)
            if method is not None:  # without, encoder and decoder are as they were
                results.add(name, test_nats=nats)
    results.show()


if __name__ == "__main__":
    main()
