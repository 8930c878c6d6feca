"""The pathwise estimator, and the one that chooses."""

from dataclasses import dataclass

from torch import Tensor, nn

from ..distributions import Law, describe, partly_pathwise
from .base import AbstractEstimator, Ask, Context, Draw, Estimate
from .score import RLOO, leave_one_out

__all__ = ["Auto", "CorrectedPathwise", "Pathwise"]


@dataclass(frozen=True)
class Pathwise(AbstractEstimator):
    r"""The gradient through the value, for a law that has ``rsample``.

    .. math:: \hat g = \nabla_z f(z) \, \nabla_\eta z(\eta, \epsilon)

    Raises:
        NonDiffError: At a site whose law has no ``rsample``.

    Example:
        >>> from pyro_nondiff.estimators import Pathwise
        >>> Pathwise()
        Pathwise()

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2014)
        | https://arxiv.org/abs/1312.6114
    """

    def specialise(self, law: Law) -> AbstractEstimator:
        return CorrectedPathwise() if law.has_rsample and partly_pathwise(law) else self

    def refuse(self, law: Law) -> str | None:
        if law.has_rsample:
            return None
        return (
            f"Pathwise needs a law with rsample, and {describe(law)} has none. "
            "Use RLOO(), which serves any law."
        )

    def ask(self, law: Law) -> Ask:
        return Ask(pathwise=True)

    def estimate(
        self, draw: Draw, costs: Tensor, state: nn.Module | None, context: Context
    ) -> Estimate:
        """Nothing to add: the gradient flows through the value."""
        return Estimate()


@dataclass(frozen=True)
class CorrectedPathwise(AbstractEstimator):
    r"""The pathwise gradient of a law whose noise has a law that depends on the parameters.

    .. math:: \hat g = \nabla_z f(z) \, \nabla_\eta z(\eta, \epsilon)
              + (f(z) - b) \nabla_\eta \log \pi_\eta(\epsilon)

    :class:`Pathwise` is this for a law whose ``score_parts`` have a score function, such as
    ``Gamma(..., gradient="rejection")`` and Pyro's ``Rejector``. The baseline :math:`b` is the mean
    cost of the other base worlds, if there are any.

    Example:
        >>> from pyro_nondiff.distributions import Gamma
        >>> from pyro_nondiff.estimators import Pathwise
        >>> Pathwise().specialise(Gamma(1.0, 1.0, gradient="rejection"))
        CorrectedPathwise()

    References:
        | Reparameterization Gradients through Acceptance-Rejection Sampling Algorithms
          (Naesseth et al., 2017)
        | https://arxiv.org/abs/1610.05683
    """

    def ask(self, law: Law) -> Ask:
        return Ask(pathwise=True, corrected=True)

    def estimate(
        self, draw: Draw, costs: Tensor, state: nn.Module | None, context: Context
    ) -> Estimate:
        return Estimate(weight=leave_one_out(costs[:1]))


@dataclass(frozen=True)
class Auto(AbstractEstimator):
    """Pathwise where the law has ``rsample``, else RLOO(4): the default.

    RLOO(4) serves any law, any cost and any number of sites.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_nondiff.estimators import Auto
        >>> Auto().specialise(dist.Poisson(torch.tensor(3.0)))
        RLOO(num_samples=4)
    """

    def specialise(self, law: Law) -> AbstractEstimator:
        return Pathwise().specialise(law) if law.has_rsample else RLOO(num_samples=4)

    def ask(self, law: Law) -> Ask:
        return self.specialise(law).ask(law)

    def estimate(
        self, draw: Draw, costs: Tensor, state: nn.Module | None, context: Context
    ) -> Estimate:
        """Never called: the engine uses what ``specialise`` returns."""
        raise TypeError("specialise Auto to a law first")
