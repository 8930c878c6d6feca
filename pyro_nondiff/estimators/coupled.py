"""Estimators that compare a value with a coupled one."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli

from ..distributions import Law, core, describe, parameters, transport
from .base import AbstractEstimator, Ask, Context, Draw, Estimate

__all__ = ["DisARM"]


@dataclass(frozen=True)
class DisARM(AbstractEstimator):
    r"""An antithetic pair of Bernoulli values, with the pair's noise integrated out.

    With logits :math:`\eta`, logistic noise :math:`\epsilon`,
    :math:`b = 1[\eta + \epsilon > 0]` and :math:`\tilde b = 1[\eta - \epsilon > 0]`,

    .. math:: \hat g_i = \tfrac12 (f(b) - f(\tilde b)) (b_i - \tilde b_i) \sigma(|\eta_i|).

    The partner is a second world that branches at the site; both worlds enter the
    gradients of the model and of pathwise sites with equal weight.

    Raises:
        NonDiffError: At a site whose law is no Bernoulli.

    Example:
        >>> from pyro_nondiff.estimators import DisARM
        >>> DisARM()
        DisARM()

    References:
        | DisARM: An Antithetic Gradient Estimator for Binary Latent Variables
          (Dong, Mnih & Tucker, 2020)
        | https://arxiv.org/abs/2006.10680
    """

    def refuse(self, law: Law) -> str | None:
        if isinstance(core(law), Bernoulli):
            return None
        return (
            f"DisARM pairs the values of a Bernoulli, and the law is {describe(law)}. "
            "Use RLOO(num_samples=2), which serves any law at the same cost."
        )

    def ask(self, law: Law) -> Ask:
        return Ask(hard=1, role="antithetic")

    def draw(
        self,
        law: Law,
        value: Tensor,
        noise: Tensor | None,
        second: Tensor | None,
        state: nn.Module | None,
    ) -> Draw:
        if noise is None:
            raise TypeError("a Bernoulli is a map of noise")
        return Draw(torch.stack([value, transport(law, -noise)]), tuple(parameters(law).values()))

    def estimate(
        self, draw: Draw, costs: Tensor, state: nn.Module | None, context: Context
    ) -> Estimate:
        (leaf,) = draw.parameters
        difference = draw.values[0] - draw.values[1]
        extra = difference.dim() - costs.dim() + 1
        contrast = (costs[0] - costs[1]).reshape(costs.shape[1:] + (1,) * extra)
        return Estimate(gradients=(0.5 * contrast * difference * leaf.abs().sigmoid(),))
