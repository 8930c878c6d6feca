"""What may be done to the parameters of a compiled SVI between its steps, and to how they lie."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoIAFNormal, AutoMultivariateNormal
from pyro.nn import PyroModule
from pyro.optim import SGD, Adam
from torch import Tensor, nn

from pyro_nondiff.estimators import RLOO
from pyro_nondiff.infer import TraceEstimator_ELBO
from tests.infer.reading_programs import runs_eager
from tests.infer.side_by_side import Training, compiled, same, train

pytestmark = pytest.mark.usefixtures("param_store")


def batch(step: int) -> Tensor:
    return torch.rand(4, 3, generator=torch.Generator().manual_seed(step))


def training(
    encoder: nn.Module,
    change: Callable[[int], Any] = lambda step: None,
    data: Callable[[int], Tensor] = batch,
    decoder: nn.Module | None = None,
    **options: Any,
) -> Training:
    decoder = decoder or nn.Linear(3, 3)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            logits = encoder(x.reshape(2, -1).reshape(4, 3))
            pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))

    return Training(
        model,
        guide,
        TraceEstimator_ELBO(RLOO(2)),
        arguments=lambda step: (data(step),),
        between=lambda step, optim: change(step),
        **options,
    )


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_parameters_are_frozen_and_freed(part: str) -> None:
    def make() -> Training:
        encoder = nn.Linear(3, 3)
        return training(
            encoder, lambda step: getattr(encoder, part).requires_grad_(step not in (3, 4, 5))
        )

    assert same(make, steps=12).num_recordings == 2


def test_a_tensor_gets_another_shape_where_it_is() -> None:
    def make() -> Training:
        scale = torch.ones(3)

        class Encoder(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * scale.sum()

        encoder = Encoder(3, 3)

        def change(step: int) -> None:
            if step == 4:
                scale.resize_(1)

        return training(encoder, change)

    assert same(make, steps=10).num_recordings == 2


def test_data_may_lie_in_memory_in_any_way() -> None:
    def make() -> Training:
        return training(
            nn.Linear(3, 3),
            data=lambda step: batch(step) if step % 2 else batch(step).t().contiguous().t(),
        )

    assert same(make).num_recordings == 2


def test_a_hook_on_a_gradient_is_called() -> None:
    def make() -> Training:
        encoder = nn.Linear(3, 3)

        def change(step: int) -> None:
            if step == 3:
                encoder.weight.register_hook(lambda gradient: gradient * 0)

        return training(encoder, change, optim=SGD({"lr": 0.1}))

    runs_eager(make, "encoder.*weight has a hook on its gradient")


def test_no_gradient_is_wanted() -> None:
    def trained(kind: Callable[..., Any]) -> Tensor:
        made = train(lambda: training(nn.Linear(3, 3)), kind)
        with torch.no_grad():
            for step in range(3):
                made.svi.step(batch(step))
        return pyro.param("encoder$$$weight").detach().clone()

    torch.testing.assert_close(trained(compiled("replay")), trained(SVI))


def test_a_parameter_of_two_names_moves_once() -> None:
    def make() -> Training:
        encoder, decoder = nn.Linear(3, 3), nn.Linear(3, 3)
        decoder.weight = encoder.weight
        return training(encoder, decoder=decoder)

    assert same(make).num_recordings == 1


@pytest.mark.filterwarnings("ignore:grad and param do not obey")
def test_a_parameter_is_transposed_where_it_is() -> None:
    """Torch's fused optimisers take memory as it lies, whatever the strides of the state."""

    def make() -> Training:
        encoder = nn.Linear(3, 3)

        def change(step: int) -> None:
            if step == 3:
                encoder.weight.data = encoder.weight.data.t()

        return training(encoder, change, optim=Adam({"lr": 0.05}))

    same(make, steps=10)


def regression(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1)).sum()
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, scale), obs=x.sum(-1))


@pytest.mark.parametrize("guide", [AutoDiagonalNormal, AutoMultivariateNormal, AutoIAFNormal])
def test_guides_with_parameters_of_torch(guide: Any) -> None:
    """Pyro's modules show a parameter to the store if it is one of torch's."""

    def make() -> Training:
        return Training(
            regression, guide(regression), Trace_ELBO(), arguments=lambda step: (batch(step),)
        )

    assert same(make).num_recordings >= 1


def test_layers_of_a_pyro_module() -> None:
    class Encoder(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = PyroModule[nn.Linear](3, 3)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Bernoulli(logits=self.layer(x)).to_event(1))

    def make() -> Training:
        made = training(nn.Linear(3, 3))
        return Training(made.model, Encoder(), made.loss, arguments=made.arguments)

    assert same(make).num_recordings == 1
