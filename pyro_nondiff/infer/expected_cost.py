"""The expected cost of a program, for a loss that need not have a derivative."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..distributions import AbstractSchedule
from ..errors import NonDiffError
from ..estimators import AbstractEstimator
from .elbo import EstimatorELBOModule, TraceEstimator_ELBO
from .execute import Chunk, Pair, Program

__all__ = ["ExpectedCost", "no_guide"]


def no_guide(*args: Any, **kwargs: Any) -> None:
    """The guide of a program that draws all its sites itself."""


class ExpectedCost(TraceEstimator_ELBO):
    r"""The expectation of a program's costs, with a gradient estimator chosen a site.

    .. math:: \mathbb{E}_{z \sim p}\Big[\sum_t c_t(z) - \sum_i \log p(x_i \mid z)
              - \beta \sum_s \mathrm{H}(p_s)\Big]

    Costs :math:`c_t` are the program's :func:`pyro_nondiff.ops.cost` statements, which need no
    derivative, and the negative log-probabilities of its observed sites. There is no prior and no
    KL: each latent site is drawn from its own law in the program. The cost of a site is made of
    what can depend on it: in a sequence of decisions, of the costs to come.

    Arguments:
        estimator: As for :class:`TraceEstimator_ELBO`.
        discount: :math:`\gamma` in (0, 1]. In the estimate at a site, a cost that lies :math:`k`
            sample sites later counts :math:`\gamma^k`. The loss itself is not discounted.
        entropy_bonus: :math:`\beta`, what the entropy of each latent site is worth: a number, a
            tensor, or a schedule, whose ``step()`` you call once a step. It counts as a cost that
            is stated just before the site.
        **options: As for :class:`TraceEstimator_ELBO`.

    Raises:
        NonDiffError: As :class:`TraceEstimator_ELBO`; for a discount outside (0, 1], a guide that
            draws, or an entropy bonus for a law without entropy.

    Example:
        >>> from pyro.infer import SVI
        >>> from pyro_nondiff.estimators import RLOO
        >>> from pyro_nondiff.infer import ExpectedCost, no_guide
        >>> from pyro_nondiff.ops import cost, external
        >>> price = {0: 3.0, 1: 1.0, 2: 2.0}  # a look-up has no derivative
        >>> def program():
        ...     logits = pyro.param("logits", torch.zeros(3))
        ...     with pyro.plate("buyers", 10):
        ...         item = pyro.sample("item", dist.Categorical(logits=logits))
        ...         cost("price", external("look up", lambda i: price[int(i)], item))
        >>> svi = SVI(program, no_guide, pyro.optim.Adam({"lr": 0.1}), ExpectedCost(RLOO(4)))
        >>> for _ in range(50):
        ...     loss = svi.step()
        >>> int(pyro.param("logits").argmax())
        1

    References:
        | Gradient Estimation Using Stochastic Computation Graphs (Schulman et al., 2015)
        | https://arxiv.org/abs/1506.05254
    """

    def __init__(
        self,
        estimator: AbstractEstimator | None = None,
        *,
        discount: float = 1.0,
        entropy_bonus: float | Tensor | AbstractSchedule = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(estimator, **options)
        if not 0 < discount <= 1:
            raise NonDiffError(f"discount must lie in (0, 1], found {discount}")
        self.discount = discount
        self.entropy_bonus = entropy_bonus

    def __call__(self, model: Program, guide: Program = no_guide) -> EstimatorELBOModule:
        """The expected cost of a program as a module, with what the estimators learn."""
        return super().__call__(model, guide)

    def _pair(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Pair:
        pair = super()._pair(model, guide, args, kwargs)
        return replace(pair, discount=self.discount, bonus=self._bonus())

    def _bonus(self) -> float | Tensor | None:
        bonus = self.entropy_bonus
        if isinstance(bonus, AbstractSchedule):
            return bonus.value
        return None if isinstance(bonus, float | int) and bonus == 0 else bonus

    def _look_at(self, chunk: Chunk) -> None:
        if drawn := sorted(site.name for site in chunk.run.guide.values() if site.latent):
            raise NonDiffError(
                f"ExpectedCost: the guide draws {drawn}. A program draws all its sites itself: "
                "give no_guide as the guide, or use TraceEstimator_ELBO."
            )
