"""A certificate's figures, and that it rejects an estimator with a known bias."""

import math
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_nondiff.estimators import (
    REINFORCE,
    AbstractEstimator,
    Ask,
    DisARM,
    Draw,
    Enumerate,
    Estimate,
    NeuralBaseline,
)
from pyro_nondiff.infer import TraceEstimator_ELBO, planner
from pyro_nondiff.testing import certify, exact_moments

from ..certificates import programs
from ..certificates.programs import BERNOULLI, parameter

pytestmark = pytest.mark.usefixtures("param_store")

TOLERANCE = 1e-12
"""Sums of a few numbers of order 10 in float64."""


@dataclass(frozen=True)
class Shrunk(AbstractEstimator):
    """REINFORCE times a factor: its bias is known."""

    factor: float

    def ask(self, law: Any) -> Ask:
        return Ask()

    def estimate(self, draw: Draw, costs: Any, state: Any, context: Any) -> Estimate:
        return Estimate(weight=self.factor * costs[:1])


def test_known_bias_is_found() -> None:
    """The factor 1.02 leaves 2 % of the gradient."""
    pair = programs.one_site(BERNOULLI)
    certificate = certify(TraceEstimator_ELBO(Shrunk(1.02)), *pair)
    assert certificate.bias == pytest.approx(0.02 * abs(float(certificate.exact["a"])), abs=1e-12)
    assert certificate.bias > 1e-3
    assert certify(TraceEstimator_ELBO(Shrunk(1.0)), *pair).bias < TOLERANCE


def test_mean_and_variance_are_those_of_all_values() -> None:
    """One Bernoulli site, two values: the estimate of each is written out."""

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(0.3)))
        pyro.factor("f", -3 * z)

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=parameter("a", -0.4)))

    mean, variance, count = exact_moments(TraceEstimator_ELBO(REINFORCE()), model, guide)
    q, p = torch.tensor(-0.4).sigmoid(), torch.tensor(0.3).sigmoid()
    estimates = [
        (3 + q.log() - p.log()) * (1 - q),
        ((1 - q).log() - (1 - p).log()) * (0 - q),
    ]
    wanted = q * estimates[0] + (1 - q) * estimates[1]
    square = q * estimates[0] ** 2 + (1 - q) * estimates[1] ** 2
    assert count == 2
    assert float(mean["a"]) == pytest.approx(float(wanted), abs=TOLERANCE)
    assert float(variance["a"]) == pytest.approx(float(square - wanted**2), abs=TOLERANCE)


def test_total_variance_is_the_sum() -> None:
    certificate = certify(TraceEstimator_ELBO(DisARM()), *programs.chain(BERNOULLI))
    total = sum(float(variance.sum()) for variance in certificate.variance.values())
    assert certificate.total_variance == pytest.approx(total, abs=TOLERANCE)
    assert set(certificate.mean) == set(certificate.exact) == {"a", "b", "p"}


def test_the_average_over_many_steps_is_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is enumerated is what a user gets: by 100,000 draws, in one vectorised step.

    Each of three means is within 5 standard errors, but for 6 seeds in ten million.
    """
    draws = 100_000
    # the world check has tests of its own, and takes its time with so many worlds
    monkeypatch.setattr(planner, "check_worlds", lambda pair, chunk: None)
    pair = programs.reversed_layers(BERNOULLI)
    certificate = certify(TraceEstimator_ELBO(REINFORCE()), *pair)
    many = TraceEstimator_ELBO(REINFORCE(), num_particles=draws, worlds="vectorized")
    many.loss_and_grads(*pair)
    for name, mean in certificate.mean.items():
        error = float((certificate.variance[name] / draws).sqrt())
        gradient = pyro.param(name).unconstrained().grad
        assert gradient is not None
        assert abs(float(gradient - mean)) < 5 * error


def test_arguments_reach_the_programs() -> None:
    def model(x: torch.Tensor, shift: float) -> None:
        z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(0.3)))
        pyro.sample("x", dist.Normal(z + shift, 1.3), obs=x)

    def guide(x: torch.Tensor, shift: float) -> None:
        pyro.sample("z", dist.Bernoulli(logits=parameter("a", -0.4) * x + shift))

    elbo = TraceEstimator_ELBO(DisARM())
    first = certify(elbo, model, guide, torch.tensor(0.8), shift=0.1)
    second = certify(elbo, model, guide, torch.tensor(2.0), shift=-0.5)
    assert first.bias < TOLERANCE
    assert second.bias < TOLERANCE
    assert abs(float(first.exact["a"] - second.exact["a"])) > 1e-2


@pytest.mark.parametrize("kind", ["one_hot", "categorical"])
def test_variance_is_not_claimed_where_rows_are_coupled_otherwise(kind: str) -> None:
    """The mean needs no coupling; the variance of a categorical site behind a branch does."""
    structure = programs.reversed_layers(programs.KINDS[kind])
    certificate = certify(TraceEstimator_ELBO(Enumerate(), worlds="vectorized"), *structure)
    assert certificate.bias < TOLERANCE
    assert math.isnan(certificate.total_variance)
    one = certify(TraceEstimator_ELBO(Enumerate()), *programs.one_site(programs.KINDS[kind]))
    assert one.total_variance < TOLERANCE


def test_what_estimators_learn_is_not_judged() -> None:
    """The gradient that trains a baseline is no part of the ELBO's."""
    estimator = REINFORCE(NeuralBaseline(torch.nn.Linear(1, 1), input=lambda: torch.ones(1)))
    certificate = certify(TraceEstimator_ELBO(estimator), *programs.one_site(BERNOULLI))
    assert not [name for name in certificate.mean if name.startswith("estimator.")]
    assert certificate.bias < TOLERANCE
