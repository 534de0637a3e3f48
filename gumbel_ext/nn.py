"""The samplers as modules."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from gumbel_ext._arguments import (
    as_bool,
    as_int,
    as_positive,
    check_mask,
    check_supported,
    check_tensor,
    described,
    wrapped_dim,
)
from gumbel_ext._tempered import Temperature, Tempered
from gumbel_ext.deterministic import straight_through_softmax
from gumbel_ext.estimators import gapped_straight_through, gumbel_rao, reinmax, zgr
from gumbel_ext.functional import gumbel_softmax
from gumbel_ext.vector_quantizer import GumbelVectorQuantizer, QuantizedVectors

__all__ = [
    "ZGR",
    "GappedStraightThrough",
    "GumbelRao",
    "GumbelSoftmax",
    "GumbelVectorQuantizer",
    "QuantizedVectors",
    "ReinMax",
]

EvalMode: TypeAlias = Literal["argmax", "softmax", "sample"]
_EVAL_MODES = ("argmax", "softmax", "sample")


def _class_probabilities(
    name: str, logits: Tensor, dim: int, mask: Tensor | None, return_index: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """The softmax of a module in evaluation; its arguments may be those of a tracer."""
    if has_torch_function((logits, mask)):
        overridden: Tensor | tuple[Tensor, Tensor] = handle_torch_function(
            _class_probabilities, (logits, mask), name, logits, dim, mask, return_index
        )
        return overridden
    check_tensor(name, "logits", logits)
    check_supported(name, "logits", logits)
    dim = wrapped_dim(name, dim, logits)
    if mask is None:
        y = logits.softmax(dim)
    else:
        check_mask(name, mask, logits)
        allowed = mask.expand(logits.shape).any(dim, keepdim=True)
        # A row of -inf would be NaN, in its gradient too.
        kept = logits.masked_fill(allowed & ~mask, -torch.inf)
        y = kept.softmax(dim).masked_fill(~allowed, 0)
    if not as_bool(name, "return_index", return_index):
        return y
    return y, straight_through_softmax(logits.detach(), dim=dim, mask=mask, return_index=True)[1]


class _Sampler(nn.Module):
    """Samples in training; in evaluation what ``eval_mode`` says."""

    dim: int
    eval_mode: EvalMode

    def __init__(self, dim: int, eval_mode: EvalMode) -> None:
        super().__init__()
        name = type(self).__name__
        if eval_mode not in _EVAL_MODES:
            raise ValueError(
                f"{name}: eval_mode must be one of {_EVAL_MODES}, got {described(eval_mode)}"
            )
        self.dim = as_int(name, "dim", dim)
        self.eval_mode = eval_mode

    def temperature(self) -> float | Tensor:
        """The temperature of the next call."""
        return 1.0

    def _sample(
        self,
        logits: Tensor,
        mask: Tensor | None,
        return_index: bool,
        generator: torch.Generator | None,
        rng_state: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        raise NotImplementedError

    @overload
    def forward(
        self,
        logits: Tensor,
        *,
        mask: Tensor | None = ...,
        return_index: Literal[False] = ...,
        generator: torch.Generator | None = ...,
        rng_state: Tensor | None = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        logits: Tensor,
        *,
        mask: Tensor | None = ...,
        return_index: bool,
        generator: torch.Generator | None = ...,
        rng_state: Tensor | None = ...,
    ) -> Tensor | tuple[Tensor, Tensor]: ...

    def forward(
        self,
        logits: Tensor,
        *,
        mask: Tensor | None = None,
        return_index: bool = False,
        generator: torch.Generator | None = None,
        rng_state: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Samples, or in evaluation what ``eval_mode`` says.

        Args:
            logits: unnormalised log-probabilities, see :func:`gumbel_ext.gumbel_softmax`.
            mask: bool tensor that broadcasts to ``logits``; True = may be chosen. A row without any
                True gives zeros, index -1 and zero gradient.
            return_index: whether to also return the index: of the largest ``logits + noise``, or in
                evaluation without samples of the largest logit.
            generator: of the noise, see :func:`gumbel_ext.gumbel_softmax`; not read where no noise
                is.
            rng_state: likewise.

        Returns:
            ``y``, of the shape and dtype of ``logits``; with ``return_index=True`` also an int64
            tensor of that shape without ``dim``.

        Raises:
            TypeError, ValueError, IndexError, RuntimeError: as :func:`gumbel_ext.gumbel_softmax`.
        """
        if self.training or self.eval_mode == "sample":
            return self._sample(logits, mask, return_index, generator, rng_state)
        if self.eval_mode == "argmax":
            return straight_through_softmax(
                logits, self.temperature(), self.dim, mask=mask, return_index=return_index
            )
        return _class_probabilities(type(self).__name__, logits, self.dim, mask, return_index)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, eval_mode={self.eval_mode!r}"


