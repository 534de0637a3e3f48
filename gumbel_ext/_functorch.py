"""What ``torch.vmap`` makes of the ops: one call of the same op on the whole batch.

The batch dimension goes in front.  Noise depends on the position of an element, so that the ops'
``positions`` decide whether examples share it: with stride 0 along the batch dimension all see the
noise of the single call, with the stride of a whole example each sees its own.

Each level of nested transforms runs its rule here and then calls the op for the levels below.
Derivatives are no matter of this file: the kernels of the Autograd key run at every level of
``torch.func.grad`` and ``jvp`` as they do for ``torch.autograd``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gumbel_ext._positions import row_major_strides

_ops = torch.ops.gumbel_ext

Positions: TypeAlias = Sequence[int | torch.SymInt]


class _Level:
    """The innermost vmap, and the arguments of an op with its batch dimension taken off."""

    def __init__(self, name: str) -> None:
        from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

        interpreter: Any = retrieve_current_functorch_interpreter()
        self.name = name
        self.number: int = interpreter.level()
        self.size: int = interpreter.batch_size()
        self.randomness: str = interpreter.randomness()

    def below(self) -> Any:
        """Calls within reach the levels below, and these rules there once more."""
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchVmapMode)
        keys = keys | torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)
        return torch._C._ExcludeDispatchKeyGuard(keys)

    def has(self, *tensors: Tensor | None) -> bool:
        """Whether any of them has this level's batch dimension."""
        return any(
            t is not None and torch._C._functorch._unwrap_batched(t, self.number)[1] is not None
            for t in tensors
        )

    def unwrap(self, tensor: Tensor) -> tuple[Tensor, bool]:
        """The tensor with its batch dimension, if it has one, in front; and whether it has."""
        value, dim = torch._C._functorch._unwrap_batched(tensor, self.number)
        return (value, False) if dim is None else (value.movedim(dim, 0), True)

    def wrap(self, tensor: Tensor) -> Tensor:
        wrapped: Tensor = torch._C._functorch._add_batch_dim(tensor, 0, self.number)
        return wrapped

    def example_dims(self, like: Tensor, dim: int) -> tuple[int, int]:
        """Dimensions that the op sees of an example, at least 1; ``dim`` behind the batch's."""
        dims = max(like.dim(), 1)
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

    def broadcast(self, what: str, tensor: Tensor | None, like: Tensor, dims: int) -> Tensor | None:
        """A mask or temperature, with its dimensions in line with those of the whole batch."""
        if tensor is None:
            return None
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

    def own_states(self, rng_state: Tensor | None) -> bool:
        """Whether each example has noise of its own from a state of its own."""
        return self.size > 0 and self.has(rng_state)

    def common_state(self, rng_state: Tensor | None) -> Tensor | None:
        """The state for all examples; of no examples any will do."""
        return torch.zeros(2, dtype=torch.int64) if self.has(rng_state) else rng_state

    def draws(self, rng_state: Tensor | None) -> bool:
        """Whether each example has noise of its own from a generator."""
        if rng_state is not None:
            return False
        if self.randomness == "error":
            raise RuntimeError(
                f"{self.name}: vmap: called random operation while in randomness error mode. "
                "Please either use the 'same' or 'different' randomness flags on vmap or perform "
                "the randomness operation out of vmap"
            )
        return self.randomness == "different"

    def positions(
        self, shape: Sequence[int], given: Positions | None, different: bool
    ) -> Positions | None:
        """Noise positions of the whole batch, from those of an example of this shape."""
        base: int | torch.SymInt = 0
        strides: Positions = row_major_strides(shape)
        if given is not None:
            base, *strides = given
        elif different:
            return None
        extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        # An example without dimensions has one behind the batch's here.
        return [base, extent if different else 0, *(strides or [0])]

    def one_by_one(self, op: Callable[..., Any], args: Sequence[Any]) -> list[Any]:
        """The op on each example, for noise that positions cannot tell: a state for each."""
        with self.below():
            taken = [self.unwrap(a) if isinstance(a, Tensor) else (a, False) for a in args]
            return [
                op(*(value[i] if batched else value for value, batched in taken))
                for i in range(self.size)
            ]


