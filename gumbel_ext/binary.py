"""The binary concrete distribution: relaxed Bernoulli samples, called like the other functions.

Noise is logistic here, made of the same random bits as the Gumbel noise (``docs/noise.md``).

Sources: C. J. Maddison, A. Mnih, Y. W. Teh, "The Concrete distribution", arXiv 1611.00712,
appendix B; the case of two classes of E. Jang, S. Gu, B. Poole, "Categorical reparameterization
with Gumbel-softmax", arXiv 1611.01144.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from gumbel_ext import _functorch_binary as _functorch_binary  # registers torch.vmap's rules
from gumbel_ext._arguments import (
    check_local,
    check_optional,
    split_tau,
    state_beside,
)

__all__ = ["binary_concrete", "binary_concrete_log_prob", "logistic_noise"]

Number: TypeAlias = float | int

_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_binary_concrete = torch.ops.gumbel_ext.binary_concrete.default
_logistic_noise = torch.ops.gumbel_ext.logistic_noise.default


def binary_concrete(
    logits: Tensor,
    tau: Number | Tensor = 1,
    hard: bool = False,
    *,
    generator: torch.Generator | None = None,
    rng_state: Tensor | None = None,
) -> Tensor:
    r"""Samples from the binary concrete (relaxed Bernoulli) distribution, differentiably.

    .. math::
        y = \sigma\big((l + L) / \tau\big), \qquad L = \log(1 - v) - \log v, \quad
        v \sim \operatorname{Uniform}(0, 1)

    elementwise (Maddison et al., appendix B; the first of two classes of Jang et al., eq. 2, whose
    logits differ by ``l``). With ``hard=True`` the value is 1 where ``l + L > 0`` and 0 elsewhere,
    an exact sample of a Bernoulli variable with probability :math:`\sigma(l)`, and the gradient
    that of the soft sample (straight-through).

    The backward makes the noise again: nothing is kept but the inputs and the state of the noise,
    and the gradient is exact where ``y`` itself has rounded to 0 or 1. Differentiable any number
    of times, in reverse and forward mode, also by :mod:`torch.func`; under :func:`torch.vmap` as
    :func:`gumbel_ext.gumbel_softmax`.

    Args:
        logits: log-odds, any shape, float16, bfloat16, float32 or float64. Computed in float32
            (float64 for float64) and rounded once. ``-inf`` gives 0, ``inf`` gives 1, both with
            gradient 0; NaN gives NaN.
        tau: temperature, > 0 and finite: a number, or a tensor that broadcasts to the shape of
            ``logits`` and receives a gradient.
        hard: whether to return 0 or 1 with the straight-through gradient.
        generator: a generator of the device of ``logits``; the device's default one if None. One
            call draws one seed from it, see :func:`gumbel_ext.gumbel_softmax`.
        rng_state: int64 tensor ``[seed, offset]`` of shape ``[2]``. The noise is then a function of
            it alone and no generator is read, see :func:`gumbel_ext.draw_rng_state`.

    Returns:
        ``y``, of the shape, dtype and memory format of ``logits``. Element ``n`` of ``logits`` in
        row-major order has the noise of position ``n``.

    Raises:
        TypeError: ``logits``, ``tau``, ``rng_state`` or ``generator`` is of a wrong type or dtype.
        ValueError: ``tau`` is not positive and finite or does not broadcast, ``rng_state`` is not
            of shape ``[2]``, both ``generator`` and ``rng_state`` are given, or devices differ.
        RuntimeError: as :func:`gumbel_ext.gumbel_softmax`.

    Example:
        >>> logits = torch.zeros(1000, requires_grad=True)
        >>> gates = binary_concrete(logits, tau=0.5, hard=True)
        >>> bool(((gates == 0) | (gates == 1)).all())
        True
    """
    if has_torch_function((logits,)):
        overridden: Tensor = handle_torch_function(
            binary_concrete,
            (logits, tau, rng_state),
            logits,
            tau,
            hard,
            generator=generator,
            rng_state=rng_state,
        )
        return overridden
    check_local("binary_concrete", "logits", logits)
    check_optional("binary_concrete", None, generator, rng_state, logits.device)
    rng_state = state_beside(rng_state, logits.device)
    tau_number, tau_tensor = split_tau("binary_concrete", tau)
    y: Tensor = _binary_concrete(logits, tau_number, tau_tensor, hard, generator, rng_state)[0]
    return y


def logistic_noise(
    size: int | Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
    generator: torch.Generator | None = None,
    rng_state: Tensor | None = None,
) -> Tensor:
    r"""Returns the Logistic(0, 1) noise that :func:`binary_concrete` adds to its logits.

    .. math::
        L = \log(1 - v) - \log v, \qquad v \in \{(j + 1/2) / 2^{64}\}

    with ``j`` the uniform 64-bit integer that also makes the Gumbel noise of that position: large
    for small ``v``, as that is. For the same state, ``binary_concrete(logits)`` is
    ``sigmoid((logits + logistic_noise(logits.shape)) / tau)`` up to rounding. Values lie within
    (-45.1, 45.1).

    Args:
        size: shape of the result.
        dtype: float16, bfloat16, float32 or float64; the default dtype if None.
        device: device of the result; the default device if None.
        generator: see :func:`binary_concrete`.
        rng_state: see :func:`binary_concrete`.

    Returns:
        A contiguous tensor of shape ``size``. Element ``n`` in row-major order is the noise of
        position ``n``.

    Raises:
        TypeError: ``size`` or ``dtype`` is of a wrong type.
        ValueError: ``size`` is negative, ``rng_state`` is not of shape ``[2]``, or both
            ``generator`` and ``rng_state`` are given.
        RuntimeError: as :func:`gumbel_ext.gumbel_softmax`.
    """
    shape = tuple(size) if isinstance(size, Sequence) else (size,)
    for extent in shape:
        if not isinstance(extent, (int, torch.SymInt)):
            raise TypeError(f"logistic_noise: size must be an int or ints, got {size!r}")
        if extent < 0:
            raise ValueError(f"logistic_noise: size must not be negative, got {size}")
    like = torch.empty(0, dtype=dtype, device=device)
    check_optional("logistic_noise", None, generator, rng_state, like.device)
    rng_state = state_beside(rng_state, like.device)
    noise: Tensor = _logistic_noise(like, shape, generator, rng_state)[0]
    return noise


def binary_concrete_log_prob(value: Tensor, logits: Tensor, tau: Number | Tensor) -> Tensor:
    r"""The log density of the binary concrete distribution, elementwise.

    .. math::
        \log p(y) = \log \frac{\tau \alpha y^{-\tau - 1} (1 - y)^{-\tau - 1}}
        {\big(\alpha y^{-\tau} + (1 - y)^{-\tau}\big)^2}, \qquad \alpha = e^l

    (Maddison et al., appendix B), computed from
    :math:`x = \tau \operatorname{logit}(y) - l`, the noise that gives ``y``, as

    .. math::
        \log \tau - |x| - 2 \log(1 + e^{-|x|}) - \log y - \log(1 - y)

    without overflow. At ``value`` 0 and 1 it is the limit: ``inf`` for tau < 1, a finite number
    for tau = 1 (``-l`` at 0, ``l`` at 1), ``-inf`` for tau > 1. The gradient in ``logits`` is
    finite there too (1 at 0, -1 at 1: the limit for every tau), that in ``value`` and ``tau``
    infinite where the limit is.

    Straight-through samples are values of 0 and 1, with the density of neither.

    Args:
        value: relaxed samples in [0, 1], float16, bfloat16, float32 or float64. NaN outside.
        logits: log-odds, broadcasts with ``value``.
        tau: temperature, > 0 and finite: a number or a tensor that broadcasts with both.

    Returns:
        A tensor of the broadcast shape, of the promoted dtype of ``value`` and ``logits``;
        computed in float32 (float64 if one of them is) and rounded once. Differentiable in all
        three.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: ``tau`` is a number and not positive and finite. The values of a tensor are not
            looked at: where they are not positive the density is NaN.
    """
    for name, tensor in (("value", value), ("logits", logits)):
        check_local("binary_concrete_log_prob", name, tensor)
        if tensor.dtype not in _FLOAT_DTYPES:
            raise TypeError(
                f"binary_concrete_log_prob: {name} must have dtype float16, bfloat16, float32 or "
                f"float64, got {tensor.dtype}"
            )
    tau_number, tau_tensor = split_tau("binary_concrete_log_prob", tau)
    if tau_tensor is None and not (math.isfinite(tau_number) and tau_number > 0):
        raise ValueError(
            f"binary_concrete_log_prob: tau must be positive and finite, got {tau_number}"
        )
    if tau_tensor is not None and tau_tensor.dtype not in _FLOAT_DTYPES:
        raise TypeError(
            "binary_concrete_log_prob: a tau tensor must have dtype float16, bfloat16, float32 or "
            f"float64, got {tau_tensor.dtype}"
        )
    dtype = torch.promote_types(value.dtype, logits.dtype)
    double = dtype == torch.float64
    computed = torch.float64 if double else torch.float32
    y, location = value.to(computed), logits.to(computed)
    if tau_tensor is None:
        t = torch.full((), tau_number, dtype=computed, device=y.device)
    else:
        t = tau_tensor.to(y.device, computed)
    return _log_density(y, location, t).to(dtype)


def _log_density(y: Tensor, location: Tensor, t: Tensor) -> Tensor:
    """See above; all of the dtype computed in."""
    t = torch.where(t > 0, t, torch.nan)
    at_zero = y == 0
    end = at_zero | (y == 1)
    inside = y.masked_fill(end, 0.5)
    log_y, log_not_y = torch.log(inside), torch.log1p(-inside)
    noise = t * (log_y - log_not_y) - location
    # -abs() with a derivative at 0, which the other term makes up for, as it does on either side.
    distance = torch.where(noise < 0, noise, -noise)
    middle = torch.log(t) + distance - 2 * torch.log1p(torch.exp(distance)) - log_y - log_not_y

    # At a distance d from an end the density goes as d^(tau - 1).  Elsewhere, for tau = 1 and for
    # infinite logits, whose mass lies at one end alone, d is 1: nothing may be 0 * inf, in the
    # value or in a gradient.
    towards = torch.where(at_zero, -location, location)
    singular = end & (t != 1) & torch.isfinite(towards)
    d = torch.where(singular, torch.where(at_zero, y, 1 - y), 1.0)
    limit = torch.log(t) + towards + (t - 1) * torch.log(d)
    # For tau = 1 the density is e^l / (e^l (1 - y) + y)^2, with a slope in y at the ends.
    sign = torch.where(at_zero, 2.0, -2.0)
    largest = math.log(torch.finfo(y.dtype).max) - 1
    slope = sign * (1 - torch.exp(towards.masked_fill(~end, 0.0).clamp(max=largest)))
    limit = limit + torch.where(end & ~singular, slope, 0.0) * (y - y.detach())
    return torch.where(end, limit, middle)