class _TemperedSampler(Tempered, _Sampler):
    """One with a temperature, which is part of its state."""

    tau: Any  # a buffer, a schedule, a module or another callable

    def __init__(self, tau: Temperature, dim: int, eval_mode: EvalMode) -> None:
        super().__init__(dim, eval_mode)
        self.tau = tau

    def temperature(self) -> float | Tensor:
        """The temperature of the next call."""
        return self._temperature_of_call()

    def _own_repr(self) -> str:
        return ""

    def extra_repr(self) -> str:
        tau = self._repr_of_temperature()
        return f"{tau}{', ' if tau else ''}{self._own_repr()}{super().extra_repr()}"


class GumbelSoftmax(_TemperedSampler):
    r"""Samples from the Gumbel-softmax distribution in training; as chosen in evaluation.

    In ``train()`` this is :func:`gumbel_ext.gumbel_softmax`. In ``eval()``, by ``eval_mode``:

    - ``"argmax"``: the one-hot vector of the largest logit, the mode of the distribution
      (:func:`gumbel_ext.straight_through_softmax`, which has a gradient);
    - ``"softmax"``: the class probabilities :math:`\operatorname{softmax}(l)`, the mean of hard
      samples, at any temperature;
    - ``"sample"``: samples, as in training.

    The state of the module has one entry ``tau``, the temperature, so that a checkpoint restores an
    annealed one; a module that makes the temperature has its own entries instead.

    Args:
        tau: the temperature, > 0 and finite. A number, or a tensor that broadcasts as that of
            :func:`gumbel_ext.gumbel_softmax`, becomes the buffer ``tau``, float64 whatever the
            dtype of the module: assign another (``module.tau = 0.5``) to anneal. A
            :class:`gumbel_ext.temperature.TemperatureSchedule` is read at every call; step it
            outside, and keep its own state in the checkpoint too, where it says how to go on. A
            module such as :class:`gumbel_ext.temperature.LearnableTemperature`, or any callable,
            is called without arguments and returns a tensor. Any of these may be assigned to
            ``module.tau``, and none is compiled anew when the temperature changes.
        hard: whether samples are one-hot, with the straight-through gradient.
        dim: dimension of the classes.
        eval_mode: ``"argmax"``, ``"softmax"`` or ``"sample"``.

    Raises:
        TypeError: ``tau`` is neither a number, a tensor, a schedule nor callable, or ``dim`` is not
            an int, or ``hard`` not a bool.
        ValueError: ``tau`` is not positive and finite or requires a gradient, or ``eval_mode`` is
            none of the three.

    Example:
        >>> gate = GumbelSoftmax(tau=0.7, hard=True)
        >>> gate(torch.randn(4, 3)).sum(-1)
        tensor([1., 1., 1., 1.])
        >>> gate.eval()(torch.tensor([0.1, 2.0, -1.0]))
        tensor([0., 1., 0.])
    """

    hard: bool

    def __init__(
        self,
        tau: Temperature = 1.0,
        hard: bool = False,
        dim: int = -1,
        eval_mode: EvalMode = "argmax",
    ) -> None:
        super().__init__(tau, dim, eval_mode)
        self.hard = as_bool(type(self).__name__, "hard", hard)

    def _sample(
        self,
        logits: Tensor,
        mask: Tensor | None,
        return_index: bool,
        generator: torch.Generator | None,
        rng_state: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return gumbel_softmax(
            logits,
            self.temperature(),
            self.hard,
            dim=self.dim,
            mask=mask,
            return_index=return_index,
            generator=generator,
            rng_state=rng_state,
        )

    def _own_repr(self) -> str:
        return f"hard={self.hard}, "


class GumbelRao(_TemperedSampler):
    """Hard samples with the Gumbel-Rao gradient (:func:`gumbel_ext.gumbel_rao`) in training.

    Args:
        tau: the temperature of the gradient, as in :class:`GumbelSoftmax`, but not one that is
            learnt: the estimator has no gradient of it.
        k: the number of conditional draws, at least 1.
        dim: dimension of the classes.
        eval_mode: ``"argmax"``, ``"softmax"`` or ``"sample"``, as in :class:`GumbelSoftmax`.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of its range.
    """

    k: int

    def __init__(
        self,
        tau: Temperature = 1.0,
        k: int = 10,
        dim: int = -1,
        eval_mode: EvalMode = "argmax",
    ) -> None:
        super().__init__(tau, dim, eval_mode)
        self.k = as_int(type(self).__name__, "k", k, 1)

    def _sample(
        self,
        logits: Tensor,
        mask: Tensor | None,
        return_index: bool,
        generator: torch.Generator | None,
        rng_state: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return gumbel_rao(
            logits,
            self.temperature(),
            self.k,
            self.dim,
            mask=mask,
            return_index=return_index,
            generator=generator,
            rng_state=rng_state,
        )

    def _own_repr(self) -> str:
        return f"k={self.k}, "


class ZGR(_Sampler):
    """Hard samples with the ZGR gradient (:func:`gumbel_ext.zgr`) in training. Has no state.

    Args:
        dim: dimension of the classes.
        eval_mode: ``"argmax"``, ``"softmax"`` or ``"sample"``, as in :class:`GumbelSoftmax`; the
            gradient of ``"argmax"`` is that of temperature 1.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of its range.
    """

    def __init__(self, dim: int = -1, eval_mode: EvalMode = "argmax") -> None:
        super().__init__(dim, eval_mode)

    def _sample(
        self,
        logits: Tensor,
        mask: Tensor | None,
        return_index: bool,
        generator: torch.Generator | None,
        rng_state: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return zgr(
            logits,
            self.dim,
            mask=mask,
            return_index=return_index,
            generator=generator,
            rng_state=rng_state,
        )


class ReinMax(_TemperedSampler):
    """Hard samples with the ReinMax gradient (:func:`gumbel_ext.reinmax`) in training.

    Args:
        tau: the temperature of the gradient, as in :class:`GumbelSoftmax`, but not one that is
            learnt: the estimator has no gradient of it.
        dim: dimension of the classes.
        eval_mode: ``"argmax"``, ``"softmax"`` or ``"sample"``, as in :class:`GumbelSoftmax`.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of its range.
    """

    def __init__(
        self,
        tau: Temperature = 1.0,
        dim: int = -1,
        eval_mode: EvalMode = "argmax",
    ) -> None:
        super().__init__(tau, dim, eval_mode)

    def _sample(
        self,
        logits: Tensor,
        mask: Tensor | None,
        return_index: bool,
        generator: torch.Generator | None,
        rng_state: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return reinmax(
            logits,
            self.temperature(),
            self.dim,
            mask=mask,
            return_index=return_index,
            generator=generator,
            rng_state=rng_state,
        )


class GappedStraightThrough(_TemperedSampler):
    """Hard samples with the gapped straight-through gradient in training.

    See :func:`gumbel_ext.gapped_straight_through`.

    Args:
        tau: the temperature of the gradient, as in :class:`GumbelSoftmax`, but not one that is
            learnt: the estimator has no gradient of it.
        gap: a number > 0, or None for the one that goes with the probability of the sample.
        dim: dimension of the classes.
        eval_mode: ``"argmax"``, ``"softmax"`` or ``"sample"``, as in :class:`GumbelSoftmax`.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of its range.
    """

    gap: float | None

    def __init__(
        self,
        tau: Temperature = 1.0,
        gap: float | None = 1.0,
        dim: int = -1,
        eval_mode: EvalMode = "argmax",
    ) -> None:
        super().__init__(tau, dim, eval_mode)
        if gap is not None:
            gap = as_positive(type(self).__name__, "gap", gap, "a number or None")
        self.gap = gap

    def _sample(
        self,
        logits: Tensor,
        mask: Tensor | None,
        return_index: bool,
        generator: torch.Generator | None,
        rng_state: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return gapped_straight_through(
            logits,
            self.temperature(),
            self.gap,
            self.dim,
            mask=mask,
            return_index=return_index,
            generator=generator,
            rng_state=rng_state,
        )

    def _own_repr(self) -> str:
        return f"gap={self.gap}, "
