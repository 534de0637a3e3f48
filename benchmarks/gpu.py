"""The GPU that is measured, and what stands in for one in a rehearsal.

Everything that the benchmarks ask of a GPU they ask of a `Device`, so that a rehearsal on a machine
without one runs every line of theirs; only the lines of `Gpu` wait for a GPU.
"""

from __future__ import annotations

import gc
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from compiled import only_trace
from environment import last_level_cache
from memory import allocator_trace
from timing import Call

Mark = Any
"""A place in the queue of a device's work."""


class Device(Protocol):
    """What a benchmark needs of a device beside tensors on it."""

    torch_device: str
    rehearsal: bool
    cache_bytes: int

    def describe(self) -> dict[str, Any]:
        """What the device is."""

    def state(self) -> dict[str, str | None]:
        """Clocks, temperature and power now."""

    def warm_up(self) -> None:
        """Bring the clocks to where work keeps them."""

    def free_bytes(self) -> int:
        """Memory that tensors may take."""

    def synchronize(self) -> None:
        """Wait for all work."""

    def empty_cache(self) -> None:
        """Give back the memory that no tensor holds."""

    def mark(self) -> Mark:
        """Put a mark behind the work queued so far."""

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Time between two marks that have been passed."""

    def occupy(self, seconds: float) -> None:
        """Queue work that takes about so long."""

    def flush(self) -> None:
        """Queue work that replaces what the cache holds."""

    def graph_of(self, call: Call, calls: int) -> Call:
        """So many calls, captured once, as one to replay."""

    def started(self, call: Call, calls: int) -> int | None:
        """Kernels, copies and fills that so many calls start; None where nobody can tell."""

    def peak(self, call: Callable[[], object]) -> tuple[int, int]:
        """Peak and final growth, in bytes, of what tensors take while `call`'s result lives."""


@dataclass
class Gpu:
    """The first GPU that PyTorch sees."""

    torch_device: str = "cuda"
    rehearsal: bool = False
    cache_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        self.cache_bytes = int(getattr(properties, "L2_cache_size", 0)) or 64 << 20
        self._other = torch.zeros(2 * self.cache_bytes // 4, dtype=torch.int32, device="cuda")
        self._most = torch.empty((), dtype=torch.int32, device="cuda")
        self._cycles_per_second = self._sleep_cycles_per_second()

    def describe(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(0)
        return {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_cache_bytes": self.cache_bytes,
            "driver": _ask_nvidia_smi("driver_version"),
            "cuda": torch.version.cuda,
        }

    def state(self) -> dict[str, str | None]:
        """None where nvidia-smi does not say."""
        fields = ("sm", "max.sm", "mem")
        asked = [f"clocks.{f}" for f in fields] + ["temperature.gpu", "power.draw", "pstate"]
        return {field: _ask_nvidia_smi(field) for field in asked}

    def warm_up(self) -> None:
        x = torch.randn(4096, 4096, device="cuda")
        started = time.monotonic()
        while time.monotonic() - started < 1.0:
            for _ in range(10):
                x.sin_()
            torch.cuda.synchronize()

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info()[0])

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def mark(self) -> Mark:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Mark, end: Mark) -> float:
        return float(begin.elapsed_time(end) * 1e-3)

    def occupy(self, seconds: float) -> None:
        torch.cuda._sleep(int(seconds * self._cycles_per_second))

    def _sleep_cycles_per_second(self) -> float:
        """Of torch.cuda._sleep, which counts the clock that the GPU runs at."""
        cycles = 10_000_000
        for _ in range(2):
            begin = self.mark()
            torch.cuda._sleep(cycles)
            end = self.mark()
            end.synchronize()
        return cycles / self.seconds(begin, end)

    def flush(self) -> None:
        # By reading: written lines would be written back later, on the time of the next contender.
        torch.amax(self._other, 0, out=self._most)

    def graph_of(self, call: Call, calls: int) -> Call:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call(0)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call(0)
        return lambda _: graph.replay()

    def started(self, call: Call, calls: int) -> int | None:
        return _events(call, calls, torch.profiler.ProfilerActivity.CUDA, torch.cuda.synchronize)

    def peak(self, call: Callable[[], object]) -> tuple[int, int]:
        # What was asked of the allocator: the blocks that it hands out may be a megabyte larger.
        def requested(when: str) -> int:
            return int(torch.cuda.memory_stats()[f"requested_bytes.all.{when}"])

        gc.collect()
        before = requested("current")
        torch.cuda.reset_peak_memory_stats()
        result = call()
        peak, after = requested("peak"), requested("current")
        del result
        return peak - before, after - before


class Rehearsal:
    """Tensors on the CPU, in the place of a GPU: what is measured says nothing about anything."""

    torch_device = "cpu"
    rehearsal = True

    def __init__(self) -> None:
        self.cache_bytes = min(last_level_cache(), 1 << 20)
        torch.set_num_threads(1)  # what else the machine does then hardly matters
        only_trace()

    def describe(self) -> dict[str, Any]:
        return {
            "name": "rehearsal without a GPU",
            "compute_capability": "9.0",
            "multiprocessors": 132,
            "memory_bytes": self.free_bytes(),
            "l2_cache_bytes": self.cache_bytes,
            "driver": None,
            "cuda": torch.version.cuda,
        }

    def state(self) -> dict[str, str | None]:
        return {"clocks.sm": None}

    def warm_up(self) -> None:
        pass

    def free_bytes(self) -> int:
        return 1 << 28

    def synchronize(self) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def mark(self) -> Mark:
        return time.perf_counter()

    def seconds(self, begin: Mark, end: Mark) -> float:
        return max(float(end - begin), 1e-9)

    def occupy(self, seconds: float) -> None:
        pass

    def flush(self) -> None:
        pass

    def graph_of(self, call: Call, calls: int) -> Call:
        def replay(_: int) -> None:
            for _ in range(calls):
                call(0)

        return replay

    def started(self, call: Call, calls: int) -> int | None:
        return _events(call, calls, torch.profiler.ProfilerActivity.CPU, self.synchronize)

    def peak(self, call: Callable[[], object]) -> tuple[int, int]:
        return allocator_trace(call)


def _events(call: Call, calls: int, activity: Any, synchronize: Callable[[], None]) -> int | None:
    try:
        with torch.profiler.profile(activities=[activity]) as seen:
            for _ in range(calls):
                call(0)
            synchronize()
        found = [event for event in seen.events() if event.device_type.name == activity.name]
    except RuntimeError:
        return None
    return len(found) or None


def _ask_nvidia_smi(field: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def answers(device: Device) -> bool:
    """Whether the error of a case left the device in working order."""
    try:
        device.empty_cache()
        # A capture that failed may have left the generator behind in its graph.
        torch.rand(1, device=device.torch_device)
        device.synchronize()
    except RuntimeError:
        return False
    return True


def file_name(gpu_name: str) -> str:
    """The name of a GPU as a part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")


def unusable() -> str | None:
    """Why no GPU can be measured; None where one can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("gumbel_ext::gumbel_softmax", "CUDA"):
        return "gumbel_ext was built without CUDA: FORCE_CUDA=1 python setup.py build_ext --inplace"
    return None
