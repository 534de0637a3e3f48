"""Training steps of the examples, by method and by the number of classes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.device import Device
from benchmarks.environment import ROOT
from benchmarks.race import Options, Row, Skipped, rows, runnable, spread
from benchmarks.timing import Budget, Call, Measurement, measure

# Examples import each other as scripts do.
sys.path.insert(0, str(ROOT / "examples"))


@dataclass(frozen=True)
class Step:
    """A training step with so many classes."""

    classes: int
    quick: bool

    @property
    def name(self) -> str:
        """Path-like name, for --cases."""
        return f"step/{self.classes}-classes"


@dataclass(frozen=True)
class Steps:
    """The steps of an example: what a suite must have."""

    batch: int
    classes: tuple[int, ...]
    quick_classes: tuple[int, ...]
    inputs: int
    # What makes the step of each method for a number of classes, the baseline first.
    contenders: dict[str, Callable[[int], Call]]

    def about(self, device: Device) -> dict[str, Any]:
        """What the result says beside its table."""
        return {"batch": self.batch}

    def cases(self, device: type[Device]) -> list[Step]:
        """On the CPU alone."""
        if device.on_gpu:
            return []
        return [Step(classes, classes in self.quick_classes) for classes in self.classes]

    def measure(
        self, case: Step, device: Device, budget: Budget, options: Options, skipped: Skipped
    ) -> tuple[str, list[Row]]:
        """A row for each method."""
        makers = {
            name: lambda make=make: make(case.classes)  # type: ignore[misc]
            for name, make in self.contenders.items()
        }
        race = runnable(case.name, makers, device, skipped, must=makers)
        measured = measure(race, self.inputs, budget, device.clock())
        return "rows", rows({"classes": case.classes}, measured, _milliseconds)


def _milliseconds(measurement: Measurement) -> Row:
    return {"milliseconds_per_step": spread(measurement.seconds, 1e3)}
