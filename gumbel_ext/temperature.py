"""Temperatures that change: by schedule, by learning, and from the forward to the backward.

``docs/temperature.md`` says which to use when.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from gumbel_ext._arguments import (
    ErrorsOf,
    as_bool,
    as_int,
    as_number,
    as_positive,
    check_positive,
    check_supported,
    checked_state,
    described,
    is_dtensor,
    split_tau,
)

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "CosineTemperature",
    "ExponentialTemperature",
    "LearnableTemperature",
    "LinearTemperature",
    "PiecewiseTemperature",
    "TemperatureSchedule",
    "decoupled_gumbel_softmax",
]

Number: TypeAlias = float | int

_decoupled_gumbel_softmax = torch.ops.gumbel_ext.decoupled_gumbel_softmax.default


def _positive(owner: object, name: str, value: object) -> float:
    return as_positive(type(owner).__name__, name, value)


def _count(owner: object, name: str, value: object) -> int:
    return as_int(type(owner).__name__, name, value, 1)


def _several(owner: object, name: str, values: Iterable[Any]) -> list[Any]:
    if not isinstance(values, Iterable):
        raise TypeError(
            f"{type(owner).__name__}: {name} must be a sequence, got {described(values)}"
        )
    return list(values)


class TemperatureSchedule:
    """A temperature that is a function of the number of steps taken; the base of those below.

    Used like the schedulers of :mod:`torch.optim.lr_scheduler`: :meth:`step` after each optimizer
    step (or epoch, if that is what the schedule counts), :meth:`state_dict` in the checkpoint.

    Attributes:
        steps: the number of calls of :meth:`step` so far.
        tensor: the temperature as a float64 tensor without dimensions, on the CPU, where operators
            for logits on every device take it. :meth:`step` writes it in place: a compiled
            function that is given it, or closes over it, is not compiled again.

    A subclass sets its attributes first, then calls this class's ``__init__``, and defines
    :meth:`at`. All its attributes go into the state.
    """

    steps: int
    tensor: Tensor

    def __init__(self) -> None:
        self.steps = 0
        self._tau = _positive(self, "tau", self.at(0))
        self.tensor = torch.tensor(self._tau, dtype=torch.float64, device="cpu")

    def at(self, step: int) -> float:
        """The temperature after ``step`` steps."""
        raise NotImplementedError

    @property
    def tau(self) -> float:
        """The temperature now. Under ``torch.compile`` take :attr:`tensor`."""
        return self._tau

    def step(self) -> None:
        """Goes on by one step."""
        self.steps += 1
        self.set(self.at(self.steps))

    def set(self, tau: float) -> None:
        """Sets the temperature until the next step, which follows the schedule again."""
        self._tau = _positive(self, "tau", tau)
        self.tensor.fill_(self._tau)

    def _hidden(self) -> tuple[str, ...]:
        return ("tensor", "_tau")

    def _attributes(self) -> dict[str, Any]:
        return {
            name: list(value) if isinstance(value, (list, tuple)) else value
            for name, value in self.__dict__.items()
            if name not in self._hidden()
        }

    def state_dict(self) -> dict[str, Any]:
        """The schedule and where it is, in Python numbers and lists.

        The entry ``class`` is the name of the kind of schedule.
        """
        return {"class": type(self).__name__, **self._attributes()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state that :meth:`state_dict` gave.

        A state without ``class``, as earlier versions saved it, is taken if its other entries are
        those of this schedule.

        Raises:
            ValueError: the state is that of another kind of schedule.
        """
        own, name = self._attributes(), type(self).__name__
        attributes = dict(state_dict)
        kind = attributes.pop("class", name)
        if kind != name:
            raise ValueError(f"{name}: state_dict must be that of a {name}, got that of a {kind}")
        if own.keys() != attributes.keys():
            raise ValueError(
                f"{name}: state_dict must have the keys {sorted(own)}, got {sorted(attributes)}"
            )
        # Tried on a copy: a state that is refused changes nothing.
        other = copy.copy(self)
        other.__dict__.update(attributes)
        try:
            other.steps = as_int(name, "steps", other.steps, 0)
            tau = _positive(self, "tau", other.at(other.steps))
        except (ArithmeticError, IndexError, TypeError) as error:
            raise ValueError(
                f"{name}: state_dict must hold a schedule, got {described(attributes)} ({error})"
            ) from None
        self.__dict__.update(attributes, steps=other.steps)
        self.set(tau)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value}" for name, value in self._attributes().items())
        return f"{type(self).__name__}({arguments}, tau={self.tau:.6g})"


