"""What the public functions check and turn their arguments into, before an op sees them."""

from __future__ import annotations

import math
import numbers
import operator
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor
from torch.fx import _symbolic_trace

from gumbel_ext._checkpoint import check_not_recomputed

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

try:
    from numpy import ndarray as _Array
except ImportError:
    _Array = ()  # type: ignore[assignment, misc]


_INT64 = 1 << 63
SUPPORTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def described(value: object) -> str:
    """A value in an error, on one line whatever it is."""
    if isinstance(value, Tensor):
        return f"a tensor of dtype {value.dtype}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_bool(value: object) -> bool:
    """Python's, NumPy's, or a tensor of them, which have an index and are no integers."""
    if isinstance(value, Tensor):
        return value.dtype == torch.bool
    return type(value).__name__ in ("bool", "bool_")


def as_int(
    function: str, name: str, value: Any, least: int | None = None, wanted: str = "an int"
) -> int:
    """``value`` as :func:`operator.index` has it: all that PyTorch takes for a size or ``dim``."""
    if type(value) is not int and not isinstance(value, torch.SymInt):
        number = value
        try:
            value = None if _is_bool(number) else operator.index(number)
        except TypeError:
            value = None
        if value is None:
            raise TypeError(f"{function}: {name} must be {wanted}, got {described(number)}")
    # Not while compiling, where a size is an int to Dynamo: the comparison would bound it.
    compiling = torch.compiler.is_compiling()
    if not compiling and type(value) is int and not -_INT64 <= value < _INT64:
        raise ValueError(f"{function}: {name} must fit into 64 bits, got {described(value)}")
    if least is not None and value < least:
        raise ValueError(f"{function}: {name} must be at least {least}, got {value}")
    return value  # type: ignore[no-any-return]


def as_size(function: str, size: Any) -> tuple[int, ...]:
    """A shape, of an int or ints; in a TorchScript trace they are tensors and become constants."""
    extents = size if isinstance(size, Sequence) and not isinstance(size, str) else (size,)
    return tuple(as_int(function, "size", extent, 0, "an int or ints") for extent in extents)


def as_bool(function: str, name: str, value: Any) -> bool:
    """``value``, a bool of Python or NumPy, a tensor of one, 0 or 1."""
    if type(value) is bool:
        return value
    if isinstance(value, torch.SymBool) or (_is_bool(value) and value.ndim == 0):
        return bool(value)
    if isinstance(value, numbers.Integral) and value in (0, 1):
        return bool(value)
    raise TypeError(f"{function}: {name} must be a bool, got {described(value)}")


def as_number(function: str, name: str, value: Any, wanted: str = "a number") -> float:
    """``value`` as a float, infinite where no float is as large."""
    if type(value) is float:
        return value
    # Asked first, because the others take a while to say no.
    known = type(value) is int
    if not known:
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            return torch.sym_float(value)  # type: ignore[no-any-return]
        known = isinstance(value, numbers.Real) or (
            isinstance(value, _Array) and value.ndim == 0 and value.dtype.kind in "iuf"
        )
    if not known or isinstance(value, bool):
        raise TypeError(
            f"{function}: {name} must be {wanted}, got {described(value)} of type "
            f"{type(value).__name__}"
        )
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def as_positive(function: str, name: str, value: Any, wanted: str = "a number") -> float:
    """``value`` as a float that is a temperature, a gap or the like."""
    number = as_number(function, name, value, wanted)
    if not 0 < number < math.inf:
        raise ValueError(f"{function}: {name} must be positive and finite, got {number}")
    return number


def is_whole(tensor: Tensor) -> bool:
    """Whether its elements are whole numbers, which bools are not."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def split_tau(
    function: str, tau: Any, name: str = "tau", wanted: str = "a number or a tensor"
) -> tuple[float, Tensor | None]:
    """Splits a temperature into the op's number and tensor; one of them is not used."""
    if isinstance(tau, _Array):
        try:  # noqa: SIM105 (nothing that Dynamo has to look into)
            tau = torch.as_tensor(tau)
        except TypeError:
            pass  # Not of numbers, and refused below.
    if isinstance(tau, Tensor):
        check_dense(function, name, tau)
        # A buffer made of an int is as good as the int; bool and complex numbers the op refuses.
        return 1.0, tau.double() if is_whole(tau) else tau
    return as_graph_input(as_number(function, name, tau, wanted))


def as_graph_input(number: float) -> tuple[float, Tensor | None]:
    """A number as an op takes it, and under compilation the tensor that takes its place.

    As an argument of the op, or of torch.full, a number would become a constant of the graph, and
    an annealed one would compile it anew at every step. A product keeps it an input.
    """
    if torch.compiler.is_compiling():
        # On the CPU whatever the default device: there it goes with logits of every device.
        return 1.0, torch.ones((), dtype=torch.float64, device="cpu") * number
    return float(number), None


# The second is its name in earlier versions of torch.
is_fx_tracing: Callable[[], bool] = (
    getattr(_symbolic_trace, "is_fx_symbolic_tracing", None) or _symbolic_trace.is_fx_tracing
)


def is_jit_tracing() -> bool:
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def is_traced() -> bool:
    """Whether what is computed is recorded, to be computed again with other values in tensors."""
    if torch.compiler.is_compiling() or is_jit_tracing() or is_fx_tracing():
        return True
    mode, keys = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey
    # A fake mode takes no tensor that is not an input.
    return mode(keys.PROXY) is not None and mode(keys.FAKE) is None


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
    # Others that are nested the op refuses.
    if type(value) is not Tensor and value.is_nested:
        raise TypeError(f"{function}: {name} must be a dense (strided) tensor, got a nested tensor")


