"""The targets, and the tables that say how a result stands to them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.labels import (
    ARGMAX,
    COMPILED,
    COMPILED_ARGMAX,
    COMPILED_CLASSES,
    COPY,
    CUDA_LAUNCHES,
    CUDA_SHAPES,
    DTYPES,
    EAGER,
    EAGERLY,
    GUMBEL_EXT,
    HARD_BACKWARD,
    HARD_FORWARD,
    HARD_TRAIN,
    IN_A_GRAPH,
    INDEX,
    INNER_DIM,
    SAME_TWICE,
    SHAPES,
    SOFT_BACKWARD,
    SOFT_FORWARD,
    SOFT_TRAIN,
    SOFTMAX,
    TINY,
)
from benchmarks.results import Result, Row, asked_shape
from benchmarks.tables import LEFT_OUT, NOT_YET, number, shape_text, table

PEAK_SHAPE, CUDA_PEAK_SHAPE = (4096, 1024), (16384, 1024)
PEAK_BYTES = 8.5  # forward and backward, float32: output 4, gradient 4, and O(rows)


@dataclass(frozen=True)
class Target:
    """A bound on gumbel_ext's time against a peer's, in the same rounds of the same run."""

    op: str
    dtype: str
    peer: str
    bound: float
    at_most: bool  # of the peer's time; else: at least so many times faster

    @property
    def text(self) -> str:
        """The bound as the table shows it."""
        return f"≤ {self.bound:g} of its time" if self.at_most else f"≥ {self.bound:g}x its speed"

    def lead(self, what: str) -> list[str]:
        """The first cells of a line: what is compared, and with what."""
        return [what, self.dtype, f"`{self.peer}`", self.text]

    def measured(self, row: Row) -> tuple[float, float, float]:
        """Median and quartiles of the bounded quantity, from the peer's row."""
        ratio = row["time_over_baseline"]
        if self.at_most:
            return 1 / ratio["median"], 1 / ratio["p75"], 1 / ratio["p25"]
        return ratio["median"], ratio["p25"], ratio["p75"]

    def met(self, value: float) -> bool:
        """Whether the value is on the right side of the bound."""
        return value <= self.bound if self.at_most else value >= self.bound

    def cell(self, row: Row | None) -> tuple[str, bool | None]:
        """Table cell, and whether the target is met; None without a measurement."""
        if row is None:
            return "", None
        value, low, high = self.measured(row)
        met = self.met(value)
        text = number(value) + ("" if self.at_most else "x")
        if self.met(low) != self.met(high):
            text += " ~"
        return (text if met else f"**{text}**"), met


def verdict(results: list[bool | None]) -> str:
    known = [met for met in results if met is not None]
    if not known:
        return "not measured"
    missed = known.count(False)
    return "met" if not missed else f"**missed** at {missed} of {len(known)}"


# --- on the CPU ---


def soft_hard_targets() -> Iterable[Target]:
    """The targets that hold over all of SHAPES."""
    for dtype in DTYPES:
        wide = dtype == "float32"
        yield Target(SOFT_FORWARD, dtype, SOFTMAX, 1.3, True)
        yield Target(SOFT_FORWARD, dtype, EAGER, 25 if wide else 20, False)
        yield Target(SOFT_FORWARD, dtype, COMPILED, 12 if wide else 8, False)
    for dtype in DTYPES:
        yield Target(HARD_FORWARD, dtype, EAGER, 25, False)
        yield Target(HARD_FORWARD, dtype, COMPILED, 12, False)
    for dtype in DTYPES:
        yield Target(SOFT_BACKWARD, dtype, SOFTMAX, 1.2, True)
        yield Target(SOFT_BACKWARD, dtype, EAGER, 1, False)
        yield Target(HARD_BACKWARD, dtype, SOFTMAX, 2, True)
        yield Target(HARD_BACKWARD, dtype, EAGER, 1, False)


