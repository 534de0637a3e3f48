"""One case of the family: contenders that do the same job on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.labels import EAGERLY, IN_A_GRAPH
from benchmarks.timing import Call

# What contenders are made on: "cpu" or "cuda".
Place = str
Contenders = Callable[[Place], tuple[dict[str, Call], int]]
Rows = Callable[[int], int]
"""How many rows to measure where a GPU should have so many; a rehearsal has fewer."""


@dataclass(frozen=True)
class FamilyCase:
    """One row group of docs/: an operation on one kind of input, raced by several contenders."""

    page: str  # of docs/, without .md: where the table of its numbers stands
    op: str
    shape: tuple[int, ...]
    dtype: str
    elements: int  # that a time per element is of
    # Makes the inputs; returns the contenders by name, ours first, and the number of inputs, which
    # on the CPU are enough to leave the cache. (On a GPU the cache is flushed before each call.)
    contenders: Contenders
    variant: str = ""
    quick: bool = False  # part of a --quick run
    memory: bool = False  # whether the peak of the allocator is of interest too
    bytes_moved: int = 0  # that the operator must read and write at least; 0: not of interest
    # On a GPU, of a case that is all launch: how it is called, of labels.py.
    called: str = ""

    @property
    def columns(self) -> dict[str, Any]:
        """What a row of the result says of the case."""
        return {
            "case": self.name,
            "page": self.page,
            "op": self.op,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "variant": self.variant,
        }

    @property
    def name(self) -> str:
        """Path-like name, for --cases."""
        size = "x".join(map(str, self.shape))
        parts = [self.page, self.op, self.dtype, size, self.variant, self.called]
        return "/".join(part.replace(" ", "-") for part in parts if part)


def launches(case: FamilyCase, *not_in_graphs: str) -> Iterable[FamilyCase]:
    """The case called one by one and in a CUDA graph, there without contenders that wait for the
    GPU in the middle of a call.
    """
    yield replace(case, called=EAGERLY)

    def captured(place: Place) -> tuple[dict[str, Call], int]:
        race, inputs = case.contenders(place)
        return {name: call for name, call in race.items() if name not in not_in_graphs}, inputs

    yield replace(case, called=IN_A_GRAPH, contenders=captured)
