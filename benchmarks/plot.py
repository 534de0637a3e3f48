"""Tables and pictures of docs/ from benchmark results; reads nothing but the JSON it is given.

python benchmarks/plot.py [RESULT.json ...] [--docs DIRECTORY] [--check]

Without files it takes every whole run in benchmarks/results. Tables go between marker comments in
docs/benchmarks.md, so that the text around them is kept; pictures show the first file of the CPU,
and the first of a GPU where there is one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from labels import (
    ARGMAX,
    COMPILED,
    COMPILED_ARGMAX,
    COPY,
    CUDA_LAUNCHES,
    CUDA_SHAPES,
    DTYPES,
    EAGER,
    EAGERLY,
    GUMBEL_EXT,
    HARD_BACKWARD,
    HARD_FORWARD,
    IN_A_GRAPH,
    INDEX,
    INNER_DIM,
    SAME_TWICE,
    SHAPES,
    SOFT_BACKWARD,
    SOFT_FORWARD,
    SOFTMAX,
    TINY,
)
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, NullFormatter
from style import FAINT, FONT, GRID, STYLES, heading, save

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]

# The instruction set that the targets are stated for comes first.
CAPABILITIES = ("avx512", "avx2", "neon", "generic")
CAPABILITY_NAMES = {"avx512": "AVX-512", "avx2": "AVX2", "neon": "NEON", "generic": "generic"}


def count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")


class Result:
    """One JSON file, with its rows by what they measure."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.document: dict[str, Any] = json.loads(path.read_text())
        if self.document.get("format") != 1:
            raise ValueError(f"{path}: format {self.document.get('format')!r}, expected 1")
        self.rows: list[Row] = self.document["rows"]
        self.memory_rows: list[Row] = self.document["memory_rows"]

    @property
    def on_gpu(self) -> bool:
        """Whether bench_cuda.py made it."""
        return self.document.get("device") == "cuda"

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The shapes that the picture of speed and the targets go through."""
        return CUDA_SHAPES if self.on_gpu else SHAPES

    @property
    def capability(self) -> str:
        """The instruction set that gumbel_ext's kernels used."""
        return str(self.document["versions"]["gumbel_ext_cpu_capability"])

    def find(
        self,
        op: str,
        contender: str,
        shape: Iterable[int],
        dtype: str = "float32",
        group: str = "shapes",
    ) -> Row | None:
        """The row of a contiguous case, or None where the run left it out."""
        size = list(shape)
        wanted = (group, op, contender, dtype)
        for row in self.rows:
            found = (row["group"], row["op"], row["contender"], row["dtype"])
            # A GPU with less memory has fewer rows of a shape.
            same_size = row["shape"][1:] == size[1:] if self.on_gpu else row["shape"] == size
            if found == wanted and same_size:
                return row
        return None

    def speed_rows(self) -> list[Row]:
        """What the picture of speed shows."""
        return [
            row
            for row in self.rows
            if row["group"] == "shapes"
            and row["dtype"] == "float32"
            and any(row["shape"][-1] == shape[-1] for shape in self.shapes)
            and (self.on_gpu or tuple(row["shape"]) in SHAPES)
            and row["op"] in (SOFT_FORWARD, HARD_FORWARD, INDEX)
        ]

    def setup(self) -> str:
        """One sentence: where, with what, when."""
        document, machine = self.document, self.document["machine"]
        versions, revision = document["versions"], document["revision"]
        commit = (revision["commit"] or "unknown")[:12] + ("+" if revision["modified"] else "")
        compiler = versions["gumbel_ext_build"].get("compiler", "unknown")
        notes = " A `--quick` run: for orientation only." if document["quick"] else ""
        versions_text = f"torch {versions['torch']}, gumbel_ext {versions['gumbel_ext']}"
        if self.on_gpu:
            gpu = machine["gpu"]
            if document["skipped"]:
                notes += f" {count(len(document['skipped']), 'case')} left out."
            return (
                f"Measured on **{gpu['name']}** ({gpu['multiprocessors']} multiprocessors, compute "
                f"capability {gpu['compute_capability']}, driver {gpu['driver']}), "
                f"{versions_text}, commit {commit}, {document['date'][:10]}.{notes}"
            )
        if document["clock"] == "cpu":
            notes += " In CPU time, not wall time."
        kernels = CAPABILITY_NAMES.get(self.capability, self.capability)
        cores = f"{machine['cores_available']} cores, {count(document['threads'], 'thread')}"
        return (
            f"Measured with the **{kernels}** kernels on {machine['cpu']} ({cores}), "
            f"{versions_text} built by {compiler}, "
            f"commit {commit}, {document['date'][:10]}.{notes}"
        )


