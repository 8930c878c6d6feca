"""What REBAR learns lowers its exact variance, and reaches nothing but itself."""

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_nondiff import noise
from pyro_nondiff.estimators import REBAR, REINFORCE, RELAX, AbstractEstimator
from pyro_nondiff.infer import TraceEstimator_ELBO
from pyro_nondiff.testing import exact_gradient
from pyro_nondiff.testing.quadrature import Grid

from . import soft_programs as programs
from .soft_programs import SoftPair

NODES = np.arange(-16, 16.1, 1.0)
"""For variances to a per cent: the rule's error is exp(-2 pi^2 T), 5e-5 at temperature 0.5."""


def one_logit() -> SoftPair:
    """One Bernoulli, under a cost that is no linear function of it."""

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(1.5 * z * z + 0.4 * z, 1.0), obs=torch.tensor(1.5))

    return SoftPair(model, lambda: pyro.sample("z", dist.Bernoulli(logits=programs.a(1)[0])))


def moments(elbo: TraceEstimator_ELBO, pair: SoftPair) -> tuple[float, float]:
    """The exact mean and variance of the estimate, over both noises apart."""
    elbo.unreduced(*pair)
    grid = Grid(1, NODES, 1, coupled=False)
    with noise.source(grid):
        elbo.unreduced(*pair)
    grid.settle()
    many = TraceEstimator_ELBO(elbo.estimator, num_particles=grid.size, worlds="vectorized")
    many.states = elbo.states
    many.unreduced(*pair)
    with noise.source(grid):
        surrogate = many.unreduced(*pair).surrogate
    each = torch.eye(grid.size)
    logit = pyro.param("a").unconstrained()
    (gradient,) = torch.autograd.grad(surrogate, logit, each, is_grads_batched=True)
    mean = (grid.weight * gradient[:, 0]).sum()
    return float(mean), float((grid.weight * gradient[:, 0] ** 2).sum() - mean**2)


def objective(estimator: AbstractEstimator) -> TraceEstimator_ELBO:
    return TraceEstimator_ELBO(estimator, worlds="vectorized")


def variance_at(pair: SoftPair, temperature: float, eta: float, like: Any) -> float:
    """The exact variance of REBAR with given numbers, and the baseline of a trained state."""
    elbo = objective(REBAR(temperature, eta))
    state = dict(like)
    state["z.log_temperature"] = torch.tensor(math.log(temperature))
    state["z.eta"] = torch.tensor(eta)
    elbo.states.load_state_dict(state)
    return moments(elbo, pair)[1]


@pytest.mark.parametrize("estimator", [REINFORCE(), REBAR(), RELAX()], ids=repr)
def test_mean_over_both_noises_is_exact(estimator: AbstractEstimator) -> None:
    pair = one_logit()
    mean, _ = moments(objective(estimator), pair)
    exact = float(exact_gradient(*pair)["a"])
    assert math.isclose(
        mean, exact, rel_tol=0, abs_tol=1e-3
    )  # the rule's error times the cost's slope


def test_rebar_at_its_best_eta_varies_less_than_reinforce() -> None:
    pair = one_logit()
    _, plain = moments(objective(REINFORCE()), pair)
    etas = (0.0, 0.25, 0.5, 0.75, 1.0)
    found = {eta: moments(objective(REBAR(0.5, eta)), pair)[1] for eta in etas}
    assert math.isclose(found[0.0], plain, rel_tol=1e-3)  # without its control variate
    assert min(found.values()) < 0.9 * plain


def test_learnt_temperature_and_eta_are_nearly_the_best() -> None:
    pair = one_logit()
    elbo = TraceEstimator_ELBO(REBAR(), num_particles=100, worlds="vectorized")
    elbo.unreduced(*pair)
    learnt = torch.optim.Adam(elbo.states.parameters(), lr=0.03)
    for step in range(400):
        learnt.param_groups[0]["lr"] = 0.03 * (1 - step / 400)
        learnt.zero_grad()
        elbo.differentiable_loss(*pair).backward()
        learnt.step()
    state = elbo.states.state_dict()
    single = objective(REBAR())
    single.states = elbo.states
    _, reached = moments(single, pair)
    temperatures, etas = [0.5, 1.0, 2.0, 4.0], [0.0, 0.25, 0.5, 1.0]
    grid = [variance_at(pair, t, eta, state) for t in temperatures for eta in etas]
    assert reached < 1.1 * min(grid)