SINGLE_SHAPE_TARGETS = (
    (INNER_DIM, Target(SOFT_FORWARD, "float32", EAGER, 20, False)),
    (INNER_DIM, Target(SOFT_FORWARD, "float32", COMPILED, 8, False)),
    (INNER_DIM, Target(HARD_FORWARD, "float32", EAGER, 20, False)),
    (INNER_DIM, Target(HARD_FORWARD, "float32", COMPILED, 8, False)),
    (INNER_DIM, Target(SOFT_FORWARD, "bfloat16", EAGER, 20, False)),
    (INNER_DIM, Target(SOFT_FORWARD, "bfloat16", COMPILED, 8, False)),
    (TINY, Target(SOFT_FORWARD, "float32", EAGER, 0.4, True)),
    (TINY, Target(HARD_FORWARD, "float32", EAGER, 0.4, True)),
)


def targets_section(result: Result) -> str:
    """Where and when, what the run can tell apart, and the tables."""
    over_shapes = []
    for target in soft_hard_targets():
        cells = [
            target.cell(result.find(target.op, target.peer, shape, target.dtype))
            for shape in SHAPES
        ]
        if all(met is None for _, met in cells):
            continue
        met = verdict([met for _, met in cells])
        lead = target.lead(target.op)
        over_shapes.append([*lead, *(text for text, _ in cells), met])
    single = []
    for shape, target in SINGLE_SHAPE_TARGETS:
        text, is_met = target.cell(result.find(target.op, target.peer, shape, target.dtype))
        if is_met is None:
            continue
        where = shape_text(shape) + (" dim=1" if shape == INNER_DIM else ", per call")
        lead = target.lead(f"{target.op}, {where}")
        single.append([*lead, text, verdict([is_met])])
    for op in (SOFT_TRAIN, HARD_TRAIN):
        line = peak_line(result, op, PEAK_SHAPE)
        if LEFT_OUT not in line:
            single.append(line)
    header = ["op", "dtype", "against", "target", *map(shape_text, SHAPES), "verdict"]
    parts = [result.setup(), ""]
    control = next((r for r in result.rows if r["contender"] == SAME_TWICE), None)
    if control is not None:
        ratio = control["time_over_baseline"]
        middle = f"middle half of the rounds {ratio['p25']:.2f} to {ratio['p75']:.2f}"
        resolution = (
            f"`F.softmax` raced against itself came out at {ratio['median']:.2f} ({middle})"
        )
        parts += [f"Resolution: {resolution}.", ""]
    parts.append(table(header, over_shapes, numbers_from=4))
    if single:
        header = ["case", "dtype", "against", "target", "measured", "verdict"]
        parts += ["", table(header, single, numbers_from=4)]
    return "\n".join(parts)


# --- on a GPU ---


def gpu_targets() -> Iterable[Target]:
    """The targets on a GPU, over all of CUDA_SHAPES; the first is a share of copy bandwidth."""
    for dtype in DTYPES:
        wide = dtype == "float32"
        bandwidth = 0.92 if wide else 0.85
        yield Target(SOFT_FORWARD, dtype, COPY, bandwidth, False)
        yield Target(SOFT_FORWARD, dtype, EAGER, 6 if wide else 5.5, False)
        yield Target(SOFT_FORWARD, dtype, COMPILED, 1 if wide else 2, False)
        yield Target(HARD_FORWARD, dtype, COPY, bandwidth, False)
        yield Target(HARD_FORWARD, dtype, EAGER, 9, False)
        yield Target(HARD_FORWARD, dtype, COMPILED, 2.5, False)
        yield Target(INDEX, dtype, COPY, 0.85, False)
        yield Target(INDEX, dtype, ARGMAX, 8, False)
        yield Target(INDEX, dtype, COMPILED_ARGMAX, 2, False)
        for op in (SOFT_BACKWARD, HARD_BACKWARD):
            yield Target(op, dtype, COPY, 0.9, False)
            yield Target(op, dtype, EAGER, 2.7, False)
            yield Target(op, dtype, COMPILED, 1, False)


# Where classes are not adjacent in memory, and where rows are few: (group, shape).
OTHER_SHAPES = (("layouts", INNER_DIM), ("long rows", (4, 131_072)))


def launch_targets() -> Iterable[tuple[str, Target]]:
    """The targets of tensors that are all launch, by how they are called; "level" is 0.95."""
    for op in (SOFT_FORWARD, HARD_FORWARD, INDEX, HARD_TRAIN):
        eager, compiled = (ARGMAX, COMPILED_ARGMAX) if op == INDEX else (EAGER, COMPILED)
        yield EAGERLY, Target(op, "float32", eager, 5, False)
        yield EAGERLY, Target(op, "float32", compiled, 1, False)
        yield IN_A_GRAPH, Target(op, "float32", compiled, 0.95, False)


