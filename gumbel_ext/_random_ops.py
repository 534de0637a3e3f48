"""What tracing makes of an op that draws: a draw of its state, and the op as a function of it.

Compilers rearrange a graph as if equal calls had equal results: AOTAutograd merges them, and its
partitioner recomputes in the backward what costs less than to keep. Each knows the random ops of
PyTorch from a list of its own; neither asks for the tag ``nondeterministic_seeded``. With the state
as an argument an op is free to be merged or recomputed. What draws the state is not: it is marked
as a result to keep, and it takes the state that was drawn before it, so that no two draws are equal
and their order stays that of eager.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from gumbel_ext._ops import NAMESPACE, arguments, random_ops

_draw_rng_state = torch.ops.gumbel_ext.draw_rng_state.default

# The last state of every device, whose generators know nothing of one another.
_drawn: WeakKeyDictionary[Any, dict[torch.device, torch.Tensor]] = WeakKeyDictionary()


def _trace_state(
    mode: Any,
    op: OpOverload,
    types: Sequence[type],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    device = args[0].device
    drawn = _drawn.setdefault(mode.tracer, {})
    args = (*args[:2], drawn.get(device, *args[2:]))
    state = mode.__torch_dispatch__(op, types, args, dict(kwargs or {}))
    if state is not NotImplemented:
        drawn[device] = state
        *_, node = mode.tracer.graph.find_nodes(op="call_function", target=op)
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return state


def _trace_draw(
    mode: Any,
    op: OpOverload,
    types: Sequence[type],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    values = arguments(op, args, kwargs or {})
    # The mode leaves other subclasses to themselves, and comes back for the tensors in them.
    foreign = any(kind is not FakeTensor for kind in types)
    if foreign or values["rng_state"] is not None or _draws_nothing(values):
        return mode.__torch_dispatch__(op, types, args, dict(kwargs or {}))
    with mode:
        values["rng_state"] = _draw_rng_state(args[0], values["generator"])
        values["generator"] = None
        return op(**values)


def _draws_nothing(values: Mapping[str, Any]) -> bool:
    """Whether the call is known to be of nothing: it leaves the generator as it is."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    shape = values["size"] if "size" in values else values["logits"].shape
    return any(statically_known_true(extent == 0) for extent in (*shape, values.get("k", 1)))


_library = torch.library.Library(NAMESPACE, "FRAGMENT")
for _op in random_ops().values():
    torch.library.register_torch_dispatch(
        _op._schema.name,
        ProxyTorchDispatchMode,
        _trace_state if _op is _draw_rng_state else _trace_draw,
        lib=_library,
    )
