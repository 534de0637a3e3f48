"""The ops of this package in plain PyTorch: the oracle of the tests, and the traceable form.

Nothing here calls a compiled op.  In float64 every result is accurate to a few units in the last
place, so the compiled kernels of every dtype and device are compared with it; every step is an
ordinary differentiable tensor operation, so derivatives of any order come from autograd alone.

Noise is a pure function of ``(seed, offset, position)``, see :func:`gumbel_noise`.

Sources
    Philox4x32-10: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
    SC 2011.  Gumbel-max: Gumbel, "Statistical theory of extreme values", 1954.  Gumbel-softmax:
    Jang, Gu and Poole, arXiv:1611.01144; Maddison, Mnih and Teh, arXiv:1611.00712.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def _low(x: Tensor) -> Tensor:
    """Low 32 bits of an int64 tensor, as values in [0, 2^32)."""
    return x & _WORD


def _high(x: Tensor) -> Tensor:
    """High 32 bits of an int64 tensor read as unsigned; the mask undoes the sign-filling shift."""
    return (x >> 32) & _WORD


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``constant * word``.

    The full product needs 64 unsigned bits, one more than int64 has, and signed overflow is
    undefined in the C++ that compilers of PyTorch emit.  With ``word`` split in 16-bit halves every
    intermediate stays below 2^49.
    """
    below = constant * (word & 0xFFFF)
    above = constant * (word >> 16) + (below >> 16)
    return above >> 16, ((above & 0xFFFF) << 16) | (below & 0xFFFF)