# --- targets ---


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


PEAK_BYTES_TARGET = 8.5  # forward and backward, float32: output 4, gradient 4, and O(rows)


def number(value: float) -> str:
    """Two or three significant digits, never in exponent form."""
    if value >= 100:
        return f"{value:.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}"


def shape_text(shape: Iterable[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def table(header: list[str], rows: Iterable[list[str]], numbers_from: int) -> str:
    ruler = [
        "---" if i < numbers_from or name == "verdict" else "---:" for i, name in enumerate(header)
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ruler, *rows])


def verdict(results: list[bool | None]) -> str:
    known = [met for met in results if met is not None]
    if not known:
        return "not measured"
    missed = known.count(False)
    return "met" if not missed else f"**missed** at {missed} of {len(known)}"


def targets_section(result: Result) -> str:
    over_shapes = []
    for target in soft_hard_targets():
        cells = [
            target.cell(result.find(target.op, target.peer, shape, target.dtype))
            for shape in SHAPES
        ]
        if all(met is None for _, met in cells):
            continue
        met = verdict([met for _, met in cells])
        lead = [target.op, target.dtype, f"`{target.peer}`", target.text]
        over_shapes.append([*lead, *(text for text, _ in cells), met])
    single = []
    for shape, target in SINGLE_SHAPE_TARGETS:
        text, is_met = target.cell(result.find(target.op, target.peer, shape, target.dtype))
        if is_met is None:
            continue
        where = shape_text(shape) + (" dim=1" if shape == INNER_DIM else ", per call")
        lead = [f"{target.op}, {where}", target.dtype, f"`{target.peer}`", target.text]
        single.append([*lead, text, verdict([is_met])])
    for row in result.memory_rows:
        if (row["contender"], row["dtype"], row["shape"]) != (GUMBEL_EXT, "float32", [4096, 1024]):
            continue
        peak = row["allocator_peak_bytes_per_element"]
        is_met = peak <= PEAK_BYTES_TARGET
        peers = [r for r in result.memory_rows if r["case"] == row["case"]]
        eager = next(
            (r["allocator_peak_bytes_per_element"] for r in peers if r["contender"] == EAGER), None
        )
        beside = f"`{EAGER}`" + (f": {number(eager)}" if eager is not None else "")
        bound = f"≤ {PEAK_BYTES_TARGET:g} bytes an element"
        text = number(peak) if is_met else f"**{number(peak)}**"
        what = f"peak memory, {row['op']}, [4096, 1024]"
        single.append([what, "float32", beside, bound, text, verdict([is_met])])

    stated = "The targets are stated for AVX-512 and two threads" + (
        "."
        if result.capability == "avx512"
        else f"; this is {CAPABILITY_NAMES[result.capability]}."
    )
    notes = (
        f"{stated} A cell is the median over rounds of gumbel_ext's time over the peer's (≤) or of "
        "the peer's time over gumbel_ext's (≥); **bold** misses its target; ~ marks cells whose "
        "middle half of the rounds lies on both sides of it. A backward is compared with the "
        "peer's backward."
    )
    header = ["op", "dtype", "against", "target", *map(shape_text, SHAPES), "verdict"]
    parts = [result.setup(), "", notes, ""]
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


# --- other tables ---


def grouped(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """Rows of one case together, by contender, in the order of the file."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["contender"]] = row
    return list(cases.values())


def optional(row: Row | None, value: Callable[[Row], str]) -> str:
    return "" if row is None else value(row)


def times_section(result: Result) -> str:
    copied = "as many bytes as the operator must" if result.on_gpu else "the logits"
    groups = ("shapes", "long rows", "layouts", "workloads") if result.on_gpu else ("shapes",)
    unit, scale = ("picoseconds", 1e3) if result.on_gpu else ("nanoseconds", 1)

    def per_element(row: Row) -> str:
        return number(row["median_ns_per_element"] * scale)

    lines = []
    for case in grouped(r for r in result.rows if r["group"] in groups):
        ours = case[GUMBEL_EXT]
        shape = shape_text(ours["shape"]) + (f" dim={ours['dim']}" if ours["dim"] != -1 else "")
        if ours["variant"] != "contiguous":
            shape += f", {ours['variant']}"
        compiled = case.get(COMPILED) or case.get(COMPILED_ARGMAX)
        peers = [case.get(EAGER) or case.get(ARGMAX), compiled, *map(case.get, (SOFTMAX, COPY))]
        cells = [optional(row, per_element) for row in [ours, *peers]]
        spread = ours["iqr_ns_per_element"] / ours["median_ns_per_element"]
        lines.append([ours["op"], ours["dtype"], shape, *cells, f"{100 * spread:.0f} %"])
    header = [
        "op",
        "dtype",
        "shape",
        "gumbel_ext",
        "eager",
        "torch.compile",
        "F.softmax",
        "copy_",
        "spread",
    ]
    return (
        f"<details><summary>Median {unit} per element, every shape</summary>\n\n"
        "Eager is `F.gumbel_softmax`, for index `argmax(logits + gumbel)`; torch.compile is of "
        "`F.gumbel_softmax`; `F.softmax` does the same passes (forward, backward) of plain "
        f"softmax; `copy_` moves {copied} into memory that is already there. Spread: gumbel_ext's "
        "interquartile range over its median.\n\n"
        + table(header, lines, numbers_from=3)
        + "\n\n</details>"
    )


def workloads_section(result: Result) -> str:
    def microseconds(row: Row) -> str:
        return number(row["microseconds_per_call"]["median"])

    def times_faster(row: Row) -> str:
        return number(row["time_over_baseline"]["median"]) + "x"

    lines = []
    for case in grouped(r for r in result.rows if r["group"] in ("workloads", "layouts")):
        ours, compiled = case[GUMBEL_EXT], case.get(COMPILED)
        eager = case.get(EAGER) or case[ARGMAX]
        size = f"{shape_text(ours['shape'])} {ours['dtype']}"
        if ours["dim"] != -1:
            size += f", dim={ours['dim']}"
        if ours["variant"] != "contiguous":
            size += f", {ours['variant']}"
        lines.append(
            [
                ours["workload"] or "layout",
                ours["op"],
                size,
                microseconds(ours),
                microseconds(eager),
                optional(compiled, microseconds),
                times_faster(eager),
                optional(compiled, times_faster),
            ]
        )
    header = [
        "use",
        "op",
        "logits",
        "gumbel_ext µs",
        "eager µs",
        "torch.compile µs",
        "against eager",
        "against torch.compile",
    ]
    return table(header, lines, numbers_from=3)


def memory_section(result: Result) -> str:
    lines = []
    for row in result.memory_rows:
        resident = row["resident_peak_bytes_per_element"]
        saved = row["saved_beyond_output_bytes_per_element"]
        lines.append(
            [
                row["op"],
                f"{shape_text(row['shape'])} {row['dtype']}",
                f"`{row['contender']}`",
                number(row["allocator_peak_bytes_per_element"]),
                "" if resident is None else number(resident),
                number(saved),
                number(row["saved_beyond_output_bytes_per_row"]),
            ]
        )
    header = [
        "op",
        "logits",
        "contender",
        "peak, allocator",
        "peak, resident",
        "saved beyond output",
        "saved, per row",
    ]
    return (
        "Bytes per element above the live logits and incoming gradient, in one forward and "
        "backward; the output and the gradient of the logits are included. The last column is in "
        "bytes per row.\n\n" + table(header, lines, numbers_from=3)
    )


# --- on a GPU ---


def gpu_section(result: Result) -> str:
    notes = (
        "A cell is the median over rounds of the peer's time over gumbel_ext's, on the GPU's own "
        "clock: how many times faster gumbel_ext is. `Tensor.copy_` moves as many bytes as the "
        "operator must read and write at least; against it the cell is the share of the bandwidth "
        "of a copy that gumbel_ext reaches. **Bold** misses its target; ~ marks cells whose middle "
        "half of the rounds lies on both sides of it."
    )
    parts = [
        result.setup(),
        notes,
        gpu_targets_table(result),
        gpu_launches_table(result),
        memory_section(result) if result.memory_rows else "",
        times_section(result),
    ]
    return "\n\n".join(part for part in parts if part)


def gpu_targets_table(result: Result) -> str:
    lines = []
    for target in gpu_targets():
        cells = [
            target.cell(result.find(target.op, target.peer, shape, target.dtype))
            for shape in result.shapes
        ]
        if all(met is None for _, met in cells):
            continue
        met = verdict([met for _, met in cells])
        lead = [target.op, target.dtype, f"`{target.peer}`", target.text]
        lines.append([*lead, *(text for text, _ in cells), met])
    header = ["op", "dtype", "against", "target", *map(shape_text, result.shapes), "verdict"]
    return table(header, lines, numbers_from=4)


def gpu_launches_table(result: Result) -> str:
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


SECTIONS: dict[str, Callable[[Result], str]] = {
    "targets": targets_section,
    "workloads": workloads_section,
    "memory": memory_section,
    "times": times_section,
}
GPU_SECTION = "gpu"


def markers(section: str) -> tuple[str, str]:
    return f"<!-- begin {section}: made by plot.py -->", f"<!-- end {section} -->"


def empty_page(names: Iterable[str] = SECTIONS) -> str:
    """What a directory without benchmarks.md starts with."""
    return "".join(f"## {name}\n\n" + "\n".join(markers(name)) + "\n\n" for name in names)


def insert_tables(page: str, results: list[Result]) -> str:
    """The page with every marked section made anew, as far as there are results for it."""
    of_cpu = [result for result in results if not result.on_gpu]
    of_gpu = [result for result in results if result.on_gpu]
    for name, section in SECTIONS.items() if of_cpu else ():
        texts = [section(result) for result in of_cpu]
        if len(of_cpu) > 1 and name != "targets":
            for i, result in enumerate(of_cpu):
                capability = CAPABILITY_NAMES.get(result.capability, result.capability)
                texts[i] = f"*{capability} kernels*\n\n{texts[i]}"
        page = replace_section(page, name, texts)
    if of_gpu:
        if markers(GPU_SECTION)[0] not in page:  # a page from before there was a GPU
            added = "\n".join(["## On a GPU", "", *markers(GPU_SECTION)])
            page = f"{page.rstrip()}\n\n{added}\n".lstrip()
        page = replace_section(page, GPU_SECTION, [gpu_section(result) for result in of_gpu])
    return page


def replace_section(page: str, name: str, texts: list[str]) -> str:
    begin, end = markers(name)
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"benchmarks.md must have the lines {begin} and {end} once each")
    before, rest = page.split(begin)
    _, after = rest.split(end)
    body = "\n\n".join(texts)
    return f"{before}{begin}\n{body}\n{end}{after}"


# --- pictures ---


def machine_caption(result: Result) -> str:
    document = result.document
    if result.on_gpu:
        gpu = document["machine"]["gpu"]
        return f"{gpu['name']}, driver {gpu['driver']}, torch {document['versions']['torch']}"
    capability = CAPABILITY_NAMES.get(result.capability, result.capability)
    return (
        f"{document['machine']['cpu']}, {capability}, {count(document['threads'], 'thread')}, "
        f"torch {document['versions']['torch']}"
    )


def draw_panel(axes: Axes, result: Result, op: str, peer: str, title: str) -> None:
    order = [COPY, SOFTMAX, COMPILED, COMPILED_ARGMAX, peer, GUMBEL_EXT]
    for contender in order:
        found = [(i, result.find(op, contender, shape)) for i, shape in enumerate(result.shapes)]
        points = [(i, row["median_ns_per_element"]) for i, row in found if row is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True), **STYLES[contender], zorder=order.index(contender)
            )
    for i, shape in enumerate(result.shapes):
        ours, theirs = result.find(op, GUMBEL_EXT, shape), result.find(op, peer, shape)
        if ours is None or theirs is None:
            continue
        ratio = theirs["time_over_baseline"]["median"]
        axes.annotate(
            f"{ratio:.0f}x" if ratio >= 9.5 else f"{ratio:.1f}x",
            (i, ours["median_ns_per_element"]),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            fontweight="bold",
            color=STYLES[GUMBEL_EXT]["color"],
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            zorder=len(order),
        )
    axes.set_title(title, fontsize=10, fontweight="bold", loc="left", pad=6)
    axes.set_yscale("log")
    axes.set_xlim(-0.4, len(result.shapes) - 0.6)
    # The rows of a GPU's shapes only keep it busy: there is no room to say how many.
    labels = [
        f"{columns}" if result.on_gpu else f"{rows}\nx\n{columns}"
        for rows, columns in result.shapes
    ]
    axes.set_xticks(
        range(len(labels)), labels, fontsize=6 if result.on_gpu else 7, linespacing=0.95
    )
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", which="major", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def speed_picture(result: Result, path: Path) -> None:
    with plt.rc_context(FONT):
        figure, panels = plt.subplots(1, 3, figsize=(8, 4.3), sharey=True)
        figure.subplots_adjust(left=0.075, right=0.985, top=0.755, bottom=0.19, wspace=0.08)
        draw_panel(panels[0], result, SOFT_FORWARD, EAGER, "soft")
        draw_panel(panels[1], result, HARD_FORWARD, EAGER, "hard (straight-through)")
        draw_panel(panels[2], result, INDEX, ARGMAX, "index only")
        times = [row["median_ns_per_element"] for row in result.speed_rows()]
        first = panels[0]
        first.set_ylim(min(times) / 1.5, max(times) * 2)
        first.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        first.yaxis.set_minor_formatter(NullFormatter())
        first.set_ylabel("nanoseconds per element (log)")
        where = "classes of float32 logits" if result.on_gpu else "logits, float32: rows x classes"
        panels[1].set_xlabel(where, labelpad=5)

        names = {
            EAGER: "PyTorch: F.gumbel_softmax, argmax(logits + noise)",
            COMPILED: "torch.compile(F.gumbel_softmax)",
            GUMBEL_EXT: "gumbel_ext",
            SOFTMAX: "F.softmax, no noise",
            COPY: "copying as many bytes" if result.on_gpu else "copying the logits",
        }
        keys = [Line2D([], [], **STYLES[name], label=text) for name, text in names.items()]
        keys = [keys[2], keys[0], keys[1], keys[3], keys[4]]  # filled column by column
        figure.legend(
            handles=keys,
            loc="upper left",
            bbox_to_anchor=(0.004, 0.935),
            ncols=3,
            frameon=False,
            fontsize=8,
            handlelength=2.6,
            columnspacing=1.4,
        )
        heading(
            figure,
            "Gumbel-softmax on a GPU" if result.on_gpu else "Gumbel-softmax on the CPU",
            "lower is better; numbers: times faster than PyTorch",
        )
        figure.text(0.985, 0.014, machine_caption(result), fontsize=7, color=FAINT, ha="right")
        save(figure, path)


def memory_picture(result: Result, path: Path) -> None:
    shape = [16384, 1024] if result.on_gpu else [4096, 1024]
    wanted = [
        row for row in result.memory_rows if row["shape"] == shape and row["dtype"] == "float32"
    ]
    if not wanted:
        return
    order = [GUMBEL_EXT, COMPILED, EAGER]
    with plt.rc_context(FONT):
        figure, panels = plt.subplots(1, 2, figsize=(8, 2.2), sharex=True, sharey=True)
        figure.subplots_adjust(left=0.262, right=0.985, top=0.74, bottom=0.24, wspace=0.08)
        for axes, op in zip(panels, ("soft", "hard"), strict=True):
            rows = {r["contender"]: r for r in wanted if r["op"] == f"{op} forward+backward"}
            present = [name for name in order if name in rows]
            peaks = [rows[name]["allocator_peak_bytes_per_element"] for name in present]
            colors = [STYLES[name]["color"] for name in present]
            places = [order.index(name) for name in present]
            axes.barh(places, peaks, height=0.6, color=colors)
            for place, peak in zip(places, peaks, strict=True):
                axes.annotate(
                    f"{peak:.1f}",
                    (peak, place),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontweight="bold",
                )
            axes.axvline(8, color=FAINT, linewidth=1.1, linestyle=(0, (3, 2)), zorder=3)
            title = "soft" if op == "soft" else "hard (straight-through)"
            axes.set_title(title, fontsize=10, fontweight="bold", loc="left")
            axes.set_xlim(0, max(r["allocator_peak_bytes_per_element"] for r in wanted) * 1.15)
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
        panels[0].set_yticks(range(len(order)), order, fontsize=8)
        panels[0].invert_yaxis()
        panels[0].set_xlabel("bytes per element")
        panels[1].set_xlabel("dashed: output and gradient alone, 8 bytes")
        figure.text(
            0.014,
            0.91,
            f"Peak memory of one forward and backward, float32 logits {shape_text(shape)}",
            fontsize=10.5,
            fontweight="bold",
        )
        save(figure, path)


def default_results() -> list[Path]:
    """Whole runs, the capability of the targets first, then those of GPUs."""
    found = [RESULTS / f"cpu-{capability}.json" for capability in CAPABILITIES]
    unfinished = ("-quick", "-partial")
    of_gpus = [path for path in RESULTS.glob("gpu-*.json") if not path.stem.endswith(unfinished)]
    of_gpus += RESULTS.glob("gpu-*/bench.json")  # which gpu_report.sh leaves
    return [path for path in [*found, *sorted(of_gpus)] if path.exists()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULT.json")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where benchmarks.md is")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where the tables are out of date"
    )
    arguments = parser.parse_args()
    paths = arguments.results or default_results()
    if not paths:
        print("plot.py: no results; run benchmarks/bench_cpu.py first", file=sys.stderr)
        return 2
    try:
        results = [Result(path) for path in paths]
        page_path = arguments.docs / "benchmarks.md"
        sections = SECTIONS if any(not result.on_gpu for result in results) else ()
        page = page_path.read_text() if page_path.exists() else empty_page(sections)
        made = insert_tables(page, results)
    except (OSError, ValueError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        return 2
    if arguments.check:
        if made != page:
            print(f"plot.py: {page_path} is out of date; run benchmarks/plot.py", file=sys.stderr)
            return 1
        return 0
    arguments.docs.mkdir(parents=True, exist_ok=True)
    page_path.write_text(made)
    for on_gpu, name in ((False, "cpu"), (True, "gpu")):
        result = next((result for result in results if result.on_gpu == on_gpu), None)
        if result is None:
            continue
        if result.speed_rows():
            speed_picture(result, arguments.docs / f"{name}-speed.png")
        if result.memory_rows:
            memory_picture(result, arguments.docs / f"{name}-memory.png")
        print(gpu_targets_table(result) if on_gpu else targets_section(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
