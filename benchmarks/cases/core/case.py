"""A case of the core: its inputs, and what each contender does with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gumbel_ext
from benchmarks import environment
from benchmarks.compiled import compiled
from benchmarks.labels import (
    ARGMAX,
    COMPILED,
    COMPILED_ARGMAX,
    CONTROL,
    EAGER,
    EAGERLY,
    GUMBEL_EXT,
    HARD_BACKWARD,
    HARD_TRAIN,
    IN_A_GRAPH,
    INDEX,
    SAME_TWICE,
    SOFT_BACKWARD,
    SOFT_TRAIN,
    SOFTMAX,
)
from benchmarks.timing import Call

# Sets of inputs for a case: enough to leave the last-level cache. Tensors of which that would take
# more than MOST_INPUTS live in a cache in real use too.
MOST_INPUTS = 64
MOST_INPUT_BYTES = 256 << 20


@dataclass(frozen=True)
class Case:
    """One row group: an operation on one kind of input, raced by several contenders."""

    # shapes | layouts | workloads | control | memory; on a GPU long rows | short rows | launches |
    # regimes too
    group: str
    op: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    dim: int = -1
    # contiguous | transposed | expanded | -inf logits | mask | one by one | in a graph
    variant: str = "contiguous"
    workload: str = ""  # of group regimes: the name of the regime
    compiled: str = "never"  # never | full | always: in which runs torch.compile takes part
    quick: bool = False  # part of a --quick run

    @property
    def name(self) -> str:
        """Path-like name, for --cases."""
        size = "x".join(map(str, self.shape)) + f"/dim={self.dim}"
        parts = [self.group, self.workload, self.op, self.dtype, size, self.variant]
        return "/".join(part.replace(" ", "-") for part in parts if part)

    @property
    def hard(self) -> bool:
        """Whether the output is the straight-through one-hot."""
        return self.op.startswith("hard")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of logits, outputs and gradients."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def called(self) -> str:
        """How a case that is all launch is called on a GPU; empty of others."""
        return self.variant if self.variant in (EAGERLY, IN_A_GRAPH) else ""

    @property
    def columns(self) -> dict[str, Any]:
        """What a row of the result says of the case."""
        return {
            "case": self.name,
            "group": self.group,
            "workload": self.workload,
            "op": self.op,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "dim": self.dim,
            "variant": self.variant,
        }

    @property
    def elements(self) -> int:
        """Number of logits."""
        return math.prod(self.shape)


class Inputs:
    """Logits, incoming gradients and masks of a case, in enough copies to leave the cache."""

    def __init__(self, case: Case, device: str = "cpu", cache_bytes: int | None = None) -> None:
        generator = torch.Generator(device).manual_seed(0)
        drawn: dict[str, Any] = {"generator": generator, "device": device}
        dtype = case.torch_dtype
        bytes_each = case.elements * dtype.itemsize
        cache = environment.last_level_cache() if cache_bytes is None else cache_bytes
        wanted_bytes = min(2 * cache, MOST_INPUT_BYTES)
        self.count = min(MOST_INPUTS, max(2, math.ceil(wanted_bytes / bytes_each)))

        def random(shape: tuple[int, ...]) -> Tensor:
            if device == "cpu":
                return torch.randn(shape, **drawn).to(dtype)
            return torch.randn(shape, **drawn, dtype=dtype)  # no float32 copy of gigabytes

        def logits() -> Tensor:
            shape = case.shape
            if case.variant == "transposed":
                return random(shape[::-1]).t()
            if case.variant == "expanded":
                return random((1, *shape[1:])).expand(shape)
            values = random(shape)
            if case.variant == "-inf logits":
                forbidden = torch.rand(shape, **drawn) < 0.2
                forbidden.select(case.dim, 0).fill_(False)  # a row must keep a choice
                values.masked_fill_(forbidden, -torch.inf)
            return values

        self.logits = [logits() for _ in range(self.count)]
        self.allowed: list[Tensor] = []
        if case.variant == "mask":
            for _ in range(self.count):
                allowed = torch.rand(case.shape, **drawn) >= 0.2
                allowed.select(case.dim, 0).fill_(True)
                self.allowed.append(allowed)
        self.grads: list[Tensor] = []
        if "backward" in case.op:
            for _ in range(self.count):
                self.grads.append(random(case.shape))
            # No leaves, as what a network makes of its input.
            self.logits = [tensor.requires_grad_().clone() for tensor in self.logits]


def functions(case: Case, with_compile: bool) -> dict[str, Callable[..., Tensor]]:
    """What each contender makes of (logits) or (logits, allowed): a differentiable expression."""
    dim, hard = case.dim, case.hard
    race: dict[str, Callable[..., Tensor]]

    if case.op == CONTROL:
        same = {name: lambda logits: F.softmax(logits, dim) for name in (SOFTMAX, SAME_TWICE)}
        return dict(same)

    if case.op == INDEX:

        def argmax_of_noisy(logits: Tensor) -> Tensor:
            gumbel = -torch.empty_like(logits).exponential_().log()
            return (logits + gumbel).argmax(dim)

        race = {
            GUMBEL_EXT: lambda logits: gumbel_ext.gumbel_argmax(logits, dim),
            ARGMAX: argmax_of_noisy,
        }
        if with_compile:
            race[COMPILED_ARGMAX] = compiled(argmax_of_noisy)
        return race

    def peer(logits: Tensor, allowed: Tensor | None = None) -> Tensor:
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        return F.gumbel_softmax(logits, tau=1.0, hard=hard, dim=dim)

    def ours(logits: Tensor, allowed: Tensor | None = None) -> Tensor:
        return gumbel_ext.gumbel_softmax(logits, tau=1.0, hard=hard, dim=dim, mask=allowed)

    race = {GUMBEL_EXT: ours, EAGER: peer}
    if with_compile:
        race[COMPILED] = compiled(peer)
    race[SOFTMAX] = lambda logits, allowed=None: F.softmax(logits, dim)
    return race


def check(case: Case, inputs: Inputs, function: Callable[..., Tensor]) -> None:
    """Refuse to time something that is not a sample of the right kind."""
    logits = inputs.logits[0].detach()
    with torch.no_grad():
        result = function(logits, inputs.allowed[0]) if inputs.allowed else function(logits)
    if case.op == INDEX:
        reduced = list(case.shape)
        classes = reduced.pop(case.dim)
        right = list(result.shape) == reduced and result.dtype == torch.int64
        right = right and int(result.min()) >= 0 and int(result.max()) < classes
    else:
        right = result.shape == logits.shape and result.dtype == logits.dtype
        sums = result.sum(case.dim, dtype=torch.float32)
        # Soft probabilities are rounded one by one, so that their sum is not exact.
        slack = 0.0 if case.hard else max(1e-4, 4 * torch.finfo(logits.dtype).eps)
        right = right and bool(((sums - 1).abs() <= slack).all())
        if case.hard:
            right = right and bool((result.amax(case.dim) == 1).all())
    if not right:
        raise RuntimeError(f"{GUMBEL_EXT} returned something else than {case.op} should")


def bind(case: Case, inputs: Inputs, function: Callable[..., Tensor]) -> Call:
    logits, grads = inputs.logits, inputs.grads
    if inputs.allowed:
        return lambda i: function(logits[i], inputs.allowed[i])
    if case.op in (SOFT_TRAIN, HARD_TRAIN):
        return lambda i: torch.autograd.grad(function(logits[i]), logits[i], grads[i])
    if case.op in (SOFT_BACKWARD, HARD_BACKWARD):
        outputs = [function(tensor) for tensor in logits]
        return lambda i: torch.autograd.grad(outputs[i], logits[i], grads[i], retain_graph=True)
    return lambda i: function(logits[i])
