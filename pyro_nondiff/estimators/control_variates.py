r"""Control variates that depend on the sample, made unbiased by a reparameterised twin.

With perturbed logits :math:`z`, their value :math:`b`, and perturbed logits
:math:`\tilde z` drawn afresh given :math:`b`,

.. math:: \hat g = (f(b) - c(\tilde z)) \nabla_\eta \log q_\eta(b)
          + \nabla_\eta c(z) - \nabla_\eta c(\tilde z)

is unbiased for any continuous :math:`c`. What :math:`c` has to learn is trained by the
variance of :math:`\hat g`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from ..distributions import Law, conditional, describe, relax, relaxable, wide_logits
from ..errors import NonDiffError
from ._control import Control, check_module, controlled, network_value, small_network
from .base import AbstractEstimator, Ask, Context, Draw, Estimate
from .baselines import RunningMean

__all__ = ["REBAR", "RELAX"]


class _ControlVariate(nn.Module):
    """What a control variate learns at one site."""

    log_temperature: Tensor
    eta: Tensor

    def __init__(self, recipe: "REBAR | RELAX", net: nn.Module | None, law: Law) -> None:
        super().__init__()
        self._hold("log_temperature", math.log(recipe.temperature), recipe.learn_temperature)
        self._hold("eta", recipe.eta, recipe.learn_eta)
        self.baseline = RunningMean(0.9)
        self.net = net
        self.to(wide_logits(law))

    def _hold(self, name: str, value: float, learn: bool) -> None:
        """Keeps a number as a parameter if it is learnt, as a buffer if not."""
        if learn:
            self.register_parameter(name, nn.Parameter(torch.tensor(value)))
        else:
            self.register_buffer(name, torch.tensor(value))


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
    second_order: bool,
) -> Draw:
    """The soft value and its twin given the hard value.

    What the worlds get is cut off from the temperature, unless the cost is to be
    differentiated twice.
    """
    if noise is None or second is None or state is None:
        raise TypeError("a control variate draws with two noises and a state")
    attached = wide_logits(law)
    with torch.enable_grad():
        # a leaf for each base world, also where they share the logits
        shape = torch.broadcast_shapes(attached.shape, noise.shape)
        leaf = attached.detach().expand(shape).requires_grad_()
        temperature = cast(_ControlVariate, state).log_temperature.exp().to(leaf)
        pair = [leaf + noise, conditional(law, leaf, value, second)]
        soft = torch.stack([relax(law, perturbed, temperature) for perturbed in pair])
        placed = soft if second_order else soft.detach().requires_grad_()
        values = value.unsqueeze(0)
        if in_worlds:
            values = torch.cat([values.expand(1, *soft.shape[1:]), placed.to(value.dtype)])
    mean = relax(law, attached.detach(), torch.ones_like(temperature).detach())
    return Draw(
        values,
        (attached,),
        soft=soft,
        placed=placed,
        leaves=(leaf,),
        scores=(value - mean,),
        temperature=temperature.detach(),
    )


def _slopes(totals: Tensor, draw: Draw, second_order: bool) -> Tensor:
    """The gradient of the cost at the value, and of minus the cost at the twin, for both."""
    (found,) = torch.autograd.grad(
        totals.sum(), cast(Tensor, draw.placed), create_graph=second_order, retain_graph=True
    )
    return torch.stack([found[0], -found[1]])


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
        return _ControlVariate(self, None, law)

    def draw(
        self,
        law: Law,
        value: Tensor,
        noise: Tensor | None,
        second: Tensor | None,
        state: nn.Module | None,
    ) -> Draw:
        return _twins(law, value, noise, second, state, True, self.second_order)

    def estimate(
        self, draw: Draw, costs: Tensor, state: nn.Module | None, context: Context
    ) -> Estimate:
        learnt = cast(_ControlVariate, state)
        combined = _relaxed_cost(draw, costs, learnt, context, self.second_order)
        return controlled(draw, costs[0], combined, learnt)


def _relaxed_cost(
    draw: Draw, costs: Tensor, state: _ControlVariate, context: Context, second_order: bool
) -> Control:
    totals = context.soft_totals
    if totals is None or not totals.requires_grad:
        raise NonDiffError(
            f"site '{context.site}': the cost of its soft worlds has no gradient, so there is "
            "nothing to relax. Use RELAX(relaxed_cost=False) or RLOO() for a black-box cost."
        )
    baseline = state.baseline.fit_to(costs)().detach()
    slopes, soft = _slopes(totals, draw, second_order), cast(Tensor, draw.soft)
    (slope,) = torch.autograd.grad(soft, draw.leaves, slopes, create_graph=True)
    twin = costs[-1] if second_order else _linear(costs[-1], -slopes[1], draw)
    return Control(baseline + state.eta * (twin - baseline), (state.eta * slope,))


def _linear(twin: Tensor, slope: Tensor, draw: Draw) -> Tensor:
    """The twin's cost with its slope in the soft value held constant."""
    soft, (score,) = cast(Tensor, draw.soft), draw.scores
    move = (slope * (soft[1] - soft[1].detach())).reshape(score.shape)
    events = score.dim() - twin.dim()
    return twin.detach() + (move.sum(list(range(-events, 0))) if events else move)