class ExponentialTemperature(TemperatureSchedule):
    r"""The annealing of Jang et al. (arXiv 1611.01144, section 4.2).

    .. math::
        \tau_t = \max\big(\tau_{\min},\ \tau_0\, e^{-r t}\big)

    with t rounded down to a multiple of ``every``. The paper has :math:`\tau_0 = 1`,
    :math:`\tau_{\min} = 0.5`, r in {1e-5, 1e-4} and ``every`` in {500, 1000}.

    Args:
        rate: r, a step; > 0.
        minimum: the temperature never goes below it; > 0.
        start: the temperature at first, at least ``minimum``.
        every: steps after which the temperature changes.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of its range.
    """

    def __init__(
        self, rate: float, minimum: float = 0.5, start: float = 1.0, every: int = 1
    ) -> None:
        self.rate = _positive(self, "rate", rate)
        self.minimum = _positive(self, "minimum", minimum)
        self.start = _positive(self, "start", start)
        self.every = _count(self, "every", every)
        if self.start < self.minimum:
            raise ValueError(
                f"ExponentialTemperature: start must be at least minimum ({minimum}), got {start}"
            )
        super().__init__()

    def at(self, step: int) -> float:  # noqa: D102
        passed = step - step % self.every
        return max(self.minimum, self.start * math.exp(-self.rate * passed))


class _Interpolated(TemperatureSchedule):
    def __init__(self, start: float, end: float, total_steps: int, every: int = 1) -> None:
        self.start = _positive(self, "start", start)
        self.end = _positive(self, "end", end)
        self.total_steps = _count(self, "total_steps", total_steps)
        self.every = _count(self, "every", every)
        super().__init__()

    def _progress(self, step: int) -> float:
        return min(step - step % self.every, self.total_steps) / self.total_steps


class LinearTemperature(_Interpolated):
    r"""From ``start`` to ``end`` in a straight line, then ``end``.

    .. math::
        \tau_t = \tau_0 + (\tau_1 - \tau_0)\, \min(t / T, 1)

    Args:
        start: the temperature at first, > 0.
        end: the temperature from step ``total_steps`` on, > 0.
        total_steps: T.
        every: steps after which the temperature changes.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of its range.
    """

    def at(self, step: int) -> float:  # noqa: D102
        done = self._progress(step)
        return self.start * (1 - done) + self.end * done


class CosineTemperature(_Interpolated):
    r"""From ``start`` to ``end`` along half a cosine, then ``end``.

    .. math::
        \tau_t = \tau_1 + \tfrac12 (\tau_0 - \tau_1)\big(1 + \cos(\pi \min(t / T, 1))\big)

    (the shape of Loshchilov and Hutter, arXiv 1608.03983, without restarts).

    Args:
        start: the temperature at first, > 0.
        end: the temperature from step ``total_steps`` on, > 0.
        total_steps: T.
        every: steps after which the temperature changes.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of its range.
    """

    def at(self, step: int) -> float:  # noqa: D102
        weight = 0.5 * (1 + math.cos(math.pi * self._progress(step)))
        return self.start * weight + self.end * (1 - weight)


class PiecewiseTemperature(TemperatureSchedule):
    """A constant temperature between milestones.

    Args:
        milestones: steps at which the temperature changes, increasing and at least 1.
        values: the temperatures, > 0: the first until the first milestone, the next from there on.
            One more than milestones.

    Raises:
        TypeError, ValueError: an argument is of a wrong type, out of its range or out of order.
    """

    def __init__(self, milestones: Sequence[int], values: Sequence[float]) -> None:
        self.milestones = [
            _count(self, "milestones", m) for m in _several(self, "milestones", milestones)
        ]
        self.values = [_positive(self, "values", v) for v in _several(self, "values", values)]
        if sorted(set(self.milestones)) != self.milestones:
            raise ValueError(
                f"PiecewiseTemperature: milestones must increase, got {self.milestones}"
            )
        if len(self.values) != len(self.milestones) + 1:
            raise ValueError(
                "PiecewiseTemperature: values must be one more than milestones "
                f"({len(self.milestones) + 1}), got {len(self.values)}"
            )
        super().__init__()

    def at(self, step: int) -> float:  # noqa: D102
        return self.values[sum(step >= milestone for milestone in self.milestones)]


