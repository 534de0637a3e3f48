"""Tables and pictures of README.md and docs/ from benchmark results; reads nothing else.

python -m benchmarks.pages [RESULT.json ...] [--docs FOLDER] [--check]

Without files it takes every whole run in benchmarks/results and what the examples left. Tables go
into the regions of pages, between `<!-- begin NAME: made by benchmarks.pages -->` and
`<!-- end NAME -->`; the text around them, which says what they show, is kept. In another folder
than docs/ pages and regions that are missing are made. A rehearsal is shown in other folders only.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.cases.core.regimes import KERNELS_OF, measured_as
from benchmarks.environment import RESULTS, ROOT
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
from benchmarks.tables import (
    CAPABILITY_NAMES,
    NOT_YET,
    TIMES,
    Result,
    Row,
    Times,
    grouped,
    markers,
    number,
    optional,
    shape_text,
    table,
    with_region,
)
from benchmarks.targets import (
    LEFT_OUT,
    gpu_targets_section,
    targets_section,
)

# --- regions about one result of the core ---


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


Section = Callable[[Result], str]
CPU_REGIONS: dict[str, Section] = {
    "targets": targets_section,
    "workloads": workloads_section,
    "memory": memory_section,
    "times": times_section,
}
GPU_REGIONS: dict[str, Section] = {
    "gpu setup": Result.setup,
    "gpu targets": gpu_targets_section,
    "gpu launches": launches_section,
    "gpu memory": memory_section,
    "gpu times": times_section,
}


def over_results(section: Section, results: list[Result], titled: bool) -> str:
    """The section of each result, under its kernels or GPU where there are several."""
    texts = [section(result) for result in results]
    if titled and len(results) > 1:
        titles = [
            result.gpu_name
            if result.on_gpu
            else f"{CAPABILITY_NAMES.get(result.capability, result.capability)} kernels"
            for result in results
        ]
        texts = [f"*{title}*\n\n{text}" for title, text in zip(titles, texts, strict=True)]
    return "\n\n".join(texts)


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
        return "**Not measured on a GPU** yet; no speed is claimed for CUDA."
    return f"CUDA was measured on {', '.join(result.gpu_name for result in results)} alone."


# --- pages of the family ---


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


# --- docs/examples.md ---


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


# --- all pages ---


class Pages:
    """Pages of a folder, and the README.md beside docs/, with regions that are made anew."""

    def __init__(self, docs: Path) -> None:
        self.docs = docs
        self.texts: dict[Path, str] = {}

    def path(self, name: str) -> Path:
        """The file of a page."""
        if name == "README.md":
            return self.docs.resolve().parent / name
        return self.docs / name

    def there(self, name: str) -> bool:
        """Whether the folder has this page."""
        return self.path(name).exists() and (
            name != "README.md" or self.docs.resolve().name == "docs"
        )

    def edit(self, name: str, change: Callable[[str], str]) -> None:
        """Changes the text of a page."""
        path = self.path(name)
        if path not in self.texts:
            self.texts[path] = path.read_text(encoding="utf-8") if path.exists() else ""
        self.texts[path] = change(self.texts[path])

    def fill(self, name: str, region: str, body: str) -> None:
        """Makes a region anew; where it is missing it is made, but not in the project's pages."""

        def filled(text: str) -> str:
            if markers(region)[0] not in text and not in_project(self.docs):
                lines = [f"## {region}", "", *markers(region)]
                text = "\n".join([text.rstrip(), "", *lines, ""]).lstrip()
            return with_region(text, region, body)

        try:
            self.edit(name, filled)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def in_project(docs: Path) -> bool:
    return docs.resolve().is_relative_to(ROOT / "docs")


def core_regions(pages: Pages, results: list[Result], of_all: bool) -> None:
    """`of_all`: these are all results that there are, so that without one of a GPU nothing has
    been measured there.
    """
    of_cpu = [result for result in results if not result.on_gpu]
    of_gpu = [result for result in results if result.on_gpu]
    for region, section in CPU_REGIONS.items() if of_cpu else ():
        pages.fill("benchmarks.md", region, over_results(section, of_cpu, region != "targets"))
    if not of_gpu and not of_all:
        return
    nothing = {"gpu targets": gpu_targets_section(None)}
    for region, section in GPU_REGIONS.items():
        body = over_results(section, of_gpu, region != "gpu setup")
        body = body if of_gpu else nothing.get(region, NOT_YET_SENTENCE)
        pages.fill("benchmarks.md", region, body)
    if pages.there("kernels-cuda.md"):
        setup = over_results(Result.setup, of_gpu, titled=False)
        pages.fill("kernels-cuda.md", "gpu setup", setup or NOT_YET_SENTENCE)
        pages.edit("kernels-cuda.md", lambda page: with_shares(page, of_gpu))
    if pages.there("kernels-cuda-table.md"):
        pages.edit("kernels-cuda-table.md", lambda page: with_measured(page, of_gpu, kernel_share))
    if pages.there("README.md"):
        pages.fill("README.md", "gpu picture", readme_picture(of_gpu))
        pages.fill("README.md", "gpu status", readme_status(of_gpu))