def check_local(function: str, name: str, value: object) -> None:
    """For functions that are not defined on a DTensor."""
    check_tensor(function, name, value)
    if type(value) is not Tensor and is_dtensor(value):
        raise TypeError(f"{function}: {name} must not be a DTensor, got one; see its full_tensor()")


def check_dense(function: str, name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        kind = "a quantized tensor" if tensor.is_quantized else kind
        raise TypeError(f"{function}: {name} must be a dense (strided) tensor, got {kind}")


def check_supported(function: str, name: str, tensor: Tensor) -> None:
    """Layout and dtype of tensors that a function looks at before an op does."""
    check_dense(function, name, tensor)
    if tensor.dtype not in SUPPORTED:
        raise TypeError(
            f"{function}: {name} must have dtype float16, bfloat16, float32 or float64, got "
            f"{tensor.dtype}"
        )


def check_mask(function: str, mask: object, tensor: Tensor, name: str = "logits") -> None:
    """Whether ``mask`` is bool and broadcasts to ``tensor``."""
    check_tensor(function, "mask", mask)
    assert isinstance(mask, Tensor)
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{function}: mask must have dtype bool (True = may be chosen), got {mask.dtype}"
        )
    check_dense(function, "mask", mask)
    check_broadcast(function, "mask", mask, tensor, name)


def wrapped_dim(function: str, dim: int, logits: Tensor) -> int:
    """``dim`` counted from the front; logits without dimensions have one."""
    dim = as_int(function, "dim", dim)
    dims = max(logits.dim(), 1)
    if not -dims <= dim < dims:
        raise IndexError(
            f"{function}: dim must be between {-dims} and {dims - 1} for logits of "
            f"{logits.dim()} dimensions, got {dim}"
        )
    return dim % dims


def check_broadcast(
    function: str, name: str, operand: Tensor, target: Tensor, target_name: str = "logits"
) -> None:
    """Whether ``operand`` broadcasts to ``target`` without growing it."""
    missing = target.dim() - operand.dim()
    if missing < 0 or any(
        n != 1 and n != m for n, m in zip(operand.shape, target.shape[missing:], strict=True)
    ):
        raise ValueError(
            f"{function}: {name} must broadcast to the shape of {target_name}, "
            f"{list(target.shape)}, got shape {list(operand.shape)}"
        )


def check_positive(function: str, name: str, tensor: Tensor) -> None:
    """Looks at the values where that neither waits for a device nor breaks a graph."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_cpu
    if not plain or torch._C._are_functorch_transforms_active() or is_traced():
        return
    wrong = tensor.detach()[~((tensor > 0) & (tensor < torch.inf))]
    if wrong.numel():
        raise ValueError(
            f"{function}: {name} must be positive and finite, got {wrong.flatten()[0].item()}"
        )


class ErrorsOf:
    """What functions and ops called inside say of their arguments is said of this function."""

    def __init__(self, function: str) -> None:
        self.function = function

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind in (TypeError, ValueError, IndexError):
            function, colon, message = str(error).partition(": ")
            if colon and function.isidentifier():
                raise kind(f"{self.function}: {message}") from None


def check_device(function: str, device: object) -> None:
    """What the schema of torch.empty would reject in words that do not name the argument."""
    if device is None or isinstance(device, torch.device):
        return
    if isinstance(device, bool) or not isinstance(device, (str, int)):
        raise TypeError(f"{function}: device must be a device, got {described(device)}")
    try:
        torch.device(device)
    except RuntimeError:
        raise ValueError(f"{function}: device must be a device, got {device!r}") from None


def empty(
    function: str, dtype: torch.dtype | None, device: torch.device | str | int | None
) -> Tensor:
    """A tensor without elements, for ops that have no input but constants.

    TorchScript evaluates an op once and for all if its inputs are constants, unless it knows it for
    a random one; only torch's own are known to it. The one here draws nothing.
    """
    if dtype is not None and dtype not in SUPPORTED:
        raise TypeError(
            f"{function}: dtype must be float16, bfloat16, float32 or float64, got "
            f"{described(dtype)}"
        )
    check_device(function, device)
    if is_jit_tracing():
        return torch.rand(0, dtype=dtype, device=device)
    return torch.empty(0, dtype=dtype, device=device)


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
    mask: Tensor | None,
    generator: torch.Generator | None,
    rng_state: Tensor | None,
) -> Tensor | None:
    """Checks what all samplers of a row have in common; returns the state as the op reads it."""
    check_local(function, "logits", logits)
    check_optional(function, mask, generator, rng_state, logits.device)
    return state_beside(rng_state, logits.device)


def checked_noise(
    function: str,
    size: Any,
    dtype: torch.dtype | None,
    device: torch.device | str | int | None,
    generator: torch.Generator | None,
    rng_state: Tensor | None,
) -> tuple[Tensor, tuple[int, ...], Tensor | None]:
    """Checks what functions that return noise take: ``like``, shape and state of the op."""
    shape = as_size(function, size)
    like = empty(function, dtype, device)
    check_optional(function, None, generator, rng_state, like.device)
    return like, shape, state_beside(rng_state, like.device)
