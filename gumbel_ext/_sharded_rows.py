"""Rows whose classes lie on several processes: each computes its own, and two small sums meet.

Nothing of the size of the logits is ever sent.  What is, for each row:

- forward: the largest ``logits + noise``; then the sum of exponentials in chunks of 1024 classes,
  with the index of the winner (of a hard sample, the index alone);
- backward: the gradient at the winner, with a hard sample's sums of exponentials; ``sum h y``.

Chunk sums are not added on the way: every process puts its own into a slot of its own and zeros
into the others.  So they are added in the order of the classes, in float64, as in a row in one
piece, and if every shard begins at a multiple of 1024 classes the result has the bits of that row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from gumbel_ext._reference import _accumulation_dtype

__all__ = ["ClassShard", "sharded_argmax", "sharded_softmax"]

_CHUNK = 1024
_FORBIDDEN = torch.iinfo(torch.int64).min
_NAN = torch.iinfo(torch.int64).max

_ops = torch.ops.gumbel_ext


@dataclass(frozen=True)
class ClassShard:
    """Where the classes of this process lie: ``[offset, offset + local size)`` of ``size``."""

    groups: tuple[dist.ProcessGroup, ...]
    ranks: int
    rank: int
    offset: int
    size: int

    def all_reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        for group in self.groups:
            dist.all_reduce(values, op, group)
        return values

    def in_slots(self, sums: Tensor, extra: Tensor) -> Tensor:
        """Own sums and ``extra``, [rows, slots] both, in a buffer that is zero elsewhere.

        Slots of sums come in the order of the classes, then those of ``extra``.
        """
        slots = self.size // _CHUNK + self.ranks + 1
        first = self.offset // _CHUNK + self.rank
        buffer = sums.new_zeros(*sums.shape[:-1], slots + extra.shape[-1])
        buffer[..., first : first + sums.shape[-1]] = sums
        buffer[..., slots:] = extra
        return buffer

    def total(self, buffer: Tensor, extra: int) -> Tensor:
        """Sum over the slots, one after the other."""
        return buffer[..., : buffer.shape[-1] - extra].cumsum(-1)[..., -1]


def _to_key(score: Tensor) -> Tensor:
    """Integers in the order of the numbers, NaN above all."""
    bits = (score.double() + 0.0).view(torch.int64)
    key = torch.where(bits < 0, bits ^ _NAN, bits)
    return torch.where(score.isnan(), _NAN, key)


def _from_key(key: Tensor) -> Tensor:
    value = torch.where(key < 0, key ^ _NAN, key).view(torch.float64)
    return torch.where(key == _NAN, torch.nan, value)


def _positions_of(index: Tensor, positions: Sequence[int], dim: int) -> Tensor:
    """Noise position of the class ``index`` of each row."""
    base, strides = positions[0], list(positions[1:])
    class_stride = strides.pop(dim)
    place = base + index * class_stride
    for d, (extent, stride) in enumerate(zip(index.shape, strides, strict=True)):
        steps = torch.arange(extent, device=index.device) * stride
        place = place + steps.view(-1, *[1] * (index.dim() - d - 1))
    return place


def _local_best(
    logits: Tensor,
    dim: int,
    mask: Tensor | None,
    rng_state: Tensor,
    positions: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Local index of the winner of each row, and its score as a key."""
    rows = [n for d, n in enumerate(logits.shape) if d != dim]
    if logits.shape[dim] == 0:
        index = logits.new_zeros(rows, dtype=torch.int64)
        return index, torch.full_like(index, _FORBIDDEN)
    index = _ops.gumbel_argmax(logits, dim, False, mask, None, rng_state, positions)
    chosen = index.clamp(min=0)
    dtype = _accumulation_dtype(logits.dtype)
    like = logits.new_empty(0, dtype=dtype)
    noise = _ops.noise_at(like, _positions_of(chosen, positions, dim), rng_state)
    score = logits.gather(dim, chosen.unsqueeze(dim)).squeeze(dim).to(dtype) + noise
    return chosen, torch.where(index < 0, _FORBIDDEN, _to_key(score))


def _scores(
    logits: Tensor, mask: Tensor | None, rng_state: Tensor, positions: Sequence[int]
) -> Tensor:
    """``logits + noise`` as computed in the kernels, -inf where the mask forbids."""
    like = logits.new_empty(0, dtype=_accumulation_dtype(logits.dtype))
    scores: Tensor = _ops.gumbel_noise(like, logits.shape, None, rng_state, positions)
    scores += logits
    return scores if mask is None else scores.masked_fill_(~mask, -torch.inf)


