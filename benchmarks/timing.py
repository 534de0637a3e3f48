"""Interleaved timing of several contenders that do the same job.

A machine drifts: clocks change, neighbours wake up, caches and the allocator remember what ran
last. Timing all calls of A and then all calls of B books that drift to one of them. Here every
round runs every contender, in an order drawn anew for each round, and a ratio is taken inside each
round before the median over rounds; what slows a whole round cancels.
"""

from __future__ import annotations

import gc
import math
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from gpu import Device

Call = Callable[[int], object]
"""One call of a contender on the inputs with the given number."""

# Below this, perf_counter's own cost (tens of ns) and one interrupt would show in a block's mean.
MIN_BLOCK_SECONDS = 1e-3
# Calls before the clock runs: two at least, four unless they take longer than this.
MAX_WARM_UP_SECONDS = 1.0
# A contender that is cheap beside the slowest one is timed several times in a round.
MAX_BLOCKS_PER_ROUND = 7


@dataclass(frozen=True)
class Budget:
    """How long one case may take: rounds are added until `seconds` are spent."""

    seconds: float
    min_rounds: int
    max_rounds: int


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample; `low` and `high` are the quartiles."""

    median: float
    low: float
    high: float
    minimum: float

    @classmethod
    def of(cls, sample: Sequence[float]) -> Spread:
        """Summarise a sample of at least one value."""
        if len(sample) == 1:
            return cls(sample[0], sample[0], sample[0], sample[0])
        low, median, high = statistics.quantiles(sample, n=4, method="inclusive")
        return cls(median, low, high, min(sample))


@dataclass(frozen=True)
class Measurement:
    """Times of one contender, in seconds per call; one value for each round."""

    rounds: tuple[float, ...]
    calls: int
    minor_faults_per_call: float

    @property
    def seconds(self) -> Spread:
        """Spread over rounds, in seconds per call."""
        return Spread.of(self.rounds)

    def relative_to(self, other: Measurement) -> Spread:
        """Spread of this contender's time over the other's, formed round by round."""
        pairs = zip(self.rounds, other.rounds, strict=True)
        return Spread.of([mine / theirs for mine, theirs in pairs])


def settle_allocator() -> None:
    """Bring glibc's allocator to the state that a running program ends up in.

    glibc serves blocks above a threshold from fresh zero pages, and raises the threshold (up to
    32 MiB) whenever such a block is freed. Without this, the first cases would pay page faults that
    the later ones do not, and the order of the cases would show in the results.
    """
    for mebibytes in (1, 4, 16, 31):
        torch.empty(mebibytes << 20, dtype=torch.uint8).fill_(1)


@contextmanager
def quiet_python() -> Iterator[None]:
    """Python's cyclic garbage collector off, as timeit does."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _timed_block(
    call: Call, first_input: int, inputs: int, repeats: int, clock: Callable[[], float]
) -> float:
    start = clock()
    for i in range(first_input, first_input + repeats):
        call(i % inputs)
    return (clock() - start) / repeats


def measure_interleaved(
    contenders: Mapping[str, Call],
    inputs: int,
    budget: Budget,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
) -> dict[str, Measurement]:
    """Time every contender in every round.

    Successive calls take successive inputs, whoever makes them, so that no contender finds the
    input that another has just pulled into the cache; make `inputs` large enough to leave it.
    A round's value for a contender is the median over its blocks of that round. The clock is in
    seconds: with one thread, time.process_time leaves out what other processes take from it.
    """
    order = random.Random(seed)
    estimates: dict[str, float] = {}
    with quiet_python():
        for name, call in contenders.items():
            started = time.perf_counter()
            call(0)
            estimates[name] = _timed_block(call, 1, inputs, 1, clock)
            for i in (2, 3):
                if time.perf_counter() - started > MAX_WARM_UP_SECONDS:
                    break
                estimates[name] = min(estimates[name], _timed_block(call, i, inputs, 1, clock))

        slowest = max(*estimates.values(), MIN_BLOCK_SECONDS)
        repeats = {n: max(1, math.ceil(MIN_BLOCK_SECONDS / t)) for n, t in estimates.items()}
        blocks = {
            n: min(MAX_BLOCKS_PER_ROUND, max(1, int(slowest / (t * repeats[n]))))
            for n, t in estimates.items()
        }
        schedule = [n for n in contenders for _ in range(blocks[n])]

        next_input = 0
        rounds: dict[str, list[float]] = {n: [] for n in contenders}
        faults = dict.fromkeys(contenders, 0)
        started = time.perf_counter()
        completed = 0
        while completed < budget.max_rounds:
            elapsed = time.perf_counter() - started
            if completed >= budget.min_rounds and elapsed >= budget.seconds:
                break
            order.shuffle(schedule)
            samples: dict[str, list[float]] = {n: [] for n in contenders}
            for name in schedule:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                samples[name].append(
                    _timed_block(contenders[name], next_input, inputs, repeats[name], clock)
                )
                faults[name] += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
                next_input = (next_input + repeats[name]) % inputs
            for name, values in samples.items():
                rounds[name].append(statistics.median(values))
            completed += 1

    calls = {n: completed * blocks[n] * repeats[n] for n in contenders}
    return {n: Measurement(tuple(rounds[n]), calls[n], faults[n] / calls[n]) for n in contenders}


# --- on a GPU ---

# Enough for the host to have queued a call of many kernels before its first one starts.
HEAD_START_SECONDS = 5e-5
MAX_HEAD_START_SECONDS = 5e-3
# Calls without a head start are timed many at a time: an event costs as much as a small kernel.
CALLS_IN_A_ROW = 50


def measure_on_gpu(
    contenders: Mapping[str, Call],
    inputs: int,
    budget: Budget,
    device: Device,
    in_a_row: int = 1,
    flush: bool = True,
    seed: int = 0,
) -> dict[str, Measurement]:
    """Time every contender in every round, on the device's own clock.

    With `in_a_row` = 1 the GPU is kept busy while the host queues the call, so that the time is the
    GPU's alone. With more, that many calls follow each other from an idle GPU on: where kernels are
    short this is the time that the host needs to launch them. With `flush` calls find none of their
    inputs in the cache.
    """
    order = random.Random(seed)
    names = list(contenders)
    head_start: dict[str, float] = {}
    rounds: dict[str, list[float]] = {n: [] for n in names}
    with quiet_python():
        for name, call in contenders.items():
            for i in range(3):
                call(i % inputs)
            device.synchronize()
            started = time.perf_counter()
            call(3 % inputs)
            host = time.perf_counter() - started
            head_start[name] = min(2 * host + HEAD_START_SECONDS, MAX_HEAD_START_SECONDS)
        device.synchronize()

        next_input = 0
        started = time.perf_counter()
        completed = 0
        while completed < budget.max_rounds:
            elapsed = time.perf_counter() - started
            if completed >= budget.min_rounds and elapsed >= budget.seconds:
                break
            order.shuffle(names)
            marks = {}
            for name in names:
                call = contenders[name]
                if flush:
                    device.flush()
                if in_a_row == 1:
                    device.occupy(head_start[name])
                else:
                    device.synchronize()
                begin = device.mark()
                for i in range(next_input, next_input + in_a_row):
                    call(i % inputs)
                marks[name] = begin, device.mark()
                next_input = (next_input + in_a_row) % inputs
            device.synchronize()
            for name, (begin, end) in marks.items():
                rounds[name].append(device.seconds(begin, end) / in_a_row)
            completed += 1
    return {n: Measurement(tuple(rounds[n]), completed * in_a_row, 0.0) for n in contenders}
