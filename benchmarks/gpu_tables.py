"""What docs/ and README say of a GPU: from results of bench_cuda.py, or that there are none yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from labels import (
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
    REGIMES,
    SOFT_BACKWARD,
    SOFT_FORWARD,
    SOFT_TRAIN,
    SOFTMAX,
)
from regimes import KERNELS_OF
from tables import (
    NOT_YET,
    Result,
    Row,
    Target,
    grouped,
    memory_section,
    number,
    optional,
    shape_text,
    table,
    times_section,
    verdict,
)

# Of a run that was cut short.
LEFT_OUT = "left out"


# --- targets ---


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
PEAK_SHAPE = (16384, 1024)
PEAK_BYTES_TARGET = 8.5  # forward and backward, float32: output 4, gradient 4, and O(rows)


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
        cells = []
        for shape in CUDA_SHAPES:
            if target.peer in (COMPILED, COMPILED_ARGMAX) and shape[1] not in COMPILED_CLASSES:
                cells.append(("", None))
                continue
            row = result and result.find(target.op, target.peer, shape, target.dtype)
            cells.append(cell(result, target, row))
        lead = [target.op, target.dtype, f"`{target.peer}`", target.text]
        met = verdict([met for _, met in cells])
        lines.append([*lead, *(text for text, _ in cells), met])
    header = ["op", "dtype", "against", "target", *map(shape_text, CUDA_SHAPES), "verdict"]
    return table(header, lines, numbers_from=4)


def other_targets_table(result: Result | None) -> str:
    lines = []

    def add(what: str, target: Target, row: Row | None) -> None:
        text, met = cell(result, target, row)
        lead = [what, target.dtype, f"`{target.peer}`", target.text]
        lines.append([*lead, text, verdict([met])])

    for group, shape in OTHER_SHAPES:
        dim = ", dim=1" if shape == INNER_DIM else ""
        for target in gpu_targets():
            if target.dtype != "float32" or target.peer in (COMPILED, COMPILED_ARGMAX):
                continue
            row = result and result.find(target.op, target.peer, shape, group=group)
            add(f"{target.op}, {shape_text(shape)}{dim}", target, row)
    for how, target in launch_targets():
        size = CUDA_LAUNCHES[0]
        row = result and result.find(target.op, target.peer, size, "float32", "launches", how)
        add(f"{target.op}, {shape_text(size)}, {how}", target, row)
    for op in (SOFT_FORWARD, HARD_FORWARD, INDEX):
        lines.append(kernels_line(result, op))
    for op in (SOFT_TRAIN, HARD_TRAIN):
        lines.append(peak_line(result, op))
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
    row = result and result.find(op, GUMBEL_EXT, size, "float32", "launches", EAGERLY)
    value = row and row.get("kernels_per_call")
    lead = [f"kernels a call, {op}, {shape_text(size)}", "float32", "", "1"]
    return bounded_line(result, lead, value or None, 1)


def peak_line(result: Result | None, op: str) -> list[str]:
    rows = result.memory_rows if result else []
    peaks = {
        row["contender"]: row["allocator_peak_bytes_per_element"]
        for row in rows
        if (row["op"], row["dtype"]) == (op, "float32")
        and tuple(row.get("asked_shape", row["shape"])) == PEAK_SHAPE
    }
    against = f"`{EAGER}`" + (f": {number(peaks[EAGER])}" if EAGER in peaks else "")
    what = f"peak memory, {op}, {shape_text(PEAK_SHAPE)}"
    lead = [what, "float32", against, f"≤ {PEAK_BYTES_TARGET:g} bytes an element"]
    return bounded_line(result, lead, peaks.get(GUMBEL_EXT), PEAK_BYTES_TARGET)


# --- the section of docs/benchmarks.md ---


def gpu_section(result: Result | None) -> str:
    notes = (
        "A cell is the median over rounds of the peer's time over gumbel_ext's, on the GPU's own "
        "clock: how many times faster gumbel_ext is. `Tensor.copy_` moves as many bytes as the "
        "operator must read and write at least; against it the cell is the share of the bandwidth "
        "of a copy that gumbel_ext reaches. **Bold** misses its target; ~ marks cells whose middle "
        "half of the rounds lies on both sides of it."
    )
    if result is None:
        where = (
            "**Not yet measured**: the tables say what `benchmarks/gpu_report.sh` will measure, "
            "and `make gpu-pages` fills them from what it leaves."
        )
        parts = [where, notes, targets_table(None), other_targets_table(None)]
    else:
        parts = [
            result.setup(),
            notes,
            targets_table(result),
            other_targets_table(result),
            launches_table(result),
            memory_section(result) if result.memory_rows else "",
            times_section(result),
        ]
    return "\n\n".join(part for part in parts if part)


def launches_table(result: Result) -> str:
    """Microseconds a call of tensors that are all launch."""
    launches = [row for row in result.rows if row["group"] == "launches"]
    lines = []
    for case in grouped(launches):
        ours = case.get(GUMBEL_EXT)
        if ours is None:
            continue
        peers = [case.get(EAGER) or case.get(ARGMAX), case.get(COMPILED), case.get(SOFTMAX)]
        peers[1] = peers[1] or case.get(COMPILED_ARGMAX)
        kernels = ours.get("kernels_per_call")
        lines.append(
            [
                ours["op"],
                f"{shape_text(ours['shape'])}, {ours['variant']}",
                *(
                    optional(row, lambda row: number(row["microseconds_per_call"]["median"]))
                    for row in [ours, *peers]
                ),
                "" if kernels is None else f"{kernels:g}",
            ]
        )
    if not lines:
        return ""
    header = ["op", "logits", "gumbel_ext µs", "eager µs", "torch.compile µs", "F.softmax µs"]
    return (
        f"Tensors of {shape_text(CUDA_LAUNCHES[0])} to {shape_text(CUDA_LAUNCHES[-1])}, float32: "
        f"microseconds a call, {EAGERLY} from Python and {IN_A_GRAPH} of twenty calls. The last "
        "column counts what a call of gumbel_ext starts on the GPU.\n\n"
        + table([*header, "kernels"], lines, numbers_from=2)
    )


# --- docs/kernels-cuda-table.md ---


MEASURED = "measured"


def measured_kernels(page: str, results: list[Result]) -> str:
    """The page with its last columns made anew: what each kernel of it reaches on each GPU."""
    kernels_of = {kernels: op for op, kernels in KERNELS_OF.items()}
    lines, op, before = [], "", 0
    for line in page.split("\n"):
        if line.startswith("## "):
            op = kernels_of[line.removeprefix("## ")]
        cells = line.split("|")[1:-1] if line.startswith("|") else []
        names = [name.strip() for name in cells]
        if "regime" in names:
            before = next(i for i, name in enumerate(names) if name.startswith(MEASURED))
            added = [f"{MEASURED}, {result.gpu_name}" for result in results] or [MEASURED]
        elif names and not names[0].strip("-"):
            added = ["---"] * max(1, len(results))
        elif names:
            shares = [kernel_share(result, op, names[0], names[1]) for result in results]
            added = shares or [NOT_YET]
        else:
            lines.append(line)
            continue
        pad = "" if added[0] == "---" else " "
        lines.append("|".join(["", *cells[:before], *(f"{pad}{text}{pad}" for text in added), ""]))
    return "\n".join(lines)


def kernel_share(result: Result, op: str, regime: str, dtype: str) -> str:
    # A call of two passes was measured as one.
    name = regime.partition(", first pass")[0].partition(", second pass")[0]
    wanted = (REGIMES, op, name, dtype, GUMBEL_EXT)
    for row in result.rows:
        found = tuple(row[key] for key in ("group", "op", "workload", "dtype", "contender"))
        if found == wanted:
            return f"{row['share_of_copy_bandwidth']['median']:.2f}"
    return LEFT_OUT


# --- docs/kernels-cuda.md ---


@dataclass(frozen=True)
class Prediction:
    """Shares of memory's rate that machine code lets expect, and what was measured of it."""

    what: str
    float32: str
    bfloat16: str
    target: str
    op: str
    belongs: Callable[[Row], bool]

    def measured(self, result: Result, dtype: str) -> str:
        """From the lowest to the highest median share of the cases that belong to it."""
        shares = [
            row["share_of_copy_bandwidth"]["median"]
            for row in result.rows
            if (row["op"], row["dtype"], row["contender"]) == (self.op, dtype, GUMBEL_EXT)
            and row["variant"] == "contiguous"
            and self.belongs(row)
        ]
        if not shares:
            return LEFT_OUT
        low, high = f"{min(shares):.2f}", f"{max(shares):.2f}"
        return low if low == high else f"{low} to {high}"


