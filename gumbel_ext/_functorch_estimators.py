"""What ``torch.vmap`` makes of the estimators. See ``_functorch``.

Gumbel-Rao goes over the examples one by one: its backward makes noise at the positions of a whole
call, and the state that it makes it from must be that of the example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gumbel_ext._functorch import Positions, _Level

_ops = torch.ops.gumbel_ext


def _hard_sample(
    name: str,
    sample: Callable[..., Any],
    logits: Tensor,
    tau_tensor: Tensor | None,
    dim: int,
    mask: Tensor | None,
    return_index: bool,
    generator: torch.Generator | None,
    rng_state: Tensor | None,
    positions: Positions | None,
) -> tuple[Tensor, Tensor]:
    """Of an op whose backward makes no noise; ``sample`` calls it with what follows it here."""
    level = _Level(name)
    different = level.draws(rng_state)
    args = (logits, tau_tensor, dim, mask, return_index, generator, rng_state, positions)
    if level.own_states(rng_state):
        results = level.one_by_one(sample, args)
        with level.below():
            y, index = (torch.stack(parts) for parts in zip(*results, strict=True))
        return level.wrap(y), level.wrap(index) if return_index else results[0][1]
    if not different and not level.has(logits, tau_tensor, mask, rng_state):
        with level.below():
            y, index = sample(*args)
        return y, index

    dims, batch_dim = level.example_dims(logits, dim)
    where = level.positions(logits.shape, positions, different)
    with level.below():
        y, index = sample(
            level.whole(logits, dims),
            level.broadcast("tau", tau_tensor, logits, dims),
            batch_dim,
            level.broadcast("mask", mask, logits, dims),
            return_index,
            generator,
            level.common_state(rng_state),
            where,
        )
        if logits.dim() == 0:
            y = y.squeeze(1)
    return level.wrap(y), level.wrap(index) if return_index else index


def _gradient(
    name: str,
    product: Callable[..., Any],
    grad: Tensor,
    logits: Tensor,
    index: Tensor,
    tau_tensor: Tensor | None,
    dim: int,
    mask: Tensor | None,
) -> Tensor:
    """Of such an op's backward."""
    level = _Level(name)
    dims, batch_dim = level.example_dims(logits, dim)
    with level.below():
        grad_logits: Tensor = product(
            level.whole(grad, dims),
            level.whole(logits, dims),
            level.whole(index, dims - 1),
            level.broadcast("tau", tau_tensor, logits, dims),
            batch_dim,
            level.broadcast("mask", mask, logits, dims),
        )
        if logits.dim() == 0:
            grad_logits = grad_logits.squeeze(1)
    return level.wrap(grad_logits)


def _zgr(
    logits: Tensor,
    dim: int,
    mask: Tensor | None,
    return_index: bool,
    generator: torch.Generator | None,
    rng_state: Tensor | None,
    positions: Positions | None = None,
) -> tuple[Tensor, Tensor]:
    def sample(logits: Tensor, tau_tensor: None, *rest: Any) -> Any:
        return _ops.zgr(logits, *rest)

    return _hard_sample(
        "zgr", sample, logits, None, dim, mask, return_index, generator, rng_state, positions
    )


def _zgr_backward(
    grad: Tensor, logits: Tensor, index: Tensor, dim: int, mask: Tensor | None
) -> Tensor:
    def product(grad: Tensor, logits: Tensor, index: Tensor, tau_tensor: None, *rest: Any) -> Any:
        return _ops.zgr_backward(grad, logits, index, *rest)

    return _gradient("zgr_backward", product, grad, logits, index, None, dim, mask)


def _reinmax(
    logits: Tensor,
    tau: float,
    tau_tensor: Tensor | None,
    dim: int,
    mask: Tensor | None,
    return_index: bool,
    generator: torch.Generator | None,
    rng_state: Tensor | None,
    positions: Positions | None = None,
) -> tuple[Tensor, Tensor]:
    def sample(logits: Tensor, tau_tensor: Tensor | None, *rest: Any) -> Any:
        return _ops.reinmax(logits, tau, tau_tensor, *rest)

    rest = (dim, mask, return_index, generator, rng_state, positions)
    return _hard_sample("reinmax", sample, logits, tau_tensor, *rest)


def _reinmax_backward(
    grad: Tensor,
    logits: Tensor,
    index: Tensor,
    tau: float,
    tau_tensor: Tensor | None,
    dim: int,
    mask: Tensor | None,
) -> Tensor:
    def product(
        grad: Tensor, logits: Tensor, index: Tensor, tau_tensor: Tensor | None, *rest: Any
    ) -> Any:
        return _ops.reinmax_backward(grad, logits, index, tau, tau_tensor, *rest)

    return _gradient("reinmax_backward", product, grad, logits, index, tau_tensor, dim, mask)


