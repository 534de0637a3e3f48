r"""Relaxed categorical and Bernoulli distributions, called like :mod:`torch.distributions`.

=================================  ===================  ============================================
class                              a sample             density of a sample
=================================  ===================  ============================================
:class:`GumbelSoftmax`             ``y`` in the simplex Jang et al., Maddison et al.
:class:`ExpGumbelSoftmax`          ``log y``            the same for ``log y``
:class:`StraightThroughGumbelSoftmax`  one-hot          probability of its class
:class:`BinaryConcrete`            ``y`` in (0, 1)      Maddison et al., appendix B
:class:`LogitBinaryConcrete`       ``logit y``          the same for ``logit y``
:class:`StraightThroughBinaryConcrete`  0 or 1          its probability
=================================  ===================  ============================================

Samples are those of the functions :func:`gumbel_ext.gumbel_softmax`,
:func:`gumbel_ext.gumbel_log_softmax`, :func:`gumbel_ext.binary_concrete` and
:func:`gumbel_ext.logit_binary_concrete`: the same noise, the same gradients. Those of
:class:`GumbelSoftmax` and :class:`BinaryConcrete` stay off the boundary, where their density is
infinite or zero.

Pyro takes them as it takes its own: ``pyro.sample("z", GumbelSoftmax(tau, logits=logits))``.

Sources: E. Jang, S. Gu, B. Poole, "Categorical reparameterization with Gumbel-softmax", arXiv
1611.01144; C. J. Maddison, A. Mnih, Y. W. Teh, "The Concrete distribution", arXiv 1611.00712.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    OneHotCategorical,
    RelaxedBernoulli,
    RelaxedOneHotCategorical,
    biject_to,
    constraints,
    register_kl,
    transform_to,
)
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical
from torch.distributions.transforms import (
    ComposeTransform,
    ExpTransform,
    SigmoidTransform,
    Transform,
)
from torch.distributions.utils import lazy_property
from torch.nn.functional import logsigmoid

from gumbel_ext._arguments import (
    as_number,
    as_positive,
    check_dense,
    check_mask,
    check_supported,
    check_tensor,
    is_whole,
    split_tau,
)
from gumbel_ext._pyro import PyroDistribution
from gumbel_ext.binary import binary_concrete, binary_concrete_log_prob, logit_binary_concrete
from gumbel_ext.concrete import concrete_log_prob, gumbel_log_softmax
from gumbel_ext.functional import gumbel_softmax

__all__ = [
    "BinaryConcrete",
    "ExpGumbelSoftmax",
    "GumbelSoftmax",
    "LogitBinaryConcrete",
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


class _LogSimplex(constraints.Constraint):
    """Logarithms of points of the simplex, up to the rounding of the dtype."""

    is_discrete = False
    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        # Entry i is rounded by eps |log y_i|, which counts y_i times: the entropy, at most log k.
        lost = torch.finfo(value.dtype).eps * (1 + math.log(max(value.shape[-1], 1)))
        return _wide(value).logsumexp(-1).abs() <= max(1e-5, 4 * lost)


class _ClassLogits(type(constraints.real_vector)):  # type: ignore[misc]
    """Vectors without NaN in which a class is possible."""

    def check(self, value: Tensor) -> Tensor:
        return ~value.isnan().any(-1) & (value > -math.inf).any(-1)


_simplex = _Simplex()
_log_simplex = _LogSimplex()
_class_logits = _ClassLogits(constraints.real, 1)
for _registry in (biject_to, transform_to):
    _registry.register(_Simplex, lambda _, to=_registry: to(constraints.simplex))
    _registry.register(
        _LogSimplex,
        lambda _, to=_registry: ComposeTransform([to(constraints.simplex), ExpTransform().inv]),
    )
    _registry.register(_ClassLogits, lambda _, to=_registry: to(constraints.real_vector))


class _Relaxed(PyroDistribution):
    """Temperature and logits, their shapes and checks. Subclasses draw and score."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]]
    support: ClassVar[constraints.Constraint]
    has_rsample = True
    # Without values torch's properties of these names would take their place.
    logits: Tensor = None  # type: ignore[assignment]
    temperature: Number | Tensor = None  # type: ignore[assignment]
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
        if not self._event_dim and not isinstance(value, Tensor):
            device = temperature.device if isinstance(temperature, Tensor) else None
            number = as_number(name, self._given, value, "a number or a tensor")
            return torch.as_tensor(number, device=device)
        check_tensor(name, self._given, value)
        check_supported(name, self._given, value)
        if self._event_dim and (value.dim() == 0 or value.shape[-1] == 0):
            raise ValueError(
                f"{name}: {self._given} must have at least one class in the last dimension, got "
                f"shape {tuple(value.shape)}"
            )
        tensor: Tensor = value
        return tensor

    def _check_value(self, value: Tensor) -> None:
        """Whether :meth:`log_prob` can take ``value``."""
        name = type(self).__name__
        check_tensor(name, "value", value)
        if is_whole(value) and self.support.is_discrete:
            check_dense(name, "value", value)
        else:
            check_supported(name, "value", value)
        if self._validate_args:
            self._validate_sample(value)

    def _checked_temperature(self, temperature: Any) -> Any:
        name = type(self).__name__
        if isinstance(temperature, Tensor):
            # One of whole numbers becomes float64, as where it is the argument of a function.
            _, temperature = split_tau(name, temperature, "temperature")
            check_supported(name, "temperature", temperature)
            if self._event_dim and temperature.dim() and temperature.shape[-1] != 1:
                # [B] beside logits [B, K] would be a temperature a class.
                raise ValueError(
                    f"{name}: temperature must have a last dimension of 1, for the classes, got "
                    f"{tuple(temperature.shape)}"
                )
            transformed = torch._C._are_functorch_transforms_active()
            if self._validate_args and not transformed:
                inside = (temperature > 0) & (temperature < math.inf)
                if not bool(inside.all()):
                    wrong = temperature[~inside].flatten()[0].item()
                    raise ValueError(
                        f"{name}: temperature must be positive and finite, got {wrong}"
                    )
            return temperature
        if isinstance(temperature, (torch.SymFloat, torch.SymInt)):
            return temperature
        return as_positive(name, "temperature", temperature, "a number or a tensor")

    def _of_probs(self, probs: Tensor) -> tuple[Tensor, Tensor]:
        """``(probs, logits)``, normalised."""
        raise NotImplementedError

    def expand(self: _Self, batch_shape: Sequence[int], _instance: _Self | None = None) -> _Self:
        """The distribution with its batch dimensions expanded, as views; temperature too."""
        family = _OverClasses if self._event_dim else _OverGates
        new: _Self = self._get_checked_instance(family, _instance)  # type: ignore[no-untyped-call]
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
            sample = self.rsample(sample_shape, generator=generator, rng_state=rng_state)
        # A trace knows no no_grad(), and forward-mode derivatives do not heed it.
        return sample.detach()

    def _draw(
        self, logits: Tensor, generator: torch.Generator | None, rng_state: Tensor | None
    ) -> Tensor:
        raise NotImplementedError

    @property
    def deterministic_sample(self) -> Tensor:
        """:attr:`mode`, by the name that tensordict asks for."""
        return self.mode

    @classmethod
    def infer_shapes(
        cls,
        temperature: Sequence[int] = (),
        probs: Sequence[int] | None = None,
        logits: Sequence[int] | None = None,
    ) -> tuple[torch.Size, torch.Size]:
        """``(batch_shape, event_shape)`` for arguments of these shapes, as Pyro asks for it."""
        if (probs is None) == (logits is None):
            raise ValueError(f"{cls.__name__}: exactly one of probs and logits must be given")
        given = torch.Size((logits if probs is None else probs) or ())
        batch_dims = len(given) - cls._event_dim
        shared = torch.Size(temperature)[: max(len(temperature) - cls._event_dim, 0)]
        return torch.broadcast_shapes(given[:batch_dims], shared), given[batch_dims:]

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


