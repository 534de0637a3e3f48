"""Gumbel-softmax sampling, called like :mod:`torch.nn.functional`.

All functions share one definition of the noise: a pure function of ``(seed, offset, position)``,
the same for every dtype, memory layout, number of threads and instruction set (``docs/noise.md``).

Sources: E. Jang, S. Gu, B. Poole, "Categorical reparameterization with Gumbel-softmax", arXiv
1611.01144; C. J. Maddison, A. Mnih, Y. W. Teh, "The Concrete distribution", arXiv 1611.00712.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, TypeAlias, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from gumbel_ext._arguments import (
    as_bool,
    as_int,
    check_mask,
    check_optional,
    check_supported,
    check_tensor,
    checked_noise,
    empty,
    is_dtensor,
    split_tau,
    state_beside,
    wrapped_dim,
)

__all__ = ["draw_rng_state", "gumbel_argmax", "gumbel_noise", "gumbel_softmax"]

Number: TypeAlias = float | int


_gumbel_softmax = torch.ops.gumbel_ext.gumbel_softmax.default
_gumbel_argmax = torch.ops.gumbel_ext.gumbel_argmax.default
_gumbel_noise = torch.ops.gumbel_ext.gumbel_noise.default
_draw_rng_state = torch.ops.gumbel_ext.draw_rng_state.default


@overload
def gumbel_softmax(
    logits: Tensor,
    tau: Number | Tensor = ...,
    hard: bool = ...,
    eps: float = ...,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_index: Literal[False] = ...,
    generator: torch.Generator | None = ...,
    rng_state: Tensor | None = ...,
) -> Tensor: ...


@overload
def gumbel_softmax(
    logits: Tensor,
    tau: Number | Tensor = ...,
    hard: bool = ...,
    eps: float = ...,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_index: Literal[True],
    generator: torch.Generator | None = ...,
    rng_state: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def gumbel_softmax(
    logits: Tensor,
    tau: Number | Tensor = ...,
    hard: bool = ...,
    eps: float = ...,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_index: bool,
    generator: torch.Generator | None = ...,
    rng_state: Tensor | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def gumbel_softmax(
    logits: Tensor,
    tau: Number | Tensor = 1,
    hard: bool = False,
    eps: float = 1e-10,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
    return_index: bool = False,
    generator: torch.Generator | None = None,
    rng_state: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Samples from the Gumbel-softmax distribution, differentiably.

    .. math::
        y = \operatorname{softmax}\big((l + g) / \tau\big), \qquad g_i = -\log E_i, \quad
        E_i \sim \operatorname{Exp}(1)

    (Jang et al., eq. 2; Maddison et al., eq. 10). With ``hard=True`` the value is the one-hot
    vector of :math:`\arg\max_i (l_i + g_i)`, an exact sample from
    :math:`\operatorname{softmax}(l)`, and the gradient is that of the soft sample
    (straight-through). Nothing of the size of the soft sample is then stored: the backward
    recomputes it from ``logits``, or from a copy where they are a leaf, such as a parameter.

    Differentiable any number of times, in reverse and forward mode, also by :mod:`torch.func`.
    Under :func:`torch.vmap` with ``randomness="same"`` every example sees the noise of the call on
    it alone, with ``"different"`` that of one call on the whole batch (batch dimensions in front);
    with ``rng_state`` the call is deterministic and allowed in every mode.

    Args:
        logits: unnormalised log-probabilities, any shape, float16, bfloat16, float32 or float64.
            Computed in float32 (float64 for float64) and rounded once. ``-inf`` means probability
            exactly 0. A NaN makes its row NaN.
        tau: temperature, > 0 and finite: a number, or a tensor that broadcasts to the shape of
            ``logits`` with ``dim`` reduced to 1 and receives a gradient. Under ``torch.compile`` a
            temperature that changes is best passed as a tensor.
        hard: whether to return one-hot samples with the straight-through gradient.
        eps: has no effect; part of the signature of :func:`torch.nn.functional.gumbel_softmax`.
        dim: dimension of the classes, along which ``y`` sums to 1.
        mask: bool tensor that broadcasts to ``logits``; True = may be chosen. A row without any
            True gives zeros, index -1 and zero gradient.
        return_index: whether to also return the index of the largest ``logits + noise``.
        generator: a generator of the device of ``logits``; the device's default one if None. One
            call draws one seed from it, whatever the shape or dtype. ``torch.compile`` breaks the
            graph at it, ``torch.export`` cannot take it, and activation checkpointing needs
            :func:`gumbel_ext.replay_generators`.
        rng_state: int64 tensor ``[seed, offset]`` of shape ``[2]``. The noise is then a function of
            it alone and no generator is read: the form to use under ``torch.compile`` or
            checkpointing when a generator of one's own would be wanted, see
            :func:`gumbel_ext.draw_rng_state`.

    Returns:
        ``y``, of the shape, dtype and memory format of ``logits``; with ``return_index=True`` also
        an int64 tensor of that shape without ``dim``.

    Raises:
        TypeError: ``logits``, ``mask``, ``tau``, ``rng_state`` or ``generator`` is of a wrong type
            or dtype.
        ValueError: ``tau`` is not positive and finite, ``tau`` or ``mask`` does not broadcast,
            ``rng_state`` is not of shape ``[2]``, both ``generator`` and ``rng_state`` are given,
            or devices differ.
        IndexError: ``dim`` is out of range.
        RuntimeError: ``generator`` is given and the call is exported, or run again by a backward,
            which would draw other noise.

    Example:
        >>> logits = torch.randn(20, 10, requires_grad=True)
        >>> y, index = gumbel_softmax(logits, tau=0.5, hard=True, return_index=True)
        >>> bool((y.argmax(-1) == index).all())
        True
    """
    if has_torch_function((logits, tau, mask, rng_state)):
        overridden: Tensor | tuple[Tensor, Tensor] = handle_torch_function(
            gumbel_softmax,
            (logits, tau, mask, rng_state),
            logits,
            tau,
            hard,
            eps,
            dim,
            mask=mask,
            return_index=return_index,
            generator=generator,
            rng_state=rng_state,
        )
        return overridden
    dim, hard = as_int("gumbel_softmax", "dim", dim), as_bool("gumbel_softmax", "hard", hard)
    return_index = as_bool("gumbel_softmax", "return_index", return_index)
    if type(logits) is not Tensor and is_dtensor(logits):
        from gumbel_ext._dtensor import softmax_of_dtensor

        shared, shared_index = softmax_of_dtensor(
            logits,
            *split_tau("gumbel_softmax", tau),
            hard,
            dim,
            mask,
            return_index,
            generator,
            rng_state,
        )
        return shared if shared_index is None else (shared, shared_index)
    check_tensor("gumbel_softmax", "logits", logits)
    check_optional("gumbel_softmax", mask, generator, rng_state, logits.device)
    if eps != 1e-10:
        warnings.warn("`eps` is accepted for compatibility and has no effect.", stacklevel=2)
    rng_state = state_beside(rng_state, logits.device)
    tau_number, tau_tensor = split_tau("gumbel_softmax", tau)
    y, index, _ = _gumbel_softmax(
        logits, tau_number, tau_tensor, hard, dim, mask, return_index, generator, rng_state
    )
    return (y, index) if return_index else y


