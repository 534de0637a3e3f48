"""Tables of results, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from benchmarks.cases.core.regimes import KERNELS_OF, measured_as
from benchmarks.labels import (
    ARGMAX,
    COMPILED,
    COMPILED_ARGMAX,
    COPY,
    EAGER,
    GUMBEL_EXT,
    HARD_BACKWARD,
    HARD_FORWARD,
    INDEX,
    REGIMES,
    SOFT_BACKWARD,
    SOFT_FORWARD,
    SOFTMAX,
)
from benchmarks.results import Result, Row, grouped

NOT_YET = "not yet measured"
# Of a run that was cut short.
LEFT_OUT = "left out"


# --- cells ---


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


def optional(row: Row | None, value: Callable[[Row], str]) -> str:
    return "" if row is None else value(row)


# --- a result of the core ---


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


def times_section(result: Result) -> str:
    """Time per element of every shape."""
    groups = ("shapes", "long rows", "layouts", "workloads") if result.on_gpu else ("shapes",)
    scale = 1e3 if result.on_gpu else 1  # picoseconds or nanoseconds

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
    return table(header, lines, numbers_from=3)


def launches_section(result: Result) -> str:
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
    header = ["op", "logits", "gumbel_ext µs", "eager µs", "torch.compile µs", "F.softmax µs"]
    return table([*header, "kernels"], lines, numbers_from=2)


# --- columns of what was measured on GPUs, in tables that are not made here ---


MEASURED = "measured"
Cells = Callable[[Result, str, list[str]], list[str]]


def with_measured(text: str, results: list[Result], cells: Cells) -> str:
    """The text with the last columns of its tables made anew: from the first one that is headed as
    measured, those for each GPU.

    `cells` gives those of a line, from a result, the heading above the table and the line's cells.
    """
    lines: list[str] = []
    heading, before, titles = "", 0, [MEASURED]
    for line in text.split("\n"):
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        if not line.startswith("|"):
            lines.append(line)
            continue
        old = line.split("|")[1:-1]
        names = [name.strip() for name in old]
        if not lines or not lines[-1].startswith("|"):
            before = next(i for i, name in enumerate(names) if MEASURED in name)
            stems = [f"{name.partition(MEASURED)[0]}{MEASURED}" for name in names[before:]]
            titles = list(dict.fromkeys(stems))
            new = [f"{title}, {result.gpu_name}" for result in results for title in titles]
            new = new or titles
        elif not names[0].strip("-"):
            new = ["---"] * len(titles) * max(1, len(results))
        else:
            new = [cell for result in results for cell in cells(result, heading, names)]
            new = new or [NOT_YET] * len(titles)
        pad = " " if old[0].startswith(" ") else ""
        lines.append("|".join(["", *old[:before], *(f"{pad}{cell}{pad}" for cell in new), ""]))
    return "\n".join(lines)


def kernel_share(result: Result, heading: str, names: list[str]) -> list[str]:
    """The share of a copy's bandwidth that a kernel of kernels-cuda-table.md reaches."""
    op = next(op for op, kernels in KERNELS_OF.items() if kernels == heading)
    wanted = (REGIMES, op, measured_as(names[0]), names[1], GUMBEL_EXT)
    for row in result.rows:
        found = tuple(row[key] for key in ("group", "op", "workload", "dtype", "contender"))
        if found == wanted:
            return [f"{row['share_of_copy_bandwidth']['median']:.2f}"]
    return [LEFT_OUT]


def rows_of(least: int, most: int = 1 << 40) -> Callable[[Row], bool]:
    """Cases of the shapes that targets are stated for, with so many classes."""

    def belongs(row: Row) -> bool:
        return row["group"] == "shapes" and least <= row["asked_shape"][-1] <= most

    return belongs


def not_adjacent(row: Row) -> bool:
    return row["group"] == "layouts" and row["dim"] == 1


# The cases that a line of the table of predictions in kernels-cuda.md is about.
PREDICTED: dict[str, tuple[str, Callable[[Row], bool]]] = {
    "soft forward, rows of 256 classes or more": (SOFT_FORWARD, rows_of(256)),
    "hard forward, a warp or more a row": (HARD_FORWARD, rows_of(256)),
    "index alone, a warp or more a row": (INDEX, rows_of(256)),
    "backward from y": (SOFT_BACKWARD, rows_of(1)),
    "backward, recomputed, rows of 512 classes or more": (HARD_BACKWARD, rows_of(512)),
    "soft forward, 8 classes": (SOFT_FORWARD, rows_of(8, 8)),
    "soft forward, classes not adjacent": (SOFT_FORWARD, not_adjacent),
}


def predicted_shares(result: Result, heading: str, names: list[str]) -> list[str]:
    """From the lowest to the highest median share of the cases of a line, for each dtype."""
    op, belongs = PREDICTED[names[0]]
    cells = []
    for dtype in ("float32", "bfloat16"):
        shares = [
            row["share_of_copy_bandwidth"]["median"]
            for row in result.rows
            if (row["op"], row["dtype"], row["contender"]) == (op, dtype, GUMBEL_EXT)
            and row["variant"] == "contiguous"
            and belongs(row)
        ]
        low, high = (f"{end(shares):.2f}" if shares else LEFT_OUT for end in (min, max))
        cells.append(low if low == high else f"{low} to {high}")
    return cells


# --- the family ---