def _winner(shard: ClassShard, key: Tensor, best: Tensor, index: Tensor) -> Tensor:
    """The local candidate for the global index: plus one, 0 where another process has it."""
    mine = (key == best) & (best != _FORBIDDEN)
    return torch.where(mine, index + shard.offset + 1, 0)


def _index_alone(
    shard: ClassShard,
    logits: Tensor,
    dim: int,
    mask: Tensor | None,
    rng_state: Tensor,
    positions: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The global index, and the key of the row's best score, in two sums."""
    local, key = _local_best(logits, dim, mask, rng_state, positions)
    best = shard.all_reduce(key.clone(), dist.ReduceOp.MAX)
    winner = _winner(shard, key, best, local)
    # Each process has either a candidate or 0, and the lowest class wins a tie.
    index = shard.all_reduce(torch.where(winner > 0, winner, _NAN), dist.ReduceOp.MIN)
    return torch.where(best == _FORBIDDEN, 0, index) - 1, best


def _own_place(shard: ClassShard, index: Tensor, classes: int, dim: int) -> tuple[Tensor, Tensor]:
    """Local class of a global index, ``dim`` kept, and whether this process has it.

    Of other processes' indices it is some class that exists here; ``classes`` is not 0.
    """
    here = index - shard.offset
    inside = (here >= 0) & (here < classes)
    return here.clamp(0, classes - 1).unsqueeze(dim), inside


def _exponentials(
    scores: Tensor, best: Tensor, tau: float, tau_tensor: Tensor | None, dim: int
) -> tuple[Tensor, Tensor]:
    # A row without any allowed class has no largest score; with 0 its exponentials are 0.
    largest = torch.where(best == _FORBIDDEN, 0.0, _from_key(best))
    exponentials, sums = _ops.exponentiate_chunks(scores, largest, tau, tau_tensor, dim)
    return exponentials, sums


def _is_nan_row(best: Tensor) -> Tensor:
    """Rows with a NaN, and those whose allowed logits are all -inf."""
    lowest = _to_key(torch.full((), -torch.inf, dtype=torch.float64, device=best.device))
    return (best == _NAN) | (best == lowest)


def _factor(total: Tensor, best: Tensor, dtype: torch.dtype) -> Tensor:
    """What the exponentials are multiplied by: NaN in a NaN row, 0 in a forbidden one."""
    factor = torch.where(_is_nan_row(best), torch.nan, 1 / total)
    return torch.where(best == _FORBIDDEN, 0.0, factor).to(dtype)


def _inverse_tau(tau: float, tau_tensor: Tensor | None, like: Tensor) -> Tensor:
    """``1 / tau`` in the dtype computed in, kept among its normal numbers as the kernels do."""
    finfo = torch.finfo(like.dtype)
    value = like.new_tensor(tau, dtype=torch.float64) if tau_tensor is None else tau_tensor.double()
    return (1 / value).clamp(finfo.tiny, finfo.max).to(like.dtype)


class _ShardedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        tau: float,
        tau_tensor: Tensor | None,
        hard: bool,
        dim: int,
        mask: Tensor | None,
        rng_state: Tensor,
        positions: Sequence[int],
        shard: ClassShard,
    ) -> tuple[Tensor, Tensor]:
        # Checks tau, which a hard forward does not need yet, as the fused op does.
        _ops.gumbel_softmax(
            logits.narrow(dim, 0, 0), tau, tau_tensor, hard, dim, None, False, None, rng_state
        )
        if hard:
            index, best = _index_alone(shard, logits, dim, mask, rng_state, positions)
            y = torch.zeros_like(logits)
            if logits.shape[dim] > 0:
                at, inside = _own_place(shard, index, logits.shape[dim], dim)
                y.scatter_(dim, at, inside.unsqueeze(dim).to(y.dtype))
            y.masked_fill_(_is_nan_row(best).unsqueeze(dim), torch.nan)
            saved = logits
        else:
            local, key = _local_best(logits, dim, mask, rng_state, positions)
            best = shard.all_reduce(key.clone(), dist.ReduceOp.MAX)
            winner = _winner(shard, key, best, local)
            scores = _scores(logits, mask, rng_state, positions)
            exponentials, sums = _exponentials(scores, best, tau, tau_tensor, dim)
            del scores
            extra = sums.new_zeros(*sums.shape[:-1], shard.ranks)
            extra[..., shard.rank] = winner.double()
            buffer = shard.all_reduce(shard.in_slots(sums, extra), dist.ReduceOp.SUM)
            candidates = buffer[..., -shard.ranks :]
            index = torch.where(candidates > 0, candidates, torch.inf).amin(-1)
            index = torch.where(best == _FORBIDDEN, 0.0, index).long() - 1
            factor = _factor(shard.total(buffer, shard.ranks), best, exponentials.dtype)
            y = torch.empty_like(logits)
            torch.mul(exponentials, factor.unsqueeze(dim), out=exponentials)
            y.copy_(exponentials)
            saved = y
        if torch.compiler.is_compiling():
            # torch 2.11 compiles all that this computes into outputs. A tensor that was filled in
            # place is then two of them, and its gradient goes to the one that is not looked at.
            y = y.clone()
        ctx.save_for_backward(saved, index, tau_tensor, mask if hard else None, rng_state, best)
        ctx.tau, ctx.hard, ctx.dim = tau, hard, dim
        ctx.positions, ctx.shard = positions, shard
        ctx.mark_non_differentiable(index)
        return y, index

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved, index, tau_tensor, mask, rng_state, best = ctx.saved_tensors
        tau, dim, shard = ctx.tau, ctx.dim, ctx.shard
        dtype = _accumulation_dtype(saved.dtype)
        if saved.shape[dim] > 0:
            at, inside = _own_place(shard, index, saved.shape[dim], dim)
            shift = torch.where(inside, grad.gather(dim, at).squeeze(dim).double(), 0.0)
        else:
            shift = torch.zeros_like(index, dtype=torch.float64)
        if ctx.hard:
            scores = _scores(saved, mask, rng_state, ctx.positions)
            y, sums = _exponentials(scores, best, tau, tau_tensor, dim)
            buffer = shard.in_slots(sums, shift.unsqueeze(-1))
            shard.all_reduce(buffer, dist.ReduceOp.SUM)
            shift = buffer[..., -1].contiguous()
            factor = _factor(shard.total(buffer, 1), best, dtype)
            y = y.mul_(factor.unsqueeze(dim))
        else:
            y = saved
            shard.all_reduce(shift, dist.ReduceOp.SUM)

        def total(dot: Tensor | None) -> Tensor:
            sums: Tensor = _ops.dot_chunks(grad, y, shift, dot, dim)
            buffer = shard.in_slots(sums, sums[..., :0])
            shard.all_reduce(buffer, dist.ReduceOp.SUM)
            # As precise as the kernels keep it.
            summed: Tensor = shard.total(buffer, 0).to(dtype)
            return summed

        inverse = _inverse_tau(tau, tau_tensor, grad.new_empty(0, dtype=dtype))
        dot = total(None)
        forbidden = (index < 0).unsqueeze(dim)
        gradient = grad.to(dtype, copy=True)
        gradient.sub_(shift.to(dtype).unsqueeze(dim)).sub_(dot.unsqueeze(dim))
        gradient.mul_(y).mul_(inverse).masked_fill_(forbidden, 0.0)
        grad_tau = None
        if ctx.needs_input_grad[2]:
            terms = -total(dot.double()).unsqueeze(dim) * inverse
            terms = terms.masked_fill(forbidden, 0.0)
            grad_tau = terms.sum_to_size(tau_tensor.shape).to(tau_tensor.dtype)
        out = torch.empty_like(saved).copy_(gradient)
        return out, None, grad_tau, None, None, None, None, None, None


