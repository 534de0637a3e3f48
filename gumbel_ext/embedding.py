"""Codebook lookup: a Gumbel-softmax sample times a codebook, without the sample.

``docs/codebook.md`` says what is computed, and what it takes beside ``one_hot @ weight``.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from gumbel_ext._arguments import as_bool, as_int, check_local, checked_state, split_tau

__all__ = ["gumbel_embedding"]

Number: TypeAlias = float | int

_gumbel_embedding = torch.ops.gumbel_ext.gumbel_embedding.default


@overload
def gumbel_embedding(
    logits: Tensor,
    weight: Tensor,
    tau: Number | Tensor = ...,
    hard: bool = ...,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_index: Literal[False] = ...,
    generator: torch.Generator | None = ...,
    rng_state: Tensor | None = ...,
) -> Tensor: ...


@overload
def gumbel_embedding(
    logits: Tensor,
    weight: Tensor,
    tau: Number | Tensor = ...,
    hard: bool = ...,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_index: Literal[True],
    generator: torch.Generator | None = ...,
    rng_state: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def gumbel_embedding(
    logits: Tensor,
    weight: Tensor,
    tau: Number | Tensor = ...,
    hard: bool = ...,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_index: bool,
    generator: torch.Generator | None = ...,
    rng_state: Tensor | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def gumbel_embedding(
    logits: Tensor,
    weight: Tensor,
    tau: Number | Tensor = 1,
    hard: bool = True,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
    return_index: bool = False,
    generator: torch.Generator | None = None,
    rng_state: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Looks up rows of a codebook by Gumbel-softmax samples, differentiably.

    .. math::
        o = y^\top W, \qquad y = \operatorname{gumbel\_softmax}(l, \tau, \text{hard})

    (Jang et al., arXiv 1611.01144, for :math:`y`; as in the quantisers of vq-wav2vec, Baevski et
    al., arXiv 1910.05453, and of the discrete VAE of Ramesh et al., arXiv 2102.12092.) With
    ``hard=True`` the value is row :math:`k = \arg\max_i (l_i + g_i)` of ``weight``, the index that
    :func:`gumbel_softmax` draws from the same generator state or ``rng_state``, and the gradients
    are those of ``gumbel_softmax(logits, tau, hard=True) @ weight``:

    .. math::
        \partial W_i = \sum_{n: k_n = i} \partial o_n, \qquad
        \partial l = J_\tau(l + g) \, W \partial o

    with :math:`J_\tau(z)` the Jacobian of :math:`\operatorname{softmax}(z / \tau)`
    (straight-through). The sample is nowhere in memory: besides ``logits`` and what they return,
    the forward takes memory for the rows alone and the backward for a tile of rows, which is
    computed again from the noise; so do both with ``hard=False``.

    Differentiable any number of times, in reverse and forward mode, also by :mod:`torch.func`;
    derivatives of the second order, those of forward mode and those inside a transform are
    computed from the sample itself. Under :func:`torch.vmap` as :func:`gumbel_softmax`.

    Args:
        logits: unnormalised log-probabilities, any shape with at least one dimension, float16,
            bfloat16, float32 or float64.
        weight: the codebook, of shape ``[C, D]`` for ``C`` classes of ``logits``; or of shape
            ``[G, V, D]`` for ``C = G * V`` classes in ``G`` groups, one after the other, each of
            which has a codebook and a sample of its own. Of any of these dtypes, not only that of
            ``logits``.
        tau: temperature, see :func:`gumbel_softmax`; common to the groups.
        hard: whether to look up rows, with the straight-through gradient; else means of rows.
        dim: dimension of the classes.
        mask: bool tensor that broadcasts to ``logits``; True = may be chosen. Where it forbids all
            classes the result is 0, the index -1 and the gradient 0.
        return_index: whether to also return the index of the largest ``logits + noise``.
        generator: see :func:`gumbel_softmax`.
        rng_state: see :func:`gumbel_softmax`.

    Returns:
        A contiguous tensor of the shape of ``logits`` with ``dim`` of size ``D``, or ``G * D``,
        and of the dtype of ``weight``, as :func:`torch.nn.functional.embedding` has it and with
        ``torch.autocast`` too. A row whose logits have a NaN, or are all -inf, is NaN. With
        ``return_index=True`` also an int64 tensor of the shape of ``logits`` without ``dim``, or
        with ``dim`` of size ``G``; indices count the classes of a group.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`gumbel_softmax`.
        TypeError: ``weight`` is not a tensor or of another dtype.
        ValueError: ``weight`` is of another shape or on another device, or ``logits`` has no
            dimension.

    Example:
        >>> logits, codebook = torch.randn(8, 100, 320), torch.randn(320, 128)
        >>> gumbel_embedding(logits, codebook, tau=0.5).shape
        torch.Size([8, 100, 128])
        >>> images = torch.randn(2, 320, 7, 7)  # two groups of 160 classes
        >>> gumbel_embedding(images, codebook.view(2, 160, 128), dim=1).shape
        torch.Size([2, 256, 7, 7])
    """
    if has_torch_function((logits, weight, tau, mask, rng_state)):
        overridden: Tensor | tuple[Tensor, Tensor] = handle_torch_function(
            gumbel_embedding,
            (logits, weight, tau, mask, rng_state),
            logits,
            weight,
            tau,
            hard,
            dim,
            mask=mask,
            return_index=return_index,
            generator=generator,
            rng_state=rng_state,
        )
        return overridden
    dim, hard = as_int("gumbel_embedding", "dim", dim), as_bool("gumbel_embedding", "hard", hard)
    return_index = as_bool("gumbel_embedding", "return_index", return_index)
    rng_state = checked_state("gumbel_embedding", logits, mask, generator, rng_state)
    check_local("gumbel_embedding", "weight", weight)
    tau_number, tau_tensor = split_tau("gumbel_embedding", tau)
    out, index, _ = _gumbel_embedding(
        logits, weight, tau_number, tau_tensor, hard, dim, mask, generator, rng_state
    )
    return (out, index) if return_index else out
