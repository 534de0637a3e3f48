"""A layer that replaces vectors by rows of learnt codebooks. Public as ``gumbel_ext.nn``'s."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gumbel_ext._arguments import as_bool, as_int, check_supported, check_tensor
from gumbel_ext._tempered import Temperature, Tempered
from gumbel_ext.embedding import gumbel_embedding

__all__ = ["GumbelVectorQuantizer", "QuantizedVectors"]


class QuantizedVectors(NamedTuple):
    """What a :class:`GumbelVectorQuantizer` returns for vectors ``[..., input_dim]``."""

    #: ``[..., vq_dim]``, the rows that were chosen of each group's codebook, side by side.
    codevectors: Tensor
    #: int64 ``[..., groups]``, which rows they are.
    codes: Tensor
    #: Number: how many codes are in use, from ``groups`` to ``groups * num_vars``. Summed over the
    #: groups, exp of the entropy of the share of rows that chose each code. Without gradient.
    code_perplexity: Tensor
    #: The same of the mean of ``softmax(logits)``, with a gradient: what the diversity loss raises.
    prob_perplexity: Tensor


def _perplexity(shares: Tensor) -> Tensor:
    # The derivative of xlogy is infinite at 0, and the softmax's there 0.
    tiny = torch.finfo(shares.dtype).smallest_normal
    return torch.exp(-(shares * shares.clamp(min=tiny).log()).sum(-1)).sum()


class _Projection(nn.Linear):
    """To logits; initialised as in Transformers, by whoever resets the modules of a model."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)

    def _get_name(self) -> str:
        return "Linear"


