"""Noise positions of whole tensors, for the ops' argument ``positions``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["row_major_strides"]


def row_major_strides(shape: Sequence[Any]) -> list[Any]:
    """The strides of a contiguous tensor, ints or SymInts as ``shape`` is."""
    strides: list[Any] = [1] * len(shape)
    for d in reversed(range(len(shape) - 1)):
        strides[d] = strides[d + 1] * shape[d + 1]
    return strides
