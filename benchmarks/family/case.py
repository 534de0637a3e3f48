"""One case of the family: contenders that do the same job on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from timing import Call


@dataclass(frozen=True)
class FamilyCase:
    """One row group of docs/: an operation on one kind of input, raced by several contenders."""

    page: str  # of docs/, without .md: where the table of its numbers stands
    op: str
    shape: tuple[int, ...]
    dtype: str
    elements: int  # that a time per element is of
    # Makes the inputs; returns the contenders by name, ours first, and the number of inputs, which
    # are enough to leave the cache.
    contenders: Callable[[], tuple[dict[str, Call], int]]
    variant: str = ""
    quick: bool = False  # part of a --quick run
    memory: bool = False  # whether the peak of the allocator is of interest too

    @property
    def name(self) -> str:
        """Path-like name, for --cases."""
        size = "x".join(map(str, self.shape))
        parts = [self.page, self.op, self.dtype, size, self.variant]
        return "/".join(part.replace(" ", "-") for part in parts if part)
