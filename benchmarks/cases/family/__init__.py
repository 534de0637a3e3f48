"""The family (distributions, top-k, relatives): a module for each page of docs/ about it.

A module has cases() for the CPU and gpu_cases(rows) for a GPU, and is found by that.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch.distributions import Distribution

from benchmarks.cases.family.case import FamilyCase, Rows
from benchmarks.device import Device
from benchmarks.labels import COPY, IN_A_GRAPH
from benchmarks.race import Options, Row, Skipped, copier, run, runnable
from benchmarks.timing import Budget, Call

THREADS = 2
# Rows of a case, or pixels of a side, in a rehearsal.
MOST_ROWS_REHEARSED = 2


def about(device: Device) -> dict[str, Any]:
    return {}


def cases(device: type[Device]) -> list[FamilyCase]:
    if not device.on_gpu:
        return collected("cases")
    most = MOST_ROWS_REHEARSED if device.rehearsal else sys.maxsize
    return gpu_cases(lambda wanted: min(wanted, most))


def gpu_cases(rows: Rows) -> list[FamilyCase]:
    """The most telling ones first, those of each page in turn: a run that is cut short has them."""
    pages: dict[str, list[FamilyCase]] = {}
    for case in sorted(collected("gpu_cases", rows), key=lambda case: not case.quick):
        pages.setdefault(case.page, []).append(case)
    in_turn = [case for cases in zip_longest(*pages.values()) for case in cases if case]
    # A capture that fails could leave the GPU unusable.
    return sorted(in_turn, key=lambda case: (not case.quick, case.called == IN_A_GRAPH))


def collected(function: str, *arguments: object) -> list[FamilyCase]:
    """What the function of this name makes, of every module of the package that has it."""
    cases: list[FamilyCase] = []
    for module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        of_module = getattr(importlib.import_module(f"{__name__}.{module}"), function, None)
        cases += of_module(*arguments) if of_module else []
    return cases


def measure(
    case: FamilyCase, device: Device, budget: Budget, options: Options, skipped: Skipped
) -> tuple[str, list[Row]]:
    torch.manual_seed(0)
    with unvalidated() if device.on_gpu else nullcontext():
        calls, inputs = case.contenders(device.torch_device)
        if not options.compile:
            calls = {name: call for name, call in calls.items() if "torch.compile" not in name}

        def made(call: Call) -> Call:
            call(0)  # what fails outside a graph should not fail inside its capture
            return device.as_called(call, case.called)

        makers = {name: partial(made, call) for name, call in calls.items()}
        race = runnable(case.name, makers, device, skipped, must=(next(iter(makers)),))
        if device.on_gpu and case.bytes_moved and not case.called:
            race[COPY] = copier(case.bytes_moved, device)
        table = run(
            race,
            inputs,
            device,
            budget,
            case.columns,
            case.elements,
            case.called,
            case.bytes_moved,
            count_kernels=bool(case.called) and case.quick,
        )
        for row in table:
            if device.on_gpu:
                row["called"] = case.called
            if case.memory and options.memory and row["contender"] != COPY:
                peak, _ = device.peak(partial(calls[row["contender"]], 0))
                row["allocator_peak_bytes"] = peak
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
