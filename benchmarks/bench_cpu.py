"""Time and peak memory of gumbel_ext on the CPU beside its peers -> one JSON file.

python benchmarks/bench_cpu.py [--quick] [--cases PATTERN] [--threads N] [--output FILE]
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import environment
import memory
import torch
from cases import Case, Inputs, all_cases, contenders, memory_cases
from environment import rounded
from labels import GUMBEL_EXT, SOFTMAX
from timing import Budget, Measurement, Spread, measure_interleaved, settle_allocator

RESULTS = Path(__file__).resolve().parent / "results"
FORMAT = 1

FULL = Budget(seconds=2.0, min_rounds=5, max_rounds=60)
QUICK = Budget(seconds=0.3, min_rounds=3, max_rounds=20)


def spread(values: Spread, scale: float = 1.0) -> dict[str, float]:
    return {
        "median": rounded(values.median * scale),
        "p25": rounded(values.low * scale),
        "p75": rounded(values.high * scale),
        "min": rounded(values.minimum * scale),
    }


def rows(case: Case, measured: dict[str, Measurement]) -> list[dict[str, Any]]:
    baseline = GUMBEL_EXT if GUMBEL_EXT in measured else SOFTMAX
    table = []
    for name, measurement in measured.items():
        seconds = measurement.seconds
        per_element = 1e9 / case.elements
        ratio = measurement.relative_to(measured[baseline])
        table.append(
            {
                "case": case.name,
                "group": case.group,
                "workload": case.workload,
                "op": case.op,
                "dtype": case.dtype,
                "shape": list(case.shape),
                "dim": case.dim,
                "variant": case.variant,
                "contender": name,
                "median_ns_per_element": rounded(seconds.median * per_element),
                "min_ns_per_element": rounded(seconds.minimum * per_element),
                "iqr_ns_per_element": rounded((seconds.high - seconds.low) * per_element),
                "microseconds_per_call": spread(seconds, 1e6),
                "baseline": baseline,
                "time_over_baseline": spread(ratio),
                "rounds": len(measurement.rounds),
                "calls": measurement.calls,
                "minor_faults_per_call": rounded(measurement.minor_faults_per_call),
            }
        )
    return table


def run_case(
    case: Case, budget: Budget, clock: Callable[[], float], with_compile: bool
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    inputs = Inputs(case)
    race = contenders(case, inputs, with_compile)
    return rows(case, measure_interleaved(race, inputs.count, budget, clock))


class Progress:
    """A line on stderr that rewrites itself; nothing where stderr is not a terminal."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.started = total, 0, time.monotonic()
        self.visible = sys.stderr.isatty()

    def start(self, name: str) -> None:
        """Show the case that starts now."""
        if not self.visible:
            return
        elapsed = time.monotonic() - self.started
        left = f", {elapsed / self.done * (self.total - self.done):.0f} s left" if self.done else ""
        text = f"[{self.done + 1}/{self.total}{left}] {name}"
        print(f"\r\x1b[2K{text[:110]}", end="", file=sys.stderr, flush=True)

    def finish(self, table: list[dict[str, Any]]) -> None:
        """Replace the line by the case's result."""
        self.done += 1
        if not self.visible:
            return
        cells = []
        for row in table:
            if "median_ns_per_element" in row:
                cells.append(f"{row['contender']} {row['median_ns_per_element']:.3g}")
            else:
                cells.append(f"{row['contender']} {row['allocator_peak_bytes_per_element']:.3g} B")
        name = table[0]["case"] if table else ""
        print(f"\r\x1b[2K{name}: {', '.join(cells)}", file=sys.stderr, flush=True)


