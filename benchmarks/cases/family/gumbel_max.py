"""Index samples: many of a row, and k of a row without replacement."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import gumbel_ext
from benchmarks.cases.family.case import Contenders, FamilyCase, Place, Rows, launches
from benchmarks.timing import Call

# Inputs enough that a case's do not stay in the cache from one call to the next.
_CACHE_BYTES = 64 << 20


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, place: Place) -> list[Tensor]:
    one = torch.randn(shape, device=place).to(dtype)
    count = max(2, min(16, _CACHE_BYTES // (one.numel() * one.element_size())))
    return [one, *(torch.randn(shape, device=place).to(dtype) for _ in range(count - 1))]


def _race(
    shape: tuple[int, ...], dtype: torch.dtype, calls: dict[str, Callable[[Tensor], object]]
) -> Contenders:
    def make(place: Place) -> tuple[dict[str, Call], int]:
        inputs = _inputs(shape, dtype, place)
        race: dict[str, Call] = {
            name: lambda i, call=call: call(inputs[i % len(inputs)])  # type: ignore[misc]
            for name, call in calls.items()
        }
        return race, len(inputs)

    return make


def _gumbel(logits: Tensor) -> Tensor:
    return -torch.empty_like(logits).exponential_().log()


def _many(rows: int, classes: int, count: int, dtype: torch.dtype, quick: bool) -> FamilyCase:
    calls: dict[str, Callable[[Tensor], object]] = {
        "gumbel_ext": lambda x: gumbel_ext.gumbel_argmax(x, num_samples=count),
        "torch.multinomial": lambda x: torch.multinomial(x.softmax(-1), count, replacement=True),
        "Categorical.sample": lambda x: torch.distributions.Categorical(
            logits=x, validate_args=False
        ).sample((count,)),
        "argmax(l + g)": lambda x: (
            (e := x.expand(count, *x.shape)) + _gumbel(e.contiguous())
        ).argmax(-1),
    }
    return FamilyCase(
        page="gumbel-max",
        op="gumbel_argmax",
        shape=(rows, classes),
        dtype=str(dtype).removeprefix("torch."),
        elements=rows * classes * count,
        contenders=_race((rows, classes), dtype, calls),
        variant=f"{count} samples",
        quick=quick,
        bytes_moved=rows * (classes * dtype.itemsize + 8 * count),
    )


def _topk(rows: int, classes: int, k: int, dtype: torch.dtype, quick: bool) -> FamilyCase:
    calls: dict[str, Callable[[Tensor], object]] = {
        "gumbel_ext": lambda x: gumbel_ext.gumbel_topk(x, k),
        "topk(l + g)": lambda x: (x + _gumbel(x)).topk(k).indices,
        "torch.multinomial": lambda x: torch.multinomial(x.softmax(-1), k, replacement=False),
    }
    return FamilyCase(
        page="gumbel-max",
        op="gumbel_topk",
        shape=(rows, classes),
        dtype=str(dtype).removeprefix("torch."),
        elements=rows * classes,
        contenders=_race((rows, classes), dtype, calls),
        variant=f"k = {k}",
        quick=quick,
        bytes_moved=rows * (classes * dtype.itemsize + 8 * k),
    )


def cases() -> list[FamilyCase]:
    return [
        _many(256, 1000, 32, torch.float32, quick=True),
        _many(64, 32_000, 8, torch.bfloat16, quick=False),
        _many(4096, 10, 16, torch.float32, quick=False),
        _topk(4096, 64, 8, torch.float32, quick=True),
        _topk(1024, 1000, 10, torch.float32, quick=False),
        _topk(64, 50_257, 50, torch.float32, quick=False),
        _topk(8, 262_144, 1000, torch.bfloat16, quick=False),
    ]


def gpu_cases(rows: Rows) -> list[FamilyCase]:
    return [
        _topk(rows(65536), 64, 8, torch.float32, quick=True),
        _many(rows(4096), 1000, 32, torch.float32, quick=True),
        _topk(rows(512), 50_257, 50, torch.float32, quick=True),
        *launches(_topk(128, 64, 8, torch.float32, quick=True), "torch.multinomial"),
        _many(rows(1024), 32_000, 8, torch.bfloat16, quick=False),
        _many(rows(262_144), 10, 16, torch.float32, quick=False),
        _topk(rows(16384), 1000, 10, torch.float32, quick=False),
        _topk(rows(4096), 32_000, 50, torch.bfloat16, quick=False),
        _topk(rows(64), 262_144, 1000, torch.bfloat16, quick=False),
        *launches(
            _many(128, 8, 16, torch.float32, quick=False), "torch.multinomial", "Categorical.sample"
        ),
    ]
