"""Relatives of the Gumbel-softmax without noise: a choice by argmax, and its expected position.

``docs/deterministic.md`` says when these are right and when samples are.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from gumbel_ext._arguments import (
    ErrorsOf,
    as_bool,
    as_int,
    check_dense,
    check_local,
    check_optional,
    check_supported,
    split_tau,
    wrapped_dim,
)

__all__ = ["soft_argmax", "soft_argmax_2d", "straight_through_softmax"]

Number: TypeAlias = float | int

_straight_through_softmax = torch.ops.gumbel_ext.straight_through_softmax.default
_soft_argmax = torch.ops.gumbel_ext.soft_argmax.default


@overload
def straight_through_softmax(
    logits: Tensor,
    tau: Number | Tensor = ...,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_index: Literal[False] = ...,
) -> Tensor: ...


@overload
def straight_through_softmax(
    logits: Tensor,
    tau: Number | Tensor = ...,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_index: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def straight_through_softmax(
    logits: Tensor,
    tau: Number | Tensor = ...,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_index: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def straight_through_softmax(
    logits: Tensor,
    tau: Number | Tensor = 1,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
    return_index: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The one-hot vector of the largest logit, with the gradient of a softmax.

    .. math::
        \operatorname{one\_hot}\big(\arg\max_i l_i\big), \qquad
        \partial y = \partial \operatorname{softmax}(l / \tau)

    The straight-through estimator (Bengio et al., arXiv 1308.3432) around an argmax:
    :func:`gumbel_ext.gumbel_softmax` with ``hard=True`` and no noise, with the same backward, which
    shifts the gradient by its value at the argmax. Nothing of the size of the softmax is stored;
    the backward recomputes it. Differentiable any number of times, in reverse and forward mode,
    also by :mod:`torch.func`.

    Args:
        logits: any shape, float16, bfloat16, float32 or float64. Computed in float32 (float64 for
            float64) and rounded once. Ties go to the lowest index. A NaN makes its row NaN.
        tau: temperature of the gradient, > 0 and finite: a number, or a tensor that broadcasts to
            the shape of ``logits`` with ``dim`` reduced to 1 and receives a gradient.
        dim: dimension of the classes.
        mask: bool tensor that broadcasts to ``logits``; True = may be chosen. A row without any
            True gives zeros, index -1 and zero gradient.
        return_index: whether to also return the index of the largest logit.

    Returns:
        One-hot vectors of the shape, dtype and memory format of ``logits``; with
        ``return_index=True`` also an int64 tensor of that shape without ``dim``.

    Raises:
        TypeError, ValueError, IndexError: as :func:`gumbel_ext.gumbel_softmax`.

    Example:
        >>> straight_through_softmax(torch.tensor([0.1, 2.0, -1.0]))
        tensor([0., 1., 0.])
    """
    if has_torch_function((logits, tau, mask)):
        overridden: Tensor | tuple[Tensor, Tensor] = handle_torch_function(
            straight_through_softmax,
            (logits, tau, mask),
            logits,
            tau,
            dim,
            mask=mask,
            return_index=return_index,
        )
        return overridden
    name = "straight_through_softmax"
    check_local(name, "logits", logits)
    dim, return_index = as_int(name, "dim", dim), as_bool(name, "return_index", return_index)
    check_optional(name, mask, None, None, logits.device)
    tau_number, tau_tensor = split_tau(name, tau)
    y, index = _straight_through_softmax(logits, tau_number, tau_tensor, dim, mask, return_index)
    return (y, index) if return_index else y


def soft_argmax(
    logits: Tensor,
    beta: Number | Tensor = 1,
    dim: int = -1,
    *,
    positions: Tensor | None = None,
    keepdim: bool = False,
) -> Tensor:
    r"""The expected index under a softmax, a differentiable argmax.

    .. math::
        \sum_i x_i \operatorname{softmax}(\beta l)_i, \qquad x_i = i

    (Chapelle and Wu, "Gradient descent optimization of smoothed information retrieval metrics",
    2010; Honari et al., arXiv 1709.01591.) For large :math:`\beta` it is the argmax, for large
    negative :math:`\beta` the argmin (soft-argmin: Kendall et al., arXiv 1703.04309). One kernel on
    the CPU and on CUDA; on other devices it is made of PyTorch's operators. Differentiable any
    number of times, in reverse and forward mode, also by :mod:`torch.func`.

    Args:
        logits: any shape, float16, bfloat16, float32 or float64. ``-inf`` means probability
            exactly 0. A row with a NaN or +inf, or of -inf alone, gives NaN. For a negative
            ``beta`` the infinities change places.
        beta: inverse temperature, finite and not 0, where all classes would weigh the same whatever
            the logits: a number, or a tensor that broadcasts to the shape of ``logits`` with
            ``dim`` reduced to 1 and receives a gradient. Signs may differ from row to row.
        dim: dimension of the classes.
        positions: coordinates to take in place of 0, 1, ...: a floating-point or integer tensor of
            shape ``[C]``. Receives a gradient if it requires one.
        keepdim: whether to keep ``dim``, with size 1.

    Returns:
        float32 tensor (float64 for float64) of the shape of ``logits`` without ``dim``. Not of the
        dtype of 16-bit ``logits``: bfloat16 cannot tell index 1000 from 1001.

    Raises:
        TypeError: ``logits``, ``beta`` or ``positions`` is of a wrong type or dtype.
        ValueError: ``beta`` is 0, not finite or does not broadcast, ``positions`` is not of shape
            ``[C]`` or on another device, or there are no classes.
        IndexError: ``dim`` is out of range.

    Example:
        >>> soft_argmax(torch.tensor([0.0, 9.0, 9.0, 0.0]))
        tensor(1.5000)
    """
    if has_torch_function((logits, beta, positions)):
        overridden: Tensor = handle_torch_function(
            soft_argmax,
            (logits, beta, positions),
            logits,
            beta,
            dim,
            positions=positions,
            keepdim=keepdim,
        )
        return overridden
    check_local("soft_argmax", "logits", logits)
    check_supported("soft_argmax", "logits", logits)
    dim, keepdim = (
        wrapped_dim("soft_argmax", dim, logits),
        as_bool("soft_argmax", "keepdim", keepdim),
    )
    beta_number, beta_tensor = split_tau("soft_argmax", beta, "beta")
    classes = logits.shape[dim] if logits.dim() > 0 else 1
    if positions is None:
        positions = _coordinates(classes, logits)
    else:
        check_local("soft_argmax", "positions", positions)
        check_dense("soft_argmax", "positions", positions)
        if positions.is_floating_point():
            check_supported("soft_argmax", "positions", positions)
        if positions.dim() != 1 or positions.shape[0] != classes:
            raise ValueError(
                f"soft_argmax: positions must be of shape [{classes}], got {list(positions.shape)}"
            )
    expected: Tensor = _soft_argmax(logits, beta_number, beta_tensor, dim, positions.unsqueeze(0))[
        0
    ].squeeze(-1)
    return expected.unsqueeze(dim) if keepdim and logits.dim() > 0 else expected