def fixed_noise(request: noise.Request) -> Tensor:
    """The same noise for a site and a role, whoever asks."""
    generator = torch.Generator().manual_seed(len(request.site) + (request.role == "v"))
    return torch.logit(torch.rand(request.shape, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("estimator", [REBAR(), REBAR(second_order=True), RELAX()], ids=repr)
@pytest.mark.parametrize("worlds", ["vectorized", "sequential"])
def test_nothing_leaks_into_the_model(estimator: AbstractEstimator, worlds: Any) -> None:
    """The model's gradient beside a control variate is that beside REINFORCE."""
    pair = programs.two_sites()
    found = []
    for each in (REINFORCE(), estimator):
        elbo = TraceEstimator_ELBO(each, worlds=worlds, num_particles=3)
        elbo.differentiable_loss(pair.model, pair.guide)
        with noise.source(fixed_noise):
            loss = elbo.differentiable_loss(pair.model, pair.guide)
        found.append(torch.autograd.grad(loss, pyro.param("m").unconstrained())[0])
    # the same sums in the same order, but for zeros
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["log_temperature", "eta"])
def test_second_order_trains_on_the_slope_of_the_variance(name: str) -> None:
    """The own loss is the squared estimate: its gradient is that of a difference quotient."""
    pair = one_logit()
    elbo = objective(REBAR(temperature=0.7, eta=0.6, second_order=True))
    elbo.unreduced(*pair)
    parameter = dict(elbo.states.named_parameters())[f"z.{name}"]

    def squared() -> Tensor:
        with noise.source(fixed_noise):
            (own,) = elbo.unreduced(*pair).own_losses
        return own

    (slope,) = torch.autograd.grad(squared(), parameter)
    step, values = 1e-5, []
    for move in (step, -2 * step):
        parameter.data += move
        values.append(float(squared().detach()))
    # a central difference: an error of step^2 times a third derivative of order 10
    assert math.isclose(float(slope), (values[0] - values[1]) / (2 * step), rel_tol=1e-6)


@pytest.mark.parametrize(
    ("estimator", "pair"),
    [
        (REBAR(), programs.two_sites()),
        (RELAX(), programs.reversed_model()),
        (REBAR(), programs.one_hot()),
    ],
    ids=["two sites", "reversed", "one-hot"],
)
def test_monte_carlo_agrees(estimator: AbstractEstimator, pair: SoftPair) -> None:
    """Twenty means of 5,000 draws: nothing of the quadrature is used."""
    elbo = TraceEstimator_ELBO(estimator, worlds="vectorized", num_particles=5000)
    found = []
    for _ in range(20):
        loss = elbo.differentiable_loss(*pair)
        found.append(torch.autograd.grad(loss, pyro.param("a").unconstrained())[0])
    draws = torch.stack(found)
    exact = exact_gradient(*pair)["a"]
    error = draws.std(0) / math.sqrt(len(draws))
    t = (draws.mean(0) - exact)[error > 0] / error[error > 0]
    assert float(t.abs().max()) < 8  # with 19 degrees of freedom: 2e-7 for each number
    # power: a bias of a fifth of the gradient would show at 5 standard errors or more
    assert float(error.max()) < 0.04 * float(exact.abs().max())


@pytest.mark.parametrize("estimator", [REBAR(), REBAR(second_order=True)], ids=repr)
@pytest.mark.parametrize(
    "pair", [programs.two_sites(), programs.normal_between()], ids=["", "normal"]
)
def test_worlds_run_apart_agree(pair: SoftPair, estimator: AbstractEstimator) -> None:
    """With the same noise, soft worlds give the same estimate together and one by one."""
    found = []
    modes: tuple[Any, ...] = ("vectorized", "sequential")
    for worlds in modes:
        elbo = TraceEstimator_ELBO(estimator, worlds=worlds)
        elbo.differentiable_loss(*pair)
        with noise.source(fixed_noise):
            loss = elbo.differentiable_loss(*pair)
        found.append(torch.autograd.grad(loss, pyro.param("a").unconstrained())[0])
    # the same operations on the same numbers, summed in another order
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-10)
