"""What is measured on: the CPU, a GPU, and what stands in for a GPU in a rehearsal.

Everything that the benchmarks ask of a GPU they ask of a `Device`, so that a rehearsal on a machine
without one runs every line of theirs; only the lines of `Gpu` wait for a GPU.
"""

from __future__ import annotations

import gc
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from benchmarks import environment
from benchmarks.compiled import only_trace
from benchmarks.labels import EAGERLY, IN_A_GRAPH
from benchmarks.timing import Blocks, Budget, Call, Clock, HostClock, Reading, settle_allocator

Mark = Any
"""A place in the queue of a device's work."""

# Enough for the host to have queued a call of many kernels before its first one starts.
HEAD_START_SECONDS = 5e-5
MAX_HEAD_START_SECONDS = 5e-3
# Calls without a head start are timed many at a time: an event costs as much as a small kernel.
CALLS_IN_A_ROW = 50
CALLS_IN_A_GRAPH = 20


class Device:
    """What a benchmark asks of a device beside tensors on it; without a GPU most of it is nothing.

    Attributes:
        torch_device: where tensors are made.
        on_gpu: whether cases are those for a GPU.
        rehearsal: whether numbers mean nothing.
        full, quick: how long a case of a whole and of a quick run may take.
        cache_bytes: size of the last cache before the memory.
        file_name: the device as a part of the name of a result.
        clock_name, state_name: as the result has them.
    """

    torch_device = "cpu"
    on_gpu = False
    rehearsal = False
    full = Budget(seconds=2.0, min_rounds=5, max_rounds=60)
    quick = Budget(seconds=0.3, min_rounds=3, max_rounds=20)
    cache_bytes: int
    file_name: str
    clock_name = "wall"
    state_name = "load_average"

    def describe(self) -> dict[str, Any]:
        """What the GPU is."""
        return {}

    def state(self) -> Any:
        """Load now; of a GPU clocks, temperature and power."""
        return environment.load_average()

    def warm_up(self) -> None:
        """Brings allocator and clocks to where work keeps them."""

    def free_bytes(self) -> int:
        """Memory that tensors may take."""
        return 1 << 28

    def synchronize(self) -> None:
        """Waits for all work."""

    def empty_cache(self) -> None:
        """Gives back the memory that no tensor holds."""

    def mark(self) -> Mark:
        """Puts a mark behind the work queued so far."""
        return time.perf_counter()

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Time between two marks that have been passed."""
        return max(float(end - begin), 1e-9)

    def occupy(self, seconds: float) -> None:
        """Queues work that takes about so long."""

    def flush(self) -> None:
        """Queues work that replaces what the cache holds."""

    def graph_of(self, call: Call, calls: int) -> Call:
        """So many calls, captured once, as one to replay."""

        def replay(_: int) -> None:
            for _ in range(calls):
                call(0)

        return replay

    def started(self, call: Call, calls: int) -> int | None:
        """Kernels, copies and fills that so many calls start; None where nobody can tell."""
        return _events(call, calls, ProfilerActivity.CPU, self.synchronize)

    def peak(self, call: Callable[[], object]) -> tuple[int, int]:
        """Peak and final growth, in bytes, of what tensors take while `call`'s result lives."""
        return allocator_trace(call)

    def as_called(self, call: Call, called: str) -> Call:
        """The call, or twenty of it as one CUDA graph."""
        return self.graph_of(call, CALLS_IN_A_GRAPH) if called == IN_A_GRAPH else call

    def clock(self, called: str = "") -> Clock:
        """What times calls that are made one by one, in a graph, or with cold caches."""
        if called == EAGERLY:
            return DeviceClock(self, CALLS_IN_A_ROW, flush=False)
        if called == IN_A_GRAPH:
            return DeviceClock(self, flush=False, calls_each=CALLS_IN_A_GRAPH)
        return DeviceClock(self)


