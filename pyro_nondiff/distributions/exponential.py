"""The Exponential law as the lecture writes it: a map of a uniform number."""

from typing import Any, Self

import pyro.distributions as dist
from torch import Tensor

from ._maps import NoiseMap

__all__ = ["InverseCDFExponential"]


class InverseCDFExponential(NoiseMap, dist.Exponential):  # type: ignore[misc]
    r"""An Exponential law drawn through the inverse of its distribution function.

    .. math:: z = -\log(u) / \lambda, \qquad u \sim \mathrm{Uniform}(0, 1)

    The gradient is :math:`\partial z / \partial \lambda = -z / \lambda`. It is the gradient that
    ``pyro.distributions.Exponential`` has; here the noise can be injected.

    Arguments:
        rate: :math:`\lambda`, positive, of the batch shape.
        validate_args: As in Pyro.

    Example:
        >>> from pyro_nondiff.distributions import InverseCDFExponential
        >>> rate = torch.tensor(2.0, requires_grad=True)
        >>> z = InverseCDFExponential(rate).rsample()
        >>> bool(torch.autograd.grad(z, rate)[0] == -z / 2)
        True

    References:
        | Monte Carlo Gradient Estimation in Machine Learning (Mohamed et al., 2020)
        | https://arxiv.org/abs/1906.10652
    """

    noise_kind = "exponential"

    def __init__(self, rate: Any, *, validate_args: bool | None = None) -> None:
        dist.Exponential.__init__(self, rate, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """The same law with a larger batch shape."""
        new: Self = self._new(_instance)
        dist.Exponential.expand(self, batch_shape, new)
        return new

    @property
    def like(self) -> Tensor:
        """The rate."""
        rate: Tensor = self.rate
        return rate

    def from_noise(self, noise: Tensor) -> Tensor:
        """The value that minus the logarithm of a uniform number makes."""
        rate = self.like
        return (noise / rate).to(rate.dtype)
