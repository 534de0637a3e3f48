"""Drawing from the relaxed categorical distribution, and a step of a variational objective."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.distributions import Distribution, RelaxedOneHotCategorical

from benchmarks.cases.family.case import FamilyCase, Place, Rows, launches
from benchmarks.timing import Call
from gumbel_ext.distributions import ExpGumbelSoftmax, GumbelSoftmax

TAU = 0.5
CACHE_BYTES = 64 << 20

# Shapes of the logits, and of the samples drawn of each.
WORK: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((100, 30, 10), ()),
    ((4096, 1024), ()),
    ((256, 128), (64,)),
)

Make = Callable[[Tensor], Distribution]


def peers(place: Place) -> dict[str, Make]:
    tau = torch.tensor(TAU, device=place)
    return {
        "GumbelSoftmax": lambda x: GumbelSoftmax(TAU, logits=x, validate_args=False),
        "ExpGumbelSoftmax": lambda x: ExpGumbelSoftmax(TAU, logits=x, validate_args=False),
        "torch RelaxedOneHotCategorical": lambda x: RelaxedOneHotCategorical(
            tau, logits=x, validate_args=False
        ),
    }


def draw(make: Make, shape: tuple[int, ...], logits: list[Tensor], i: int) -> object:
    with torch.no_grad():
        return make(logits[i]).rsample(shape)


def step(
    make: Make, shape: tuple[int, ...], logits: list[Tensor], weight: Tensor, i: int
) -> object:
    """Gradient of ``E[f(z) + log q(z)]`` in the logits, f a linear function of the sample."""
    q = make(logits[i])
    z = q.rsample(shape)
    loss = (z * weight).sum() + q.log_prob(z).sum()
    return torch.autograd.grad(loss, logits[i])


def contenders(
    training: bool, shape: tuple[int, ...], sample_shape: tuple[int, ...], place: Place
) -> tuple[dict[str, Call], int]:
    inputs = max(1, min(8, CACHE_BYTES // (4 * math.prod(shape))))
    logits = [
        torch.randn(shape, device=place).requires_grad_(training).clone() for _ in range(inputs)
    ]
    weight = torch.randn(sample_shape + shape, device=place)
    calls: dict[str, Call] = {}
    for name, make in peers(place).items():
        if training:
            calls[name] = partial(step, make, sample_shape, logits, weight)
        else:
            calls[name] = partial(draw, make, sample_shape, logits)
    return calls, inputs


def _case(
    training: bool, shape: tuple[int, ...], sample_shape: tuple[int, ...], quick: bool
) -> FamilyCase:
    return FamilyCase(
        page="distributions",
        op="rsample, log_prob, backward" if training else "rsample",
        shape=shape,
        dtype="float32",
        elements=math.prod(sample_shape + shape),
        contenders=partial(contenders, training, shape, sample_shape),
        variant=f"{sample_shape[0]} samples of each" if sample_shape else "",
        quick=quick,
    )


def cases() -> list[FamilyCase]:
    return [
        _case(training, shape, sample_shape, quick=shape != (4096, 1024))
        for training in (False, True)
        for shape, sample_shape in WORK
    ]


def gpu_cases(rows: Rows) -> list[FamilyCase]:
    made = []
    for training in (True, False):
        made.append(_case(training, (rows(16384), 1024), (), quick=True))
        made += launches(_case(training, (100, 30, 10), (), quick=training))
        made.append(_case(training, (rows(4096), 128), (rows(64),), quick=False))
    return made