def _above_zero(raw: Tensor) -> Tensor:
    if has_torch_function((raw,)):
        overridden: Tensor = handle_torch_function(_above_zero, (raw,), raw)
        return overridden
    above = nn.functional.softplus(raw)
    # Far below zero softplus is 0 in the dtype of the parameter.
    return above.clamp_min(torch.finfo(above.dtype).tiny)


class LearnableTemperature(nn.Module):
    r"""A temperature that is learnt, positive whatever the optimizer does.

    .. math::
        \tau = \tau_{\min} + \log(1 + e^{\rho})

    with the parameter :math:`\rho`. Small temperatures are then learnt by their ratios, as with an
    exponential, and large ones by their differences: an exponential would let one large step make
    the temperature, and with it the next gradient, many times larger.

    Made on the meta device, it has the temperature ``initial`` as soon as it is moved off it, by
    ``to_empty()`` and :meth:`reset_parameters` too.

    Args:
        initial: the temperature at first, > ``minimum``: a number, or a tensor for several
            temperatures, such as ``torch.ones(heads, 1, 1)`` for one a head.
        minimum: what is added; >= 0.

    Raises:
        TypeError, ValueError: an argument is of a wrong type, not finite or out of its range.

    Example:
        >>> tau = LearnableTemperature(torch.full((8, 1, 1), 0.7), minimum=0.1)
        >>> gumbel_ext.gumbel_softmax(torch.randn(8, 16, 32), tau=tau()).shape
        torch.Size([8, 16, 32])
    """

    minimum: float

    def __init__(self, initial: Number | Tensor = 1.0, minimum: float = 0.0) -> None:
        super().__init__()
        name = "LearnableTemperature"
        minimum = as_number(name, "minimum", minimum)
        if not 0 <= minimum < math.inf:
            raise ValueError(f"{name}: minimum must be finite and not negative, got {minimum}")
        number, tensor = split_tau(name, initial, "initial")
        if tensor is None:
            tensor = torch.tensor(number, dtype=torch.float64, device="cpu")
            dtype, device = torch.get_default_dtype(), None
        else:
            check_supported(name, "initial", tensor)
            given = isinstance(initial, Tensor) and initial.is_floating_point()
            dtype = tensor.dtype if given else torch.get_default_dtype()
            device = tensor.device
        above = tensor.detach().to(torch.float64) - minimum
        good = above.is_meta or bool((above.isfinite() & (above > 0)).all())
        if not good:
            raise ValueError(
                f"{name}: initial must be finite and greater than minimum ({minimum}), got "
                f"{described(tensor.tolist())}"
            )
        self.minimum = minimum
        # The inverse of softplus, without e^x, which overflows.
        self._start = above + (-(-above).expm1()).log()
        self.raw = nn.Parameter(torch.empty(above.shape, dtype=dtype, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the temperature to ``initial``, also after ``to_empty()``.

        Raises:
            ValueError: ``initial`` was a tensor on the meta device, which holds no values.
        """
        start = self._start
        if self.raw.is_meta:
            return
        if start.is_meta:
            raise ValueError(
                "LearnableTemperature: initial must have values to set the temperature to, got a "
                "tensor on the meta device"
            )
        with torch.no_grad():
            if is_dtensor(self.raw):
                from torch.distributed.tensor import distribute_tensor

                start = distribute_tensor(
                    start.to(self.raw.device), self.raw.device_mesh, self.raw.placements
                )
            self.raw.copy_(start)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        had_no_value = self.raw.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if had_no_value and not self._start.is_meta:
            # to_empty() leaves what was in that memory before, mostly a positive number.
            self.reset_parameters()
        return self

    def forward(self) -> Tensor:
        """The temperature, of the shape of ``initial``."""
        return self.minimum + _above_zero(self.raw)

    def extra_repr(self) -> str:  # noqa: D102
        return f"shape={list(self.raw.shape)}, minimum={self.minimum:g}"


@overload
def decoupled_gumbel_softmax(
    logits: Tensor,
    tau_forward: Number | Tensor,
    tau_backward: Number | Tensor,
    hard: bool = ...,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_index: Literal[False] = ...,
    generator: torch.Generator | None = ...,
    rng_state: Tensor | None = ...,
) -> Tensor: ...


@overload
def decoupled_gumbel_softmax(
    logits: Tensor,
    tau_forward: Number | Tensor,
    tau_backward: Number | Tensor,
    hard: bool = ...,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_index: Literal[True],
    generator: torch.Generator | None = ...,
    rng_state: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def decoupled_gumbel_softmax(
    logits: Tensor,
    tau_forward: Number | Tensor,
    tau_backward: Number | Tensor,
    hard: bool = ...,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_index: bool,
    generator: torch.Generator | None = ...,
    rng_state: Tensor | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def decoupled_gumbel_softmax(
    logits: Tensor,
    tau_forward: Number | Tensor,
    tau_backward: Number | Tensor,
    hard: bool = False,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
    return_index: bool = False,
    generator: torch.Generator | None = None,
    rng_state: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""A sample at one temperature with the gradient of the sample at another, of the same noise.

    .. math::
        y = \operatorname{softmax}\big((l + g) / \tau_f\big), \qquad
        \partial y = \partial \operatorname{softmax}\big((l + g) / \tau_b\big)

    (Shah et al., arXiv 2410.13331: temperatures decoupled between forward and backward pass.) With
    ``hard=True`` the value is the one-hot vector of the argmax, which is the same at every
    :math:`\tau_f`: this is then ``gumbel_softmax(logits, tau_backward, hard=True)``. Beyond input
    and output only some numbers a row are kept; the backward recomputes the sample at
    :math:`\tau_b` from its noise. Differentiable any number of times, in reverse and forward mode,
    also by :mod:`torch.func`, where noise and samples are kept.

    Args:
        logits: as :func:`gumbel_ext.gumbel_softmax`.
        tau_forward: temperature of the value, > 0 and finite: a number, or a tensor that broadcasts
            to the shape of ``logits`` with ``dim`` reduced to 1. Receives no gradient.
        tau_backward: temperature of the gradient, the same. A tensor receives the gradient of the
            sample at it.
        hard: whether the value is one-hot.
        dim: dimension of the classes.
        mask: as :func:`gumbel_ext.gumbel_softmax`.
        return_index: whether to also return the index of the largest ``logits + noise``.
        generator: as :func:`gumbel_ext.gumbel_softmax`.
        rng_state: as :func:`gumbel_ext.gumbel_softmax`.

    Returns:
        ``y``, of the shape, dtype and memory format of ``logits``; with ``return_index=True`` also
        an int64 tensor of that shape without ``dim``.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`gumbel_ext.gumbel_softmax`.
    """
    name = "decoupled_gumbel_softmax"
    if has_torch_function((logits, tau_forward, tau_backward, mask, rng_state)):
        overridden: Tensor | tuple[Tensor, Tensor] = handle_torch_function(
            decoupled_gumbel_softmax,
            (logits, tau_forward, tau_backward, mask, rng_state),
            logits,
            tau_forward,
            tau_backward,
            hard,
            dim,
            mask=mask,
            return_index=return_index,
            generator=generator,
            rng_state=rng_state,
        )
        return overridden
    dim, hard = as_int(name, "dim", dim), as_bool(name, "hard", hard)
    return_index = as_bool(name, "return_index", return_index)
    rng_state = checked_state(name, logits, mask, generator, rng_state)
    check_supported(name, "logits", logits)
    taus = (
        *_checked_tau(name, tau_forward, "tau_forward"),
        *_checked_tau(name, tau_backward, "tau_backward"),
    )
    with ErrorsOf(name):
        y, index = _decoupled_gumbel_softmax(
            logits, *taus, hard, dim, mask, return_index, generator, rng_state
        )
    return (y, index) if return_index else y


def _checked_tau(function: str, tau: Any, name: str) -> tuple[float, Tensor | None]:
    number, tensor = split_tau(function, tau, name)
    if tensor is None:
        as_positive(function, name, number)
    else:
        check_supported(function, name, tensor)
        check_positive(function, name, tensor)
    return number, tensor
