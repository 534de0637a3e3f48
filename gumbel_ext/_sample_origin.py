"""How relaxed samples were made, for as long as they live.

A sample at a low temperature has entries too small for its dtype, which are exact zeros (and, of a
binary one, exact ones). The density there is zero or infinite, and its gradient NaN, though the
logarithm of the entry was an ordinary number. With the state of the noise that number can be made
again, so the density needs nothing kept beyond the arguments of the call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["SampleOrigin", "can_be_remembered", "recall", "remember"]


class SampleOrigin(NamedTuple):
    """The arguments of the call that returned a sample."""

    logits: Tensor  # expanded to the shape of the sample: a view, which takes no memory
    tau: float | Tensor
    rng_state: Tensor
    requires_grad: bool
    versions: tuple[int, ...]


_origins = WeakTensorKeyDictionary()


def can_be_remembered(logits: Tensor) -> bool:
    """Whether a sample from ``logits`` is an object of its own that can be found again.

    It is none in a traced program, under a functorch transform every call wraps it anew, and a
    CUDA graph is replayed without Python.
    """
    return not (
        torch.compiler.is_compiling()
        or type(logits) not in (Tensor, torch.nn.Parameter)
        or torch.is_inference_mode_enabled()
        or torch._C._functorch.maybe_current_level() is not None
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or (logits.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def remember(sample: Tensor, logits: Tensor, tau: float | Tensor, rng_state: Tensor) -> None:
    """Keeps the origin of ``sample`` until ``sample`` is gone."""
    versions = _versions(sample, logits, tau, rng_state)
    if not sample.requires_grad:
        # Drawn without gradient, as the view of the logits was made: neither shall its density have
        # one by way of the sample.
        tau = tau.detach() if isinstance(tau, Tensor) else tau
    _origins[sample] = SampleOrigin(logits, tau, rng_state, sample.requires_grad, versions)


def recall(value: Tensor) -> SampleOrigin | None:
    """The origin of exactly this tensor, or None.

    None, too, if the sample or what it was made from was changed in place since, as an optimizer
    does, or if the sample's own gradient was asked for: made again, it would not depend on it.
    """
    if torch.compiler.is_compiling():
        return None
    origin: SampleOrigin | None = _origins.get(value)
    if (
        origin is None
        or value.requires_grad != origin.requires_grad
        or value.retains_grad
        or origin.versions != _versions(value, origin.logits, origin.tau, origin.rng_state)
    ):
        return None
    return origin


def _versions(*arguments: float | Tensor) -> tuple[int, ...]:
    """How often each was changed in place; a tensor and its views count together."""
    return tuple(x._version for x in arguments if isinstance(x, Tensor))
