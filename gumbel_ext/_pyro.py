"""What Pyro asks of a distribution beyond what torch's own have, without depending on Pyro."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Distribution

__all__ = ["PyroDistribution"]


class PyroDistribution(Distribution):
    """A distribution that ``pyro.sample`` takes as it takes those of ``pyro.distributions``.

    Pyro knows its distributions by a mixin, which gives them ``to_event``, ``mask``, ``expand_by``,
    ``score_parts`` and more. A class can inherit it only where Pyro is installed, and importing
    Pyro takes seconds. So the class is registered as a virtual subclass of the mixin, and finds the
    methods there, as soon as somebody else has imported Pyro.
    """

    def __init__(
        self, batch_shape: torch.Size, event_shape: torch.Size, validate_args: bool | None = None
    ) -> None:
        if not torch.compiler.is_compiling():
            _mixin()
        # Not by super(): a torch class further on would take other arguments.
        Distribution.__init__(self, batch_shape, event_shape, validate_args=validate_args)

    def __call__(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """A sample, as Pyro draws it: ``rsample``, or ``sample`` after ``has_rsample_(False)``."""
        shape = torch.Size(sample_shape)
        return self.rsample(shape) if self.has_rsample else self.sample(shape)

    @property
    def event_dim(self) -> int:
        """Number of dimensions of a single sample."""
        return len(self.event_shape)

    # Hidden from type checkers, to which every misspelt name would be an attribute.
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            mixin = None if name.startswith("_") else _mixin()
            found = getattr(mixin, name, None)
            if found is None:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            # A function of the mixin is bound to this object.
            return found.__get__(self, type(self)) if callable(found) else found


_registered: set[type] = set()


def _mixin() -> Any:
    """Pyro's mixin, with :class:`PyroDistribution` registered there; None without Pyro."""
    module = sys.modules.get("pyro.distributions.torch_distribution")
    # It is None, too, while the module is being imported.
    mixin: Any = getattr(module, "TorchDistributionMixin", None)
    classes = sys.modules.get("pyro.distributions.torch")
    if mixin is not None and mixin not in _registered and hasattr(classes, "__all__"):
        mixin.register(PyroDistribution)
        # What is a class of torch's is Pyro's of the same name, as its reparametrisers ask for.
        for ours in _subclasses(PyroDistribution):
            for base in ours.__bases__:
                if base.__module__.startswith("torch.distributions."):
                    getattr(classes, base.__name__).register(ours)
        _registered.add(mixin)
    return mixin


def _subclasses(cls: type[Distribution]) -> Iterator[type[Distribution]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
