"""What ``torch.vmap`` makes of the codebook lookup: one call, or one for each codebook.

See ``_functorch``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gumbel_ext._functorch import Positions, _Level
from gumbel_ext._positions import row_major_strides

_ops = torch.ops.gumbel_ext


def _gumbel_embedding(
    logits: Tensor,
    weight: Tensor,
    tau: float,
    tau_tensor: Tensor | None,
    hard: bool,
    dim: int,
    mask: Tensor | None,
    generator: torch.Generator | None,
    rng_state: Tensor | None,
    positions: Positions | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    level = _Level("gumbel_embedding")
    different = level.draws(rng_state)
    args = (logits, weight, tau, tau_tensor, hard, dim, mask, generator, rng_state, positions)
    if level.own_states(rng_state):
        results = level.one_by_one(_ops.gumbel_embedding, args)
        with level.below():
            out, index, state = (torch.stack(parts) for parts in zip(*results, strict=True))
        return level.wrap(out), level.wrap(index), level.wrap(state)
    if not different and not level.has(logits, weight, tau_tensor, mask, rng_state):
        with level.below():
            out, index, state = _ops.gumbel_embedding(*args)
        return out, index, state

    dims, batch_dim = level.example_dims(logits, dim)
    where = level.positions(logits.shape, positions, different)
    with level.below():
        whole = level.whole(logits, dims)
        taus = level.broadcast("tau", tau_tensor, logits, dims)
        masks = level.broadcast("mask", mask, logits, dims)
        common = level.common_state(rng_state)
        codebooks, many = level.unwrap(weight)
        if not many or level.size == 0:
            codebook = codebooks.new_empty(weight.shape) if many else codebooks
            out, index, state = _ops.gumbel_embedding(
                whole, codebook, tau, taus, hard, batch_dim, masks, generator, common, where
            )
            return level.wrap(out), level.wrap(index), state

        state = _ops.draw_rng_state(whole, generator) if common is None else common
        base, stride, *strides = where or [0, *row_major_strides(whole.shape)]
        results = []
        for i in range(level.size):
            own_tau = taus[i] if taus is not None and level.has(tau_tensor) else taus
            own_mask = masks[i] if masks is not None and level.has(mask) else masks
            at = [base + i * stride, *strides]
            results.append(
                _ops.gumbel_embedding(
                    whole[i], codebooks[i], tau, own_tau, hard, dim, own_mask, None, state, at
                )
            )
        out, index = (torch.stack(parts) for parts in list(zip(*results, strict=True))[:2])
    return level.wrap(out), level.wrap(index), state


def _gumbel_embedding_backward(
    grad: Tensor,
    logits: Tensor,
    weight: Tensor,
    index: Tensor,
    tau: float,
    tau_tensor: Tensor | None,
    hard: bool,
    dim: int,
    mask: Tensor | None,
    rng_state: Tensor,
    logits_grad: bool,
    weight_grad: bool,
    tau_grad: bool,
    positions: Positions | None = None,
) -> tuple[Tensor, ...]:
    """One by one: each example has a gradient of the codebook of its own."""
    level = _Level("gumbel_embedding_backward")
    args = (grad, logits, weight, index, tau, tau_tensor, hard, dim, mask, rng_state)
    wanted = (logits_grad, weight_grad, tau_grad)
    results = level.one_by_one(_ops.gumbel_embedding_backward, (*args, *wanted, positions))
    if not results:
        raise ValueError("gumbel_embedding_backward: vmap must be over at least one example, got 0")
    with level.below():
        return tuple(
            level.wrap(torch.stack(parts)) if w else parts[0]
            for parts, w in zip(zip(*results, strict=True), wanted, strict=True)
        )


_library = torch.library.Library("gumbel_ext", "IMPL")
_library.impl("gumbel_embedding", _gumbel_embedding, "FuncTorchVmapMode")
_library.impl("gumbel_embedding_backward", _gumbel_embedding_backward, "FuncTorchBatched")
