"""The hard Concrete law: a relaxed Bernoulli that reaches 0 and 1."""

import math
from typing import Any, ClassVar, Self

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from ..errors import NonDiffError
from ._discrete import bernoulli
from ._maps import NoiseMap, wide
from .temperature import Temperature, check_temperature, current, log_of

__all__ = ["HardConcrete"]


class HardConcrete(NoiseMap, TorchDistribution):
    r"""A binary Concrete number, stretched beyond 0 and 1 and cut off there.

    .. math:: s = \sigma((\eta + \epsilon) / T), \qquad
        z = \min(1, \max(0, \gamma + (\zeta - \gamma) s)), \qquad \epsilon \sim \mathrm{Logistic}

    Values are exactly 0 with probability :math:`\sigma(T \log(-\gamma/\zeta) - \eta)`, so that a
    gate can close, and still have a gradient between. ``log_prob`` is the log-probability at 0 and
    at 1, and the log-density between them.

    Arguments:
        logits: :math:`\eta`, of the batch shape.
        temperature: :math:`T`: a number, a tensor that broadcasts with the batch shape, or a
            schedule.
        stretch: :math:`(\gamma, \zeta)`, below 0 and above 1.
        validate_args: As in Pyro.

    Raises:
        NonDiffError: For a temperature that is not positive, infinite logits, or a stretch that
            does not contain 0 and 1.

    Example:
        >>> from pyro_nondiff.distributions import HardConcrete
        >>> gate = HardConcrete(torch.tensor([-3.0, 0.0, 3.0]))
        >>> gate.prob_nonzero
        tensor([0.1976, 0.8318, 0.9900])
        >>> gate.typical
        tensor([0.0000, 0.5000, 1.0000])

    References:
        | Learning Sparse Neural Networks through L0 Regularization (Louizos et al., 2018)
        | https://arxiv.org/abs/1712.01312
    """

    noise_kind = "logistic"
    arg_constraints: ClassVar[dict[str, Any]] = {"logits": constraints.real}
    support = constraints.unit_interval

    def __init__(
        self,
        logits: Any,
        temperature: Temperature = 2 / 3,
        stretch: tuple[float, float] = (-0.1, 1.1),
        *,
        validate_args: bool | None = None,
    ) -> None:
        if not stretch[0] < 0 < 1 < stretch[1]:
            raise NonDiffError(
                f"HardConcrete: stretch must reach below 0 and above 1, found {stretch}. "
                "Otherwise 0 and 1 have no probability: use RelaxedBernoulli."
            )
        discrete = bernoulli("HardConcrete", None, logits, validate_args)
        self.logits: Tensor = discrete.logits
        self.temperature = temperature
        self.stretch = stretch
        super().__init__(discrete.batch_shape, validate_args=validate_args)
        validate, shape = bool(self._validate_args), discrete.batch_shape
        check_temperature("HardConcrete", temperature, validate, shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """The same law with a larger batch shape."""
        new: Self = self._new(_instance)
        shape = torch.Size(batch_shape)
        new.logits = self.logits.expand(shape)
        new.temperature, new.stretch = self.temperature, self.stretch
        TorchDistribution.__init__(new, shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def like(self) -> Tensor:
        """The logits."""
        return self.logits

    @property
    def prob_zero(self) -> Tensor:
        """The probability of exactly 0."""
        return (-self._above(0.0)).sigmoid()

    @property
    def prob_nonzero(self) -> Tensor:
        """The probability of not being 0, whose sum is the expected number of open gates."""
        return self._above(0.0).sigmoid()

    @property
    def prob_one(self) -> Tensor:
        """The probability of exactly 1."""
        return self._above(1.0).sigmoid()

    @property
    def typical(self) -> Tensor:
        """The value at which gates are fixed after training: that of no noise."""
        return self._stretched(self.logits.sigmoid())

    def from_noise(self, noise: Tensor) -> Tensor:
        """The value that noise makes."""
        relaxed = ((wide(self.logits) + noise) / current(self.temperature)).sigmoid()
        return self._stretched(relaxed).to(self.logits.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-probability of 0 and 1, and the log-density between."""
        if self._validate_args:
            self._validate_sample(value)
        value = wide(value)
        inside = (value > 0) & (value < 1)
        middle = torch.where(inside, value, torch.full_like(value, 0.5))
        ends = torch.where(value <= 0, logsigmoid(-self._above(0.0)), logsigmoid(self._above(1.0)))
        found = torch.where(inside, self._log_density(middle), ends)
        return found.to(self.logits.dtype)

    def _stretched(self, relaxed: Tensor) -> Tensor:
        low, high = self.stretch
        return (low + (high - low) * relaxed).clamp(0, 1)

    def _above(self, threshold: float) -> Tensor:
        """The logit of being above a number between 0 and 1."""
        return wide(self.logits) - current(self.temperature) * self._position(threshold)

    def _position(self, threshold: float) -> float:
        low, high = self.stretch
        return math.log((threshold - low) / (high - threshold))

    def _log_density(self, value: Tensor) -> Tensor:
        low, high = self.stretch
        one, zero = ((value - low) / (high - low)).log(), ((high - value) / (high - low)).log()
        temperature = current(self.temperature)
        slope = wide(self.logits) - temperature * (one - zero)
        scale = log_of(temperature) - math.log(high - low)
        return scale + slope - 2 * softplus(slope) - one - zero
