"""What an estimator is: a frozen recipe that knows laws and costs, never traces.

Shapes here are those that the engine hands over. ``K`` is the number of base worlds,
``m`` the number of hard worlds that the site asked for, *plates* has one dimension for
each of ``max_plate_nesting`` (size 1 where the site or its cost has no such plate).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..distributions import Law

__all__ = ["AbstractEstimator", "Ask", "Context", "Draw", "Estimate"]


@dataclass(frozen=True)
class Ask:
    """What an estimator needs of the engine at a site.

    Arguments:
        base: How many base worlds it needs at least.
        hard: How many hard worlds branch at the site: with values that the law could draw.
        soft: How many soft worlds branch at the site, after the hard ones: with relaxed
            values, in which the program must be continuous.
        second: Whether a second noise is wanted, drawn under the role ``"v"``.
        second_kind: The kind of the second noise; the law's own if None.
        leaves: Whether ``draw`` is wanted, though there are no hard worlds and no second noise.
        pathwise: Whether the value carries a gradient to the law's parameters.
        corrected: Whether, beside that gradient, there is a score of what the value's path
            leaves out, see :func:`pyro_nondiff.distributions.score_correction`.
        base_mass: Weight of the base world in the model's and pathwise gradients,
            relative to the branches'.
        hard_mass: What the weights of the hard worlds sum to, on the same scale; 0 where
            their values are not distributed as the law's.
        per_element: Whether the weights of the hard worlds differ between the elements
            of the site's plates. Such an estimator is refused where a cost lies outside
            a plate of the site: it would be biased there.
        role: The role under which the noise is drawn, see :class:`pyro_nondiff.noise.Request`.
    """

    base: int = 1
    hard: int = 0
    soft: int = 0
    second: bool = False
    second_kind: str | None = None
    leaves: bool = False
    pathwise: bool = False
    corrected: bool = False
    base_mass: float = 1.0
    hard_mass: float = 1.0
    per_element: bool = False
    role: str = "u"

    @property
    def draws(self) -> bool:
        """Whether the estimator draws more than the base value."""
        return bool(self.hard or self.second or self.leaves)

    @property
    def estimated(self) -> bool:
        """Whether the estimator is asked for an estimate, beside the value's gradient if any."""
        return self.corrected or not self.pathwise


@dataclass(frozen=True)
class Draw:
    """What an estimator draws at a site.

    Arguments:
        values: Values of the law, of shape ``(1 + hard + soft, K, plates, event)``; the
            first is the base world's, the last are the soft worlds'.
        parameters: Those that ``Estimate.gradients`` are gradients for, each
            ``(K, plates, event)``: the logits, or what else the law is made of.
        hard_weights: Weights of the hard worlds, ``(m, K, plates)``, that sum to
            ``Ask.hard_mass`` over the first dimension. Without, they are equal.
        soft: The relaxed value and its twin, ``(2, K, plates, event)``, or the value
            itself, with a gradient to ``leaves``.
        placed: The same values as the soft worlds have them, for the gradient of a cost.
        leaves: The parameters that ``soft`` was made of, cut off from the program.
        scores: The gradients of the base value's log-probability for the parameters.
        coefficients: For each parameter, what costs are multiplied with, ``(n, K, plates, event)``;
            their number is the estimator's own.
        temperature: Of what is relaxed behind the site in its soft worlds.
    """

    values: Tensor
    parameters: tuple[Tensor, ...] = ()
    hard_weights: Tensor | None = None
    soft: Tensor | None = None
    placed: Tensor | None = None
    leaves: tuple[Tensor, ...] = ()
    scores: tuple[Tensor, ...] = ()
    coefficients: tuple[Tensor, ...] = ()
    temperature: Tensor | None = None


@dataclass(frozen=True)
class Context:
    """What an estimator may look at besides its own site.

    Arguments:
        site: The name of the site.
        args: The positional arguments of the program.
        kwargs: Its keyword arguments.
        shape: The shape of a weight, ``(K, plates)``, for the site.
        soft_totals: The costs of the soft worlds, ``(soft, K)``: each term once, summed over
            all plates, to be differentiated for ``Draw.soft``.
    """

    site: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    soft_totals: Tensor | None = None


@dataclass(frozen=True)
class Estimate:
    """An estimate of the gradient of the expected cost.

    Exactly one of ``weight`` and ``gradients`` is given. Both are constants of the
    surrogate: the engine detaches them.

    Arguments:
        weight: The surrogate is ``(weight * log_prob).sum()``, with ``log_prob`` of the
            site's values, ``(1 or 1 + m, K, plates)``.
        gradients: The surrogate is the sum of ``(gradient * parameter).sum()`` over
            ``Draw.parameters``, each ``(K, plates, event)``.
        own_loss: A scalar that trains the estimator's state, and nothing else.
        update: Called once when the step has succeeded; it changes the state in place.
    """

    weight: Tensor | None = None
    gradients: tuple[Tensor, ...] = ()
    own_loss: Tensor | None = None
    update: Callable[[], None] | None = None


class AbstractEstimator(ABC):
    """How the gradient of one sample site is estimated.

    A subclass is a frozen dataclass without tensors that change: what a site learns
    is an ``nn.Module`` made by :meth:`make_state` and owned by the objective. The same
    object may serve many sites.

    Example:
        An estimator of one's own needs two methods and no engine:

        >>> from dataclasses import dataclass
        >>> from pyro_nondiff.estimators import AbstractEstimator, Ask, Estimate
        >>> @dataclass(frozen=True)
        ... class ScoreFunction(AbstractEstimator):
        ...     def ask(self, law):
        ...         return Ask()
        ...     def estimate(self, draw, costs, state, context):
        ...         return Estimate(weight=costs[:1])
    """

    def specialise(self, law: Law) -> "AbstractEstimator":
        """The estimator to use for a law: itself, unless it only chooses another."""
        return self

    def refuse(self, law: Law) -> str | None:
        """Why a law cannot be served and what to do instead, or None if it can."""
        return None

    @abstractmethod
    def ask(self, law: Law) -> Ask:
        """What the estimator needs of the engine to serve a law."""

    def drawn_from(self, law: Law) -> Law:
        """The law that draws the base value: the site's own, or its twin with a gradient."""
        return law

    def make_state(self, law: Law) -> nn.Module | None:
        """What a site learns, made on its first step; None if it learns nothing."""
        return None

    def draw(
        self,
        law: Law,
        value: Tensor,
        noise: Tensor | None,
        second: Tensor | None,
        state: nn.Module | None,
    ) -> Draw:
        """The values of the site's own worlds beside the base value.

        Arguments:
            law: The law of the site in the base run.
            value: The base value, the law's map of ``noise``.
            noise: The site's noise, or None for a law that is no map of noise.
            second: The second noise, if it was asked for.
            state: What :meth:`make_state` returned for this site.
        """
        return Draw(value.unsqueeze(0))

    @abstractmethod
    def estimate(
        self, draw: Draw, costs: Tensor, state: nn.Module | None, context: Context
    ) -> Estimate:
        """The estimate of the gradient of the expected cost, at one step.

        Arguments:
            draw: What was drawn at the site.
            costs: The cost of each world, ``(1 + hard + soft, K, plates)``, to be
                minimised. Those of the hard worlds have no gradient; those of the soft
                worlds have one to ``draw.soft``.
            state: What :meth:`make_state` returned for this site.
            context: What else may be looked at.
        """
