"""For every regime of the CUDA kernels of the core a shape that runs in it.

The names are those of docs/kernels-cuda-table.md, which has a row for each. Which regime a call
runs in is decided in csrc/cuda/plan.cpp; tests/test_gpu_benchmark.py asks it about all of these.
The shapes are for a GPU with 32 to 132 multiprocessors; clusters want compute capability 9.0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from labels import HARD_BACKWARD, HARD_FORWARD, INDEX, SOFT_BACKWARD, SOFT_FORWARD

ELEMENTS = 1 << 26

# The table's names of the operations.
KERNELS_OF = {
    SOFT_FORWARD: "soft",
    HARD_FORWARD: "hard",
    INDEX: "index",
    SOFT_BACKWARD: "backward",
    HARD_BACKWARD: "backward, recomputed",
}
DTYPES = ("float32", "float64", "bfloat16", "float16")
# Elements that a thread loads at once, and how many times that it holds of a row at most.
GROUP = {"float32": 4, "float64": 4, "bfloat16": 8, "float16": 8}
MOST_HELD = {"float32": 6, "float64": 2, "bfloat16": 3, "float16": 3}


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


def regimes(op: str) -> Iterable[Regime]:
    """Those of one of the operations of KERNELS_OF, for every dtype that has them."""
    for dtype in DTYPES:
        if op in (HARD_FORWARD, INDEX):
            yield from _picks(dtype)
        else:
            yield from _held(dtype)
        if op == HARD_BACKWARD:
            continue  # elsewhere it runs the kernels of the soft forward and backward
        if op in (SOFT_FORWARD, SOFT_BACKWARD):
            yield Regime("streamed", dtype, (512, 196_608))
            yield Regime("split", dtype, (16, 1 << 20))
        else:
            yield Regime("split", dtype, (16, 1 << 20))
        yield Regime("columns, 1 warp", dtype, (4096, 32, 512), 1)
        yield Regime("columns, 8 warps", dtype, (256, 256, 1024), 1)
        if dtype != "float64":
            yield Regime("columns, 16 warps", dtype, (4, 16_384, 512), 1)


def _row(name: str, dtype: str, classes: int) -> Regime:
    return Regime(name, dtype, (ELEMENTS // classes, classes))


def _lanes(threads: int) -> str:
    if threads == 32:
        return "a warp a row"
    return f"{threads} lane{'s' * (threads > 1)} a row"


def _held(dtype: str) -> Iterable[Regime]:
    """Rows that fill the registers of their team."""
    group, most = GROUP[dtype], MOST_HELD[dtype]
    blocks = (128, 256) if dtype == "float64" else (128, 256, 480)
    for threads in (1, 2, 4, 8, 32):
        yield _row(f"{_lanes(threads)}, 1 group held", dtype, threads * group)
    for held in sorted({2, most}):
        yield _row(f"a warp a row, {held} groups held", dtype, 32 * held * group)
    for threads in blocks:
        yield _row(f"{threads} threads a row, {most} groups held", dtype, threads * most * group)
    for threads in blocks[1:]:
        name = f"a cluster of {threads} threads a block a row, {most} groups held"
        yield _row(name, dtype, 16 * threads * most * group)


def _picks(dtype: str) -> Iterable[Regime]:
    """Rows that give every thread two groups, or one where a team may have as few."""
    group = GROUP[dtype]
    for threads in (1, 2, 4, 8):
        yield _row(f"{_lanes(threads)}, 1 at a time", dtype, 2 * threads * group)
    if dtype == "float64":
        yield _row("a warp a row, 1 at a time", dtype, 4 * 32 * group)
        yield _row("256 threads a row, 1 at a time", dtype, 4096)
    else:
        yield _row("a warp a row, 1 at a time", dtype, 32 * group)
        yield _row("a warp a row, 2 at a time", dtype, 4 * 32 * group)
        yield _row("256 threads a row, 2 at a time", dtype, 4096)
