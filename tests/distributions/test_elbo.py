"""Straight-through laws in an ELBO: its value is the true one, and it ends at the posterior.

Training is without randomness: the particles of a step take their values in proportion to their
probabilities, so that a step's gradient is its expectation but for ``1 / PARTICLES``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_nondiff import noise
from pyro_nondiff.distributions import (
    RelaxedBernoulli,
    RelaxedOneHotCategorical,
    StraightThroughBernoulli,
    StraightThroughOneHotCategorical,
)
from pyro_nondiff.estimators import StraightThrough
from pyro_nondiff.infer import TraceEstimator_ELBO, config_estimator
from pyro_nondiff.noise import Request
from pyro_nondiff.testing import exact_loss

PARTICLES = 1000
STEPS = 150

CLOSE, FAR = 0.005, 0.05
"""Distances from the exact posterior. Proportions of 1000 particles are within 0.001 of the
probabilities, and 0.0006 is what is found. The issue asks for 0.02."""

Program = Callable[[], None]


@dataclass(frozen=True)
class Target:
    """A prior that is not uniform, and a likelihood of one observation.

    Arguments:
        prior: Logits of the prior.
        likelihood: The log-likelihood of each corner.
        slope: The log-likelihood as a function of a value with a gradient.
    """

    prior: Tensor
    observe: Callable[[Tensor], None]
    likelihood: Tensor

    @property
    def posterior(self) -> Tensor:
        """The exact posterior of a one-hot value."""
        return (self.prior.log_softmax(-1) + self.likelihood).softmax(-1)

    @property
    def evidence(self) -> Tensor:
        """The logarithm of the evidence."""
        return (self.prior.log_softmax(-1) + self.likelihood).logsumexp(-1)


def one_hot_target(cost: str) -> Target:
    """A 5-way choice. A factor is linear in the value, and a normal law's score is quadratic."""
    prior = torch.tensor([0.9, -0.6, 0.2, -1.2, 0.5])
    means = torch.tensor([-1.0, 0.4, 1.1, 2.0, -0.3])
    normal = dist.Normal(means, 0.8).log_prob(torch.tensor(0.7))

    def observe(z: Tensor) -> None:
        if cost == "linear":
            pyro.factor("x", (z * normal).sum(-1))
        else:
            pyro.sample("x", dist.Normal((z * means).sum(-1), 0.8), obs=torch.tensor(0.7))

    return Target(prior, observe, normal)


def bernoulli_target(cost: str) -> Target:
    """A coin, as a one-hot choice between 0 and 1."""
    normal = dist.Normal(torch.tensor([-0.5, 1.5]), 1.1).log_prob(torch.tensor(0.9))

    def observe(z: Tensor) -> None:
        if cost == "linear":
            pyro.factor("x", normal[0] + z * (normal[1] - normal[0]))
        else:
            pyro.sample("x", dist.Normal(2 * z - 0.5, 1.1), obs=torch.tensor(0.9))

    return Target(torch.tensor([0.0, -1.4]), observe, normal)


def target_of(kind: str, cost: str) -> Target:
    return one_hot_target(cost) if kind == "one_hot" else bernoulli_target(cost)


def law_of(kind: str, logits: Tensor, gradient: str | None) -> Any:
    """A straight-through law, or Pyro's own; a coin's logit is the difference of two."""
    if kind == "one_hot":
        if gradient is None:
            return dist.OneHotCategorical(logits=logits)
        return StraightThroughOneHotCategorical(logits=logits, gradient=gradient)
    odds = logits[1] - logits[0]
    if gradient is None:
        return dist.Bernoulli(logits=odds)
    return StraightThroughBernoulli(logits=odds, gradient=gradient)


def pair(
    kind: str, target: Target, in_model: str | None, in_guide: str | None
) -> tuple[Program, Program]:
    """A model and a guide, with straight-through laws where a gradient is given."""

    def model() -> None:
        target.observe(pyro.sample("z", law_of(kind, target.prior, in_model)))

    def guide() -> None:
        logits = pyro.param("logits", torch.zeros_like(target.prior))
        pyro.sample("z", law_of(kind, logits, in_guide))

    return model, guide


def in_proportion(request: Request) -> Tensor:
    """Noise whose values come in proportion to their probabilities."""
    law: Any = request.law
    count = torch.Size(request.shape).numel() // law.event_shape.numel()
    points = (torch.arange(count, dtype=request.dtype) + 0.5) / count
    if request.kind == "logistic":
        return points.logit().reshape(request.shape)
    probs = law.probs.detach().reshape(-1, law.probs.shape[-1])[0]
    index = (probs.cumsum(-1)[:-1] <= points.unsqueeze(-1)).sum(-1)
    return torch.nn.functional.one_hot(index, len(probs)).to(probs).mul(1e4).reshape(request.shape)


def objective(name: str, kind: str, target: Target, gradient: str) -> tuple[Any, Program, Program]:
    """An ELBO with its programs: the estimator from outside, or the law on both sides."""
    if name == "estimator":
        model, guide = pair(kind, target, None, None)
        elbo: Any = TraceEstimator_ELBO(num_particles=PARTICLES, worlds="vectorized")
        return elbo, model, config_estimator(guide, {"z": StraightThrough(gradient)})
    options = {"vectorize_particles": True, "max_plate_nesting": 0}
    model, guide = pair(kind, target, gradient, gradient)
    return Trace_ELBO(num_particles=PARTICLES, **options), model, guide