def family_table(result: Result, page: str) -> str:
    """One row a case and contender: its time, and how many times longer than ours it takes."""
    of_page = [row for row in result.rows if row["page"] == page and row["contender"] != COPY]
    # Columns that some rows of the page have, and no others.
    shares = any("share_of_copy_bandwidth" in row for row in of_page)
    kernels = any(row.get("kernels_per_call") is not None for row in of_page)
    memory = any("allocator_peak_bytes" in row for row in of_page)
    unit, scale = ("ps", 1e3) if result.on_gpu else ("ns", 1.0)
    lines = []
    for _, of_case in groupby(of_page, key=lambda row: row["case"]):
        for place, row in enumerate(of_case):
            ratio = row["time_over_baseline"]
            named = (row["op"], row["variant"], row.get("called"))
            first = place == 0
            share = row.get("share_of_copy_bandwidth")
            started, peak = row.get("kernels_per_call"), row.get("allocator_peak_bytes")
            lines.append(
                [
                    " ".join(part for part in named if part) if first else "",
                    shape_text(row["shape"]) if first else "",
                    row["dtype"] if first else "",
                    row["contender"],
                    number(row["microseconds_per_call"]["median"]),
                    number(row["median_ns_per_element"] * scale),
                    "1" if first else f"{number(ratio['median'])}",
                    *([f"{share['median']:.2f}" if share else ""] if shares else []),
                    *(["" if started is None else f"{started:g}"] if kernels else []),
                    *([number(peak / 1e6) if peak else ""] if memory else []),
                ]
            )
    header = ["operation", "shape", "dtype", "", "µs a call", f"{unit} an element", "times ours"]
    header += ["of a copy's bandwidth"] if shares else []
    header += ["kernels"] if kernels else []
    header += ["peak MB"] if memory else []
    return table(header, lines, 4)


def caption(result: Result) -> str:
    warning = " **A rehearsal: these numbers mean nothing.**" if result.rehearsal else ""
    return (
        f"{result.machine()}, {result.document['date'][:10]}. Medians; a ratio is formed in each "
        f"of the interleaved rounds.{warning}"
    )


def family_section(results: list[Result], page: str) -> str:
    """The tables of a page, the CPU's first; or that there is none yet of a GPU."""
    parts = []
    for result in results:
        if any(row["page"] == page for row in result.rows):
            parts += [family_table(result, page), caption(result)]
        elif result.on_gpu:
            parts.append(f"On {result.gpu_name}: {LEFT_OUT}.")
    if not any(result.on_gpu for result in results):
        parts.append(f"On a GPU: {NOT_YET}.")
    return "\n\n".join(parts)


# --- the examples, and their training steps ---


@dataclass(frozen=True)
class Times:
    """A section with the times of a training step; its result is that of a suite."""

    section: str
    result: str  # NAME-cpu-avx2.json
    picture: str
    heading: str
    alt: str
    classes: str  # what their number is called, in the table and below the picture
    classes_axis: str
    compared: str  # whose time over the first one's is shown
    ratio: str  # the heading of that column
    styles: tuple[str, ...]  # names of plot.STEP_STYLES


TIMES = (
    Times(
        section="times",
        result="semi-supervised",
        picture="semi-supervised-time.png",
        heading="Training step: one class or all",
        alt="A training step against K",
        classes="K",
        classes_axis="classes K",
        compared="sum over the classes",
        ratio="sum over straight-through",
        styles=("ours", "second", "theirs"),
    ),
    Times(
        section="quantizer_times",
        result="vector-quantizer",
        picture="vector-quantizer-time.png",
        heading="Training step of the quantiser",
        alt="A training step against the codes of a group",
        classes="codes",
        classes_axis="codes of each of two groups",
        compared="F.gumbel_softmax, multiply and sum",
        ratio="multiply and sum over GumbelVectorQuantizer",
        styles=("ours", "theirs", "second"),
    ),
)


def example_section(document: dict[str, Any]) -> str:
    """The table of an example, and what it was made with."""
    from examples import results

    settings, versions = document["settings"], document["versions"]
    seeds = settings["seeds"]
    more = [
        f"{name} {value}"
        for name, value in settings.items()
        if name not in ("steps", "seeds", "threads")
    ]
    caption = [
        f"{settings['steps']:,} steps",
        results.seeds(document),
        *more,
        f"torch {versions['torch']}",
        f"gumbel_ext {versions['gumbel_ext']}",
        f"Python {versions['python']}",
    ]
    spread = " Mean ± standard deviation over the seeds." if len(seeds) > 1 else ""
    return f"{results.table(document)}\n\n{', '.join(caption)}.{spread}"


def steps_section(result: Result, times: Times) -> str:
    """One row a number of classes: milliseconds of each, and a ratio to the first."""
    names = result.contenders
    compared = names.index(times.compared)
    columns = [result.of_contender(name) for name in names]
    lines = [
        [
            str(of_classes[0]["classes"]),
            *(number(row["milliseconds_per_step"]["median"]) for row in of_classes),
            f"{number(of_classes[compared]['time_over_baseline']['median'])}x",
        ]
        for of_classes in zip(*columns, strict=True)
    ]
    header = [times.classes, *(f"{name}, ms" for name in names), times.ratio]
    caption = (
        f"{result.machine()}, {result.document['date'][:10]}. Batch of {result.document['batch']}. "
        "Medians; the ratio is formed in each of the interleaved rounds."
    )
    picture = f"![{times.alt}]({times.picture})"
    return f"{table(header, lines, 0)}\n\n{caption}\n\n{picture}"
