"""The samplers as modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor, nn

from gumbel_ext.deterministic import straight_through_softmax
from gumbel_ext.functional import gumbel_softmax
from gumbel_ext.temperature import TemperatureSchedule
from gumbel_ext.vector_quantizer import GumbelVectorQuantizer, QuantizedVectors

__all__ = ["GumbelSoftmax", "GumbelVectorQuantizer", "QuantizedVectors"]

EvalMode: TypeAlias = Literal["argmax", "softmax", "sample"]
_EVAL_MODES = ("argmax", "softmax", "sample")


class GumbelSoftmax(nn.Module):
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
        tau: the temperature, > 0 and finite. A number becomes the buffer ``tau``, float64 whatever
            the dtype of the module: write it in place (``module.tau.fill_(0.5)``) to anneal. A
            :class:`gumbel_ext.temperature.TemperatureSchedule` is read at every call; step it
            outside, and keep its own state in the checkpoint too, where it says how to go on. A
            module such as :class:`gumbel_ext.temperature.LearnableTemperature`, or any callable,
            is called without arguments and returns a tensor. None of these is compiled anew when
            the temperature changes.
        hard: whether samples are one-hot, with the straight-through gradient.
        dim: dimension of the classes.
        eval_mode: ``"argmax"``, ``"softmax"`` or ``"sample"``.

    Raises:
        TypeError: ``tau`` is neither a number, a schedule nor callable, or ``dim`` is not an int.
        ValueError: ``tau`` is not positive and finite, or ``eval_mode`` is none of the three.

    Example:
        >>> gate = GumbelSoftmax(tau=0.7, hard=True)
        >>> gate(torch.randn(4, 3)).sum(-1)
        tensor([1., 1., 1., 1.])
        >>> gate.eval()(torch.tensor([0.1, 2.0, -1.0]))
        tensor([0., 1., 0.])
    """

    tau: Any  # a buffer, a schedule, a module or another callable
    hard: bool
    dim: int
    eval_mode: EvalMode

    def __init__(
        self,
        tau: float | TemperatureSchedule | Callable[[], Tensor] = 1.0,
        hard: bool = False,
        dim: int = -1,
        eval_mode: EvalMode = "argmax",
    ) -> None:
        super().__init__()
        if not isinstance(dim, int):
            raise TypeError(f"GumbelSoftmax: dim must be an int, got {dim!r}")
        if eval_mode not in _EVAL_MODES:
            raise ValueError(
                f"GumbelSoftmax: eval_mode must be one of {_EVAL_MODES}, got {eval_mode!r}"
            )
        if isinstance(tau, TemperatureSchedule) or callable(tau):
            self.tau = tau
        elif isinstance(tau, bool) or not isinstance(tau, (int, float)):
            raise TypeError(
                "GumbelSoftmax: tau must be a number, a TemperatureSchedule or a callable, got "
                f"{tau!r} of type {type(tau).__name__}"
            )
        elif not 0 < tau < float("inf"):
            raise ValueError(f"GumbelSoftmax: tau must be positive and finite, got {tau}")
        else:
            self.register_buffer("tau", torch.tensor(tau, dtype=torch.float64))
        self.hard = hard
        self.dim = dim
        self.eval_mode = eval_mode

    def temperature(self) -> float | Tensor:
        """The temperature of the next call."""
        constant = not torch.compiler.is_compiling()
        if isinstance(self.tau, TemperatureSchedule):
            return self.tau.tau if constant else self.tau.tensor
        if not isinstance(self.tau, Tensor):
            made: Tensor = self.tau()
            return made
        # A number is cheaper for the operators than a tensor of one.
        plain = type(self.tau) is Tensor and self.tau.device.type == "cpu"
        differentiated = self.tau.requires_grad or torch._C._are_functorch_transforms_active()
        if constant and plain and not differentiated:
            return self.tau.item()
        return self.tau

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
        if self.eval_mode == "argmax":
            return straight_through_softmax(
                logits, self.temperature(), self.dim, mask=mask, return_index=return_index
            )
        if mask is None:
            y = logits.softmax(self.dim)
        else:
            allowed = mask.expand(logits.shape).any(self.dim, keepdim=True)
            # A row of -inf would be NaN, in its gradient too.
            kept = logits.masked_fill(allowed & ~mask, -torch.inf)
            y = kept.softmax(self.dim).masked_fill(~allowed, 0)
        if not return_index:
            return y
        return y, straight_through_softmax(
            logits.detach(), dim=self.dim, mask=mask, return_index=True
        )[1]

    def extra_repr(self) -> str:  # noqa: D102
        if isinstance(self.tau, Tensor):
            tau = f"tau={self.tau.item():g}, "
        elif isinstance(self.tau, TemperatureSchedule):
            tau = f"tau={self.tau!r}, "
        else:
            tau = "" if isinstance(self.tau, nn.Module) else f"tau={self.tau!r}, "
        return f"{tau}hard={self.hard}, dim={self.dim}, eval_mode={self.eval_mode!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GumbelSoftmax:
        before = self._buffers.get("tau")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self._buffers.get("tau")
        if before is not None and after is not None and after.dtype != before.dtype:
            # A temperature in bfloat16 has two digits.
            self._buffers["tau"] = before.to(after.device)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if isinstance(self.tau, TemperatureSchedule):
            destination[f"{prefix}tau"] = self.tau.tensor.clone()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        if not isinstance(self.tau, TemperatureSchedule):
            return
        key = f"{prefix}tau"
        if key in state_dict:
            self.tau.set(float(state_dict[key]))
            if key in unexpected_keys:
                unexpected_keys.remove(key)
        elif strict:
            missing_keys.append(key)
