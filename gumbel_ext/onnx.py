"""The operators in ONNX, for :func:`torch.onnx.export`::

    import gumbel_ext.onnx

    torch.onnx.export(
        model, args, dynamo=True, custom_translation_table=gumbel_ext.onnx.translation_table()
    )

Forward only, from opset 18 on. Imported on its own, because it needs the package onnxscript.

The graph computes the noise of ``docs/noise.md``, random words to the bit and their logarithms in
float64, as :mod:`gumbel_ext._reference` does; ``logits + noise`` and what follows is in float32, or
float64 for float64 logits. ONNX has no errors for values: a temperature that is not positive gives
what the division gives.

With ``rng_state`` as an input of the model, its outputs are those of PyTorch. Without, every run
draws a seed from ONNX's RandomUniform: the distribution is right, the numbers are not PyTorch's,
and no seed of PyTorch's has a say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Optional, TypeAlias, Union

import torch

try:
    import onnxscript
    from onnxscript import BFLOAT16, BOOL, DOUBLE, FLOAT, FLOAT16, INT64
except ImportError as error:
    raise ImportError(
        "gumbel_ext.onnx needs onnxscript; run: pip install onnx onnxscript"
    ) from error

from gumbel_ext._reference import _KEY_STEPS, _MULTIPLIERS, _ROUNDS, _WORD

__all__ = ["translation_table"]

op: Any = onnxscript.opset18

# Symbolic tensors. The exporter reads these annotations at run time, unions as typing.Union.
Value: TypeAlias = Any
Floating: TypeAlias = Union[FLOAT16, BFLOAT16, FLOAT, DOUBLE]  # noqa: UP007


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The argument ``custom_translation_table`` of :func:`torch.onnx.export`, ``dynamo=True``.

    Returns:
        a new dict from operators to functions that write them in ONNX, to be merged with others.
    """
    ops = torch.ops.gumbel_ext
    return {
        ops.gumbel_softmax.default: _gumbel_softmax,
        ops.gumbel_argmax.default: _gumbel_argmax,
        ops.gumbel_noise.default: _gumbel_noise,
        ops.draw_rng_state.default: _draw_rng_state,
    }


# ---- the operators ------------------------------------------------------------------------------


def _gumbel_softmax(
    logits: Floating,
    tau: float,
    tau_tensor: Optional[Floating],  # noqa: UP045
    hard: bool,
    dim: int,
    mask: Optional[BOOL],  # noqa: UP045
    return_index: bool,
    generator: Optional[str],  # noqa: UP045
    rng_state: Optional[INT64],  # noqa: UP045
    positions: Optional[Sequence[INT64]] = None,  # noqa: UP045
) -> tuple[Floating, INT64, INT64]:
    _check_positions("gumbel_softmax", positions)
    state = _state(rng_state)
    scalar = _rank(logits) == 0
    dim = 0 if scalar else dim
    scores = _scores(logits, mask, state)
    index = _choice(scores, mask, dim)
    peak = op.GatherElements(scores, index, axis=dim)
    if hard:
        classes = op.Gather(op.Shape(scores), _ints([dim]))
        # Not every runtime has OneHot for float64.
        off_on = _constant(torch.tensor([0.0, 1.0]))
        y = op.OneHot(op.Squeeze(index, _ints([dim])), classes, off_on, axis=dim)
        y = op.Cast(y, to=scores.dtype.value)
        # A maximum of +inf is a choice; of -inf or NaN it is none, and the row is NaN.
        infinite = op.Equal(peak, _like(scores, math.inf))
        y = op.Add(y, op.Where(infinite, _like(scores, 0.0), op.Sub(peak, peak)))
    else:
        # The maximum goes before the division: the smallest tau then gives 0 and -inf.
        temperature = (
            op.Cast(tau_tensor, to=scores.dtype.value)
            if tau_tensor is not None
            else _like(scores, tau)
        )
        smallest = 5e-324 if scores.dtype == DOUBLE.dtype else 2.0**-149
        temperature = op.Max(temperature, _like(scores, smallest))
        y = op.Softmax(op.Div(op.Sub(scores, peak), temperature), axis=dim)
        # NaN where the maximum is NaN or infinite, and the row with it; else 0.
        y = op.Add(y, op.Sub(peak, peak))
    if mask is not None:
        possible = _possible(mask, scores, dim)
        y = op.Where(possible, y, _like(scores, 0.0))
        index = op.Where(possible, index, _ints(-1))
    y = op.Cast(y, to=logits.dtype.value)
    index = op.Squeeze(index, _ints([dim]))
    if scalar:
        y = op.Squeeze(y, _ints([0]))
    return y, index if return_index else _ints([]), op.Identity(state)


