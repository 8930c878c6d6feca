"""Ops in the worlds of an estimator: one run, a row a world, and the exact expectation.

::

    guide:  z = argmax(logits), randomised          model:  z ~ OneHotCategorical(prior)
                                                            h = step(z . w), cost(look_up(h))
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.estimators import REBAR, REINFORCE, RLOO, AbstractEstimator, DisARM
from pyro_nondiff.handlers import randomize, soften
from pyro_nondiff.infer import TraceEstimator_ELBO
from pyro_nondiff.ops import argmax, cost, external, select, step
from pyro_nondiff.testing import certify

pytestmark = pytest.mark.usefixtures("param_store")


@pytest.fixture
def exact() -> None:
    """As for all certificates."""
    if torch.get_default_dtype() != torch.float64:
        pytest.skip("an exact expectation is compared in float64")


TABLE = np.array([3.0, -1.0, 2.0])
W = torch.tensor([1.0, -0.5, 0.5])


def price(z: Tensor) -> float:
    """Looks a one-hot vector up: for one world and one element, it says if it gets another."""
    if z.shape != (3,):
        raise TypeError(f"one choice was expected, not {z.shape}")
    return float(TABLE[z.cpu().numpy().argmax()])


def prices(z: Tensor) -> np.ndarray:
    return TABLE[z.cpu().numpy().argmax(-1)]


@randomize(temperature=0.8)
def guide() -> None:
    logits = pyro.param("logits", torch.tensor([[0.4, -0.2, 0.1], [0.0, 1.0, 0.3]]))
    with pyro.plate("data", 2):
        argmax("z", logits)


def outside(batched: bool) -> Callable[[], None]:
    def model() -> None:
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.OneHotCategorical(logits=torch.zeros(2, 3)))
            fn = prices if batched else price
            cost("c", external("e", fn, z, event_dim=1, batched=batched))

    return model


def inside() -> None:
    with pyro.plate("data", 2):
        z = pyro.sample("z", dist.OneHotCategorical(logits=torch.zeros(2, 3)))
        h = step("h", (z * W).sum(-1))
        v = select(
            "v", torch.stack([h, 0.5 - h], -1), [lambda: (z * W).sum(-1) ** 2, lambda: 3 * h]
        )
        cost("c", select("u", z, torch.tensor(TABLE)) + v)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("worlds", ["vectorized", "sequential"])
@pytest.mark.parametrize("estimator", [REINFORCE(), RLOO(2)], ids=repr)
@pytest.mark.parametrize(
    "model", [outside(False), outside(True), inside], ids=["external", "batched", "ops"]
)
def test_estimate_through_ops_is_unbiased(
    model: Callable[[], None], estimator: AbstractEstimator, worlds: Any
) -> None:
    elbo = TraceEstimator_ELBO(estimator, worlds=worlds)
    assert certify(elbo, model, guide).bias < 1e-9  # the bound of DESIGN.md


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("worlds", ["vectorized", "sequential"])
@pytest.mark.parametrize("estimator", [RLOO(2), DisARM()], ids=repr)
def test_estimate_of_randomised_thresholds_is_unbiased(
    estimator: AbstractEstimator, worlds: Any
) -> None:
    @randomize(temperature=0.8)
    def guide() -> None:
        step("h", pyro.param("logits", torch.tensor([0.4, -0.2])), event_dim=1)

    def model() -> None:
        h = pyro.sample("h", dist.Bernoulli(torch.tensor([0.5, 0.5])).to_event(1))
        cost("c", external("e", lambda h: float(h[0] * 3 - h.prod()), h, event_dim=1))

    elbo = TraceEstimator_ELBO(estimator, worlds=worlds)
    assert certify(elbo, model, guide).bias < 1e-9  # the bound of DESIGN.md


def soft_model() -> None:
    with pyro.plate("data", 2):
        z = pyro.sample("z", dist.OneHotCategorical(logits=torch.zeros(2, 3)))
        h = step("h", (z * W).sum(-1))
        cost("c", select("u", z, torch.tensor(TABLE)) + h)


def test_threshold_in_a_soft_world_is_refused() -> None:
    """A control variate must be continuous: the hard op is not, and the error names its line."""
    elbo = TraceEstimator_ELBO(REBAR())
    with pytest.raises(NonDiffError, match="site 'z'"):
        elbo.differentiable_loss(soft_model, guide)


def test_softened_threshold_in_a_soft_world_is_accepted() -> None:
    elbo = TraceEstimator_ELBO(REBAR())
    loss = elbo.differentiable_loss(soften()(soft_model), guide)
    assert torch.autograd.grad(loss, pyro.param("logits").unconstrained())[0].abs().sum() > 0


def test_scores_may_have_more_dimensions_at_their_left() -> None:
    scores = torch.randn(5, 1, 2, 3)
    items = [lambda: torch.randn(2, 4), torch.randn(5, 1, 1, 4), torch.randn(4)]
    assert select("v", scores, items, event_dim=1).shape == (5, 1, 2, 4)
    with soften():
        assert select("v", scores, items, event_dim=1).shape == (5, 1, 2, 4)
