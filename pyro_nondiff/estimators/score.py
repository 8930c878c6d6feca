r"""Score-function estimators: they serve any law and any cost.

.. math:: \nabla_\eta \mathbb{E}_{z \sim q_\eta}[f(z)]
          = \mathbb{E}[(f(z) - b) \nabla_\eta \log q_\eta(z)]
"""

from dataclasses import dataclass

from torch import Tensor, nn

from ..distributions import Law
from ..errors import NonDiffError
from .base import AbstractEstimator, Ask, Context, Draw, Estimate
from .baselines import AbstractBaseline

__all__ = ["REINFORCE", "RLOO"]


@dataclass(frozen=True)
class REINFORCE(AbstractEstimator):
    r"""The score-function estimator, with a baseline or without.

    .. math:: \hat g = (f(z) - b) \nabla_\eta \log q_\eta(z)

    Arguments:
        baseline: :class:`MovingAverage`, :class:`NeuralBaseline`, or a sum of them.

    Raises:
        NonDiffError: If ``baseline`` is something else.

    Example:
        >>> from pyro_nondiff.estimators import REINFORCE
        >>> REINFORCE()
        REINFORCE(baseline=None)

    References:
        | Simple statistical gradient-following algorithms for connectionist reinforcement
          learning (Williams, 1992)
        | https://doi.org/10.1007/BF00992696
    """

    baseline: AbstractBaseline | None = None

    def __post_init__(self) -> None:
        if self.baseline is not None and not isinstance(self.baseline, AbstractBaseline):
            raise NonDiffError(
                f"REINFORCE needs a baseline object, found {self.baseline!r}: "
                "give MovingAverage(), NeuralBaseline(net, input=...) or their sum."
            )

    def ask(self, law: Law) -> Ask:
        return Ask()

    def make_state(self, law: Law) -> nn.Module | None:
        return None if self.baseline is None else self.baseline.make_state()

    def estimate(
        self, draw: Draw, costs: Tensor, state: nn.Module | None, context: Context
    ) -> Estimate:
        if self.baseline is None or state is None:
            return Estimate(weight=costs[:1])
        base = costs[0]
        reading = self.baseline.read(state, base, context)
        return Estimate(
            weight=(base - reading.value).unsqueeze(0),
            own_loss=reading.fit(base),
            update=lambda: reading.update(base),
        )


@dataclass(frozen=True)
class RLOO(AbstractEstimator):
    r"""REINFORCE with the mean cost of the other base worlds as baseline.

    .. math:: \hat g = \frac{1}{K} \sum_k \Big(f_k - \frac{1}{K-1} \sum_{j \ne k} f_j\Big)
              \nabla_\eta \log q_\eta(z_k)

    All base worlds of the step are used, which can be more than were asked for.

    Arguments:
        num_samples: How many base worlds the site needs at least, 2 or more.

    Raises:
        NonDiffError: If ``num_samples`` is less than 2.

    Example:
        >>> from pyro_nondiff.estimators import RLOO
        >>> RLOO(num_samples=4)
        RLOO(num_samples=4)

    References:
        | Buy 4 REINFORCE samples, get a baseline for free! (Kool et al., 2019)
        | https://openreview.net/forum?id=r1lgTGL5DE
    """

    num_samples: int = 2

    def __post_init__(self) -> None:
        if self.num_samples < 2:
            raise NonDiffError(
                f"RLOO needs num_samples >= 2 to leave one out, found {self.num_samples}. "
                "With one sample use REINFORCE(baseline=MovingAverage())."
            )

    def ask(self, law: Law) -> Ask:
        return Ask(base=self.num_samples)

    def estimate(
        self, draw: Draw, costs: Tensor, state: nn.Module | None, context: Context
    ) -> Estimate:
        return Estimate(weight=leave_one_out(costs[:1]))


def leave_one_out(costs: Tensor) -> Tensor:
    """Each base world's cost less the mean of the others'; as it is where there are no others.

    Arguments:
        costs: ``(1, K, plates)``.
    """
    worlds = costs.shape[1]
    if worlds == 1:  # a site that only one base world has met: nobody to compare with
        return costs
    return (costs - costs.mean(1, keepdim=True)) * (worlds / (worlds - 1))
