r"""Relaxed categorical and Bernoulli distributions, called like :mod:`torch.distributions`.

=================================  ===================  ============================================
class                              a sample             density of a sample
=================================  ===================  ============================================
:class:`GumbelSoftmax`             ``y`` in the simplex Jang et al., Maddison et al.
:class:`ExpGumbelSoftmax`          ``log y``            the same for ``log y``
:class:`StraightThroughGumbelSoftmax`  one-hot          probability of its class
:class:`BinaryConcrete`            ``y`` in [0, 1]      Maddison et al., section B
:class:`StraightThroughBinaryConcrete`  0 or 1          its probability
=================================  ===================  ============================================

Samples are those of :func:`gumbel_ext.gumbel_softmax`, :func:`gumbel_ext.gumbel_log_softmax` and
:func:`gumbel_ext.binary_concrete`: the same noise, the same gradients.

Pyro takes them as it takes its own: ``pyro.sample("z", GumbelSoftmax(tau, logits=logits))``.

Sources: E. Jang, S. Gu, B. Poole, "Categorical reparameterization with Gumbel-softmax", arXiv
1611.01144; C. J. Maddison, A. Mnih, Y. W. Teh, "The Concrete distribution", arXiv 1611.00712.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    OneHotCategorical,
    biject_to,
    constraints,
    register_kl,
    transform_to,
)
from torch.distributions.utils import lazy_property
from torch.nn.functional import logsigmoid

from gumbel_ext._pyro import PyroDistribution
from gumbel_ext._sample_origin import can_be_remembered, recall, remember
from gumbel_ext.binary import binary_concrete, binary_concrete_log_prob, logistic_noise
from gumbel_ext.concrete import concrete_log_prob, gumbel_log_softmax
from gumbel_ext.functional import draw_rng_state, gumbel_softmax

__all__ = [
    "BinaryConcrete",
    "ExpGumbelSoftmax",
    "GumbelSoftmax",
    "StraightThroughBinaryConcrete",
    "StraightThroughGumbelSoftmax",
]

Number: TypeAlias = float | int
_Self = TypeVar("_Self", bound="_Relaxed")


class _Simplex(type(constraints.simplex)):  # type: ignore[misc]
    """The simplex up to the rounding of the dtype; torch's own rejects samples of 16 bits."""

    def check(self, value: Tensor) -> Tensor:
        rounding = torch.finfo(value.dtype)
        wide = torch.promote_types(value.dtype, torch.float32)
        # Each entry is rounded once, and below the smallest number to nothing.
        lost = rounding.eps + value.shape[-1] * rounding.smallest_normal * rounding.eps
        distance = (value.sum(-1, dtype=wide) - 1).abs()
        return (value >= 0).all(-1) & (distance < max(1e-6, lost))


class _RealVector(type(constraints.real_vector)):  # type: ignore[misc]
    """Vectors without NaN; torch's own fails on tensors without elements."""

    def check(self, value: Tensor) -> Tensor:
        return ~value.isnan().any(-1)


_simplex = _Simplex()
_real_vector = _RealVector(constraints.real, 1)
for _registry in (biject_to, transform_to):
    _registry.register(_Simplex, lambda _, to=_registry: to(constraints.simplex))
    _registry.register(_RealVector, lambda _, to=_registry: to(constraints.real_vector))


