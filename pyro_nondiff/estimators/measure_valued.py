r"""Measure-valued gradients: the derivative of a law as a difference of two others.

.. math:: \nabla_\eta \mathbb{E}_{z \sim q_\eta}[f(z)]
          = c_\eta \big(\mathbb{E}_{z \sim q^+}[f(z)] - \mathbb{E}_{z \sim q^-}[f(z)]\big)

=================  ======================  =======================  ===============================
law, parameter     :math:`q^+`             :math:`q^-`              constant
=================  ======================  =======================  ===============================
Bernoulli, logits  1                       0                        :math:`p (1 - p)`
Poisson, rate      :math:`z + 1`           :math:`z`                1
Exponential, rate  :math:`z`               :math:`z + e / \lambda`  :math:`1 / \lambda`
Gamma, rate        :math:`z`               :math:`z + e / \beta`    :math:`\alpha / \beta`
Normal, loc        :math:`\mu + \sigma w`  :math:`\mu - \sigma w`   :math:`(2 \pi \sigma^2)^{-1/2}`
Normal, scale      :math:`\mu + \sigma m`  :math:`z`                :math:`1 / \sigma`
=================  ======================  =======================  ===============================

:math:`w` is a Rayleigh number, :math:`e = w^2 / 2` an exponential one, and
:math:`m = \mathrm{sign}(n) \sqrt{n^2 + w^2}` a double-sided Maxwell number, coupled with the
standard normal number :math:`n` of the value :math:`z = \mu + \sigma n`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Exponential, Gamma, Normal, Poisson

from ..distributions import Law, ScaleGamma, core, describe, parameters
from ..errors import NonDiffError
from .base import AbstractEstimator, Ask, Context, Draw, Estimate

__all__ = ["MeasureValued"]


class _Difference(NamedTuple):
    """How a law's derivative is made of costs.

    Arguments:
        moved: The values that each number is moved to.
        weights: For each parameter by its name, what the costs of the value and of the moved
            values are multiplied with; they sum to 0.
    """

    moved: list[Tensor]
    weights: dict[str, list[Tensor]]


def _bernoulli(law: Law, value: Tensor, rayleigh: Tensor) -> _Difference:
    weight = (2 * value - 1) * law.probs * (1 - law.probs)
    return _Difference([1 - value], {"logits": [weight, -weight]})


def _poisson(law: Law, value: Tensor, rayleigh: Tensor) -> _Difference:
    one = torch.ones_like(value)
    return _Difference([value + 1], {"rate": [-one, one]})


def _exponential(law: Law, value: Tensor, rayleigh: Tensor) -> _Difference:
    return _next_gamma("rate", 1 / law.rate, law.rate, value, rayleigh)


def _gamma(law: Law, value: Tensor, rayleigh: Tensor) -> _Difference:
    return _next_gamma("rate", law.concentration / law.rate, law.rate, value, rayleigh)


def _scale_gamma(law: Law, value: Tensor, rayleigh: Tensor) -> _Difference:
    return _next_gamma("scale", -law.concentration / law.scale, law.rate, value, rayleigh)


def _next_gamma(
    name: str, weight: Tensor, rate: Tensor, value: Tensor, rayleigh: Tensor
) -> _Difference:
    """The Gamma law whose concentration is larger by 1 is the value and an exponential more."""
    return _Difference([value + rayleigh**2 / (2 * rate)], {name: [weight, -weight]})


def _normal(law: Law, value: Tensor, rayleigh: Tensor) -> _Difference:
    normal = (value - law.loc) / law.scale
    maxwell = torch.where(normal < 0, -1.0, 1.0) * (normal**2 + rayleigh**2).sqrt()
    moved = [law.loc + law.scale * number for number in (rayleigh, -rayleigh, maxwell)]
    scale = 1 / law.scale
    loc, none = scale / math.sqrt(2 * math.pi), torch.zeros_like(scale)
    weights = {"loc": [none, loc, -loc, none], "scale": [-scale, none, none, scale]}
    return _Difference(moved, weights)


class _Rule(NamedTuple):
    """The difference of a law by some of its parameters.

    Arguments:
        difference: What makes it of the law, a value and Rayleigh numbers.
        names: The parameters.
        moves: How many values a number is moved to.
        random: Whether the Rayleigh numbers are used.
    """

    difference: Callable[[Law, Tensor, Tensor], _Difference]
    names: tuple[str, ...]
    moves: int = 1
    random: bool = True


_RULES: dict[type, _Rule] = {
    Bernoulli: _Rule(_bernoulli, ("logits",), random=False),
    Poisson: _Rule(_poisson, ("rate",), random=False),
    Exponential: _Rule(_exponential, ("rate",)),
    ScaleGamma: _Rule(_scale_gamma, ("scale",)),
    Gamma: _Rule(_gamma, ("rate",)),
    Normal: _Rule(_normal, ("loc", "scale"), moves=3),
}


def _rule(law: Law) -> _Rule | None:
    """The rule of a law, None for one that is made of something else, as a Chi2 is."""
    found = next((rule for kind, rule in _RULES.items() if isinstance(core(law), kind)), None)
    return found if found is not None and parameters(law).keys() >= set(found.names) else None


@dataclass(frozen=True)
class MeasureValued(AbstractEstimator):
    r"""The difference of the costs of two coupled values, for each number of the value.

    .. math:: \hat g_i = c_\eta \big(f(z_i^+, z_{-i}) - f(z_i^-, z_{-i})\big)

    The cost may be a black box. For a site of :math:`n` numbers in each plate element a step
    evaluates :math:`n` rows more, and :math:`3n` for a Normal; for a Bernoulli the difference is
    exact in its own number. Plate elements are moved at once, so every cost that the site
    influences must lie in all of the site's plates.

    Arguments:
        max_worlds: The most worlds that are accepted at a site.

    Raises:
        NonDiffError: At a site whose law is no Bernoulli, Poisson, Exponential, Gamma or Normal,
            for a Gamma whose concentration is learnt, at a site with too many numbers, or one
            whose plate elements share a cost.

    Example:
        >>> from pyro_nondiff.estimators import MeasureValued
        >>> MeasureValued().ask(dist.Normal(torch.zeros(2), 1.0).to_event(1)).hard
        6

    References:
        | Monte Carlo Gradient Estimation in Machine Learning (Mohamed et al., 2020)
        | https://arxiv.org/abs/1906.10652
    """

    max_worlds: int = 1024

    def __post_init__(self) -> None:
        if self.max_worlds < 1:
            raise NonDiffError(f"max_worlds must be at least 1, found {self.max_worlds}")

    def refuse(self, law: Law) -> str | None:
        rule = _rule(law)
        if rule is None:
            return (
                "MeasureValued needs a Bernoulli, Poisson, Exponential, Gamma, ScaleGamma or "
                f"Normal law, and this one is {describe(law)}. Use RLOO(), which serves any law."
            )
        concentration = parameters(law).get("concentration")
        if concentration is not None and concentration.requires_grad:
            return (
                "MeasureValued differentiates a Gamma by its rate alone, and its concentration "
                "requires a gradient. Detach it, or use Pathwise() or RLOO()."
            )
        if (worlds := rule.moves * law.event_shape.numel()) > self.max_worlds:
            return (
                f"MeasureValued needs {worlds} worlds for a value of shape "
                f"{tuple(law.event_shape)}, more than max_worlds={self.max_worlds}. Raise it, or "
                "use RLOO()."
            )
        return None

    def ask(self, law: Law) -> Ask:
        rule = cast(_Rule, _rule(law))
        return Ask(
            hard=rule.moves * law.event_shape.numel(),
            hard_mass=0.0,  # moved values have not the law of the site
            second=rule.random,
            second_kind="rayleigh",
            per_element=True,
        )

    def draw(
        self,
        law: Law,
        value: Tensor,
        noise: Tensor | None,
        second: Tensor | None,
        state: nn.Module | None,
    ) -> Draw:
        rule = cast(_Rule, _rule(law))
        rayleigh = torch.zeros_like(value) if second is None else second.to(value.dtype)
        with torch.no_grad():
            moved, weights = rule.difference(core(law), value, rayleigh)
            one = _one_each(law, value)
            values = [value.unsqueeze(0), *(torch.where(one, number, value) for number in moved)]
            coefficients = [torch.stack(torch.broadcast_tensors(*w)) for w in weights.values()]
        found = parameters(law)
        return Draw(
            torch.cat(values),
            tuple(found[name] for name in weights),
            coefficients=tuple(coefficients),
        )

    def estimate(
        self, draw: Draw, costs: Tensor, state: nn.Module | None, context: Context
    ) -> Estimate:
        event = draw.values.shape[costs.dim() :]
        moved = costs[1:].unflatten(0, (-1, event.numel())).movedim(1, -1)
        base = costs[:1].unsqueeze(-1).expand(-1, *moved.shape[1:])
        each = torch.cat([base, moved])
        each = each.reshape(*each.shape[:-1], *event)
        return Estimate(gradients=tuple((c * each).sum(0) for c in draw.coefficients))


def _one_each(law: Law, value: Tensor) -> Tensor:
    """For each number of a plate element's value, a mask that picks it."""
    size = law.event_shape.numel()
    one = torch.eye(size, dtype=torch.bool, device=value.device)
    return one.reshape(size, *(1,) * (value.dim() - law.event_dim), *law.event_shape)