def _gumbel_softmax(
    logits: Tensor,
    tau: float,
    tau_tensor: Tensor | None,
    hard: bool,
    dim: int,
    mask: Tensor | None,
    return_index: bool,
    generator: torch.Generator | None,
    rng_state: Tensor | None,
    positions: Positions | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    level = _Level("gumbel_softmax")
    different = level.draws(rng_state)
    args = (logits, tau, tau_tensor, hard, dim, mask, return_index, generator, rng_state, positions)
    if level.own_states(rng_state):
        results = level.one_by_one(_ops.gumbel_softmax, args)
        with level.below():
            y, index, state = (torch.stack(parts) for parts in zip(*results, strict=True))
        return (
            level.wrap(y),
            level.wrap(index) if return_index else results[0][1],
            level.wrap(state),
        )
    if not different and not level.has(logits, tau_tensor, mask, rng_state):
        with level.below():
            y, index, state = _ops.gumbel_softmax(*args)
        return y, index, state

    dims, batch_dim = level.example_dims(logits, dim)
    where = level.positions(logits.shape, positions, different)
    with level.below():
        y, index, state = _ops.gumbel_softmax(
            level.whole(logits, dims),
            tau,
            level.broadcast("tau", tau_tensor, logits, dims),
            hard,
            batch_dim,
            level.broadcast("mask", mask, logits, dims),
            return_index,
            generator,
            level.common_state(rng_state),
            where,
        )
        if logits.dim() == 0:
            y = y.squeeze(1)
    # The state of the batch: with randomness="different" no state is that of one example.
    return level.wrap(y), level.wrap(index) if return_index else index, state


def _index(
    name: str,
    sample: Callable[..., Any],
    logits: Tensor,
    dim: int,
    mask: Tensor | None,
    generator: torch.Generator | None,
    rng_state: Tensor | None,
    positions: Positions | None,
) -> Tensor:
    """Of an op that gives indices alone; ``sample`` is the op, called with what follows it here."""
    level = _Level(name)
    different = level.draws(rng_state)
    args = (logits, dim, mask, generator, rng_state, positions)
    index: Tensor
    if level.own_states(rng_state):
        results = level.one_by_one(sample, args)
        with level.below():
            index = torch.stack(results)
        return level.wrap(index)
    if not different and not level.has(logits, mask, rng_state):
        with level.below():
            index = sample(*args)
        return index

    dims, batch_dim = level.example_dims(logits, dim)
    where = level.positions(logits.shape, positions, different)
    with level.below():
        index = sample(
            level.whole(logits, dims),
            batch_dim,
            level.broadcast("mask", mask, logits, dims),
            generator,
            level.common_state(rng_state),
            where,
        )
    return level.wrap(index)


def _gumbel_argmax(
    logits: Tensor,
    dim: int,
    keepdim: bool,
    mask: Tensor | None,
    generator: torch.Generator | None,
    rng_state: Tensor | None,
    positions: Positions | None = None,
) -> Tensor:
    # An example without dimensions has none to keep, but one in the whole batch.
    keepdim = keepdim and logits.dim() > 0

    def sample(logits: Tensor, dim: int, *rest: Any) -> Any:
        return _ops.gumbel_argmax(logits, dim, keepdim, *rest)

    return _index("gumbel_argmax", sample, logits, dim, mask, generator, rng_state, positions)


def _gumbel_topk(
    logits: Tensor,
    k: int,
    dim: int,
    mask: Tensor | None,
    generator: torch.Generator | None,
    rng_state: Tensor | None,
    positions: Positions | None = None,
) -> Tensor:
    def sample(logits: Tensor, *rest: Any) -> Any:
        return _ops.gumbel_topk(logits, k, *rest)

    return _index("gumbel_topk", sample, logits, dim, mask, generator, rng_state, positions)


def _gumbel_noise(
    like: Tensor,
    size: Sequence[int],
    generator: torch.Generator | None,
    rng_state: Tensor | None,
    positions: Positions | None = None,
) -> Tensor:
    level = _Level("gumbel_noise")
    different = level.draws(rng_state)
    noise: Tensor
    with level.below():
        # Of like only dtype and device count.
        like = level.unwrap(like)[0]
        if level.own_states(rng_state):
            args = (like, size, generator, rng_state, positions)
            noise = torch.stack(level.one_by_one(_ops.gumbel_noise, args))
        elif different:
            where = level.positions(size, positions, different)
            if where is not None and not size:
                where = where[:2]
            noise = _ops.gumbel_noise(like, [level.size, *size], generator, rng_state, where)
        else:
            state = level.common_state(rng_state)
            noise = _ops.gumbel_noise(like, size, generator, state, positions)
            if not level.has(rng_state):
                return noise
            noise = noise.expand(0, *size)
    return level.wrap(noise)


def _draw_rng_state(
    like: Tensor, generator: torch.Generator | None, after: Tensor | None = None
) -> Tensor:
    level = _Level("draw_rng_state")
    different = level.draws(None)
    state: Tensor
    with level.below():
        # Of like only the device counts.
        like = level.unwrap(like)[0]
        if not different:
            state = _ops.draw_rng_state(like, generator)
            return state
        drawn = [_ops.draw_rng_state(like, generator) for _ in range(level.size)]
        state = torch.stack(drawn) if drawn else like.new_empty((0, 2), dtype=torch.int64)
    return level.wrap(state)


def _gumbel_softmax_backward(
    grad: Tensor,
    y: Tensor,
    index: Tensor,
    tau: float,
    tau_tensor: Tensor | None,
    dim: int,
    tau_grad: bool,
) -> tuple[Tensor, Tensor]:
    level = _Level("gumbel_softmax_backward")
    dims, batch_dim = level.example_dims(y, dim)
    with level.below():
        grad_logits, grad_tau = _ops.gumbel_softmax_backward(
            level.whole(grad, dims),
            level.whole(y, dims),
            level.whole(index, dims - 1),
            tau,
            level.broadcast("tau", tau_tensor, y, dims),
            batch_dim,
            tau_grad,
        )
        if y.dim() == 0:
            grad_logits = grad_logits.squeeze(1)
            grad_tau = grad_tau.squeeze(1) if tau_grad else grad_tau
    return level.wrap(grad_logits), level.wrap(grad_tau) if tau_grad else grad_tau


def _gumbel_softmax_hard_backward(
    grad: Tensor,
    logits: Tensor,
    index: Tensor,
    tau: float,
    tau_tensor: Tensor | None,
    dim: int,
    mask: Tensor | None,
    rng_state: Tensor,
    tau_grad: bool,
    positions: Positions | None = None,
) -> tuple[Tensor, Tensor]:
    level = _Level("gumbel_softmax_hard_backward")
    if level.own_states(rng_state):
        args = (grad, logits, index, tau, tau_tensor, dim, mask, rng_state, tau_grad, positions)
        results = level.one_by_one(_ops.gumbel_softmax_hard_backward, args)
        with level.below():
            grad_logits, grad_tau = (torch.stack(parts) for parts in zip(*results, strict=True))
        return level.wrap(grad_logits), level.wrap(grad_tau) if tau_grad else results[0][1]
    dims, batch_dim = level.example_dims(logits, dim)
    where = level.positions(logits.shape, positions, different=False)
    with level.below():
        grad_logits, grad_tau = _ops.gumbel_softmax_hard_backward(
            level.whole(grad, dims),
            level.whole(logits, dims),
            level.whole(index, dims - 1),
            tau,
            level.broadcast("tau", tau_tensor, logits, dims),
            batch_dim,
            level.broadcast("mask", mask, logits, dims),
            level.common_state(rng_state),
            tau_grad,
            where,
        )
        if logits.dim() == 0:
            grad_logits = grad_logits.squeeze(1)
            grad_tau = grad_tau.squeeze(1) if tau_grad else grad_tau
    return level.wrap(grad_logits), level.wrap(grad_tau) if tau_grad else grad_tau


def _gumbel_log_softmax(
    logits: Tensor,
    tau: float,
    tau_tensor: Tensor | None,
    dim: int,
    mask: Tensor | None,
    generator: torch.Generator | None,
    rng_state: Tensor | None,
    positions: Positions | None = None,
) -> tuple[Tensor, Tensor]:
    level = _Level("gumbel_log_softmax")
    different = level.draws(rng_state)
    args = (logits, tau, tau_tensor, dim, mask, generator, rng_state, positions)
    if level.own_states(rng_state):
        results = level.one_by_one(_ops.gumbel_log_softmax, args)
        with level.below():
            log_y, state = (torch.stack(parts) for parts in zip(*results, strict=True))
        return level.wrap(log_y), level.wrap(state)
    if not different and not level.has(logits, tau_tensor, mask, rng_state):
        with level.below():
            log_y, state = _ops.gumbel_log_softmax(*args)
        return log_y, state

    dims, batch_dim = level.example_dims(logits, dim)
    where = level.positions(logits.shape, positions, different)
    with level.below():
        log_y, state = _ops.gumbel_log_softmax(
            level.whole(logits, dims),
            tau,
            level.broadcast("tau", tau_tensor, logits, dims),
            batch_dim,
            level.broadcast("mask", mask, logits, dims),
            generator,
            level.common_state(rng_state),
            where,
        )
        if logits.dim() == 0:
            log_y = log_y.squeeze(1)
    return level.wrap(log_y), state


def _gumbel_log_softmax_backward(
    grad: Tensor,
    log_y: Tensor,
    tau: float,
    tau_tensor: Tensor | None,
    dim: int,
    tau_grad: bool,
) -> tuple[Tensor, Tensor]:
    level = _Level("gumbel_log_softmax_backward")
    dims, batch_dim = level.example_dims(log_y, dim)
    with level.below():
        grad_logits, grad_tau = _ops.gumbel_log_softmax_backward(
            level.whole(grad, dims),
            level.whole(log_y, dims),
            tau,
            level.broadcast("tau", tau_tensor, log_y, dims),
            batch_dim,
            tau_grad,
        )
        if log_y.dim() == 0:
            grad_logits = grad_logits.squeeze(1)
            grad_tau = grad_tau.squeeze(1) if tau_grad else grad_tau
    return level.wrap(grad_logits), level.wrap(grad_tau) if tau_grad else grad_tau


class _DensityArguments:
    """Value and logits of a whole batch, their dimensions in line; copies of neither."""

    def __init__(
        self, level: _Level, value: Tensor, logits: Tensor, tau_tensor: Tensor | None, dim: int
    ) -> None:
        shape = torch.broadcast_shapes(value.shape, logits.shape)
        self.like = torch.empty((), device="meta").expand(shape)
        self.scalar = not shape
        self.dims, self.dim = level.example_dims(self.like, dim)
        with level.below():
            self.value = self._in_line(level, value)
            self.logits = self._in_line(level, logits)
            tau = None if tau_tensor is None else level.unwrap(tau_tensor)
            if tau is not None and tau[1]:
                tensor = tau[0]
                ones = [1] * (self.dims - tensor.dim() + 1)
                self.tau: Tensor | None = tensor.reshape(level.size, *ones, *tensor.shape[1:])
            else:
                self.tau = None if tau is None else tau[0]
            # The batch dimension must be there, of whichever argument it was.
            if self.value.shape[0] == self.logits.shape[0] == 1:
                self.value = self.value.expand(level.size, *self.value.shape[1:])

    def _in_line(self, level: _Level, tensor: Tensor) -> Tensor:
        value, batched = level.unwrap(tensor)
        if not batched:
            value = value.unsqueeze(0)
        ones = [1] * (self.dims - value.dim() + 1)
        return value.reshape(value.shape[0], *ones, *value.shape[1:])


def _concrete_log_prob(
    value: Tensor,
    logits: Tensor,
    tau: float,
    tau_tensor: Tensor | None,
    dim: int,
    log_space: bool,
) -> Tensor:
    level = _Level("concrete_log_prob")
    a = _DensityArguments(level, value, logits, tau_tensor, dim)
    with level.below():
        density = _ops.concrete_log_prob(a.value, a.logits, tau, a.tau, a.dim, log_space)
    return level.wrap(density)


def _concrete_log_prob_backward(
    grad: Tensor,
    value: Tensor,
    logits: Tensor,
    tau: float,
    tau_tensor: Tensor | None,
    dim: int,
    log_space: bool,
    value_grad: bool,
    logits_grad: bool,
    tau_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    level = _Level("concrete_log_prob_backward")
    a = _DensityArguments(level, value, logits, tau_tensor, dim)
    wanted = (value_grad, logits_grad, tau_grad)
    # Of an example: gradients of an argument that is not summed over come in its dtype.
    summed = (value.shape != a.like.shape, logits.shape != a.like.shape)
    with level.below():
        whole_grad, batched = level.unwrap(grad)
        if not batched:
            whole_grad = whole_grad.expand(level.size, *whole_grad.shape)
        results = _ops.concrete_log_prob_backward(
            whole_grad, a.value, a.logits, tau, a.tau, a.dim, log_space, *wanted
        )
        results = [
            r.squeeze(1) if a.scalar and w else r for r, w in zip(results, wanted, strict=True)
        ]
        for i in range(2):
            if wanted[i] and not summed[i]:
                results[i] = results[i].to(value.dtype)
    grads = [level.wrap(r) if w else r for r, w in zip(results, wanted, strict=True)]
    return grads[0], grads[1], grads[2]


_library = torch.library.Library("gumbel_ext", "IMPL")
# The key of random ops: they must be told of a vmap none of whose tensors they are given.
_library.impl("gumbel_softmax", _gumbel_softmax, "FuncTorchVmapMode")
_library.impl("gumbel_argmax", _gumbel_argmax, "FuncTorchVmapMode")
_library.impl("gumbel_topk", _gumbel_topk, "FuncTorchVmapMode")
_library.impl("gumbel_noise", _gumbel_noise, "FuncTorchVmapMode")
_library.impl("draw_rng_state", _draw_rng_state, "FuncTorchVmapMode")
_library.impl("gumbel_log_softmax", _gumbel_log_softmax, "FuncTorchVmapMode")
_library.impl("gumbel_softmax_backward", _gumbel_softmax_backward, "FuncTorchBatched")
_library.impl("gumbel_softmax_hard_backward", _gumbel_softmax_hard_backward, "FuncTorchBatched")
_library.impl("gumbel_log_softmax_backward", _gumbel_log_softmax_backward, "FuncTorchBatched")
_library.impl("concrete_log_prob", _concrete_log_prob, "FuncTorchBatched")
_library.impl("concrete_log_prob_backward", _concrete_log_prob_backward, "FuncTorchBatched")
