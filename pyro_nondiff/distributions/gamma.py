"""Gamma laws: of a fixed concentration, and with a choice of gradient to a learnt one."""

from typing import Any, ClassVar, Self, cast

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid

from ..errors import NonDiffError
from ..noise import Request, draw
from ._implicit import implicit_gamma
from ._maps import NoiseMap, wide
from ._marsaglia import NUM_PROPOSALS, accepted_value, first_accepted, unboost

__all__ = ["Gamma", "ScaleGamma"]


class ScaleGamma(NoiseMap, dist.Gamma):
    r"""A Gamma law of a fixed concentration, which is a standard one times its scale.

    .. math:: z = \beta \epsilon, \qquad \epsilon \sim \mathrm{Gamma}(k, 1), \qquad
        \frac{\partial z}{\partial \beta} = \epsilon

    Arguments:
        concentration: :math:`k`, positive and not learnt; broadcasts with ``scale``.
        scale: :math:`\beta`, positive; one over the rate.
        validate_args: As in Pyro.

    Raises:
        NonDiffError: For a concentration that requires a gradient.

    Example:
        >>> from pyro_nondiff.distributions import ScaleGamma
        >>> law = ScaleGamma(3.0, torch.tensor([1.0, 2.0]))
        >>> law.mean
        tensor([3., 6.])

    References:
        | Monte Carlo Gradient Estimation in Machine Learning (Mohamed et al., 2020)
        | https://arxiv.org/abs/1906.10652
    """

    noise_kind = "gamma"
    arg_constraints: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "concentration": constraints.positive,
        "scale": constraints.positive,
    }

    def __init__(
        self, concentration: Any, scale: Any, *, validate_args: bool | None = None
    ) -> None:
        if isinstance(concentration, Tensor) and concentration.requires_grad:
            raise NonDiffError(
                "ScaleGamma: concentration requires a gradient, and has none here. Detach it, or "
                "use Gamma, whose concentration can be learnt."
            )
        concentration, self.scale = broadcast_all(concentration, scale)
        dist.Gamma.__init__(self, concentration, 1 / self.scale, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """The same law with a larger batch shape."""
        new: Self = self._new(_instance)
        new.scale = self.scale.expand(batch_shape)
        dist.Gamma.expand(self, batch_shape, new)
        return new

    @property
    def like(self) -> Tensor:
        """The scale."""
        return self.scale

    @property
    def noise_concentration(self) -> Tensor:  # type: ignore[override]
        """The concentration, of the law and of its noise."""
        concentration: Tensor = self.concentration
        return concentration

    def from_noise(self, noise: Tensor) -> Tensor:
        """The value that a standard Gamma number makes."""
        return (self.scale * noise).to(self.scale.dtype)


class Gamma(dist.Gamma):
    r"""A Gamma law with a choice of gradient to its concentration.

    ``"implicit"`` is Pyro's own: the derivative of the value at a fixed quantile. torch
    approximates it: a gradient is off by 2e-5 of itself or so. ``"rejection"``
    is that of the accepted proposal of Marsaglia and Tsang's sampler,

    .. math:: z = \frac{h(\epsilon)}{\beta} \prod_{i=0}^{B-1} u_i^{1 / (\alpha + i)}, \qquad
        h(\epsilon) = d \Big(1 + \frac{\epsilon}{\sqrt{9 d}}\Big)^3, \qquad
        d = \alpha + B - \tfrac13,

    and of the law of what is accepted, whose score :math:`\nabla \log \pi(\epsilon)` is
    ``score_parts``'s score function; it is exact. It needs a term of its own in the
    surrogate: :class:`pyro_nondiff.infer.TraceEstimator_ELBO` and Pyro's ``Trace_ELBO`` add it,
    Pyro's ``TraceGraph_ELBO`` does not, nor does any of Pyro's behind ``to_event``.

    Arguments:
        concentration: :math:`\alpha`, positive; broadcasts with ``rate``.
        rate: :math:`\beta`, positive.
        gradient: ``"implicit"`` or ``"rejection"``.
        boost: :math:`B`, at least 1: the larger, the smaller the score's part, and the slower.
        validate_args: As in Pyro.

    Raises:
        NonDiffError: For another gradient or a boost below 1; in ``score_parts``, for a value that
            was not drawn from this very object.

    Example:
        >>> from pyro_nondiff.distributions import Gamma
        >>> alpha = torch.tensor(0.5, requires_grad=True)
        >>> law = Gamma(alpha, 1.0, gradient="rejection")
        >>> z = law.rsample()
        >>> law.score_parts(z).score_function.requires_grad
        True

    References:
        | Reparameterization Gradients through Acceptance-Rejection Sampling Algorithms
          (Naesseth et al., 2017)
        | https://arxiv.org/abs/1610.05683

        | Implicit Reparameterization Gradients (Figurnov et al., 2018)
        | https://arxiv.org/abs/1805.08498
    """

    def __init__(
        self,
        concentration: Any,
        rate: Any,
        gradient: str = "implicit",
        boost: int = 4,
        *,
        validate_args: bool | None = None,
    ) -> None:
        if gradient not in ("implicit", "rejection"):
            raise NonDiffError(
                f"Gamma: gradient must be 'implicit' or 'rejection', found {gradient!r}"
            )
        if boost < 1:
            raise NonDiffError(f"Gamma: boost must be at least 1, found {boost}")
        self.gradient, self.boost = gradient, boost
        self._last: tuple[Tensor, Tensor] | None = None
        dist.Gamma.__init__(self, concentration, rate, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """The same law with a larger batch shape."""
        law: Any = self
        new: Self = law._get_checked_instance(type(self), _instance)
        new.gradient, new.boost, new._last = self.gradient, self.boost, None
        dist.Gamma.expand(self, batch_shape, new)
        return new

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """A draw, with the gradient that was chosen."""
        shape = (*sample_shape, *self.batch_shape)
        if self.gradient == "implicit":
            concentration = wide(self.concentration).expand(shape)
            drawn = self._noise("gamma", shape, concentration)
            return self._narrow(implicit_gamma(concentration, drawn) / wide(self.rate))
        boosted = wide(self.concentration) + self.boost
        accepted = first_accepted(
            boosted.detach(),
            self._noise("normal", (NUM_PROPOSALS, *shape)),
            logsigmoid(self._noise("logistic", (NUM_PROPOSALS, *shape))),
        )
        log_value, score = accepted_value(boosted, accepted)
        factors = unboost(wide(self.concentration), self._noise("logistic", (self.boost, *shape)))
        value = self._narrow((log_value + factors - wide(self.rate).log()).exp())
        self._last = value, score.to(value.dtype)
        return value

    def _noise(
        self, kind: str, shape: tuple[int, ...], concentration: Tensor | None = None
    ) -> Tensor:
        place = self.rate.dtype, self.rate.device, "u", self
        return draw(Request("", kind, shape, *place, concentration=concentration))

    def _narrow(self, value: Tensor) -> Tensor:
        """A value in the law's dtype, and never 0."""
        dtype = self.rate.dtype
        return value.clamp(min=torch.finfo(dtype).tiny).to(dtype)

    def __getstate__(self) -> dict[str, Any]:
        """All but the last draw, so that a copy or a pickle holds no graph."""
        return {**self.__dict__, "_last": None}

    @property
    def partly_pathwise(self) -> bool:
        """Whether a part of the gradient does not go through the value."""
        return self.gradient == "rejection"

    def score_parts(self, value: Tensor) -> ScoreParts:
        """The log-density, and with ``"rejection"`` the score of the accepted proposal."""
        law: Any = super()
        if self.gradient == "implicit":
            return cast(ScoreParts, law.score_parts(value))
        if self._last is None or self._last[0] is not value:
            raise NonDiffError(
                "Gamma: with gradient='rejection' only the tensor that the law drew has a score, "
                "and this one was changed, or drawn from another object. Use gradient='implicit'."
            )
        log_prob: Tensor = law.log_prob(value)
        return ScoreParts(log_prob, self._last[1], log_prob)