def _lowest(dtype: torch.dtype) -> float:
    """What entries of a sample are raised to: in the log density its reciprocal is a number."""
    own, wide = torch.finfo(dtype), torch.finfo(torch.promote_types(dtype, torch.float32))
    return max(own.smallest_normal * own.eps, wide.smallest_normal / wide.eps)


class _OverClasses(_Relaxed):
    """Parameters of a categorical distribution."""

    arg_constraints: ClassVar = {"probs": _simplex, "logits": _class_logits}
    _event_dim = 1

    def __init__(
        self,
        temperature: Number | Tensor,
        probs: Tensor | None = None,
        logits: Tensor | None = None,
        validate_args: bool | None = None,
        *,
        mask: Tensor | None = None,
    ) -> None:
        if mask is not None:
            validated = self._validate_args if validate_args is None else validate_args
            if isinstance(probs, Tensor):
                probs = self._masked("probs", probs, mask, 0.0, validated)
            if isinstance(logits, Tensor):
                logits = self._masked("logits", logits, mask, -math.inf, validated)
        super().__init__(temperature, probs, logits, validate_args)

    def _masked(
        self, given_name: str, given: Tensor, mask: Tensor, impossible: float, validated: bool
    ) -> Tensor:
        name = type(self).__name__
        check_mask(name, mask, given, given_name)
        looked_at = validated and not torch.compiler.is_compiling()
        if looked_at and not bool(mask.expand(given.shape).any(-1).all()):
            raise ValueError(f"{name}: mask must allow a class in every row, got none in one")
        return given.masked_fill(~mask, impossible)

    @property
    def _vertex(self) -> Tensor:
        """One-hot vector of the most probable class."""
        index = self.logits.argmax(-1, keepdim=True)
        return torch.zeros_like(self.logits).scatter(-1, index, 1.0)

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

    @property
    def _vertex(self) -> Tensor:
        """The more probable of 0 and 1; NaN where both are equally probable, as torch has it."""
        return (self.logits > 0).to(self.logits).masked_fill(self.logits == 0, math.nan)

    @property
    def deterministic_sample(self) -> Tensor:
        """:attr:`mode`, by the name that tensordict asks for; 0 where both are equally probable."""
        return self.mode.masked_fill(self.logits == 0, 0.0)

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

    (Maddison et al., section C.3.) The one to use where densities at low temperatures matter: they
    are exact at any temperature. The sum over the entries of :math:`\log y`, by which its density
    differs from that of ``y``, cancels between a posterior and a prior.

    Args:
        temperature: > 0 and finite: a number, or a tensor of shape [] or one that broadcasts to
            ``batch_shape + [1]``, which may have a gradient.
        probs: probabilities of the classes in the last dimension, normalised to a sum of 1. A
            class with probability 0 is never chosen and has gradient 0.
        logits: unnormalised log-probabilities, kept as they are. Exactly one of ``probs`` and
            ``logits`` must be given, float16, bfloat16, float32 or float64.
        validate_args: whether values are checked, here and in :meth:`log_prob`; torch's default if
            None, and no under ``torch.compile``.
        mask: bool tensor that broadcasts to ``probs`` or ``logits``; where it is False the
            probability is 0.

    Raises:
        ValueError: not exactly one of ``probs`` and ``logits`` is given, ``temperature`` is not
            positive and finite or has a wrong shape, there is no class, ``mask`` does not
            broadcast, or the parameters violate their constraints: a row in which no class is
            possible, for one.
        TypeError: an argument is not a number or tensor of a dtype it can be.
    """

    support = _log_simplex

    @property
    def mode(self) -> Tensor:
        """The most probable value of ``log y``, ``log_softmax(logits / temperature)``."""
        return torch.log_softmax(_wide(self.logits) / self.temperature, -1).to(self.logits.dtype)

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
        self._check_value(value)
        return concrete_log_prob(value, self.logits, self.temperature, log_space=True)


class GumbelSoftmax(_OverClasses, RelaxedOneHotCategorical):  # type: ignore[misc]
    r"""Relaxed one-hot categorical distribution, the Gumbel-softmax or Concrete distribution.

    .. math::
        y = \operatorname{softmax}\big((l + g)/\tau\big), \qquad
        p(y) = \Gamma(k)\,\tau^{k-1} \Big(\sum_i \pi_i y_i^{-\tau}\Big)^{-k}
        \prod_i \pi_i\, y_i^{-\tau-1}

    (Jang et al., eq. 2 and appendix B; Maddison et al., eq. 10 and 11.) Arguments as those of
    :class:`ExpGumbelSoftmax`.

    At a low temperature ``y`` has entries too small for its dtype, and on the boundary of the
    simplex the density is zero or infinite. A sample therefore stays inside: entries are raised to
    1e-31 (float16: 6e-8; float64: 1e-292), but those of probability 0. Its density is finite and
    that of the value it has; at temperatures where this happens :class:`ExpGumbelSoftmax` has the
    exact one (``docs/distributions.md`` says how far they differ).

    For code that asks what a distribution is, it is a
    :class:`torch.distributions.RelaxedOneHotCategorical`.
    """

    support = _simplex  # type: ignore[misc]

    @property
    def transforms(self) -> list[Transform]:  # type: ignore[override]
        """Those of torch's class."""
        return [ExpTransform()]

    @property
    def base_dist(self) -> ExpRelaxedCategorical:  # type: ignore[override]
        """The distribution of ``log y`` that torch's class has, with torch's noise."""
        temperature = torch.as_tensor(self.temperature, device=self.logits.device)
        return ExpRelaxedCategorical(temperature, logits=self.logits, validate_args=False)

    @property
    def mode(self) -> Tensor:
        """One-hot vector of the most probable class, which samples approach as tau goes to 0."""
        return self._vertex

    def _draw(
        self, logits: Tensor, generator: torch.Generator | None, rng_state: Tensor | None
    ) -> Tensor:
        y = gumbel_softmax(logits, self.temperature, generator=generator, rng_state=rng_state)
        # Not in place: the sampler's backward reads y.
        lowest = torch.full_like(self.logits, _lowest(y.dtype))
        return y.clamp(min=lowest.masked_fill(self.logits == -math.inf, 0.0))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density at ``value`` with respect to the first k - 1 of its k entries.

        On the boundary of the simplex it is the limit, see :func:`gumbel_ext.concrete_log_prob`.

        Args:
            value: point of the simplex, broadcasts with ``batch_shape + event_shape``.

        Returns:
            A tensor of the broadcast shape without the last dimension, float32 or float64.
        """
        self._check_value(value)
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
        return self._vertex

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
        self._check_value(value)
        return _times_log(value, self._log_probs).sum(-1)


class LogitBinaryConcrete(_OverGates):
    r"""Log-odds of a :class:`BinaryConcrete` sample, which do not round to 0 or 1.

    .. math::
        x = (l + L)/\tau, \qquad
        p(x) = \frac{\tau\, e^{l - \tau x}}{\big(1 + e^{l - \tau x}\big)^2}

    (Maddison et al., section B), the logistic distribution of mean :math:`l/\tau` and scale
    :math:`1/\tau`. To :class:`BinaryConcrete` what :class:`ExpGumbelSoftmax` is to
    :class:`GumbelSoftmax`: the one to use where densities at low temperatures matter, exact at any
    temperature. A model takes ``x.sigmoid()``.

    Args:
        temperature: > 0 and finite: a number, or a tensor that broadcasts with the parameters.
        probs: probabilities of 1, a number or a tensor. Where they are 0 or 1 a sample is infinite.
        logits: log-odds of 1, a number or a tensor. Exactly one of both must be given.
        validate_args: see :class:`ExpGumbelSoftmax`.

    Raises:
        TypeError, ValueError: as :class:`ExpGumbelSoftmax`.
    """

    support = constraints.real

    @property
    def mean(self) -> Tensor:
        """``logits / temperature``."""
        return (_wide(self.logits) / self.temperature).to(self.logits.dtype)

    @property
    def mode(self) -> Tensor:
        """The same as the mean."""
        return self.mean

    @property
    def variance(self) -> Tensor:
        r""":math:`\pi^2 / (3 \tau^2)`."""
        return torch.zeros_like(self.logits) + math.pi**2 / 3 / self.temperature**2

    def entropy(self) -> Tensor:
        r"""Entropy in nats, :math:`2 - \log\tau`, of shape ``batch_shape``."""
        tau = torch.as_tensor(self.temperature, device=self.logits.device)
        return torch.zeros_like(self.logits) + (2 - tau.log())

    def cdf(self, value: Tensor) -> Tensor:
        r""":math:`\sigma(\tau x - l)`."""
        self._check_value(value)
        return torch.sigmoid(self.temperature * value - self.logits)

    def icdf(self, value: Tensor) -> Tensor:
        """The inverse of :meth:`cdf`, for ``value`` in [0, 1]."""
        check_tensor(type(self).__name__, "value", value)
        check_supported(type(self).__name__, "value", value)
        return (self.logits + torch.logit(value)) / self.temperature

    def _draw(
        self, logits: Tensor, generator: torch.Generator | None, rng_state: Tensor | None
    ) -> Tensor:
        return logit_binary_concrete(
            logits, self.temperature, generator=generator, rng_state=rng_state
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density at ``value``, elementwise.

        Args:
            value: log-odds, broadcasts with ``batch_shape``.

        Returns:
            A tensor of the broadcast shape, float32 or float64.
        """
        self._check_value(value)
        return binary_concrete_log_prob(
            _wide(value), _wide(self.logits), self.temperature, logit_space=True
        )


