"""Time and peak memory of gumbel_ext on a GPU beside its peers -> one JSON file.

python benchmarks/bench_cuda.py [--quick] [--cases PATTERN] [--dry-run] [--rehearse] [--output FILE]
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import gpu_run
import torch
from bench_cpu import rows
from cases import Case, Inputs, bind, check, functions, workloads
from environment import rounded
from gpu import Device
from gpu_run import Skipped, copier, runnable
from labels import (
    COMPILED_CLASSES,
    CONTROL,
    COPY,
    CUDA_LAUNCHES,
    CUDA_SHAPES,
    DTYPES,
    EAGERLY,
    GUMBEL_EXT,
    HARD_BACKWARD,
    HARD_FORWARD,
    HARD_TRAIN,
    IN_A_GRAPH,
    INDEX,
    INNER_DIM,
    REGIMES,
    SOFT_BACKWARD,
    SOFT_FORWARD,
    SOFT_TRAIN,
    SOFTMAX,
)
from regimes import KERNELS_OF, needs_clusters, regimes
from timing import Budget, Call

# The kernels' own time, not a race: less is enough.
OF_A_REGIME = Budget(seconds=0.05, min_rounds=9, max_rounds=50)

# Tensors of the size of the logits that an operator must read and write at least.
TENSORS_MOVED = {
    SOFT_FORWARD: 2,
    HARD_FORWARD: 2,
    INDEX: 1,
    SOFT_BACKWARD: 3,
    HARD_BACKWARD: 3,
    SOFT_TRAIN: 5,
    HARD_TRAIN: 5,
    CONTROL: 2,
}
# Tensors of that size that live at once in the hungriest contender, beside inputs and copies.
TENSORS_LIVE = {INDEX: 4, SOFT_FORWARD: 4, HARD_FORWARD: 6, CONTROL: 2}
TENSORS_LIVE_IN_TRAINING = 9
TENSORS_OF_INPUTS = {SOFT_TRAIN: 2, HARD_TRAIN: 2, SOFT_BACKWARD: 8, HARD_BACKWARD: 8}


# --- cases ---


def all_cases() -> list[Case]:
    """The most telling ones first: a run that is cut short has them."""
    control = [Case("control", CONTROL, (16384, 1024), quick=True)]
    found = [*control, *shapes(), *long_rows(), *other_dims(), *launches(), *memory_cases()]
    return sorted([*found, *of_regimes(), *short_rows(), *users()], key=place)


def place(case: Case) -> int:
    """What the targets name comes before what compiles for long; what a failure could leave the
    GPU unusable after, a capture, comes late.
    """
    if case.group == REGIMES:
        return 2
    if not case.quick:
        return 4
    if case.variant == IN_A_GRAPH or case.compiled == "full":
        return 3
    return 0 if case.compiled == "always" or case.op == CONTROL else 1


def shapes() -> Iterable[Case]:
    """The sweep that the targets are stated for."""
    forwards, backwards = (SOFT_FORWARD, HARD_FORWARD, INDEX), (SOFT_BACKWARD, HARD_BACKWARD)
    for dtype in DTYPES:
        for shape in CUDA_SHAPES:
            middle = shape[1] in COMPILED_CLASSES
            for op in (*forwards, *backwards):
                # Compiling takes seconds a case, much longer than measuring it.
                often = "always" if shape[1] == 1024 and dtype != "float16" else "full"
                compiled = often if middle else "never"
                quick = dtype == "float32" or (dtype == "bfloat16" and middle)
                yield Case("shapes", op, shape, dtype, compiled=compiled, quick=quick)
            if middle and dtype != "float16":
                compiled = "full" if shape[1] == 1024 else "never"
                yield Case("shapes", SOFT_TRAIN, shape, dtype, compiled=compiled)
                yield Case("shapes", HARD_TRAIN, shape, dtype, compiled=compiled)
    for op in (*forwards, *backwards):
        yield Case("shapes", op, (16384, 1024), "float64")


def launches() -> Iterable[Case]:
    """Tensors so small that only the launches count."""
    for variant in (EAGERLY, IN_A_GRAPH):
        for shape in CUDA_LAUNCHES:
            first = shape == CUDA_LAUNCHES[0]
            for op in (SOFT_FORWARD, HARD_FORWARD, INDEX, SOFT_TRAIN, HARD_TRAIN):
                often = "always" if op in (SOFT_FORWARD, HARD_TRAIN) else "full"
                compiled = often if first else "never"
                yield Case("launches", op, shape, variant=variant, compiled=compiled, quick=first)


def long_rows() -> Iterable[Case]:
    """Fewer rows than a GPU has multiprocessors."""
    few: list[tuple[int, int]] = [(1, 1 << 22), (4, 1 << 17), (32, 1 << 17), (16, 128_256)]
    for dtype in DTYPES:
        for shape in few:
            for op in KERNELS_OF:
                quick = shape[0] == 4 and dtype == "float32"
                yield Case("long rows", op, shape, dtype, quick=quick)


def short_rows() -> Iterable[Case]:
    """Many rows of few classes."""
    for dtype in DTYPES:
        for shape in ((1 << 23, 2), (1 << 21, 10), (1 << 20, 32)):
            for op in KERNELS_OF:
                yield Case("short rows", op, shape, dtype)


def other_dims() -> Iterable[Case]:
    for dtype in DTYPES:
        for shape in (INNER_DIM, (64, 32, 56, 56), (16, 4096, 16)):
            for op in KERNELS_OF:
                quick = shape == INNER_DIM and dtype == "float32"
                yield Case("layouts", op, shape, dtype, dim=1, quick=quick)
    for op in (SOFT_FORWARD, HARD_FORWARD):
        yield Case("layouts", op, (16384, 1024), variant="mask")


def of_regimes() -> Iterable[Case]:
    """Every kernel of the table in docs/, beside a copy."""
    found = [(op, regime) for op in KERNELS_OF for regime in regimes(op)]
    for op, regime in sorted(found, key=lambda pair: pair[1].dtype == "float64"):
        yield Case(REGIMES, op, regime.shape, regime.dtype, dim=regime.dim, workload=regime.name)


def users() -> Iterable[Case]:
    """As on the CPU, where they are large enough to be about anything but launches."""
    for case in workloads():
        if case.elements >= 1 << 19:
            yield replace(case, compiled="never", quick=False)


def memory_cases() -> list[Case]:
    kinds = [((16384, 1024), "float32"), ((16384, 1024), "bfloat16"), ((256, 131072), "float32")]
    return [
        Case("memory", op, shape, dtype, compiled="full", quick=dtype == "float32")
        for shape, dtype in kinds
        for op in (SOFT_TRAIN, HARD_TRAIN)
    ]


# --- one case ---


def fitted(case: Case, free_bytes: int, cache_bytes: int) -> Case:
    """The case with as many of its rows as the memory of the GPU has room for."""
    live = TENSORS_LIVE.get(case.op, TENSORS_LIVE_IN_TRAINING)
    asked = case
    while case.shape[0] > 1:
        bytes_each = case.elements * case.torch_dtype.itemsize
        sets = max(2, math.ceil(2 * cache_bytes / bytes_each))
        # Of each set of inputs the logits, of a training step the gradient too, and of a backward
        # what every contender saves.
        of_inputs = sets * TENSORS_OF_INPUTS.get(case.op, 1)
        tensors = of_inputs + live + TENSORS_MOVED[case.op]
        if tensors * bytes_each <= 0.85 * free_bytes:
            break
        if case.group == REGIMES:
            raise RuntimeError(f"{case.workload}: no room for {list(asked.shape)} {case.dtype}")
        case = replace(case, shape=(case.shape[0] // 2, *case.shape[1:]))
    return case


# Elements of a case in a rehearsal, and of its softmax dimension.
MOST_REHEARSED, MOST_CLASSES_REHEARSED = 4096, 512


def rehearsed(case: Case) -> Case:
    """The case with so few elements that a CPU is done with them at once."""
    shape, classes = list(case.shape), case.dim % len(case.shape)
    shape[classes] = min(shape[classes], MOST_CLASSES_REHEARSED)
    for d in range(len(shape)):
        if d != classes:
            others = math.prod(shape) // shape[d]
            shape[d] = max(1, min(shape[d], MOST_REHEARSED // others))
    return replace(case, shape=tuple(shape))


def bytes_moved(case: Case) -> int:
    """What the operator must read and write at least, the int64 index of each row included."""
    indices = {INDEX: 1, SOFT_BACKWARD: 1, HARD_BACKWARD: 1, SOFT_TRAIN: 2, HARD_TRAIN: 2}
    rows_of_case = case.elements // case.shape[case.dim]
    logits = case.elements * case.torch_dtype.itemsize
    return TENSORS_MOVED[case.op] * logits + 8 * indices.get(case.op, 0) * rows_of_case


def contenders(
    case: Case, inputs: Inputs, with_compile: bool, device: Device, skipped: Skipped
) -> dict[str, Call]:
    def made(name: str, function: Callable[..., torch.Tensor]) -> Call:
        if name == GUMBEL_EXT:
            check(case, inputs, function)
        call = bind(case, inputs, function)
        return gpu_run.as_called(call, case.variant, device)

    functions_of_case = functions(case, with_compile)
    if case.group == REGIMES:
        functions_of_case = {GUMBEL_EXT: functions_of_case[GUMBEL_EXT]}
    race = {name: partial(made, name, function) for name, function in functions_of_case.items()}
    found = runnable(case.name, race, device, skipped, must=(GUMBEL_EXT, SOFTMAX))
    if case.variant == "contiguous" and case.op != CONTROL:
        found[COPY] = copier(bytes_moved(case), device)
    return found


def run_case(
    case: Case, device: Device, budget: Budget, with_compile: bool, skipped: Skipped
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    inputs = Inputs(case, device.torch_device, device.cache_bytes)
    race = contenders(case, inputs, with_compile, device, skipped)
    measured = gpu_run.timed(race, inputs.count, budget, device, case.variant)
    table = rows(case, measured)
    for row in table:
        del row["minor_faults_per_call"]
    gpu_run.add_shares(table, measured, bytes_moved(case))
    # The profiler takes longer than the measurement: once for each op.
    if case.group == "launches" and case.quick:
        gpu_run.add_kernels(table, race, device, case.variant)
    return table


def run_memory_case(
    case: Case, device: Device, with_compile: bool, skipped: Skipped
) -> list[dict[str, Any]]:
    """Peaks of PyTorch's allocator above the live logits and incoming gradient."""
    place = device.torch_device
    generator = torch.Generator(place).manual_seed(0)
    options: dict[str, Any] = {"device": place, "dtype": case.torch_dtype, "generator": generator}
    # No leaf, as what a network makes of its input.
    logits = torch.randn(case.shape, **options).requires_grad_().clone()
    grad = torch.randn(case.shape, **options)
    output = case.elements * case.torch_dtype.itemsize
    rows_of_case = case.elements // case.shape[case.dim]

    def made(function: Callable[..., torch.Tensor]) -> Call:
        def call(_: int) -> object:
            y = function(logits)
            return y, torch.autograd.grad(y, logits, grad)

        call(0)  # the first calls compile
        return call

    functions_of_case = functions(case, with_compile)
    race = {name: partial(made, function) for name, function in functions_of_case.items()}
    found = runnable(case.name, race, device, skipped, must=(GUMBEL_EXT, SOFTMAX))
    table = []
    for name, call in found.items():
        _, after_forward = device.peak(partial(functions_of_case[name], logits))
        peak, _ = device.peak(partial(call, 0))
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
                "resident_peak_bytes_per_element": None,
            }
        )
    return table


