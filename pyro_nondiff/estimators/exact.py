"""Estimators that sum over all the values of a site."""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, OneHotCategorical

from ..distributions import Law, core, describe, dtype_and_device, log_prob
from ..errors import NonDiffError
from .base import AbstractEstimator, Ask, Context, Draw, Estimate

__all__ = ["Enumerate"]


@dataclass(frozen=True)
class Enumerate(AbstractEstimator):
    r"""The exact sum over the values of one site, each in a world of its own.

    .. math:: \hat g = \sum_z f(z) \nabla_\eta q_\eta(z)

    The cost may be a black box. Elements of a plate are summed over at once, so every
    cost that the site influences must lie in all of the site's plates.

    Arguments:
        max_size: The largest joint support of one plate element that is accepted.

    Raises:
        NonDiffError: At a site whose law has no finite support, or one of more than
            ``max_size`` values, or whose plate elements share a cost.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_nondiff.estimators import Enumerate
        >>> law = dist.Bernoulli(logits=torch.zeros(3)).to_event(1)
        >>> Enumerate().ask(law).hard
        8
    """

    max_size: int = 1024

    def __post_init__(self) -> None:
        if self.max_size < 1:
            raise NonDiffError(f"max_size must be at least 1, found {self.max_size}")

    def refuse(self, law: Law) -> str | None:
        base = core(law)
        if not isinstance(base, Bernoulli | Categorical | OneHotCategorical):
            return (
                f"Enumerate needs a Bernoulli, Categorical or OneHotCategorical law, and this one "
                f"is {describe(law)}. Use RLOO(), which serves any law."
            )
        if (size := _support_size(law)) > self.max_size:
            return (
                f"its joint support has {size} values for each plate element, more than "
                f"Enumerate(max_size={self.max_size}) accepts. Raise max_size, or use DisARM() "
                "or RLOO()."
            )
        return None

    def ask(self, law: Law) -> Ask:
        return Ask(hard=_support_size(law), base_mass=0.0, per_element=True)

    def draw(
        self,
        law: Law,
        value: Tensor,
        noise: Tensor | None,
        second: Tensor | None,
        state: nn.Module | None,
    ) -> Draw:
        support = _support(law)
        lead = (1,) * (value.dim() - law.event_dim)
        support = support.reshape(support.shape[:1] + lead + law.event_shape).to(value.dtype)
        score, _ = log_prob(law, support)
        values = torch.cat([value.unsqueeze(0), support.expand(-1, *value.shape)])
        return Draw(values, hard_weights=score.detach().exp())

    def estimate(
        self, draw: Draw, costs: Tensor, state: nn.Module | None, context: Context
    ) -> Estimate:
        if draw.hard_weights is None:
            raise TypeError("Enumerate draws with weights")
        weight = draw.hard_weights * costs[1:]
        return Estimate(weight=torch.cat([torch.zeros_like(weight[:1]), weight]))


def _choices(law: Law) -> tuple[int, int]:
    """How many factors one plate element has, and how many values each factor."""
    base = core(law)
    factors = math.prod(law.event_shape)
    if isinstance(base, OneHotCategorical):
        return factors // base.event_shape[0], base.event_shape[0]
    return factors, 2 if isinstance(base, Bernoulli) else base._num_events


def _support_size(law: Law) -> int:
    factors, values = _choices(law)
    return int(values**factors)


def _support(law: Law) -> Tensor:
    """All joint values of one plate element, ``(size, *event)``."""
    factors, values = _choices(law)
    _, device = dtype_and_device(law)
    index = torch.tensor(list(itertools.product(range(values), repeat=factors)), device=device)
    if isinstance(core(law), OneHotCategorical):
        index = torch.nn.functional.one_hot(index, values)
    return index.reshape(-1, *law.event_shape)
