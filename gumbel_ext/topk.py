r"""Sampling without replacement by the Gumbel-top-k trick, and its relaxed form.

Sources: J. I. Yellott, "The relationship between Luce's choice axiom, Thurstone's theory of
comparative judgment, and the double exponential distribution", 1977; T. Vieira, "Gumbel-max trick
and weighted reservoir sampling", 2014; W. Kool, H. van Hoof, M. Welling, "Stochastic beams and
where to find them", arXiv 1903.06059; S. M. Xie, S. Ermon, "Reparameterizable subset sampling via
continuous relaxations", arXiv 1901.10517.
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
    as_positive,
    check_broadcast,
    check_local,
    check_mask,
    check_optional,
    check_supported,
    split_tau,
    state_beside,
    wrapped_dim,
)
from gumbel_ext.functional import gumbel_noise, gumbel_softmax

__all__ = ["gumbel_topk", "relaxed_topk"]

Number: TypeAlias = float | int

_gumbel_topk = torch.ops.gumbel_ext.gumbel_topk.default
_gumbel_softmax = torch.ops.gumbel_ext.gumbel_softmax.default

# exp(-_FAR) is 0 in every dtype.
_FAR = 2000.0


@overload
def gumbel_topk(
    logits: Tensor,
    k: int,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_log_prob: Literal[False] = ...,
    generator: torch.Generator | None = ...,
    rng_state: Tensor | None = ...,
) -> Tensor: ...


@overload
def gumbel_topk(
    logits: Tensor,
    k: int,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_log_prob: Literal[True],
    generator: torch.Generator | None = ...,
    rng_state: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def gumbel_topk(
    logits: Tensor,
    k: int,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_log_prob: bool,
    generator: torch.Generator | None = ...,
    rng_state: Tensor | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def gumbel_topk(
    logits: Tensor,
    k: int,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
    return_log_prob: bool = False,
    generator: torch.Generator | None = None,
    rng_state: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Samples ``k`` distinct classes of every row, in the order in which they are drawn.

    .. math::
        i_1, \dots, i_k = \text{the classes of the } k \text{ largest } l_i + g_i, \qquad
        P(i_1, \dots, i_k) = \prod_{j=1}^{k} \frac{\exp l_{i_j}}
        {\sum_{c \notin \{i_1, \dots, i_{j-1}\}} \exp l_c}

    (Kool et al.; Vieira; Yellott): sampling without replacement from
    :math:`\operatorname{softmax}(l)`, the Plackett-Luce distribution. For the same generator state
    or ``rng_state`` the first class is that of :func:`gumbel_ext.gumbel_argmax`, and the first
    ``j`` of ``k`` are those of ``j``. Ties go to the lowest index.

    Args:
        logits: unnormalised log-probabilities, any shape, float16, bfloat16, float32 or float64.
        k: how many classes, from 0 to the size of ``dim``.
        dim: dimension of the classes.
        mask: bool tensor that broadcasts to ``logits``; True = may be chosen.
        return_log_prob: whether to also return the log-probability of the ordered sample. It is
            made of PyTorch's operations and differentiable in ``logits`` any number of times.
        generator: see :func:`gumbel_ext.gumbel_softmax`.
        rng_state: see :func:`gumbel_ext.gumbel_softmax`.

    Returns:
        int64 tensor of the shape of ``logits`` with ``dim`` of size ``k`` (``[k]`` for logits
        without dimensions). Classes that the mask forbids or whose logit is -inf are never chosen:
        where a row has fewer than ``k`` others, the places left are -1. NaN logits come first.

        With ``return_log_prob=True`` also :math:`\log P(i_1, \dots, i_k)`, of the shape of
        ``logits`` without ``dim``; float32, or float64 for float64 logits. In a row with places
        left it is that of the classes there are.

    Raises:
        TypeError, IndexError, RuntimeError: as :func:`gumbel_ext.gumbel_softmax`.
        ValueError: likewise; or ``k`` is negative or more than there are classes.

    Example:
        >>> logits = torch.randn(20, 10, requires_grad=True)
        >>> index, log_prob = gumbel_topk(logits, 3, return_log_prob=True)
        >>> index.shape, log_prob.shape
        (torch.Size([20, 3]), torch.Size([20]))
    """
    if has_torch_function((logits, mask, rng_state)):
        overridden: Tensor | tuple[Tensor, Tensor] = handle_torch_function(
            gumbel_topk,
            (logits, mask, rng_state),
            logits,
            k,
            dim,
            mask=mask,
            return_log_prob=return_log_prob,
            generator=generator,
            rng_state=rng_state,
        )
        return overridden
    name = "gumbel_topk"
    k, dim = _checked(name, logits, k, dim, mask, generator, rng_state)
    return_log_prob = as_bool(name, "return_log_prob", return_log_prob)
    rng_state = state_beside(rng_state, logits.device)
    index: Tensor = _gumbel_topk(logits, k, dim, mask, generator, rng_state)
    if not return_log_prob:
        return index
    return index, _log_prob(logits, index, dim, mask)