class BinaryConcrete(_OverGates, RelaxedBernoulli):  # type: ignore[misc]
    r"""Relaxed Bernoulli distribution, the binary Concrete distribution.

    .. math::
        y = \sigma\big((l + L)/\tau\big), \qquad
        p(y) = \frac{\tau\, \alpha\, y^{-\tau-1} (1-y)^{-\tau-1}}
        {\big(\alpha\, y^{-\tau} + (1-y)^{-\tau}\big)^2}, \quad \alpha = e^l

    (Maddison et al., section B, eq. 24 to 26.) Arguments as those of :class:`LogitBinaryConcrete`;
    where ``probs`` are 0 or 1 so is the sample.

    What :class:`GumbelSoftmax` says of the boundary holds here for 0 and 1: a sample stays between
    1e-31 (float16: 1e-3; float64: 1e-292) and 1 - eps, where in float32 the log-odds are 15.9. Its
    gradient is that of the curve at the value it has, so that with a density's it gives the
    gradient of the log-odds. :class:`LogitBinaryConcrete` has exact densities, too.

    For code that asks what a distribution is, it is a
    :class:`torch.distributions.RelaxedBernoulli`.
    """

    support = constraints.unit_interval  # type: ignore[misc]

    @property
    def transforms(self) -> list[Transform]:  # type: ignore[override]
        """Those of torch's class."""
        return [SigmoidTransform()]

    @property
    def base_dist(self) -> LogitRelaxedBernoulli:  # type: ignore[override]
        """The distribution of ``logit y`` that torch's class has, with torch's noise."""
        temperature = torch.as_tensor(self.temperature, device=self.logits.device)
        return LogitRelaxedBernoulli(temperature, logits=self.logits, validate_args=False)

    @property
    def mode(self) -> Tensor:
        """The more probable of 0 and 1, which samples approach as tau goes to 0; NaN at a tie."""
        return self._vertex

    def _draw(
        self, logits: Tensor, generator: torch.Generator | None, rng_state: Tensor | None
    ) -> Tensor:
        x = logit_binary_concrete(
            _wide(logits), self.temperature, generator=generator, rng_state=rng_state
        )
        limits = torch.finfo(logits.dtype)
        # In float16 the derivative of the density, about 1 / y, needs a larger one.
        least, most = max(_lowest(logits.dtype), 64 / limits.max), 1 / limits.eps
        inside = x.detach().clamp(math.log(least), math.log(most))
        # The difference is exactly 0, and has the gradient that a clamp would not pass on. That of
        # the sigmoid fits the value it returns, so that products with a density's are right.
        y = torch.sigmoid(inside + (x - x.detach())).to(logits.dtype)
        return torch.where(self.logits.isinf(), (self.logits > 0).to(y.dtype), y)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density at ``value``, elementwise.

        At 0 and 1 it is the limit, see :func:`gumbel_ext.binary_concrete_log_prob`.

        Args:
            value: in [0, 1], broadcasts with ``batch_shape``.

        Returns:
            A tensor of the broadcast shape, float32 or float64.
        """
        self._check_value(value)
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
        return self._vertex

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
        self._check_value(value)
        return self._expected_log(value)

    def _expected_log(self, of_one: Tensor) -> Tensor:
        logits = _wide(self.logits)
        one, zero = logsigmoid(logits), logsigmoid(-logits)
        return _times_log(of_one, one) + _times_log(1 - of_one, zero)


def _wide(logits: Tensor) -> Tensor:
    """In the dtype that the samplers compute in."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _log_probs_of_classes(d: Any) -> Tensor:
    log = torch.log_softmax(_wide(d.logits), -1)
    # The logits of torch's classes are clamped, so that only probs tell what is impossible.
    return log if isinstance(d, _Relaxed) else log.masked_fill(d.probs == 0, -math.inf)


def _log_probs_of_gates(d: Any) -> Tensor:
    """Of 1 and 0, in a last dimension."""
    logits = _wide(d.logits)
    log = torch.stack([logsigmoid(logits), logsigmoid(-logits)], -1)
    if isinstance(d, _Relaxed):
        return log
    return log.masked_fill(torch.stack([d.probs == 0, d.probs == 1], -1), -math.inf)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return (_times_log(p, log_p) - _times_log(p, log_q)).sum(-1)


# Straight-through samples are exact samples of torch's distributions.
for _ours, _theirs, _log_probs in (
    (StraightThroughGumbelSoftmax, OneHotCategorical, _log_probs_of_classes),
    (StraightThroughBinaryConcrete, Bernoulli, _log_probs_of_gates),
):
    for _pair in ((_ours, _ours), (_ours, _theirs), (_theirs, _ours)):
        register_kl(*_pair)(lambda p, q, log=_log_probs: _divergence(log(p), log(q)))
