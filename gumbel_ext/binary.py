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

from gumbel_ext._arguments import (
    ErrorsOf,
    as_bool,
    as_positive,
    as_size,
    check_broadcast,
    check_local,
    check_optional,
    check_positive,
    check_supported,
    checked_noise,
    split_tau,
    state_beside,
)

__all__ = [
    "binary_concrete",
    "binary_concrete_log_prob",
    "logistic_noise",
    "logit_binary_concrete",
]

Number: TypeAlias = float | int

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
    if has_torch_function((logits, tau, rng_state)):
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
    hard = as_bool("binary_concrete", "hard", hard)
    check_optional("binary_concrete", None, generator, rng_state, logits.device)
    rng_state = state_beside(rng_state, logits.device)
    tau_number, tau_tensor = split_tau("binary_concrete", tau)
    y: Tensor = _binary_concrete(logits, tau_number, tau_tensor, hard, generator, rng_state)[0]
    return y


def logit_binary_concrete(
    logits: Tensor,
    tau: Number | Tensor = 1,
    *,
    generator: torch.Generator | None = None,
    rng_state: Tensor | None = None,
) -> Tensor:
    r"""Samples the log-odds of a binary concrete sample, differentiably.

    .. math::
        x = (l + L) / \tau, \qquad \sigma(x) \sim \operatorname{BinaryConcrete}(l, \tau)

    elementwise (Maddison et al., appendix B). For the same state its sigmoid is
    :func:`binary_concrete` of the same logits up to rounding. At a low temperature that sample
    rounds to 0 or 1, where its density is infinite; its log-odds are ordinary numbers, and so is
    their density (:func:`binary_concrete_log_prob` with ``logit_space=True``).

    Args:
        logits: log-odds, any shape, float16, bfloat16, float32 or float64. Computed in float32
            (float64 for float64) and rounded once. Infinite ones give themselves, with gradient 0;
            NaN gives NaN.
        tau: temperature, > 0 and finite: a number, or a tensor that broadcasts to the shape of
            ``logits`` and receives a gradient.
        generator: see :func:`binary_concrete`.
        rng_state: see :func:`binary_concrete`.

    Returns:
        ``x``, of the shape and dtype of ``logits``. Element ``n`` of ``logits`` in row-major order
        has the noise of position ``n``.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`binary_concrete`.

    Example:
        >>> x = logit_binary_concrete(torch.zeros(1000), tau=0.01)
        >>> bool(x.isfinite().all())
        True
    """
    if has_torch_function((logits, tau, rng_state)):
        overridden: Tensor = handle_torch_function(
            logit_binary_concrete,
            (logits, tau, rng_state),
            logits,
            tau,
            generator=generator,
            rng_state=rng_state,
        )
        return overridden
    name = "logit_binary_concrete"
    check_local(name, "logits", logits)
    check_optional(name, None, generator, rng_state, logits.device)
    tau_number, tau_tensor = split_tau(name, tau)
    check_supported(name, "logits", logits)
    computed = torch.promote_types(logits.dtype, torch.float32)
    t = _temperature(name, tau_number, tau_tensor, computed, logits.device)
    check_broadcast(name, "tau", t, logits)
    wide = logits.to(computed)
    rng_state = state_beside(rng_state, wide.device)
    with ErrorsOf(name):
        noise = _logistic_noise(wide.detach(), as_size(name, logits.shape), generator, rng_state)[0]
    # The log-odds of what is certain are a constant: their derivative in tau would be infinite.
    certain = logits.isinf()
    x = (wide.masked_fill(certain, 0.0) + noise) / t
    return torch.where(certain, logits.detach(), x.to(logits.dtype))


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
    if rng_state is not None and has_torch_function((rng_state,)):
        overridden: Tensor = handle_torch_function(
            logistic_noise,
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
        "logistic_noise", size, dtype, device, generator, rng_state
    )
    noise: Tensor = _logistic_noise(like, shape, generator, rng_state)[0]
    return noise