def relaxed_topk(
    logits: Tensor,
    k: int,
    tau: Number | Tensor = 1,
    hard: bool = False,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    rng_state: Tensor | None = None,
) -> Tensor:
    r"""Samples relaxed k-hot vectors, differentiably: ``k`` classes without replacement.

    .. math::
        \alpha^1 = l + g, \qquad a^j = \operatorname{softmax}(\alpha^j / \tau), \qquad
        \alpha^{j+1} = \alpha^j + \log(1 - a^j), \qquad y = \sum_{j=1}^{k} a^j

    (Xie and Ermon). The entries of ``y`` are not negative and sum to ``k`` along ``dim``; as
    ``tau`` goes to 0, ``y`` becomes the k-hot vector of :func:`gumbel_topk`. At a high ``tau`` an
    entry can exceed 1: a class that one step has not used up takes part in the next.

    With ``hard=True`` the value is that k-hot vector and the gradient that of the relaxed one
    (straight-through). ``k = 1`` is :func:`gumbel_ext.gumbel_softmax`.

    For ``k > 1`` it is made of PyTorch's operations on the noise of this package, about ten passes
    over the logits a class chosen, in time and, where a gradient is wanted, in memory. A compiled
    graph has the ``k`` rounds one after the other: another ``k`` is another graph. A
    ``torch.jit.trace`` keeps the shape it was traced with.

    Args:
        logits: unnormalised log-probabilities, any shape, float16, bfloat16, float32 or float64.
            Computed in float32 (float64 for float64) and rounded once. ``-inf`` means never chosen.
        k: how many classes, from 1 to the size of ``dim``.
        tau: temperature, > 0 and finite: a number, or a tensor that broadcasts to the shape of
            ``logits`` with ``dim`` reduced to 1 and receives a gradient.
        hard: whether to return k-hot samples with the straight-through gradient.
        dim: dimension of the classes.
        mask: bool tensor that broadcasts to ``logits``; True = may be chosen.
        generator: see :func:`gumbel_ext.gumbel_softmax`.
        rng_state: see :func:`gumbel_ext.gumbel_softmax`.

    Returns:
        ``y``, of the shape and dtype of ``logits``. A row with fewer than ``k`` classes that may be
        chosen and have logits above -inf sums to their number.

    Raises:
        TypeError, IndexError, RuntimeError: as :func:`gumbel_ext.gumbel_softmax`.
        ValueError: likewise; or ``k`` is not positive or more than there are classes.
    """
    if has_torch_function((logits, tau, mask, rng_state)):
        overridden: Tensor = handle_torch_function(
            relaxed_topk,
            (logits, tau, mask, rng_state),
            logits,
            k,
            tau,
            hard,
            dim,
            mask=mask,
            generator=generator,
            rng_state=rng_state,
        )
        return overridden
    name = "relaxed_topk"
    k, dim = _checked(name, logits, as_int(name, "k", k, 1), dim, mask, generator, rng_state)
    hard = as_bool(name, "hard", hard)
    dtype = _computed_in(logits)
    allowed = logits != -torch.inf
    if mask is not None:
        allowed = allowed & mask
    with ErrorsOf(name):
        if k == 1:
            return gumbel_softmax(
                logits, tau, hard, dim=dim, mask=allowed, generator=generator, rng_state=rng_state
            )
        temperature = _temperature(name, tau, logits, dim, dtype)
        noise = gumbel_noise(
            logits.shape,
            dtype=dtype,
            device=logits.device,
            generator=generator,
            rng_state=rng_state,
        )
    # What may not be chosen is a constant: the derivative of -inf would be NaN.
    scores = (logits.to(dtype) + noise).masked_fill(~allowed, -torch.inf)
    y = _relaxed(scores, allowed, k, temperature, dim)
    if hard:
        best = scores.detach().sort(stable=True, dim=dim, descending=True)
        ones = best.values.narrow(dim, 0, k).ne(-torch.inf).to(dtype)
        k_hot = torch.zeros_like(y).scatter(dim, best.indices.narrow(dim, 0, k), ones)
        # (y - y) is exactly 0, so the value is exactly 0 or 1; in a NaN row it is NaN.
        y = k_hot + (y - y.detach())
    return y.to(logits.dtype)


