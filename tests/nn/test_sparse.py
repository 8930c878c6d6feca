"""Sparse layers against sums over weights: moments, gradients, and the map that is kept.

The exact moments are those of the weights themselves: a layer's activation is linear in them, so
two nodes of a Gauss-Hermite rule for each weight give its mean and variance without error.
"""

import itertools
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_nondiff.distributions import LinearAnnealing
from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.estimators import REINFORCE, RLOO, AbstractEstimator, DisARM
from pyro_nondiff.handlers import mode
from pyro_nondiff.infer import ExpectedCost, TraceEstimator_ELBO, config_estimator, no_guide
from pyro_nondiff.nn import AbstractSparse, SparseConv2d, SparseLinear, _sparse, weight_kl
from pyro_nondiff.ops import cost
from pyro_nondiff.testing import certify
from tests.infer.side_by_side import Training, compiled, train

pytestmark = pytest.mark.usefixtures("param_store")

VARIANCE_FLOOR = 1e-8


def randomized(layer: AbstractSparse) -> Any:
    """A layer with noise of all sizes: some of its weights are pruned, and some are not."""
    with torch.no_grad():
        layer.log_variance.copy_(torch.linspace(-6, 6, layer.weight.numel()).view_as(layer.weight))
    return layer


def linear_layer() -> Any:
    return randomized(SparseLinear("linear", 3, 2))


def conv_layer() -> Any:
    return randomized(SparseConv2d("conv", 1, 2, kernel_size=2, stride=2, padding=1))


LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (linear_layer, (3,)),
    "conv": (conv_layer, (1, 3, 3)),
}
each_layer = pytest.mark.parametrize(("make", "event"), LAYERS.values(), ids=list(LAYERS))


def law_of(layer: Any, x: Tensor) -> Any:
    trace = poutine.trace(layer).get_trace(x)
    return trace.nodes[layer.name]["fn"]


def moments_by_weights(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The activation's mean and variance, from all combinations of two nodes a kept weight."""
    kept = layer.log_variance - 2 * layer.weight.abs().log() < 3
    mean, std = layer.weight * kept, (layer.log_variance / 2).exp() * kept
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=mean.numel())))
    drawn = [layer.apply_weights(x, mean + std * sign.view_as(mean), layer.bias) for sign in signs]
    activations = torch.stack(drawn)
    return activations.mean(0), activations.var(0, correction=0)


# --- the site ---------------------------------------------------------------------------------


def check_moments(make: Callable[[], Any], event: tuple[int, ...]) -> None:
    layer, x = make(), torch.randn(4, *event)
    law, (mean, variance) = law_of(layer, x), moments_by_weights(layer, x)
    torch.testing.assert_close(law.mean, mean)
    torch.testing.assert_close(law.variance, variance + VARIANCE_FLOOR)


@each_layer
def test_the_activation_has_the_moments_that_random_weights_give_it(
    make: Callable[[], Any], event: tuple[int, ...]
) -> None:
    check_moments(make, event)


def test_planted_variance_for_deviation_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = SimpleNamespace(Normal=lambda mean, std: dist.Normal(mean, std**2))
    monkeypatch.setattr(_sparse, "dist", planted)
    with pytest.raises(AssertionError):
        check_moments(*LAYERS["linear"])


@each_layer
def test_the_site_has_the_batch_shape_of_the_input(
    make: Callable[[], Any], event: tuple[int, ...]
) -> None:
    layer = make()
    for batch in ((), (4,), (5, 1, 4)):
        law = law_of(layer, torch.randn(*batch, *event))
        assert law.batch_shape == batch
        assert law.event_dim == len(event)


@each_layer
def test_an_input_of_zeros_has_a_finite_gradient(
    make: Callable[[], Any], event: tuple[int, ...]
) -> None:
    layer = make()
    x = torch.zeros(4, *event, requires_grad=True)
    layer(x).square().sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in (x, *layer.parameters()))


def test_planted_noise_of_pruned_weights_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = property(lambda layer: torch.ones_like(layer.weight))
    monkeypatch.setattr(AbstractSparse, "kept", everything)
    with pytest.raises(AssertionError):
        check_moments(*LAYERS["linear"])


def test_mode_is_the_layer_in_evaluation_mode() -> None:
    layer, x = linear_layer(), torch.randn(4, 3)
    with mode():
        drawn = layer(x)
    assert torch.equal(drawn, layer.eval()(x))


