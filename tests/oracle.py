"""What the tests compare with: float64 results on known noise, and error bounds with reasons."""

import functools
import itertools
import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gumbel_ext import _reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIXTEEN_BIT = (torch.float16, torch.bfloat16)

# (2, 13), for what older ones lack.
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

# Both words of the seed and the offset are used, and the seed is negative as int64.
SEED, OFFSET = 0xA4093822299F31D0, 0x13198A2E03707344


def as_int64(unsigned):
    """The int64 with the bits of an unsigned 64-bit number."""
    return unsigned - (1 << 64) if unsigned >> 63 else unsigned


def rng_state(seed=SEED, offset=OFFSET, device="cpu"):
    return torch.tensor([as_int64(seed), as_int64(offset)], device=device)


# Set by conftest.py for --device emulated: operators on tensors of the CPU run the CUDA kernels.
emulated = False


def runs_cpu_kernels(device):
    """Whether the kernels for the CPU run there, whose results are promised more exactly."""
    return torch.device(device).type == "cpu" and not emulated


def device_and_cpu(device):
    """``device``, then "cpu": for a loop whose body runs the kernels for CUDA, then the CPU's.

    Under emulation both are tensors of the CPU.
    """
    yield device
    if not emulated:
        yield "cpu"
        return
    torch.ops.gumbel_ext_emulated.give_back()
    try:
        yield "cpu"
    finally:
        torch.ops.gumbel_ext_emulated.take_over()


def default_rng_state(device):
    """The state of the generator that calls on this device read unless they are given one."""
    return torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()


def misaligned(x, device):
    """A copy on the device that begins one element past an aligned address."""
    return torch.cat([x.new_zeros(1), x.flatten()]).to(device)[1:].view(x.shape)


def placed(x, device, unaligned):
    return misaligned(x, device) if unaligned else x.to(device)


def row_shape(shape, dim):
    """Of one number a row: ``dim`` is 1."""
    return [1 if d == dim % len(shape) else n for d, n in enumerate(shape)]


_CHUNK = 1 << 15


@functools.cache
def _chunk_of_noise(seed, offset, number):
    """Small enough for the hundred temporaries of the generator to stay in the cache."""
    return _reference.gumbel_noise([_CHUNK], rng_state(seed, offset), [number * _CHUNK, 1])


