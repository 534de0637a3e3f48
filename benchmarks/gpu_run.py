"""A run of cases on a GPU, or its rehearsal: command line, order, time limit, what is written."""

from __future__ import annotations

import argparse
import fnmatch
import gc
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

import environment
import torch
from bench_cpu import FORMAT, RESULTS, Progress, dump, spread
from compiled import compiled
from environment import rounded
from gpu import Device, Gpu, Rehearsal, answers, file_name, unusable
from labels import COPY, EAGERLY, IN_A_GRAPH
from timing import CALLS_IN_A_ROW, Budget, Call, Measurement, measure_on_gpu
from torch._functorch import config as functorch_config

FULL = Budget(seconds=0.4, min_rounds=9, max_rounds=200)
QUICK = Budget(seconds=0.2, min_rounds=5, max_rounds=60)
REHEARSED = Budget(seconds=0.0, min_rounds=3, max_rounds=3)

CALLS_IN_A_GRAPH = 20

# Seconds after which what is measured is written again: it outlives whatever ends the process.
WRITTEN_EVERY = 10.0

Row = dict[str, Any]
Skipped = list[dict[str, str]]


class Named(Protocol):
    """A case, as far as a run must know it."""

    @property
    def name(self) -> str:
        """Path-like name, for --cases."""

    @property
    def quick(self) -> bool:
        """Whether it is part of a --quick run."""


C = TypeVar("C", bound=Named)


class UnsuitableGpuError(Exception):
    """Why a case is left out without that being a failure."""


def parse_arguments(description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: a minute")
    parser.add_argument("--cases", metavar="PATTERN", help="only cases named like *PATTERN*")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory cases out")
    parser.add_argument(
        "--seconds", type=float, metavar="N", help="start no further case after N seconds"
    )
    parser.add_argument(
        "--dry-run", "--list", action="store_true", help="print the cases and stop; needs no GPU"
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="all cases, small and on the CPU, without a GPU's clock: does this program work?",
    )
    parser.add_argument("--output", type=Path, help="JSON file (default under benchmarks/results)")
    arguments = parser.parse_args(argv)
    if arguments.seconds is not None and not arguments.seconds > 0:
        parser.error(f"--seconds must be positive, got {arguments.seconds:g}")
    output = arguments.output
    if arguments.rehearse and output is not None and "rehearsal" not in output.name:
        parser.error(f"--output of a rehearsal must be named so (rehearsal-...), got {output.name}")
    return arguments


def chosen(cases: Iterable[C], arguments: argparse.Namespace) -> list[C]:
    pattern = f"*{arguments.cases}*" if arguments.cases else "*"
    wanted = [case for case in cases if case.quick or not arguments.quick]
    return [case for case in wanted if fnmatch.fnmatch(case.name, pattern)]


def first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, RuntimeError) and line:
        return line
    return f"{type(error).__name__}: {line}"


def runnable(
    case: str,
    race: Mapping[str, Callable[[], Call]],
    device: Device,
    skipped: Skipped,
    must: Iterable[str],
) -> dict[str, Call]:
    """The contenders that can run: one that cannot is written down, and the others still race.

    Those that `must` run fail the case.
    """
    found: dict[str, Call] = {}
    for name, make in race.items():
        try:
            call = make()
            call(0)
            device.synchronize()
            found[name] = call
        except Exception as error:  # of its own, of the compiler, for want of memory
            if name in must:
                raise
            skipped.append({"case": case, "contender": name, "reason": first_line(error)})
            device.empty_cache()
    return found