def _gumbel_argmax(
    logits: Floating,
    dim: int,
    keepdim: bool,
    mask: Optional[BOOL],  # noqa: UP045
    generator: Optional[str],  # noqa: UP045
    rng_state: Optional[INT64],  # noqa: UP045
    positions: Optional[Sequence[INT64]] = None,  # noqa: UP045
) -> INT64:
    _check_positions("gumbel_argmax", positions)
    scalar = _rank(logits) == 0
    dim = 0 if scalar else dim
    scores = _scores(logits, mask, _state(rng_state))
    index: INT64 = _choice(scores, mask, dim)
    if mask is not None:
        index = op.Where(_possible(mask, scores, dim), index, _ints(-1))
    if not keepdim or scalar:
        index = op.Squeeze(index, _ints([dim]))
    return index


def _gumbel_noise(
    like: Floating,
    size: INT64,
    generator: Optional[str],  # noqa: UP045
    rng_state: Optional[INT64],  # noqa: UP045
    positions: Optional[Sequence[INT64]] = None,  # noqa: UP045
) -> Floating:
    _check_positions("gumbel_noise", positions)
    count = op.ReduceProd(size, keepdims=0)
    noise = op.Reshape(_noise(count, _state(rng_state)), size, allowzero=1)
    rounded: Floating = op.Cast(noise, to=like.dtype.value)
    return rounded


def _check_positions(name: str, positions: object) -> None:
    if positions is not None:
        raise NotImplementedError(
            f"{name}: positions, of a part of a larger tensor, cannot be exported to ONNX"
        )


def _rank(value: Value) -> int:
    return len(value.shape)


def _scores(logits: Value, mask: Value | None, state: Value) -> Value:
    """``logits + noise`` in float32 or float64, -inf where the mask forbids; at least 1-D."""
    if _rank(logits) == 0:
        logits = op.Reshape(logits, _ints([1]))
    dtype = DOUBLE.dtype if logits.dtype == DOUBLE.dtype else FLOAT.dtype
    noise = op.Reshape(_noise(op.Size(logits), state), op.Shape(logits), allowzero=1)
    scores = op.Add(op.Cast(logits, to=dtype.value), op.Cast(noise, to=dtype.value))
    scores.dtype = dtype
    if mask is not None:
        scores = op.Where(mask, scores, _like(scores, -math.inf))
        scores.dtype = dtype
    return scores


def _choice(scores: Value, mask: Value | None, dim: int) -> Value:
    """Index of the first maximum, or of the first NaN if there is one; ``dim`` kept."""
    comparable = scores
    if mask is not None:
        # An allowed -inf goes before what is not allowed.
        lowest = torch.finfo(_dtype(scores)).min
        comparable = op.Where(mask, op.Max(scores, _like(scores, lowest)), scores)
    isnan = op.Cast(op.IsNaN(scores), to=INT64.dtype.value)
    return op.Where(
        op.Cast(op.ReduceMax(isnan, _ints([dim])), to=BOOL.dtype.value),
        op.ArgMax(isnan, axis=dim),
        op.ArgMax(comparable, axis=dim),
    )


def _possible(mask: Value, scores: Value, dim: int) -> Value:
    """Whether a row may choose any class; ``dim`` kept."""
    allowed = op.Expand(op.Cast(mask, to=INT64.dtype.value), op.Shape(scores))
    return op.Cast(op.ReduceMax(allowed, _ints([dim])), to=BOOL.dtype.value)


# ---- the noise ----------------------------------------------------------------------------------


def _draw_rng_state(
    like: Floating,
    generator: Optional[str],  # noqa: UP045
    after: Optional[INT64] = None,  # noqa: UP045
) -> INT64:
    state: INT64 = _state(None)
    return state


def _state(rng_state: Value | None) -> Value:
    """``[seed, offset]``, drawn from RandomUniform if there is none: four times 16 bits."""
    if rng_state is not None:
        return rng_state
    drawn = op.RandomUniform(dtype=FLOAT.dtype.value, low=0.0, high=65536.0, shape=[4])
    # The upper end may be reached by rounding. The highest part carries the sign of an int64.
    parts = op.BitwiseAnd(op.Cast(op.Floor(drawn), to=INT64.dtype.value), _ints(0xFFFF))
    parts = op.Sub(parts, _ints([0, 0, 0, 0x8000]))
    seed = op.ReduceSum(op.Mul(parts, _ints([1, 1 << 16, 1 << 32, 1 << 48])))
    return op.Concat(seed, _ints([0]), axis=0)


