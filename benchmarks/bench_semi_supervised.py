"""Time of a training step on images without labels against the number of classes -> one JSON file.

python benchmarks/bench_semi_supervised.py [--quick] [--threads N] [--output FILE]

The step of examples/semi_supervised.py, forward, backward and Adam, for a batch of 100 images, with
the sum over the K classes and with one Gumbel-softmax sample of the class (Jang et al. 2016, arXiv
1611.01144, section 4.3). Images are the examples' digits, whatever K is: time alone is measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import environment
import torch
from bench_cpu import FORMAT, FULL, QUICK, RESULTS, dump, spread
from timing import Budget, Call, Measurement, measure_interleaved, settle_allocator

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import semi_supervised as example
from digits import batches, load_binary_digits

CLASSES = (2, 5, 10, 20, 50, 100)
QUICK_CLASSES = (10, 100)
BATCHES = 14
TAU = 0.5

SUM = "sum over the classes"
CONTENDERS: dict[str, example.Unlabelled] = {
    "Gumbel-softmax, straight-through": example.sampled_straight_through,
    "Gumbel-softmax, soft": example.sampled_soft,
    SUM: example.marginalised,
}


def training_step(method: example.Unlabelled, classes: int, x: torch.Tensor) -> Call:
    torch.manual_seed(0)
    model = example.StyleAndClass(classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=example.LEARNING_RATE, fused=True)

    def step(i: int) -> None:
        optimizer.zero_grad()
        method(model, x[i], TAU).mean().backward()
        optimizer.step()

    return step


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


def run_case(
    classes: int, x: torch.Tensor, budget: Budget, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    race = {name: training_step(method, classes, x) for name, method in CONTENDERS.items()}
    return rows(classes, measure_interleaved(race, len(x), budget, clock))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
        print(
            f"bench_semi_supervised.py: load average {load:.2f}: the machine is not quiet",
            file=sys.stderr,
        )
    capability = versions["gumbel_ext_cpu_capability"]
    kind = "-quick" if arguments.quick else ""
    output = arguments.output or RESULTS / f"semi-supervised-cpu-{capability}{kind}.json"
    budget = QUICK if arguments.quick else FULL
    document: dict[str, Any] = {
        "format": FORMAT,
        "date": environment.now(),
        "quick": arguments.quick,
        "threads": arguments.threads,
        "batch": example.BATCH,
        "budget": asdict(budget),
        "machine": machine,
        "versions": versions,
        "revision": environment.revision(),
        "load_average": {"before": load, "after": None},
        "rows": [],
    }
    images = load_binary_digits().x_train
    x = torch.stack([images[batch] for batch in batches(len(images), example.BATCH, BATCHES, 0)])
    for classes in QUICK_CLASSES if arguments.quick else CLASSES:
        table = run_case(classes, x, budget, time.perf_counter)
        document["rows"] += table
        cells = (
            f"{row['contender']} {row['milliseconds_per_step']['median']:.3g} ms "
            f"({row['time_over_baseline']['median']:.2f}x)"
            for row in table
        )
        print(f"K = {classes}: {', '.join(cells)}", file=sys.stderr)
    document["load_average"]["after"] = environment.load_average()
    dump(document, output)
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
