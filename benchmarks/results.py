"""Results as files, with their rows by what they measure."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS
from benchmarks.labels import (
    CUDA_SHAPES,
    HARD_FORWARD,
    INDEX,
    SHAPES,
    SOFT_FORWARD,
)

Row = dict[str, Any]

# The instruction set that the targets are stated for comes first.
CAPABILITY_NAMES = {"avx512": "AVX-512", "avx2": "AVX2", "neon": "NEON", "generic": "generic"}


def count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")


def asked_shape(row: Row) -> list[int]:
    """The shape of the case; of one that does not fit a GPU's memory fewer rows were measured."""
    found: list[int] = row["asked_shape"] if "asked_shape" in row else row["shape"]
    return found


class Result:
    """One JSON file, with its rows by what they measure."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if self.document.get("format") != 1:
            raise ValueError(f"{path}: format {self.document.get('format')!r}, expected 1")
        self.rows: list[Row] = self.document["rows"]
        self.memory_rows: list[Row] = self.document.get("memory_rows", [])

    @property
    def suite(self) -> str:
        """The suite that it is of: core, family, or steps of the examples."""
        if any("page" in row for row in self.rows):
            return "family"
        return "steps" if "batch" in self.document else "core"

    @property
    def name(self) -> str:
        """What the file's name says before the device."""
        return self.path.stem.partition("-cpu-")[0]

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU, or a rehearsal, made it."""
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
            if found == wanted and asked_shape(row) == size and variant in (None, row["variant"]):
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

    @property
    def contenders(self) -> list[str]:
        """Those of a race, in their order."""
        return list(dict.fromkeys(row["contender"] for row in self.rows))

    def of_contender(self, name: str) -> list[Row]:
        """Its rows, in their order."""
        return [row for row in self.rows if row["contender"] == name]

    def speed_rows(self) -> list[Row]:
        """What the picture of speed shows."""
        return [
            row
            for row in self.rows
            if row["group"] == "shapes"
            and row["dtype"] == "float32"
            and tuple(asked_shape(row)) in self.shapes
            and row["op"] in (SOFT_FORWARD, HARD_FORWARD, INDEX)
        ]

    def machine(self, kernels: str = "") -> str:
        """The machine, in few words."""
        machine, torch = self.document["machine"], self.document["versions"]["torch"]
        if self.on_gpu:
            return f"{machine['gpu']['name']}, driver {machine['gpu']['driver']}, torch {torch}"
        threads = count(self.document["threads"], "thread")
        return (
            f"{machine['cpu']}, {kernels or f'{self.capability} kernels'}, {threads}, torch {torch}"
        )

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


def grouped(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """Rows of one case together, by contender, in the order of the file."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["contender"]] = row
    return list(cases.values())


# --- the results that there are ---


def default_results() -> list[Result]:
    """Whole runs in benchmarks/results: the CPU's first, and there the instruction set that the
    targets are stated for.
    """
    patterns = ("*cpu-*.json", "*gpu-*.json", "gpu-*/bench.json", "gpu-*/family.json")
    unfinished = ("-quick", "-partial")
    found = [
        Result(path)
        for pattern in patterns
        for path in sorted(RESULTS.glob(pattern))
        if not path.stem.endswith(unfinished) and not path.stem.startswith("rehearsal-")
    ]
    order = list(CAPABILITY_NAMES)
    return sorted(found, key=lambda result: (result.on_gpu, order.index(result.capability)))