@dataclass(frozen=True)
class RELAX(AbstractEstimator):
    r"""REBAR with a network added to its control variate.

    The control variate is :math:`c = b + \eta (c_\mathrm{soft} - b) + r(\mathrm{soft}(z))`,
    with a network :math:`r` of the site's relaxed value. Without ``relaxed_cost`` it is
    :math:`r` alone: the cost may then be a black box, and no world branches.

    Arguments:
        control_variate: A module from the relaxed value, its event dimensions flattened, to
            one number for each plate element, with or without a last dimension of size 1.
            Give the same module at each step. If None, a small network is made.
        input: A function of the program's arguments whose result the module gets as its
            second argument.
        temperature: Where the temperature starts, positive.
        eta: Where :math:`\eta` starts.
        relaxed_cost: Whether the relaxed program is a part of the control variate.
        learn_temperature: Whether the temperature is learnt.
        learn_eta: Whether :math:`\eta` is learnt.
        second_order: As for :class:`REBAR`.

    Raises:
        NonDiffError: As for :class:`REBAR`; for a ``control_variate`` that is no module, or
            whose output does not fit the site.

    Example:
        >>> from pyro_nondiff.estimators import RELAX
        >>> estimator = RELAX(torch.nn.Sequential(torch.nn.Linear(8, 1)), relaxed_cost=False)

    References:
        | Backpropagation through the Void: Optimizing control variates for black-box gradient
          estimation (Grathwohl et al., 2018)
        | https://arxiv.org/abs/1711.00123
    """

    control_variate: nn.Module | None = None
    input: Callable[..., Tensor] | None = field(default=None, compare=False, repr=False)
    temperature: float = 0.5
    eta: float = 1.0
    relaxed_cost: bool = True
    learn_temperature: bool = True
    learn_eta: bool = True
    second_order: bool = False

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        check_module("RELAX", self.control_variate)

    def refuse(self, law: Law) -> str | None:
        return _refuse(law, "RELAX")

    def ask(self, law: Law) -> Ask:
        return Ask(soft=2 if self.relaxed_cost else 0, second=True)

    def make_state(self, law: Law) -> nn.Module | None:
        return _ControlVariate(self, self.control_variate or small_network(law), law)

    def draw(
        self,
        law: Law,
        value: Tensor,
        noise: Tensor | None,
        second: Tensor | None,
        state: nn.Module | None,
    ) -> Draw:
        return _twins(law, value, noise, second, state, self.relaxed_cost, self.second_order)

    def estimate(
        self, draw: Draw, costs: Tensor, state: nn.Module | None, context: Context
    ) -> Estimate:
        learnt = cast(_ControlVariate, state)
        twin, slope = self._network(draw, learnt, context)
        if self.relaxed_cost:
            relaxed = _relaxed_cost(draw, costs, learnt, context, self.second_order)
            twin, slope = twin + relaxed.twin, slope + relaxed.slopes[0]
        return controlled(draw, costs[0], Control(twin, (slope,)), learnt)

    def _network(
        self, draw: Draw, state: _ControlVariate, context: Context
    ) -> tuple[Tensor, Tensor]:
        """The network's value at the twin, and the slope of both values."""
        soft, (leaf,) = cast(Tensor, draw.soft), draw.leaves
        if state.net is None:
            raise TypeError("RELAX makes a network")
        events = draw.scores[0].dim() - len(context.shape)
        flat = soft.reshape(*soft.shape[: soft.dim() - events], -1)
        output = network_value("RELAX", state.net, flat, self.input, context)
        (slope,) = torch.autograd.grad((output[0] - output[1]).sum(), leaf, create_graph=True)
        return output[1].reshape(context.shape), slope
