"""Time of the family (distributions, top-k, relatives) on a GPU beside its peers -> one JSON file.

python benchmarks/bench_family_cuda.py [--quick] [--cases PATTERN] [--rehearse] [--output FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from typing import Any

import gpu_run
import torch
from bench_family import collected, rows
from compiled import only_trace
from family.case import FamilyCase, Rows
from gpu import Device
from gpu_run import Skipped, copier, runnable
from labels import COPY, IN_A_GRAPH
from timing import Budget, Call
from torch.distributions import Distribution

# Rows of a case, or pixels of a side, in a rehearsal.
MOST_ROWS_REHEARSED = 2


def all_cases(rows: Rows) -> list[FamilyCase]:
    """The most telling ones first, those of each page in turn: a run that is cut short has them."""
    pages: dict[str, list[FamilyCase]] = {}
    for case in sorted(collected("gpu_cases", rows), key=lambda case: not case.quick):
        pages.setdefault(case.page, []).append(case)
    in_turn = [case for cases in zip_longest(*pages.values()) for case in cases if case]
    # A capture that fails could leave the GPU unusable.
    return sorted(in_turn, key=lambda case: (not case.quick, case.called == IN_A_GRAPH))


def measure(
    no_compile: bool,
    no_memory: bool,
    case: FamilyCase,
    device: Device,
    budget: Budget,
    skipped: Skipped,
) -> tuple[str, list[dict[str, Any]]]:
    torch.manual_seed(0)
    calls, inputs = case.contenders(device.torch_device)
    if no_compile:
        calls = {name: call for name, call in calls.items() if "torch.compile" not in name}

    def made(call: Call) -> Call:
        call(0)  # what fails outside a graph should not fail inside its capture
        return gpu_run.as_called(call, case.called, device)

    race = {name: partial(made, call) for name, call in calls.items()}
    ours = next(iter(race))
    found = runnable(case.name, race, device, skipped, must=(ours,))
    if case.bytes_moved and not case.called:
        found[COPY] = copier(case.bytes_moved, device)
    measured = gpu_run.timed(found, inputs, budget, device, case.called)
    table = rows(case, measured)
    gpu_run.add_shares(table, measured, case.bytes_moved)
    if case.called and case.quick:
        gpu_run.add_kernels(table, found, device, case.called)
    for row in table:
        row["called"] = case.called
        if case.memory and not no_memory and row["contender"] != COPY:
            row["allocator_peak_bytes"] = device.peak(partial(calls[row["contender"]], 0))[0]
    return "rows", table


@contextmanager
def unvalidated() -> Iterator[None]:
    """Torch's distributions without the checks of arguments that wait for the GPU; those that build
    on another do not hand it their own validate_args=False.
    """
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def main(argv: Sequence[str] | None = None, device: Device | None = None) -> int:
    arguments = gpu_run.parse_arguments(__doc__.splitlines()[0], argv)
    if arguments.rehearse:
        only_trace()
    most = MOST_ROWS_REHEARSED if arguments.rehearse else sys.maxsize
    cases = gpu_run.chosen(all_cases(lambda wanted: min(wanted, most)), arguments)
    measured = partial(measure, arguments.no_compile, arguments.no_memory)
    with unvalidated():
        return gpu_run.run("bench_family_cuda.py", cases, arguments, "family-gpu", measured, device)


if __name__ == "__main__":
    sys.exit(main())
