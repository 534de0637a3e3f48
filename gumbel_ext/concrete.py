"""The Concrete distribution's log-space sample and its density.

Sources: C. J. Maddison, A. Mnih, Y. W. Teh, "The Concrete distribution", arXiv 1611.00712; E. Jang,
S. Gu, B. Poole, "Categorical reparameterization with Gumbel-softmax", arXiv 1611.01144.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from gumbel_ext._arguments import (
    as_bool,
    as_int,
    check_local,
    check_supported,
    checked_state,
    split_tau,
)

__all__ = ["concrete_log_prob", "gumbel_log_softmax"]

Number: TypeAlias = float | int

_gumbel_log_softmax = torch.ops.gumbel_ext.gumbel_log_softmax.default
_concrete_log_prob = torch.ops.gumbel_ext.concrete_log_prob.default


def gumbel_log_softmax(
    logits: Tensor,
    tau: Number | Tensor = 1,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    rng_state: Tensor | None = None,
) -> Tensor:
    r"""Samples the logarithm of a Gumbel-softmax sample, differentiably.

    .. math::
        \log y = z - \operatorname{logsumexp}(z), \qquad z = (l + g) / \tau

    (the ExpConcrete distribution of Maddison et al., appendix C.3). For the same state its
    exponential is :func:`gumbel_ext.gumbel_softmax` of the same logits up to rounding. At a low
    temperature most of ``y`` is too small for a number; its logarithm is not, nor is its density,
    see :func:`concrete_log_prob`.

    Differentiable any number of times, in reverse and forward mode, also by :mod:`torch.func`; for
    :func:`torch.vmap` see :func:`gumbel_ext.gumbel_softmax`. For a gradient of 16-bit logits the
    log sample is kept in float32, of which the result is the rounding: a large ``-log y`` of 16
    bits would say ``y`` to a few per cent only, or not at all.

    Args:
        logits: unnormalised log-probabilities, any shape, float16, bfloat16, float32 or float64.
            Computed in float32 (float64 for float64) and rounded once. ``-inf`` gives ``-inf`` and
            gradient zero. A NaN makes its row NaN, and so does a row of nothing but ``-inf``.
        tau: temperature, > 0 and finite: a number, or a tensor that broadcasts to the shape of
            ``logits`` with ``dim`` reduced to 1 and receives a gradient.
        dim: dimension of the classes.
        mask: bool tensor that broadcasts to ``logits``; True = may be chosen. Forbidden classes
            give ``-inf`` and gradient zero, also in a row without any True.
        generator: see :func:`gumbel_ext.gumbel_softmax`.
        rng_state: see :func:`gumbel_ext.gumbel_softmax`.

    Returns:
        ``log y``, of the shape, dtype and memory format of ``logits``.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`gumbel_ext.gumbel_softmax`.

    Example:
        >>> logits = torch.randn(20, 10)
        >>> log_y = gumbel_log_softmax(logits, tau=0.01)
        >>> bool(log_y.isfinite().all())
        True
    """
    if has_torch_function((logits, tau, mask, rng_state)):
        overridden: Tensor = handle_torch_function(
            gumbel_log_softmax,
            (logits, tau, mask, rng_state),
            logits,
            tau,
            dim,
            mask=mask,
            generator=generator,
            rng_state=rng_state,
        )
        return overridden
    dim = as_int("gumbel_log_softmax", "dim", dim)
    rng_state = checked_state("gumbel_log_softmax", logits, mask, generator, rng_state)
    tau_number, tau_tensor = split_tau("gumbel_log_softmax", tau)
    log_y: Tensor = _gumbel_log_softmax(
        logits, tau_number, tau_tensor, dim, mask, generator, rng_state
    )[0]
    return log_y


def concrete_log_prob(
    value: Tensor,
    logits: Tensor,
    tau: Number | Tensor,
    dim: int = -1,
    *,
    log_space: bool = False,
) -> Tensor:
    r"""Log density of the Concrete (Gumbel-softmax, relaxed one-hot categorical) distribution.

    With :math:`x = \log y`, and :math:`n` classes,

    .. math::
        \log p(y) = \log\Gamma(n) + (n - 1) \log\tau + \sum_i (l_i - \tau x_i)
            - n \operatorname{logsumexp}_i (l_i - \tau x_i) - \sum_i x_i

    on the simplex (Maddison et al., eq. 11; Jang et al., appendix B); with ``log_space`` that of
    :math:`x` itself, which lacks the last sum (Maddison et al., appendix C.3).

    On the boundary of the simplex it is the limit along the straight line from the centre. Where
    :math:`m < n` entries are zero it is ``-inf``, finite or ``+inf`` as
    :math:`(n - m) \tau - m` is positive, zero or negative, told apart in the precision of the
    computation; in log space, where an entry is ``-inf``, it is ``-inf``. A class with logit
    ``-inf`` cannot occur: where its value is zero it is left out, the density being that on the
    face of the others, of which alone :math:`n` and :math:`m` count; where it is not, the density
    is zero. A row with a negative, infinite or NaN entry, a logit NaN or ``+inf``, without a
    possible class or without a positive entry is NaN. That a row sums to 1 is not checked.

    Differentiable any number of times, in reverse and forward mode, also by :mod:`torch.func`. The
    gradient of ``logits`` is finite on the boundary too. That of a zero entry of ``value`` is the
    limit again, usually infinite; that of ``tau`` is ``-inf`` there.  Second derivatives are those
    of the interior.

    Args:
        value: points of the simplex, or with ``log_space`` their logarithms, float16, bfloat16,
            float32 or float64.
        logits: unnormalised log-probabilities. ``value`` and ``logits`` broadcast against each
            other, without being copied: many samples of one set of logits.
        tau: temperature, > 0 and finite: a number, or a tensor that broadcasts to the common shape
            with ``dim`` reduced to 1 and receives a gradient.
        dim: dimension of the classes, of the common shape.
        log_space: whether ``value`` is the logarithm of a sample, as :func:`gumbel_log_softmax`
            gives it.

    Returns:
        The log density in nats, of the common shape without ``dim``: float64 if an argument is,
        else float32. A density of 16-bit arguments is not rounded to their dtype, which has no
        more than three digits for numbers that are often hundreds.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: ``tau`` is not positive and finite, shapes do not broadcast or devices differ.
        IndexError: ``dim`` is out of range.

    Example:
        >>> logits = torch.zeros(3)
        >>> value = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
        >>> concrete_log_prob(value, logits, tau=1.0)
        tensor([0.7001,    inf])
    """
    if has_torch_function((value, logits, tau)):
        overridden: Tensor = handle_torch_function(
            concrete_log_prob,
            (value, logits, tau),
            value,
            logits,
            tau,
            dim,
            log_space=log_space,
        )
        return overridden
    for name, tensor in (("value", value), ("logits", logits)):
        check_local("concrete_log_prob", name, tensor)
        check_supported("concrete_log_prob", name, tensor)
    dim = as_int("concrete_log_prob", "dim", dim)
    log_space = as_bool("concrete_log_prob", "log_space", log_space)
    if value.dtype != logits.dtype:
        dtype = torch.promote_types(value.dtype, logits.dtype)
        value, logits = value.to(dtype), logits.to(dtype)
    tau_number, tau_tensor = split_tau("concrete_log_prob", tau)
    if logits.dtype in (torch.float32, torch.float64):
        logits = _without_offset(logits, dim, max(value.dim(), logits.dim()))
    density: Tensor = _concrete_log_prob(value, logits, tau_number, tau_tensor, dim, log_space)
    return density


def _without_offset(logits: Tensor, dim: int, dims: int) -> Tensor:
    """``logits`` with their largest along ``dim`` of a shape of ``dims`` dimensions moved to 0.

    The density does not depend on an offset, but ``l - tau x`` rounds in proportion to it.
    """
    own = dim if dim < 0 else dim - dims + (logits.dim() or 1)
    if not -logits.dim() <= own < logits.dim() or logits.shape[own] == 0:
        return logits
    peak = logits.detach().amax(own, keepdim=True)
    return logits - peak.masked_fill(~peak.isfinite(), 0.0)
