"""Keeps compilers from merging two calls of a random op with equal arguments, which draw twice.

AOTAutograd eliminates common subexpressions in training graphs. What is random it knows from a list
of its own, not from the tag ``nondeterministic_seeded``.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

__all__ = ["keep_equal_calls_apart"]

_MODULE = "torch._functorch.compile_utils"


def keep_equal_calls_apart() -> None:
    """Adds this package's random ops to the list, now or as soon as there is one.

    Importing the module takes half a second, which only those who compile should pay.
    """
    module = sys.modules.get(_MODULE)
    if module is not None:
        _add_to(module)
    else:
        sys.meta_path.insert(0, _Finder())


def _add_to(module: ModuleType) -> None:
    random_ops = getattr(module, "rand_ops", None)
    if isinstance(random_ops, list):
        ops = torch.ops.gumbel_ext
        random_ops += [
            ops.binary_concrete,
            ops.gapped_straight_through,
            ops.gumbel_argmax,
            ops.gumbel_embedding,
            ops.gumbel_log_softmax,
            ops.gumbel_noise,
            ops.gumbel_rao,
            ops.gumbel_softmax,
            ops.gumbel_topk,
            ops.logistic_noise,
            ops.reinmax,
            ops.zgr,
        ]


class _Finder(MetaPathFinder):
    """Finds the one module as if it were not there, and is gone with that."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderThatAdds(spec.loader)
        return spec


class _LoaderThatAdds(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Source and resources are asked of the module's own loader.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _add_to(module)
