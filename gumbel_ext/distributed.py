"""Samples of tensors that are split over processes: the samples of one device.

The noise of an element is a function of its place in the whole tensor (``docs/noise.md``), so that
a process which knows where its part lies draws the noise that the part has in the whole.  Processes
that hold different examples draw different noise from one seed, and a row whose classes are split
is normalised over its processes by two small all-reduces; logits are never sent.

With :class:`~torch.distributed.tensor.DTensor` nothing here need be called: the functions of
``gumbel_ext`` take one and return one.  For code with plain tensors these take ``shards`` instead.

All processes must use the same seed: generators in the same state, or one ``rng_state``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from gumbel_ext._arguments import (
    ErrorsOf,
    as_bool,
    as_int,
    as_size,
    check_optional,
    check_supported,
    check_tensor,
    described,
    empty,
    split_tau,
)
from gumbel_ext._positions import row_major_strides
from gumbel_ext._sharded_rows import ClassShard, sharded_argmax, sharded_softmax

__all__ = ["Shard", "gumbel_argmax", "gumbel_noise", "gumbel_softmax"]

Number: TypeAlias = float | int

_ops = torch.ops.gumbel_ext


@dataclass(frozen=True)
class Shard:
    """Says that this process holds a part of one dimension of a larger tensor.

    Args:
        dim: the dimension that is split.
        group: the processes that hold the other parts, ranked in the order of the parts; all
            processes if None.
        offset: where the part begins; if None, the parts are of equal size and follow the ranks.
        size: size of the whole dimension; if None, that of the part times the number of ranks.
    """

    dim: int
    group: dist.ProcessGroup | None = None
    offset: int | None = None
    size: int | None = None


@dataclass(frozen=True)
class _Part:
    """A local tensor's place in the whole."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]

    def positions(self) -> list[int]:
        strides = row_major_strides(self.shape)
        base = sum(o * stride for o, stride in zip(self.offsets, strides, strict=True))
        return [base, *strides]


def _wrap(function: str, dim: int, dims: int) -> int:
    dim = as_int(function, "dim", dim)
    if not -dims <= dim < dims:
        raise IndexError(f"{function}: dim must be between {-dims} and {dims - 1}, got {dim}")
    return dim % dims


def _place(
    function: str, local: Sequence[int], shards: Shard | Sequence[Shard], dim: int | None
) -> tuple[_Part, ClassShard | None]:
    """The place of a local tensor, and that of its classes if ``dim`` is split."""
    shape, offsets = list(local), [0] * len(local)
    classes = None
    for shard in shards if isinstance(shards, Sequence) else (shards,):
        if not isinstance(shard, Shard):
            raise TypeError(f"{function}: shards must be Shards, got {described(shard)}")
        d = _wrap(f"{function}: shards", shard.dim, len(local))
        if shape[d] != local[d] or offsets[d]:
            raise ValueError(f"{function}: shards must name a dimension once, got {d} twice")
        needs_group = shard.offset is None or shard.size is None or d == dim
        ranks, rank = 1, 0
        if needs_group:
            ranks, rank = dist.get_world_size(shard.group), dist.get_rank(shard.group)
        size, offset = shard.size, shard.offset
        size = local[d] * ranks if size is None else as_int(function, "shards: size", size)
        offset = local[d] * rank if offset is None else as_int(function, "shards: offset", offset)
        if not 0 <= offset <= size - local[d]:
            raise ValueError(
                f"{function}: a shard must lie within its dimension, got offset {offset} and "
                f"{local[d]} elements of {size} in dimension {d}"
            )
        shape[d], offsets[d] = size, offset
        if d == dim:
            group = dist.group.WORLD if shard.group is None else shard.group
            assert group is not None
            classes = ClassShard((group,), ranks, rank, offset, size)
    return _Part(tuple(shape), tuple(offsets)), classes


def _state_of_call(
    function: str,
    device: torch.device,
    generator: torch.Generator | None,
    rng_state: Tensor | None,
) -> Tensor:
    """``[seed, offset]``, drawn also where the local part is empty: generators advance alike."""
    if rng_state is None:
        check_optional(function, None, generator, None, device)
        state: Tensor = torch.ops.gumbel_ext.draw_rng_state(
            torch.empty(0, device=device), generator
        )
        return state
    if generator is not None:
        raise ValueError(f"{function}: give either generator or rng_state, not both")
    return rng_state


