"""Time of the family (distributions, top-k, relatives) beside its peers -> one JSON file.

python benchmarks/bench_family.py [--quick] [--cases PATTERN] [--threads N] [--output FILE]
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import pkgutil
import sys
import time
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import environment
import family
import torch
from bench_cpu import FORMAT, FULL, QUICK, RESULTS, Progress, dump, spread
from environment import rounded
from family.case import FamilyCase
from memory import allocator_trace
from timing import Budget, Measurement, measure_interleaved, settle_allocator


def collected(function: str, *arguments: object) -> list[FamilyCase]:
    """What the function of this name makes, of every module of the package that has it."""
    cases: list[FamilyCase] = []
    for module in sorted(module.name for module in pkgutil.iter_modules(family.__path__)):
        of_module = getattr(importlib.import_module(f"family.{module}"), function, None)
        cases += of_module(*arguments) if of_module else []
    return cases


def rows(case: FamilyCase, measured: dict[str, Measurement]) -> list[dict[str, Any]]:
    baseline = next(iter(measured))
    table = []
    for name, measurement in measured.items():
        seconds = measurement.seconds
        table.append(
            {
                "case": case.name,
                "page": case.page,
                "op": case.op,
                "dtype": case.dtype,
                "shape": list(case.shape),
                "variant": case.variant,
                "contender": name,
                "median_ns_per_element": rounded(seconds.median * 1e9 / case.elements),
                "microseconds_per_call": spread(seconds, 1e6),
                "baseline": baseline,
                "time_over_baseline": spread(measurement.relative_to(measured[baseline])),
                "rounds": len(measurement.rounds),
                "calls": measurement.calls,
            }
        )
    return table


def run_case(case: FamilyCase, budget: Budget) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    race, inputs = case.contenders("cpu")
    table = rows(case, measure_interleaved(race, inputs, budget, time.perf_counter))
    if case.memory:
        for row, call in zip(table, race.values(), strict=True):
            row["allocator_peak_bytes"] = allocator_trace(partial(call, 0))[0]
    return table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: a minute")
    parser.add_argument("--cases", metavar="PATTERN", help="only cases named like *PATTERN*")
    parser.add_argument("--threads", type=int, default=2, help="torch.set_num_threads (default 2)")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--output", type=Path, help="JSON file (default under benchmarks/results)")
    arguments = parser.parse_args()
    if arguments.threads < 1:
        parser.error(f"--threads must be at least 1, got {arguments.threads}")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    pattern = f"*{arguments.cases}*" if arguments.cases else "*"
    wanted = [case for case in collected("cases") if fnmatch.fnmatch(case.name, pattern)]
    wanted = [case for case in wanted if case.quick or not arguments.quick]
    if arguments.list:
        print("\n".join(case.name for case in wanted))
        return 0
    if not wanted:
        print(f"bench_family.py: no case matches --cases {arguments.cases}", file=sys.stderr)
        return 2

    warnings.filterwarnings("ignore")  # torch's own, about its compiler: they bury the progress
    torch.set_num_threads(arguments.threads)
    settle_allocator()
    machine, versions = environment.machine(), environment.versions()
    load = environment.load_average()
    if load is not None and load > 0.3 * machine["cores_available"]:
        print(
            f"bench_family.py: load average {load:.2f}: the machine is not quiet", file=sys.stderr
        )
    kind = "-quick" if arguments.quick else "-partial" if arguments.cases else ""
    capability = versions["gumbel_ext_cpu_capability"]
    output = arguments.output or RESULTS / f"family-cpu-{capability}{kind}.json"
    budget = QUICK if arguments.quick else FULL
    document: dict[str, Any] = {
        "format": FORMAT,
        "date": environment.now(),
        "quick": arguments.quick,
        "threads": arguments.threads,
        "budget": asdict(budget),
        "machine": machine,
        "versions": versions,
        "revision": environment.revision(),
        "load_average": {"before": load, "after": None},
        "duration_seconds": 0,
        "rows": [],
    }
    progress = Progress(len(wanted))
    started = time.monotonic()
    for case in wanted:
        progress.start(case.name)
        table = run_case(case, budget)
        document["rows"] += table
        progress.finish(table)
    document["duration_seconds"] = round(time.monotonic() - started)
    document["load_average"]["after"] = environment.load_average()
    dump(document, output)
    print(f"wrote {output} ({document['duration_seconds']} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
