"""Layers of random weights, each of which learns how much noise it bears."""

from abc import abstractmethod
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.nn.utils import skip_init

from ..errors import NonDiffError

__all__ = ["AbstractSparse", "SparseConv2d", "SparseLinear"]

_EPS = 1e-8


class AbstractSparse(nn.Module):
    r"""A layer whose weights are normal, each with a mean and a variance that it learns.

    .. math:: w \sim \mathcal{N}(\mu, \sigma^2), \qquad \alpha = \sigma^2 / \mu^2

    A weight is never drawn: its effect is. An activation is a sum over weights, and so normal too.
    It is the sample site of the layer's name, drawn for each input:

    .. math:: a \sim \mathcal{N}(x \mu + b, \; x^2 \sigma^2)

    This local reparameterisation makes gradients vary less than one draw of the weights for a whole
    batch, and puts the site into the plates and worlds of the input. The site has no prior, and a
    guide does not draw it: it adds nothing to an objective, not even to Pyro's own. What the
    weights cost is :func:`weight_kl`, which a program states once, outside of its plates.

    A weight is pruned as soon as its :math:`\log \alpha` reaches ``threshold``. It then has neither
    mean nor noise, and hardly ever comes back: all that moves it is the KL, which asks for more
    noise. ``threshold=math.inf`` prunes nothing.

    The layer draws in training mode. In evaluation mode, as under
    :class:`~pyro_nondiff.handlers.mode`, the weights that are kept are their means, and there is no
    site: :meth:`prune` returns that layer. For predictions that know their uncertainty, average
    over draws in training mode.

    A subclass is a layer of torch as well.

    Attributes:
        weight: The means :math:`\mu`.
        log_variance: :math:`\log \sigma^2`, of their shape.
        bias: As in torch, without noise.
    """

    event_dim: ClassVar[int]
    weight: Tensor
    bias: Any
    log_variance: Tensor

    def _randomize(self, name: str, threshold: float, log_variance: float) -> None:
        self.name = name
        self.threshold = threshold
        self.log_variance = nn.Parameter(torch.full_like(self.weight, log_variance))

    @abstractmethod
    def apply_weights(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The activation for an input if the weights were these."""

    @abstractmethod
    def _plain(self) -> Any:
        """A layer of torch of the same shape, with any numbers in it."""

    def forward(self, input: Tensor) -> Tensor:
        """A draw of the activation in training mode, and its mean in evaluation mode."""
        mean = self.apply_weights(input, self.kept_weight, self.bias)
        if not self.training:
            return mean
        noise = self.log_variance.exp() * self.kept
        variance = self.apply_weights(input.square(), noise, None)
        law = dist.Normal(mean, (variance + _EPS).sqrt()).to_event(self.event_dim)
        # masked: an objective of Pyro counts the log-probability of each site of the model
        drawn: Tensor = pyro.sample(self.name, law.mask(False), infer={"is_auxiliary": True})
        return drawn

    @property
    def log_alpha(self) -> Tensor:
        r"""Noise over signal of each weight: :math:`\log \sigma^2 - \log \mu^2`."""
        return self.log_variance - (self.weight.square() + _EPS).log()

    @property
    def kept(self) -> Tensor:
        """True for each weight that is not pruned."""
        return self.log_alpha < self.threshold

    @property
    def kept_weight(self) -> Tensor:
        """The means of the weights that are kept, and 0 for the others."""
        return self.weight * self.kept

    def kl(self) -> Tensor:
        r"""The KL divergence of all weights from their log-uniform prior: a scalar, in nats.

        .. math:: \sum \tfrac{1}{2} \log(1 + \alpha^{-1})
                  + k_1 \, \mathrm{sigmoid}(-k_2 - k_3 \log \alpha)

        with :math:`k = (0.63576, 1.87320, 1.48695)`. It is within 0.0094 nats a weight of the
        exact one. The prior has no integral, so a constant is free: 0 is the limit of much noise.
        """
        log_alpha = self.log_alpha
        far = 0.63576 * torch.sigmoid(-1.87320 - 1.48695 * log_alpha)
        return (softplus(-log_alpha) / 2 + far).sum()

    def prune(self) -> nn.Module:
        """The layer of torch that this one is in evaluation mode, with parameters of its own."""
        plain: nn.Module = self._plain().train(self.training)
        values = {"weight": self.kept_weight}
        if self.bias is not None:
            values["bias"] = self.bias
        plain.load_state_dict(values)
        return plain

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.name!r}, {super().extra_repr()}, threshold={self.threshold}"


class SparseLinear(AbstractSparse, nn.Linear):
    r"""A linear layer with sparse variational dropout.

    Arguments:
        name: The name of its sample site, unique in the program.
        in_features: As in torch.
        out_features: As in torch.
        bias: As in torch.
        threshold: The :math:`\log \alpha` from which on a weight is pruned. At 3 its noise is 4.5
            times its mean.
        log_variance: :math:`\log \sigma^2` of all weights at the start.
        **options: ``device`` and ``dtype``, as in torch.

    Shapes:
        Input ``batch + (in_features,)``, output ``batch + (out_features,)``: a site of one event
        dimension.

    Raises:
        NonDiffError: If the first argument is no name.

    Example:
        >>> from pyro.infer import SVI
        >>> from pyro_nondiff.infer import ExpectedCost, no_guide
        >>> from pyro_nondiff.nn import SparseLinear, weight_kl
        >>> from pyro_nondiff.ops import cost
        >>> layer = SparseLinear("layer", 4, 1)
        >>> x = torch.randn(200, 4)
        >>> y = x[:, :1] - 2 * x[:, 1:2]  # two of four inputs matter
        >>> def model():
        ...     pyro.module("layer", layer)
        ...     cost("KL", weight_kl(layer))
        ...     with pyro.plate("data", 200):
        ...         pyro.sample("y", dist.Normal(layer(x), 0.5).to_event(1), obs=y)
        >>> svi = SVI(model, no_guide, pyro.optim.Adam({"lr": 0.05}), ExpectedCost())
        >>> losses = [svi.step() for _ in range(300)]
        >>> layer.kept
        tensor([[ True,  True, False, False]])
        >>> layer.prune()
        Linear(in_features=4, out_features=1, bias=True)

    References:
        | Variational Dropout Sparsifies Deep Neural Networks (Molchanov et al., 2017)
        | https://arxiv.org/abs/1701.05369
        | Variational Dropout and the Local Reparameterization Trick (Kingma et al., 2015)
        | https://arxiv.org/abs/1506.02557
    """

    event_dim = 1

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        threshold: float = 3.0,
        log_variance: float = -10.0,
        **options: Any,
    ) -> None:
        _check_name("SparseLinear", name)
        super().__init__(in_features, out_features, bias, **options)
        self._randomize(name, threshold, log_variance)

    def apply_weights(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(input, weight, bias)

    def _plain(self) -> Any:
        return skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )


class SparseConv2d(AbstractSparse, nn.Conv2d):
    r"""A convolution with sparse variational dropout.

    An activation has the mean and the variance that random weights give it. The activations of one
    map share weights, and would covary; here they are drawn apart, as in the paper.

    Arguments:
        name: The name of its sample site, unique in the program.
        in_channels: As in torch.
        out_channels: As in torch.
        kernel_size: As in torch.
        threshold: As for :class:`SparseLinear`.
        log_variance: As for :class:`SparseLinear`.
        **options: The other arguments of ``torch.nn.Conv2d``, such as ``stride`` and ``padding``.

    Shapes:
        Input ``batch + (in_channels, height, width)`` with any number of batch dimensions; output
        ``batch + (out_channels, height', width')``: a site of three event dimensions.

    Raises:
        NonDiffError: If the first argument is no name.

    Example:
        >>> from pyro_nondiff.nn import SparseConv2d
        >>> layer = SparseConv2d("conv", 1, 8, kernel_size=3, stride=2)
        >>> layer(torch.zeros(5, 4, 1, 9, 9)).shape  # 5 worlds of 4 images
        torch.Size([5, 4, 8, 4, 4])
        >>> layer.prune()
        Conv2d(1, 8, kernel_size=(3, 3), stride=(2, 2))

    References:
        | Variational Dropout Sparsifies Deep Neural Networks (Molchanov et al., 2017)
        | https://arxiv.org/abs/1701.05369
    """

    event_dim = 3

    def __init__(
        self,
        name: str,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        threshold: float = 3.0,
        log_variance: float = -10.0,
        **options: Any,
    ) -> None:
        _check_name("SparseConv2d", name)
        super().__init__(in_channels, out_channels, kernel_size, **options)
        self._randomize(name, threshold, log_variance)

    def apply_weights(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        flat = input.reshape(-1, *input.shape[-3:])
        found: Tensor = self._conv_forward(flat, weight, bias)
        return found.reshape(input.shape[:-3] + found.shape[1:])

    def _plain(self) -> Any:
        return skip_init(
            nn.Conv2d,
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )


def _check_name(layer: str, name: object) -> None:
    if not isinstance(name, str):
        raise NonDiffError(
            f"{layer}: the first argument is the name of the layer's sample site, found "
            f'{type(name).__name__}. Write {layer}("name", ...).'
        )
