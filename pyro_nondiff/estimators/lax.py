"""LAX: RELAX's twin for continuous laws under a cost without derivative."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributions import TransformedDistribution

from ..distributions import (
    Law,
    core,
    describe,
    dtype_and_device,
    log_prob,
    noise_kind,
    noise_shape,
    parameters,
    transport,
    with_parameters,
)
from ..errors import NonDiffError
from ._control import Control, check_module, controlled, network_value, small_network
from .base import AbstractEstimator, Ask, Context, Draw, Estimate
from .baselines import RunningMean

__all__ = ["LAX"]

_KINDS = ("normal", "exponential", "gamma")
"""The noise of the laws that are served: continuous, and maps of it."""


class _Learnt(nn.Module):
    """What LAX learns at one site."""

    def __init__(self, net: nn.Module, law: Law) -> None:
        super().__init__()
        self.net = net
        self.baseline = RunningMean(0.9)
        self.to(next(iter(parameters(law).values())))


@dataclass(frozen=True)
class LAX(AbstractEstimator):
    r"""REINFORCE with a network of the value as control variate, for a reparameterised law.

    .. math:: \hat g = (f(z) - c(z)) \nabla_\eta \log q_\eta(z) + \nabla_\eta c(z(\eta, \epsilon))

    It is unbiased for any cost :math:`f`, differentiable or not, and any smooth :math:`c`. Here
    :math:`c = b + r(z)`, with a running mean :math:`b` of the cost and a network :math:`r` that is
    trained by the variance of :math:`\hat g`.

    Arguments:
        control_variate: A module from the value, its event dimensions flattened, to one number for
            each plate element, with or without a last dimension of size 1. Give the same module at
            each step. If None, a small network is made.
        input: A function of the program's arguments whose result the module gets as its
            second argument.

    Raises:
        NonDiffError: For a ``control_variate`` that is no module, or whose output does not fit the
            site; at a site whose law is no continuous map of noise.

    Example:
        >>> from pyro_nondiff.estimators import LAX
        >>> from pyro_nondiff.infer import config_estimator
        >>> def guide():
        ...     return pyro.sample("box", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        >>> guide = config_estimator(guide, {"box": LAX()})

    References:
        | Backpropagation through the Void: Optimizing control variates for black-box gradient
          estimation (Grathwohl et al., 2018)
        | https://arxiv.org/abs/1711.00123
    """

    control_variate: nn.Module | None = None
    input: Callable[..., Tensor] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_module("LAX", self.control_variate)

    def refuse(self, law: Law) -> str | None:
        if noise_kind(law) in _KINDS and _fixed_transforms(law):
            return None
        return (
            "LAX needs a Normal, MultivariateNormal, Exponential or ScaleGamma law, or one under "
            f"bijective transforms that are not learnt, and this one is {describe(law)}. Use "
            "RLOO(), which serves any law, or RELAX(relaxed_cost=False) for a Bernoulli or "
            "OneHotCategorical."
        )

    def ask(self, law: Law) -> Ask:
        return Ask(leaves=True)

    def make_state(self, law: Law) -> nn.Module | None:
        return _Learnt(self.control_variate or small_network(law), law)

    def draw(
        self,
        law: Law,
        value: Tensor,
        noise: Tensor | None,
        second: Tensor | None,
        state: nn.Module | None,
    ) -> Draw:
        if noise is None:
            raise NonDiffError(
                f"LAX: the concentration of {describe(law)} differs between worlds, which share no "
                "noise then. Pass worlds='sequential', or use RLOO()."
            )
        attached = _learnt(law)
        with torch.enable_grad():
            leaves = _leaves(law, attached, noise)
            twin = with_parameters(law, parameters(law) | leaves)
            path = transport(twin, noise)
            score = log_prob(twin, value.detach())[0].sum()
            scores = torch.autograd.grad(score, list(leaves.values()), materialize_grads=True)
        return Draw(
            value.unsqueeze(0),
            tuple(attached.values()),
            soft=path,
            leaves=tuple(leaves.values()),
            scores=scores,
        )

    def estimate(
        self, draw: Draw, costs: Tensor, state: nn.Module | None, context: Context
    ) -> Estimate:
        learnt = cast(_Learnt, state)
        values = cast(Tensor, draw.soft).reshape(*context.shape, -1)
        value = network_value("LAX", learnt.net, values, self.input, context)
        slopes = torch.autograd.grad(
            value.sum(), draw.leaves, create_graph=True, materialize_grads=True
        )
        baseline = learnt.baseline.fit_to(costs)().detach()
        return controlled(draw, costs[0], Control(baseline + value, slopes), learnt)


def _fixed_transforms(law: Law) -> bool:
    """Whether a law's transforms, if it has some, are bijective and have nothing to learn.

    What they learn would get no gradient. It may lie in a composed or inverted transform, or in a
    network: a value tells.
    """
    base = core(law)
    if not isinstance(base, TransformedDistribution):
        return True
    if not all(transform.bijective for transform in base.transforms):
        return False
    twin = with_parameters(law, {name: p.detach() for name, p in parameters(law).items()})
    dtype, device = dtype_and_device(law)
    value = transport(twin, torch.zeros(noise_shape(twin), dtype=dtype, device=device))
    return not value.requires_grad


def _learnt(law: Law) -> dict[str, Tensor]:
    """The parameters that have a gradient; if none has, all but a concentration, which is fixed."""
    found = parameters(law)
    learnt = {name: p for name, p in found.items() if p.requires_grad}
    return learnt or {name: p for name, p in found.items() if name != "concentration"}


def _leaves(law: Law, attached: Mapping[str, Tensor], noise: Tensor) -> dict[str, Tensor]:
    """Parameters cut off, a leaf for each draw also where draws share them."""
    base = core(law)
    events = base.event_dim
    lead = torch.broadcast_shapes(base.batch_shape, noise.shape[: noise.dim() - events])
    own = len(base.batch_shape)
    return {
        name: p.detach().expand(lead + p.shape[own:]).requires_grad_()
        for name, p in attached.items()
    }