def gumbel_softmax(
    logits: Tensor,
    tau: Number | Tensor = 1,
    hard: bool = False,
    dim: int = -1,
    *,
    shards: Shard | Sequence[Shard],
    mask: Tensor | None = None,
    return_index: bool = False,
    generator: torch.Generator | None = None,
    rng_state: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The calling process's part of :func:`gumbel_ext.gumbel_softmax` of a split tensor.

    Noise, index and one-hot samples are those of the whole tensor on one device, bit for bit.  So
    are soft samples and gradients on the CPU, if ``dim`` is not split or its parts begin at
    multiples of 1024 classes; otherwise they differ by the rounding of a sum.

    If ``dim`` is split, all processes of that shard's group must call; two all-reduces run in the
    forward and two in the backward (three if ``tau`` needs a gradient) of some numbers a row.  Then
    derivatives of second order are an error.

    Args:
        logits: this process's part.
        tau: as there; a tensor broadcasts to the local part, with ``dim`` reduced to 1. Its
            gradient is that of the local rows: sum it over processes that hold other rows.
        hard: as there.
        dim: as there.
        shards: how the dimensions are split, one :class:`Shard` for each that is.
        mask: this process's part of the mask, or what broadcasts to it.
        return_index: whether to also return the index, of the whole dimension if ``dim`` is split.
        generator: as there; in the same state in all processes.
        rng_state: as there; the same in all processes.

    Returns:
        ``y`` of the shape of ``logits``; with ``return_index=True`` also the int64 index.

    Raises:
        TypeError, ValueError, IndexError: as :func:`gumbel_ext.gumbel_softmax`, and if shards do
            not fit the local shape.
    """
    name = "distributed.gumbel_softmax"
    check_tensor(name, "logits", logits)
    check_supported(name, "logits", logits)
    check_optional(name, mask, generator, rng_state, logits.device)
    dim = _wrap(name, dim, logits.dim())
    part, classes = _place(name, logits.shape, shards, dim)
    number, tensor = split_tau(name, tau)
    hard, return_index = as_bool(name, "hard", hard), as_bool(name, "return_index", return_index)
    state = _state_of_call(name, logits.device, generator, rng_state)
    with ErrorsOf(name):
        y, index = _softmax_of_part(
            logits, number, tensor, hard, dim, mask, return_index, state, part, classes
        )
    return (y, index) if return_index else y


def _softmax_of_part(
    logits: Tensor,
    tau: float,
    tau_tensor: Tensor | None,
    hard: bool,
    dim: int,
    mask: Tensor | None,
    return_index: bool,
    state: Tensor,
    part: _Part,
    classes: ClassShard | None,
) -> tuple[Tensor, Tensor]:
    positions = part.positions()
    if classes is None:
        y, index, _ = _ops.gumbel_softmax(
            logits, tau, tau_tensor, hard, dim, mask, return_index, None, state, positions
        )
        return y, index
    return sharded_softmax(logits, tau, tau_tensor, hard, dim, mask, state, positions, classes)


def gumbel_argmax(
    logits: Tensor,
    dim: int = -1,
    keepdim: bool = False,
    *,
    shards: Shard | Sequence[Shard],
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    rng_state: Tensor | None = None,
) -> Tensor:
    """The calling process's rows of :func:`gumbel_ext.gumbel_argmax` of a split tensor.

    The indices are those of the whole tensor on one device.  Arguments and errors are those of
    :func:`gumbel_softmax`.

    Returns:
        int64 tensor of the shape of ``logits`` without ``dim``: of the whole dimension, the same in
        all processes that share a row.
    """
    name = "distributed.gumbel_argmax"
    check_tensor(name, "logits", logits)
    check_supported(name, "logits", logits)
    check_optional(name, mask, generator, rng_state, logits.device)
    dim, keepdim = _wrap(name, dim, logits.dim()), as_bool(name, "keepdim", keepdim)
    part, classes = _place(name, logits.shape, shards, dim)
    state = _state_of_call(name, logits.device, generator, rng_state)
    with ErrorsOf(name):
        index = _argmax_of_part(logits, dim, mask, state, part, classes)
    return index.unsqueeze(dim) if keepdim else index


def _argmax_of_part(
    logits: Tensor,
    dim: int,
    mask: Tensor | None,
    state: Tensor,
    part: _Part,
    classes: ClassShard | None,
) -> Tensor:
    positions = part.positions()
    if classes is None:
        index: Tensor = _ops.gumbel_argmax(logits, dim, False, mask, None, state, positions)
        return index
    return sharded_argmax(logits, dim, mask, state, positions, classes)


def gumbel_noise(
    size: Sequence[int],
    *,
    shards: Shard | Sequence[Shard],
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
    generator: torch.Generator | None = None,
    rng_state: Tensor | None = None,
) -> Tensor:
    """The calling process's part of :func:`gumbel_ext.gumbel_noise` of a split tensor.

    Args:
        size: shape of this process's part.
        shards: as for :func:`gumbel_softmax`.
        dtype: as for :func:`gumbel_ext.gumbel_noise`.
        device: as there.
        generator: as there; in the same state in all processes.
        rng_state: as there; the same in all processes.

    Returns:
        A contiguous tensor of shape ``size``.
    """
    name = "distributed.gumbel_noise"
    shape = as_size(name, size)
    part, _ = _place(name, shape, shards, None)
    like = empty(name, dtype, device)
    check_optional(name, None, generator, rng_state, like.device)
    state = _state_of_call(name, like.device, generator, rng_state)
    with ErrorsOf(name):
        noise: Tensor = _ops.gumbel_noise(like, shape, None, state, part.positions())
    return noise
