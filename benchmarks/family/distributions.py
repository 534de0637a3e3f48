"""Drawing from the relaxed categorical distribution, and a step of a variational objective."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from timing import Call
from torch import Tensor
from torch.distributions import Distribution, RelaxedOneHotCategorical

from family.case import FamilyCase
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
PEERS: dict[str, Make] = {
    "GumbelSoftmax": lambda logits: GumbelSoftmax(TAU, logits=logits, validate_args=False),
    "ExpGumbelSoftmax": lambda logits: ExpGumbelSoftmax(TAU, logits=logits, validate_args=False),
    "torch RelaxedOneHotCategorical": lambda logits: RelaxedOneHotCategorical(
        torch.tensor(TAU), logits=logits, validate_args=False
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
    training: bool, shape: tuple[int, ...], sample_shape: tuple[int, ...]
) -> tuple[dict[str, Call], int]:
    inputs = max(1, min(8, CACHE_BYTES // (4 * math.prod(shape))))
    logits = [torch.randn(shape, requires_grad=training) for _ in range(inputs)]
    weight = torch.randn(sample_shape + shape)
    calls: dict[str, Call] = {}
    for name, make in PEERS.items():
        if training:
            calls[name] = partial(step, make, sample_shape, logits, weight)
        else:
            calls[name] = partial(draw, make, sample_shape, logits)
    return calls, inputs


def cases() -> list[FamilyCase]:
    return [
        FamilyCase(
            page="distributions",
            op="rsample, log_prob, backward" if training else "rsample",
            shape=shape,
            dtype="float32",
            elements=math.prod(sample_shape + shape),
            contenders=partial(contenders, training, shape, sample_shape),
            variant=f"{sample_shape[0]} samples of each" if sample_shape else "",
            quick=shape != (4096, 1024),
        )
        for training in (False, True)
        for shape, sample_shape in WORK
    ]
