"""What an example is told on its command line, and the table and JSON file that it leaves.

A table's cells are the mean and standard deviation over the seeds; the file keeps every seed's
number. benchmarks/pages.py makes the tables of docs/examples.md from such files.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import gumbel_ext


@dataclass(frozen=True)
class Column:
    """A number that an example gives for each seed, and how its table shows it."""

    key: str
    heading: str
    digits: int


@dataclass
class Results:
    """Numbers of one example: of every row (an estimator, a method) and column, one for each seed.

    Attributes:
        example: its name, that of the file.
        columns: what is measured.
        seeds: the random seeds, in their order.
        settings: the arguments, and what else the numbers depend on.
        rows: name -> key of the column -> values in the order of the seeds.
    """

    example: str
    columns: Sequence[Column]
    seeds: Sequence[int]
    settings: dict[str, Any]
    rows: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def each_seed(self, out: Path) -> Iterator[int]:
        """Yields the seeds, and after each writes the file: what stops early keeps the others."""
        self.settings["seeds"] = []
        # disable=None: a bar at a terminal, nothing in a log.
        for seed in tqdm(self.seeds, desc="seeds", disable=None, leave=False):
            yield seed
            self.settings["seeds"].append(seed)
            self.write(out)

    def add(self, row: str, **values: float) -> None:
        """Appends one seed's numbers."""
        cells = self.rows.setdefault(row, {column.key: [] for column in self.columns})
        for key, value in values.items():
            cells[key].append(value)

    def document(self) -> dict[str, Any]:
        """Returns what the file holds: JSON types only."""
        return {
            "example": self.example,
            "columns": [vars(column) for column in self.columns],
            "settings": self.settings,
            "rows": self.rows,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "gumbel_ext": gumbel_ext.__version__,
            },
            "machine": {"architecture": platform.machine(), "system": platform.system()},
            "seconds": round(time.monotonic() - self.started),
        }

    def write(self, folder: Path) -> Path:
        """Writes the file, and returns where it is."""
        path = folder / f"{self.example}.json"
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.document(), indent=1) + "\n")
        return path

    def show(self) -> None:
        """Prints the table."""
        document = self.document()
        print(f"\n{table(document)}\n\nmean ± standard deviation over {seeds(document)}")


def spread(values: Sequence[float], digits: int) -> str:
    """Returns mean ± standard deviation over the seeds; a dash where there is no number.

    A number that is the same for all seeds is a setting, and stands alone.
    """
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(set(values)) > 1 else mean


def seeds(document: dict[str, Any]) -> str:
    """Returns the seeds as text: seeds 0 to 4."""
    used = document["settings"]["seeds"]
    return f"seed {used[0]}" if len(used) == 1 else f"seeds {used[0]} to {used[-1]}"


def table(document: dict[str, Any]) -> str:
    """Returns the Markdown table of a file: a row for each method, mean ± standard deviation."""
    columns = document["columns"]
    lines = [["", *(column["heading"] for column in columns)]]
    for name, cells in document["rows"].items():
        lines.append([name, *(spread(cells[c["key"]], c["digits"]) for c in columns)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]

    def row(cells: Sequence[str], fill: str = " ") -> str:
        first, *rest = (
            cell.rjust(width, fill) if i else cell.ljust(width, fill)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([row(lines[0]), row(rule), *map(row, lines[1:])])


def parse_arguments(
    description: str, argv: Sequence[str] | None, steps: int, seeds: int
) -> argparse.Namespace:
    """Returns steps, seeds (the list of them), threads and out.

    Args:
        description: what the example does, for --help.
        argv: the arguments; those of the process if None.
        steps: default number of training steps.
        seeds: default number of seeds.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=steps, help=f"of training (default: {steps})")
    parser.add_argument("--seed", type=int, default=0, help="the first one (default: 0)")
    parser.add_argument("--seeds", type=int, default=seeds, help=f"how many (default: {seeds})")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the JSON file")
    arguments = parser.parse_args(argv)
    for name in ("steps", "seeds", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    arguments.seeds = list(range(arguments.seed, arguments.seed + arguments.seeds))
    torch.set_num_threads(arguments.threads)
    return arguments
