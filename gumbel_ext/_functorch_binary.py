"""What ``torch.vmap`` makes of the binary concrete's ops; see ``_functorch``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gumbel_ext._functorch import Positions, _Level

_ops = torch.ops.gumbel_ext


def _whole_positions(
    level: _Level, shape: Sequence[int], given: Positions | None, different: bool
) -> Positions | None:
    where = level.positions(shape, given, different)
    # Elementwise ops need no dimension behind the batch's.
    return where if where is None or shape else where[:2]


def _binary_concrete(
    logits: Tensor,
    tau: float,
    tau_tensor: Tensor | None,
    hard: bool,
    generator: torch.Generator | None,
    rng_state: Tensor | None,
    positions: Positions | None = None,
) -> tuple[Tensor, Tensor]:
    level = _Level("binary_concrete")
    different = level.draws(rng_state)
    args = (logits, tau, tau_tensor, hard, generator, rng_state, positions)
    if level.own_states(rng_state):
        results = level.one_by_one(_ops.binary_concrete, args)
        with level.below():
            y, state = (torch.stack(parts) for parts in zip(*results, strict=True))
        return level.wrap(y), level.wrap(state)
    if not different and not level.has(logits, tau_tensor, rng_state):
        with level.below():
            y, state = _ops.binary_concrete(*args)
        return y, state
    where = _whole_positions(level, logits.shape, positions, different)
    with level.below():
        y, state = _ops.binary_concrete(
            level.whole(logits, 0),
            tau,
            level.broadcast("tau", tau_tensor, logits, logits.dim()),
            hard,
            generator,
            level.common_state(rng_state),
            where,
        )
    return level.wrap(y), state


def _logistic_noise(
    like: Tensor,
    size: Sequence[int],
    generator: torch.Generator | None,
    rng_state: Tensor | None,
    positions: Positions | None = None,
) -> tuple[Tensor, Tensor]:
    level = _Level("logistic_noise")
    different = level.draws(rng_state)
    with level.below():
        # Of like only dtype and device count.
        like = level.unwrap(like)[0]
        if level.own_states(rng_state):
            args = (like, size, generator, rng_state, positions)
            results = level.one_by_one(_ops.logistic_noise, args)
            noise, state = (torch.stack(parts) for parts in zip(*results, strict=True))
            return level.wrap(noise), level.wrap(state)
        if different:
            where = _whole_positions(level, size, positions, different)
            noise, state = _ops.logistic_noise(
                like, [level.size, *size], generator, rng_state, where
            )
            return level.wrap(noise), state
        noise, state = _ops.logistic_noise(
            like, size, generator, level.common_state(rng_state), positions
        )
        if level.has(rng_state):
            noise = noise.expand(0, *size)
            return level.wrap(noise), state
        return noise, state


def _binary_concrete_backward(
    grad: Tensor,
    logits: Tensor,
    tau: float,
    tau_tensor: Tensor | None,
    rng_state: Tensor,
    tau_grad: bool,
    positions: Positions | None = None,
) -> tuple[Tensor, Tensor]:
    level = _Level("binary_concrete_backward")
    if level.own_states(rng_state):
        args = (grad, logits, tau, tau_tensor, rng_state, tau_grad, positions)
        results = level.one_by_one(_ops.binary_concrete_backward, args)
        with level.below():
            grad_logits, tau_terms = (torch.stack(parts) for parts in zip(*results, strict=True))
        return level.wrap(grad_logits), level.wrap(tau_terms) if tau_grad else results[0][1]
    where = _whole_positions(level, logits.shape, positions, different=False)
    with level.below():
        grad_logits, tau_terms = _ops.binary_concrete_backward(
            level.whole(grad, 0),
            level.whole(logits, 0),
            tau,
            level.broadcast("tau", tau_tensor, logits, logits.dim()),
            level.common_state(rng_state),
            tau_grad,
            where,
        )
    return level.wrap(grad_logits), level.wrap(tau_terms) if tau_grad else tau_terms


_library = torch.library.Library("gumbel_ext", "IMPL")
# The key of random ops: they must be told of a vmap none of whose tensors they are given.
_library.impl("binary_concrete", _binary_concrete, "FuncTorchVmapMode")
_library.impl("logistic_noise", _logistic_noise, "FuncTorchVmapMode")
_library.impl("binary_concrete_backward", _binary_concrete_backward, "FuncTorchBatched")
