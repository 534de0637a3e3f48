"""Codebook lookup, forward and backward: gradients of logits and of the codebook."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import gumbel_ext
from benchmarks.cases.family.case import FamilyCase, Place, Rows, launches
from benchmarks.compiled import compiled
from benchmarks.timing import Call

# In turn, so that each call finds its logits outside the cache; one where they are that large.
_CACHE_BYTES = 64 << 20

Lookup = Callable[[Tensor, Tensor], Tensor]


def _case(
    shape: tuple[int, ...],
    book: tuple[int, ...],
    out: tuple[int, ...],
    variant: str,
    lookups: dict[str, Lookup],
    quick: bool,
) -> FamilyCase:
    elements = int(torch.Size(shape).numel())

    def contenders(place: Place) -> tuple[dict[str, Call], int]:
        torch._dynamo.reset()
        count = max(1, min(4, _CACHE_BYTES // (4 * elements)))
        inputs = [torch.randn(shape, device=place).requires_grad_().clone() for _ in range(count)]
        codebook = torch.rand(book, device=place).requires_grad_()
        grad = torch.randn(out, device=place)

        def call(lookup: Lookup) -> Call:
            def run(i: int) -> object:
                leaves = (inputs[i % count], codebook)
                return torch.autograd.grad(lookup(*leaves), leaves, grad)

            return run

        return {name: call(lookup) for name, lookup in lookups.items()}, count

    return FamilyCase(
        page="codebook",
        op="gumbel_embedding",
        shape=shape,
        dtype="float32",
        elements=elements,
        contenders=contenders,
        variant=variant,
        quick=quick,
        memory=True,
    )


def _wav2vec2(
    steps: int, groups: int, classes: int, width: int, quick: bool, with_compile: bool = False
) -> FamilyCase:
    """The quantiser's logits, a row for each step and group, and its codevectors."""

    def ours(logits: Tensor, codevectors: Tensor) -> Tensor:
        book = codevectors.view(groups, classes, width)
        return gumbel_ext.gumbel_embedding(logits.view(steps, groups * classes), book, 2.0)

    def one_hot(logits: Tensor, codevectors: Tensor) -> Tensor:
        y = F.gumbel_softmax(logits, tau=2.0, hard=True).view(steps, groups, classes)
        book = codevectors.view(groups, classes, width)
        return torch.einsum("ngv,gvd->ngd", y, book).reshape(steps, -1)

    def multiply_and_sum(logits: Tensor, codevectors: Tensor) -> Tensor:
        y = F.gumbel_softmax(logits, tau=2.0, hard=True).view(steps, -1)
        products = (y.unsqueeze(-1) * codevectors).view(steps, groups, classes, -1)
        return products.sum(-2).view(steps, -1)

    lookups = {
        "gumbel_ext": ours,
        "one_hot @ weight": one_hot,
        "multiply and sum": multiply_and_sum,
    }
    if with_compile:
        lookups["torch.compile, one_hot @ weight"] = compiled(one_hot)
    shape, book = (steps * groups, classes), (1, groups * classes, width)
    return _case(
        shape, book, (steps, groups * width), f"hard, {groups} groups, D = {width}", lookups, quick
    )


def _images(shape: tuple[int, ...], width: int, hard: bool, quick: bool) -> FamilyCase:
    """A discrete VAE's: classes in dimension 1, then an einsum with the codebook."""
    batch, classes, *size = shape

    def ours(logits: Tensor, weight: Tensor) -> Tensor:
        return gumbel_ext.gumbel_embedding(logits, weight, 1.0, hard, dim=1)

    def einsum(logits: Tensor, weight: Tensor) -> Tensor:
        y = F.gumbel_softmax(logits, tau=1.0, hard=hard, dim=1)
        return torch.einsum("bnhw,nd->bdhw", y, weight)

    kind = "hard" if hard else "soft"
    return _case(
        shape,
        (classes, width),
        (batch, width, *size),
        f"{kind}, dim = 1, D = {width}",
        {"gumbel_ext": ours, "F.gumbel_softmax, einsum": einsum},
        quick,
    )


def cases() -> list[FamilyCase]:
    return [
        _wav2vec2(1600, 2, 320, 128, quick=True),
        _images((8, 8192, 32, 32), 512, hard=True, quick=False),
        _images((1, 8192, 32, 32), 512, hard=False, quick=False),
    ]


def gpu_cases(rows: Rows) -> list[FamilyCase]:
    side = rows(32)
    return [
        _wav2vec2(rows(1600), 2, 320, 128, quick=True, with_compile=True),
        _images((rows(8), 8192, side, side), 512, hard=True, quick=True),
        *launches(_wav2vec2(16, 2, 320, 128, quick=False)),
        _wav2vec2(rows(12_800), 2, 320, 128, quick=False),
        _images((rows(8), 8192, side, side), 512, hard=False, quick=False),
    ]
