"""Hard samples with gradients of less bias or variance than the straight-through one.

All draw exactly what ``gumbel_softmax(hard=True)`` draws and differ in the backward alone:
``docs/estimators.md`` says which is for what.

Sources: M. B. Paulus, C. J. Maddison, A. Krause, "Rao-Blackwellizing the straight-through
Gumbel-softmax gradient estimator", arXiv 2010.04838; A. Shekhovtsov, "Cold analysis of
Rao-Blackwellized straight-through Gumbel-softmax gradient estimator", ICML 2023; L. Liu, C. Dong,
X. Liu, B. Yu, J. Gao, "Bridging discrete and backpropagation: straight-through and beyond", arXiv
2304.08612; T.-H. Fan, T.-C. Chi, A. I. Rudnicky, P. J. Ramadge, "Training discrete deep generative
models via gapped straight-through estimator", arXiv 2206.07235.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from gumbel_ext._arguments import (
    as_bool,
    as_graph_input,
    as_int,
    as_number,
    checked_state,
    split_tau,
)

__all__ = ["gapped_straight_through", "gumbel_rao", "reinmax", "zgr"]

Number: TypeAlias = float | int

_gumbel_rao = torch.ops.gumbel_ext.gumbel_rao.default
_zgr = torch.ops.gumbel_ext.zgr.default
_reinmax = torch.ops.gumbel_ext.reinmax.default
_gapped_straight_through = torch.ops.gumbel_ext.gapped_straight_through.default


@overload
def gumbel_rao(
    logits: Tensor,
    tau: Number | Tensor = ...,
    k: int = ...,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_index: Literal[False] = ...,
    generator: torch.Generator | None = ...,
    rng_state: Tensor | None = ...,
) -> Tensor: ...


@overload
def gumbel_rao(
    logits: Tensor,
    tau: Number | Tensor = ...,
    k: int = ...,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_index: Literal[True],
    generator: torch.Generator | None = ...,
    rng_state: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def gumbel_rao(
    logits: Tensor,
    tau: Number | Tensor = ...,
    k: int = ...,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_index: bool,
    generator: torch.Generator | None = ...,
    rng_state: Tensor | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def gumbel_rao(
    logits: Tensor,
    tau: Number | Tensor = 1,
    k: int = 10,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
    return_index: bool = False,
    generator: torch.Generator | None = None,
    rng_state: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""A hard sample with the Gumbel-Rao gradient: straight-through, Rao-Blackwellised.

    .. math::
        \partial y = \frac1K \sum_{k=1}^K \partial \operatorname{softmax}\big((l + c_k) / \tau\big),
        \qquad c_k = \varphi_k - l\ \text{held constant}

    with K draws :math:`\varphi` of ``logits + noise`` *given* the sampled class i (Paulus et al.).
    With :math:`E_c \sim \operatorname{Exp}(1)`, :math:`p = \operatorname{softmax}(l)` and
    :math:`Z = \log \sum_c e^{l_c}`,

    .. math::
        \varphi_i = Z - \log E_i, \qquad \varphi_j = Z - \log(E_j / p_j + E_i)

    It has the mean of the straight-through gradient, and of its variance only what the sample and a
    K-th of what the noise given the sample contributes. The difference to the logits is a constant
    in the derivative: differentiating it would add the derivative of the conditional distribution,
    and the mean would be another.

    The backward makes the draws one after the other from the state of the call: memory does not
    depend on ``k``, time grows with it. Draw number n has the noise positions (1 + n) numel + row C
    + class, rows counted with ``dim`` moved last.

    The matrix is symmetric: derivatives of this gradient in the incoming one, and forward mode, are
    the same product. It is a constant of ``logits``, and second derivatives in them are refused.
    Under :func:`torch.vmap` the examples are taken one by one.

    Args:
        logits: unnormalised log-probabilities, any shape, float16, bfloat16, float32 or float64.
            Computed in float32 (float64 for float64) and rounded once. ``-inf`` cannot be chosen
            and has gradient 0; a NaN makes its row NaN, and ``inf`` the gradient of its row.
        tau: temperature of the gradient, > 0 and finite: a number, or a tensor that broadcasts to
            the shape of ``logits`` with ``dim`` reduced to 1. It receives no gradient.
        k: the number of draws K, at least 1.
        dim: dimension of the classes.
        mask: bool tensor that broadcasts to ``logits``; True = may be chosen. A row without any
            True gives zeros, index -1 and zero gradient.
        return_index: whether to also return the index of the chosen class.
        generator: see :func:`gumbel_ext.gumbel_softmax`.
        rng_state: see :func:`gumbel_ext.gumbel_softmax`.

    Returns:
        ``y``, one-hot, of the shape, dtype and memory format of ``logits``: bit for bit that of
        ``gumbel_softmax(hard=True)`` for the same state. With ``return_index=True`` also an int64
        tensor of that shape without ``dim``.

    Raises:
        TypeError: ``logits``, ``tau``, ``k``, ``mask``, ``rng_state`` or ``generator`` is of a
            wrong type or dtype.
        ValueError: ``tau`` is not positive and finite, does not broadcast or requires a gradient,
            ``k`` is less than 1, ``mask`` does not broadcast, ``rng_state`` is not of shape
            ``[2]``, both ``generator`` and ``rng_state`` are given, or devices differ.
        NotImplementedError: a second derivative in ``logits`` is asked for.
        IndexError, RuntimeError: as :func:`gumbel_ext.gumbel_softmax`.

    Example:
        >>> logits = torch.randn(20, 10, requires_grad=True)
        >>> y = gumbel_rao(logits, tau=0.5, k=100)
        >>> (y * torch.randn(20, 10)).sum().backward()
    """
    if has_torch_function((logits, tau, mask, rng_state)):
        overridden: Tensor | tuple[Tensor, Tensor] = handle_torch_function(
            gumbel_rao,
            (logits, tau, mask, rng_state),
            logits,
            tau,
            k,
            dim,
            mask=mask,
            return_index=return_index,
            generator=generator,
            rng_state=rng_state,
        )
        return overridden
    k = as_int("gumbel_rao", "k", k, 1)
    tau_number, tau_tensor = split_tau("gumbel_rao", tau)
    dim, return_index = (
        as_int("gumbel_rao", "dim", dim),
        as_bool("gumbel_rao", "return_index", return_index),
    )
    rng_state = checked_state("gumbel_rao", logits, mask, generator, rng_state)
    y: Tensor
    index: Tensor
    y, index = _gumbel_rao(
        logits, tau_number, tau_tensor, k, dim, mask, return_index, generator, rng_state
    )[:2]
    return (y, index) if return_index else y


