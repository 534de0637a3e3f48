"""The ops of the compiled module, as their schemas describe them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._ops import OpOverload

__all__ = ["NAMESPACE", "arguments", "is_composite", "ops", "random_ops"]

NAMESPACE = "gumbel_ext"


def ops() -> dict[str, OpOverload]:
    """Every op of the package by its name, without the namespace."""
    names = sorted(torch._C._dispatch_get_all_op_names())
    split = (name.partition("::") for name in names)
    return {
        name: getattr(torch.ops.gumbel_ext, name).default
        for namespace, _, name in split
        if namespace == NAMESPACE
    }


def random_ops() -> dict[str, OpOverload]:
    """Those that may draw from a generator, by their tag."""
    return {name: op for name, op in ops().items() if torch.Tag.nondeterministic_seeded in op.tags}


def arguments(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names, those left to their defaults included."""
    given = dict(zip((a.name for a in op._schema.arguments), args, strict=False)) | dict(kwargs)
    return {a.name: given.get(a.name, a.default_value) for a in op._schema.arguments}


def is_composite(op: OpOverload) -> bool:
    """Whether an op is made of others at every level: it has no rule or derivative of its own."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        op._schema.name, "CompositeImplicitAutograd"
    )
