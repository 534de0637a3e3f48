"""Log-space samples and the density of the Concrete distribution, beside torch.distributions."""

from __future__ import annotations

import math
from collections.abc import Callable

import environment
import torch
from timing import Call
from torch import Tensor
from torch.distributions import RelaxedOneHotCategorical
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical

import gumbel_ext
from family.case import FamilyCase

SAMPLE, SAMPLE_TRAIN = "log-space sample", "log-space sample + backward"
DENSITY, DENSITY_TRAIN = "log density", "log density + backward"
TAU = 0.5
SHAPES = ((4096, 1024), (65536, 10))


def cases() -> list[FamilyCase]:
    """The page's table."""
    return [
        FamilyCase(
            page="concrete-density",
            op=op,
            shape=shape,
            dtype=dtype,
            elements=math.prod(shape),
            contenders=_contenders(op, shape, getattr(torch, dtype)),
            quick=op == DENSITY and dtype == "float32",
        )
        for op in (SAMPLE, SAMPLE_TRAIN, DENSITY, DENSITY_TRAIN)
        for shape in SHAPES
        for dtype in ("float32", "bfloat16")
    ]


def _composite_sample(logits: Tensor) -> Tensor:
    noise = -torch.empty_like(logits).exponential_().log()
    return torch.log_softmax((logits + noise) / TAU, -1)


def _composite_density(value: Tensor, logits: Tensor) -> Tensor:
    classes, x = logits.shape[-1], value.log()
    u = logits - TAU * x
    constant = math.lgamma(classes) + (classes - 1) * math.log(TAU)
    return constant + u.sum(-1) - classes * u.logsumexp(-1) - x.sum(-1)


def _contenders(
    op: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Callable[[], tuple[dict[str, Call], int]]:
    def make() -> tuple[dict[str, Call], int]:
        sample, train = op in (SAMPLE, SAMPLE_TRAIN), op in (SAMPLE_TRAIN, DENSITY_TRAIN)
        bytes_each = math.prod(shape) * dtype.itemsize
        count = min(32, max(2, math.ceil(2 * environment.last_level_cache() / bytes_each)))
        logits = [torch.randn(shape).to(dtype).requires_grad_(train) for _ in range(count)]
        # Away from the boundary, which only one of the contenders knows.
        values = [
            torch.softmax(torch.randn(shape), -1).clamp_min(1e-5).to(dtype) for _ in range(count)
        ]
        if train:
            values = [value.requires_grad_() for value in values]
        rows = shape if sample else shape[:-1]
        grads = [torch.randn(rows) for _ in range(count)]
        tau = torch.tensor(TAU, dtype=dtype)

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

        torch._dynamo.reset()
        composite: Callable[..., Tensor] = _composite_sample if sample else _composite_density
        functions: dict[str, Callable[..., Tensor]] = {
            "gumbel_ext": (
                (lambda x: gumbel_ext.gumbel_log_softmax(x, TAU))
                if sample
                else (lambda v, x: gumbel_ext.concrete_log_prob(v, x, TAU))
            ),
            "torch.distributions": exp_relaxed if sample else relaxed,
            "PyTorch": composite,
            "torch.compile": torch.compile(composite, fullgraph=True, dynamic=False),
        }
        return {name: bind(function) for name, function in functions.items()}, count

    return make