class DeviceClock:
    """The device's own clock.

    With `in_a_row` = 1 the GPU is kept busy while the host queues the call, so that the time is the
    GPU's alone. With more, that many calls follow each other from an idle GPU on: where kernels are
    short this is the time that the host needs to launch them. With `flush` calls find none of their
    inputs in the cache.
    """

    def __init__(
        self, device: Device, in_a_row: int = 1, flush: bool = True, calls_each: int = 1
    ) -> None:
        self.calls_each = calls_each
        self._device, self._in_a_row, self._flush = device, in_a_row, flush

    def plan(self, contenders: Mapping[str, Call], inputs: int) -> dict[str, Blocks]:
        """One block a round, with a head start that depends on the host's part of a call."""
        plan = {}
        for name, call in contenders.items():
            for i in range(3):
                call(i % inputs)
            self._device.synchronize()
            started = time.perf_counter()
            call(3 % inputs)
            host = time.perf_counter() - started
            head_start = min(2 * host + HEAD_START_SECONDS, MAX_HEAD_START_SECONDS)
            plan[name] = Blocks(self._in_a_row, head_start=head_start)
        self._device.synchronize()
        return plan

    def time(self, call: Call, first_input: int, inputs: int, blocks: Blocks) -> Reading:
        """Queues the block between two marks."""
        device = self._device
        if self._flush:
            device.flush()
        if blocks.calls == 1:
            device.occupy(blocks.head_start)
        else:
            device.synchronize()
        begin = device.mark()
        for i in range(first_input, first_input + blocks.calls):
            call(i % inputs)
        end = device.mark()
        return lambda: (device.seconds(begin, end), 0)

    def wait(self) -> None:
        """Waits for the device."""
        self._device.synchronize()


class Cpu(Device):
    """The CPU, timed by the host's clock; with `cpu_time` without what other processes take."""

    def __init__(self, cpu_time: bool = False) -> None:
        self.cache_bytes = environment.last_level_cache()
        self.file_name = f"cpu-{environment.versions()['gumbel_ext_cpu_capability']}"
        self.clock_name = "cpu" if cpu_time else "wall"
        self._now = time.process_time if cpu_time else time.perf_counter

    def warm_up(self) -> None:
        settle_allocator()

    def clock(self, called: str = "") -> Clock:
        return HostClock(self._now)


class Gpu(Device):
    """The first GPU that PyTorch sees."""

    torch_device = "cuda"
    on_gpu = True
    full = Budget(seconds=0.4, min_rounds=9, max_rounds=200)
    quick = Budget(seconds=0.2, min_rounds=5, max_rounds=60)
    clock_name = "cuda events"
    state_name = "gpu_state"

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        name = re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-")
        self.file_name = f"gpu-{name}"
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
        return _events(call, calls, ProfilerActivity.CUDA, torch.cuda.synchronize)

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


class Rehearsal(Device):
    """Tensors on the CPU, in the place of a GPU: what is measured says nothing about anything."""

    on_gpu = True
    rehearsal = True
    full = quick = Budget(seconds=0.0, min_rounds=3, max_rounds=3)
    file_name = "gpu"
    clock_name = "the host's, in a rehearsal"
    state_name = "gpu_state"

    def __init__(self) -> None:
        self.cache_bytes = min(environment.last_level_cache(), 1 << 20)
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


def _walk(events: list[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _walk(event.children)


def allocator_trace(call: Callable[[], object]) -> tuple[int, int]:
    """Peak and final growth, in bytes, of the CPU's allocator while `call`'s result lives."""
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


def _events(call: Call, calls: int, activity: Any, synchronize: Callable[[], None]) -> int | None:
    try:
        with profile(activities=[activity]) as seen:
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


def unusable() -> str | None:
    """Why no GPU can be measured; None where one can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("gumbel_ext::gumbel_softmax", "CUDA"):
        return "gumbel_ext was built without CUDA: FORCE_CUDA=1 python setup.py build_ext --inplace"
    return None
