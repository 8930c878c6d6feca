r"""Baselines: what is subtracted from a cost before it meets the score.

A baseline :math:`b` may depend on everything but the value of its own site, since
:math:`\mathbb{E}[b\,\nabla\log q(z)] = 0`. Each is read before it is updated.

References:
    | Neural Variational Inference and Learning in Belief Networks (Mnih & Gregor, 2014)
    | https://arxiv.org/abs/1402.0030
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import NonDiffError
from .base import Context

__all__ = ["AbstractBaseline", "MovingAverage", "NeuralBaseline", "Reading"]


@dataclass(frozen=True)
class Reading:
    """What a baseline says before it sees a cost.

    Arguments:
        value: The baseline, broadcastable to ``Context.shape``, with a gradient to the
            baseline's own parameters if it has any.
        fit: Called with the costs that the value stood for; returns the baseline's own
            loss, or None.
        update: Called with the same costs once the step has succeeded.
    """

    value: Tensor
    fit: Callable[[Tensor], Tensor | None]
    update: Callable[[Tensor], None]


class AbstractBaseline(ABC):
    """A guess of a site's cost that does not look at the site's value.

    Baselines add: ``MovingAverage() + NeuralBaseline(net, input=x)`` fits the second to
    what the first leaves.
    """

    @abstractmethod
    def make_state(self) -> nn.Module:
        """What the baseline learns at one site."""

    @abstractmethod
    def read(self, state: nn.Module, costs: Tensor, context: Context) -> Reading:
        """The baseline at one step.

        Arguments:
            state: What :meth:`make_state` returned for this site.
            costs: The costs ``(K, plates)``, for their dtype, device and shape only.
            context: The program's arguments, and the shape to broadcast to.
        """

    def __add__(self, other: "AbstractBaseline") -> "SumBaseline":
        return SumBaseline(self, other)


class RunningMean(nn.Module):
    """An exponential average whose start is corrected, held in buffers."""

    mean: Tensor
    weight: Tensor

    def __init__(self, decay: float, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("weight", torch.zeros(()))

    def forward(self) -> Tensor:
        return self.mean / self.weight.clamp(min=1e-12)  # 0 before the first observation

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if (mean := state_dict.get(prefix + "mean")) is not None:
            self.mean = torch.zeros_like(mean)  # it has the plates' shape if it is per element
        super()._load_from_state_dict(state_dict, prefix, *args)

    def fit_to(self, like: Tensor) -> "RunningMean":
        if self.mean.dtype != like.dtype or self.mean.device != like.device:
            self.to(like)
        return self

    def update(self, observation: Tensor) -> None:
        self.mean.lerp_(observation.detach(), 1 - self.decay)
        self.weight.mul_(self.decay).add_(1 - self.decay)


def _check_decay(decay: float) -> None:
    if not 0 <= decay < 1:
        raise NonDiffError(f"decay must lie in [0, 1), found {decay}")


@dataclass(frozen=True)
class MovingAverage(AbstractBaseline):
    r"""An exponential moving average of a site's cost: one number a site.

    .. math:: b_t = \frac{\sum_{i<t} \gamma^{t-1-i} \bar f_i}{\sum_{i<t} \gamma^{t-1-i}}

    with :math:`\bar f_i` the mean cost of step :math:`i` over base worlds and plates;
    before the first step it is 0. Batches may differ in size.

    Arguments:
        decay: :math:`\gamma` in [0, 1).
        per_element: One average for each element of the site's plates instead, for
            programs that see the same data in the same order at every step.

    Raises:
        NonDiffError: For a decay outside [0, 1); at a step, if the plates of an average
            ``per_element`` change their size.

    Example:
        >>> from pyro_nondiff.estimators import REINFORCE, MovingAverage
        >>> REINFORCE(baseline=MovingAverage(decay=0.99))
        REINFORCE(baseline=MovingAverage(decay=0.99, per_element=False))
    """

    decay: float = 0.9
    per_element: bool = False

    def __post_init__(self) -> None:
        _check_decay(self.decay)

    def make_state(self) -> nn.Module:
        return RunningMean(self.decay)

    def read(self, state: nn.Module, costs: Tensor, context: Context) -> Reading:
        average = cast(RunningMean, state).fit_to(costs)
        if self.per_element:
            self._match(average, costs, context)
        return Reading(average(), _no_loss, lambda f: average.update(self._observe(f)))

    def _observe(self, costs: Tensor) -> Tensor:
        return costs.mean(0) if self.per_element else costs.mean()

    def _match(self, average: RunningMean, costs: Tensor, context: Context) -> None:
        shape = costs.shape[1:]
        if average.mean.dim() == 0 and shape:
            average.mean = average.mean.expand(shape).clone()
        if average.mean.shape != shape:
            raise NonDiffError(
                f"site '{context.site}': MovingAverage(per_element=True) holds one average for "
                f"each of {tuple(average.mean.shape)} plate elements, but the cost has "
                f"{tuple(shape)} at this step. Use per_element=False, which does not care."
            )


@dataclass(frozen=True)
class NeuralBaseline(AbstractBaseline):
    r"""A network's guess of a site's cost from what is known before the site.

    The baseline is :math:`b = c + s\,\mathrm{net}(x)`, and the network is fitted by
    :math:`((f - c)/s - \mathrm{net}(x))^2`. Without options :math:`c = 0` and
    :math:`s = 1`; with them they are running averages, read before they are updated,
    so that the network sees targets of order 1 and the gradient keeps its size.

    Arguments:
        net: A module from ``input`` to one number for each plate element, with or
            without a last dimension of size 1. Give the same module at each step.
        input: A tensor, or a function of the program's arguments that returns one. It
            must not depend on the site's own value.
        centre: Subtract a running mean of the cost.
        normalise: Divide by a running standard deviation of the cost.
        decay: Of the running averages, in [0, 1).

    Raises:
        NonDiffError: If ``net`` is no module, or its output does not fit the site.

    Example:
        >>> from pyro_nondiff.estimators import REINFORCE, MovingAverage, NeuralBaseline
        >>> net = torch.nn.Linear(4, 1)
        >>> estimator = REINFORCE(baseline=NeuralBaseline(net, input=lambda x: x, centre=True))

    References:
        | Neural Variational Inference and Learning in Belief Networks (Mnih & Gregor, 2014)
        | https://arxiv.org/abs/1402.0030
    """

    net: nn.Module
    input: Tensor | Callable[..., Tensor] = field(compare=False, repr=False)
    centre: bool = False
    normalise: bool = False
    decay: float = 0.9

    def __post_init__(self) -> None:
        _check_decay(self.decay)
        if not isinstance(self.net, nn.Module):
            raise NonDiffError(
                f"NeuralBaseline needs a torch.nn.Module, found {type(self.net).__name__}: "
                "wrap the function in a module, or use MovingAverage()."
            )

    def make_state(self) -> nn.Module:
        return nn.ModuleDict(
            {
                "net": self.net,
                "mean": RunningMean(self.decay),
                "square": RunningMean(self.decay),
            }
        )

    def read(self, state: nn.Module, costs: Tensor, context: Context) -> Reading:
        parts = cast(nn.ModuleDict, state)
        mean = cast(RunningMean, parts["mean"]).fit_to(costs)
        square = cast(RunningMean, parts["square"]).fit_to(costs)
        centre = mean() if self.centre else torch.zeros_like(mean.mean)
        scale = torch.ones_like(centre)
        if self.normalise:
            variance = (square() - mean() ** 2).clamp(min=1e-6)
            scale = torch.where(square.weight > 0, variance, torch.ones_like(variance)).sqrt()
        guess = self._guess(context)

        def fit(f: Tensor) -> Tensor:
            return ((f - centre) / scale - guess).square().mean()

        def update(f: Tensor) -> None:
            mean.update(f.mean())
            square.update(f.square().mean())

        return Reading(centre + scale * guess, fit, update)

    def _guess(self, context: Context) -> Tensor:
        data: Any = self.input
        if not isinstance(data, Tensor):
            data = data(*context.args, **context.kwargs)
        output = self.net(data.detach())
        guess = output.squeeze(-1) if output.dim() and output.shape[-1] == 1 else output
        if guess.dim() == len(context.shape) + 1:
            guess = guess[0]  # the input depends on a site that branches: row 0 is the base run
        if not _fits(guess.shape, context.shape):
            raise NonDiffError(
                f"site '{context.site}': the net of its NeuralBaseline returned shape "
                f"{tuple(output.shape)}, which does not fit the site's worlds and plates "
                f"{tuple(context.shape)}. Return one number for each plate element, with or "
                "without a last dimension of size 1."
            )
        return cast(Tensor, guess)


@dataclass(frozen=True)
class SumBaseline(AbstractBaseline):
    """The sum of two baselines, the second fitted to what the first leaves."""

    first: AbstractBaseline
    second: AbstractBaseline

    def make_state(self) -> nn.Module:
        return nn.ModuleList([self.first.make_state(), self.second.make_state()])

    def read(self, state: nn.Module, costs: Tensor, context: Context) -> Reading:
        states = cast(nn.ModuleList, state)
        first = self.first.read(states[0], costs, context)
        second = self.second.read(states[1], costs, context)
        known = first.value.detach()

        def fit(f: Tensor) -> Tensor | None:
            losses = [first.fit(f), second.fit(f - known)]
            given = [loss for loss in losses if loss is not None]
            return torch.stack(given).sum() if given else None

        def update(f: Tensor) -> None:
            first.update(f)
            second.update(f - known)

        return Reading(first.value + second.value, fit, update)


def _no_loss(costs: Tensor) -> None:
    return None


def _fits(shape: torch.Size, target: tuple[int, ...]) -> bool:
    if len(shape) > len(target):
        return False
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return all(size in (1, wanted) for size, wanted in pairs)