def binary_concrete_log_prob(
    value: Tensor, logits: Tensor, tau: Number | Tensor, *, logit_space: bool = False
) -> Tensor:
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

    With ``logit_space`` it is the density of :math:`z = \operatorname{logit}(y)`, a logistic
    variable of mean :math:`l / \tau` and scale :math:`1 / \tau`, which lacks the last two terms and
    with them every singularity: ``-inf`` at infinite ``z`` alone, ``inf`` where an infinite logit
    makes that the only value.

    Args:
        value: relaxed samples in [0, 1], NaN outside; or with ``logit_space`` their log-odds, as
            :func:`logit_binary_concrete` gives them. float16, bfloat16, float32 or float64.
        logits: log-odds, broadcasts with ``value``.
        tau: temperature, > 0 and finite: a number or a tensor that broadcasts with both.
        logit_space: whether ``value`` is the log-odds of a sample.

    Returns:
        A tensor of the broadcast shape, of the promoted dtype of ``value`` and ``logits``;
        computed in float32 (float64 if one of them is) and rounded once. Differentiable in all
        three.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: ``tau`` is not positive and finite. The values of a tensor are looked at on the
            CPU and outside of compilers; elsewhere the density is NaN where they are not positive.
    """
    if has_torch_function((value, logits, tau)):
        overridden: Tensor = handle_torch_function(
            binary_concrete_log_prob,
            (value, logits, tau),
            value,
            logits,
            tau,
            logit_space=logit_space,
        )
        return overridden
    name = "binary_concrete_log_prob"
    for argument, tensor in (("value", value), ("logits", logits)):
        check_local(name, argument, tensor)
        check_supported(name, argument, tensor)
    logit_space = as_bool(name, "logit_space", logit_space)
    tau_number, tau_tensor = split_tau(name, tau)
    dtype = torch.promote_types(value.dtype, logits.dtype)
    computed = torch.promote_types(dtype, torch.float32)
    t = _temperature(name, tau_number, tau_tensor, computed, value.device)
    density = _log_density_of_logit if logit_space else _log_density
    return density(value.to(computed), logits.to(computed), t).to(dtype)


def _temperature(
    function: str,
    tau: float,
    tau_tensor: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The temperature as a tensor; NaN where one that is no number yet is not positive.

    One number stays on the CPU, where operations on every device read it without a copy.
    """
    if tau_tensor is None:
        return torch.full((), as_positive(function, "tau", tau), dtype=dtype, device="cpu")
    check_supported(function, "tau", tau_tensor)
    check_positive(function, "tau", tau_tensor)
    one_number = tau_tensor.dim() == 0 and tau_tensor.is_cpu
    t = tau_tensor.to("cpu" if one_number else device, dtype)
    return torch.where(t > 0, t, torch.nan)


def _standard_logistic(noise: Tensor) -> Tensor:
    """The log density at ``noise``."""
    # -abs() with a derivative at 0, which the other term makes up for, as it does on either side.
    distance = torch.where(noise < 0, noise, -noise)
    return distance - 2 * torch.log1p(torch.exp(distance))


def _log_density_of_logit(x: Tensor, location: Tensor, t: Tensor) -> Tensor:
    certain = x.isinf() & (x == location)
    noise = t * x.masked_fill(certain, 0.0) - location.masked_fill(certain, 0.0)
    return (torch.log(t) + _standard_logistic(noise)).masked_fill(certain, torch.inf)


def _log_density(y: Tensor, location: Tensor, t: Tensor) -> Tensor:
    at_zero = y == 0
    end = at_zero | (y == 1)
    inside = y.masked_fill(end, 0.5)
    log_y, log_not_y = torch.log(inside), torch.log1p(-inside)
    noise = t * (log_y - log_not_y) - location
    middle = torch.log(t) + _standard_logistic(noise) - log_y - log_not_y

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
