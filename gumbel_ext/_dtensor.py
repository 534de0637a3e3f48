"""The functions of the package on DTensors: each process samples its shard of the global noise."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from gumbel_ext._arguments import check_optional
from gumbel_ext._sharded_rows import ClassShard
from gumbel_ext.distributed import (
    _argmax_of_part,
    _Part,
    _softmax_of_part,
    _state_of_call,
    _wrap,
)

__all__ = ["argmax_of_dtensor", "softmax_of_dtensor"]


def _whole_values(function: str, logits: DTensor) -> DTensor:
    """Logits without partial sums, whose noise would otherwise be added once a process."""
    placements = [Replicate() if p.is_partial() else p for p in logits.placements]
    for placement in placements:
        if type(placement) not in (Shard, Replicate):
            raise ValueError(
                f"{function}: logits must be placed as Shard, Replicate or Partial, got {placement}"
            )
    if placements != list(logits.placements):
        logits = logits.redistribute(placements=placements)
    return logits


def _part_of(logits: DTensor) -> _Part:
    """Where the local shard lies: parts are torch.chunk's, for one mesh dimension after another."""
    mesh = logits.device_mesh
    sizes, offsets = list(logits.shape), [0] * logits.dim()
    for i, placement in enumerate(logits.placements):
        if isinstance(placement, Shard):
            d = placement.dim
            step = -(-sizes[d] // mesh.size(i))
            begin = min(step * mesh.get_local_rank(i), sizes[d])
            sizes[d] = min(step, sizes[d] - begin)
            offsets[d] += begin
    return _Part(tuple(logits.shape), tuple(offsets))


def _classes_of(logits: DTensor, dim: int, part: _Part) -> ClassShard | None:
    mesh = logits.device_mesh
    groups: list[dist.ProcessGroup] = []
    ranks, rank = 1, 0
    for i, placement in enumerate(logits.placements):
        if placement.is_shard(dim):
            groups.append(mesh.get_group(i))
            ranks, rank = ranks * mesh.size(i), rank * mesh.size(i) + mesh.get_local_rank(i)
    if not groups:
        return None
    return ClassShard(tuple(groups), ranks, rank, part.offsets[dim], part.shape[dim])


def _local_operand(
    name: str, operand: Tensor, logits: DTensor, dim: int, *, reduced: bool
) -> Tensor:
    """The part of a mask or temperature that belongs to the local logits.

    ``reduced``: whether its extent in ``dim`` is 1, as that of a temperature is. A plain tensor
    holds the same numbers on every process.
    """
    mesh = logits.device_mesh
    if not isinstance(operand, DTensor):
        operand = DTensor.from_local(operand, mesh, [Replicate()] * mesh.ndim, run_check=False)
    missing = logits.dim() - operand.dim()
    if missing < 0:
        raise ValueError(
            f"{name} must broadcast to logits of shape {list(logits.shape)}, got shape "
            f"{list(operand.shape)}"
        )
    placements: list[Placement] = []
    grads: list[Placement] = []
    for placement in logits.placements:
        if not isinstance(placement, Shard):
            placements.append(Replicate())
            grads.append(Replicate())
            continue
        d = placement.dim - missing
        cut = d >= 0 and operand.shape[d] != 1 and not (reduced and placement.dim == dim)
        placements.append(Shard(d) if cut else Replicate())
        # Processes with other rows have their own share of the gradient; those with other classes
        # of the same rows have it whole.
        whole = placement.dim == dim
        grads.append(Shard(d) if cut else (Replicate() if whole else Partial()))
    if list(operand.placements) != placements:
        operand = operand.redistribute(mesh, placements)
    return operand.to_local(grad_placements=grads)


def _state_of(
    name: str,
    logits: DTensor,
    generator: torch.Generator | None,
    rng_state: Tensor | None,
) -> Tensor:
    if isinstance(rng_state, DTensor):
        rng_state = rng_state.to_local()
    state = _state_of_call(name, logits.device, generator, rng_state)
    if rng_state is None:
        # Copies must stay copies, whatever the processes drew before.
        mesh = logits.device_mesh
        for i, placement in enumerate(logits.placements):
            if placement.is_replicate() and mesh.size(i) > 1:
                dist.broadcast(state, group=mesh.get_group(i), group_src=0)
    return state


def _index_placements(logits: DTensor, dim: int) -> list[Placement]:
    out: list[Placement] = []
    for placement in logits.placements:
        if not isinstance(placement, Shard) or placement.dim == dim:
            out.append(Replicate())
        else:
            out.append(Shard(placement.dim - (placement.dim > dim)))
    return out


def _index_to_dtensor(local: Tensor, logits: DTensor, dim: int) -> DTensor:
    size = torch.Size([n for d, n in enumerate(logits.shape) if d != dim])
    stride = torch.empty(size, device="meta").stride()
    placements = _index_placements(logits, dim)
    return DTensor.from_local(
        local, logits.device_mesh, placements, run_check=False, shape=size, stride=stride
    )


def _prepared(
    name: str, logits: DTensor, dim: int, mask: Tensor | None
) -> tuple[DTensor, int, Tensor | None, _Part, ClassShard | None]:
    """Whole logits, dim from the front, the local mask, and the place of the part."""
    logits = _whole_values(name, logits)
    dim = _wrap(name, dim, max(logits.dim(), 1))
    if mask is not None:
        mask = _local_operand(f"{name}: mask", mask, logits, dim, reduced=False)
    part = _part_of(logits)
    return logits, dim, mask, part, _classes_of(logits, dim, part)


def softmax_of_dtensor(
    logits: DTensor,
    tau: float,
    tau_tensor: Tensor | None,
    hard: bool,
    dim: int,
    mask: Tensor | None,
    return_index: bool,
    generator: torch.Generator | None,
    rng_state: Tensor | None,
) -> tuple[DTensor, DTensor | None]:
    """``y`` placed as ``logits`` are; the index, replicated where ``dim`` was split."""
    name = "gumbel_softmax"
    check_optional(name, mask, generator, rng_state, logits.device)
    logits, dim, mask, part, classes = _prepared(name, logits, dim, mask)
    if tau_tensor is not None:
        tau_tensor = _local_operand(f"{name}: tau", tau_tensor, logits, dim, reduced=True)
    state = _state_of(name, logits, generator, rng_state)
    local = logits.to_local(grad_placements=logits.placements)
    y, index = _softmax_of_part(
        local,
        tau,
        tau_tensor,
        hard,
        dim,
        mask,
        return_index,
        state,
        part,
        classes,
    )
    mesh = logits.device_mesh
    out = DTensor.from_local(
        y,
        mesh,
        logits.placements,
        run_check=False,
        shape=logits.shape,
        stride=logits.stride(),
    )
    if not return_index:
        return out, None
    return out, _index_to_dtensor(index, logits, dim)


def argmax_of_dtensor(
    logits: DTensor,
    dim: int,
    keepdim: bool,
    mask: Tensor | None,
    generator: torch.Generator | None,
    rng_state: Tensor | None,
) -> DTensor:
    """The index, replicated where ``dim`` was split."""
    name = "gumbel_argmax"
    check_optional(name, mask, generator, rng_state, logits.device)
    logits, dim, mask, part, classes = _prepared(name, logits, dim, mask)
    state = _state_of(name, logits, generator, rng_state)
    index = _argmax_of_part(logits.to_local(), dim, mask, state, part, classes)
    out = _index_to_dtensor(index, logits, dim)
    return out.unsqueeze(dim) if keepdim and logits.dim() else out  # type: ignore[return-value]
