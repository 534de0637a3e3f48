"""For every regime of the CUDA kernels of the core a shape that runs in it.

The regimes are those of docs/kernels-cuda-table.md, which is made from the machine code. Which of
them a call runs in is decided in csrc/cuda/plan.cpp; tests/test_gpu_benchmark.py asks it about all
of these. The shapes are for a GPU with 32 to 132 multiprocessors; clusters want compute capability
9.0.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.environment import ROOT
from benchmarks.labels import HARD_BACKWARD, HARD_FORWARD, INDEX, SOFT_BACKWARD, SOFT_FORWARD

TABLE = ROOT / "docs" / "kernels-cuda-table.md"

ELEMENTS = 1 << 26

# The table's names of the operations.
KERNELS_OF = {
    SOFT_FORWARD: "soft",
    HARD_FORWARD: "hard",
    INDEX: "index",
    SOFT_BACKWARD: "backward",
    HARD_BACKWARD: "backward, recomputed",
}
# Shapes and dim of the regimes whose name does not say how many classes a row has.
SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "streamed": ((512, 196_608), -1),
    "split": ((16, 1 << 20), -1),
    "columns, 1 warp": ((4096, 32, 512), 1),
    "columns, 8 warps": ((256, 256, 1024), 1),
    "columns, 16 warps": ((4, 16_384, 512), 1),
}
TEAM = re.compile(
    r"(?:(?P<threads>\d+) (?:lanes?|threads)|(?P<warp>a warp)"
    r"|a cluster of (?P<cluster>\d+) threads a block) a row, (?P<groups>\d+) (?P<kind>.*)"
)
BLOCKS_OF_A_CLUSTER = 16


@dataclass(frozen=True)
class Regime:
    """A regime, and logits that run in it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    dim: int = -1


def needs_clusters(regime: str) -> bool:
    """Whether a GPU before compute capability 9.0 runs its logits in another regime."""
    return "cluster" in regime


def measured_as(kernel: str) -> str:
    """The regime of a kernel of the table: the two passes of a call are measured as one."""
    return re.sub(", (first|second) pass", "", kernel)


@functools.cache
def _table() -> dict[str, list[tuple[str, str]]]:
    """Regime and dtype of every row of the table, by its name of the operation."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            rows = found.setdefault(line.removeprefix("## "), [])
        elif line.startswith("| ") and not line.startswith("| regime"):
            regime, dtype = (cell.strip() for cell in line.split("|")[1:3])
            rows.append((measured_as(regime), dtype))
    return {op: list(dict.fromkeys(rows)) for op, rows in found.items()}


def regimes(op: str) -> Iterator[Regime]:
    """Those of one of the operations of KERNELS_OF, for every dtype that has them."""
    for name, dtype in _table()[KERNELS_OF[op]]:
        shape, dim = SHAPES.get(name) or (_rows(name, dtype), -1)
        yield Regime(name, dtype, shape, dim)


def _rows(name: str, dtype: str) -> tuple[int, int]:
    """Rows that fill the registers of their team; of a search, that give it enough to choose of."""
    team = TEAM.fullmatch(name)
    if team is None:
        raise ValueError(f"{TABLE.name}: no shape is known for the regime {name!r}")
    # Elements that a thread loads at once.
    group = max(4, 16 // getattr(torch, dtype).itemsize)
    threads = 32 if team["warp"] else int(team["threads"] or team["cluster"])
    groups = int(team["groups"])
    if team["kind"] == "at a time":
        # Two groups a thread; a warp that takes as many at a time as its dtype allows has more.
        most = 1 if dtype == "float64" else 2
        held = 2 if threads != 32 else 4 if groups == most else 1
        classes = 4096 if threads > 32 else threads * held * group
    else:
        classes = threads * groups * group * (BLOCKS_OF_A_CLUSTER if team["cluster"] else 1)
    return ELEMENTS // classes, classes
