r"""Discrete laws whose hard values have a gradient: straight-through estimators.

The value is exactly hard, and is differentiated as a surrogate of the choice ``gradient``. All of
them are biased for some cost; :doc:`the page on straight-through laws </laws/straight_through>`
says by how much. ``log_prob`` is the discrete log-mass, linear in each factor of the value, so
that the value's gradient goes through the scores of guide and model.
"""

import warnings
from typing import Any, Self

import pyro.distributions as dist
import torch
from torch import Tensor

from ..errors import NonDiffError, NonDiffWarning
from ._discrete import make_bernoulli, make_one_hot
from ._laws import extended_score
from ._maps import NoiseMap, has_logits, straight_through
from ._surrogates import NUM_CONDITIONAL, SURROGATES, surrogate
from .temperature import Temperature, check_temperature, current

__all__ = ["StraightThroughBernoulli", "StraightThroughOneHotCategorical"]


def check_gradient(owner: str, gradient: str, num_conditional: int) -> None:
    """Refuses a gradient that there is not.

    Raises:
        NonDiffError: With those that there are.
    """
    if gradient not in SURROGATES:
        raise NonDiffError(
            f"{owner}: gradient must be one of {list(SURROGATES)}, found {gradient!r}"
        )
    if num_conditional < 1:
        raise NonDiffError(f"{owner}: num_conditional must be at least 1, found {num_conditional}")


class _StraightThrough(NoiseMap):
    """What both laws do in the same way."""

    temperature: Temperature
    gradient: str
    num_conditional: int

    def _configure(self, temperature: Temperature, gradient: str, num_conditional: int) -> None:
        name, law = type(self).__name__, _any(self)
        check_gradient(name, gradient, num_conditional)
        check_temperature(name, temperature, bool(law._validate_args), law.batch_shape)
        _warn_of_corners(law)
        self.temperature = temperature
        self.gradient = gradient
        self.num_conditional = num_conditional

    def _configured_as(self, other: Self) -> Self:
        self.temperature = other.temperature
        self.gradient = other.gradient
        self.num_conditional = other.num_conditional
        return self

    @property
    def like(self) -> Tensor:
        """The law's logits or probabilities, as they were given."""
        found: Tensor = _any(self)._param
        return found

    def from_noise(self, noise: Tensor) -> Tensor:
        """The hard value that noise makes, with the gradient of its surrogate."""
        law = _any(self)
        hard = self._hard(noise)
        temperature = current(self.temperature, law.event_dim)
        soft = surrogate(self.gradient, law, hard, noise, temperature, self.num_conditional)
        return straight_through(hard.to(self.like.dtype), soft)

    def _hard(self, noise: Tensor) -> Tensor:
        raise NotImplementedError

    def log_prob(self, value: Tensor) -> Tensor:
        """The discrete log-mass, linear in each factor of the value.

        Arguments:
            value: Hard values.
        """
        law = _any(self)
        if law._validate_args:
            law._validate_sample(value)
        return extended_score(law, value)


class StraightThroughBernoulli(_StraightThrough, dist.Bernoulli):  # type: ignore[misc]
    r"""A Bernoulli law whose 0 or 1 has a gradient.

    .. math:: z = [\eta + \epsilon > 0], \qquad \frac{\partial z}{\partial \eta} :=
        \frac{\partial s}{\partial \eta}, \qquad \epsilon \sim \mathrm{Logistic}

    with a surrogate :math:`s` by ``gradient``:

    ================  ========================================================================
    ``"identity"``    :math:`\sigma(\eta)`: the incoming gradient goes to the probability
    ``"selected"``    :math:`z \sigma(\eta)`: it goes there where the value is 1
    ``"softmax"``     :math:`\sigma(\eta / T)`
    ``"gumbel"``      :math:`\sigma((\eta + \epsilon) / T)`
    ``"gumbel_rao"``  the mean of that over ``num_conditional`` noises that make the same value
    ``"reinmax"``     second order: at :math:`T = 1` exact for costs at most quadratic in the value
    ================  ========================================================================

    Arguments:
        probs: Probabilities of 1, of the batch shape.
        logits: Their logits :math:`\eta`; give one of both.
        temperature: :math:`T`: a number, a tensor that broadcasts with the batch shape, or a
            schedule.
        gradient: The surrogate.
        num_conditional: How many conditional noises ``"gumbel_rao"`` draws.
        validate_args: As in Pyro.

    Raises:
        NonDiffError: For a temperature that is not positive, logits that are not finite,
            probabilities that are none, or another gradient.

    Example:
        >>> from pyro_nondiff.distributions import StraightThroughBernoulli
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> z = StraightThroughBernoulli(logits=logits, gradient="identity").rsample()
        >>> torch.autograd.grad(z.sum(), logits)
        (tensor([0.2500, 0.2500, 0.2500]),)

    References:
        | Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation
          (Bengio et al., 2013)
        | https://arxiv.org/abs/1308.3432

        | Categorical Reparameterization with Gumbel-Softmax (Jang et al., 2017)
        | https://arxiv.org/abs/1611.01144

        | Rao-Blackwellizing the Straight-Through Gumbel-Softmax Gradient Estimator
          (Paulus et al., 2021)
        | https://arxiv.org/abs/2010.04838

        | Bridging Discrete and Backpropagation: Straight-Through and Beyond (Liu et al., 2023)
        | https://arxiv.org/abs/2304.08612
    """

    noise_kind = "logistic"

    def __init__(
        self,
        probs: Any = None,
        logits: Any = None,
        temperature: Temperature = 1.0,
        gradient: str = "reinmax",
        *,
        num_conditional: int = NUM_CONDITIONAL,
        validate_args: bool | None = None,
    ) -> None:
        make_bernoulli(type(self).__name__, self, probs, logits, validate_args)
        self._configure(temperature, gradient, num_conditional)

    def _hard(self, noise: Tensor) -> Tensor:
        above: Tensor = self.logits + noise > 0
        return above.to(noise.dtype)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """The same law with a larger batch shape."""
        new: Self = self._new(_instance)
        dist.Bernoulli.expand(self, batch_shape, new)
        return new._configured_as(self)


