"""The logarithm of a Gamma number, for concentrations at which the number itself underflows."""

from typing import Any, ClassVar, Self

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid

from ..noise import Request, draw
from ._implicit import implicit_gamma
from ._maps import wide

__all__ = ["LogGamma"]


class LogGamma(TorchDistribution):
    r"""The law of the logarithm of a Gamma number.

    .. math:: y = \log g + \frac{\log u}{\alpha} - \log \beta, \qquad
        g \sim \mathrm{Gamma}(\alpha + 1, 1), \qquad u \sim \mathrm{Uniform}(0, 1)

    with the implicit derivative of :math:`g`. torch approximates it: a gradient is off by 2e-5 of
    itself or so. The log-density of :math:`y` is
    :math:`\alpha (y + \log \beta) - \beta e^y - \log \Gamma(\alpha)`. In float32 a Gamma number
    underflows from a concentration of 0.1 down now and then, and at 0.001 nearly always; its
    logarithm does not, down to 1e-4 and below.

    Arguments:
        concentration: :math:`\alpha`, positive; broadcasts with ``rate``.
        rate: :math:`\beta`, positive.
        validate_args: As in Pyro.

    Example:
        >>> from pyro_nondiff.distributions import LogGamma
        >>> alpha = torch.tensor(1e-4, requires_grad=True)
        >>> y = LogGamma(alpha, 1.0).rsample((1000,))
        >>> bool(y.isfinite().all()), bool(torch.autograd.grad(y.sum(), alpha)[0].isfinite())
        (True, True)

    References:
        | Implicit Reparameterization Gradients (Figurnov et al., 2018)
        | https://arxiv.org/abs/1805.08498
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "concentration": constraints.positive,
        "rate": constraints.positive,
    }
    support = constraints.real
    has_rsample = True

    def __init__(
        self, concentration: Any, rate: Any = 1.0, *, validate_args: bool | None = None
    ) -> None:
        self.concentration: Tensor
        self.rate: Tensor
        self.concentration, self.rate = broadcast_all(concentration, rate)
        super().__init__(self.concentration.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """The same law with a larger batch shape."""
        law: Any = self
        new: Self = law._get_checked_instance(type(self), _instance)
        shape = torch.Size(batch_shape)
        new.concentration = self.concentration.expand(shape)
        new.rate = self.rate.expand(shape)
        TorchDistribution.__init__(new, shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """The digamma function of the concentration, minus the logarithm of the rate."""
        return torch.digamma(self.concentration) - self.rate.log()

    @property
    def variance(self) -> Tensor:
        """The trigamma function of the concentration."""
        return torch.polygamma(1, self.concentration)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """A draw, with a gradient to both parameters."""
        shape = (*sample_shape, *self.batch_shape)
        concentration = wide(self.concentration)
        place = self.rate.dtype, self.rate.device, "u", self
        gamma = draw(Request("", "gamma", shape, *place, concentration=concentration + 1))
        uniform = draw(Request("", "logistic", shape, *place))
        log_gamma = implicit_gamma(concentration.expand(shape) + 1, gamma).log()
        value: Tensor = log_gamma + logsigmoid(uniform) / concentration - wide(self.rate).log()
        return value.to(self.rate.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density."""
        if self._validate_args:
            self._validate_sample(value)
        alpha, log_rate = wide(self.concentration), wide(self.rate).log()
        value = wide(value) + log_rate
        found = alpha * value - value.exp() - torch.lgamma(alpha)
        return found.to(self.rate.dtype)

    def entropy(self) -> Tensor:
        r"""The entropy, :math:`\alpha + \log \Gamma(\alpha) - \alpha \psi(\alpha)`."""
        alpha = self.concentration
        return alpha + torch.lgamma(alpha) - alpha * torch.digamma(alpha)
