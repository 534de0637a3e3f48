"""The cases of the core on a GPU, and how large they are there."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from benchmarks.cases.core.case import Case
from benchmarks.cases.core.cpu import workloads
from benchmarks.cases.core.regimes import KERNELS_OF, regimes
from benchmarks.labels import (
    COMPILED_CLASSES,
    CONTROL,
    CUDA_LAUNCHES,
    CUDA_SHAPES,
    DTYPES,
    EAGERLY,
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
)

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


def all_cases() -> list[Case]:
    """The most telling ones first: a run that is cut short has them."""
    control = [Case("control", CONTROL, (16384, 1024), quick=True)]
    found: list[Case] = [
        *control,
        *shapes(),
        *long_rows(),
        *other_dims(),
        *launches(),
        *memory_cases(),
    ]
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