def soft_argmax_2d(maps: Tensor, beta: Number | Tensor = 1, *, normalized: bool = True) -> Tensor:
    r"""The expected coordinates (x, y) under a softmax over a map.

    .. math::
        \Big(\sum_{ij} x_j\, p_{ij},\ \sum_{ij} y_i\, p_{ij}\Big), \qquad
        p = \operatorname{softmax}(\beta\, m)\ \text{over all } i, j

    (Levine et al., arXiv 1504.00702; Finn et al., arXiv 1509.06113: "spatial soft-argmax".)
    Arguments, order of the coordinates and their scale are those of
    ``kornia.geometry.subpix.spatial_soft_argmax2d``.

    Args:
        maps: shape ``[..., height, width]``, float16, bfloat16, float32 or float64.
        beta: inverse temperature, finite and not 0, negative for the smallest values: a number, or
            a tensor that broadcasts to ``[..., 1, 1]`` and receives a gradient.
        normalized: whether coordinates run from -1 (the centre of the first pixel) to 1 (the
            centre of the last), or are those of pixels, from 0 on. A map one pixel wide has x = 0.

    Returns:
        float32 tensor (float64 for float64) of shape ``[..., 2]``: x, along the width, then y.

    Raises:
        TypeError, ValueError: as :func:`soft_argmax`; ``maps`` has fewer than two dimensions, or no
            pixels.

    Example:
        >>> maps = torch.zeros(1, 5, 7)
        >>> maps[0, 1, 4] = 50.0
        >>> soft_argmax_2d(maps, normalized=False)
        tensor([[4., 1.]])
    """
    if has_torch_function((maps, beta)):
        overridden: Tensor = handle_torch_function(
            soft_argmax_2d, (maps, beta), maps, beta, normalized=normalized
        )
        return overridden
    check_local("soft_argmax_2d", "maps", maps)
    check_supported("soft_argmax_2d", "maps", maps)
    normalized = as_bool("soft_argmax_2d", "normalized", normalized)
    if maps.dim() < 2:
        raise ValueError(
            "soft_argmax_2d: maps must have at least two dimensions, [..., height, width], got "
            f"shape {list(maps.shape)}"
        )
    height, width = maps.shape[-2:]
    if height == 0 or width == 0:
        raise ValueError(f"soft_argmax_2d: maps must have pixels, got shape {list(maps.shape)}")
    beta_number, beta_tensor = split_tau("soft_argmax_2d", beta, "beta")
    if beta_tensor is not None and beta_tensor.dim() > 0:
        if any(extent != 1 for extent in beta_tensor.shape[-2:]):
            raise ValueError(
                "soft_argmax_2d: beta must broadcast to [..., 1, 1], got shape "
                f"{list(beta_tensor.shape)}"
            )
        beta_tensor = beta_tensor.squeeze(-1)
    x, y = (_coordinates(extent, maps, normalized) for extent in (width, height))
    positions = torch.stack(
        [x.expand(height, width).flatten(), y.unsqueeze(1).expand(height, width).flatten()]
    )
    with ErrorsOf("soft_argmax_2d"):
        expected: Tensor = _soft_argmax(maps.flatten(-2), beta_number, beta_tensor, -1, positions)[
            0
        ]
    return expected


def _coordinates(extent: int, like: Tensor, normalized: bool = False) -> Tensor:
    """0, 1, ... or the same from -1 to 1; in float64, which holds every index."""
    steps = torch.arange(extent, dtype=torch.float64, device=like.device)
    return (2 * steps - (extent - 1)) / max(extent - 1, 1) if normalized else steps