def _noise(count: Value, state: Value) -> Value:
    """Gumbel noise of positions 0 to ``count - 1``, float64: ``_reference.gumbel_noise``."""
    seed, offset = (op.Gather(state, _ints([i])) for i in (0, 1))
    low = op.Add(_low(offset), _ints([[0], [1]]))
    high = _low(op.Add(_high(offset), _shift_right(low, 32)))
    block = op.Range(_ints(0), _shift_right(op.Add(count, _ints(3)), 2), _ints(1))
    both = _philox4x32_10(
        (_low(low), high, _low(block), _shift_right(block, 32)),
        (_low(seed), _high(seed)),
        op.Concat(_ints([2]), op.Shape(block), axis=0),
    )
    both = op.Slice(both, _ints([0]), op.Reshape(count, _ints([1])), _ints([1]))
    hi, lo = (op.Gather(both, _ints(i)) for i in (0, 1))
    # E = -log(1 - v). Where v is small, 1 - v has lost digits of v: the quotient v / (1 - (1 - v))
    # gives them back. Where it is large, 1 - v comes from the complemented words, exactly.
    v = _fraction(hi, lo)
    complement = _fraction(op.Sub(_ints(_WORD), hi), op.Sub(_ints(_WORD), lo))
    rest = op.Sub(_doubles(1.0), v)
    lost = op.Sub(_doubles(1.0), rest)
    zero = op.Equal(lost, _doubles(0.0))
    scale = op.Where(zero, _doubles(1.0), op.Div(v, op.Where(zero, _doubles(1.0), lost)))
    small = op.Where(zero, v, op.Mul(op.Neg(op.Log(rest)), scale))
    exponential = op.Where(op.Less(v, _doubles(0.5)), small, op.Neg(op.Log(complement)))
    return op.Neg(op.Log(exponential))


def _philox4x32_10(counter: Sequence[Value], key: Sequence[Value], shape: Value) -> Value:
    """``[2, 4 n]``: the words of ``n`` blocks for the two values of a call's counter.

    Words c0 and c2 are one tensor and c1 and c3 another, of shape ``[2, 2, n]``, because exporters
    and runtimes take their time by the number of nodes.
    """
    c0, c1, c2, c3 = (op.Unsqueeze(op.Expand(word, shape), _ints([0])) for word in counter)
    even, odd = op.Concat(c0, c2, axis=0), op.Concat(c1, c3, axis=0)
    keys = op.Reshape(op.Concat(*key, axis=0), _ints([2, 1, 1]))
    multipliers = _ints(_MULTIPLIERS, (2, 1, 1))
    for i in range(_ROUNDS):
        round_keys = _low(op.Add(keys, _ints([i * step for step in _KEY_STEPS], (2, 1, 1))))
        # The high and low 32 bits of the products, with no step above 2^49.
        below = op.Mul(multipliers, op.BitwiseAnd(even, _ints(0xFFFF)))
        above = op.Add(op.Mul(multipliers, _shift_right(even, 16)), _shift_right(below, 16))
        high = _shift_right(above, 16)
        low = op.Add(
            op.Mul(op.BitwiseAnd(above, _ints(0xFFFF)), _ints(1 << 16)),
            op.BitwiseAnd(below, _ints(0xFFFF)),
        )
        swapped = _ints([1, 0])
        even = op.BitwiseXor(op.BitwiseXor(op.Gather(high, swapped), odd), round_keys)
        odd = op.Gather(low, swapped)
    words = op.Concat(op.Unsqueeze(even, _ints([1])), op.Unsqueeze(odd, _ints([1])), axis=1)
    return op.Reshape(op.Transpose(words, perm=[2, 3, 0, 1]), _ints([2, -1]))


def _fraction(hi: Value, lo: Value) -> Value:
    """``(hi * 2^32 + lo + 1/2) * 2^-64`` in float64."""
    hi, lo = (op.Cast(word, to=DOUBLE.dtype.value) for word in (hi, lo))
    whole = op.Add(op.Mul(hi, _doubles(2.0**32)), op.Add(lo, _doubles(0.5)))
    return op.Mul(whole, _doubles(2.0**-64))


# BitShift is for unsigned integers, and multiplication and division for signed ones alone in
# runtimes: words are int64 within [0, 2^32), shifts are divisions.


def _shift_right(word: Value, bits: int) -> Value:
    """Of a number that is not negative."""
    return op.Div(word, _ints(1 << bits))


def _low(x: Value) -> Value:
    return op.BitwiseAnd(x, _ints(_WORD))


def _high(x: Value) -> Value:
    """Of an int64 read as unsigned: the difference divides without a rest, whatever its sign."""
    return _low(op.Div(op.Sub(x, _low(x)), _ints(1 << 32)))


def _ints(value: Any, shape: tuple[int, ...] | None = None) -> Value:
    tensor = torch.tensor(value, dtype=torch.int64)
    return _constant(tensor if shape is None else tensor.reshape(shape))


def _doubles(value: Any) -> Value:
    return _constant(torch.tensor(value, dtype=torch.float64))


def _like(tensor: Value, value: Any) -> Value:
    return _constant(torch.tensor(value, dtype=_dtype(tensor)))


def _dtype(tensor: Value) -> torch.dtype:
    return torch.float64 if tensor.dtype == DOUBLE.dtype else torch.float32


def _constant(tensor: torch.Tensor) -> Value:
    return op.Constant(value=onnxscript.ir.tensor(tensor.numpy()))