class StraightThroughOneHotCategorical(_StraightThrough, dist.OneHotCategorical):
    r"""A one-hot categorical law whose corner has a gradient.

    .. math:: z = \mathrm{onehot}(\mathrm{argmax}(\eta + \epsilon)), \qquad
        \frac{\partial z}{\partial \eta} := \frac{\partial s}{\partial \eta},
        \qquad \epsilon \sim \mathrm{Gumbel}

    with a surrogate :math:`s` by ``gradient``, as for :class:`StraightThroughBernoulli` with the
    softmax in place of the logistic function. :math:`-\infty` among the logits takes a category
    out.

    Arguments:
        probs: Probabilities, of the batch shape and ``K`` categories.
        logits: Unnormalised log-probabilities :math:`\eta`; give one of both.
        temperature: :math:`T`: a number, a tensor that broadcasts with the batch shape, or a
            schedule.
        gradient: The surrogate.
        num_conditional: How many conditional noises ``"gumbel_rao"`` draws.
        validate_args: As in Pyro.

    Raises:
        NonDiffError: For a temperature that is not positive, logits that are NaN or plus infinity,
            probabilities that are none, or another gradient.

    Example:
        >>> from pyro_nondiff.distributions import StraightThroughOneHotCategorical
        >>> law = StraightThroughOneHotCategorical(logits=torch.tensor([0.0, 1.0, 2.0]))
        >>> z = law.rsample()
        >>> bool((z.sort().values == torch.tensor([0.0, 0.0, 1.0])).all())
        True

    References:
        | See :class:`StraightThroughBernoulli`.
    """

    noise_kind = "gumbel"

    def __init__(
        self,
        probs: Any = None,
        logits: Any = None,
        temperature: Temperature = 1.0,
        gradient: str = "reinmax",
        *,
        num_conditional: int = NUM_CONDITIONAL,
        validate_args: bool | None = None,
    ) -> None:
        make_one_hot(type(self).__name__, self, probs, logits, validate_args)
        self._configure(temperature, gradient, num_conditional)

    def _hard(self, noise: Tensor) -> Tensor:
        scores = self.logits + noise
        return torch.zeros_like(scores).scatter(-1, scores.argmax(-1, keepdim=True), 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """The same law with a larger batch shape."""
        new: Self = self._new(_instance)
        dist.OneHotCategorical.expand(self, batch_shape, new)
        return new._configured_as(self)


def _any(law: Any) -> Any:
    """Pyro's laws have no types."""
    return law


def _warn_of_corners(law: Any) -> None:
    """Probabilities of exactly 0 or 1 have a gradient of exactly 0."""
    given = law._param
    if not law._validate_args or given.is_meta or not given.requires_grad or has_logits(law):
        return
    count = int(((given == 0) | (given == 1)).sum())
    if count:
        warnings.warn(
            f"{type(law).__name__}: {count} of probs are exactly 0 or 1. Their log-mass has no "
            "gradient, so they may never change. Learn logits instead.",
            NonDiffWarning,
            stacklevel=5,
        )
