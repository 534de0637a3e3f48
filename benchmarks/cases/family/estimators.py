"""The estimators, forward and backward, beside their plain PyTorch versions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

import gumbel_ext
from benchmarks.cases.family.case import FamilyCase, Place, Rows, launches
from benchmarks.cases.family.functions import INPUTS
from benchmarks.compiled import compiled

PAGE = "estimators"
SHAPES = ((1024, 128), (4000, 16), (64, 4096))


def _one_hot(p: Tensor) -> Tensor:
    index = torch.multinomial(p, 1)
    return torch.zeros_like(p).scatter_(-1, index, 1.0)


def _gumbel_rao(logits: Tensor, tau: float, k: int) -> Tensor:
    """All draws at once, as a tensor [k, rows, classes]."""
    with torch.no_grad():
        p = logits.softmax(-1)
        y = _one_hot(p)
        e = p.new_empty(k, *p.shape).exponential_()
        of_index = (e * y).sum(-1, keepdim=True)
        total = logits.logsumexp(-1, keepdim=True)
        phi = total - (e / p * (1 - y) + of_index).log()
        shift = phi - logits
    soft = ((logits + shift) / tau).softmax(-1).mean(0)
    return y + (soft - soft.detach())


def _zgr(logits: Tensor) -> Tensor:
    p = logits.softmax(-1)
    y = _one_hot(p.detach())
    log_p = (logits.log_softmax(-1) * y).sum(-1, keepdim=True)
    surrogate = 0.5 * (p + (y - p.detach()) * log_p)
    return y + (surrogate - surrogate.detach())


def _reinmax(logits: Tensor, tau: float) -> Tensor:
    p = logits.softmax(-1)
    y = _one_hot(p.detach())
    with torch.no_grad():
        half = (y + (logits / tau).softmax(-1)) / 2
        shift = half.log() - logits
    surrogate = 2 * (logits + shift).softmax(-1) - 0.5 * p
    return y + (surrogate - surrogate.detach())


def _gapped(logits: Tensor, tau: float, gap: float) -> Tensor:
    with torch.no_grad():
        y = _one_hot(logits.softmax(-1))
        top = logits.amax(-1, keepdim=True)
        shift = torch.where(y > 0, top, torch.minimum(logits, top - gap)) - logits
    soft = ((logits + shift) / tau).softmax(-1)
    return y + (soft - soft.detach())


def _case(
    op: str,
    functions: Mapping[str, Callable[[Tensor], Tensor]],
    shape: tuple[int, ...],
    variant: str,
    *,
    draws: int = 1,
    quick: bool,
    dtype: str = "float32",
) -> FamilyCase:
    """Times per element are those of a draw."""

    def contenders(place: Place) -> tuple[dict[str, Callable[[int], object]], int]:
        torch._dynamo.reset()
        options: dict[str, Any] = {"device": place, "dtype": getattr(torch, dtype)}
        inputs = [torch.randn(shape, **options).requires_grad_().clone() for _ in range(INPUTS)]
        grad = torch.randn(shape, **options)

        def call(function: Callable[[Tensor], Tensor]) -> Callable[[int], object]:
            def run(i: int) -> object:
                x = inputs[i % INPUTS]
                return torch.autograd.grad(function(x), x, grad)

            return run

        return {name: call(function) for name, function in functions.items()}, INPUTS

    elements = math.prod(shape) * draws
    return FamilyCase(PAGE, op, shape, dtype, elements, contenders, variant, quick)


def _draw_of_the_core(shape: tuple[int, ...], quick: bool) -> FamilyCase:
    """What a sample and its gradient cost, beside which a conditional draw stands."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "gumbel_ext": lambda x: gumbel_ext.gumbel_softmax(x, 0.5, hard=True),
        "F.gumbel_softmax": lambda x: torch.nn.functional.gumbel_softmax(x, 0.5, hard=True),
    }
    return _case("gumbel_softmax", functions, shape, "hard", quick=quick)


def _rao(
    shape: tuple[int, ...], k: int, tau: float, quick: bool, with_compile: bool = False
) -> FamilyCase:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "gumbel_ext": lambda x: gumbel_ext.gumbel_rao(x, tau, k),
        "PyTorch": lambda x: _gumbel_rao(x, tau, k),
    }
    if with_compile:
        functions["torch.compile"] = compiled(functions["PyTorch"])
    return _case("gumbel_rao", functions, shape, f"k = {k}, tau = {tau}", draws=k, quick=quick)


# The plain versions draw by torch.multinomial, which waits for the GPU to check its argument.
NOT_IN_GRAPHS = ("PyTorch", "torch.compile")


def _closed_forms(
    shape: tuple[int, ...], quick: bool, dtype: str = "float32", with_compile: bool = False
) -> Iterable[FamilyCase]:
    plain: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
        "zgr": (gumbel_ext.zgr, _zgr),
        "reinmax": (lambda x: gumbel_ext.reinmax(x, 1.0), lambda x: _reinmax(x, 1.0)),
        "gapped_straight_through": (
            lambda x: gumbel_ext.gapped_straight_through(x, 0.5, 1.0),
            lambda x: _gapped(x, 0.5, 1.0),
        ),
    }
    for op, (ours, theirs) in plain.items():
        functions = {"gumbel_ext": ours, "PyTorch": theirs}
        if with_compile:
            functions["torch.compile"] = compiled(theirs)
        yield _case(op, functions, shape, "", quick=quick, dtype=dtype)


def cases() -> list[FamilyCase]:
    found = []
    for shape in SHAPES:
        quick = shape == SHAPES[0]
        found.append(_draw_of_the_core(shape, quick))
        found += [_rao(shape, k, 0.5, quick and k < 100) for k in (1, 10, 100)]
        # With a power that is not whole, which takes a logarithm and an exponential.
        found.append(_rao(shape, 100, 0.7, quick=False))
    for shape in SHAPES[:2]:
        found += _closed_forms(shape, quick=shape == SHAPES[0])
    return found


def gpu_cases(rows: Rows) -> list[FamilyCase]:
    first = (rows(16384), 128)
    found = [_rao(first, k, 0.5, quick=k != 10, with_compile=True) for k in (100, 1, 10)]
    found.append(_draw_of_the_core(first, quick=True))
    found += _closed_forms((rows(16384), 1024), quick=True, with_compile=True)
    found += launches(_rao((128, 8), 10, 0.5, quick=True), *NOT_IN_GRAPHS)
    for case in _closed_forms((128, 8), quick=False):
        found += launches(case, *NOT_IN_GRAPHS)
    found.append(_rao(first, 100, 0.7, quick=False))
    for shape in ((rows(262_144), 16), (rows(1024), 4096)):
        found.append(_draw_of_the_core(shape, quick=False))
        found += [_rao(shape, k, 0.5, quick=False) for k in (1, 10, 100)]
    # Rows too long to hold.
    found.append(_rao((rows(512), 32_000), 10, 0.5, quick=False))
    found += _closed_forms((rows(262_144), 64), quick=False)
    found += _closed_forms((rows(4096), 32_000), quick=False, dtype="bfloat16")
    return found
