"""A sample at one temperature with the gradient of another, beside two samples in plain PyTorch."""

from __future__ import annotations

import torch

from family.case import FamilyCase
from family.functions import function_case
from gumbel_ext import decoupled_gumbel_softmax


def decoupled(logits: torch.Tensor) -> torch.Tensor:
    return decoupled_gumbel_softmax(logits, 0.3, 1.0)


def composite(logits: torch.Tensor) -> torch.Tensor:
    noise = -torch.empty_like(logits).exponential_().log()
    backward = torch.softmax((logits + noise) / 1.0, -1)
    with torch.no_grad():
        forward = torch.softmax((logits + noise) / 0.3, -1)
    return forward + (backward - backward.detach())


def cases() -> list[FamilyCase]:
    functions = {
        "gumbel_ext": decoupled,
        "PyTorch": composite,
        "torch.compile": torch.compile(composite),
    }
    return [
        function_case(
            "temperature", "decoupled_gumbel_softmax", functions, shape, train=True, quick=quick
        )
        for shape, quick in (((16384, 64), True), ((64, 32768), False))
    ]
