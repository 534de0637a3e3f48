"""What ``torch.vmap`` makes of the ops: one call of the same op on the whole batch.

The batch dimension goes in front. Noise depends on the position of an element, so that the ops'
``positions`` decide whether examples share it: with stride 0 along the batch dimension all see the
noise of the single call, with the stride of a whole example each sees its own.

One rule serves the ops, by the names of their arguments and results. The ops whose examples are no
part of one larger call have rules of their own below.

Each level of nested transforms runs its rule here and then calls the op for the levels below.
Derivatives are no matter of this file: the kernels of the Autograd key run at every level of
``torch.func.grad`` and ``jvp`` as they do for ``torch.autograd``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._ops import OpOverload

from gumbel_ext._ops import NAMESPACE, arguments, is_composite, ops, random_ops
from gumbel_ext._positions import row_major_strides

Positions: TypeAlias = Sequence[int | torch.SymInt]
Arguments: TypeAlias = dict[str, Any]
Results: TypeAlias = tuple[Tensor, ...]
Rule: TypeAlias = Callable[["_Call"], Results]

# Tensor arguments by what is done to them. Those of the shape of an example, the first of which
# says what that is; one number for each row; what broadcasts, under the name users know; and
# numbers, or a state, that all examples share.
_WHOLE = ("logits", "y", "log_y", "grad", "row_state")
_OF_ROWS = ("index",)
_BROADCAST = {"tau_tensor": "tau", "beta_tensor": "beta", "mask": "mask"}
_SHARED = ("gap_tensor", "rng_state")
# Results of the shape of an example, or of one with a number a row, that keep the dimension which
# an example without dimensions is given.
_SHAPED_AS_EXAMPLE = ("y", "log_y", "grad_logits", "grad_tau", "grad_beta")
_STATE = "used_rng_state"


class _Call:
    """A call of an op at the innermost vmap."""

    def __init__(self, op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

        interpreter: Any = retrieve_current_functorch_interpreter()
        self.op = op
        self.name = op._schema.name.partition("::")[2]
        self.given = arguments(op, args, kwargs)
        self.level: int = interpreter.level()
        self.size: int = interpreter.batch_size()
        self.randomness: str = interpreter.randomness()

    # ---- levels and batch dimensions

    def below(self, given: Arguments | None = None, **changed: Any) -> Results:
        """The op for the levels below, and these rules there once more."""
        results = self.op(*((self.given if given is None else given) | changed).values())
        return results if isinstance(results, tuple) else (results,)

    def has_batch(self, *names: str) -> bool:
        """Whether an argument has this level's batch dimension: one of these, or any."""
        return any(
            isinstance(value := self.given[name], Tensor)
            and torch._C._functorch._unwrap_batched(value, self.level)[1] is not None
            for name in names or self.given
        )

    def unwrap(self, tensor: Tensor) -> tuple[Tensor, bool]:
        """The tensor with its batch dimension, if it has one, in front; and whether it has."""
        value, dim = torch._C._functorch._unwrap_batched(tensor, self.level)
        return (value, False) if dim is None else (value.movedim(dim, 0), True)

    def wrap(self, tensor: Tensor) -> Tensor:
        wrapped: Tensor = torch._C._functorch._add_batch_dim(tensor, 0, self.level)
        return wrapped

    def wrap_wanted(self, results: Sequence[Tensor]) -> Results:
        """Results with their batch dimension; what was not asked for is empty and has none."""
        return tuple(self.wrap(r) if self.wants(i) else r for i, r in enumerate(results))

    def wants(self, result: int) -> bool:
        name = self.op._schema.returns[result].name or ""
        flag = "return_index" if name == "index" else name.removeprefix("grad_") + "_grad"
        return bool(self.given.get(flag, True))

    # ---- noise

    def draws(self) -> bool:
        """Whether each example has noise of its own from a generator."""
        if "generator" not in self.given or self.given.get("rng_state") is not None:
            return False
        if self.randomness == "error":
            raise RuntimeError(
                f"{self.name}: vmap: called random operation while in randomness error mode. "
                "Please either use the 'same' or 'different' randomness flags on vmap or perform "
                "the randomness operation out of vmap"
            )
        return self.randomness == "different"

    def has_own_states(self) -> bool:
        """Whether each example has noise of its own from a state of its own."""
        return self.size > 0 and "rng_state" in self.given and self.has_batch("rng_state")

    def common_state(self) -> Tensor | None:
        """The state for all examples; of no examples any will do."""
        shared: Tensor | None = self.given["rng_state"]
        return torch.zeros(2, dtype=torch.int64) if self.has_batch("rng_state") else shared

    def positions(self, shape: Sequence[int], different: bool) -> Positions | None:
        """Noise positions of the whole batch, from those of an example of this shape."""
        base: int | torch.SymInt = 0
        strides: Positions = row_major_strides(shape)
        if self.given["positions"] is not None:
            base, *strides = self.given["positions"]
        elif different:
            return None
        extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        return [base, extent if different else 0, *strides]

    # ---- arguments of the whole batch

    def example_dims(self, like: Tensor) -> tuple[int, int]:
        """Dimensions that an example is given, at least 1; ``dim`` behind the batch's."""
        dims, dim = max(like.dim(), 1), self.given["dim"]
        if not -dims <= dim < dims:
            raise IndexError(
                f"{self.name}: dim must be between {-dims} and {dims - 1} for logits of "
                f"{like.dim()} dimensions, got {dim}"
            )
        return dims, 1 + dim % dims

    def whole(self, tensor: Tensor, dims: int) -> Tensor:
        """Of every example's shape, with the batch dimension and ``dims`` more."""
        value, batched = self.unwrap(tensor)
        if not batched:
            value = value.expand(self.size, *value.shape)
        return value.unsqueeze(1) if value.dim() == dims == 1 else value

    def broadcast(self, what: str, tensor: Tensor, like: Tensor, dims: int) -> Tensor:
        """A mask or temperature, with its dimensions in line with those of the whole batch."""
        value, batched = self.unwrap(tensor)
        shape = value.shape[1:] if batched else value.shape
        if len(shape) > like.dim():
            raise ValueError(
                f"{self.name}: {what} must broadcast to logits of shape {list(like.shape)}, got "
                f"shape {list(shape)}"
            )
        if batched:
            value = value.reshape(self.size, *[1] * (dims - len(shape)), *shape).to(like.device)
        return value

    # ---- calls

    def on_whole_batch(self, different: bool) -> Results:
        """One call, whose examples are parts of one tensor."""
        like: Tensor = next(self.given[name] for name in _WHOLE if name in self.given)
        given = dict(self.given)
        by_rows = "dim" in given
        dims = like.dim()
        if by_rows:
            dims, given["dim"] = self.example_dims(like)
        # An example without dimensions is given one. Elementwise ops need none.
        lifted = by_rows and like.dim() == 0
        for name, value in self.given.items():
            if name == "keepdim":
                # It has none to keep.
                given[name] = value and not lifted
            elif name == "rng_state":
                given[name] = self.common_state()
            elif name == "positions" and not isinstance(value, Tensor):
                given[name] = self.positions(like.shape, different)
                if lifted and given[name] is not None:
                    given[name].append(0)
            elif not isinstance(value, Tensor):
                continue
            elif name in _WHOLE:
                given[name] = self.whole(value, dims)
            elif name in _OF_ROWS:
                given[name] = self.whole(value, dims - 1)
            elif name in _BROADCAST:
                given[name] = self.broadcast(_BROADCAST[name], value, like, dims)
        results = list(self.below(given))
        states = []
        for i, returned in enumerate(self.op._schema.returns):
            if returned.name == _STATE:
                states.append(i)
            elif lifted and returned.name in _SHAPED_AS_EXAMPLE and self.wants(i):
                results[i] = results[i].squeeze(1)
        # With randomness="different" no state is that of one example: it is the batch's.
        wrapped = self.wrap_wanted(results)
        return tuple(results[i] if i in states else wrapped[i] for i in range(len(results)))

    def example(self, i: int, given: Arguments) -> Arguments:
        """The arguments of one of the examples."""
        own = dict(given)
        for name, value in given.items():
            if isinstance(value, Tensor):
                value, batched = self.unwrap(value)
                own[name] = value[i] if batched else value
        return own

    def one_by_one(self, given: Arguments | None = None) -> list[Results]:
        """The op on each example, for noise that positions cannot tell: a state for each."""
        given = self.given if given is None else given
        return [self.below(self.example(i, given)) for i in range(self.size)]

    def stacked(self, results: Sequence[Results]) -> Results:
        """What one_by_one() returned, as one tensor each."""
        return self.wrap_wanted(
            [
                torch.stack(parts) if self.wants(i) else parts[0]
                for i, parts in enumerate(zip(*results, strict=True))
            ]
        )