class GumbelVectorQuantizer(Tempered):
    r"""Quantises vectors with groups of codebooks, by Gumbel-softmax samples.

    .. math::
        l = A x + b, \qquad q = \operatorname{concat}_{g} W_g[k_g], \qquad
        k_g = \arg\max_i (l_{g,i} + \text{noise})

    The quantiser of vq-wav2vec (Baevski et al., arXiv 1910.05453, section 3.1) and wav2vec 2.0
    (Baevski et al., arXiv 2006.11477, section 2), on :func:`gumbel_ext.gumbel_embedding`. In
    ``train()`` the codes are samples with the straight-through gradient, in ``eval()`` those of the
    largest logits, with a gradient for the codebook alone.

    Parameters are named and shaped as in Transformers' ``Wav2Vec2GumbelVectorQuantizer``, whose
    ``state_dict`` can be loaded: ``weight_proj.weight``, ``weight_proj.bias`` and ``codevectors``,
    ``[1, groups * num_vars, vq_dim / groups]``; and initialised as there.

    Args:
        input_dim: size of the vectors.
        num_vars: codes in a group, V.
        groups: groups, G, each with a codebook and an index of its own.
        vq_dim: size of the result, divisible by ``groups``.
        temperature: a number > 0; a :class:`gumbel_ext.temperature.TemperatureSchedule`, stepped
            outside; a module such as :class:`gumbel_ext.temperature.LearnableTemperature`, or any
            callable without arguments that returns a tensor. wav2vec 2.0's is
            ``ExponentialTemperature(rate=-math.log(0.999995), minimum=0.5, start=2.0)``. Not in the
            ``state_dict`` unless it is a module. Any of these may be assigned to the attribute
            ``temperature``, which holds a number as a float64 tensor.
        hard: whether training takes one row of each codebook; else means of rows.

    Raises:
        TypeError: a size is not an int, or ``temperature`` is neither a number, a schedule nor
            callable.
        ValueError: a size is not positive, ``vq_dim`` is not divisible by ``groups``, or
            ``temperature`` is not positive and finite.

    Example:
        >>> quantizer = GumbelVectorQuantizer(input_dim=512, num_vars=320, groups=2, vq_dim=256)
        >>> q = quantizer(torch.randn(4, 100, 512))
        >>> q.codevectors.shape, q.codes.shape
        (torch.Size([4, 100, 256]), torch.Size([4, 100, 2]))
    """

    temperature: Any  # a buffer, a schedule, a module or another callable

    _name_of_temperature: ClassVar[str] = "temperature"
    _in_state: ClassVar[bool] = False

    def __init__(
        self,
        input_dim: int,
        num_vars: int = 320,
        groups: int = 2,
        vq_dim: int = 256,
        temperature: Temperature = 2.0,
        hard: bool = True,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        input_dim, num_vars = (
            as_int(name, "input_dim", input_dim, 1),
            as_int(name, "num_vars", num_vars, 1),
        )
        groups, vq_dim = as_int(name, "groups", groups, 1), as_int(name, "vq_dim", vq_dim, 1)
        if vq_dim % groups != 0:
            raise ValueError(f"{name}: vq_dim must be divisible by groups, {groups}, got {vq_dim}")
        self.input_dim = input_dim
        self.num_vars = num_vars
        self.groups = groups
        self.vq_dim = vq_dim
        self.hard = as_bool(name, "hard", hard)
        self.temperature = temperature
        self.weight_proj = _Projection(input_dim, groups * num_vars)
        self.codevectors = nn.Parameter(torch.empty(1, groups * num_vars, vq_dim // groups))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters anew: normal logits, and codes uniform in [0, 1).

        The temperature is the one it was at first.
        """
        super().reset_parameters()
        self.weight_proj.reset_parameters()
        nn.init.uniform_(self.codevectors)

    def forward(
        self,
        features: Tensor,
        *,
        time_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        rng_state: Tensor | None = None,
    ) -> QuantizedVectors:
        """Quantises each vector.

        Args:
            features: ``[..., input_dim]``, of the dtype of the parameters.
            time_mask: bool ``[...]``; True = counts in the perplexities. Padding is quantised too.
                Of no vectors at all the perplexities are ``groups``.
            generator: of the noise, see :func:`gumbel_ext.gumbel_softmax`; not read in evaluation.
            rng_state: likewise.

        Returns:
            ``codevectors`` of the dtype of the codebook, ``codes``, and the perplexities in
            float32 (float64 for float64).

        Raises:
            TypeError: ``features`` or ``time_mask`` is not a tensor, or ``time_mask`` is not bool.
            ValueError: ``features`` or ``time_mask`` is of a wrong shape.
            TypeError, ValueError, RuntimeError: as :func:`gumbel_ext.gumbel_softmax`.
        """
        name = type(self).__name__
        check_tensor(name, "features", features)
        check_supported(name, "features", features)
        if features.dim() == 0 or features.shape[-1] != self.input_dim:
            raise ValueError(
                f"{name}: features must be of shape [..., {self.input_dim}], got shape "
                f"{list(features.shape)}"
            )
        counted = None
        if time_mask is not None:
            check_tensor(name, "time_mask", time_mask)
            if time_mask.dtype != torch.bool:
                raise TypeError(f"{name}: time_mask must have dtype bool, got {time_mask.dtype}")
            if time_mask.shape != features.shape[:-1]:
                raise ValueError(
                    f"{name}: time_mask must be of shape {list(features.shape[:-1])}, that of "
                    f"features without the last dimension, got shape {list(time_mask.shape)}"
                )
            counted = time_mask.reshape(-1, 1)

        logits = self.weight_proj(features)
        of_groups = logits.unflatten(-1, (self.groups, self.num_vars))
        codebook = self.codevectors.view(self.groups, self.num_vars, -1)
        if self.training:
            codevectors, index = gumbel_embedding(
                logits,
                codebook,
                self._temperature_of_call(),
                self.hard,
                return_index=True,
                generator=generator,
                rng_state=rng_state,
            )
        else:
            index = of_groups.detach().argmax(-1)
            codevectors = F.embedding(self._flat(index), self.codevectors[0]).flatten(-2)

        probs = of_groups.flatten(0, -3) if of_groups.dim() > 2 else of_groups.unsqueeze(0)
        probs = probs.float() if probs.dtype != torch.float64 else probs
        probs = probs.softmax(-1)
        # How many of each code there are: whole numbers, which any order of adding gives.
        steps = probs.detach().new_ones(probs.shape[0], self.groups)
        if counted is not None:
            steps = steps * counted
            probs = probs.masked_fill(~counted.unsqueeze(-1), 0)
        total = steps[:, 0].sum().clamp(min=1)
        counts = probs.detach().new_zeros(self.groups * self.num_vars)
        counts = counts.scatter_add(0, self._flat(index).flatten(), steps.flatten())
        return QuantizedVectors(
            codevectors,
            index,
            _perplexity(counts.view(self.groups, self.num_vars) / total),
            _perplexity(probs.sum(0) / total),
        )

    def _flat(self, index: Tensor) -> Tensor:
        """As rows of the codebooks of all groups one after the other."""
        return index + self.num_vars * torch.arange(self.groups, device=index.device)

    def extra_repr(self) -> str:  # noqa: D102
        temperature = self._repr_of_temperature()
        return (
            f"input_dim={self.input_dim}, num_vars={self.num_vars}, groups={self.groups}, "
            f"vq_dim={self.vq_dim}{', ' if temperature else ''}{temperature}, hard={self.hard}"
        )
