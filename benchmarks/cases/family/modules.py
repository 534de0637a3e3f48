"""What the module costs beside the function."""

from __future__ import annotations

import torch

from benchmarks.cases.family.case import FamilyCase, Rows, launches
from benchmarks.cases.family.functions import function_case
from gumbel_ext import gumbel_softmax
from gumbel_ext.nn import GumbelSoftmax
from gumbel_ext.temperature import LearnableTemperature, LinearTemperature


def function(logits: torch.Tensor) -> torch.Tensor:
    return gumbel_softmax(logits, 0.7, True)


def _case(shape: tuple[int, ...], quick: bool) -> FamilyCase:
    functions = {
        "gumbel_softmax": function,
        "module, number": GumbelSoftmax(0.7, True),
        "module, schedule": GumbelSoftmax(LinearTemperature(0.7, 0.7, 10), True),
        "module, learnable": GumbelSoftmax(LearnableTemperature(0.7), True),
    }
    return function_case("modules", "GumbelSoftmax", functions, shape, train=True, quick=quick)


def cases() -> list[FamilyCase]:
    return [_case((64, 10), quick=True), _case((16384, 64), quick=False)]


def gpu_cases(rows: Rows) -> list[FamilyCase]:
    return [*launches(_case((64, 10), quick=True)), _case((rows(262_144), 64), quick=False)]
