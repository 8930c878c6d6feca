r"""Control variates that depend on the sample, made unbiased by a reparameterised twin.

With perturbed logits :math:`z`, their value :math:`b`, and perturbed logits
:math:`\tilde z` drawn afresh given :math:`b`,

.. math:: \hat g = (f(b) - c(\tilde z)) \nabla_\eta \log q_\eta(b)
          + \nabla_\eta c(z) - \nabla_\eta c(\tilde z)

is unbiased for any continuous :math:`c`. What :math:`c` has to learn is trained by the
variance of :math:`\hat g`.
"""

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli

from ..distributions import Law, conditional, core, describe, relax, relaxable, wide_logits
from ..errors import NonDiffError
from .base import AbstractEstimator, Ask, Context, Draw, Estimate
from .baselines import _RunningMean

__all__ = ["REBAR", "RELAX"]


class _ControlVariate(nn.Module):
    """What a control variate learns at one site."""

    def __init__(self, temperature: float, eta: float, net: nn.Module | None) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(temperature).log())
        self.eta = nn.Parameter(torch.tensor(eta))
        self.baseline = _RunningMean(0.9)
        self.net = net

    def learn(self, temperature: bool, eta: bool) -> "_ControlVariate":
        self.log_temperature.requires_grad_(temperature)
        self.eta.requires_grad_(eta)
        return self


def _refuse(law: Law, name: str) -> str | None:
    if relaxable(law):
        return None
    advice = "use OneHotCategorical, or" if "Categorical" in describe(law) else "use"
    return (
        f"{name} relaxes a Bernoulli or a OneHotCategorical, and the law is {describe(law)}: "
        f"{advice} RLOO(), which serves any law."
    )


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise NonDiffError(f"temperature must be positive, found {temperature}")


def _twins(
    law: Law,
    value: Tensor,
    noise: Tensor | None,
    second: Tensor | None,
    state: nn.Module | None,
    in_worlds: bool,
) -> Draw:
    """The soft value and its twin given the hard value."""
    if noise is None or second is None or state is None:
        raise TypeError("a control variate draws with two noises and a state")
    attached = wide_logits(law)
    with torch.enable_grad():
        leaf = attached.detach().requires_grad_()
        temperature = cast(_ControlVariate, state).log_temperature.exp().to(leaf)
        pair = [leaf + noise, conditional(law, leaf, value, second)]
        soft = torch.stack([relax(law, perturbed, temperature) for perturbed in pair])
    values = value.unsqueeze(0)
    if in_worlds:
        values = torch.cat([values, soft.to(value.dtype)])
    return Draw(values, attached, soft=soft, leaf=leaf, temperature=temperature.detach())


def _score(law_is_bernoulli: bool, value: Tensor, logits: Tensor) -> Tensor:
    """The gradient of the log-probability of a value for its logits."""
    return value - (logits.sigmoid() if law_is_bernoulli else logits.softmax(-1))


@dataclass(frozen=True)
class _Combined:
    """A control variate in numbers: its value at the twin, and the slope of both."""

    twin: Tensor
    slope: Tensor


def _behind(x: Tensor, like: Tensor) -> Tensor:
    """Adds dimensions of size 1 at the right, for the event dimensions of ``like``."""
    return x.reshape(x.shape + (1,) * (like.dim() - x.dim()))


def _slope(totals: Tensor, draw: Draw, second_order: bool) -> Tensor:
    """The gradient for the logits of the cost at the value, minus that at the twin."""
    soft, leaf = cast(Tensor, draw.soft), cast(Tensor, draw.leaf)
    (at_values,) = torch.autograd.grad(
        (totals[0] - totals[1]).sum(), soft, create_graph=second_order, retain_graph=True
    )
    if not second_order:
        at_values = at_values.detach()
    (slope,) = torch.autograd.grad((at_values * soft).sum(), leaf, create_graph=True)
    return slope


