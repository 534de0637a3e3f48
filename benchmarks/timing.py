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
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

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


@dataclass(frozen=True)
class Blocks:
    """How a contender is timed in a round."""

    calls: int  # in a block, one after the other
    count: int = 1  # of blocks, spread over the round
    head_start: float = 0.0  # seconds that a GPU is kept busy while the block is queued


Reading = Callable[[], tuple[float, int]]
"""Seconds and page faults of a block, once the clock has waited for it."""


class Clock(Protocol):
    """Times blocks of calls: the host's clock here, a GPU's own in device.py."""

    calls_each: int  # what one call of a contender stands for: several where it replays a graph

    def plan(self, contenders: Mapping[str, Call], inputs: int) -> dict[str, Blocks]:
        """Calls the contenders, so that they are warm, and says how to time them."""

    def time(self, call: Call, first_input: int, inputs: int, blocks: Blocks) -> Reading:
        """Runs, or queues, a block."""

    def wait(self) -> None:
        """Returns when all blocks have ended."""


def measure(
    contenders: Mapping[str, Call], inputs: int, budget: Budget, clock: Clock, seed: int = 0
) -> dict[str, Measurement]:
    """Time every contender in every round.

    Successive calls take successive inputs, whoever makes them, so that no contender finds the
    input that another has just pulled into the cache; make `inputs` large enough to leave it.
    A round's value for a contender is the median over its blocks of that round.
    """
    order = random.Random(seed)
    rounds: dict[str, list[float]] = {name: [] for name in contenders}
    faults = dict.fromkeys(contenders, 0)
    with quiet_python():
        plan = clock.plan(contenders, inputs)
        schedule = [name for name in contenders for _ in range(plan[name].count)]
        next_input = completed = 0
        started = time.perf_counter()
        while completed < budget.max_rounds:
            elapsed = time.perf_counter() - started
            if completed >= budget.min_rounds and elapsed >= budget.seconds:
                break
            order.shuffle(schedule)
            readings: dict[str, list[Reading]] = defaultdict(list)
            for name in schedule:
                blocks = plan[name]
                readings[name].append(clock.time(contenders[name], next_input, inputs, blocks))
                next_input = (next_input + blocks.calls) % inputs
            clock.wait()
            for name, of_round in readings.items():
                seconds, new_faults = zip(*(reading() for reading in of_round), strict=True)
                calls = plan[name].calls * clock.calls_each
                rounds[name].append(statistics.median(seconds) / calls)
                faults[name] += sum(new_faults)
            completed += 1

    def measurement(name: str) -> Measurement:
        calls = completed * plan[name].count * plan[name].calls * clock.calls_each
        return Measurement(tuple(rounds[name]), calls, faults[name] / calls)

    return {name: measurement(name) for name in contenders}


class HostClock:
    """The host's clock, in seconds.

    With one thread, `time.process_time` leaves out what other processes take from it.
    """

    calls_each = 1

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def plan(self, contenders: Mapping[str, Call], inputs: int) -> dict[str, Blocks]:
        """A block lasts a millisecond at least; cheap contenders have several blocks."""
        estimates = {name: self._warm_up(call, inputs) for name, call in contenders.items()}
        slowest = max(*estimates.values(), MIN_BLOCK_SECONDS)
        plan = {}
        for name, seconds in estimates.items():
            calls = max(1, math.ceil(MIN_BLOCK_SECONDS / seconds))
            count = min(MAX_BLOCKS_PER_ROUND, max(1, int(slowest / (seconds * calls))))
            plan[name] = Blocks(calls, count)
        return plan

    def _warm_up(self, call: Call, inputs: int) -> float:
        """The shortest time of a few calls, the first left out."""
        started = time.perf_counter()
        call(0)
        estimate = self._seconds(call, 1, inputs, 1)
        for i in (2, 3):
            if time.perf_counter() - started > MAX_WARM_UP_SECONDS:
                break
            estimate = min(estimate, self._seconds(call, i, inputs, 1))
        return estimate

    def _seconds(self, call: Call, first_input: int, inputs: int, calls: int) -> float:
        start = self._now()
        for i in range(first_input, first_input + calls):
            call(i % inputs)
        return self._now() - start

    def time(self, call: Call, first_input: int, inputs: int, blocks: Blocks) -> Reading:
        """Runs the block."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        seconds = self._seconds(call, first_input, inputs, blocks.calls)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        return lambda: (seconds, faults)

    def wait(self) -> None:
        """Blocks have ended when they return."""
