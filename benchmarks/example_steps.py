"""Times of an example's training step, by method and by the number of classes -> one JSON file."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import environment
import torch
from bench_cpu import FORMAT, FULL, QUICK, RESULTS, dump, spread
from timing import Call, Measurement, measure_interleaved, settle_allocator


@dataclass(frozen=True)
class Steps:
    """The steps to be measured, one case for each number of classes."""

    name: str  # of the result: NAME-cpu-avx2.json
    batch: int
    classes: Sequence[int]
    quick_classes: Sequence[int]
    # The steps by method for a number of classes, the baseline first, and the number of inputs.
    contenders: Callable[[int], tuple[dict[str, Call], int]]


def rows(classes: int, measured: dict[str, Measurement]) -> list[dict[str, Any]]:
    baseline = next(iter(measured))
    return [
        {
            "classes": classes,
            "contender": name,
            "milliseconds_per_step": spread(measurement.seconds, 1e3),
            "baseline": baseline,
            "time_over_baseline": spread(measurement.relative_to(measured[baseline])),
            "rounds": len(measurement.rounds),
            "calls": measurement.calls,
        }
        for name, measurement in measured.items()
    ]


def main(steps: Steps, description: str) -> int:
    """Measures what the command line asks for, and writes the file."""
    program = Path(sys.argv[0]).name
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="two numbers of classes, few rounds")
    parser.add_argument("--threads", type=int, default=1, help="torch.set_num_threads (default 1)")
    parser.add_argument("--output", type=Path, help="JSON file (default under benchmarks/results)")
    arguments = parser.parse_args()
    if arguments.threads < 1:
        parser.error(f"--threads must be at least 1, got {arguments.threads}")
    torch.set_num_threads(arguments.threads)
    settle_allocator()
    machine, versions = environment.machine(), environment.versions()
    load = environment.load_average()
    if load is not None and load > 0.3 * machine["cores_available"]:
        print(f"{program}: load average {load:.2f}: the machine is not quiet", file=sys.stderr)
    capability = versions["gumbel_ext_cpu_capability"]
    kind = "-quick" if arguments.quick else ""
    output = arguments.output or RESULTS / f"{steps.name}-cpu-{capability}{kind}.json"
    budget = QUICK if arguments.quick else FULL
    document: dict[str, Any] = {
        "format": FORMAT,
        "date": environment.now(),
        "quick": arguments.quick,
        "threads": arguments.threads,
        "batch": steps.batch,
        "budget": asdict(budget),
        "machine": machine,
        "versions": versions,
        "revision": environment.revision(),
        "load_average": {"before": load, "after": None},
        "rows": [],
    }
    for classes in steps.quick_classes if arguments.quick else steps.classes:
        race, inputs = steps.contenders(classes)
        table = rows(classes, measure_interleaved(race, inputs, budget, time.perf_counter))
        document["rows"] += table
        cells = (
            f"{row['contender']} {row['milliseconds_per_step']['median']:.3g} ms "
            f"({row['time_over_baseline']['median']:.2f}x)"
            for row in table
        )
        print(f"{classes} classes: {', '.join(cells)}", file=sys.stderr)
    document["load_average"]["after"] = environment.load_average()
    dump(document, output)
    print(f"wrote {output}")
    return 0
