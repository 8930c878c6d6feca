"""What a network of sparse layers costs, keeps, and is without its noise."""

import copy

import torch
from torch import Tensor, nn

from ..errors import NonDiffError
from ._sparse import AbstractSparse

__all__ = ["compression", "prune", "weight_kl"]


def weight_kl(net: nn.Module) -> Tensor:
    r"""The KL divergence of a network's random weights from their prior: a scalar, in nats.

    It is that of the whole data set. So state it once, outside of the data's plate, which scales
    what a batch says to the whole set. A weight on it can be annealed: a tensor or a schedule's
    ``value``, which is below 1 for the first epochs.

    Arguments:
        net: A module with sparse layers in it, or one of them.

    Raises:
        NonDiffError: For a module without sparse layers.

    Example:
        >>> from pyro_nondiff.nn import SparseLinear, weight_kl
        >>> from pyro_nondiff.ops import cost
        >>> net = torch.nn.Sequential(
        ...     SparseLinear("first", 6, 4), torch.nn.ReLU(), SparseLinear("second", 4, 3)
        ... )
        >>> x, y = torch.randn(100, 6), torch.randint(3, (100,))
        >>> def model(rows):
        ...     pyro.module("net", net)
        ...     cost("KL", weight_kl(net))
        ...     with pyro.plate("data", 100, subsample=rows):
        ...         pyro.sample("y", dist.Categorical(logits=net(x[rows])), obs=y[rows])
        >>> from pyro_nondiff.infer import ExpectedCost, no_guide
        >>> ExpectedCost().loss(model, no_guide, torch.arange(10)) > weight_kl(net).item()
        True

    References:
        | Variational Dropout Sparsifies Deep Neural Networks (Molchanov et al., 2017)
        | https://arxiv.org/abs/1701.05369
    """
    return torch.stack([layer.kl() for layer in _layers("weight_kl", net)]).sum()


def prune(net: nn.Module) -> nn.Module:
    """A copy of a network with layers of torch in the place of its sparse ones.

    It does what the network does in evaluation mode, has no sample sites, and no variances: what is
    pruned is 0. The network itself stays as it is.

    Arguments:
        net: A module with sparse layers in it.

    Raises:
        NonDiffError: For a module without sparse layers.

    Example:
        >>> from pyro_nondiff.nn import SparseLinear, prune
        >>> prune(torch.nn.Sequential(SparseLinear("first", 6, 4), torch.nn.ReLU()))
        Sequential(
          (0): Linear(in_features=6, out_features=4, bias=True)
          (1): ReLU()
        )
    """
    # what deepcopy has already copied it takes as it is, wherever in the network it stands
    return copy.deepcopy(net, {id(layer): layer.prune() for layer in _layers("prune", net)})


def compression(net: nn.Module) -> float:
    """How many weights sparse layers have for each one that is kept. Biases are not counted.

    Arguments:
        net: A module with sparse layers in it, or one of them.

    Returns:
        At least 1; infinite if none is kept.

    Raises:
        NonDiffError: For a module without sparse layers.

    Example:
        >>> from pyro_nondiff.nn import SparseLinear, compression
        >>> layer = SparseLinear("layer", 4, 2)
        >>> _ = layer.log_variance.data[0].fill_(9.0)  # much noise on the weights of one unit
        >>> compression(layer)
        2.0
    """
    kept = [layer.kept for layer in _layers("compression", net)]
    left = sum(int(each.sum()) for each in kept)
    return sum(each.numel() for each in kept) / left if left else float("inf")


def _layers(asker: str, net: nn.Module) -> list[AbstractSparse]:
    layers = [module for module in net.modules() if isinstance(module, AbstractSparse)]
    if not layers:
        raise NonDiffError(
            f"{asker}: there is no sparse layer in {type(net).__name__}. Build it with "
            "SparseLinear or SparseConv2d."
        )
    return layers
