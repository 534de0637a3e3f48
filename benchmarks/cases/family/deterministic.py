"""Choices without noise, and expected positions, beside what is written in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.cases.family.case import FamilyCase, Rows, launches
from benchmarks.cases.family.functions import function_case
from benchmarks.compiled import compiled
from gumbel_ext import soft_argmax, soft_argmax_2d, straight_through_softmax


def straight_through_composite(logits: torch.Tensor) -> torch.Tensor:
    y = torch.softmax(logits, -1)
    one_hot = F.one_hot(y.argmax(-1), y.shape[-1]).to(y.dtype)
    return one_hot - y.detach() + y


def expectation_composite(logits: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    return torch.softmax(logits, -1) @ positions


def coordinates_composite(maps: torch.Tensor) -> torch.Tensor:
    """As kornia does it: a softmax, a grid of coordinates, two weighted sums."""
    height, width = maps.shape[-2:]
    p = torch.softmax(maps.flatten(-2), -1)
    ys, xs = torch.meshgrid(
        torch.linspace(-1, 1, height, device=maps.device),
        torch.linspace(-1, 1, width, device=maps.device),
        indexing="ij",
    )
    return torch.stack([(p * xs.flatten()).sum(-1), (p * ys.flatten()).sum(-1)], -1)


Function = Callable[..., Any]
CHOICE = (straight_through_softmax, straight_through_composite)
PLACE = (soft_argmax, expectation_composite)
COORDINATES = (soft_argmax_2d, coordinates_composite)


def race(ours: Function, plain: Function) -> dict[str, Function]:
    return {"gumbel_ext": ours, "PyTorch": plain, "torch.compile": compiled(plain)}


def cases() -> list[FamilyCase]:
    made = []
    for train in (False, True):
        for op, functions, shape, quick in (
            ("straight_through_softmax", CHOICE, (16384, 64), train),
            ("straight_through_softmax", CHOICE, (64, 32768), False),
            ("soft_argmax", PLACE, (16384, 64), False),
            ("soft_argmax", PLACE, (64, 32768), train),
            ("soft_argmax_2d", COORDINATES, (32, 17, 64, 48), train),
        ):
            made.append(
                function_case(
                    "deterministic", op, race(*functions), shape, train=train, quick=quick
                )
            )
    return made


def gpu_cases(rows: Rows) -> list[FamilyCase]:
    def case(
        op: str, functions: tuple[Function, Function], shape: tuple[int, ...], **more: Any
    ) -> FamilyCase:
        # Read and written at least: the logits, y, and in training their gradients and y again.
        moved = 2 if functions is CHOICE else 1
        moved += (3 if functions is CHOICE else 2) if more["train"] else 0
        contenders = race(*functions)
        return function_case("deterministic", op, contenders, shape, tensors_moved=moved, **more)

    made = []
    for train in (True, False):
        for op, functions in (
            ("straight_through_softmax", CHOICE),
            ("soft_argmax", PLACE),
        ):
            made.append(case(op, functions, (rows(16384), 1024), train=train, quick=train))
            made.append(case(op, functions, (rows(262_144), 64), train=train, quick=False))
            made.append(case(op, functions, (rows(4096), 32_768), train=train, quick=False))
            made += launches(case(op, functions, (128, 8), train=train, quick=train))
        shape = (rows(32), 17, 64, 48)
        made.append(case("soft_argmax_2d", COORDINATES, shape, train=train, quick=train))
        made.append(
            case(
                "straight_through_softmax",
                CHOICE,
                (rows(4096), 32_000),
                train=train,
                quick=False,
                dtype="bfloat16",
            )
        )
    return made