def dump(document: dict[str, Any], path: Path) -> None:
    """JSON with one table row on a line, so that two runs compare line by line."""
    tables = {"rows", "memory_rows"}
    parts = []
    for key, value in document.items():
        if key in tables:
            lines = ",\n".join("    " + json.dumps(row) for row in value)
            text = f"[\n{lines}\n  ]" if value else "[]"
        else:
            text = json.dumps(value, indent=2).replace("\n", "\n  ")
        parts.append(f"  {json.dumps(key)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    unfinished.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    unfinished.replace(path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: a minute")
    parser.add_argument("--cases", metavar="PATTERN", help="only cases named like *PATTERN*")
    parser.add_argument("--threads", type=int, default=2, help="torch.set_num_threads (default 2)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU time instead of wall time: for a busy machine, and with --threads 1 alone",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory cases out")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--output", type=Path, help="JSON file (default under benchmarks/results)")
    arguments = parser.parse_args()
    if arguments.threads < 1:
        parser.error(f"--threads must be at least 1, got {arguments.threads}")
    if arguments.cpu_time and arguments.threads != 1:
        # Threads that wait for each other spin, which is CPU time too.
        parser.error(f"--cpu-time needs --threads 1, got {arguments.threads}")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    quick, threads = arguments.quick, arguments.threads
    pattern = f"*{arguments.cases}*" if arguments.cases else "*"
    timed = [c for c in all_cases() if fnmatch.fnmatch(c.name, pattern) and (c.quick or not quick)]
    weighed = [] if arguments.no_memory else memory_cases(quick)
    weighed = [c for c in weighed if fnmatch.fnmatch(c.name, pattern)]
    if arguments.list:
        print("\n".join(c.name for c in [*timed, *weighed]))
        return 0
    if not timed and not weighed:
        print(f"bench_cpu.py: no case matches --cases {arguments.cases}", file=sys.stderr)
        return 2

    warnings.filterwarnings("ignore")  # torch's own, about its compiler: they bury the progress
    torch.set_num_threads(threads)
    settle_allocator()
    machine, versions = environment.machine(), environment.versions()
    load = environment.load_average()
    if load is not None and load > 0.3 * machine["cores_available"]:
        print(f"bench_cpu.py: load average {load:.2f}: the machine is not quiet", file=sys.stderr)

    # Only a whole run under the targets' conditions takes the name that is kept.
    partial = arguments.cases or arguments.no_compile or arguments.no_memory or threads != 2
    kind = "-quick" if quick else "-partial" if partial else ""
    capability = versions["gumbel_ext_cpu_capability"]
    output = arguments.output or RESULTS / f"cpu-{capability}{kind}.json"
    budget = QUICK if quick else FULL
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    document: dict[str, Any] = {
        "format": FORMAT,
        "date": environment.now(),
        "quick": quick,
        "complete": False,
        "threads": threads,
        "clock": "cpu" if arguments.cpu_time else "wall",
        "budget": asdict(budget),
        "machine": machine,
        "versions": versions,
        "revision": environment.revision(),
        "load_average": {"before": load, "after": None},
        "duration_seconds": 0,
        "skipped": [],
        "memory_cannot_see": memory.CANNOT_SEE,
        "rows": [],
        "memory_rows": [],
    }
    modes = {"always"} if quick else {"full", "always"}
    progress = Progress(len(timed) + len(weighed))
    started = time.monotonic()
    interrupted = False
    try:
        for case in [*timed, *weighed]:
            is_memory = case.group == "memory"
            compiled = not arguments.no_compile and (case.compiled in modes or is_memory)
            progress.start(case.name)
            try:
                if is_memory:
                    table = memory.run_in_own_process(case, threads, compiled)
                else:
                    table = run_case(case, budget, clock, compiled)
            except RuntimeError as error:
                # Out of memory, or a compiler that is missing: the other cases still count.
                reason = str(error).strip().splitlines()[0]
                document["skipped"].append({"case": case.name, "reason": reason})
                print(f"bench_cpu.py: skipped {case.name}: {reason}", file=sys.stderr)
                table = []
            document["memory_rows" if is_memory else "rows"] += table
            progress.finish(table)
    except KeyboardInterrupt:
        interrupted = True
    document["complete"] = not interrupted and not document["skipped"]
    document["duration_seconds"] = round(time.monotonic() - started)
    document["load_average"]["after"] = environment.load_average()
    if interrupted and arguments.output is None:
        output = output.with_name(f"cpu-{capability}-partial.json")
    dump(document, output)
    print(f"wrote {output} ({document['duration_seconds']} s)")
    return 130 if interrupted else 1 if document["skipped"] else 0


if __name__ == "__main__":
    sys.exit(main())
