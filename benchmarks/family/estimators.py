"""The estimators, forward and backward, beside their plain PyTorch versions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import gumbel_ext
from family.case import FamilyCase
from family.functions import INPUTS

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
        e = torch.empty(k, *p.shape).exponential_()
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
) -> FamilyCase:
    """Times per element are those of a draw."""

    def contenders() -> tuple[dict[str, Callable[[int], object]], int]:
        inputs = [torch.randn(shape).requires_grad_() for _ in range(INPUTS)]
        grad = torch.randn(shape)

        def call(function: Callable[[Tensor], Tensor]) -> Callable[[int], object]:
            def run(i: int) -> object:
                x = inputs[i % INPUTS]
                return torch.autograd.grad(function(x), x, grad)

            return run

        return {name: call(function) for name, function in functions.items()}, INPUTS

    elements = math.prod(shape) * draws
    return FamilyCase(PAGE, op, shape, "float32", elements, contenders, variant, quick)


def _draw_of_the_core(shape: tuple[int, ...], quick: bool) -> FamilyCase:
    """What a sample and its gradient cost, beside which a conditional draw stands."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "gumbel_ext": lambda x: gumbel_ext.gumbel_softmax(x, 0.5, hard=True),
        "F.gumbel_softmax": lambda x: torch.nn.functional.gumbel_softmax(x, 0.5, hard=True),
    }
    return _case("gumbel_softmax", functions, shape, "hard", quick=quick)


def _rao(shape: tuple[int, ...], k: int, tau: float, quick: bool) -> FamilyCase:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "gumbel_ext": lambda x: gumbel_ext.gumbel_rao(x, tau, k),
        "PyTorch": lambda x: _gumbel_rao(x, tau, k),
    }
    return _case("gumbel_rao", functions, shape, f"k = {k}, tau = {tau}", draws=k, quick=quick)


def cases() -> list[FamilyCase]:
    found = []
    for shape in SHAPES:
        quick = shape == SHAPES[0]
        found.append(_draw_of_the_core(shape, quick))
        found += [_rao(shape, k, 0.5, quick and k < 100) for k in (1, 10, 100)]
        # With a power that is not whole, which takes a logarithm and an exponential.
        found.append(_rao(shape, 100, 0.7, quick=False))
    for shape in SHAPES[:2]:
        quick = shape == SHAPES[0]
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
            found.append(_case(op, functions, shape, "", quick=quick))
    return found
