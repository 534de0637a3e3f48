"""The cases of the core on the CPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.cases.core.case import Case
from benchmarks.labels import (
    CONTROL,
    DTYPES,
    HARD_BACKWARD,
    HARD_FORWARD,
    HARD_TRAIN,
    INDEX,
    INNER_DIM,
    SHAPES,
    SOFT_BACKWARD,
    SOFT_FORWARD,
    SOFT_TRAIN,
    TINY,
)


def all_cases() -> list[Case]:
    control = Case("control", CONTROL, (4096, 1024), quick=True)
    return [control, *shapes(), *layouts(), *workloads(), *memory_cases()]


def shapes() -> Iterable[Case]:
    """The shapes that the performance targets name."""
    for shape in SHAPES:
        middle = shape == (4096, 1024)
        for dtype in DTYPES:
            float32 = dtype == "float32"
            ends = shape[1] in (8, 1024, 131072)
            quick = (float32 and ends) or (dtype == "bfloat16" and middle)
            often = "always" if float32 and middle else "full"
            soft_quick = quick or float32
            yield Case("shapes", SOFT_FORWARD, shape, dtype, compiled=often, quick=soft_quick)
            yield Case("shapes", HARD_FORWARD, shape, dtype, compiled=often, quick=quick)
            yield Case("shapes", INDEX, shape, dtype, quick=quick)
            yield Case("shapes", SOFT_BACKWARD, shape, dtype, quick=quick)
            yield Case("shapes", HARD_BACKWARD, shape, dtype, quick=quick)
            if dtype != "float16":
                compiled = "full" if middle else "never"
                yield Case("shapes", SOFT_TRAIN, shape, dtype, compiled=compiled, quick=middle)
                yield Case("shapes", HARD_TRAIN, shape, dtype, compiled=compiled, quick=middle)

    yield Case("shapes", SOFT_FORWARD, INNER_DIM, dim=1, compiled="full", quick=True)
    yield Case("shapes", HARD_FORWARD, INNER_DIM, dim=1, compiled="full")
    yield Case("shapes", INDEX, INNER_DIM, dim=1)
    yield Case("shapes", SOFT_FORWARD, INNER_DIM, "bfloat16", dim=1, compiled="full")

    yield Case("shapes", SOFT_FORWARD, TINY, compiled="always", quick=True)
    yield Case("shapes", HARD_FORWARD, TINY, compiled="always", quick=True)
    yield Case("shapes", INDEX, TINY, quick=True)
    yield Case("shapes", SOFT_TRAIN, TINY, compiled="full", quick=True)
    yield Case("shapes", HARD_TRAIN, TINY, compiled="full", quick=True)


def layouts() -> Iterable[Case]:
    """Inputs that are not one dense block of finite numbers."""
    shape = (4096, 1024)
    yield Case("layouts", SOFT_FORWARD, shape, variant="transposed", compiled="full", quick=True)
    yield Case("layouts", SOFT_FORWARD, shape, variant="expanded", compiled="full", quick=True)
    yield Case("layouts", SOFT_FORWARD, (8192, 64), variant="mask", compiled="full", quick=True)
    yield Case("layouts", HARD_FORWARD, (8192, 64), variant="mask", compiled="full")


def workloads() -> Iterable[Case]:
    """The shapes that users of F.gumbel_softmax run."""

    def case(workload: str, op: str, shape: tuple[int, ...], **more: Any) -> Case:
        return Case("workloads", op, shape, workload=workload, **more)

    wav2vec2 = "wav2vec2 quantiser"
    yield case(wav2vec2, HARD_FORWARD, (3200, 320), compiled="full", quick=True)
    yield case(wav2vec2, HARD_TRAIN, (3200, 320), compiled="full", quick=True)
    # Forward only: a handful of rounds of F.gumbel_softmax with backward takes half a minute.
    yield case("dVAE codebook", SOFT_FORWARD, (8, 8192, 32, 32), dim=1, compiled="full")
    for rows, tokens in ((64, 32000), (16, 128256)):
        more: dict[str, Any] = {"dtype": "bfloat16", "quick": tokens == 32000}
        yield case("token straight-through", HARD_FORWARD, (rows, tokens), compiled="full", **more)
        yield case("token straight-through", HARD_TRAIN, (rows, tokens), compiled="full", **more)
        yield case("token sampling", INDEX, (rows, tokens), **more)
    vae = "categorical VAE"
    yield case(vae, SOFT_FORWARD, (100, 30, 10), compiled="full", quick=True)
    yield case(vae, SOFT_TRAIN, (100, 30, 10), compiled="full", quick=True)
    yield case("NAS cells", HARD_TRAIN, (128, 8), compiled="full", quick=True)
    yield case("token router", HARD_TRAIN, (8192, 64), compiled="full", quick=True)
    yield case("discrete actions", INDEX, (8192, 64), quick=True)
    dna: dict[str, Any] = {"dim": 1, "variant": "-inf logits", "compiled": "full", "quick": True}
    yield case("DNA design", SOFT_FORWARD, (16, 4, 1000), **dna)
    yield case("DNA design", HARD_TRAIN, (16, 4, 1000), **dna)


def memory_cases() -> Iterable[Case]:
    kinds = [((4096, 1024), "float32"), ((65536, 8), "float32"), ((32, 131072), "float32")]
    for shape, dtype in [*kinds, ((4096, 1024), "bfloat16")]:
        quick = (shape, dtype) == kinds[0]
        for op in (SOFT_TRAIN, HARD_TRAIN):
            yield Case("memory", op, shape, dtype, compiled="always", quick=quick)