def _gapped_straight_through(
    logits: Tensor,
    tau: float,
    tau_tensor: Tensor | None,
    gap: float | None,
    dim: int,
    mask: Tensor | None,
    return_index: bool,
    generator: torch.Generator | None,
    rng_state: Tensor | None,
    positions: Positions | None = None,
    gap_tensor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    def sample(logits: Tensor, tau_tensor: Tensor | None, *rest: Any) -> Any:
        return _ops.gapped_straight_through(logits, tau, tau_tensor, gap, *rest, gap_tensor)

    rest = (dim, mask, return_index, generator, rng_state, positions)
    return _hard_sample("gapped_straight_through", sample, logits, tau_tensor, *rest)


def _gapped_straight_through_backward(
    grad: Tensor,
    logits: Tensor,
    index: Tensor,
    tau: float,
    tau_tensor: Tensor | None,
    gap: float | None,
    dim: int,
    mask: Tensor | None,
    gap_tensor: Tensor | None = None,
) -> Tensor:
    name = "gapped_straight_through_backward"

    def product(
        grad: Tensor, logits: Tensor, index: Tensor, tau_tensor: Tensor | None, *rest: Any
    ) -> Any:
        return _ops.gapped_straight_through_backward(
            grad, logits, index, tau, tau_tensor, gap, *rest, gap_tensor
        )

    return _gradient(name, product, grad, logits, index, tau_tensor, dim, mask)


def _stack(level: _Level, results: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    with level.below():
        stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
    return [level.wrap(part) for part in stacked]


def _gumbel_rao(
    logits: Tensor,
    tau: float,
    tau_tensor: Tensor | None,
    k: int,
    dim: int,
    mask: Tensor | None,
    return_index: bool,
    generator: torch.Generator | None,
    rng_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    level = _Level("gumbel_rao")
    different = level.draws(rng_state)
    dims, batch_dim = level.example_dims(logits, dim)
    if level.size == 0:
        with level.below():
            y, index, state = _ops.gumbel_rao(
                level.whole(logits, dims),
                tau,
                level.broadcast("tau", tau_tensor, logits, dims),
                k,
                batch_dim,
                level.broadcast("mask", mask, logits, dims),
                return_index,
                generator,
                level.common_state(rng_state),
            )
            if logits.dim() == 0:
                y = y.squeeze(1)
        return level.wrap(y), level.wrap(index) if return_index else index, state
    if rng_state is None and not different:
        with level.below():
            rng_state = _ops.draw_rng_state(level.unwrap(logits)[0], generator)
        generator = None
    args = (logits, tau, tau_tensor, k, dim, mask, return_index, generator, rng_state)
    if not different and not level.has(logits, tau_tensor, mask, rng_state):
        with level.below():
            y, index, state = _ops.gumbel_rao(*args)
        return y, index, state
    results = level.one_by_one(_ops.gumbel_rao, args)
    y, index, state = _stack(level, results)
    if not (different or level.has(rng_state)):
        state = results[0][2]
    return y, index if return_index else results[0][1], state


def _gumbel_rao_backward(
    grad: Tensor,
    logits: Tensor,
    index: Tensor,
    tau: float,
    tau_tensor: Tensor | None,
    k: int,
    dim: int,
    mask: Tensor | None,
    rng_state: Tensor,
) -> Tensor:
    level = _Level("gumbel_rao_backward")
    dims, batch_dim = level.example_dims(logits, dim)
    if level.size > 0:
        args = (grad, logits, index, tau, tau_tensor, k, dim, mask, rng_state)
        results = level.one_by_one(_ops.gumbel_rao_backward, args)
        return _stack(level, [(result,) for result in results])[0]
    with level.below():
        grad_logits: Tensor = _ops.gumbel_rao_backward(
            level.whole(grad, dims),
            level.whole(logits, dims),
            level.whole(index, dims - 1),
            tau,
            level.broadcast("tau", tau_tensor, logits, dims),
            k,
            batch_dim,
            level.broadcast("mask", mask, logits, dims),
            torch.zeros(2, dtype=torch.int64),
        )
        if logits.dim() == 0:
            grad_logits = grad_logits.squeeze(1)
    return level.wrap(grad_logits)


_library = torch.library.Library("gumbel_ext", "IMPL")
for _sample in (_gumbel_rao, _zgr, _reinmax, _gapped_straight_through):
    _library.impl(_sample.__name__[1:], _sample, "FuncTorchVmapMode")
for _backward in (
    _gumbel_rao_backward,
    _zgr_backward,
    _reinmax_backward,
    _gapped_straight_through_backward,
):
    _library.impl(_backward.__name__[1:], _backward, "FuncTorchBatched")
