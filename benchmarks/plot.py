"""Tables and pictures of docs/ from benchmark results; reads nothing but the JSON it is given.

python benchmarks/plot.py [RESULT.json ...] [--docs DIRECTORY] [--check]

Without files it takes every whole run in benchmarks/results. Tables go between marker comments in
docs/benchmarks.md, so that the text around them is kept; pictures show the first file of the CPU,
and the first of a GPU where there is one. What README.md and the pages about CUDA kernels say of a
GPU is made here too. A rehearsal is shown in other folders than docs/ only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import gpu_tables
import matplotlib.pyplot as plt
from labels import (
    ARGMAX,
    COMPILED,
    COMPILED_ARGMAX,
    COPY,
    DTYPES,
    EAGER,
    GUMBEL_EXT,
    HARD_BACKWARD,
    HARD_FORWARD,
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
from tables import (
    CAPABILITY_NAMES,
    RESULTS,
    ROOT,
    Result,
    Row,
    Target,
    count,
    grouped,
    markers,
    memory_section,
    number,
    optional,
    refuse_rehearsal,
    replace_section,
    shape_text,
    table,
    times_section,
    verdict,
)

# The instruction set that the targets are stated for comes first.
CAPABILITIES = ("avx512", "avx2", "neon", "generic")


# --- targets ---


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


PEAK_BYTES_TARGET = 8.5  # forward and backward, float32: output 4, gradient 4, and O(rows)


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


SECTIONS: dict[str, Callable[[Result], str]] = {
    "targets": targets_section,
    "workloads": workloads_section,
    "memory": memory_section,
    "times": times_section,
}
GPU_SECTION = "gpu"

Page = Callable[[str, list[Result]], str]


def empty_page(names: Iterable[str] = SECTIONS) -> str:
    """What a directory without benchmarks.md starts with."""
    return "".join(f"## {name}\n\n" + "\n".join(markers(name)) + "\n\n" for name in names)


def cpu_tables(page: str, results: list[Result]) -> str:
    """The page with every marked section of the CPU made anew."""
    for name, section in SECTIONS.items():
        texts = [section(result) for result in results]
        if len(results) > 1 and name != "targets":
            for i, result in enumerate(results):
                capability = CAPABILITY_NAMES.get(result.capability, result.capability)
                texts[i] = f"*{capability} kernels*\n\n{texts[i]}"
        page = replace_section(page, name, texts)
    return page


def gpu_page(page: str, results: list[Result]) -> str:
    """The page with its section about GPUs made anew."""
    if markers(GPU_SECTION)[0] not in page:  # a folder's page from before there was a GPU
        added = "\n".join(["## On a GPU", "", *markers(GPU_SECTION)])
        page = f"{page.rstrip()}\n\n{added}\n".lstrip()
    sections = [gpu_tables.gpu_section(result) for result in results]
    return replace_section(page, GPU_SECTION, sections or [gpu_tables.gpu_section(None)])


def kernels_page(page: str, results: list[Result]) -> str:
    page = replace_section(page, "where measured", [gpu_tables.where_measured(results)])
    return replace_section(page, "shares", [gpu_tables.predictions_table(results)])


def readme_page(page: str, results: list[Result]) -> str:
    page = replace_section(page, "gpu picture", [gpu_tables.readme_picture(results)])
    return replace_section(page, "gpu status", [gpu_tables.readme_status(results)])


# Those that are there are made anew; benchmarks.md is made where it is missing.
GPU_PAGES: dict[str, Page] = {
    "benchmarks.md": gpu_page,
    "kernels-cuda.md": kernels_page,
    "kernels-cuda-table.md": gpu_tables.measured_kernels,
}


def made_pages(docs: Path, results: list[Result], of_all: bool) -> dict[Path, str]:
    """Pages that results change, with their text; `of_all`: these are all results that there are,
    so that without one of a GPU nothing has been measured there.
    """
    of_cpu = [result for result in results if not result.on_gpu]
    of_gpu = [result for result in results if result.on_gpu]
    path = docs / "benchmarks.md"
    page = empty_page(SECTIONS if of_cpu else ())
    if path.exists():
        page = path.read_text(encoding="utf-8")
    pages = {path: cpu_tables(page, of_cpu) if of_cpu else page}
    for name, make in GPU_PAGES.items() if of_gpu or of_all else ():
        path = docs / name
        if path in pages or path.exists():
            text = pages[path] if path in pages else path.read_text(encoding="utf-8")
            pages[path] = make(text, of_gpu)
    readme = docs.resolve().parent / "README.md"
    if docs.resolve().name == "docs" and readme.exists() and (of_gpu or of_all):
        pages[readme] = readme_page(readme.read_text(encoding="utf-8"), of_gpu)
    return pages


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
        row
        for row in result.memory_rows
        if row.get("asked_shape", row["shape"]) == shape and row["dtype"] == "float32"
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
        if any(result.rehearsal for result in results):
            refuse_rehearsal(arguments.docs)
        pages = made_pages(arguments.docs, results, of_all=not arguments.results)
    except (OSError, ValueError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        return 2
    if arguments.check:
        stale = [path for path, text in pages.items() if text != path.read_text(encoding="utf-8")]
        for path in stale:
            print(f"plot.py: {path} is out of date; run benchmarks/plot.py", file=sys.stderr)
        return 1 if stale else 0
    arguments.docs.mkdir(parents=True, exist_ok=True)
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    for on_gpu, name in ((False, "cpu"), (True, "gpu")):
        result = next((result for result in results if result.on_gpu == on_gpu), None)
        if result is None:
            continue
        if result.speed_rows():
            speed_picture(result, arguments.docs / f"{name}-speed.png")
        if result.memory_rows:
            memory_picture(result, arguments.docs / f"{name}-memory.png")
        print(gpu_tables.targets_table(result) if on_gpu else targets_section(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
