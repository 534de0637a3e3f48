"""What the public functions check and turn their arguments into, before an op sees them."""

from __future__ import annotations

import numbers
import sys
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from gumbel_ext._checkpoint import check_not_recomputed

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def split_tau(function: str, tau: Any, name: str = "tau") -> tuple[float, Tensor | None]:
    """Splits a temperature into the op's number and tensor; one of them is not used."""
    if isinstance(tau, Tensor):
        # A buffer made of an int is as good as the int; bool and complex numbers the op refuses.
        whole = not (tau.is_floating_point() or tau.is_complex() or tau.dtype == torch.bool)
        return 1.0, tau.double() if whole else tau
    if isinstance(tau, bool) or not isinstance(tau, (int, float, torch.SymFloat, torch.SymInt)):
        if isinstance(tau, bool) or not isinstance(tau, numbers.Real):
            raise TypeError(
                f"{function}: {name} must be a number or a tensor, got {tau!r} of type "
                f"{type(tau).__name__}"
            )
        tau = float(tau)  # a float32 of NumPy, for one
    return as_graph_input(tau)


def as_graph_input(number: Any) -> tuple[float, Tensor | None]:
    """A number as an op takes it, and under compilation the tensor that takes its place.

    As an argument of the op, or of torch.full, a number would become a constant of the graph, and
    an annealed one would compile it anew at every step. A product keeps it an input.
    """
    if torch.compiler.is_compiling():
        # On the CPU whatever the default device: there it goes with logits of every device.
        return 1.0, torch.ones((), dtype=torch.float64, device="cpu") * number
    return float(number), None


def state_beside(rng_state: Tensor | None, device: torch.device) -> Tensor | None:
    """The ops read a state on the CPU for logits elsewhere; fake tensors do not allow that."""
    if rng_state is None or not torch.compiler.is_compiling() or rng_state.device == device:
        return rng_state
    return rng_state.to(device)


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Without importing what takes half a second: where there is a DTensor it is imported."""
    if isinstance(tensor, torch.nn.Parameter) and type(tensor) is torch.nn.Parameter:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def check_tensor(function: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} must be a tensor, got {type(value).__name__}")


def check_local(function: str, name: str, value: object) -> None:
    """For functions that are not defined on a DTensor."""
    check_tensor(function, name, value)
    if type(value) is not Tensor and is_dtensor(value):
        raise TypeError(f"{function}: {name} must not be a DTensor, got one; see its full_tensor()")


def check_dim(function: str, dim: object) -> None:
    if not isinstance(dim, (int, torch.SymInt)):
        raise TypeError(f"{function}: dim must be an int, got {dim!r}")


def wrapped_dim(function: str, dim: int, logits: Tensor) -> int:
    """``dim`` counted from the front; logits without dimensions have one."""
    check_dim(function, dim)
    dims = max(logits.dim(), 1)
    if not -dims <= dim < dims:
        raise IndexError(
            f"{function}: dim must be between {-dims} and {dims - 1} for logits of "
            f"{logits.dim()} dimensions, got {dim}"
        )
    return dim % dims


def check_count(function: str, name: str, count: object, least: int) -> None:
    if isinstance(count, bool) or not isinstance(count, (int, torch.SymInt)):
        raise TypeError(f"{function}: {name} must be an int, got {count!r}")
    if count < least:
        raise ValueError(f"{function}: {name} must be at least {least}, got {count}")


def check_broadcast(function: str, name: str, operand: Tensor, logits: Tensor) -> None:
    """Whether ``operand`` broadcasts to ``logits`` without growing them."""
    missing = logits.dim() - operand.dim()
    if missing < 0 or any(
        n != 1 and n != m for n, m in zip(operand.shape, logits.shape[missing:], strict=True)
    ):
        raise ValueError(
            f"{function}: {name} must broadcast to the shape of logits, {list(logits.shape)}, got "
            f"shape {list(operand.shape)}"
        )


def check_optional(
    function: str,
    mask: Tensor | None,
    generator: torch.Generator | None,
    rng_state: Tensor | None,
    device: torch.device,
) -> None:
    """Checks what the op's schema would reject in words that do not name the argument."""
    if mask is not None:
        check_tensor(function, "mask", mask)
    if rng_state is not None:
        check_tensor(function, "rng_state", rng_state)
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"{function}: generator must be a torch.Generator, got {type(generator).__name__}"
        )
    if generator.device.type != device.type:
        raise ValueError(
            f"{function}: generator must be on the device of the result ({device}), got one on "
            f"{generator.device}"
        )
    if torch.compiler.is_exporting():
        # The exporter would make the generator of the example inputs a constant of the program.
        raise RuntimeError(
            f"{function}: generator cannot be an input of an exported program; pass rng_state"
        )
    check_not_recomputed(function, generator)


def checked_state(
    function: str,
    logits: Tensor,
    dim: int,
    mask: Tensor | None,
    generator: torch.Generator | None,
    rng_state: Tensor | None,
) -> Tensor | None:
    """Checks what all samplers of a row have in common; returns the state as the op reads it."""
    check_local(function, "logits", logits)
    check_dim(function, dim)
    check_optional(function, mask, generator, rng_state, logits.device)
    return state_beside(rng_state, logits.device)
