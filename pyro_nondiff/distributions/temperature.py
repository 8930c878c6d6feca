"""Temperatures: numbers, tensors, and schedules that change with the steps."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import NonDiffError

__all__ = ["AbstractSchedule", "ExponentialAnnealing", "LinearAnnealing", "Temperature"]


class AbstractSchedule(nn.Module, ABC):
    """A number that changes with the steps of a training.

    ``value`` is a tensor that is changed in place, so a step that was recorded sees the change.
    It is a buffer: ``state_dict()`` holds it, and ``to(device)`` moves it.

    Arguments:
        start: The first value, positive.
        end: The last value, positive, or 0 where ``reaches_zero``.
        num_steps: After how many calls of :meth:`step` the last value is reached.

    Raises:
        NonDiffError: If a value or the number of steps is not positive.
    """

    value: Tensor
    count: Tensor
    reaches_zero: ClassVar[bool] = False

    def __init__(self, start: float, end: float, num_steps: int) -> None:
        super().__init__()
        for name, given in (("start", start), ("end", end), ("num_steps", num_steps)):
            zero = self.reaches_zero and name == "end" and given == 0
            if not (zero or 0 < given < math.inf):
                raise NonDiffError(f"{type(self).__name__}: {name} must be positive, found {given}")
        self.start, self.end, self.num_steps = start, end, num_steps
        self.register_buffer("value", torch.tensor(float(start)))
        self.register_buffer("count", torch.tensor(0.0))

    @abstractmethod
    def at(self, fraction: Tensor) -> Tensor:
        """The value after a fraction, from 0 to 1, of all steps."""

    @torch.no_grad()
    def step(self) -> None:
        """Goes on by one step. Call it once after each step of the training."""
        self.count += 1
        self.value.copy_(self.at((self.count / self.num_steps).clamp(max=1)))

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.start}, {self.end}, num_steps={self.num_steps}"


class ExponentialAnnealing(AbstractSchedule):
    r"""A schedule that multiplies by the same factor at each step.

    .. math:: T_n = T_0 (T_N / T_0)^{n / N}

    Arguments:
        start: :math:`T_0`.
        end: :math:`T_N`.
        num_steps: :math:`N`.

    Example:
        >>> from pyro_nondiff.distributions import ExponentialAnnealing
        >>> temperature = ExponentialAnnealing(1.0, 0.25, num_steps=2)
        >>> temperature.step()
        >>> temperature.value
        tensor(0.5000)
    """

    def at(self, fraction: Tensor) -> Tensor:
        """The value after a fraction of all steps."""
        return self.start * (self.end / self.start) ** fraction


class LinearAnnealing(AbstractSchedule):
    r"""A schedule that adds the same difference at each step.

    .. math:: T_n = T_0 + (T_N - T_0) n / N

    Arguments:
        start: :math:`T_0`.
        end: :math:`T_N`; 0 serves a weight, such as that of an entropy, and no temperature.
        num_steps: :math:`N`.

    Example:
        >>> from pyro_nondiff.distributions import LinearAnnealing
        >>> temperature = LinearAnnealing(1.0, 0.5, num_steps=5)
        >>> for _ in range(10):
        ...     temperature.step()
        >>> temperature.value
        tensor(0.5000)
    """

    reaches_zero = True

    def at(self, fraction: Tensor) -> Tensor:
        """The value after a fraction of all steps."""
        return self.start + (self.end - self.start) * fraction


Temperature: TypeAlias = float | Tensor | AbstractSchedule
"""A positive number, a tensor that broadcasts with the batch shape, or a schedule."""


def check_temperature(
    owner: str,
    temperature: Temperature,
    validate: bool,
    batch_shape: tuple[int, ...] | None = None,
) -> None:
    """Refuses a temperature that is not positive, or has dimensions that its law has not.

    Arguments:
        owner: Who has the temperature, for the message.
        temperature: What was given.
        validate: Whether to look into a tensor, which waits for its device.
        batch_shape: Of the law that the temperature is for, if there is one already.

    Raises:
        NonDiffError: With what was found.
    """
    if isinstance(temperature, AbstractSchedule):
        if temperature.end == 0:
            raise NonDiffError(
                f"{owner}: temperature must be positive, and {temperature!r} ends at 0."
            )
        return
    if isinstance(temperature, Tensor):
        looked = validate and not temperature.is_meta
        good = not looked or bool((temperature > 0).all() and temperature.isfinite().all())
    else:
        good = 0 < temperature < math.inf
    if not good:
        raise NonDiffError(
            f"{owner}: temperature must be positive and finite, found {temperature}. A learnt one "
            "needs pyro.param(..., constraint=constraints.positive)."
        )
    if isinstance(temperature, Tensor) and batch_shape is not None:
        _check_shape(owner, tuple(temperature.shape), tuple(batch_shape))


def _check_shape(owner: str, shape: tuple[int, ...], batch: tuple[int, ...]) -> None:
    pairs = zip(reversed(shape), reversed(batch), strict=False)
    if len(shape) > len(batch) or any(ours not in (1, theirs) for ours, theirs in pairs):
        raise NonDiffError(
            f"{owner}: temperature has shape {shape}, which does not broadcast to the law's batch "
            f"shape {batch}."
        )


def current(temperature: Temperature, event_dim: int = 0) -> float | Tensor:
    """What a temperature is now, with dimensions for a law's event behind a batch of them."""
    if isinstance(temperature, AbstractSchedule):
        return temperature.value
    if isinstance(temperature, Tensor) and temperature.dim():
        return temperature.reshape(temperature.shape + (1,) * event_dim)
    return temperature


def log_of(temperature: float | Tensor) -> float | Tensor:
    """The logarithm of a temperature."""
    return temperature.log() if isinstance(temperature, Tensor) else math.log(temperature)
