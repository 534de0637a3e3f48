"""Relaxed Bernoulli samples, beside torch.distributions and the equation in PyTorch's ops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gumbel_ext
from benchmarks import environment
from benchmarks.cases.family.case import FamilyCase, Place, Rows, launches
from benchmarks.compiled import compiled
from benchmarks.timing import Call

FORWARD, HARD, TRAIN, NOISE, DENSITY = (
    "sample",
    "straight-through sample",
    "sample + backward",
    "noise",
    "log density",
)
TAU = 0.5
SHAPE = (65536, 64)
# Tensors of the size of the logits that an operator must read and write at least.
TENSORS_MOVED = {FORWARD: 2, HARD: 2, TRAIN: 5, NOISE: 1, DENSITY: 2}


def cases() -> list[FamilyCase]:
    """The page's table."""
    table = [
        _case(op, SHAPE, dtype, quick=op == FORWARD)
        for op in (FORWARD, HARD, TRAIN)
        for dtype in ("float32", "bfloat16")
    ]
    table += [_case(FORWARD, (128, 8), "float32"), _case(TRAIN, (128, 8), "float32")]
    return [*table, _case(NOISE, SHAPE, "float32"), _case(DENSITY, SHAPE, "float32")]


def gpu_cases(rows: Rows) -> list[FamilyCase]:
    table = []
    for op in (FORWARD, HARD, TRAIN):
        quick = op != HARD
        table.append(_case(op, (rows(65536), 64), "float32", quick))
        table.append(_case(op, (rows(16384), 1024), "bfloat16", quick))
        table += launches(_case(op, (128, 8), "float32", quick))
        table.append(_case(op, (rows(16384), 1024), "float32"))
        table.append(_case(op, (rows(4096), 32_000), "bfloat16"))
    return table + [_case(op, (rows(16384), 1024), "float32") for op in (NOISE, DENSITY)]


def _case(op: str, shape: tuple[int, ...], dtype: str, quick: bool = False) -> FamilyCase:
    return FamilyCase(
        page="binary-concrete",
        op=op,
        shape=shape,
        dtype=dtype,
        elements=math.prod(shape),
        contenders=lambda place: _contenders(op, shape, getattr(torch, dtype), place),
        quick=quick,
        bytes_moved=TENSORS_MOVED[op] * math.prod(shape) * getattr(torch, dtype).itemsize,
    )


def _composite(logits: Tensor) -> Tensor:
    return torch.sigmoid((logits + torch.logit(torch.rand_like(logits))) / TAU)


def _straight_through(logits: Tensor) -> Tensor:
    y = _composite(logits)
    return (y > 0.5).to(y.dtype) + (y - y.detach())


def _density(x: Tensor) -> Tensor:
    return gumbel_ext.binary_concrete_log_prob(torch.sigmoid(x), x, TAU)


def _functions(op: str, dtype: torch.dtype, place: Place) -> dict[str, Callable[[Tensor], Tensor]]:
    if op == NOISE:
        return {
            "gumbel_ext": lambda x: gumbel_ext.logistic_noise(
                x.shape, dtype=x.dtype, device=x.device
            ),
            "gumbel_ext.gumbel_noise": lambda x: gumbel_ext.gumbel_noise(
                x.shape, dtype=x.dtype, device=x.device
            ),
            "logit(rand)": lambda x: torch.logit(torch.rand_like(x)),
        }
    tau = torch.tensor(TAU, dtype=dtype, device=place)

    def distribution(logits: Tensor) -> torch.distributions.RelaxedBernoulli:
        return torch.distributions.RelaxedBernoulli(tau, logits=logits, validate_args=False)

    if op == DENSITY:
        return {
            "gumbel_ext": _density,
            "gumbel_ext, torch.compile": compiled(_density),
            "torch.distributions": lambda x: distribution(x).log_prob(torch.sigmoid(x)),
        }
    hard = op == HARD
    composite = _straight_through if hard else _composite
    race: dict[str, Callable[[Tensor], Tensor]] = {
        "gumbel_ext": lambda x: gumbel_ext.binary_concrete(x, TAU, hard),
    }
    if not hard:
        race["torch.distributions"] = lambda x: distribution(x).rsample()
    race["PyTorch"] = composite
    race["torch.compile"] = compiled(composite)
    return race


def _contenders(
    op: str, shape: tuple[int, ...], dtype: torch.dtype, place: Place
) -> tuple[dict[str, Call], int]:
    bytes_each = math.prod(shape) * dtype.itemsize
    count = min(64, max(2, math.ceil(2 * environment.last_level_cache() / bytes_each)))
    train = op == TRAIN
    options: dict[str, Any] = {"device": place, "dtype": dtype}
    logits = [torch.randn(shape, **options).requires_grad_(train).clone() for _ in range(count)]
    grads = [torch.randn(shape, **options) for _ in range(count)]

    def bind(function: Callable[[Tensor], Tensor]) -> Call:
        if train:
            return lambda i: torch.autograd.grad(function(logits[i]), logits[i], grads[i])
        return lambda i: function(logits[i])

    return {name: bind(f) for name, f in _functions(op, dtype, place).items()}, count