def test_a_pruned_weight_is_moved_by_its_kl_alone_towards_more_noise() -> None:
    layer = linear_layer()
    layer(torch.randn(4, 3)).square().sum().backward()
    pruned = ~layer.kept
    assert 0 < pruned.sum() < pruned.numel()
    assert not layer.weight.grad[pruned].any()
    assert not layer.log_variance.grad[pruned].any()
    layer.zero_grad()
    layer.kl().backward()
    assert (layer.log_variance.grad < 0).all()
    assert (layer.weight.grad * layer.weight > 0).all()


# --- in a program -----------------------------------------------------------------------------


class Program(nn.Module):
    """A bit, and behind it a layer for each of two rows of data that are half of all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = SparseLinear("layer", 2, 1, log_variance=-2.0)
        self.layer.weight.data.copy_(torch.tensor([[0.8, -0.3]]))
        self.logit = nn.Parameter(torch.tensor(0.3))

    def forward(self, beta: float = 0.7) -> None:
        pyro.module("program", self)
        cost("KL", beta * weight_kl(self))
        bit = pyro.sample("bit", dist.Bernoulli(logits=self.logit), infer={"is_auxiliary": True})
        x = torch.stack([bit, 1 - 3 * bit], -1)
        with pyro.plate("data", 2, subsample=torch.tensor([1])):
            a = self.layer(x)[..., 0]
            pyro.sample("y", dist.Normal(a, 1.0), obs=torch.tensor([0.5]))


@pytest.fixture
def exact() -> None:
    """As for all certificates."""
    if torch.get_default_dtype() != torch.float64:
        pytest.skip("an exact expectation is compared in float64")


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("worlds", ["vectorized", "sequential"])
@pytest.mark.parametrize("estimator", [REINFORCE(), RLOO(2), DisARM()], ids=repr)
@pytest.mark.parametrize("own", [None, REINFORCE()], ids=repr)
def test_its_gradient_is_exact(estimator: Any, own: AbstractEstimator | None, worlds: Any) -> None:
    program: Any = Program()
    model = config_estimator(program, {"layer": own}) if own else program
    objective = ExpectedCost(estimator, worlds=worlds)
    assert certify(objective, model, no_guide, nodes=4).bias < 1e-9


def test_its_gradient_is_that_of_the_closed_form() -> None:
    """A squared loss: the bit is enumerated, the noise integrated, and the plate scales by 2."""
    program = Program()
    certificate = certify(ExpectedCost(REINFORCE()), program, no_guide, nodes=4)
    layer, probability = program.layer, program.logit.sigmoid()
    loss = 0.7 * weight_kl(program)
    for bit, weight in ((0.0, 1 - probability), (1.0, probability)):
        x = torch.tensor([bit, 1 - 3 * bit])
        mean = layer.weight[0] @ x + layer.bias[0]
        variance = layer.log_variance[0].exp() @ x**2
        loss = loss + weight * 2 * ((mean - 0.5) ** 2 + variance) / 2
    loss.backward()
    for name, parameter in program.named_parameters():
        found = certificate.mean[f"program$$${name}"]
        torch.testing.assert_close(found, parameter.grad, rtol=1e-6, atol=1e-7)


def check_free_under_pyro() -> None:
    program = Program()
    nodes = poutine.trace(program).get_trace()
    nodes.compute_log_prob()
    assert nodes.nodes["layer"]["log_prob_sum"] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pyro says that the guide does not have the site
        loss = Trace_ELBO(num_particles=50).loss(lambda: program(1e4), no_guide)
    assert abs(loss / weight_kl(program).item() - 1e4) < 1e3


def test_the_site_costs_nothing_under_pyros_own_objectives() -> None:
    check_free_under_pyro()


def test_planted_cost_of_the_site_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist.torch_distribution.TorchDistributionMixin, "mask", lambda law, m: law)
    with pytest.raises(AssertionError):
        check_free_under_pyro()


def test_no_warning_says_that_the_guide_lacks_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TraceEstimator_ELBO(RLOO(2)).loss_and_grads(Program(), no_guide)


def regression() -> Training:
    """Two of five inputs matter. The weight of the KL grows from step to step."""
    x = torch.randn(100, 5)
    y = x[:, 1] - 2 * x[:, 3] + 0.5 * torch.randn(100)
    layer = SparseLinear("layer", 5, 1)
    beta = LinearAnnealing(1e-3, 1.0, num_steps=50)

    def model(rows: Tensor) -> None:
        pyro.module("layer", layer)
        cost("KL", beta.value * weight_kl(layer))
        with pyro.plate("data", 100, subsample=rows):
            pyro.sample("y", dist.Normal(layer(x[rows])[..., 0], 0.5), obs=y[rows])

    return Training(
        model,
        no_guide,
        ExpectedCost(),
        arguments=lambda step: (torch.arange(50) + 50 * (step % 2),),
        between=lambda step, optim: beta.step(),
    )


def test_a_recorded_step_is_the_eager_one() -> None:
    eager, recorded = train(regression, SVI), train(regression, compiled("replay"))
    assert recorded.svi.num_recordings == 1
    torch.testing.assert_close(recorded.losses.double(), eager.losses.double())
    torch.testing.assert_close(recorded.parameters, eager.parameters)


def test_training_leaves_signal_where_inputs_matter() -> None:
    trained = train(regression, compiled("replay"), steps=400)
    weight = trained.parameters["layer$$$weight"]
    log_alpha = trained.parameters["layer$$$log_variance"] - weight.square().log()
    assert (log_alpha < 0).tolist() == [[False, True, False, True, False]]
    torch.testing.assert_close(weight[0, [1, 3]], torch.tensor([1.0, -2.0]), atol=0.2, rtol=0)


# --- what is kept -----------------------------------------------------------------------------


def check_pruned(make: Callable[[], Any], event: tuple[int, ...]) -> None:
    layer, x = make().eval(), torch.randn(4, *event)
    expected = layer.log_variance - 2 * layer.weight.abs().log() < 3
    assert 0 < expected.sum() < expected.numel()
    pruned = layer.prune()
    assert torch.equal(pruned.weight != 0, expected)
    assert torch.equal(pruned.weight[expected], layer.weight[expected])
    assert torch.equal(pruned(x), layer(x))


@each_layer
def test_a_pruned_layer_is_the_layer_in_evaluation_mode(
    make: Callable[[], Any], event: tuple[int, ...]
) -> None:
    check_pruned(make, event)


def test_planted_pruning_of_the_wrong_side_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = property(lambda layer: layer.log_alpha >= layer.threshold)
    monkeypatch.setattr(AbstractSparse, "kept", wrong)
    with pytest.raises(AssertionError):
        check_pruned(*LAYERS["linear"])


@each_layer
def test_a_pruned_layer_is_torchs_own(make: Callable[[], Any], event: tuple[int, ...]) -> None:
    layer, before = make(), torch.get_rng_state()
    pruned = layer.prune()
    assert type(pruned) in (nn.Linear, nn.Conv2d)
    assert sorted(pruned.state_dict()) == ["bias", "weight"]
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        pruned.weight.zero_()
    assert layer.weight.abs().min() > 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: SparseLinear("l", 3, 2, bias=False, dtype=torch.float32),
        lambda: SparseLinear("l", 3, 2, device="meta"),
        lambda: SparseConv2d("c", 2, 4, (3, 1), groups=2, bias=False, padding_mode="circular"),
        lambda: SparseConv2d("c", 2, 4, 3, dilation=2, padding="same"),
    ],
)
def test_a_pruned_layer_has_all_options(make: Callable[[], Any]) -> None:
    layer = make()
    pruned = layer.prune()
    assert repr(pruned)[:-1] in repr(layer).replace("Sparse", "").replace(f"'{layer.name}', ", "")
    assert pruned.weight.dtype == layer.weight.dtype
    assert pruned.weight.device == layer.weight.device


def test_a_pruned_layer_stays_in_its_mode() -> None:
    layer = linear_layer()
    assert layer.prune().training
    assert not layer.eval().prune().training


def test_evaluation_mode_has_no_site() -> None:
    trace = poutine.trace(linear_layer().eval()).get_trace(torch.randn(4, 3))
    assert set(trace.nodes) == {"_INPUT", "_RETURN"}


def test_the_state_is_saved_and_loaded() -> None:
    layer, other = linear_layer(), SparseLinear("linear", 3, 2)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.log_alpha, layer.log_alpha)


def test_a_layer_without_a_name_is_refused() -> None:
    wrong: Any = 3
    with pytest.raises(NonDiffError, match="SparseLinear: the first argument is the name"):
        SparseLinear(wrong, 2, True)
    with pytest.raises(NonDiffError, match="SparseConv2d: the first argument is the name"):
        SparseConv2d(wrong, 2, 3, 3)
