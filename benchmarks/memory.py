"""Peak memory of one forward and backward pass on the CPU, measured twice.

1. The profiler's record of c10's CPU allocator: every tensor, also those made inside C++ operators,
   to the byte. It does not see memory that a kernel takes from malloc, new, or the stack.
2. The kernel's high-water mark of resident pages: it sees everything, to within pages and whatever
   the allocator keeps. It is the check on (1); a gap between the two is scratch that (1) misses.

Neither sees the inputs: both count what a call adds to the logits and the incoming gradient.

Run by bench_cpu.py as a process of its own, because (2) wants a C library that hands large blocks
straight back to the system, from the start; its rows go to stdout as JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import Case, functions, memory_cases
from environment import rounded
from labels import SOFTMAX
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

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


@dataclass(frozen=True)
class PeakMemory:
    """Bytes above the live inputs; `None` where the operating system offers no measure."""

    allocator_peak: int
    allocator_after_forward: int
    resident_peak: int | None


def _walk(events: list[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _walk(event.children)


def allocator_trace(call: Callable[[], object]) -> tuple[int, int]:
    """Peak and final growth, in bytes, of the allocator while `call` runs and its result lives."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    assert recorded.profiler is not None
    tree = recorded.profiler.kineto_results.experimental_event_tree()
    allocations = sorted(
        (event.start_time_ns, event.extra_fields.alloc_size)
        for event in _walk(tree)
        if event.tag == _EventType.Allocation
    )
    del result
    level = peak = 0
    for _, size in allocations:
        level += size
        peak = max(peak, level)
    return peak, level


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


def measure_peak(
    forward: Callable[[], torch.Tensor], logits: torch.Tensor, grad: torch.Tensor
) -> PeakMemory:
    """Peak growth over forward and backward; the growth that is left after the forward alone."""

    def forward_backward() -> object:
        y = forward()
        return y, torch.autograd.grad(y, logits, grad)

    for _ in range(2):  # first calls allocate what stays: thread pools, compiled code
        forward_backward()
    peak, _ = allocator_trace(forward_backward)
    _, after_forward = allocator_trace(forward)
    return PeakMemory(peak, after_forward, _resident_peak(forward_backward))


def run_memory_case(case: Case, with_compile: bool) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    dtype = case.torch_dtype
    # No leaf, as what a network makes of its input.
    logits = torch.randn(case.shape).to(dtype).requires_grad_().clone()
    grad = torch.randn(case.shape).to(dtype)
    output = case.elements * dtype.itemsize
    rows_of_case = case.elements // case.shape[case.dim]
    table = []
    for name, function in functions(case, with_compile).items():
        peak = measure_peak(partial(function, logits), logits, grad)
        saved = peak.allocator_after_forward - output
        if name == SOFTMAX and abs(peak.allocator_peak - 2 * output) > 0.01 * output:
            # Known truth: output and gradient. Anything else means that the trace lost events.
            raise RuntimeError(
                f"F.softmax's peak came out at {peak.allocator_peak / output} outputs"
            )
        resident = peak.resident_peak
        table.append(
            {
                "case": case.name,
                "op": case.op,
                "dtype": case.dtype,
                "shape": list(case.shape),
                "contender": name,
                "allocator_peak_bytes_per_element": rounded(peak.allocator_peak / case.elements),
                "saved_beyond_output_bytes_per_element": rounded(saved / case.elements),
                "saved_beyond_output_bytes_per_row": rounded(saved / rows_of_case),
                "resident_peak_bytes_per_element": (
                    None if resident is None else rounded(resident / case.elements)
                ),
            }
        )
    return table


def run_in_own_process(case: Case, threads: int, with_compile: bool) -> list[dict[str, Any]]:
    """The rows of `run_memory_case`, from a fresh process."""
    command = [sys.executable, __file__, case.name, f"--threads={threads}"]
    if not with_compile:
        command.append("--no-compile")
    environ = {**os.environ, **_PROCESS_ENVIRONMENT}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(lines[-1])
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", help="name of a memory case, as bench_cpu.py --list prints it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    case = next((c for c in memory_cases(quick=False) if c.name == arguments.case), None)
    if case is None:
        parser.error(f"no memory case is named {arguments.case}")
    print(json.dumps(run_memory_case(case, with_compile=not arguments.no_compile)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