def rows_of(least: int, most: int = 1 << 40) -> Callable[[Row], bool]:
    """Cases of the shapes that targets are stated for, with so many classes."""

    def belongs(row: Row) -> bool:
        return row["group"] == "shapes" and least <= row["asked_shape"][-1] <= most

    return belongs


def not_adjacent(row: Row) -> bool:
    return row["group"] == "layouts" and row["dim"] == 1


PREDICTIONS = (
    Prediction(
        "soft forward, rows of 256 classes or more",
        *("1.0", "0.62 to 0.69", "0.92 / 0.85", SOFT_FORWARD, rows_of(256)),
    ),
    Prediction(
        "hard forward, a warp or more a row",
        *("1.0", "0.95", "0.92 / 0.85", HARD_FORWARD, rows_of(256)),
    ),
    Prediction("index alone, a warp or more a row", *("0.9", "0.5", "0.85", INDEX, rows_of(256))),
    Prediction("backward from y", *("1.0", "1.0", "0.90", SOFT_BACKWARD, rows_of(1))),
    Prediction(
        "backward, recomputed, rows of 512 classes or more",
        *("1.0", "0.9", "0.90", HARD_BACKWARD, rows_of(512)),
    ),
    Prediction("soft forward, 8 classes", *("0.75", "0.55", "", SOFT_FORWARD, rows_of(8, 8))),
    Prediction(
        "soft forward, classes not adjacent", *("0.75", "0.35", "", SOFT_FORWARD, not_adjacent)
    ),
)


