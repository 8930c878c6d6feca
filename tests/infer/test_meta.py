"""Whole steps on ``device="meta"``: no tensor is made elsewhere, and no value is read."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_nondiff.estimators import (
    REBAR,
    REINFORCE,
    RELAX,
    RLOO,
    AbstractEstimator,
    Auto,
    DisARM,
    Enumerate,
    MovingAverage,
    NeuralBaseline,
)
from pyro_nondiff.infer import TraceEstimator_ELBO

NET = nn.Linear(4, 1, device="meta")
ESTIMATORS = [
    REINFORCE(),
    REINFORCE(MovingAverage()),
    REINFORCE(MovingAverage() + NeuralBaseline(NET, input=lambda x: x, normalise=True)),
    RLOO(2),
    DisARM(),
    Enumerate(),
    REBAR(),
    REBAR(second_order=True),
    RELAX(),
    RELAX(relaxed_cost=False),
    Auto(),
]


class Program(nn.Module):
    """Bernoullis, normals behind them and Bernoullis again, in a plate, scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3, device="meta")
        self.middle = nn.Linear(3, 2, device="meta")
        self.decoder = nn.Linear(2, 4, device="meta")

    def model(self, x: Tensor) -> None:
        half = torch.full((), 0.5, device="meta")
        with pyro.plate("data", 6, device="meta"), poutine.scale(scale=2.0):
            z = pyro.sample("z", dist.Bernoulli(half.expand(3)).to_event(1))
            n = pyro.sample("n", dist.Normal(self.middle(z), half).to_event(1))
            y = pyro.sample("y", dist.Bernoulli(logits=n).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(y + n), half).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", 6, device="meta"):
            z = pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))
            n = pyro.sample("n", dist.Normal(self.middle(z), self.middle(z).exp()).to_event(1))
            pyro.sample("y", dist.Bernoulli(logits=n).to_event(1))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("particles", [1, 2])
def test_step(estimator: AbstractEstimator, particles: int) -> None:
    program, x = Program(), torch.zeros(6, 4, device="meta")
    elbo = TraceEstimator_ELBO(estimator, num_particles=particles, worlds="vectorized")
    with pyro.validation_enabled(False):  # validation reads values
        for _ in range(2):
            loss = elbo.differentiable_loss(program.model, program.guide, x)
            loss.backward()
    assert loss.is_meta
    assert all(p.grad is not None and p.grad.is_meta for p in program.parameters())
    assert all(value.is_meta for value in elbo.states.state_dict().values())


def test_reading_a_value_is_seen() -> None:
    program, x = Program(), torch.zeros(6, 4, device="meta")

    def reading(x: Tensor) -> None:
        program.model(x)
        x.sum().item()

    with pyro.validation_enabled(False), pytest.raises(RuntimeError, match="meta"):
        TraceEstimator_ELBO(RLOO(2)).differentiable_loss(reading, program.guide, x)
