"""The straight-through estimators: a hard value with the gradient of a smooth one."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributions import Bernoulli

from ..distributions import (
    NUM_CONDITIONAL,
    Law,
    StraightThroughBernoulli,
    StraightThroughOneHotCategorical,
    Temperature,
    check_gradient,
    check_temperature,
    core,
    describe,
    relaxable,
    rewrap,
)
from .base import AbstractEstimator, Ask, Context, Draw, Estimate

__all__ = ["StraightThrough"]


@dataclass(frozen=True)
class StraightThrough(AbstractEstimator):
    """A biased pathwise gradient through a hard value, for a Bernoulli or one-hot law.

    The site's value is drawn as :class:`pyro_nondiff.distributions.StraightThroughBernoulli` or
    :class:`pyro_nondiff.distributions.StraightThroughOneHotCategorical` draws it; their page states
    the bias of each ``gradient``. Guide and model score the value by the multilinear rule.

    Arguments:
        gradient: ``"identity"``, ``"selected"``, ``"softmax"``, ``"gumbel"``, ``"gumbel_rao"`` or
            ``"reinmax"``.
        temperature: Of the surrogate: a number, a tensor or a schedule.
        num_conditional: How many conditional noises ``"gumbel_rao"`` draws.

    Raises:
        NonDiffError: For another gradient or a temperature that is not positive; at a site, for
            a law that is no Bernoulli and no OneHotCategorical.

    Example:
        >>> from pyro_nondiff.estimators import StraightThrough
        >>> from pyro_nondiff.infer import TraceEstimator_ELBO
        >>> elbo = TraceEstimator_ELBO(StraightThrough("gumbel", temperature=0.5))

    References:
        | See :class:`pyro_nondiff.distributions.StraightThroughBernoulli`.
    """

    gradient: str = "reinmax"
    temperature: Temperature = 1.0
    num_conditional: int = NUM_CONDITIONAL

    def __post_init__(self) -> None:
        check_gradient("StraightThrough", self.gradient, self.num_conditional)
        check_temperature("StraightThrough", self.temperature, validate=True)

    def refuse(self, law: Law) -> str | None:
        if relaxable(law):
            return None
        return (
            f"StraightThrough needs a Bernoulli or OneHotCategorical law, and this one is "
            f"{describe(law)}. Use RLOO(), which serves any law."
        )

    def ask(self, law: Law) -> Ask:
        return Ask(pathwise=True)

    def drawn_from(self, law: Law) -> Law:
        return rewrap(law, self._with_gradient)

    def estimate(
        self, draw: Draw, costs: Tensor, state: nn.Module | None, context: Context
    ) -> Estimate:
        """Nothing to add: the gradient flows through the value."""
        return Estimate()

    def _with_gradient(self, base: Law) -> Law:
        bernoulli = isinstance(core(base), Bernoulli)
        kind = StraightThroughBernoulli if bernoulli else StraightThroughOneHotCategorical
        return kind(
            logits=base.logits,
            temperature=self.temperature,
            gradient=self.gradient,
            num_conditional=self.num_conditional,
            validate_args=False,  # the site's own law has been validated
        )