NOT_YET_SENTENCE = f"**{NOT_YET.capitalize()}** on a GPU."


def with_shares(page: str, results: list[Result]) -> str:
    begin, end = markers("shares")
    body = page.partition(begin)[2].partition(end)[0].strip()
    return with_region(page, "shares", with_measured(body, results, predicted_shares))


def family_regions(pages: Pages, results: list[Result]) -> None:
    """With results of one kind of device those of the other are shown beside them."""
    kinds = {result.on_gpu for result in results}
    results = results + [r for r in default_family() if r.on_gpu not in kinds]
    results.sort(key=lambda result: result.on_gpu)
    for page in sorted({row["page"] for result in results for row in result.rows}):
        pages.fill(f"{page}.md", "family", family_section(results, page))


def step_times(results: Iterable[Result]) -> list[tuple[Times, Result]]:
    """The steps of which there is a result, with the first of it."""
    found = {result.name: result for result in reversed(list(results))}
    return [(times, found[times.result]) for times in TIMES if times.result in found]


def documents_of_examples(docs: Path) -> list[dict[str, Any]]:
    paths = sorted((docs / "examples").glob("*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


# --- results ---


# The instruction set that the targets are stated for comes first.
CAPABILITIES = ("avx512", "avx2", "neon", "generic")


def default_results() -> list[Result]:
    """Whole runs of the core and the steps, the capability of the targets first, then of GPUs."""
    paths = [RESULTS / f"cpu-{capability}.json" for capability in CAPABILITIES]
    paths += sorted(RESULTS.glob("gpu-*.json"))
    paths += sorted(RESULTS.glob("gpu-*/bench.json"))  # which benchmarks.report leaves
    for times in TIMES:
        paths += sorted(RESULTS.glob(f"{times.result}-cpu-*.json"))
    return [Result(path) for path in paths if whole(path)]


def default_family() -> list[Result]:
    """A whole run on the CPU, and those on GPUs."""
    of_cpu = filter(whole, sorted(RESULTS.glob("family-cpu-*.json")))
    of_gpus = [*RESULTS.glob("family-gpu-*.json"), *RESULTS.glob("gpu-*/family.json")]
    return [Result(path) for path in [*list(of_cpu)[:1], *filter(whole, sorted(of_gpus))]]


def whole(path: Path) -> bool:
    return path.exists() and not path.stem.endswith(("-quick", "-partial"))


# --- pictures ---


def draw(docs: Path, core: list[Result], steps: list[Result], examples: list[Any]) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no pictures")
        return
    from benchmarks import plot

    for on_gpu, name in ((False, "cpu"), (True, "gpu")):
        result = next((result for result in core if result.on_gpu == on_gpu), None)
        if result is not None and result.speed_rows():
            plot.speed_picture(result, docs / f"{name}-speed.png")
        if result is not None and result.memory_rows:
            plot.memory_picture(result, docs / f"{name}-memory.png")
    for times, result in step_times(steps):
        plot.times_picture(result, times, docs / times.picture)
    for document in examples:
        if document["example"] in plot.EXAMPLES:
            picture, file = plot.EXAMPLES[document["example"]]
            picture(document, docs / file)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.pages", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULT.json")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="the pages' folder")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where a page is out of date"
    )
    arguments = parser.parse_args(argv)
    docs, of_all = arguments.docs, not arguments.results
    pages = Pages(docs)
    try:
        results = [Result(path) for path in arguments.results]
        results = results or default_results() + default_family()
        if in_project(docs) and any(result.rehearsal for result in results):
            raise ValueError(f"a rehearsal is not for {docs}: name a place outside docs/")
        core, family, steps = (
            [result for result in results if result.suite == suite]
            for suite in ("core", "family", "steps")
        )
        if core or of_all:
            core_regions(pages, core, of_all)
        if family:
            family_regions(pages, family)
        for times, result in step_times(steps):
            pages.fill("examples.md", times.section, steps_section(result, times))
        examples = documents_of_examples(docs) if of_all else []
        for document in examples:
            pages.fill("examples.md", document["example"], example_section(document))
    except (OSError, ValueError) as error:
        print(f"benchmarks.pages: {error}", file=sys.stderr)
        return 2
    if arguments.check:
        stale = [
            path
            for path, text in pages.texts.items()
            if not path.exists() or text != path.read_text(encoding="utf-8")
        ]
        for path in stale:
            print(f"benchmarks.pages: {path} is not what the results say", file=sys.stderr)
        return 1 if stale else 0
    docs.mkdir(parents=True, exist_ok=True)
    for path, text in pages.texts.items():
        path.write_text(text, encoding="utf-8")
    draw(docs, core, steps, examples)
    print(f"wrote {', '.join(sorted(path.name for path in pages.texts))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
