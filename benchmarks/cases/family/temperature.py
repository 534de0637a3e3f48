"""A sample at one temperature with the gradient of another, beside two samples in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.cases.family.case import FamilyCase, Rows, launches
from benchmarks.cases.family.functions import function_case
from benchmarks.compiled import compiled
from gumbel_ext import decoupled_gumbel_softmax


def decoupled(logits: torch.Tensor) -> torch.Tensor:
    return decoupled_gumbel_softmax(logits, 0.3, 1.0)


def composite(logits: torch.Tensor) -> torch.Tensor:
    noise = -torch.empty_like(logits).exponential_().log()
    backward = torch.softmax((logits + noise) / 1.0, -1)
    with torch.no_grad():
        forward = torch.softmax((logits + noise) / 0.3, -1)
    return forward + (backward - backward.detach())


def _case(shape: tuple[int, ...], **more: Any) -> FamilyCase:
    functions = {
        "gumbel_ext": decoupled,
        "PyTorch": composite,
        "torch.compile": compiled(composite),
    }
    op = "decoupled_gumbel_softmax"
    return function_case("temperature", op, functions, shape, train=True, tensors_moved=5, **more)


def cases() -> list[FamilyCase]:
    return [_case((16384, 64), quick=True), _case((64, 32768), quick=False)]


def gpu_cases(rows: Rows) -> list[FamilyCase]:
    return [
        _case((rows(16384), 1024), quick=True),
        *launches(_case((128, 8), quick=True)),
        _case((rows(262_144), 64), quick=False),
        _case((rows(4096), 32_000), quick=False, dtype="bfloat16"),
    ]
