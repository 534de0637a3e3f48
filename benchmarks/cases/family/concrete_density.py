"""Log-space samples and the density of the Concrete distribution, beside torch.distributions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import RelaxedOneHotCategorical
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical

import gumbel_ext
from benchmarks import environment
from benchmarks.cases.family.case import Contenders, FamilyCase, Place, Rows, launches
from benchmarks.compiled import compiled
from benchmarks.timing import Call

SAMPLE, SAMPLE_TRAIN = "log-space sample", "log-space sample + backward"
DENSITY, DENSITY_TRAIN = "log density", "log density + backward"
TAU = 0.5
SHAPES = ((4096, 1024), (65536, 10))
# Tensors of the size of the logits that an operator must read and write at least.
TENSORS_MOVED = {SAMPLE: 2, SAMPLE_TRAIN: 5, DENSITY: 2, DENSITY_TRAIN: 6}


def cases() -> list[FamilyCase]:
    """The page's table."""
    return [
        _case(op, shape, dtype, quick=op == DENSITY and dtype == "float32")
        for op in (SAMPLE, SAMPLE_TRAIN, DENSITY, DENSITY_TRAIN)
        for shape in SHAPES
        for dtype in ("float32", "bfloat16")
    ]


def gpu_cases(rows: Rows) -> list[FamilyCase]:
    table = []
    for op in (SAMPLE, DENSITY, SAMPLE_TRAIN, DENSITY_TRAIN):
        quick = op in (SAMPLE_TRAIN, DENSITY_TRAIN)
        table.append(_case(op, (rows(16384), 1024), "float32", quick=quick))
        table.append(_case(op, (rows(16384), 1024), "bfloat16", quick=False))
        table += launches(_case(op, (128, 8), "float32", quick=quick))
        table.append(_case(op, (rows(1 << 20), 10), "float32", quick=False))
        table.append(_case(op, (rows(4096), 32_000), "bfloat16", quick=False))
    return table


def _case(op: str, shape: tuple[int, ...], dtype: str, quick: bool) -> FamilyCase:
    of_dtype: torch.dtype = getattr(torch, dtype)
    return FamilyCase(
        page="concrete-density",
        op=op,
        shape=shape,
        dtype=dtype,
        elements=math.prod(shape),
        contenders=_contenders(op, shape, of_dtype),
        quick=quick,
        bytes_moved=TENSORS_MOVED[op] * math.prod(shape) * of_dtype.itemsize,
    )


def _composite_sample(logits: Tensor) -> Tensor:
    noise = -torch.empty_like(logits).exponential_().log()
    return torch.log_softmax((logits + noise) / TAU, -1)


def _composite_density(value: Tensor, logits: Tensor) -> Tensor:
    classes, x = logits.shape[-1], value.log()
    u = logits - TAU * x
    constant = math.lgamma(classes) + (classes - 1) * math.log(TAU)
    return constant + u.sum(-1) - classes * u.logsumexp(-1) - x.sum(-1)


def _contenders(op: str, shape: tuple[int, ...], dtype: torch.dtype) -> Contenders:
    def make(place: Place) -> tuple[dict[str, Call], int]:
        sample, train = op in (SAMPLE, SAMPLE_TRAIN), op in (SAMPLE_TRAIN, DENSITY_TRAIN)
        bytes_each = math.prod(shape) * dtype.itemsize
        count = min(32, max(2, math.ceil(2 * environment.last_level_cache() / bytes_each)))
        logits = [torch.randn(shape, device=place).to(dtype) for _ in range(count)]
        # Away from the boundary, which only one of the contenders knows.
        values = [
            torch.softmax(torch.randn(shape, device=place), -1).clamp_min(1e-5).to(dtype)
            for _ in range(count)
        ]
        if train:
            # No leaves, as what a network makes of its input.
            logits = [tensor.requires_grad_().clone() for tensor in logits]
            values = [tensor.requires_grad_().clone() for tensor in values]
        rows = shape if sample else shape[:-1]
        grads = [torch.randn(rows, device=place) for _ in range(count)]
        tau = torch.tensor(TAU, dtype=dtype, device=place)

        def exp_relaxed(x: Tensor) -> Tensor:
            return ExpRelaxedCategorical(tau, logits=x, validate_args=False).rsample()

        def relaxed(v: Tensor, x: Tensor) -> Tensor:
            return RelaxedOneHotCategorical(tau, logits=x, validate_args=False).log_prob(v)

        def bind(function: Callable[..., Tensor]) -> Call:
            def call(i: int) -> object:
                inputs = (logits[i],) if sample else (values[i], logits[i])
                out = function(*inputs)
                if not train:
                    return out
                return torch.autograd.grad(out, inputs, grads[i].to(out.dtype))

            return call

        composite: Callable[..., Tensor] = _composite_sample if sample else _composite_density
        functions: dict[str, Callable[..., Tensor]] = {
            "gumbel_ext": (
                (lambda x: gumbel_ext.gumbel_log_softmax(x, TAU))
                if sample
                else (lambda v, x: gumbel_ext.concrete_log_prob(v, x, TAU))
            ),
            "torch.distributions": exp_relaxed if sample else relaxed,
            "PyTorch": composite,
            "torch.compile": compiled(composite),
        }
        return {name: bind(function) for name, function in functions.items()}, count

    return make
