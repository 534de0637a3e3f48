"""Peak memory of one forward and backward pass; on the CPU measured twice.

1. The profiler's record of c10's CPU allocator: every tensor, also those made inside C++ operators,
   to the byte. It does not see memory that a kernel takes from malloc, new, or the stack.
2. The kernel's high-water mark of resident pages: it sees everything, to within pages and whatever
   the allocator keeps. It is the check on (1); a gap between the two is scratch that (1) misses.

Neither sees the inputs: both count what a call adds to the logits and the incoming gradient.

On the CPU a case runs in a process of its own, because (2) wants a C library that hands large
blocks straight back to the system, from the start. On a GPU PyTorch's allocator is asked.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.cases.core.case import Case, functions
from benchmarks.device import Cpu, Device
from benchmarks.environment import rounded
from benchmarks.labels import GUMBEL_EXT, SOFTMAX
from benchmarks.race import Row, Skipped, runnable
from benchmarks.timing import Call

CANNOT_SEE = (
    "allocator_*: tensors and scratch of the c10 CPU allocator, to the byte; not memory that a "
    "kernel takes from malloc, new or the stack. resident_*: growth of the process's resident "
    "high-water mark, which sees those too, to about 0.05 bytes an element at these sizes."
)

# glibc: large blocks come straight from the system and go straight back. Set later than at the
# start of the process, it leaves holes in the heap that count as resident.
_PROCESS_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "KINETO_LOG_LEVEL": "99",  # torch.profiler announces every start and stop on stderr
}


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _resident_peak(call: Callable[[], object]) -> int | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL(None)
        growth = []
        for _ in range(3):
            gc.collect()
            libc.malloc_trim(0)
            before = _status_bytes("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # 5: reset the high-water mark
            result = call()
            growth.append(_status_bytes("VmHWM") - before)
            del result
        return sorted(growth)[1]
    except (AttributeError, OSError):
        return None  # another C library, or a /proc that may not be written


def rows(case: Case, device: Device, with_compile: bool, skipped: Skipped) -> list[Row]:
    """Peaks above the live logits and incoming gradient."""
    torch.manual_seed(0)
    options: Any = {"device": device.torch_device, "dtype": case.torch_dtype}
    # No leaf, as what a network makes of its input.
    logits = torch.randn(case.shape, **options).requires_grad_().clone()
    grad = torch.randn(case.shape, **options)
    output = case.elements * case.torch_dtype.itemsize
    rows_of_case = case.elements // case.shape[case.dim]

    def made(function: Callable[..., torch.Tensor]) -> Call:
        def call(_: int) -> object:
            y = function(logits)
            return y, torch.autograd.grad(y, logits, grad)

        call(0)  # the first calls allocate what stays: thread pools, compiled code
        return call

    functions_of_case = functions(case, with_compile)
    makers = {name: partial(made, function) for name, function in functions_of_case.items()}
    race = runnable(case.name, makers, device, skipped, must=(GUMBEL_EXT, SOFTMAX))
    table = []
    for name, call in race.items():
        peak, _ = device.peak(partial(call, 0))
        _, after_forward = device.peak(partial(functions_of_case[name], logits))
        if not device.on_gpu and name == SOFTMAX and abs(peak - 2 * output) > 0.01 * output:
            # Known truth: output and gradient. Anything else means that the trace lost events.
            raise RuntimeError(f"F.softmax's peak came out at {peak / output} outputs")
        resident = None if device.on_gpu else _resident_peak(partial(call, 0))
        saved = after_forward - output
        table.append(
            {
                "case": case.name,
                "op": case.op,
                "dtype": case.dtype,
                "shape": list(case.shape),
                "contender": name,
                "allocator_peak_bytes_per_element": rounded(peak / case.elements),
                "saved_beyond_output_bytes_per_element": rounded(saved / case.elements),
                "saved_beyond_output_bytes_per_row": rounded(saved / rows_of_case),
                "resident_peak_bytes_per_element": (
                    None if resident is None else rounded(resident / case.elements)
                ),
            }
        )
    return table


def _in_a_fresh_process(case: Case, threads: int, with_compile: bool) -> tuple[list[Row], Skipped]:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    skipped: Skipped = []
    return rows(case, Cpu(), with_compile, skipped), skipped


def rows_from_own_process(
    case: Case, threads: int, with_compile: bool, skipped: Skipped
) -> list[Row]:
    """The rows of a case on the CPU, from a fresh process."""
    fresh = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, _PROCESS_ENVIRONMENT),
        ProcessPoolExecutor(1, mp_context=fresh) as pool,
    ):
        table, found = pool.submit(_in_a_fresh_process, case, threads, with_compile).result()
    skipped += found
    return table
