r"""Relaxed discrete laws: continuous values near the corners, drawn and scored in log space.

A density is a function of the value alone: cloning, indexing or moving a value changes nothing.
Coordinates below ``1e-32`` in float32 (``1e-302`` in float64) count as that number, so the density
is finite wherever the sample is. At a temperature so low that many coordinates are smaller, use
float64, or a straight-through law.
"""

from abc import abstractmethod
from typing import Any, ClassVar, Self

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, OneHotCategorical
from torch.nn.functional import softplus
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import NonDiffError
from ._discrete import bernoulli, one_hot
from ._laws import Law, describe, extended_score, rewrap
from ._maps import NoiseMap, straight_through, wide
from ._relax import relax
from .temperature import Temperature, check_temperature, current, log_of

__all__ = ["RelaxedBernoulli", "RelaxedOneHotCategorical", "relaxed"]

_SOFT: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The soft value behind each hard one that is alive and was drawn for its relaxed density."""


class _Relaxed(NoiseMap, TorchDistribution):
    """What both laws do in the same way, around the discrete law that they relax."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    discrete: Any

    def __init__(
        self,
        discrete: Any,
        temperature: Temperature,
        straight_through: bool,
        relaxed_density: bool | None,
        validate_args: bool | None,
    ) -> None:
        if relaxed_density is False and not straight_through:
            raise NonDiffError(
                f"{type(self).__name__}: a relaxed value has only a relaxed density. Give "
                "straight_through=True for a hard value with the discrete log-mass."
            )
        self.discrete = discrete
        self.temperature = temperature
        self.straight_through = straight_through
        self.relaxed_density = not straight_through or bool(relaxed_density)
        super().__init__(discrete.batch_shape, discrete.event_shape, validate_args=validate_args)
        validate, shape = bool(self._validate_args), discrete.batch_shape
        check_temperature(type(self).__name__, temperature, validate, shape)

    @property
    def logits(self) -> Tensor:
        """The logits of the discrete law."""
        found: Tensor = self.discrete.logits
        return found

    @property
    def probs(self) -> Tensor:
        """The probabilities of the discrete law."""
        found: Tensor = self.discrete.probs
        return found

    @property
    def like(self) -> Tensor:
        """The law's logits or probabilities, as they were given."""
        found: Tensor = self.discrete._param
        return found

    @property
    def support(self) -> Any:
        """The corners with ``straight_through``, and all between them without."""
        return self.discrete.support if self.straight_through else self._soft_support

    @property
    @abstractmethod
    def _soft_support(self) -> Any:
        """Where relaxed values lie."""

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """The same law with a larger batch shape."""
        new: Self = self._new(_instance)
        new.discrete = self.discrete.expand(batch_shape)
        new.temperature = self.temperature
        new.straight_through = self.straight_through
        new.relaxed_density = self.relaxed_density
        shape = torch.Size(batch_shape)
        TorchDistribution.__init__(new, shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def from_noise(self, noise: Tensor) -> Tensor:
        """The relaxed value of noise, or the hard one with its gradient."""
        soft = relax(self.discrete, wide(self.logits) + noise, self._temperature)
        soft = soft.to(self.like.dtype)
        if not self.straight_through:
            return soft
        value = straight_through(self._corner(soft), soft)
        if self.relaxed_density:
            _SOFT[value] = soft
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density of a relaxed value, or the discrete log-mass of a hard one."""
        if self._validate_args:
            self._validate_sample(value)
        if not self.relaxed_density:
            return extended_score(self.discrete, value)
        soft = self._soft_of(value) if self.straight_through else value
        logits = wide(self.logits)
        return self._log_density(logits, wide(soft)).to(self.like.dtype)

    def _soft_of(self, value: Tensor) -> Tensor:
        found: Tensor | None = _SOFT.get(value)
        if found is None:
            raise NonDiffError(
                f"{type(self).__name__}: with relaxed_density=True only a value as it was drawn "
                "has a density, and this one was changed or comes from elsewhere. Score the drawn "
                "tensor itself, or leave relaxed_density out for the discrete log-mass."
            )
        return found

    @property
    def _temperature(self) -> float | Tensor:
        return current(self.temperature, self.event_dim)

    @abstractmethod
    def _corner(self, soft: Tensor) -> Tensor:
        """The corner that a relaxed value is nearest to."""

    @abstractmethod
    def _log_density(self, logits: Tensor, value: Tensor) -> Tensor:
        """The log-density of a relaxed value in at least float32."""


class RelaxedBernoulli(_Relaxed):
    r"""The binary Concrete law: a number between 0 and 1, near them at a low temperature.

    .. math:: z = \sigma((\eta + \epsilon) / T), \qquad \epsilon \sim \mathrm{Logistic}

    Arguments:
        temperature: :math:`T`: a number, a tensor that broadcasts with the batch shape, or a
            schedule.
        probs: Probabilities of 1, of the batch shape.
        logits: Their logits :math:`\eta`; give one of both.
        straight_through: Round the value to 0 or 1, and differentiate it as the relaxed one. Its
            ``log_prob`` is then the discrete log-mass.
        relaxed_density: With ``straight_through``, score the relaxed value behind the hard one,
            as the Concrete law is. Guide *and* model must then have such a law, and the loss is the
            loss of a continuous model.
        validate_args: As in Pyro.

    Raises:
        NonDiffError: For a temperature that is not positive, logits that are not finite, or
            probabilities that are none; in ``log_prob``, for a hard value whose relaxed one is not
            known.

    Example:
        >>> from pyro_nondiff.distributions import RelaxedBernoulli
        >>> law = RelaxedBernoulli(0.5, logits=torch.tensor(1.0))
        >>> law.log_prob(torch.tensor(0.5))
        tensor(-0.9334)

    References:
        | The Concrete Distribution: A Continuous Relaxation of Discrete Random Variables
          (Maddison et al., 2017)
        | https://arxiv.org/abs/1611.00712
    """

    noise_kind = "logistic"

    def __init__(
        self,
        temperature: Temperature,
        probs: Any = None,
        logits: Any = None,
        *,
        straight_through: bool = False,
        relaxed_density: bool | None = None,
        validate_args: bool | None = None,
    ) -> None:
        discrete = bernoulli(type(self).__name__, probs, logits, validate_args)
        super().__init__(discrete, temperature, straight_through, relaxed_density, validate_args)

    @property
    def _soft_support(self) -> Any:
        return constraints.unit_interval

    def _corner(self, soft: Tensor) -> Tensor:
        return (soft > 0.5).to(soft.dtype)

    def _log_density(self, logits: Tensor, value: Tensor) -> Tensor:
        one, zero = _log(value), _log(1 - value)
        slope = logits - self._temperature * (one - zero)
        return log_of(self._temperature) + slope - 2 * softplus(slope) - one - zero


class RelaxedOneHotCategorical(_Relaxed):
    r"""The Concrete law: a point of the simplex, near a corner at a low temperature.

    .. math:: z = \mathrm{softmax}((\eta + \epsilon) / T), \qquad \epsilon \sim \mathrm{Gumbel}

    Arguments:
        temperature: :math:`T`: a number, a tensor that broadcasts with the batch shape, or a
            schedule.
        probs: Probabilities, of the batch shape and ``K`` categories.
        logits: Unnormalised log-probabilities :math:`\eta`; give one of both. A category at
            :math:`-\infty` is taken out: its coordinate is 0.
        straight_through: Round the value to the nearest corner, and differentiate it as the relaxed
            one. Its ``log_prob`` is then the discrete log-mass.
        relaxed_density: As for :class:`RelaxedBernoulli`.
        validate_args: As in Pyro.

    Raises:
        NonDiffError: As for :class:`RelaxedBernoulli`.

    Example:
        >>> from pyro_nondiff.distributions import RelaxedOneHotCategorical
        >>> law = RelaxedOneHotCategorical(0.05, logits=torch.zeros(50))
        >>> bool(law.log_prob(law.sample((100,))).isfinite().all())
        True

    References:
        | See :class:`RelaxedBernoulli`.
    """

    noise_kind = "gumbel"

    def __init__(
        self,
        temperature: Temperature,
        probs: Any = None,
        logits: Any = None,
        *,
        straight_through: bool = False,
        relaxed_density: bool | None = None,
        validate_args: bool | None = None,
    ) -> None:
        discrete = one_hot(type(self).__name__, probs, logits, validate_args)
        super().__init__(discrete, temperature, straight_through, relaxed_density, validate_args)

    @property
    def _soft_support(self) -> Any:
        return _Simplex(self.event_shape[-1])

    def _corner(self, soft: Tensor) -> Tensor:
        return torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1)

    def _log_density(self, logits: Tensor, value: Tensor) -> Tensor:
        log_value = _log(value)
        inside = logits > -torch.inf
        count = inside.sum(-1).to(logits.dtype)
        slope = logits - self._temperature * log_value
        each = torch.where(inside, slope - log_value, torch.zeros_like(slope)).sum(-1)
        temperature = current(self.temperature)
        scale = torch.lgamma(count) + (count - 1) * log_of(temperature)
        return scale + each - count * slope.logsumexp(-1)


class _Simplex(constraints.Constraint):
    """Points whose coordinates are not negative and sum to 1, as nearly as their dtype can say."""

    event_dim = 1

    def __init__(self, size: int) -> None:
        self.size = size

    def check(self, value: Tensor) -> Tensor:
        gap = (wide(value).sum(-1) - 1).abs()
        rounding = self.size * torch.finfo(value.dtype).eps
        return (value >= 0).all(-1) & (gap <= max(rounding, 1e-6))


def relaxed(law: Law, temperature: Temperature, *, straight_through: bool = False) -> Law:
    r"""The relaxed twin of a discrete law, under the same ``to_event``, ``expand`` and ``mask``.

    ======================  =======================================================
    law                     twin
    ======================  =======================================================
    Bernoulli               :class:`RelaxedBernoulli`
    OneHotCategorical       :class:`RelaxedOneHotCategorical`
    Categorical             :class:`RelaxedOneHotCategorical`: one event dimension more
    ======================  =======================================================

    Arguments:
        law: A discrete law.
        temperature: The temperature of the twin.
        straight_through: As for :class:`RelaxedBernoulli`.

    Raises:
        NonDiffError: For a law of another kind.

    Example:
        >>> from pyro_nondiff.distributions import relaxed
        >>> law = relaxed(dist.Bernoulli(logits=torch.zeros(3)).to_event(1), 0.5)
        >>> law.event_shape, type(law.base_dist).__name__
        (torch.Size([3]), 'RelaxedBernoulli')
    """
    return rewrap(law, lambda base: _twin(base, temperature, straight_through))


def _twin(base: Law, temperature: Temperature, straight_through: bool) -> Law:
    twins: dict[type, Any] = {
        Bernoulli: RelaxedBernoulli,
        OneHotCategorical: RelaxedOneHotCategorical,
        Categorical: RelaxedOneHotCategorical,
    }
    found = next((twin for kind, twin in twins.items() if isinstance(base, kind)), None)
    if found is not None:
        options = {"straight_through": straight_through, "validate_args": base._validate_args}
        return found(temperature, logits=base.logits, **options)
    raise NonDiffError(
        f"{describe(base)} has no relaxed twin. Those that have one are Bernoulli, Categorical and "
        "OneHotCategorical."
    )


def _log(x: Tensor) -> Tensor:
    """The logarithm of at least a number whose reciprocal is far from overflowing."""
    return x.clamp(min=torch.finfo(x.dtype).tiny * 2**20).log()
