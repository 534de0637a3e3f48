"""Cases that race functions of one tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.cases.family.case import FamilyCase, Place
from benchmarks.timing import Call

# In turn, so that each call finds its input outside the cache.
INPUTS = 4


def function_case(
    page: str,
    op: str,
    functions: Mapping[str, Callable[..., Any]],
    shape: tuple[int, ...],
    *,
    train: bool,
    quick: bool,
    dtype: str = "float32",
    tensors_moved: int = 0,
) -> FamilyCase:
    """The functions by name, ours first, forward alone or with their backward."""
    of_dtype: torch.dtype = getattr(torch, dtype)

    def contenders(place: Place) -> tuple[dict[str, Call], int]:
        torch._dynamo.reset()
        options: dict[str, Any] = {"device": place, "dtype": of_dtype}
        inputs = [
            torch.randn(shape, **options).requires_grad_(train).clone() for _ in range(INPUTS)
        ]
        for function in functions.values():
            if isinstance(function, torch.nn.Module):
                function.to(place)
        with torch.no_grad():
            grad = torch.randn_like(next(iter(functions.values()))(inputs[0]))

        def call(function: Callable[..., Any]) -> Call:
            def run(i: int) -> object:
                out = function(inputs[i % INPUTS])
                return torch.autograd.grad(out, inputs[i % INPUTS], grad) if train else out

            return run

        return {name: call(function) for name, function in functions.items()}, INPUTS

    variant = "forward and backward" if train else "forward"
    elements = math.prod(shape)
    moved = tensors_moved * elements * of_dtype.itemsize
    return FamilyCase(
        page, op, shape, dtype, elements, contenders, variant, quick, bytes_moved=moved
    )
