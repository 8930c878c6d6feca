"""What the estimators with a learnt control variate have in common."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..distributions import Law
from ..errors import NonDiffError
from .base import Context, Draw, Estimate
from .baselines import RunningMean

_WIDTH = 32  # of the network that is made where none is given


class Learnt(Protocol):
    """The state of such an estimator."""

    baseline: RunningMean


@dataclass(frozen=True)
class Control:
    """A control variate in numbers: what is taken from the cost, and what is put back.

    Arguments:
        twin: Its value where it is multiplied with the score, ``(K, plates)``.
        slopes: The gradients to put back, one for each parameter of the site.
    """

    twin: Tensor
    slopes: tuple[Tensor, ...]


def controlled(draw: Draw, cost: Tensor, control: Control, state: Learnt) -> Estimate:
    """The estimate with a control variate, whose variance trains the state."""
    cost = cost.detach()
    gradients = tuple(
        # a leaf may lack dimensions of size 1
        _behind(cost - control.twin, score) * score + slope.reshape(score.shape)
        for score, slope in zip(draw.scores, control.slopes, strict=True)
    )
    return Estimate(
        gradients=gradients,
        own_loss=torch.stack([gradient.square().sum() for gradient in gradients]).sum(),
        update=lambda: state.baseline.update(cost.mean()),
    )


def network_value(
    owner: str,
    net: nn.Module,
    values: Tensor,
    of_arguments: Callable[..., Tensor] | None,
    context: Context,
) -> Tensor:
    """What a network says of values, one number for each.

    Arguments:
        owner: The name of the estimator, for the message.
        net: The network.
        values: ``(..., size)``.
        of_arguments: What makes the network's second argument of the program's, or None.
        context: The site and the program's arguments.
    """
    extra = () if of_arguments is None else (of_arguments(*context.args, **context.kwargs),)
    output: Tensor = net(values, *extra)
    if output.shape == (*values.shape[:-1], 1):
        output = output.squeeze(-1)
    if output.shape != values.shape[:-1]:
        raise NonDiffError(
            f"site '{context.site}': the control variate of {owner} returned shape "
            f"{tuple(output.shape)} for values of shape {tuple(values.shape)}. Return one "
            "number for each, with or without a last dimension of size 1."
        )
    return output


def small_network(law: Law) -> nn.Module:
    """The network that is made where none is given."""
    size = law.event_shape.numel()
    return nn.Sequential(nn.Linear(size, _WIDTH), nn.Tanh(), nn.Linear(_WIDTH, 1))


def check_module(owner: str, control_variate: object) -> None:
    """Refuses a control variate that is no module."""
    if not isinstance(control_variate, nn.Module | None):
        raise NonDiffError(
            f"{owner} needs a torch.nn.Module as control_variate, found "
            f"{type(control_variate).__name__}: wrap the function in a module."
        )


def _behind(x: Tensor, like: Tensor) -> Tensor:
    """Adds dimensions of size 1 at the right, for the event dimensions of ``like``."""
    return x.reshape(x.shape + (1,) * (like.dim() - x.dim()))