def _checked(
    name: str,
    logits: Tensor,
    k: int,
    dim: int,
    mask: Tensor | None,
    generator: torch.Generator | None,
    rng_state: Tensor | None,
) -> tuple[int, int]:
    """Returns ``k``, and ``dim`` counted from the front."""
    check_local(name, "logits", logits)
    check_supported(name, "logits", logits)
    dim = wrapped_dim(name, dim, logits)
    k = as_int(name, "k", k, 0)
    classes = logits.shape[dim] if logits.dim() else 1
    if k > classes:
        raise ValueError(
            f"{name}: k must be between 0 and the number of classes, {classes}, got {k}"
        )
    check_optional(name, mask, generator, rng_state, logits.device)
    if mask is not None:
        check_mask(name, mask, logits)
    return k, dim


def _computed_in(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _log_prob(logits: Tensor, index: Tensor, dim: int, mask: Tensor | None) -> Tensor:
    r"""Of the ordered sample: the sum of :math:`l_{i_j} - \log D_j` over its classes.

    :math:`D_j` is the sum of ``exp(l)`` over :math:`i_j` and all that come later or never, so that
    a term is :math:`\log \operatorname{sigmoid}(l_{i_j} - \log D_{j+1})`: sums of exponentials are
    only ever added up from the last class on, and nothing is subtracted from a sum, however much of
    the mass the first classes hold.
    """
    logits = logits.to(_computed_in(logits))
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    if logits.dim() == 0:
        logits = logits.unsqueeze(0)
        return _log_prob_of_rows(logits, index, 0).squeeze()
    return _log_prob_of_rows(logits, index, dim)


def _log_prob_of_rows(logits: Tensor, index: Tensor, dim: int) -> Tensor:
    k = index.shape[dim]
    if k == 0 or logits.numel() == 0:
        return logits.sum(dim) * 0
    there = index >= 0
    # Places left stand for the first class, which changes neither set of classes.
    index = torch.where(there, index, index.narrow(dim, 0, 1)).clamp(min=0)
    chosen = torch.where(there, logits.gather(dim, index), torch.inf)
    low = chosen.detach().amin(dim, keepdim=True)
    low = torch.where(there.any(dim, keepdim=True), low, torch.zeros_like(low))
    chosen = torch.where(there, chosen, low)
    unchosen = logits.ne(-torch.inf) & ~_marked(logits, index, dim)
    any_left = unchosen.any(dim, keepdim=True)
    others = torch.where(unchosen | ~any_left, logits, -torch.inf)
    others = torch.where(any_left, others, low)

    # log D_{j+1} is kept in two parts, the largest logit and what the others add to it: neither an
    # offset of the row nor a class far below can then round the second away.
    peak = others.detach().amax(dim, keepdim=True)
    peak = torch.cat([chosen.detach().narrow(dim, 1, k - 1), peak], dim)
    peak = peak.flip(dim).cummax(dim).values.flip(dim)
    others = (others - peak.narrow(dim, k - 1, 1)).logsumexp(dim, keepdim=True)
    after = chosen.narrow(dim, 1, k - 1) - peak.narrow(dim, 0, k - 1)
    exist = torch.cat([there.narrow(dim, 1, k - 1), any_left], dim)
    # What is not there, or so far below, has an exponential of nothing, and derivatives.
    after = torch.where(exist, torch.cat([after, others], dim), -_FAR).clamp(min=-_FAR)
    # Sums over all that follow, doubling their reach in every round.
    reach = 1
    while reach < k:
        left = k - reach
        beyond = after.narrow(dim, reach, left) + (
            peak.narrow(dim, reach, left) - peak.narrow(dim, 0, left)
        )
        after = torch.cat(
            [_log_add(after.narrow(dim, 0, left), beyond), after.narrow(dim, left, reach)], dim
        )
        reach *= 2
    terms = torch.nn.functional.logsigmoid(chosen - peak - after)
    return torch.where(there, terms, torch.zeros_like(terms)).sum(dim)


def _marked(like: Tensor, index: Tensor, dim: int) -> Tensor:
    """True at ``index``. The source is a tensor because torch.jit.trace takes no number there."""
    marks = torch.ones_like(index, dtype=torch.bool)
    return torch.zeros_like(like, dtype=torch.bool).scatter(dim, index, marks)


def _log_add(a: Tensor, b: Tensor) -> Tensor:
    """``log(exp(a) + exp(b))``; torch.logaddexp has second derivatives of NaN where they differ."""
    first = a >= b
    larger, smaller = torch.where(first, a, b), torch.where(first, b, a)
    return larger - torch.nn.functional.logsigmoid(larger - smaller)


def _temperature(
    name: str, tau: Number | Tensor, logits: Tensor, dim: int, dtype: torch.dtype
) -> Tensor:
    number, tensor = split_tau(name, tau)
    if tensor is None:
        tensor = torch.full((), as_positive(name, "tau", number), dtype=dtype, device=logits.device)
    else:
        check_supported(name, "tau", tensor)
        check_broadcast(name, "tau", tensor, logits.narrow(dim, 0, 1))
        # The op looks at the values, where that does not mean to wait for a device.
        none_of_them = logits.detach().narrow(dim, 0, 0)
        state = torch.zeros(2, dtype=torch.int64)
        _gumbel_softmax(none_of_them, 1.0, tensor.detach(), False, dim, None, False, None, state)
    # A copy: clamp saves its input, and a parameter may change before the backward.
    tensor = tensor.to(logits.device, dtype, copy=True)
    return tensor.clamp(min=torch.finfo(dtype).smallest_normal)


def _relaxed(scores: Tensor, allowed: Tensor, k: int, tau: Tensor, dim: int) -> Tensor:
    """The sum of the softmaxes, in rows with fewer classes that of as many."""
    count = allowed.sum(dim, keepdim=True)
    y = torch.zeros_like(scores)
    # No quotient overflows: the derivative in tau would be 0 * inf.
    lowest = torch.finfo(scores.dtype).min / 4 * tau.detach().clamp(max=1)
    for j in range(k):
        live = count > j
        # Scores are kept as distances from the largest: no tau makes inf - inf of them, and an
        # offset of the row rounds nothing away.
        peak = scores.detach().amax(dim, keepdim=True)
        absent = (scores == -torch.inf) | ~live
        distance = (scores.masked_fill(absent, 0.0) - peak).masked_fill(absent, 0.0)
        log_a = torch.maximum(distance, lowest) / tau
        log_a = log_a.masked_fill(absent & live, -torch.inf).log_softmax(dim)
        a = log_a.exp()
        y = y + torch.where(live, a, torch.zeros_like(a))
        if j + 1 < k:
            scores = distance + _log_complement(log_a, a, count > j + 1, dim)
            scores = scores.masked_fill(absent, -torch.inf)
    return y


def _log_complement(log_a: Tensor, a: Tensor, more: Tensor, dim: int) -> Tensor:
    """``log(1 - a)``; 0 in rows that have no class ``more`` to choose.

    Of the largest entry, which may round to 1, it is the logarithm of the sum of the others.
    """
    top = log_a.detach().argmax(dim, keepdim=True)
    is_top = _marked(a, top, dim)
    # Finite, because a sum of nothing but exp(-inf) has no derivative.
    others = log_a.masked_fill(is_top, -torch.inf).clamp(min=torch.finfo(a.dtype).min / 4)
    others = torch.where(more, others, torch.zeros_like(others))
    of_top = others.logsumexp(dim, keepdim=True)
    rest = torch.log1p(-a.masked_fill(is_top, 0.0))
    return torch.where(more, torch.where(is_top, of_top, rest), torch.zeros_like(a))
