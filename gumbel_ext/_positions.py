"""Noise positions of whole tensors, for the ops' argument ``positions``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

__all__ = ["row_major_strides"]


def row_major_strides(shape: Sequence[Any]) -> list[Any]:
    """The strides of a contiguous tensor, ints or SymInts as ``shape`` is."""
    return [math.prod(shape[d + 1 :]) for d in range(len(shape))]
