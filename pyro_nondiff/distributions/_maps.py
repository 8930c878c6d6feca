"""What laws of this library have in common: each is a map of noise."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from ..noise import Request, draw


class NoiseMap(TorchDistributionMixin, ABC):
    """A law whose value is a map of its noise, with a gradient to its parameters.

    Class attributes:
        noise_kind: The kind of its noise, see :mod:`pyro_nondiff.noise`.
        noise_concentration: Of ``"gamma"`` noise.
    """

    noise_kind: ClassVar[str]
    noise_concentration: Tensor | None = None
    has_rsample = True

    @abstractmethod
    def from_noise(self, noise: Tensor) -> Tensor:
        """The value that the law makes of noise.

        Arguments:
            noise: At least float32, of the law's shape with any dimensions at its left.
        """

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws noise, and maps it to a value with a gradient to the parameters."""
        law = _any(self)
        shape = (*sample_shape, *law.batch_shape, *law.event_shape)
        like = self.like
        place = like.dtype, like.device
        concentration = self.noise_concentration
        request = Request("", self.noise_kind, shape, *place, "u", law, concentration)
        return self.from_noise(draw(request))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """A draw without gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def _new(self, instance: Any) -> Any:
        """An empty law of this class, for ``expand``; a subclass's, if it made one."""
        return _any(self)._get_checked_instance(type(self), instance)

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """A parameter of the law's dtype and device."""


def _any(law: Any) -> Any:
    """Pyro's laws have no types."""
    return law


def wide(x: Tensor) -> Tensor:
    """A tensor in at least float32, in which noise is drawn and laws are computed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The hard value, exactly, with the gradient of the soft one."""
    soft = soft.to(hard.dtype)
    return hard.detach() + (soft - soft.detach())


def has_logits(law: Any) -> bool:
    """Whether a discrete law was given logits, rather than probabilities."""
    inner = getattr(law, "_categorical", law)
    return inner._param is inner.__dict__.get("logits")