def noise(shape, seed=SEED, offset=OFFSET):
    """Reference noise, float64 on the CPU.

    Noise depends on the linear position alone, so one cached row serves every shape.
    """
    count = math.prod(shape)
    chunks = [_chunk_of_noise(seed, offset, i) for i in range(-(-count // _CHUNK))]
    return torch.cat([torch.empty(0, dtype=torch.float64), *chunks])[:count].reshape(shape)


def noise_for(logits, used_rng_state):
    """Reference noise of a call that drew from a generator."""
    return _reference.gumbel_noise(logits.shape, used_rng_state.cpu())


def reference(logits, tau=1.0, hard=False, dim=-1, *, mask=None, noise):
    """``(y, index)`` in float64 on the CPU, from the values that ``logits`` really has."""
    mask = None if mask is None else mask.cpu()
    tau = tau.cpu().double() if isinstance(tau, torch.Tensor) else tau
    return _reference.gumbel_softmax(
        logits.detach().cpu().double(), tau, hard, dim, mask=mask, noise=noise
    )


# ---- error bounds -------------------------------------------------------------------------------


def eps(dtype):
    return torch.finfo(dtype).eps


def accumulation_eps(dtype):
    """16-bit tensors are computed in float32."""
    return eps(torch.float64 if dtype == torch.float64 else torch.float32)


def smallest(dtype):
    """What may vanish: float16 keeps its subnormal numbers, the kernels' float32 need not."""
    return 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).smallest_normal


def condition(logits, noise, tau, dim=-1):
    """``K = 1 + (max|l| + max|g|) / tau`` a row, ``dim`` kept: how far z magnifies rounding.

    On a GPU float32 noise is good to so much of its size or of 1 (docs/noise.md): a row of noise
    that is small all over is as inexact as one of size 1.
    """
    if not runs_cpu_kernels(logits.device):
        noise = noise.abs().clamp(min=1)
    logits = logits.detach().cpu().double()
    logits = torch.where(logits.isfinite(), logits, 0.0)
    tau = tau.detach().cpu().double() if isinstance(tau, torch.Tensor) else tau
    return 1 + (logits.abs().amax(dim, keepdim=True) + noise.abs().amax(dim, keepdim=True)) / tau


def relative_bound(dtype, k):
    """Page-wide target for values and gradients: ``4 eps + 16 K eps32``."""
    return 4 * eps(dtype) + 16 * k * accumulation_eps(dtype)


def assert_soft_close(y, expected, k):
    """Elementwise and relative, so small probabilities count as much as large ones."""
    actual = y.detach().cpu().double()
    allowed = expected * relative_bound(y.dtype, k) + smallest(y.dtype)
    excess = (actual - expected).abs() - allowed
    assert not (excess > 0).any(), (
        f"{int((excess > 0).sum())} of {excess.numel()} elements off, worst by {excess.max():.3g}"
    )
    assert torch.equal(actual.isnan(), expected.isnan())


def assert_rows_sum_to_one(y, dim=-1):
    total = y.detach().cpu().double().sum(dim)
    vanished = y.shape[dim] * smallest(y.dtype) if y.dim() else 0.0
    # The kernels sum in float32: the error of the denominator is common to the row.
    allowed = 4 * eps(y.dtype) + 16 * accumulation_eps(y.dtype) + vanished
    assert ((total - 1).abs() <= allowed).all()


def assert_one_hot(y, index, dim=-1):
    """Exact zeros and ones, the one at ``index``."""
    assert torch.equal(y, torch.zeros_like(y).scatter(dim, index.unsqueeze(dim), 1))


def assert_index_close(index, logits, noise, dim=-1):
    """The index of the maximum, except where float32 cannot tell the best two apart."""
    scores = logits.detach().cpu().double() + noise
    index = index.cpu()
    assert index.dtype == torch.int64
    chosen = scores.gather(dim, index.unsqueeze(dim)).squeeze(dim)
    size = (logits.detach().cpu().double().abs() + noise.abs()).amax(dim)
    tie = 8 * accumulation_eps(logits.dtype) * size
    lost = scores.amax(dim) - chosen
    assert (lost <= tie).all(), f"{int((lost > tie).sum())} wrong, worst by {lost.max():.3g}"
    # The allowance must not hide a general fault: near-ties are rare.
    assert (lost > 0).sum() <= 1 + index.numel() // 1000


def row_error(gradient, expected, dim=-1, floor=0.0):
    """Largest error of a row relative to its largest entry; ``floor`` is what may underflow."""
    gradient = gradient.detach().cpu().double()
    error = ((gradient - expected).abs().amax(dim, keepdim=True) - floor).clamp(min=0)
    return error / expected.abs().amax(dim, keepdim=True).clamp(min=1e-300)


def gradient_floor(dtype, logits, grad, tau, noise, dim=-1, mask=None):
    """What a row's gradient may lose without blame, an absolute number a row.

    One part is underflow: of y, where it is saved in ``dtype``, and of the gradient.  The other is
    the rounding of the float64 reference itself, which shows where a row's terms cancel.
    """
    grad = grad.detach().cpu().double().abs().amax(dim, keepdim=True)
    tau = tau.detach().cpu().double() if isinstance(tau, torch.Tensor) else tau
    y, index = reference(logits, tau, dim=dim, mask=mask, noise=noise)
    losers = y.scatter(dim, index.clamp(min=0).unsqueeze(dim), 0.0).amax(dim, keepdim=True)
    underflow = 4 * smallest(dtype) * (1 + grad / tau)
    return underflow + 16 * eps(torch.float64) * losers * grad / tau


def assert_row_errors(actual, expected, logits, grad, tau, noise, dim=-1, mask=None, slack=1.0):
    """The target for gradients: 99.9 % of rows within ``relative_bound``."""
    assert actual.dtype == logits.dtype
    assert actual.shape == logits.shape
    floor = gradient_floor(logits.dtype, logits, grad, tau, noise, dim, mask)
    bound = relative_bound(logits.dtype, condition(logits, noise, tau, dim))
    excess = (row_error(actual, expected, dim, floor) / bound).flatten()
    assert not excess.isnan().any()
    assert excess.quantile(0.999) <= slack, f"{excess.quantile(0.999):.3g} times the target"


def assert_tau_gradient_close(
    actual, expected, expected_logits, logits, grad, tau, noise, dim=-1, mask=None
):
    """dtau = -sum(log(y) dl) over classes and over the rows that share tau.

    Terms of both signs meet in it, so the error is relative to the sum of their sizes.
    """
    size = tau.detach().cpu().double()
    y, _ = reference(logits, size, dim=dim, mask=mask, noise=noise)
    terms = (torch.special.xlogy(expected_logits, y)).abs() / size
    lost = 32 * smallest(logits.dtype) * grad.cpu().double().abs() / size**2
    bound = relative_bound(logits.dtype, condition(logits, noise, size, dim))
    allowed = (bound * terms + lost).sum_to_size(tau.shape) + eps(logits.dtype) * expected.abs()
    assert ((actual.cpu().double() - expected).abs() <= allowed).all()


# ---- memory layouts -----------------------------------------------------------------------------


def _in_order(x, order):
    """``x`` with its dimensions laid out in memory in ``order``, the last one fastest."""
    back = sorted(range(x.dim()), key=lambda d: order[d])
    return x.permute(order).contiguous().permute(back)


def _spread(x):
    """Every second element of a larger tensor, in every dimension."""
    big = x.new_zeros([2 * n for n in x.shape])
    view = big[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


def _unaligned(x):
    """Contiguous, one element past an aligned address."""
    buffer = x.new_zeros(x.numel() + 1)
    return buffer[1:].view(x.shape).copy_(x)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "reversed": lambda x: _in_order(x, tuple(reversed(range(x.dim())))),
    "first_dim_fastest": lambda x: _in_order(x, (*range(1, x.dim()), 0)),
    "last_two_swapped": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "spread": _spread,
    "unaligned": _unaligned,
    "padded_rows": lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],
}


def layouts(x):
    """``(name, tensor)`` with the same values and shape in every memory layout there is."""
    for name, lay in LAYOUTS.items():
        laid = lay(x)
        assert torch.equal(laid, x)
        yield name, laid
    if x.dim() == 4:
        yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    if x.dim() == 5:
        yield "channels_last_3d", x.contiguous(memory_format=torch.channels_last_3d)


def expanded(x):
    """``(name, tensor)``: views of one slice of ``x`` with stride 0 in each set of dimensions."""
    for count in range(1, x.dim() + 1):
        for dims in itertools.combinations(range(x.dim()), count):
            slices = tuple(slice(0, 1) if d in dims else slice(None) for d in range(x.dim()))
            yield f"expanded_{dims}", x[slices].expand(x.shape)


# ---- what runs ----------------------------------------------------------------------------------


class DispatchLog(TorchDispatchMode):
    """The ops of this package that run, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gumbel_ext":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def lookup_inputs(shape, book, device, dtype=torch.float32, weight_dtype=None):
    """Logits and a codebook of shape `book`."""
    logits = torch.randn(shape, dtype=torch.float64)
    weight = torch.randn(book, dtype=torch.float64)
    return logits.to(device, dtype), weight.to(device, weight_dtype or dtype)