@overload
def zgr(
    logits: Tensor,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_index: Literal[False] = ...,
    generator: torch.Generator | None = ...,
    rng_state: Tensor | None = ...,
) -> Tensor: ...


@overload
def zgr(
    logits: Tensor,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_index: Literal[True],
    generator: torch.Generator | None = ...,
    rng_state: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def zgr(
    logits: Tensor,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_index: bool,
    generator: torch.Generator | None = ...,
    rng_state: Tensor | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def zgr(
    logits: Tensor,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
    return_index: bool = False,
    generator: torch.Generator | None = None,
    rng_state: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""A hard sample with the ZGR gradient, the limit of Gumbel-Rao for tau -> 0.

    .. math::
        \nabla_j = \tfrac12 p_j d_j, \qquad \nabla_i = -\tfrac12 \sum_c p_c d_c, \qquad
        p = \operatorname{softmax}(l),\ d = g - g_i

    for the incoming gradient g and the sampled class i: half the straight-through gradient of the
    probabilities and half that of DARN (Shekhovtsov, ICML 2023). It has no temperature and no
    draws, and is exact in the mean for functions that are quadratic in ``y``.

    The matrix is symmetric: derivatives of this gradient in the incoming one, and forward mode, are
    the same product. It is a constant of ``logits``, and second derivatives in them are refused.

    Args:
        logits: unnormalised log-probabilities, any shape, float16, bfloat16, float32 or float64.
            Computed in float32 (float64 for float64) and rounded once. ``-inf`` cannot be chosen
            and has gradient 0; a NaN makes its row NaN, and ``inf`` the gradient of its row.
        dim: dimension of the classes.
        mask: bool tensor that broadcasts to ``logits``; True = may be chosen. A row without any
            True gives zeros, index -1 and zero gradient.
        return_index: whether to also return the index of the chosen class.
        generator: see :func:`gumbel_ext.gumbel_softmax`.
        rng_state: see :func:`gumbel_ext.gumbel_softmax`.

    Returns:
        ``y``, one-hot, of the shape, dtype and memory format of ``logits``: bit for bit that of
        ``gumbel_softmax(hard=True)`` for the same state. With ``return_index=True`` also an int64
        tensor of that shape without ``dim``.

    Raises:
        TypeError: ``logits``, ``mask``, ``rng_state`` or ``generator`` is of a wrong type or dtype.
        ValueError: ``mask`` does not broadcast, ``rng_state`` is not of shape ``[2]``, both
            ``generator`` and ``rng_state`` are given, or devices differ.
        NotImplementedError: a second derivative in ``logits`` is asked for.
        IndexError, RuntimeError: as :func:`gumbel_ext.gumbel_softmax`.

    Example:
        >>> logits = torch.randn(20, 10, requires_grad=True)
        >>> (zgr(logits) * torch.randn(20, 10)).sum().backward()
    """
    if has_torch_function((logits, mask, rng_state)):
        overridden: Tensor | tuple[Tensor, Tensor] = handle_torch_function(
            zgr,
            (logits, mask, rng_state),
            logits,
            dim,
            mask=mask,
            return_index=return_index,
            generator=generator,
            rng_state=rng_state,
        )
        return overridden
    dim, return_index = as_int("zgr", "dim", dim), as_bool("zgr", "return_index", return_index)
    rng_state = checked_state("zgr", logits, mask, generator, rng_state)
    y: Tensor
    index: Tensor
    y, index = _zgr(logits, dim, mask, return_index, generator, rng_state)
    return (y, index) if return_index else y


@overload
def reinmax(
    logits: Tensor,
    tau: Number | Tensor = ...,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_index: Literal[False] = ...,
    generator: torch.Generator | None = ...,
    rng_state: Tensor | None = ...,
) -> Tensor: ...


@overload
def reinmax(
    logits: Tensor,
    tau: Number | Tensor = ...,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_index: Literal[True],
    generator: torch.Generator | None = ...,
    rng_state: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def reinmax(
    logits: Tensor,
    tau: Number | Tensor = ...,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_index: bool,
    generator: torch.Generator | None = ...,
    rng_state: Tensor | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def reinmax(
    logits: Tensor,
    tau: Number | Tensor = 1,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
    return_index: bool = False,
    generator: torch.Generator | None = None,
    rng_state: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""A hard sample with the ReinMax gradient, of second-order accuracy.

    .. math::
        \nabla = 2 J(\pi_1)\, g - \tfrac12 J(p)\, g, \qquad
        \pi_1 = \tfrac12 \big(y + \operatorname{softmax}(l / \tau)\big),\
        p = \operatorname{softmax}(l)

    with :math:`J(\pi) = \operatorname{diag}(\pi) - \pi \pi^\top` and the incoming gradient g (Liu
    et al.: Heun's method in the place of the straight-through gradient's Euler step).
    At tau = 1 it is exact in the mean for functions that are quadratic in ``y``.

    The matrix is symmetric: derivatives of this gradient in the incoming one, and forward mode, are
    the same product. It is a constant of ``logits``, and second derivatives in them are refused.

    Args:
        logits: unnormalised log-probabilities, any shape, float16, bfloat16, float32 or float64.
            Computed in float32 (float64 for float64) and rounded once. ``-inf`` cannot be chosen
            and has gradient 0; a NaN makes its row NaN, and ``inf`` the gradient of its row.
        tau: temperature of the gradient, > 0 and finite: a number, or a tensor that broadcasts to
            the shape of ``logits`` with ``dim`` reduced to 1. It receives no gradient.
        dim: dimension of the classes.
        mask: bool tensor that broadcasts to ``logits``; True = may be chosen. A row without any
            True gives zeros, index -1 and zero gradient.
        return_index: whether to also return the index of the chosen class.
        generator: see :func:`gumbel_ext.gumbel_softmax`.
        rng_state: see :func:`gumbel_ext.gumbel_softmax`.

    Returns:
        ``y``, one-hot, of the shape, dtype and memory format of ``logits``: bit for bit that of
        ``gumbel_softmax(hard=True)`` for the same state. With ``return_index=True`` also an int64
        tensor of that shape without ``dim``.

    Raises:
        TypeError: ``logits``, ``tau``, ``mask``, ``rng_state`` or ``generator`` is of a wrong type
            or dtype.
        ValueError: ``tau`` is not positive and finite, does not broadcast or requires a gradient,
            ``mask`` does not broadcast, ``rng_state`` is not of shape ``[2]``, both ``generator``
            and ``rng_state`` are given, or devices differ.
        NotImplementedError: a second derivative in ``logits`` is asked for.
        IndexError, RuntimeError: as :func:`gumbel_ext.gumbel_softmax`.

    Example:
        >>> logits = torch.randn(20, 10, requires_grad=True)
        >>> (reinmax(logits, tau=1.1) * torch.randn(20, 10)).sum().backward()
    """
    if has_torch_function((logits, tau, mask, rng_state)):
        overridden: Tensor | tuple[Tensor, Tensor] = handle_torch_function(
            reinmax,
            (logits, tau, mask, rng_state),
            logits,
            tau,
            dim,
            mask=mask,
            return_index=return_index,
            generator=generator,
            rng_state=rng_state,
        )
        return overridden
    tau_number, tau_tensor = split_tau("reinmax", tau)
    dim, return_index = (
        as_int("reinmax", "dim", dim),
        as_bool("reinmax", "return_index", return_index),
    )
    rng_state = checked_state("reinmax", logits, mask, generator, rng_state)
    y: Tensor
    index: Tensor
    y, index = _reinmax(
        logits, tau_number, tau_tensor, dim, mask, return_index, generator, rng_state
    )
    return (y, index) if return_index else y


@overload
def gapped_straight_through(
    logits: Tensor,
    tau: Number | Tensor = ...,
    gap: Number | None = ...,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_index: Literal[False] = ...,
    generator: torch.Generator | None = ...,
    rng_state: Tensor | None = ...,
) -> Tensor: ...


@overload
def gapped_straight_through(
    logits: Tensor,
    tau: Number | Tensor = ...,
    gap: Number | None = ...,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_index: Literal[True],
    generator: torch.Generator | None = ...,
    rng_state: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def gapped_straight_through(
    logits: Tensor,
    tau: Number | Tensor = ...,
    gap: Number | None = ...,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_index: bool,
    generator: torch.Generator | None = ...,
    rng_state: Tensor | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def gapped_straight_through(
    logits: Tensor,
    tau: Number | Tensor = 1,
    gap: Number | None = 1.0,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
    return_index: bool = False,
    generator: torch.Generator | None = None,
    rng_state: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""A hard sample with the gapped straight-through gradient, without noise of its own.

    .. math::
        \partial y = \partial \operatorname{softmax}\big((l + c) / \tau\big), \qquad c = m - l\
        \text{held constant}, \qquad m_i = \max_c l_c,\ m_j = \min(l_j, m_i - \text{gap})

    (Fan et al.): the logits are moved only so far that the sampled class i is the largest by a gap.
    Two calls with the same sample have the same gradient.

    The matrix is symmetric: derivatives of this gradient in the incoming one, and forward mode, are
    the same product. It is a constant of ``logits``, and second derivatives in them are refused.

    Args:
        logits: unnormalised log-probabilities, any shape, float16, bfloat16, float32 or float64.
            Computed in float32 (float64 for float64) and rounded once. ``-inf`` cannot be chosen
            and has gradient 0; a NaN makes its row NaN, and ``inf`` the gradient of its row.
        tau: temperature of the gradient, > 0 and finite: a number, or a tensor that broadcasts to
            the shape of ``logits`` with ``dim`` reduced to 1. It receives no gradient.
        gap: a number > 0, in units of ``logits``, or None for the one that a probability p of the
            sample has on average, :math:`-\log(1 - p) / p` (with 0.99999 p in the place of p, as
            the authors have it, so that it is finite at p = 1).
        dim: dimension of the classes.
        mask: bool tensor that broadcasts to ``logits``; True = may be chosen. A row without any
            True gives zeros, index -1 and zero gradient.
        return_index: whether to also return the index of the chosen class.
        generator: see :func:`gumbel_ext.gumbel_softmax`.
        rng_state: see :func:`gumbel_ext.gumbel_softmax`.

    Returns:
        ``y``, one-hot, of the shape, dtype and memory format of ``logits``: bit for bit that of
        ``gumbel_softmax(hard=True)`` for the same state. With ``return_index=True`` also an int64
        tensor of that shape without ``dim``.

    Raises:
        TypeError: ``logits``, ``tau``, ``gap``, ``mask``, ``rng_state`` or ``generator`` is of a
            wrong type or dtype.
        ValueError: ``tau`` is not positive and finite, does not broadcast or requires a gradient,
            ``gap`` is not positive and finite, ``mask`` does not broadcast, ``rng_state`` is not of
            shape ``[2]``, both ``generator`` and ``rng_state`` are given, or devices differ.
        NotImplementedError: a second derivative in ``logits`` is asked for.
        IndexError, RuntimeError: as :func:`gumbel_ext.gumbel_softmax`.

    Example:
        >>> logits = torch.randn(20, 10, requires_grad=True)
        >>> (gapped_straight_through(logits, gap=None) * torch.randn(20, 10)).sum().backward()
    """
    if has_torch_function((logits, tau, mask, rng_state)):
        overridden: Tensor | tuple[Tensor, Tensor] = handle_torch_function(
            gapped_straight_through,
            (logits, tau, mask, rng_state),
            logits,
            tau,
            gap,
            dim,
            mask=mask,
            return_index=return_index,
            generator=generator,
            rng_state=rng_state,
        )
        return overridden
    tau_number, tau_tensor = split_tau("gapped_straight_through", tau)
    gap_tensor = None
    if gap is not None:
        gap, gap_tensor = as_graph_input(
            as_number("gapped_straight_through", "gap", gap, "a number or None")
        )
    dim, return_index = (
        as_int("gapped_straight_through", "dim", dim),
        as_bool("gapped_straight_through", "return_index", return_index),
    )
    rng_state = checked_state("gapped_straight_through", logits, mask, generator, rng_state)
    y: Tensor
    index: Tensor
    y, index = _gapped_straight_through(
        logits,
        tau_number,
        tau_tensor,
        gap,
        dim,
        mask,
        return_index,
        generator,
        rng_state,
        gap_tensor=gap_tensor,
    )
    return (y, index) if return_index else y