def cell(result: Result | None, target: Target, row: Row | None) -> tuple[str, bool | None]:
    """As Target.cell(), and says so where there is no measurement."""
    if result is None:
        return NOT_YET, None
    return target.cell(row) if row is not None else (LEFT_OUT, None)


def targets_table(result: Result | None) -> str:
    lines = []
    for target in gpu_targets():
        cells: list[tuple[str, bool | None]] = []
        for shape in CUDA_SHAPES:
            if target.peer in (COMPILED, COMPILED_ARGMAX) and shape[1] not in COMPILED_CLASSES:
                cells.append(("", None))
                continue
            row = result.find(target.op, target.peer, shape, target.dtype) if result else None
            cells.append(cell(result, target, row))
        lead = target.lead(target.op)
        met = verdict([met for _, met in cells])
        lines.append([*lead, *(text for text, _ in cells), met])
    header = ["op", "dtype", "against", "target", *map(shape_text, CUDA_SHAPES), "verdict"]
    return table(header, lines, numbers_from=4)


def other_targets_table(result: Result | None) -> str:
    lines = []

    def add(what: str, target: Target, row: Row | None) -> None:
        text, met = cell(result, target, row)
        lines.append([*target.lead(what), text, verdict([met])])

    for group, shape in OTHER_SHAPES:
        dim = ", dim=1" if shape == INNER_DIM else ""
        for target in gpu_targets():
            if target.dtype != "float32" or target.peer in (COMPILED, COMPILED_ARGMAX):
                continue
            row = result.find(target.op, target.peer, shape, group=group) if result else None
            add(f"{target.op}, {shape_text(shape)}{dim}", target, row)
    for how, target in launch_targets():
        size = CUDA_LAUNCHES[0]
        row = (
            result.find(target.op, target.peer, size, "float32", "launches", how)
            if result
            else None
        )
        add(f"{target.op}, {shape_text(size)}, {how}", target, row)
    for op in (SOFT_FORWARD, HARD_FORWARD, INDEX):
        lines.append(kernels_line(result, op))
    for op in (SOFT_TRAIN, HARD_TRAIN):
        lines.append(peak_line(result, op, CUDA_PEAK_SHAPE))
    header = ["case", "dtype", "against", "target", "measured", "verdict"]
    return table(header, lines, numbers_from=4)


def bounded_line(
    result: Result | None, lead: list[str], value: float | None, bound: float
) -> list[str]:
    """A line whose number must be at most the bound."""
    if result is None or value is None:
        return [*lead, NOT_YET if result is None else LEFT_OUT, verdict([None])]
    text = number(value) if value <= bound else f"**{number(value)}**"
    return [*lead, text, verdict([value <= bound])]


def kernels_line(result: Result | None, op: str) -> list[str]:
    size = CUDA_LAUNCHES[0]
    row = result.find(op, GUMBEL_EXT, size, "float32", "launches", EAGERLY) if result else None
    value = row and row.get("kernels_per_call")
    lead = [f"kernels a call, {op}, {shape_text(size)}", "float32", "", "1"]
    return bounded_line(result, lead, value or None, 1)


def peak_line(result: Result | None, op: str, shape: tuple[int, ...]) -> list[str]:
    rows = result.memory_rows if result else []
    peaks = {
        row["contender"]: row["allocator_peak_bytes_per_element"]
        for row in rows
        if (row["op"], row["dtype"]) == (op, "float32") and tuple(asked_shape(row)) == shape
    }
    against = f"`{EAGER}`" + (f": {number(peaks[EAGER])}" if EAGER in peaks else "")
    what = f"peak memory, {op}, {shape_text(shape)}"
    lead = [what, "float32", against, f"≤ {PEAK_BYTES:g} bytes an element"]
    return bounded_line(result, lead, peaks.get(GUMBEL_EXT), PEAK_BYTES)


def gpu_targets_section(result: Result | None) -> str:
    return f"{targets_table(result)}\n\n{other_targets_table(result)}"
