"""Modules with a temperature that may be set at any time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from gumbel_ext._arguments import (
    as_positive,
    check_supported,
    is_fx_tracing,
    is_jit_tracing,
    is_traced,
    split_tau,
)
from gumbel_ext.temperature import TemperatureSchedule

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Temperature", "Tempered"]

Temperature: TypeAlias = float | Tensor | TemperatureSchedule | Callable[[], Tensor]


class Tempered(nn.Module):
    """Holds a temperature in one attribute, which is checked when it is set.

    Numbers are kept in a float64 buffer of that name, which is written in place where there is one:
    compiled and traced functions see it. A schedule, a module or another callable is the attribute
    itself.
    """

    _name_of_temperature: ClassVar[str] = "tau"
    _in_state: ClassVar[bool] = True

    # What reset_parameters() sets: the first number, or the one set while the buffer held none.
    _first_temperature: float | Tensor | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == self._name_of_temperature:
            self._set_temperature(value)
        else:
            super().__setattr__(name, value)

    def _set_temperature(self, value: Any) -> None:
        name = self._name_of_temperature
        makes_it = isinstance(value, TemperatureSchedule) or callable(value)
        if not makes_it:
            value = self._checked(value)
            held = self._buffers.get(name)
            if held is None or held.is_meta:
                self.__dict__["_first_temperature"] = value
            elif not isinstance(value, Tensor) or (
                value.shape == held.shape and value.device == held.device
            ):
                _write(held, value)
                return
        if hasattr(self, name):
            delattr(self, name)
        if makes_it:
            super().__setattr__(name, value)
        else:
            buffer = torch.as_tensor(value, dtype=torch.float64)
            self.register_buffer(name, buffer.clone(), self._in_state)

    def _checked(self, value: Any) -> float | Tensor:
        owner, name = type(self).__name__, self._name_of_temperature
        number, tensor = split_tau(
            owner, value, name, "a number, a TemperatureSchedule, a callable or a tensor"
        )
        if tensor is None:
            return as_positive(owner, name, number)
        check_supported(owner, name, tensor)
        if tensor.requires_grad:
            raise ValueError(
                f"{owner}: {name} must not be a tensor that requires a gradient; pass a callable "
                "that returns it, such as a LearnableTemperature"
            )
        tensor = tensor.to(torch.float64, copy=True)
        if tensor.is_cpu and not is_traced():
            for number in tensor.flatten().tolist():
                as_positive(owner, name, number)
        return tensor

    def reset_parameters(self) -> None:
        """Sets the temperature to what it was at first, also after ``to_empty()``.

        Of a module that makes the temperature, its own ``reset_parameters()`` is called; a schedule
        goes on where it is.
        """
        held = getattr(self, self._name_of_temperature)
        if self._name_of_temperature in self._buffers:
            if not held.is_meta and self._first_temperature is not None:
                _write(held, self._first_temperature)
        elif isinstance(held, nn.Module) and callable(getattr(held, "reset_parameters", None)):
            held.reset_parameters()  # type: ignore[operator]

    def _temperature_of_call(self) -> float | Tensor:
        name = self._name_of_temperature
        held = getattr(self, name)
        traced = is_traced()
        if name in self._buffers:
            # A number is cheaper for the operators than a tensor of one.
            plain = type(held) is Tensor and held.is_cpu and held.dim() == 0
            if held.is_meta and isinstance(self._first_temperature, float):
                # Deferred, and in no checkpoint: the parameters may have come from one since.
                return self._first_temperature
            if traced or not plain or torch._C._are_functorch_transforms_active():
                return held  # type: ignore[no-any-return]
            return held if held.requires_grad else float(held)
        by_fx = is_fx_tracing() and not isinstance(held, TemperatureSchedule)
        if (is_jit_tracing() or by_fx) and not isinstance(held, nn.Module):
            warnings.warn(
                f"{type(self).__name__}: a trace keeps the present {name}; one that changes must "
                "be a number, which is a buffer, or a module",
                torch.jit.TracerWarning,  # type: ignore[attr-defined]
                stacklevel=4,
            )
        if isinstance(held, TemperatureSchedule):
            return held.tensor if traced else held.tau
        return held()  # type: ignore[no-any-return]

    def _repr_of_temperature(self) -> str:
        name = self._name_of_temperature
        held = getattr(self, name)
        if isinstance(held, nn.Module):
            return ""
        if name in self._buffers:
            known = self._first_temperature if held.is_meta else held
            if isinstance(known, Tensor):
                plain = type(known) is Tensor and known.dim() == 0 and not known.is_meta
                return f"{name}={known.item():g}" if plain else f"{name}: {list(known.shape)}"
            return f"{name}={known:g}"
        return f"{name}={held!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        name = self._name_of_temperature
        before = self._buffers.get(name)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self._buffers.get(name)
        if before is None or after is None or after is before or type(after) is not type(before):
            return self
        if after.dtype != before.dtype:
            # A temperature in bfloat16 has two digits.
            after = self._buffers[name] = torch.empty_like(after, dtype=before.dtype)
        # to_empty() leaves what was in that memory before: some number, which is no temperature.
        value = self._first_temperature if before.is_meta else before
        if value is not None:
            _write(after, value)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        held = getattr(self, self._name_of_temperature)
        if self._in_state and isinstance(held, TemperatureSchedule):
            destination[f"{prefix}{self._name_of_temperature}"] = held.tensor.clone()

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
        held = getattr(self, self._name_of_temperature)
        if not (self._in_state and isinstance(held, TemperatureSchedule)):
            return
        key = f"{prefix}{self._name_of_temperature}"
        if key in state_dict:
            held.set(float(state_dict[key]))
            if key in unexpected_keys:
                unexpected_keys.remove(key)
        elif strict:
            missing_keys.append(key)


def _write(buffer: Tensor, value: float | Tensor) -> None:
    with torch.no_grad():
        buffer.copy_(value) if isinstance(value, Tensor) else buffer.fill_(value)
