"""What the pages' tables are made of: results, targets, cells, marked places."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labels import (
    ARGMAX,
    COMPILED,
    COMPILED_ARGMAX,
    COPY,
    CUDA_SHAPES,
    EAGER,
    GUMBEL_EXT,
    HARD_FORWARD,
    INDEX,
    SHAPES,
    SOFT_FORWARD,
    SOFTMAX,
)

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

NOT_YET = "not yet measured"

Row = dict[str, Any]

CAPABILITY_NAMES = {"avx512": "AVX-512", "avx2": "AVX2", "neon": "NEON", "generic": "generic"}


def count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")


class Result:
    """One JSON file, with its rows by what they measure."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
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
        variant: str | None = None,
    ) -> Row | None:
        """The row of a case, or None where the run left it out."""
        size = list(shape)
        wanted = (group, op, contender, dtype)
        for row in self.rows:
            found = (row["group"], row["op"], row["contender"], row["dtype"])
            # Of a shape that does not fit a GPU's memory fewer rows were measured.
            asked = row.get("asked_shape", row["shape"])
            if found == wanted and asked == size and variant in (None, row["variant"]):
                return row
        return None

    @property
    def rehearsal(self) -> bool:
        """Whether its numbers mean nothing."""
        return bool(self.document.get("rehearsal"))

    @property
    def gpu_name(self) -> str:
        """What the GPU calls itself."""
        return str(self.document["machine"]["gpu"]["name"])

    def speed_rows(self) -> list[Row]:
        """What the picture of speed shows."""
        return [
            row
            for row in self.rows
            if row["group"] == "shapes"
            and row["dtype"] == "float32"
            and tuple(row.get("asked_shape", row["shape"])) in self.shapes
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
            if self.rehearsal:
                notes += " **A rehearsal: these numbers mean nothing.**"
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


def markers(section: str) -> tuple[str, str]:
    return f"<!-- begin {section}: made by plot.py -->", f"<!-- end {section} -->"


def replace_section(page: str, name: str, texts: list[str]) -> str:
    begin, end = markers(name)
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page must have the lines {begin} and {end} once each")
    before, rest = page.split(begin)
    _, after = rest.split(end)
    body = "\n\n".join(texts)
    return f"{before}{begin}\n{body}\n{end}{after}"


def refuse_rehearsal(page: Path) -> None:
    """Numbers that mean nothing stay out of the project's pages."""
    if page.resolve().is_relative_to(ROOT / "docs"):
        raise ValueError(f"a rehearsal is not for {page}: name a place outside docs/")