def philox4x32_10(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Philox4x32-10 of Salmon et al. (2011): ten rounds over four 32-bit counter words.

    Args:
        counter: four int64 tensors that broadcast together, values in [0, 2^32).
        key: two int64 tensors that broadcast with them, values in [0, 2^32).

    Returns:
        Four int64 tensors of random words, values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = _low(k0 + _KEY_STEPS[0]), _low(k1 + _KEY_STEPS[1])
    return c0, c1, c2, c3


def random_block(block: Tensor, rng_state: Tensor, k: int = 0) -> Words:
    """The four words that block ``k`` of a call holds for positions ``4*block ... 4*block + 3``.

    ``Philox4x32-10(key = seed, counter = (offset + k : 64 bits, block : 64 bits))``, which equals
    ``at::Philox4_32(seed, block, offset + k)``.

    Args:
        block: int64 tensor, ``position >> 2``.
        rng_state: int64 tensor ``[seed, offset]``, both read as unsigned 64-bit numbers.
        k: 0 for the words ``hi``, 1 for the words ``lo``.
    """
    seed, offset = rng_state[0], rng_state[1]
    low = _low(offset) + k
    # The carry is added by hand, so an offset close to 2^64 wraps without signed overflow.
    high = _low(_high(offset) + (low >> 32))
    return philox4x32_10(
        (_low(low), high, _low(block), _high(block)),
        (_low(seed), _high(seed)),
    )


def random_words(position: Tensor, rng_state: Tensor) -> tuple[Tensor, Tensor]:
    """``(hi, lo)``: the two 32-bit words of each int64 ``position``, any shape, as int64."""
    # A position of 2^63 or more is negative as int64; its block number is not.
    block = (position >> 2) & 0x3FFFFFFFFFFFFFFF
    lane = (position & 3).unsqueeze(0)
    hi, lo = (
        torch.stack(torch.broadcast_tensors(*random_block(block, rng_state, k)))
        .gather(0, lane)
        .squeeze(0)
        for k in (0, 1)
    )
    return hi, lo


def _fraction(hi: Tensor, lo: Tensor) -> Tensor:
    """``(hi * 2^32 + lo + 1/2) * 2^-64`` in float64, rounded once."""
    return (hi.double() * 2.0**32 + (lo.double() + 0.5)) * 2.0**-64


def exponential(hi: Tensor, lo: Tensor) -> Tensor:
    """Standard exponential variate of two random words, float64.

    With ``v = (hi * 2^32 + lo + 1/2) * 2^-64`` in (0, 1)::

        E = -log1p(-v)

    A double next to 1 has no room for the last eleven bits of ``1 - v``, and E is as large there as
    those bits say.  From v = 1/2 on, E is therefore ``-log(1 - v)`` with the complement taken from
    the complemented words, which is exact.  Measured relative error: below one ulp on all of
    (0, 1).
    """
    # Of v and 1 - v only the smaller one is used, rounded once; the clamp keeps the branch not
    # taken finite.
    v = _fraction(hi, lo)
    complement = _fraction(_WORD - hi, _WORD - lo)
    return torch.where(v < 0.5, -torch.log1p(-v.clamp(max=0.5)), -torch.log(complement))


def gumbel(hi: Tensor, lo: Tensor) -> Tensor:
    """Standard Gumbel variate ``g = -log(E)`` of two random words, float64, within (-3.8, 45.1).

    Its error is a few ulp of ``max(1, |g|)``: around g = 0 (E = 1) the error is absolute.
    """
    return -torch.log(exponential(hi, lo))


def logistic(hi: Tensor, lo: Tensor) -> Tensor:
    """Standard logistic variate ``L = log(1 - v) - log(v)`` of two random words, float64.

    Large for small v, as the Gumbel variate is.  With ``q``, the smaller of v and 1 - v, rounded
    once, it is ``log1p(-q) - log(q)`` with the sign of the half that v lies in.
    """
    lower = hi < 1 << 31
    q = torch.where(lower, _fraction(hi, lo), _fraction(_WORD - hi, _WORD - lo))
    size = torch.log1p(-q) - torch.log(q)
    return torch.where(lower, size, -size)


def gumbel_noise(
    size: Sequence[int], rng_state: Tensor, positions: Sequence[int] | None = None
) -> Tensor:
    """Standard Gumbel noise of shape ``size``, float64, on the device of ``rng_state``.

    Element ``n`` in row-major order has position ``n``, unless ``positions`` says otherwise.  Its
    words are ``hi = block(0)[position & 3]`` and ``lo = block(1)[position & 3]`` of
    :func:`random_block` at ``position >> 2``; its value is :func:`gumbel` of them.

    Args:
        size: shape of the result.
        rng_state: int64 tensor ``[seed, offset]``.
        positions: ``[base, stride_0, ..., stride_{n-1}]``: the element with indices ``i`` has
            position ``base + sum(i * stride)``, as in a part of a larger tensor.
    """
    return gumbel(*_words_of(size, rng_state, positions)).reshape(tuple(size))


def logistic_noise(
    size: Sequence[int], rng_state: Tensor, positions: Sequence[int] | None = None
) -> Tensor:
    """Standard logistic noise of shape ``size``, float64; arguments as of :func:`gumbel_noise`."""
    return logistic(*_words_of(size, rng_state, positions)).reshape(tuple(size))


def _words_of(
    size: Sequence[int], rng_state: Tensor, positions: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """``(hi, lo)`` of a tensor's elements, in its shape or as one row."""
    count, row_major = 1, list[int]()
    for extent in reversed(size):
        row_major.insert(0, count)
        count *= extent
    base, *strides = [0, *row_major] if positions is None else positions
    if strides != row_major:
        position = torch.full(tuple(size), base, dtype=torch.int64, device=rng_state.device)
        for d, (extent, stride) in enumerate(zip(size, strides, strict=True)):
            steps = torch.arange(extent, device=rng_state.device) * stride
            position = position + steps.view(-1, *[1] * (len(size) - d - 1))
        return random_words(position, rng_state)
    # All four words of a block are used, a quarter of the work of random_words().
    skipped = base & 3
    block = torch.arange((skipped + count + 3) // 4, device=rng_state.device) + (base >> 2)
    hi, lo = (
        torch.stack(random_block(block, rng_state, k), dim=-1).flatten()[skipped : skipped + count]
        for k in (0, 1)
    )
    return hi, lo


def _noise_for(
    logits: Tensor,
    rng_state: Tensor | None,
    noise: Tensor | None,
    positions: Sequence[int] | None = None,
) -> Tensor:
    if (rng_state is None) == (noise is None):
        raise ValueError("give exactly one of rng_state and noise")
    if noise is None:
        assert rng_state is not None
        noise = gumbel_noise(logits.shape, rng_state.to(logits.device), positions)
    return noise


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scores(logits: Tensor, noise: Tensor, mask: Tensor | None) -> Tensor:
    """``l + g``, -inf where the mask forbids; 16-bit logits are added in float32."""
    dtype = _accumulation_dtype(logits.dtype)
    scores = logits.to(dtype) + noise.to(dtype)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores


def _choice(scores: Tensor, dim: int, mask: Tensor | None) -> Tensor:
    """Index of the first maximum (of the first NaN, if any), -1 where nothing may be chosen."""
    index = scores.argmax(dim)
    if mask is not None:
        allowed = mask.expand(scores.shape).any(dim)
        index = torch.where(allowed, index, -1)
    return index


def gumbel_argmax(
    logits: Tensor,
    dim: int = -1,
    keepdim: bool = False,
    *,
    mask: Tensor | None = None,
    rng_state: Tensor | None = None,
    noise: Tensor | None = None,
    positions: Sequence[int] | None = None,
) -> Tensor:
    """``argmax_i(l_i + g_i)``, a sample of ``Categorical(softmax(l))`` (Gumbel, 1954).

    Args:
        logits: floating-point tensor of any shape.
        dim: dimension of the classes.
        keepdim: keep ``dim`` with size 1.
        mask: bool, broadcastable to ``logits``; True = may be chosen.
        rng_state: int64 ``[seed, offset]``, or give ``noise``, of the shape of ``logits``.
        positions: of the noise, see :func:`gumbel_noise`.

    Returns:
        int64 index; ties go to the lowest one; -1 where the mask allows no class.
    """
    scores = _scores(logits.detach(), _noise_for(logits, rng_state, noise, positions), mask)
    index = _choice(scores, dim, mask)
    return index.unsqueeze(dim) if keepdim and logits.dim() else index


def gumbel_topk(
    logits: Tensor,
    k: int,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
    rng_state: Tensor | None = None,
    noise: Tensor | None = None,
    positions: Sequence[int] | None = None,
) -> Tensor:
    """Classes of the ``k`` largest ``l + g`` in order, a sample without replacement (Vieira, 2014).

    Args:
        logits: floating-point tensor of any shape.
        k: how many classes.
        dim: dimension of the classes.
        mask: bool, broadcastable to ``logits``; True = may be chosen.
        rng_state: int64 ``[seed, offset]``, or give ``noise``, of the shape of ``logits``.
        positions: of the noise, see :func:`gumbel_noise`.

    Returns:
        int64 index of the shape of ``logits`` with ``dim`` of size ``k``; NaN first, ties by the
        lowest index, -1 where there are no more scores above -inf.
    """
    scores = _scores(logits.detach(), _noise_for(logits, rng_state, noise, positions), mask)
    if scores.dim() == 0:
        scores = scores.unsqueeze(0)
    order = scores.sort(stable=True, dim=dim, descending=True)
    index = torch.where(order.values == -torch.inf, -1, order.indices)
    return index.narrow(dim, 0, k)


def ordered_log_prob(logits: Tensor, index: Tensor, dim: int = -1) -> Tensor:
    """``log P`` of classes drawn without replacement in this order, a class at a time.

    ::

        log P(i_1, ..., i_k) = sum_j (l[i_j] - log(sum of exp l[c] over c not in i_1 ... i_{j-1}))

    (Plackett, 1975; Luce, 1959.)  Places with index -1 add nothing.
    """
    logits, index = logits.movedim(dim, -1), index.movedim(dim, -1)
    log_prob = torch.zeros_like(logits[..., 0])
    for j in range(index.shape[-1]):
        i = index[..., j : j + 1]
        chosen = logits.log_softmax(-1).gather(-1, i.clamp(min=0))
        log_prob = log_prob + torch.where(i < 0, 0.0, chosen).squeeze(-1)
        gone = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, i.clamp(min=0), i >= 0)
        logits = logits.masked_fill(gone, -torch.inf)
    return log_prob


def relaxed_topk(
    logits: Tensor,
    k: int,
    tau: float = 1.0,
    dim: int = -1,
    *,
    rng_state: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """The relaxed ``k``-hot vector of Xie and Ermon (2019), by its definition::

    a = softmax(alpha / tau)        alpha <- alpha + log(1 - a)        y = sum of the k a
    """
    alpha = _scores(logits, _noise_for(logits, rng_state, noise), None)
    y = torch.zeros_like(alpha)
    for _ in range(k):
        a = torch.softmax(alpha / tau, dim)
        y = y + a
        alpha = alpha + torch.log1p(-a)
    return y.to(logits.dtype)


def gumbel_softmax(
    logits: Tensor,
    tau: float | Tensor = 1.0,
    hard: bool = False,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
    rng_state: Tensor | None = None,
    noise: Tensor | None = None,
    positions: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """A relaxed one-hot sample (Jang et al. 2016, equation 2) and its index::

        z = (l + g) / tau        y = softmax(z)        index = argmax(l + g)

    With ``hard``, the value is the one-hot of ``index`` and the gradient that of the soft ``y``
    (straight-through).  16-bit logits are computed in float32 and rounded once at the end.

    Args:
        logits: floating-point tensor of any shape.
        tau: temperature, a number or a tensor broadcastable to ``logits`` with ``dim`` of size 1.
        hard: straight-through one-hot instead of the relaxed sample.
        dim: dimension of the classes.
        mask: bool, broadcastable to ``logits``; True = may be chosen.
        rng_state: int64 ``[seed, offset]``, or give ``noise``, of the shape of ``logits``.
        positions: of the noise, see :func:`gumbel_noise`.

    Returns:
        ``y`` of the shape and dtype of ``logits``, differentiable in ``logits`` and ``tau`` any
        number of times; ``index``, int64, of the shape of ``logits`` without ``dim``.  A row whose
        mask is all False gives zeros, index -1 and a zero gradient.
    """
    if logits.dim() == 0:
        grown = [t.unsqueeze(0) if t is not None and t.dim() == 0 else t for t in (mask, noise)]
        y, index = gumbel_softmax(
            logits.unsqueeze(0),
            tau,
            hard,
            dim,
            mask=grown[0],
            rng_state=rng_state,
            noise=grown[1],
            positions=None if positions is None else [*positions, 1],
        )
        return y.squeeze(0), index

    scores = _scores(logits, _noise_for(logits, rng_state, noise, positions), mask)
    index = _choice(scores.detach(), dim, mask)
    empty_row = None
    if mask is not None:
        empty_row = ~mask.expand(scores.shape).any(dim, keepdim=True)
        # A row of -inf is NaN in softmax and in its gradient; these rows are replaced at the end.
        scores = scores.masked_fill(empty_row, 0.0)

    # A temperature below the range of the dtype would divide as 0 and turn 0 / tau into NaN.
    finfo = torch.finfo(scores.dtype)
    smallest = finfo.smallest_normal * finfo.eps
    tau = (
        tau.to(scores.dtype).clamp(min=smallest) if isinstance(tau, Tensor) else max(tau, smallest)
    )
    chosen = index.clamp(min=0).unsqueeze(dim)
    # The maximum goes before the division: the smallest tau then gives 0 and -inf, never inf - inf.
    # Entries at -inf are constants, because 0 * inf in the derivative is NaN.
    peak = scores.detach().gather(dim, chosen)
    absent = (scores == -torch.inf) & (peak != -torch.inf)
    distance = (scores.masked_fill(absent, 0.0) - peak).masked_fill(absent, 0.0)
    y = torch.softmax((distance / tau).masked_fill(absent, -torch.inf), dim)
    # The chosen entry keeps its value and is differentiated as 1 - (the others).  The softmax then
    # receives dy - dy_k, and y_k (dy_k - sum(dy y)) does not cancel to nothing as y_k nears 1.
    others = y.scatter(dim, chosen, 0.0).sum(dim, keepdim=True)
    y = y.scatter(dim, chosen, y.detach().gather(dim, chosen) + (others.detach() - others))
    if hard:
        one_hot = torch.zeros_like(y).scatter(dim, chosen, 1.0)
        # (y - y) is exactly 0, so the value is exactly 0 or 1; in a NaN row it is NaN.
        y = one_hot + (y - y.detach())
    if empty_row is not None:
        y = y.masked_fill(empty_row, 0.0)
    return y.to(logits.dtype), index


def binary_concrete(
    logits: Tensor,
    tau: float | Tensor = 1.0,
    hard: bool = False,
    *,
    rng_state: Tensor | None = None,
    noise: Tensor | None = None,
    positions: Sequence[int] | None = None,
) -> Tensor:
    """A relaxed Bernoulli sample ``sigmoid((l + L) / tau)`` (Maddison et al., appendix B).

    With ``hard``, 1 where ``l + L > 0`` and the gradient of the soft sample (straight-through).

    Args:
        logits: floating-point tensor of any shape.
        tau: temperature, a number or a tensor that broadcasts to ``logits``.
        hard: straight-through 0 or 1 instead of the relaxed sample.
        rng_state: int64 ``[seed, offset]``, or give ``noise``, of the shape of ``logits``.
        positions: of the noise, see :func:`gumbel_noise`.

    Returns:
        ``y`` of the shape and dtype of ``logits``, differentiable in ``logits`` and ``tau`` any
        number of times.  Infinite logits give 0 and 1, with gradient 0.
    """
    if (rng_state is None) == (noise is None):
        raise ValueError("give exactly one of rng_state and noise")
    if noise is None:
        assert rng_state is not None
        noise = logistic_noise(logits.shape, rng_state.to(logits.device), positions)
    dtype = _accumulation_dtype(logits.dtype)
    scores = logits.to(dtype) + noise.to(dtype)
    infinite = scores.isinf()
    finfo = torch.finfo(dtype)
    smallest = finfo.smallest_normal * finfo.eps
    tau = tau.to(dtype).clamp(min=smallest) if isinstance(tau, Tensor) else max(tau, smallest)
    # Beyond 1000 nothing is left of the slope, and 0 * inf in its derivative would be NaN.
    infinite = infinite | (scores.abs() >= 1000 * tau)
    z = scores.masked_fill(infinite, 0.0) / tau
    # From the smaller of y and 1 - y, which keeps its accuracy where the other rounds to 1.
    small = torch.sigmoid(torch.where(z < 0, z, -z))
    y = torch.where(infinite, (scores > 0).to(dtype), torch.where(z < 0, small, 1 - small))
    if hard:
        y = (scores > 0).to(dtype) + (y - y.detach())
    return y.to(logits.dtype)


def gumbel_log_softmax(
    logits: Tensor,
    tau: float | Tensor = 1.0,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
    rng_state: Tensor | None = None,
    noise: Tensor | None = None,
    positions: Sequence[int] | None = None,
) -> Tensor:
    """The logarithm of a relaxed one-hot sample (Maddison et al., appendix C.3)::

        z = (l + g) / tau        log y = z - logsumexp(z)

    Args and errors: those of :func:`gumbel_softmax`.

    Returns:
        ``log y`` of the shape and dtype of ``logits``.  Classes that the mask forbids, or whose
        logit is -inf, give -inf and gradient zero; a row of nothing else, but for the mask's, NaN.
    """
    if logits.dim() == 0:
        grown = [t.unsqueeze(0) if t is not None and t.dim() == 0 else t for t in (mask, noise)]
        log_y = gumbel_log_softmax(
            logits.unsqueeze(0),
            tau,
            dim,
            mask=grown[0],
            rng_state=rng_state,
            noise=grown[1],
            positions=None if positions is None else [*positions, 1],
        )
        return log_y.squeeze(0)
    scores = _scores(logits, _noise_for(logits, rng_state, noise, positions), mask)
    if isinstance(tau, Tensor):
        tau = tau.to(scores.dtype)
    peak = scores.detach().amax(dim, keepdim=True)
    # Constants, because 0 * inf in the derivative is NaN.
    absent = (scores == -torch.inf) & (peak != -torch.inf)
    if mask is not None:
        forbidden = ~mask.expand(scores.shape).any(dim, keepdim=True)
        absent, peak = absent | forbidden, peak.masked_fill(forbidden, 0.0)
    distance = (scores.masked_fill(absent, 0.0) - peak).masked_fill(absent, 0.0) / tau
    chosen = scores.detach().argmax(dim, keepdim=True)
    # Relative to the chosen class, which is then a constant (0, or NaN in a NaN row): its gradient
    # is that of the others' sum alone.
    at_chosen = distance.gather(dim, chosen)
    distance = distance - at_chosen
    distance = distance.scatter(dim, chosen, (at_chosen - at_chosen).detach())
    others = distance.exp().masked_fill(absent, 0.0).scatter(dim, chosen, 0.0)
    log_y = distance - torch.log1p(others.sum(dim, keepdim=True))
    return log_y.masked_fill(absent, -torch.inf).to(logits.dtype)


def concrete_log_prob(
    value: Tensor,
    logits: Tensor,
    tau: float | Tensor,
    dim: int = -1,
    log_space: bool = False,
) -> Tensor:
    """Log density of the Concrete distribution (Maddison et al., equation 11; Jang et al., appendix
    B), or with ``log_space`` that of its logarithm (Maddison et al., appendix C.3)::

        x = log(value)        u = l - tau x
        lgamma(n) + (n - 1) log(tau) + sum(u) - n logsumexp(u) - sum(x)

    The last sum is absent in log space.  On the boundary, where m values are zero, it is the limit
    along the line from the centre; classes with logit -inf and value zero are left out.

    Args:
        value: points of the simplex, or their logarithms.
        logits: floating-point tensor that broadcasts with ``value``.
        tau: temperature, a number or a tensor broadcastable to both with ``dim`` of size 1.
        dim: dimension of the classes.
        log_space: whether ``value`` is a logarithm.

    Returns:
        The density in nats, in the dtype computed in, without ``dim``.
    """
    value, logits = torch.broadcast_tensors(value, logits)
    dtype = _accumulation_dtype(logits.dtype)
    value, logits = value.to(dtype), logits.to(dtype)
    if logits.dim() == 0:
        value, logits, dim = value.unsqueeze(0), logits.unsqueeze(0), 0
    tau = torch.as_tensor(tau, dtype=dtype, device=logits.device)

    none, never = value == (-torch.inf if log_space else 0), logits == -torch.inf
    dropped, zero = none & never, none & ~never
    x = value.masked_fill(none, 0.0) if log_space else value.masked_fill(none, 1.0).log()
    u = logits.masked_fill(dropped, 0.0) - tau * x
    count, zeros = (~dropped).sum(dim), zero.sum(dim)
    on_boundary = (zeros > 0).unsqueeze(dim)
    # At the boundary the zeros alone decide the sum of exponentials.
    deciding = ~dropped & (zero | ~on_boundary)
    sums = u.masked_fill(dropped, 0.0).sum(dim)
    total = torch.logsumexp(u.masked_fill(~deciding, -torch.inf), dim)
    row_tau = tau.squeeze(dim) if tau.dim() else tau
    n = count.to(dtype)
    density = torch.lgamma(n) + (n - 1) * row_tau.log() + sums - n * total
    coefficient = (n - zeros) * row_tau
    if not log_space:
        density = density - x.sum(dim)
        coefficient = coefficient - zeros
    boundary = zeros > 0
    density = density.masked_fill(boundary & (coefficient > 0), -torch.inf)
    density = density.masked_fill(boundary & (coefficient < 0), torch.inf)
    density = density.masked_fill((never & ~none).any(dim), -torch.inf)
    outside = value.isnan() | logits.isnan() | (value == torch.inf) | (logits == torch.inf)
    if not log_space:
        outside = outside | (value < 0)
    possible = (~never & ~none).any(dim) | (zero.any(dim) & (~none).any(dim))
    return density.masked_fill(outside.any(dim) | ~possible, torch.nan)


def straight_through_softmax(
    logits: Tensor,
    tau: float | Tensor = 1.0,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The one-hot of ``argmax(l)`` with the gradient of ``softmax(l / tau)``, and its index.

    :func:`gumbel_softmax` with ``hard`` and noise of 0, same arguments and results.
    """
    return gumbel_softmax(logits, tau, True, dim, mask=mask, noise=torch.zeros_like(logits))


def decoupled_gumbel_softmax(
    logits: Tensor,
    tau_forward: float | Tensor,
    tau_backward: float | Tensor,
    hard: bool = False,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
    rng_state: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sample at ``tau_forward`` with the gradient of that at ``tau_backward``, and its index.

    Arguments and results as :func:`gumbel_softmax`; the value is constant in ``tau_forward``.
    """
    value, index = gumbel_softmax(
        logits, tau_forward, hard, dim, mask=mask, rng_state=rng_state, noise=noise
    )
    soft, _ = gumbel_softmax(
        logits, tau_backward, False, dim, mask=mask, rng_state=rng_state, noise=noise
    )
    return value.detach() + (soft - soft.detach()), index


def soft_argmax(
    logits: Tensor,
    beta: float | Tensor = 1.0,
    dim: int = -1,
    *,
    positions: Tensor | None = None,
) -> Tensor:
    """``sum_i x_i softmax(beta l)_i`` along ``dim`` (Chapelle and Wu, 2010).

    Args:
        logits: floating-point tensor of any shape, -inf (+inf for a negative ``beta``) for
            probability 0.
        beta: inverse temperature, a number or a tensor broadcastable to ``logits`` with ``dim`` of
            size 1; negative for the expected position of the smallest logits.
        dim: dimension of the classes.
        positions: ``x``, of shape ``[C]``; 0, 1, ... if None.

    Returns:
        A tensor of the shape of ``logits`` without ``dim``, in the precision computed in.
    """
    if logits.dim() == 0:
        return soft_argmax(logits.unsqueeze(0), beta, 0, positions=positions)
    x = logits.to(_accumulation_dtype(logits.dtype))
    if positions is None:
        positions = torch.arange(x.shape[dim], device=x.device)
    beta = torch.as_tensor(beta, dtype=x.dtype, device=x.device)
    directed = x.detach() * beta.detach().sign()
    absent = directed == -torch.inf
    absent = absent & ~absent.all(dim, keepdim=True)
    # 0 * inf in the derivative of the product is NaN.
    scores = (x.masked_fill(absent, 0.0) * beta).masked_fill(absent, -torch.inf)
    places = positions.to(x.dtype).view(-1, *[1] * (x.dim() - dim % x.dim() - 1))
    # Differences from the position of the largest weight: the sum of the weights is 1.
    origin = positions.to(x.dtype)[directed.argmax(dim, keepdim=True)]
    expected = (torch.softmax(scores, dim) * (places - origin)).sum(dim)
    return expected + origin.squeeze(dim)


def gumbel_embedding(
    logits: Tensor,
    weight: Tensor,
    tau: float | Tensor = 1.0,
    hard: bool = True,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
    rng_state: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sample times the codebook, ``gumbel_softmax(logits, tau, hard) @ weight``, and the index.

    Args:
        logits, tau, hard, dim, mask, rng_state, noise: see :func:`gumbel_softmax`.
        weight: ``[C, D]``, or ``[G, V, D]`` for ``G`` groups of ``V`` classes.
    """
    dim %= logits.dim()
    groups = weight.shape[0] if weight.dim() == 3 else 1
    table = weight.reshape(groups, -1, weight.shape[-1])
    noise = _noise_for(logits, rng_state, noise, None)
    parts = []
    for g, book in enumerate(table):
        own = slice(g * book.shape[0], (g + 1) * book.shape[0])
        at = (*[slice(None)] * dim, own)
        allowed = None if mask is None else mask.expand(logits.shape)[at]
        y, index = gumbel_softmax(logits[at], tau, hard, dim, mask=allowed, noise=noise[at])
        parts.append(((y.movedim(dim, -1) @ book).movedim(-1, dim), index))
    out = torch.cat([o for o, _ in parts], dim)
    indices = [index for _, index in parts]
    return out, torch.stack(indices, dim) if weight.dim() == 3 else indices[0]


# ---- estimators: hard samples with a gradient of their own ---------------------------------------


def _one_hot_with_gradient_of(surrogate: Tensor, index: Tensor, dim: int, logits: Tensor) -> Tensor:
    """The sample of this index, with the derivatives of ``surrogate``, whose classes are last."""
    allowed = (index >= 0).unsqueeze(-1)
    nothing = (surrogate - surrogate.detach()).masked_fill(~allowed, 0)
    one_hot = torch.zeros_like(surrogate).scatter(-1, index.clamp(min=0).unsqueeze(-1), 1.0)
    y = one_hot * allowed + nothing
    return y.squeeze(0) if logits.dim() == 0 else y.movedim(-1, dim)


def _classes_last(
    logits: Tensor, dim: int, mask: Tensor | None, tau: float | Tensor = 1.0
) -> tuple[Tensor, float | Tensor]:
    """Logits with -inf where the mask forbids, but for rows without any class; temperatures."""
    scores = logits.unsqueeze(0) if logits.dim() == 0 else logits.movedim(dim, -1)
    if mask is not None:
        allowed = mask.expand(logits.shape)
        allowed = allowed.unsqueeze(0) if logits.dim() == 0 else allowed.movedim(dim, -1)
        some = allowed.any(-1, keepdim=True)
        scores = scores.masked_fill(~allowed & some, -torch.inf)
    if isinstance(tau, Tensor) and tau.dim() > 0:
        tau = tau.expand([1 if d == dim % logits.dim() else n for d, n in enumerate(logits.shape)])
        tau = tau.movedim(dim, -1)
    return scores, tau


def gumbel_rao(
    logits: Tensor,
    index: Tensor,
    tau: float | Tensor,
    k: int,
    rng_state: Tensor,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """The one-hot vector of ``index`` with the Gumbel-Rao gradient (arXiv 2010.04838).

    The mean over ``k`` draws of ``softmax((l + (phi - l)) / tau)``, ``phi - l`` a constant, with
    ``phi`` the noisy logits given that ``index`` is the largest.
    """
    x, tau = _classes_last(logits, dim, mask, tau)
    fixed = x.detach()
    total = fixed.logsumexp(-1, keepdim=True)
    chosen = index.clamp(min=0).unsqueeze(-1)
    place = torch.arange(k * x.numel()).reshape(k, *x.shape) + x.numel()
    log_e = exponential(*random_words(place, rng_state)).log()
    of_index = log_e.gather(-1, chosen.expand(k, *chosen.shape))
    phi = total - torch.logaddexp(log_e - (fixed - total), of_index)
    phi = phi.scatter(-1, chosen.expand(k, *chosen.shape), total - of_index)
    constant = torch.where(fixed == -torch.inf, 0.0, phi - fixed)
    surrogate = ((x + constant) / tau).softmax(-1).mean(0)
    return _one_hot_with_gradient_of(surrogate, index, dim, logits)


def zgr(logits: Tensor, index: Tensor, dim: int = -1, *, mask: Tensor | None = None) -> Tensor:
    """Half straight-through, half DARN: Shekhovtsov, ICML 2023.

    DARN's gradient is ``g . (y - p)`` times that of ``log p_i``: the derivative of ``(y - p) log
    p_i`` with the factor held constant.
    """
    x, _ = _classes_last(logits, dim, mask)
    p = x.softmax(-1)
    chosen = index.clamp(min=0).unsqueeze(-1)
    one_hot = torch.zeros_like(p).scatter(-1, chosen, 1.0)
    darn = (one_hot - p).detach() * x.log_softmax(-1).gather(-1, chosen)
    return _one_hot_with_gradient_of((p + darn) / 2, index, dim, logits)


def reinmax(
    logits: Tensor,
    index: Tensor,
    tau: float | Tensor,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Liu et al., arXiv 2304.08612, in their own steps with stop-gradients."""
    x, tau = _classes_last(logits, dim, mask, tau)
    chosen = index.clamp(min=0).unsqueeze(-1)
    p = x.softmax(-1)
    half = (torch.zeros_like(p).scatter(-1, chosen, 1.0) + (x / tau).softmax(-1)) / 2
    constant = torch.where(x == -torch.inf, 0.0, half.log() - x).detach()
    middle = (x + constant).softmax(-1)
    return _one_hot_with_gradient_of(2 * middle - p / 2, index, dim, logits)


def gapped_straight_through(
    logits: Tensor,
    index: Tensor,
    tau: float | Tensor,
    gap: float | None,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Fan et al., arXiv 2206.07235: GST-gap, or GST-p without a gap."""
    x, tau = _classes_last(logits, dim, mask, tau)
    fixed = x.detach()
    chosen = index.clamp(min=0).unsqueeze(-1)
    top = fixed.amax(-1, keepdim=True)
    if gap is None:
        p = fixed.softmax(-1).gather(-1, chosen) * (1 - 1e-5)
        distance: float | Tensor = -torch.log1p(-p) / p
    else:
        distance = gap
    moved = torch.minimum(fixed, top - distance).scatter(-1, chosen, top)
    constant = torch.where(fixed == -torch.inf, 0.0, moved - fixed)
    return _one_hot_with_gradient_of(((x + constant) / tau).softmax(-1), index, dim, logits)