def predictions_table(results: list[Result]) -> str:
    header = ["share of memory's rate", "float32, predicted", "bfloat16, predicted", "target"]
    dtypes = ("float32", "bfloat16")
    for result in results or [None]:
        where = f", {result.gpu_name}" if result else ""
        header += [f"{dtype}, {MEASURED}{where}" for dtype in dtypes]
    lines = []
    for p in PREDICTIONS:
        cells = [p.measured(result, dtype) for result in results for dtype in dtypes]
        lines.append([p.what, p.float32, p.bfloat16, p.target, *(cells or [NOT_YET, NOT_YET])])
    return table(header, lines, numbers_from=len(header))


def where_measured(results: list[Result]) -> str:
    if not results:
        return (
            "**No number on this page or in [kernels-cuda-table.md](kernels-cuda-table.md) was "
            "measured on a GPU.** The kernels were\ncompiled for sm_80 and sm_90 (nvcc 13.0), run "
            "on a CPU under emulation, and their machine code was read; see\n"
            "[what was checked](#what-was-checked-and-what-not). `benchmarks/gpu_report.sh` "
            "measures them where there is a GPU."
        )
    return (
        "What was measured on a GPU stands in columns that say so, here and in "
        "[kernels-cuda-table.md](kernels-cuda-table.md);\nother numbers were read from machine "
        "code, compiled for sm_80 and sm_90 (nvcc 13.0).\n\n"
        + "\n\n".join(result.setup() for result in results)
    )


# --- README.md ---


def readme_picture(results: list[Result]) -> str:
    if not results:
        return ""
    return (
        "\nAnd on a GPU "
        f"({results[0].gpu_name}, [docs/benchmarks.md](docs/benchmarks.md#on-a-gpu)):\n\n"
        "![Time per element on a GPU against PyTorch](docs/gpu-speed.png)"
    )


def readme_status(results: list[Result]) -> str:
    if not results:
        return (
            "**CUDA is compiled and emulated, not measured.** The kernels build for sm_80 and "
            "sm_90, pass their tests on a CPU under\nemulation with a race detector, and trace "
            "under `torch.compile` and `torch.export`; they have not run on a GPU, and no\nspeed "
            "is claimed for them. [docs/kernels-cuda.md](docs/kernels-cuda.md) says what was "
            "checked and predicts what limits\neach; `bash benchmarks/gpu_report.sh` runs tests, "
            "sanitizers and benchmarks where there is a GPU."
        )
    names = ", ".join(result.gpu_name for result in results)
    return (
        f"CUDA kernels were measured on {names} alone; "
        "[docs/kernels-cuda.md](docs/kernels-cuda.md) says what was checked and what limits each."
    )