def copier(bytes_moved: int, device: Device) -> Call:
    """Tensor.copy_ that moves as many bytes as an operator must: half of them read."""
    options: Any = {"dtype": torch.uint8, "device": device.torch_device}
    # Not zeros, which take less power, so that clocks may be higher.
    source = torch.empty(max(1, bytes_moved // 2), **options).random_()
    destination = torch.empty_like(source)
    return lambda _: destination.copy_(source)


def as_called(call: Call, how: str, device: Device) -> Call:
    """The call, or twenty of it as one CUDA graph."""
    return device.graph_of(call, CALLS_IN_A_GRAPH) if how == IN_A_GRAPH else call


def timed(
    race: Mapping[str, Call], inputs: int, budget: Budget, device: Device, how: str
) -> dict[str, Measurement]:
    """Times of one call, by the way that it is made: as_called(), in a row, or with cold caches."""
    if how == EAGERLY:
        return measure_on_gpu(race, inputs, budget, device, CALLS_IN_A_ROW, flush=False)
    if how == IN_A_GRAPH:
        measured = measure_on_gpu(race, inputs, budget, device, flush=False)
        return {name: _one_of_many(m) for name, m in measured.items()}
    return measure_on_gpu(race, inputs, budget, device)


def _one_of_many(measured: Measurement) -> Measurement:
    each = tuple(seconds / CALLS_IN_A_GRAPH for seconds in measured.rounds)
    return Measurement(each, measured.calls * CALLS_IN_A_GRAPH, 0.0)


def add_shares(table: list[Row], measured: Mapping[str, Measurement], bytes_moved: int) -> None:
    """Into each row the share of a copy's bandwidth, where a copy was among the contenders."""
    if COPY not in measured:
        return
    for row in table:
        mine = measured[row["contender"]]
        row["share_of_copy_bandwidth"] = spread(measured[COPY].relative_to(mine))
        row["gigabytes_per_second"] = rounded(bytes_moved / mine.seconds.median * 1e-9)


def add_kernels(table: list[Row], race: Mapping[str, Call], device: Device, how: str) -> None:
    """Into each row what a call starts: kernels, copies and fills; None where nobody can tell."""
    replays, calls = (1, CALLS_IN_A_GRAPH) if how == IN_A_GRAPH else (4, 4)
    for row in table:
        started = device.started(race[row["contender"]], replays)
        row["kernels_per_call"] = None if started is None else started / calls


@contextmanager
def unsearched(device: Device, arguments: argparse.Namespace) -> Iterator[None]:
    """The garbage collector without the compiler's modules: half a million objects that it would
    search around every case, for longer than most cases take.
    """
    if not arguments.no_compile:
        # Where it fails, each contender that wants it will say so.
        with suppress(Exception):
            compiled(lambda x: x.sin())(torch.ones(1, device=device.torch_device))
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def run(
    program: str,
    cases: list[C],
    arguments: argparse.Namespace,
    kind: str,
    measure: Callable[[C, Device, Budget, Skipped], tuple[str, list[Row]]],
    device: Device | None = None,
) -> int:
    """Measures the cases in their order and writes the JSON; the exit status.

    `measure` returns the table that its rows belong to, "rows" or "memory_rows".
    """
    if not cases:
        print(f"{program}: no case matches --cases {arguments.cases}", file=sys.stderr)
        return 2
    if arguments.dry_run:
        print("\n".join(case.name for case in cases))
        return 0
    if device is None and not arguments.rehearse:
        reason = unusable()
        if reason is not None:
            print(f"{program}: {reason}", file=sys.stderr)
            return 2

    device = device or (Rehearsal() if arguments.rehearse else Gpu())
    described = device.describe()
    partial = arguments.cases or arguments.no_compile or arguments.no_memory
    suffix = "-quick" if arguments.quick else "-partial" if partial else ""
    name = f"{kind}-{file_name(described['name'])}{suffix}.json"
    if device.rehearsal:
        name = f"rehearsal-{kind}.json"
    output = arguments.output or RESULTS / name
    budget = REHEARSED if device.rehearsal else QUICK if arguments.quick else FULL
    document: dict[str, Any] = {
        "format": FORMAT,
        "device": "cuda",
        "rehearsal": device.rehearsal,
        "date": environment.now(),
        "quick": arguments.quick,
        "complete": False,
        "threads": torch.get_num_threads(),
        "clock": "the host's, in a rehearsal" if device.rehearsal else "cuda events",
        "budget": asdict(budget),
        "machine": {**environment.machine(), "gpu": described},
        "versions": environment.versions(),
        "revision": environment.revision(),
        "gpu_state": {"before": device.state(), "after": None},
        "duration_seconds": 0,
        "skipped": [],
        "rows": [],
        "memory_rows": [],
    }
    device.warm_up()
    document["gpu_state"]["warm"] = device.state()
    skipped: Skipped = document["skipped"]
    progress = Progress(len(cases))
    started = written = time.monotonic()
    out_of_time = f"out of {arguments.seconds or 0:g} s"
    excused = {out_of_time}
    interrupted = False
    # A backward is timed many times on one graph, which compiled ones forbid to save memory.
    backwards = functorch_config.patch(donated_buffer=False)
    try:
        with backwards, warnings.catch_warnings(), unsearched(device, arguments):
            warnings.simplefilter("ignore")  # torch's own, about its compiler: they bury the rest
            for case in cases:
                elapsed = time.monotonic() - started
                if arguments.seconds is not None and elapsed >= arguments.seconds:
                    skipped.append({"case": case.name, "reason": out_of_time})
                    continue
                progress.start(case.name)
                rows: list[Row] = []
                try:
                    table, rows = measure(case, device, budget, skipped)
                    document[table] += rows
                except UnsuitableGpuError as reason:
                    skipped.append({"case": case.name, "reason": str(reason)})
                    excused.add(str(reason))
                except Exception as error:  # one case should not end the run
                    skipped.append({"case": case.name, "reason": first_line(error)})
                    print(f"{program}: skipped {case.name}: {first_line(error)}", file=sys.stderr)
                    if not answers(device):
                        raise
                progress.finish(rows)
                gc.collect()
                device.empty_cache()
                if time.monotonic() - written > WRITTEN_EVERY:
                    document["duration_seconds"] = round(time.monotonic() - started)
                    dump(document, output)
                    written = time.monotonic()
    except KeyboardInterrupt:
        interrupted = True
    except RuntimeError as error:
        print(f"{program}: the GPU is lost: {first_line(error)}", file=sys.stderr)
        interrupted = True
    document["complete"] = not interrupted and not skipped
    document["duration_seconds"] = round(time.monotonic() - started)
    document["gpu_state"]["after"] = device.state()
    dump(document, output)
    print(f"wrote {output} ({document['duration_seconds']} s)")
    late = [s for s in skipped if s["reason"] == out_of_time]
    if late:
        print(f"{len(late)} of {len(cases)} cases were left out for want of time")
    failed = any(s["reason"] not in excused for s in skipped)
    return 130 if interrupted else 1 if failed else 0