class _Relaxed(PyroDistribution):
    """Temperature and logits, their shapes and checks. Subclasses draw and score."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]]
    has_rsample = True
    logits: Tensor
    temperature: Number | Tensor
    _event_dim: ClassVar[int]

    def __init__(
        self,
        temperature: Number | Tensor,
        probs: Tensor | Number | None = None,
        logits: Tensor | Number | None = None,
        validate_args: bool | None = None,
    ) -> None:
        name = type(self).__name__
        if (probs is None) == (logits is None):
            raise ValueError(f"{name}: exactly one of probs and logits must be given")
        if torch.compiler.is_compiling() and validate_args is None:
            validate_args = False  # values are not known yet
        if validate_args is not None:
            self._validate_args = validate_args
        self._given = "logits" if probs is None else "probs"
        temperature = self._checked_temperature(temperature)
        given = self._checked_parameter(logits if probs is None else probs, temperature)
        event_dim = self._event_dim
        batch_shape = given.shape[: given.dim() - event_dim]
        if isinstance(temperature, Tensor):
            shared = temperature.shape[: temperature.dim() - event_dim]
            try:
                batch_shape = torch.broadcast_shapes(batch_shape, shared)
            except RuntimeError:
                raise ValueError(
                    f"{name}: temperature must broadcast to the shape of {self._given} "
                    f"{tuple(given.shape)}{' with the last dimension 1' * event_dim}, got "
                    f"{tuple(temperature.shape)}"
                ) from None
        event_shape = given.shape[given.dim() - event_dim :]
        given = given.expand(batch_shape + event_shape)
        self.temperature = temperature
        if probs is None:
            self.logits = given
        else:
            self.probs, self.logits = self._of_probs(given)
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    def _checked_parameter(self, value: Any, temperature: Any) -> Tensor:
        name = type(self).__name__
        if isinstance(value, numbers.Real) and not self._event_dim:
            device = temperature.device if isinstance(temperature, Tensor) else None
            return torch.as_tensor(float(value), device=device)
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: {self._given} must be a tensor, got {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(
                f"{name}: {self._given} must be a floating-point tensor, got {value.dtype}"
            )
        if value.dim() < self._event_dim:
            raise ValueError(
                f"{name}: {self._given} must have a dimension of classes, got a tensor without any"
            )
        return value

    def _checked_temperature(self, temperature: Any) -> Any:
        name = type(self).__name__
        if isinstance(temperature, Tensor):
            if self._event_dim and temperature.dim() and temperature.shape[-1] != 1:
                # [B] beside logits [B, K] would be a temperature a class.
                raise ValueError(
                    f"{name}: temperature must have a last dimension of 1, for the classes, got "
                    f"{tuple(temperature.shape)}"
                )
            if self._validate_args:
                inside = (temperature > 0) & (temperature < math.inf)
                if not bool(inside.all()):
                    raise ValueError(
                        f"{name}: temperature must be positive and finite, got {temperature}"
                    )
            return temperature
        if isinstance(temperature, (torch.SymFloat, torch.SymInt)):
            return temperature
        if isinstance(temperature, bool) or not isinstance(temperature, numbers.Real):
            raise TypeError(
                f"{name}: temperature must be a number or a tensor, got "
                f"{type(temperature).__name__}"
            )
        if not 0 < float(temperature) < math.inf:
            raise ValueError(f"{name}: temperature must be positive and finite, got {temperature}")
        return temperature

    def _of_probs(self, probs: Tensor) -> tuple[Tensor, Tensor]:
        """``(probs, logits)``, normalised."""
        raise NotImplementedError

    def expand(self: _Self, batch_shape: Sequence[int], _instance: _Self | None = None) -> _Self:
        """The distribution with its batch dimensions expanded, as views; temperature too."""
        new: _Self = self._get_checked_instance(_Relaxed, _instance)  # type: ignore[no-untyped-call]
        batch_shape = torch.Size(batch_shape)
        shape = batch_shape + self.event_shape
        new._given = self._given
        new.logits = self.logits.expand(shape)
        if "probs" in self.__dict__:
            new.probs = self.probs.expand(shape)
        new.temperature = self.temperature
        if isinstance(new.temperature, Tensor) and new.temperature.dim():
            new.temperature = new.temperature.expand(batch_shape + (1,) * self._event_dim)
        PyroDistribution.__init__(new, batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def param_shape(self) -> torch.Size:
        """Shape of the logits."""
        return self.logits.shape

    def rsample(
        self,
        sample_shape: Sequence[int] = (),
        *,
        generator: torch.Generator | None = None,
        rng_state: Tensor | None = None,
    ) -> Tensor:
        """Draws samples that can be differentiated in logits, probs and temperature.

        Logits are not copied for many samples: the kernels read them again for each.

        Args:
            sample_shape: shape of the samples to draw, before batch and event dimensions.
            generator: see :func:`gumbel_ext.gumbel_softmax`.
            rng_state: see :func:`gumbel_ext.gumbel_softmax`.

        Returns:
            A tensor of shape ``sample_shape + batch_shape + event_shape`` and dtype of the logits.
        """
        logits = self.logits.expand(self._extended_shape(torch.Size(sample_shape)))
        return self._draw(logits, generator, rng_state)

    def sample(
        self,
        sample_shape: Sequence[int] = (),
        *,
        generator: torch.Generator | None = None,
        rng_state: Tensor | None = None,
    ) -> Tensor:
        """The values of :meth:`rsample`, without gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape, generator=generator, rng_state=rng_state)

    def _draw(
        self, logits: Tensor, generator: torch.Generator | None, rng_state: Tensor | None
    ) -> Tensor:
        raise NotImplementedError

    def __repr__(self) -> str:
        shown = {"temperature": self.temperature, self._given: getattr(self, self._given)}
        inside = ", ".join(
            f"{name}: {tuple(value.shape) if isinstance(value, Tensor) and value.dim() else value}"
            for name, value in shown.items()
        )
        return f"{type(self).__name__}({inside})"