def train(elbo: Any, model: Program, guide: Program) -> float:
    """Trains without randomness. The loss at the end comes back."""
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.2, "lrd": 0.98}), elbo)
    loss = 0.0
    with noise.source(in_proportion):
        for _ in range(STEPS):
            loss = svi.step()
    return loss


def distance(target: Target) -> float:
    """How far the guide is from the exact posterior, at the probability that is worst."""
    found = pyro.param("logits").detach().softmax(-1)
    return float((found - target.posterior).abs().max())


UNBIASED = [
    ("identity", "linear"),
    ("softmax", "linear"),
    ("reinmax", "linear"),
    ("reinmax", "quadratic"),
]
"""Gradients that have no bias, at temperature 1, for a log-likelihood of this degree; what the
prior and the guide add is linear."""


@pytest.mark.usefixtures("param_store")
@pytest.mark.parametrize("name", ["estimator", "pyro"])
@pytest.mark.parametrize(("gradient", "cost"), UNBIASED)
@pytest.mark.parametrize("kind", ["one_hot", "bernoulli"])
def test_training_ends_at_the_posterior(kind: str, gradient: str, cost: str, name: str) -> None:
    target = target_of(kind, cost)
    elbo, model, guide = objective(name, kind, target, gradient)
    loss = train(elbo, model, guide)
    assert distance(target) < CLOSE
    # at the posterior every value has the same ratio, so that the loss of each is the evidence:
    # a gap of 0.005 in the probabilities is one of order its square in the loss
    assert loss == pytest.approx(-float(target.evidence), abs=1e-3)


@pytest.mark.usefixtures("param_store")
@pytest.mark.parametrize("gradient", ["identity", "selected"])
def test_training_ends_elsewhere_with_a_biased_gradient(gradient: str) -> None:
    """The test above can fail."""
    target = one_hot_target("quadratic")
    train(*objective("estimator", "one_hot", target, gradient))
    assert distance(target) > FAR


@pytest.mark.usefixtures("param_store")
def test_a_model_that_looks_the_value_up_misleads_pyro_s_objective() -> None:
    """Why our law is put on both sides: the loss is right, and the gradient is not."""
    target = one_hot_target("linear")
    model, guide = pair("one_hot", target, None, "identity")
    options = {"vectorize_particles": True, "max_plate_nesting": 0}
    elbo = Trace_ELBO(num_particles=PARTICLES, **options)
    train(elbo, model, guide)
    assert distance(target) > FAR


@pytest.mark.usefixtures("param_store")
@pytest.mark.parametrize("name", ["estimator", "pyro"])
@pytest.mark.parametrize("gradient", ["identity", "selected", "gumbel", "gumbel_rao", "reinmax"])
@pytest.mark.parametrize("kind", ["one_hot", "bernoulli"])
def test_the_loss_is_the_true_one(kind: str, gradient: str, name: str) -> None:
    """Whatever the gradient: a guide away from the posterior, against enumeration."""
    target = target_of(kind, "quadratic")
    elbo, model, guide = objective(name, kind, target, gradient)
    pyro.param("logits", torch.linspace(-1, 0.5, len(target.prior)))
    expected = float(exact_loss(*pair(kind, target, None, None)).detach())
    with noise.source(lambda r: in_proportion(r) if r.role == "u" else torch.zeros(r.shape)):
        found = float(elbo.differentiable_loss(model, guide).detach())
    # proportions are within 1/1000 of five probabilities, and losses within 5 of each other
    assert found == pytest.approx(expected, abs=5e-3)


LAWS = {
    "bernoulli": lambda logits: StraightThroughBernoulli(logits=logits).to_event(1),
    "one_hot": lambda logits: StraightThroughOneHotCategorical(logits=logits),
    "gumbel": lambda logits: StraightThroughOneHotCategorical(logits=logits, gradient="gumbel"),
    "relaxed bernoulli": lambda logits: RelaxedBernoulli(
        0.1, logits=logits, straight_through=True
    ).to_event(1),
    "relaxed one_hot": lambda logits: RelaxedOneHotCategorical(
        0.1, logits=logits, straight_through=True
    ),
}


@pytest.mark.parametrize("plain_model", [True, False])
@pytest.mark.parametrize("name", LAWS)
def test_divergence_from_itself_reads_zero(name: str, plain_model: bool) -> None:
    """For every draw, and not in the mean alone. Of a density it would read 0.7 to 10 nats."""
    logits = torch.tensor([0.5, -1.0, 1.3])

    def guide() -> None:
        pyro.sample("z", LAWS[name](logits))

    def model() -> None:
        if not plain_model:
            guide()
        elif "bernoulli" in name:
            pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))
        else:
            pyro.sample("z", dist.OneHotCategorical(logits=logits))

    for elbo in (Trace_ELBO(), TraceEstimator_ELBO()):
        for _ in range(20):
            # rounding of three scores of order 1
            assert abs(elbo.loss(model, guide)) <= 1e-6
