"""The core: samples, indices and gradients beside F.gumbel_softmax and F.softmax."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.core import cpu, gpu, memory
from benchmarks.cases.core.case import Case, Inputs, bind, check, functions
from benchmarks.cases.core.regimes import needs_clusters
from benchmarks.device import Device
from benchmarks.labels import (
    CONTROL,
    COPY,
    GUMBEL_EXT,
    HARD_FORWARD,
    REGIMES,
    SOFT_FORWARD,
    SOFTMAX,
)
from benchmarks.race import (
    Options,
    Row,
    Skipped,
    UnsuitableGpuError,
    copier,
    run,
    runnable,
)
from benchmarks.timing import Budget, Call

THREADS = 2
# The kernels' own time, not a race: less is enough.
OF_A_REGIME = Budget(seconds=0.05, min_rounds=9, max_rounds=50)


def about(device: Device) -> dict[str, Any]:
    return {} if device.on_gpu else {"memory_cannot_see": memory.CANNOT_SEE}


def cases(device: type[Device]) -> list[Case]:
    return gpu.all_cases() if device.on_gpu else cpu.all_cases()


def measure(
    case: Case, device: Device, budget: Budget, options: Options, skipped: Skipped
) -> tuple[str, list[Row]]:
    with_compile = case.compiled == "always" or (case.compiled == "full" and not options.quick)
    with_compile = with_compile and options.compile
    asked = {"asked_shape": list(case.shape)} if device.on_gpu else {}
    if device.rehearsal:
        case = gpu.rehearsed(case)
    if case.group == "memory":
        if not options.memory:
            return "memory_rows", []
        if not device.on_gpu:
            table = memory.rows_from_own_process(case, options.threads, with_compile, skipped)
        else:
            table = memory.rows(case, device, with_compile, skipped)
        return "memory_rows", [{**row, **asked} for row in table]
    if case.group == REGIMES:
        capability = device.describe()["compute_capability"]
        if needs_clusters(case.workload) and float(capability) < 9:
            raise UnsuitableGpuError(f"needs compute capability 9.0, not {capability}")
        budget = budget if device.rehearsal else OF_A_REGIME
    if device.on_gpu:
        case = gpu.fitted(case, device.free_bytes(), device.cache_bytes)
    return "rows", [{**row, **asked} for row in timed(case, device, budget, with_compile, skipped)]


def timed(
    case: Case, device: Device, budget: Budget, with_compile: bool, skipped: Skipped
) -> list[Row]:
    torch.manual_seed(0)
    inputs = Inputs(case, device.torch_device, device.cache_bytes)

    def made(name: str, function: Callable[..., Tensor]) -> Call:
        if name == GUMBEL_EXT:
            check(case, inputs, function)
        return device.as_called(bind(case, inputs, function), case.called)

    functions_of_case = functions(case, with_compile)
    if case.group == REGIMES:
        functions_of_case = {GUMBEL_EXT: functions_of_case[GUMBEL_EXT]}
    makers = {name: partial(made, name, function) for name, function in functions_of_case.items()}
    race = runnable(case.name, makers, device, skipped, must=(GUMBEL_EXT, SOFTMAX))
    bytes_moved = gpu.bytes_moved(case)
    if device.on_gpu:
        if case.variant == "contiguous" and case.op != CONTROL:
            race[COPY] = copier(bytes_moved, device)
    elif case.op in (SOFT_FORWARD, HARD_FORWARD):
        # Cloned, not empty: memory that was never written would cost page faults.
        destinations = [logits.clone() for logits in inputs.logits]
        race[COPY] = lambda i: destinations[i].copy_(inputs.logits[i])
    # The profiler takes longer than the measurement: once for each op.
    count_kernels = bool(case.called) and case.quick
    return run(
        race,
        inputs.count,
        device,
        budget,
        case.columns,
        case.elements,
        case.called,
        bytes_moved,
        count_kernels,
    )