def _times_log(weight: Tensor, log: Tensor) -> Tensor:
    """``weight * log`` with ``0 * -inf = 0``, for gradients in both too."""
    impossible = log == -math.inf
    product = weight * log.masked_fill(impossible, 0.0)
    return product.masked_fill(impossible & (weight != 0), -math.inf)


def _log_of_probs(probs: Tensor) -> Tensor:
    """``log(probs)``, rounded once; -inf with gradient 0, not NaN, where ``probs`` is 0."""
    zero = probs == 0
    return probs.masked_fill(zero, 1.0).log().masked_fill(zero, -math.inf)


class _OverClasses(_Relaxed):
    """Parameters of a categorical distribution."""

    arg_constraints: ClassVar = {"probs": _simplex, "logits": _real_vector}
    _event_dim = 1

    @lazy_property
    def probs(self) -> Tensor:
        """Probabilities of the classes, which sum to 1."""
        return torch.softmax(self.logits, -1)

    def _of_probs(self, probs: Tensor) -> tuple[Tensor, Tensor]:
        wide = probs.to(torch.promote_types(probs.dtype, torch.float32))
        # Not by the sum itself, which would make good probabilities of negative numbers.
        wide = wide / wide.sum(-1, keepdim=True).abs()
        return wide.to(probs.dtype), _log_of_probs(wide).to(probs.dtype)


class _OverGates(_Relaxed):
    """Parameters of independent Bernoulli distributions."""

    arg_constraints: ClassVar = {"probs": constraints.unit_interval, "logits": constraints.real}
    _event_dim = 0

    @lazy_property
    def probs(self) -> Tensor:
        """Probabilities of 1."""
        return torch.sigmoid(self.logits)

    def _of_probs(self, probs: Tensor) -> tuple[Tensor, Tensor]:
        wide = probs.to(torch.promote_types(probs.dtype, torch.float32))
        # log(p / (1 - p)) at 0 and 1 is -inf and inf, whose gradient is made 0 as well.
        logits = _log_of_probs(wide) - _log_of_probs(1 - wide)
        return probs, logits.to(probs.dtype)