def _unchanging(t: Tensor) -> Tensor:
    """A copy of a leaf, or of a view of one, as the fused operators save it."""
    root = t._base if t._is_view() and t._base is not None else t
    return t.clone() if root.is_leaf else t


def sharded_softmax(
    logits: Tensor,
    tau: float,
    tau_tensor: Tensor | None,
    hard: bool,
    dim: int,
    mask: Tensor | None,
    rng_state: Tensor,
    positions: Sequence[int],
    shard: ClassShard,
) -> tuple[Tensor, Tensor]:
    """``y`` of the local classes, and the global index."""
    recorded = logits.requires_grad or (tau_tensor is not None and tau_tensor.requires_grad)
    if recorded and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        logits = _unchanging(logits) if hard else logits
        tau_tensor = None if tau_tensor is None else _unchanging(tau_tensor)
    y, index = _ShardedSoftmax.apply(  # type: ignore[no-untyped-call]
        logits, tau, tau_tensor, hard, dim, mask, rng_state, positions, shard
    )
    return y, index


def sharded_argmax(
    logits: Tensor,
    dim: int,
    mask: Tensor | None,
    rng_state: Tensor,
    positions: Sequence[int],
    shard: ClassShard,
) -> Tensor:
    """The global index."""
    return _index_alone(shard, logits.detach(), dim, mask, rng_state, positions)[0]