def _on_whole_batch(call: _Call) -> Results:
    different = call.draws()
    if call.has_own_states():
        return call.stacked(call.one_by_one())
    if not different and not call.has_batch():
        return call.below()
    return call.on_whole_batch(different)


# ---- exceptions ---------------------------------------------------------------------------------

_exceptions: dict[str, Rule] = {}


def _exception(*names: str) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        _exceptions.update(dict.fromkeys(names, rule))
        return rule

    return add


@_exception("gumbel_noise", "logistic_noise")
def _noise(call: _Call) -> Results:
    """Noise has the shape it is asked for. Of ``like`` only dtype and device count."""
    different = call.draws()
    size = call.given["size"]
    call.given["like"] = call.unwrap(call.given["like"])[0]
    if call.has_own_states():
        return call.stacked(call.one_by_one())
    if different:
        noise, *state = call.below(
            size=[call.size, *size], positions=call.positions(size, different)
        )
        return call.wrap(noise), *state
    no_example = call.has_batch("rng_state")
    noise, *state = call.below(rng_state=call.common_state())
    return (call.wrap(noise.expand(0, *size)) if no_example else noise), *state


@_exception("draw_rng_state")
def _draw_rng_state(call: _Call) -> Results:
    """A state for each example. Of ``like`` only the device counts."""
    different = call.draws()
    like = call.given["like"] = call.unwrap(call.given["like"])[0]
    if not different:
        return call.below()
    drawn = [call.below()[0] for _ in range(call.size)]
    none = like.new_empty((0, 2), dtype=torch.int64)
    return (call.wrap(torch.stack(drawn) if drawn else none),)


