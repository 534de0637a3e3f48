"""What ``torch.vmap`` makes of the relatives without noise, and of decoupled temperatures.

See ``_functorch``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gumbel_ext._functorch import _Level

_ops = torch.ops.gumbel_ext


def _decoupled_gumbel_softmax(*args: Any) -> tuple[Tensor, Tensor]:
    """Its parts have rules of their own."""
    results: tuple[Tensor, Tensor] = _ops.decoupled_gumbel_softmax.default.decompose(*args)
    return results


def _straight_through_softmax(
    logits: Tensor,
    tau: float,
    tau_tensor: Tensor | None,
    dim: int,
    mask: Tensor | None,
    return_index: bool,
) -> tuple[Tensor, Tensor]:
    level = _Level("straight_through_softmax")
    dims, batch_dim = level.example_dims(logits, dim)
    with level.below():
        y, index = _ops.straight_through_softmax(
            level.whole(logits, dims),
            tau,
            level.broadcast("tau", tau_tensor, logits, dims),
            batch_dim,
            level.broadcast("mask", mask, logits, dims),
            return_index,
        )
        if logits.dim() == 0:
            y = y.squeeze(1)
    return level.wrap(y), level.wrap(index) if return_index else index


def _straight_through_softmax_backward(
    grad: Tensor,
    logits: Tensor,
    index: Tensor,
    tau: float,
    tau_tensor: Tensor | None,
    dim: int,
    mask: Tensor | None,
    tau_grad: bool,
) -> tuple[Tensor, Tensor]:
    level = _Level("straight_through_softmax_backward")
    dims, batch_dim = level.example_dims(logits, dim)
    with level.below():
        grad_logits, grad_tau = _ops.straight_through_softmax_backward(
            level.whole(grad, dims),
            level.whole(logits, dims),
            level.whole(index, dims - 1),
            tau,
            level.broadcast("tau", tau_tensor, logits, dims),
            batch_dim,
            level.broadcast("mask", mask, logits, dims),
            tau_grad,
        )
        if logits.dim() == 0:
            grad_logits = grad_logits.squeeze(1)
            grad_tau = grad_tau.squeeze(1) if tau_grad else grad_tau
    return level.wrap(grad_logits), level.wrap(grad_tau) if tau_grad else grad_tau


def _soft_argmax(
    logits: Tensor, beta: float, beta_tensor: Tensor | None, dim: int, positions: Tensor
) -> tuple[Tensor, Tensor]:
    level = _Level("soft_argmax")
    dims, batch_dim = level.example_dims(logits, dim)
    if level.has(positions):
        args = (logits, beta, beta_tensor, dim, positions)
        results = level.one_by_one(_ops.soft_argmax, args)
        with level.below():
            expected, state = (torch.stack(parts) for parts in zip(*results, strict=True))
        return level.wrap(expected), level.wrap(state)
    with level.below():
        expected, state = _ops.soft_argmax(
            level.whole(logits, dims),
            beta,
            level.broadcast("beta", beta_tensor, logits, dims),
            batch_dim,
            positions,
        )
    return level.wrap(expected), level.wrap(state)


def _soft_argmax_backward(
    grad: Tensor,
    logits: Tensor,
    row_state: Tensor,
    beta: float,
    beta_tensor: Tensor | None,
    dim: int,
    positions: Tensor,
    beta_grad: bool,
) -> tuple[Tensor, Tensor]:
    level = _Level("soft_argmax_backward")
    dims, batch_dim = level.example_dims(logits, dim)
    if level.has(positions):
        args = (grad, logits, row_state, beta, beta_tensor, dim, positions, beta_grad)
        results = level.one_by_one(_ops.soft_argmax_backward, args)
        with level.below():
            grad_logits, grad_beta = (torch.stack(parts) for parts in zip(*results, strict=True))
        return level.wrap(grad_logits), level.wrap(grad_beta) if beta_grad else results[0][1]
    with level.below():
        # Of every example's rows there is one dimension more, the coordinates.
        grads, states = (
            value if batched else value.expand(level.size, *value.shape)
            for value, batched in map(level.unwrap, (grad, row_state))
        )
        grad_logits, grad_beta = _ops.soft_argmax_backward(
            grads,
            level.whole(logits, dims),
            states,
            beta,
            level.broadcast("beta", beta_tensor, logits, dims),
            batch_dim,
            positions,
            beta_grad,
        )
        if logits.dim() == 0:
            grad_logits = grad_logits.squeeze(1)
            grad_beta = grad_beta.squeeze(1) if beta_grad else grad_beta
    return level.wrap(grad_logits), level.wrap(grad_beta) if beta_grad else grad_beta


_library = torch.library.Library("gumbel_ext", "IMPL")
_library.impl("decoupled_gumbel_softmax", _decoupled_gumbel_softmax, "FuncTorchVmapMode")
for _rule in (
    _straight_through_softmax,
    _straight_through_softmax_backward,
    _soft_argmax,
    _soft_argmax_backward,
):
    _library.impl(_rule.__name__[1:], _rule, "FuncTorchBatched")
