"""torch.compile as all contenders use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

_OPTIONS: dict[str, Any] = {"fullgraph": True, "dynamic": False}


def compiled(function: Callable[..., Result]) -> Callable[..., Result]:
    """The function in one graph, for the shapes that it meets; earlier code is forgotten."""
    torch._dynamo.reset()
    return torch.compile(function, **_OPTIONS)


def only_trace() -> None:
    """From now on functions are traced, and what was traced runs as it is: for rehearsals."""
    _OPTIONS["backend"] = "eager"