@_exception("soft_argmax", "soft_argmax_backward")
def _soft_argmax(call: _Call) -> Results:
    """A call has one set of positions."""
    if call.has_batch("positions"):
        return call.stacked(call.one_by_one())
    return call.on_whole_batch(different=False)


@_exception("gumbel_rao")
def _gumbel_rao(call: _Call) -> Results:
    """One by one: the backward makes noise at the positions of a whole call.

    The state that it makes it from must be that of the example.
    """
    different = call.draws()
    if call.size == 0:
        return call.on_whole_batch(different)
    given = dict(call.given)
    if given["rng_state"] is None and not different:
        like = call.unwrap(given["logits"])[0]
        given["rng_state"] = torch.ops.gumbel_ext.draw_rng_state(like, given["generator"])
        given["generator"] = None
    if not different and not call.has_batch():
        return call.below(given)
    results = call.one_by_one(given)
    y, index, state = call.stacked(results)
    return y, index, state if different or call.has_batch("rng_state") else results[0][2]


@_exception("gumbel_rao_backward")
def _gumbel_rao_backward(call: _Call) -> Results:
    if call.size == 0:
        call.given["rng_state"] = torch.zeros(2, dtype=torch.int64)
        return call.on_whole_batch(different=False)
    return call.stacked(call.one_by_one())


