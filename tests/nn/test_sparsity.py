"""The KL of random weights against the exact one, and whole networks that are pruned."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor, nn

from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.nn import (
    AbstractSparse,
    SparseConv2d,
    SparseLinear,
    compression,
    prune,
    weight_kl,
)

STATED_ERROR = 0.009  # nats a weight, up to a constant
LIMIT = -(math.log(2) + 0.5772156649015329) / 2  # the mean of log |z| for a standard normal z


def exact_kl(log_alpha: float) -> float:
    """The mean of log |w| under the weight's law, from 0 for much noise: by quadrature.

    The KL from a density that is proportional to 1 / |w| is that, less the entropy of the law. In
    units of its deviation the law is normal around 1 / sqrt(alpha).
    """
    mean = math.exp(-log_alpha / 2)

    def integrand(z: float) -> float:
        return math.exp(-((z - mean) ** 2) / 2) / math.sqrt(2 * math.pi) * math.log(abs(z))

    pieces = sorted({0.0, mean - 12, max(mean - 3, 0.0), mean, mean + 3, mean + 12})
    each = [quad(integrand, low, high)[0] for low, high in pairwise(pieces)]
    return sum(each) - LIMIT


def layer_of(log_alpha: Tensor) -> Any:
    """A layer with a weight of each log alpha."""
    layer = SparseLinear("layer", len(log_alpha), 1)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-2, 3, len(log_alpha)))
        layer.log_variance.copy_(log_alpha + (layer.weight**2).log())
    return layer


def check_kl() -> None:
    grid = torch.linspace(-8.0, 8.0, 65)
    found = torch.stack([weight_kl(layer_of(each[None])) for each in grid])
    exact = torch.tensor([exact_kl(float(each)) for each in grid])
    error = found - exact
    assert error.max() - error.min() < 2 * STATED_ERROR
    assert error.abs().max() < 0.0094
    assert error[-1].abs() < 1e-6


def test_the_exact_kl_is_known_at_its_ends() -> None:
    assert abs(exact_kl(30.0)) < 1e-6  # all noise
    assert abs(exact_kl(-8.0) - (4.0 - LIMIT)) < 1e-3  # log |w| is that of the mean


def test_the_kl_is_within_the_error_that_the_paper_states() -> None:
    check_kl()


@pytest.mark.parametrize(
    "planted",
    [
        lambda layer: layer.log_variance - layer.weight.abs().log(),
        lambda layer: layer.weight.square().log() - layer.log_variance,
        lambda layer: layer.log_variance / 2 - layer.weight.abs().log(),
    ],
    ids=["not squared", "inverted", "deviation"],
)
def test_planted_noise_to_signal_is_caught(
    monkeypatch: pytest.MonkeyPatch, planted: Callable[[Any], Tensor]
) -> None:
    monkeypatch.setattr(AbstractSparse, "log_alpha", property(planted))
    with pytest.raises(AssertionError):
        check_kl()


def test_planted_loss_of_a_term_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "sigmoid", torch.zeros_like)
    with pytest.raises(AssertionError):
        check_kl()


def test_the_kl_of_a_network_is_the_sum_over_all_weights() -> None:
    grid = torch.linspace(-6.0, 6.0, 5)
    net = nn.Sequential(layer_of(grid), nn.ReLU(), nn.ModuleList([layer_of(grid + 1)]))
    parts = [layer_of(each[None]).kl() for each in torch.cat([grid, grid + 1])]
    torch.testing.assert_close(weight_kl(net), torch.stack(parts).sum())
    assert weight_kl(net).shape == ()


def test_the_kl_is_finite_at_its_worst() -> None:
    layer = SparseLinear("layer", 3, 1, dtype=torch.float32)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 0.0, 1e4]]))
        layer.log_variance.copy_(torch.tensor([[-60.0, 60.0, -60.0]]))
    weight_kl(layer).backward()
    assert all(each.isfinite().all() for each in (weight_kl(layer), layer.weight.grad))


# --- whole networks ---------------------------------------------------------------------------


class Net(nn.Module):
    """Layers of both kinds, one of them used twice, others in containers, beside what is not."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(SparseConv2d("conv", 1, 2, 2), nn.BatchNorm2d(2), nn.ReLU())
        self.twice = SparseLinear("twice", 8, 8)
        self.head = nn.ModuleDict({"out": nn.Linear(8, 3)})
        self.again = [self.twice]
        for layer in (self.features[0], self.twice):
            values = torch.linspace(-6, 6, layer.weight.numel())
            layer.log_variance.data.copy_(values.view_as(layer.weight))

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.features(x).flatten(-3))
        return self.head["out"](self.again[0](x))


def test_a_pruned_network_is_the_network_in_evaluation_mode() -> None:
    net, x = Net().eval(), torch.randn(4, 1, 3, 3)
    pruned: Any = prune(net)
    assert torch.equal(pruned(x), net(x))
    kinds = {type(module) for module in pruned.modules()}
    assert not any(issubclass(kind, AbstractSparse) for kind in kinds)
    assert pruned.again[0] is pruned.twice


def test_pruning_leaves_the_network_as_it_is() -> None:
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    pruned = prune(net)
    for value in pruned.state_dict().values():
        value.zero_()
    torch.testing.assert_close(dict(net.state_dict()), before)


def test_a_layer_is_pruned_as_a_network() -> None:
    assert type(prune(SparseLinear("layer", 3, 2))) is nn.Linear


def test_compression_counts_weights_and_no_biases() -> None:
    layers = [layer_of(torch.tensor([2.9, 3.1, 8.0, 5.0])), layer_of(torch.tensor([-1.0, 4.0]))]
    assert compression(layers[0]) == 4
    assert compression(nn.Sequential(*layers, nn.Linear(9, 9))) == 3
    assert compression(layer_of(torch.tensor([8.0]))) == math.inf


def test_a_layers_own_threshold_counts() -> None:
    layer = layer_of(torch.tensor([2.0, 3.5]))
    layer.threshold = 4.0
    assert compression(layer) == 1


@pytest.mark.parametrize("ask", [weight_kl, prune, compression])
def test_a_network_without_sparse_layers_is_refused(ask: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(NonDiffError, match=f"{ask.__name__}: there is no sparse layer in Linear"):
        ask(nn.Linear(2, 2))
