"""Puts this package's Gumbel-softmax in the place of :func:`torch.nn.functional.gumbel_softmax`."""

from __future__ import annotations

import functools
import threading
import warnings
from types import TracebackType
from typing import Any, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.overrides import handle_torch_function, has_torch_function

from gumbel_ext import functional

__all__ = ["PatchHandle", "patch_torch"]

_lock = threading.Lock()
_handles: set[PatchHandle] = set()
_replaced: Any = F.gumbel_softmax


# The signature is F.gumbel_softmax's and no more: torch.jit.script takes no keyword-only arguments,
# and others compare signatures.
def gumbel_softmax(
    logits: Tensor,
    tau: Union[int, float] = 1,  # noqa: UP007 (as TorchScript reads it)
    hard: bool = False,
    eps: float = 1e-10,
    dim: int = -1,
) -> Tensor:
    """What :func:`patch_torch` puts into ``torch.nn.functional``.

    :func:`gumbel_ext.gumbel_softmax` with the signature of the function it replaces.
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        y: Tensor = torch.ops.gumbel_ext.gumbel_softmax(
            logits, float(tau), None, hard, dim, None, False, None, None
        )[0]
        return y
    if has_torch_function((logits, tau)):
        overridden: Tensor = _overridden(logits, tau, hard, eps, dim)
        return overridden
    if eps != 1e-10:
        warnings.warn("`eps` parameter is deprecated and has no effect.", stacklevel=2)
    # The original takes for True whatever Python does.
    return functional.gumbel_softmax(logits, tau, bool(hard), dim=dim)


class _KnownFunction:
    """The replacement, to those who know the function that it replaces.

    Handlers of ``__torch_function__`` find it under either name in their tables, which were mostly
    made before the patch; called, it is the replacement.
    """

    def __init__(self) -> None:
        functools.update_wrapper(self, _replaced)
        self.known = _replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return gumbel_softmax(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, _KnownFunction):
            return self.known is other.known
        return other is self.known or other is gumbel_softmax

    def __hash__(self) -> int:
        return hash(self.known)


# Handlers compare the function with those they know, which Dynamo cannot follow for an object.
@_disable_dynamo
def _overridden(logits: Tensor, tau: Any, hard: bool, eps: float, dim: int) -> Any:
    arguments = {"tau": tau, "hard": hard, "eps": eps, "dim": dim}
    try:
        return handle_torch_function(_KnownFunction(), (logits, tau), logits, **arguments)
    except TypeError as error:
        if not str(error).startswith("no implementation found for "):
            raise
    # For tables that were made while the patch was there, whose hash is another.
    return handle_torch_function(gumbel_softmax, (logits, tau), logits, **arguments)


class PatchHandle:
    """Undoes one call of :func:`patch_torch`: by :meth:`remove`, or at the end of a ``with``."""

    def remove(self) -> None:
        """Undoes the patch, unless other handles still hold it. A second call does nothing."""
        with _lock:
            if self not in _handles:
                return
            _handles.remove(self)
            if _handles:
                return
            if F.gumbel_softmax is gumbel_softmax:
                F.gumbel_softmax = _replaced
                return
        warnings.warn(
            f"torch.nn.functional.gumbel_softmax was replaced by {F.gumbel_softmax!r} after "
            "patch_torch(), and is left as it is",
            RuntimeWarning,
            stacklevel=2,
        )

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def patch_torch() -> PatchHandle:
    """Replaces ``torch.nn.functional.gumbel_softmax``, so that code not one's own runs on this one.

    Every caller that looks the function up when it calls it gets the replacement: all that say
    ``F.gumbel_softmax(...)`` or ``torch.nn.functional.gumbel_softmax(...)``, also when compiled
    before (Dynamo guards on the function; a model compiled under both keeps both graphs) or
    scripted from then on. A module that said ``from torch.nn.functional import gumbel_softmax``
    earlier has its own reference, which cannot be reached: patch before it is imported, or set its
    attribute.

    The patch is of the process, not of the thread: while it holds, all threads see it, and so do
    processes forked from this one, but not those that are spawned. Calls nest, and may be undone in
    any order; the original comes back with the last handle that is removed.

    Where this differs from the original: a ``tau`` that is not positive and finite is an error
    (there: NaN, or samples of another distribution), and so is a ``tau`` tensor that varies along
    ``dim`` or is larger than ``logits``; samples have the memory format of ``logits``; a call takes
    one seed from the generator, so samples for a given seed are other ones. ``__torch_function__``
    is given an object that equals the original, and hashes like it, and is not identical to it. The
    backward of a hard sample reads ``logits``, not the soft sample: to change what a network made
    of its input in place before it is an error, and a write through their ``.data`` goes unseen, as
    in every operation that saves its input. Leaves, such as parameters, are copied, but for the
    inputs of graphs that ``torch.compile`` makes: step an optimizer after the backward.

    Returns:
        A handle: keep it to call ``remove()``, or use it in a ``with`` statement. Dropping it
        leaves the patch in place.

    Example:
        >>> with gumbel_ext.patch_torch():
        ...     loss = model(batch).loss
    """
    global _replaced
    handle = PatchHandle()
    with _lock:
        if F.gumbel_softmax is not gumbel_softmax:
            _replaced = F.gumbel_softmax
            F.gumbel_softmax = gumbel_softmax
        _handles.add(handle)
    return handle