def gumbel_argmax(
    logits: Tensor,
    dim: int = -1,
    keepdim: bool = False,
    *,
    mask: Tensor | None = None,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
    rng_state: Tensor | None = None,
) -> Tensor:
    r"""Samples class indices by the Gumbel-max trick, without storing noise or probabilities.

    .. math::
        k = \arg\max_i (l_i + g_i), \qquad P(k = i) = \operatorname{softmax}(l)_i

    (Maddison et al., section 2). For the same generator state or ``rng_state`` this is the index
    that :func:`gumbel_softmax` returns. Ties go to the lowest index.

    Args:
        logits: unnormalised log-probabilities, any shape, float16, bfloat16, float32 or float64.
        dim: dimension of the classes.
        keepdim: whether to keep ``dim``, with size 1.
        mask: bool tensor that broadcasts to ``logits``; True = may be chosen.
        num_samples: how many independent samples to draw of every row, at least 1; one, without a
            dimension for it, if None. Sample ``j`` uses the noise positions from
            ``j * logits.numel()`` on, so that the samples are those of ``logits`` repeated along a
            dimension in front; nothing is repeated in memory.
        generator: see :func:`gumbel_softmax`.
        rng_state: see :func:`gumbel_softmax`.

    Returns:
        int64 tensor of the shape of ``logits`` without ``dim``, or with ``dim`` of size
        ``num_samples`` (``[num_samples]`` for logits without dimensions). A row that the mask
        forbids entirely, or that has no classes, gives -1; a row with a NaN the index of the first
        NaN.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`gumbel_softmax`.
        ValueError: ``num_samples`` is not positive, or given together with ``keepdim``.
    """
    if has_torch_function((logits, mask, rng_state)):
        overridden: Tensor = handle_torch_function(
            gumbel_argmax,
            (logits, mask, rng_state),
            logits,
            dim,
            keepdim,
            mask=mask,
            num_samples=num_samples,
            generator=generator,
            rng_state=rng_state,
        )
        return overridden
    dim, keepdim = as_int("gumbel_argmax", "dim", dim), as_bool("gumbel_argmax", "keepdim", keepdim)
    if num_samples is not None:
        return _samples(logits, dim, keepdim, mask, num_samples, generator, rng_state)
    if type(logits) is not Tensor and is_dtensor(logits):
        from gumbel_ext._dtensor import argmax_of_dtensor

        return argmax_of_dtensor(logits, dim, keepdim, mask, generator, rng_state)
    check_tensor("gumbel_argmax", "logits", logits)
    check_optional("gumbel_argmax", mask, generator, rng_state, logits.device)
    rng_state = state_beside(rng_state, logits.device)
    index: Tensor = _gumbel_argmax(logits, dim, keepdim, mask, generator, rng_state)
    return index