@_exception("gumbel_embedding")
def _gumbel_embedding(call: _Call) -> Results:
    """One call, or one for each codebook."""
    different = call.draws()
    if call.has_own_states():
        return call.stacked(call.one_by_one())
    if not different and not call.has_batch():
        return call.below()
    weight, many = call.unwrap(call.given["weight"])
    if not many or call.size == 0:
        shape = call.given["weight"].shape
        call.given["weight"] = weight.new_empty(shape) if many else weight
        return call.on_whole_batch(different)
    logits = call.given["logits"]
    base, stride, *strides = call.positions(logits.shape, different) or [
        0,
        *row_major_strides([call.size, *logits.shape]),
    ]
    state = call.common_state()
    if state is None:
        like = call.unwrap(logits)[0]
        state = torch.ops.gumbel_ext.draw_rng_state(like, call.given["generator"])
    given = call.given | {"generator": None, "rng_state": state}
    results = [
        call.below(call.example(i, given), positions=[base + i * stride, *strides])
        for i in range(call.size)
    ]
    out, index, _ = call.stacked(results)
    return out, index, state


@_exception("gumbel_embedding_backward")
def _gumbel_embedding_backward(call: _Call) -> Results:
    """One by one: each example has a gradient of the codebook of its own."""
    results = call.one_by_one()
    if not results:
        raise ValueError(f"{call.name}: vmap must be over at least one example, got 0")
    return call.stacked(results)


@_exception("concrete_log_prob", "concrete_log_prob_backward")
def _concrete_log_prob(call: _Call) -> Results:
    """Value and logits broadcast together: their dimensions are put in line, and neither copied."""
    given = dict(call.given)
    value, logits = given["value"], given["logits"]
    shape = torch.broadcast_shapes(value.shape, logits.shape)
    like = torch.empty((), device="meta").expand(shape)
    dims, given["dim"] = call.example_dims(like)

    def in_line(tensor: Tensor, batch_of_one: bool) -> Tensor:
        whole, batched = call.unwrap(tensor)
        if not batched and not batch_of_one:
            return whole
        whole = whole if batched else whole.unsqueeze(0)
        return whole.reshape(whole.shape[0], *[1] * (dims - whole.dim() + 1), *whole.shape[1:])

    for name in ("value", "logits"):
        given[name] = in_line(given[name], batch_of_one=True)
    # The batch dimension must be there, of whichever argument it was.
    if given["value"].shape[0] == given["logits"].shape[0] == 1:
        given["value"] = given["value"].expand(call.size, *given["value"].shape[1:])
    if given["tau_tensor"] is not None:
        given["tau_tensor"] = in_line(given["tau_tensor"], batch_of_one=False)
    if "grad" not in given:
        return call.wrap_wanted(call.below(given))

    given["grad"] = call.whole(given["grad"], dims=0)
    results = list(call.below(given))
    for i in range(3):
        if call.wants(i) and not shape:
            results[i] = results[i].squeeze(1)
    # Of an example: gradients of an argument that is not summed over come in its dtype.
    for i, operand in enumerate((value, logits)):
        if call.wants(i) and operand.shape == shape:
            results[i] = results[i].to(operand.dtype)
    return call.wrap_wanted(results)


# ---- registration -------------------------------------------------------------------------------


def has_rule(op: OpOverload) -> bool:
    """Whether there is an exception for an op, or its tensor arguments are known to the one rule.

    The others, and ops that are made of ops, leave a vmap to what PyTorch does without a rule.
    """
    known = {*_WHOLE, *_OF_ROWS, *_BROADCAST, *_SHARED}
    tensors = {a.name for a in op._schema.arguments if "Tensor" in str(a.type)}
    return op._opname in _exceptions or (tensors <= known and bool(tensors & {*_WHOLE}))


def _kernel(op: OpOverload) -> Callable[..., Any]:
    rule = _exceptions.get(op._opname, _on_whole_batch)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        call = _Call(op, args, kwargs)
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchVmapMode)
        keys = keys | torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)
        # Calls within reach the levels below.
        with torch._C._ExcludeDispatchKeyGuard(keys):
            results = rule(call)
        return results if len(op._schema.returns) > 1 else results[0]

    return kernel


_library = torch.library.Library(NAMESPACE, "IMPL")
for _name, _op in ops().items():
    # Random ops must be told of a vmap none of whose tensors they are given.
    _key = "FuncTorchVmapMode" if _name in random_ops() else "FuncTorchBatched"
    if is_composite(_op):
        _library.impl(_name, _op.decompose, _key)
    elif has_rule(_op):
        _library.impl(_name, _kernel(_op), _key)