class ExpGumbelSoftmax(_OverClasses):
    r"""Logarithm of a :class:`GumbelSoftmax` sample, where no entry underflows.

    .. math::
        \log y_i = (l_i + g_i)/\tau - \log\sum_j e^{(l_j + g_j)/\tau}, \qquad
        \log p(\log y) = \log\Gamma(k) + (k-1)\log\tau
        + \sum_i \Big(l_i - \tau\log y_i - \log\sum_j e^{l_j - \tau\log y_j}\Big)

    (Maddison et al., section C.3.) The one to use where densities at low temperatures matter. Under
    ``torch.compile`` and functorch transforms it is the only one whose own samples always have a
    finite density.

    Args:
        temperature: > 0 and finite: a number, or a tensor of shape [] or one that broadcasts to
            ``batch_shape + [1]``, which may have a gradient.
        probs: probabilities of the classes in the last dimension, normalised to a sum of 1. A
            class with probability 0 is never chosen and has gradient 0.
        logits: unnormalised log-probabilities, kept as they are. Exactly one of ``probs`` and
            ``logits`` must be given, float16, bfloat16, float32 or float64.
        validate_args: whether values are checked, here and in :meth:`log_prob`; torch's default if
            None, and no under ``torch.compile``.

    Raises:
        ValueError: not exactly one of ``probs`` and ``logits`` is given, ``temperature`` is not
            positive and finite or has a wrong shape, or the parameters violate their constraints.
        TypeError: an argument is not a number or floating-point tensor.
    """

    support = _real_vector  # as torch has it; the true support is a surface in it

    def _draw(
        self, logits: Tensor, generator: torch.Generator | None, rng_state: Tensor | None
    ) -> Tensor:
        return gumbel_log_softmax(
            logits, self.temperature, generator=generator, rng_state=rng_state
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density at ``value``, the logarithm of a point of the simplex.

        Args:
            value: broadcasts with ``batch_shape + event_shape``.

        Returns:
            A tensor of the broadcast shape without the last dimension, float32 or float64.
        """
        if self._validate_args:
            self._validate_sample(value)
        return concrete_log_prob(value, self.logits, self.temperature, log_space=True)


class GumbelSoftmax(_OverClasses):
    r"""Relaxed one-hot categorical distribution, the Gumbel-softmax or Concrete distribution.

    .. math::
        y = \operatorname{softmax}\big((l + g)/\tau\big), \qquad
        p(y) = \Gamma(k)\,\tau^{k-1} \Big(\sum_i \pi_i y_i^{-\tau}\Big)^{-k}
        \prod_i \pi_i\, y_i^{-\tau-1}

    (Jang et al., eq. 2 and appendix B; Maddison et al., eq. 10 and 11.) Arguments as those of
    :class:`ExpGumbelSoftmax`.

    At a low temperature a sample has entries that underflow to 0, where the density is zero or
    infinite. :meth:`log_prob` of a tensor that :meth:`rsample` or :meth:`sample` of this class
    returned, by this distribution or another one, therefore works on the logarithm of the sample,
    made again from the noise of the call: it is finite, and its gradient goes to the parameters of
    the sample directly. That tensor must not have been changed, cloned, detached or indexed, and
    ``retain_grad()`` not been called; otherwise, under ``torch.compile`` and functorch
    transforms the density is that of the rounded values. :class:`ExpGumbelSoftmax` has no such
    condition.
    """

    support = _simplex

    def _draw(
        self, logits: Tensor, generator: torch.Generator | None, rng_state: Tensor | None
    ) -> Tensor:
        return _draw_and_remember(gumbel_softmax, logits, self.temperature, generator, rng_state)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density at ``value`` with respect to the first k - 1 of its k entries.

        Args:
            value: point of the simplex, broadcasts with ``batch_shape + event_shape``.

        Returns:
            A tensor of the broadcast shape without the last dimension, float32 or float64.
        """
        if self._validate_args:
            self._validate_sample(value)
        origin = recall(value)
        if origin is None:
            return self._log_prob_of_value(value)
        log_y = gumbel_log_softmax(_wide(origin.logits), origin.tau, rng_state=origin.rng_state)
        logits, jacobian = _wide(self.logits), log_y.sum(-1)
        edge = None
        # A GPU is not asked whether there is any, as that would wait for it.
        if not jacobian.is_cpu or bool(jacobian.isneginf().any()):
            # Of classes that the sample's logits exclude, those excluded here too are no part of
            # the density; the others are at its boundary, where value itself is exact.
            absent, possible = log_y.isneginf(), ~logits.isneginf()
            edge = (absent & possible).any(-1)
            log_y = log_y.masked_fill(edge.unsqueeze(-1) & possible, 0.0)
            jacobian = log_y.masked_fill(log_y.isneginf(), 0.0).sum(-1)
        inside = concrete_log_prob(log_y, logits, self.temperature, log_space=True) - jacobian
        if edge is None:
            return inside
        # Other rows take part with a value whose gradient is finite: 0 times inf would be NaN.
        boundary = torch.where(edge.unsqueeze(-1), value.detach(), 1 / value.shape[-1])
        return torch.where(edge, self._log_prob_of_value(boundary), inside)

    def _log_prob_of_value(self, value: Tensor) -> Tensor:
        return concrete_log_prob(value, self.logits, self.temperature)


class StraightThroughGumbelSoftmax(_OverClasses):
    r"""One-hot samples of a categorical distribution, with the gradient of the relaxed sample.

    The value is that of :math:`\arg\max_i (l_i + g_i)`, an exact sample of
    :math:`\operatorname{softmax}(l)` at every temperature; the temperature is that of the gradient
    (straight-through; Jang et al., section 2.2). Arguments as those of :class:`ExpGumbelSoftmax`.

    So :meth:`log_prob`, entropy, moments and Kullback-Leibler divergence are those of the
    categorical distribution, as in :class:`torch.distributions.OneHotCategoricalStraightThrough`,
    and not those of the relaxed value behind the sample, which Pyro's
    ``RelaxedOneHotCategoricalStraightThrough`` scores.
    """

    support = constraints.one_hot
    has_enumerate_support = True

    @property
    def _log_probs(self) -> Tensor:
        return torch.log_softmax(_wide(self.logits), -1)

    @property
    def mean(self) -> Tensor:
        """Probabilities of the classes."""
        return self.probs

    @property
    def mode(self) -> Tensor:
        """One-hot vector of the most probable class."""
        index = self.logits.argmax(-1, keepdim=True)
        return torch.zeros_like(self.logits).scatter(-1, index, 1.0)

    @property
    def variance(self) -> Tensor:
        """Variance of each entry, ``p (1 - p)``."""
        return self.probs * (1 - self.probs)

    def entropy(self) -> Tensor:
        """Entropy in nats, of shape ``batch_shape``."""
        return -_times_log(self.probs, self._log_probs).sum(-1)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All one-hot vectors, in a first dimension; see torch's Distribution."""
        count = self.event_shape[0]
        eye = torch.eye(count, dtype=self.logits.dtype, device=self.logits.device)
        values = eye.view(count, *[1] * len(self.batch_shape), count)
        return values.expand(count, *self.batch_shape, count) if expand else values

    def _draw(
        self, logits: Tensor, generator: torch.Generator | None, rng_state: Tensor | None
    ) -> Tensor:
        return gumbel_softmax(
            logits, self.temperature, hard=True, generator=generator, rng_state=rng_state
        )

    def log_prob(self, value: Tensor) -> Tensor:
        r"""Log-probability :math:`\sum_i v_i \log\pi_i` of a one-hot ``value``.

        Linear in ``value``, so that a loss with it has a straight-through gradient, too.

        Args:
            value: one-hot vectors, broadcasts with ``batch_shape + event_shape``.

        Returns:
            A tensor of the broadcast shape without the last dimension, float32 or float64. A class
            with probability 0 gives -inf.
        """
        if self._validate_args:
            self._validate_sample(value)
        return _times_log(value, self._log_probs).sum(-1)


class BinaryConcrete(_OverGates):
    r"""Relaxed Bernoulli distribution, the binary Concrete distribution.

    .. math::
        y = \sigma\big((l + \mathrm{logit}\,u)/\tau\big), \qquad
        p(y) = \frac{\tau\, \alpha\, y^{-\tau-1} (1-y)^{-\tau-1}}
        {\big(\alpha\, y^{-\tau} + (1-y)^{-\tau}\big)^2}, \quad \alpha = e^l

    (Maddison et al., section B, eq. 24 to 26). What :class:`GumbelSoftmax` says of densities of its
    samples holds here for entries rounded to 0 or 1.

    Args:
        temperature: > 0 and finite: a number, or a tensor that broadcasts with the parameters.
        probs: probabilities of 1, a number or a tensor. Where they are 0 or 1 so is the sample.
        logits: log-odds of 1, a number or a tensor. Exactly one of both must be given.
        validate_args: see :class:`ExpGumbelSoftmax`.

    Raises:
        TypeError, ValueError: as :class:`ExpGumbelSoftmax`.
    """

    support = constraints.unit_interval

    def _draw(
        self, logits: Tensor, generator: torch.Generator | None, rng_state: Tensor | None
    ) -> Tensor:
        return _draw_and_remember(binary_concrete, logits, self.temperature, generator, rng_state)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density at ``value``, elementwise.

        Args:
            value: in [0, 1], broadcasts with ``batch_shape``.

        Returns:
            A tensor of the broadcast shape, float32 or float64.
        """
        if self._validate_args:
            self._validate_sample(value)
        origin = recall(value)
        if origin is None:
            return self._log_prob_of_value(value)
        drawn_from = _wide(origin.logits)
        noise = logistic_noise(
            drawn_from.shape,
            dtype=drawn_from.dtype,
            device=drawn_from.device,
            rng_state=origin.rng_state,
        )
        # An infinite logit makes its sample exactly 0 or 1.
        exact = drawn_from.isinf() | self.logits.isinf()
        x = (drawn_from.masked_fill(drawn_from.isinf(), 0.0) + noise) / origin.tau
        d = self.temperature * x - _wide(self.logits).masked_fill(self.logits.isinf(), 0.0)
        log_tau = torch.log(torch.as_tensor(self.temperature, dtype=d.dtype, device=d.device))
        inside = log_tau + logsigmoid(d) + logsigmoid(-d) - logsigmoid(x) - logsigmoid(-x)
        # Other entries take part with a value whose gradient is finite: 0 times inf would be NaN.
        boundary = torch.where(exact, value.detach(), 0.5)
        return torch.where(exact, self._log_prob_of_value(boundary), inside)

    def _log_prob_of_value(self, value: Tensor) -> Tensor:
        return binary_concrete_log_prob(_wide(value), _wide(self.logits), self.temperature)


class StraightThroughBinaryConcrete(_OverGates):
    """Samples 0 and 1 of Bernoulli distributions, with the gradient of the relaxed sample.

    To :class:`BinaryConcrete`, whose arguments it takes, what :class:`StraightThroughGumbelSoftmax`
    is to :class:`GumbelSoftmax`: values are exact samples of ``sigmoid(logits)``,
    :meth:`log_prob`, entropy and moments those of the Bernoulli distribution.
    """

    support = constraints.boolean
    has_enumerate_support = True

    @property
    def mean(self) -> Tensor:
        """Probabilities of 1."""
        return self.probs

    @property
    def mode(self) -> Tensor:
        """The more probable value; NaN where both are equally probable."""
        return (self.logits > 0).to(self.logits).masked_fill(self.logits == 0, math.nan)

    @property
    def variance(self) -> Tensor:
        """``p (1 - p)``."""
        return self.probs * (1 - self.probs)

    def entropy(self) -> Tensor:
        """Entropy in nats, of shape ``batch_shape``."""
        return -self._expected_log(self.probs)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """0 and 1, in a first dimension; see torch's Distribution."""
        values = torch.arange(2, dtype=self.logits.dtype, device=self.logits.device)
        values = values.view(2, *[1] * len(self.batch_shape))
        return values.expand(2, *self.batch_shape) if expand else values

    def _draw(
        self, logits: Tensor, generator: torch.Generator | None, rng_state: Tensor | None
    ) -> Tensor:
        return binary_concrete(
            logits, self.temperature, hard=True, generator=generator, rng_state=rng_state
        )

    def log_prob(self, value: Tensor) -> Tensor:
        r"""Log-probability :math:`v \log p + (1 - v) \log(1 - p)`, linear in ``value``.

        Args:
            value: 0 or 1, broadcasts with ``batch_shape``.

        Returns:
            A tensor of the broadcast shape, float32 or float64; -inf for a value that has
            probability 0.
        """
        if self._validate_args:
            self._validate_sample(value)
        return self._expected_log(value)

    def _expected_log(self, of_one: Tensor) -> Tensor:
        logits = _wide(self.logits)
        one, zero = logsigmoid(logits), logsigmoid(-logits)
        return _times_log(of_one, one) + _times_log(1 - of_one, zero)


def _wide(logits: Tensor) -> Tensor:
    """In the dtype that the samplers compute in."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _draw_and_remember(
    sampler: Any,
    logits: Tensor,
    tau: Number | Tensor,
    generator: torch.Generator | None,
    rng_state: Tensor | None,
) -> Tensor:
    """A sample whose logarithm can be made again."""
    if not can_be_remembered(logits):
        sample: Tensor = sampler(logits, tau, generator=generator, rng_state=rng_state)
        return sample
    if rng_state is None:
        rng_state, generator = draw_rng_state(generator, device=logits.device), None
    sample = sampler(logits, tau, generator=generator, rng_state=rng_state)
    remember(sample, logits, tau, rng_state)
    return sample


def _kl_of_classes(
    p: StraightThroughGumbelSoftmax, q: StraightThroughGumbelSoftmax | OneHotCategorical
) -> Tensor:
    """Of the categorical distributions, whose exact samples theirs are."""
    log_q = torch.log_softmax(q.logits, -1)
    return -(p.entropy() + _times_log(p.probs, log_q).sum(-1))


def _kl_of_gates(
    p: StraightThroughBinaryConcrete, q: StraightThroughBinaryConcrete | Bernoulli
) -> Tensor:
    """Of the Bernoulli distributions, whose exact samples theirs are."""
    one, zero = logsigmoid(q.logits), logsigmoid(-q.logits)
    expected = _times_log(p.probs, one) + _times_log(1 - p.probs, zero)
    return -(p.entropy() + expected)


register_kl(StraightThroughGumbelSoftmax, StraightThroughGumbelSoftmax)(_kl_of_classes)
register_kl(StraightThroughGumbelSoftmax, OneHotCategorical)(_kl_of_classes)
register_kl(StraightThroughBinaryConcrete, StraightThroughBinaryConcrete)(_kl_of_gates)
register_kl(StraightThroughBinaryConcrete, Bernoulli)(_kl_of_gates)