@dataclass(frozen=True)
class REBAR(AbstractEstimator):
    r"""REINFORCE with the relaxed program as its control variate.

    The control variate is :math:`c = b + \eta (c_\mathrm{soft} - b)`, where
    :math:`c_\mathrm{soft}` is the cost of a soft world and :math:`b` a running mean of the
    cost. Temperature and :math:`\eta` are learnt by variance.

    Arguments:
        temperature: Where the temperature starts, positive.
        eta: Where :math:`\eta` starts.
        learn_temperature: Whether the temperature is learnt.
        learn_eta: Whether :math:`\eta` is learnt.
        second_order: Differentiate the cost twice in that training. Without, the slope of
            the cost is held constant there, which costs less; the estimate is the same.

    Raises:
        NonDiffError: For a temperature that is not positive; at a site whose law cannot be
            relaxed; at the first step, if the program breaks a soft value.

    Example:
        >>> from pyro_nondiff.estimators import REBAR
        >>> REBAR(temperature=0.1).temperature
        0.1

    References:
        | REBAR: Low-variance, unbiased gradient estimates for discrete latent variable
          models (Tucker et al., 2017)
        | https://arxiv.org/abs/1703.07370
    """

    temperature: float = 0.5
    eta: float = 1.0
    learn_temperature: bool = True
    learn_eta: bool = True
    second_order: bool = False

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    def refuse(self, law: Law) -> str | None:
        return _refuse(law, "REBAR")

    def ask(self, law: Law) -> Ask:
        return Ask(soft=2, second=True)

    def make_state(self, law: Law) -> nn.Module | None:
        state = _ControlVariate(self.temperature, self.eta, None)
        return state.learn(self.learn_temperature, self.learn_eta)

    def draw(
        self,
        law: Law,
        value: Tensor,
        noise: Tensor | None,
        second: Tensor | None,
        state: nn.Module | None,
    ) -> Draw:
        return _twins(law, value, noise, second, state, in_worlds=True)

    def estimate(
        self, draw: Draw, costs: Tensor, state: nn.Module | None, context: Context
    ) -> Estimate:
        learnt = cast(_ControlVariate, state)
        combined = _relaxed_cost(draw, costs, learnt, context, self.second_order)
        return _estimate(draw, costs[0], combined, learnt, context)


def _relaxed_cost(
    draw: Draw, costs: Tensor, state: _ControlVariate, context: Context, second_order: bool
) -> _Combined:
    totals = context.soft_totals
    if totals is None or not totals.requires_grad:
        raise NonDiffError(
            f"site '{context.site}': the cost of its soft worlds has no gradient, so there is "
            "nothing to relax. Use RELAX(relaxed_cost=False) or RLOO() for a black-box cost."
        )
    baseline = state.baseline.fit_to(costs)().detach()
    slope = _slope(totals, draw, second_order)
    twin = costs[-1] if second_order else _linear(costs[-1], totals, draw)
    return _Combined(baseline + state.eta * (twin - baseline), state.eta * slope)


def _linear(twin: Tensor, totals: Tensor, draw: Draw) -> Tensor:
    """The twin's cost with its slope in the soft value held constant."""
    soft = cast(Tensor, draw.soft)
    (slopes,) = torch.autograd.grad(totals[1].sum(), soft, retain_graph=True)
    move = slopes[1] * (soft[1] - soft[1].detach())
    dims = list(range(twin.dim(), move.dim()))
    return twin.detach() + (move.sum(dims) if dims else move)


def _estimate(
    draw: Draw, cost: Tensor, control: _Combined, state: _ControlVariate, context: Context
) -> Estimate:
    leaf, value = cast(Tensor, draw.leaf), draw.values[0]
    is_bernoulli = context.bernoulli
    score = _score(is_bernoulli, value, leaf.detach())
    gradient = _behind(cost - control.twin, score) * score + control.slope
    return Estimate(
        gradient=gradient,
        own_loss=gradient.square().sum(),
        update=lambda: state.baseline.update(cost.mean()),
    )
