"""A race: contenders that do the same job, made, timed on a device, and written as rows.

A suite is a module of `benchmarks.cases` with THREADS, the number that it is measured with;
`cases(kind of device)`, in the order in which they run; `measure(case, device, budget, options,
skipped)`, which returns the name of a table and rows for it; and `about(device)`, what its result
says beside the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from benchmarks.device import CALLS_IN_A_GRAPH, Device
from benchmarks.environment import rounded
from benchmarks.labels import COPY, IN_A_GRAPH
from benchmarks.timing import Budget, Call, Measurement, Spread, measure

Row = dict[str, Any]
Skipped = list[dict[str, str]]


class Case(Protocol):
    """A case, as far as a run must know it."""

    @property
    def name(self) -> str:
        """Path-like name, for --cases."""

    @property
    def quick(self) -> bool:
        """Whether it is part of a --quick run."""


@dataclass(frozen=True)
class Options:
    """What a run leaves out, and its number of threads."""

    quick: bool = False
    compile: bool = True
    memory: bool = True
    threads: int = 2


class UnsuitableGpuError(Exception):
    """Why a case is left out without that being a failure."""


def first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, RuntimeError) and line:
        return line
    return f"{type(error).__name__}: {line}"


def runnable(
    case: str,
    makers: Mapping[str, Callable[[], Call]],
    device: Device,
    skipped: Skipped,
    must: Iterable[str],
) -> dict[str, Call]:
    """The contenders that can run: one that cannot is written down, and the others still race.

    Those that `must` run fail the case.
    """
    found: dict[str, Call] = {}
    for name, make in makers.items():
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


def spread(values: Spread, scale: float = 1.0) -> dict[str, float]:
    return {
        "median": rounded(values.median * scale),
        "p25": rounded(values.low * scale),
        "p75": rounded(values.high * scale),
        "min": rounded(values.minimum * scale),
    }


def per_element(elements: int) -> Callable[[Measurement], Row]:
    """Columns of a time per element and per call."""

    def columns(measurement: Measurement) -> Row:
        seconds, scale = measurement.seconds, 1e9 / elements
        return {
            "median_ns_per_element": rounded(seconds.median * scale),
            "min_ns_per_element": rounded(seconds.minimum * scale),
            "iqr_ns_per_element": rounded((seconds.high - seconds.low) * scale),
            "microseconds_per_call": spread(seconds, 1e6),
        }

    return columns


def rows(
    case: Row, measured: Mapping[str, Measurement], times: Callable[[Measurement], Row]
) -> list[Row]:
    """A row for each contender: the columns of the case, its times, its ratio to the first one."""
    baseline = next(iter(measured))
    return [
        {
            **case,
            "contender": name,
            **times(measurement),
            "baseline": baseline,
            "time_over_baseline": spread(measurement.relative_to(measured[baseline])),
            "rounds": len(measurement.rounds),
            "calls": measurement.calls,
        }
        for name, measurement in measured.items()
    ]


def run(
    race: Mapping[str, Call],
    inputs: int,
    device: Device,
    budget: Budget,
    case: Row,
    elements: int,
    called: str = "",
    bytes_moved: int = 0,
    count_kernels: bool = False,
) -> list[Row]:
    """Times the contenders; the rows say too what a GPU's counters and a copy make of them."""
    measured = measure(race, inputs, budget, device.clock(called))
    table = rows(case, measured, per_element(elements))
    for row in table:
        mine = measured[row["contender"]]
        if not device.on_gpu:
            row["minor_faults_per_call"] = rounded(mine.minor_faults_per_call)
        elif COPY in measured:
            row["share_of_copy_bandwidth"] = spread(measured[COPY].relative_to(mine))
            row["gigabytes_per_second"] = rounded(bytes_moved / mine.seconds.median * 1e-9)
    if count_kernels:
        replays, calls = (1, CALLS_IN_A_GRAPH) if called == IN_A_GRAPH else (4, 4)
        for row in table:
            started = device.started(race[row["contender"]], replays)
            row["kernels_per_call"] = None if started is None else started / calls
    return table