def _samples(
    logits: Tensor,
    dim: int,
    keepdim: bool,
    mask: Tensor | None,
    num_samples: int,
    generator: torch.Generator | None,
    rng_state: Tensor | None,
) -> Tensor:
    """The index of ``logits`` expanded, not repeated, along a dimension in front."""
    name = "gumbel_argmax"
    check_tensor(name, "logits", logits)
    check_supported(name, "logits", logits)
    num_samples = as_int(name, "num_samples", num_samples, 1)
    if keepdim:
        raise ValueError(
            f"{name}: keepdim must be False with num_samples, which has the place of dim, got True"
        )
    dim = wrapped_dim(name, dim, logits)
    if mask is not None:
        check_mask(name, mask, logits)
    shape = logits.shape if logits.dim() else (1,)
    index = gumbel_argmax(
        logits.expand(num_samples, *shape),
        dim + 1,
        mask=mask,
        generator=generator,
        rng_state=rng_state,
    )
    return index.movedim(0, dim).contiguous()


def gumbel_noise(
    size: int | Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
    generator: torch.Generator | None = None,
    rng_state: Tensor | None = None,
) -> Tensor:
    r"""Returns the Gumbel(0, 1) noise that the other functions add to their logits.

    .. math::
        g = -\log\big(-\log(1 - v)\big), \qquad v \in \{(j + 1/2) / 2^{64}\}

    with ``j`` a uniform 64-bit integer. For the same state, ``gumbel_softmax(logits)`` is
    ``softmax((logits + gumbel_noise(logits.shape)) / tau)`` up to rounding. Values lie in about
    (-3.8, 45); none is ever infinite.

    Args:
        size: shape of the result.
        dtype: float16, bfloat16, float32 or float64; the default dtype if None.
        device: device of the result; the default device if None.
        generator: see :func:`gumbel_softmax`.
        rng_state: see :func:`gumbel_softmax`.

    Returns:
        A contiguous tensor of shape ``size``. Element ``n`` in row-major order is the noise of
        position ``n``.

    Raises:
        TypeError: ``size`` or ``dtype`` is of a wrong type.
        ValueError: ``size`` is negative, ``rng_state`` is not of shape ``[2]``, or both
            ``generator`` and ``rng_state`` are given.
        RuntimeError: as :func:`gumbel_softmax`.
    """
    if rng_state is not None and has_torch_function((rng_state,)):
        overridden: Tensor = handle_torch_function(
            gumbel_noise,
            (rng_state,),
            size,
            dtype=dtype,
            # A mode that sets the default device is left by then.
            device=torch.get_default_device() if device is None else device,
            generator=generator,
            rng_state=rng_state,
        )
        return overridden
    like, shape, rng_state = checked_noise(
        "gumbel_noise", size, dtype, device, generator, rng_state
    )
    noise: Tensor = _gumbel_noise(like, shape, generator, rng_state)
    return noise


def draw_rng_state(
    generator: torch.Generator | None = None,
    *,
    device: torch.device | str | int | None = None,
) -> Tensor:
    """Draws the ``rng_state`` of one call from a generator, which advances as by that call.

    ``gumbel_softmax(logits, rng_state=draw_rng_state(generator))`` is
    ``gumbel_softmax(logits, generator=generator)``, with the randomness made an argument: it can be
    given to a compiled or exported function, or to a checkpointed one that is run again.

    Args:
        generator: where the state is drawn from; the default generator of ``device`` if None.
        device: device of the result, and of the logits it is meant for; that of ``generator`` if
            None, or the default device.

    Returns:
        int64 tensor ``[seed, offset]``, of shape ``[2]``.

    Raises:
        TypeError: ``generator`` is not a torch.Generator.
        ValueError: ``generator`` is not on ``device``.
    """
    if device is None and isinstance(generator, torch.Generator):
        device = generator.device
    like = empty("draw_rng_state", torch.float32, device)
    check_optional("draw_rng_state", None, generator, None, like.device)
    state: Tensor = _draw_rng_state(like, generator)
    return state