# --- a run ---


def chosen_cases(arguments: argparse.Namespace) -> list[Case]:
    found = gpu_run.chosen(all_cases(), arguments)
    return [case for case in found if case.group != "memory" or not arguments.no_memory]


def measure(
    arguments: argparse.Namespace,
    case: Case,
    device: Device,
    budget: Budget,
    skipped: Skipped,
) -> tuple[str, list[dict[str, Any]]]:
    with_compile = case.compiled == "always" or (case.compiled == "full" and not arguments.quick)
    with_compile = with_compile and not arguments.no_compile
    asked = list(case.shape)
    if device.rehearsal:
        case = rehearsed(case)
    if case.group == "memory":
        table, found = "memory_rows", run_memory_case(case, device, with_compile, skipped)
    else:
        if case.group == REGIMES:
            capability = device.describe()["compute_capability"]
            if needs_clusters(case.workload) and float(capability) < 9:
                raise gpu_run.UnsuitableGpuError(f"needs compute capability 9.0, not {capability}")
            budget = budget if device.rehearsal else OF_A_REGIME
        case = fitted(case, device.free_bytes(), device.cache_bytes)
        table, found = "rows", run_case(case, device, budget, with_compile, skipped)
    return table, [{**row, "asked_shape": asked} for row in found]


def main(argv: Sequence[str] | None = None, device: Device | None = None) -> int:
    arguments = gpu_run.parse_arguments(__doc__.splitlines()[0], argv)
    cases = chosen_cases(arguments)
    return gpu_run.run(
        "bench_cuda.py", cases, arguments, "gpu", partial(measure, arguments), device
    )


if __name__ == "__main__":
    sys.exit(main())
