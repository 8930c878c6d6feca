"""``ExpectedCost`` as an objective: its options, what it refuses, and how it is trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor, nn

from pyro_nondiff import handlers
from pyro_nondiff.distributions import ExponentialAnnealing, LinearAnnealing, entropy
from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.estimators import (
    REBAR,
    REINFORCE,
    RELAX,
    RLOO,
    DisARM,
    Enumerate,
    MovingAverage,
)
from pyro_nondiff.infer import ExpectedCost, no_guide
from pyro_nondiff.ops import cost
from tests.certificates.programs import parameter

pytestmark = pytest.mark.usefixtures("param_store")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws from a seed, and goes on behind it as if nothing had been drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def choice() -> None:
    """One decision, better without it."""
    z = pyro.sample("z", dist.Bernoulli(logits=parameter("a", 0.4)))
    cost("price", 2 * z**2)


# --- the entropy bonus ------------------------------------------------------------------------


def decisions(bonus: Any = None) -> Any:
    """Laws of many shapes; with a bonus, the entropy of each is a cost before the site."""
    kept = torch.tensor([True, False])

    def sample(name: str, law: Any) -> Tensor:
        if bonus is not None:
            cost(f"entropy of {name}", -bonus * entropy(law))
        return pyro.sample(name, law)

    def program() -> None:
        a, b = parameter("a", 0.4), parameter("b", -0.3)
        first = sample("z1", dist.Bernoulli(logits=a))
        bits = torch.stack([b + 0 * first, a - 2 * first], -1)
        second = sample("z2", dist.Bernoulli(logits=bits).to_event(1).mask(first > 0))
        x = sample("x", dist.Normal((b * first).unsqueeze(-1), a.exp()).to_event(1))
        cost("early", (second.sum(-1) - x[..., 0]) ** 2)
        with pyro.plate("data", 5, subsample=torch.tensor([1, 4])), poutine.mask(mask=kept):
            law = dist.OneHotCategorical(logits=torch.stack([a * first, b + 0 * first], -1))
            third = sample("z3", law.expand((*first.shape[:-1], 2)))
            cost("each", third[..., 0] * (1 + first))

    return program


@pytest.mark.parametrize("worlds", ["vectorized", "sequential"])
@pytest.mark.parametrize("estimator", [REINFORCE(), RLOO(2), Enumerate()], ids=repr)
@pytest.mark.parametrize("bonus", [0.7, torch.tensor(0.7), LinearAnnealing(0.7, 0.0, num_steps=5)])
def test_entropy_bonus_is_a_cost_before_each_site(bonus: Any, estimator: Any, worlds: Any) -> None:
    """Loss and gradient are the same, draw by draw: so are their expectations."""
    objective = ExpectedCost(estimator, entropy_bonus=bonus, worlds=worlds)
    explicit = ExpectedCost(estimator, worlds=worlds)
    found = draws(objective, decisions())
    torch.testing.assert_close(found, draws(explicit, decisions(0.7)))
    assert float((found - draws(explicit, decisions())).abs().max()) > 1e-2


def draws(objective: ExpectedCost, program: Any) -> Tensor:
    """The loss and the gradients of six draws."""
    objective.differentiable_loss(program, no_guide)
    found = []
    for seed in range(6):
        with seeded(seed):
            loss = objective.differentiable_loss(program, no_guide)
        leaves = [pyro.param("a"), pyro.param("b")]
        found += [loss.detach(), *torch.autograd.grad(loss, leaves)]
    return torch.stack(found)


@pytest.mark.parametrize("estimator", [REBAR(), RELAX()], ids=repr)
def test_entropy_bonus_in_soft_worlds(estimator: Any) -> None:
    """A soft value decides the entropy of the next law, and its slope counts."""

    def program(bonus: float | None) -> Any:
        def run() -> None:
            z = pyro.sample("z", dist.Bernoulli(logits=parameter("a", 0.4)))
            law = dist.Bernoulli(logits=parameter("b", -0.3) + 1.5 * z)
            if bonus is not None:
                cost("entropy of z", -bonus * dist.Bernoulli(logits=parameter("a", 0.4)).entropy())
                cost("entropy of y", -bonus * law.entropy())
            y = pyro.sample("y", law)
            cost("price", (y - 0.3 * z) ** 2)

        return run

    gradients = []
    first = ExpectedCost(estimator, entropy_bonus=0.7)
    second = ExpectedCost(estimator)
    for elbo, run in [(first, program(None)), (second, program(0.7))]:
        elbo.differentiable_loss(run, no_guide)
        if elbo is second:
            second.states.load_state_dict(first.states.state_dict())
        kept = {k: v.clone() for k, v in elbo.states.state_dict().items()}
        with seeded(7):
            loss = elbo.differentiable_loss(run, no_guide)
        elbo.states.load_state_dict(kept)
        leaves = [pyro.param("a"), pyro.param("b")]
        gradients.append(torch.stack(torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_schedule_is_read_at_each_step() -> None:
    bonus = LinearAnnealing(1.0, 0.0, num_steps=4)
    objective = ExpectedCost(Enumerate(), entropy_bonus=bonus)
    plain = ExpectedCost(Enumerate())
    height = dist.Bernoulli(logits=torch.tensor(0.4)).entropy()
    for n in range(6):
        with seeded(n):
            with_bonus = objective.loss(choice, no_guide)
        with seeded(n):
            expected = plain.loss(choice, no_guide) - max(1 - n / 4, 0) * float(height)
        assert with_bonus == pytest.approx(expected)
        bonus.step()


def test_a_schedule_that_is_no_linear_one() -> None:
    bonus = ExponentialAnnealing(0.5, 0.1, num_steps=3)
    assert ExpectedCost(entropy_bonus=bonus)._bonus() == bonus.value


def test_a_law_without_entropy_is_named() -> None:
    def counting() -> None:
        n = pyro.sample("n", dist.Poisson(parameter("a", 0.4).exp()))
        cost("price", n)

    ExpectedCost(RLOO(2)).loss_and_grads(counting, no_guide)
    with pytest.raises(NonDiffError, match="site 'n': its law Poisson has no entropy"):
        ExpectedCost(RLOO(2), entropy_bonus=0.1).loss_and_grads(counting, no_guide)
    ExpectedCost(RLOO(2), entropy_bonus=0).loss_and_grads(counting, no_guide)


def test_the_bonus_keeps_a_policy_from_collapsing() -> None:
    """Its optimum is known: the logit is the difference of the costs over the bonus."""
    objective = ExpectedCost(Enumerate(), entropy_bonus=0.5)
    svi = SVI(choice, no_guide, pyro.optim.Adam({"lr": 0.1}), objective)
    for _ in range(500):
        svi.step()
    assert float(pyro.param("a").detach()) == pytest.approx(-2 / 0.5, abs=0.05)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("discount", [0.0, -0.5, 1.01, float("nan"), float("inf")])
def test_bad_discount(discount: float) -> None:
    with pytest.raises(NonDiffError, match=r"discount must lie in \(0, 1\]"):
        ExpectedCost(discount=discount)


@pytest.mark.parametrize(
    "method", ["loss", "differentiable_loss", "loss_and_grads", "unreduced", "site_gradients"]
)
def test_a_guide_that_draws(method: str) -> None:
    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(0.3))

    with pytest.raises(NonDiffError, match=r"the guide draws \['z'\].*give no_guide"):
        getattr(ExpectedCost(RLOO(2)), method)(choice, guide)


def test_a_program_without_sites() -> None:
    with pytest.raises(NonDiffError, match="no sample site"):
        ExpectedCost(RLOO(2)).loss(no_guide, no_guide)


def test_a_program_without_decisions() -> None:
    def program() -> None:
        cost("price", parameter("a", 0.4) ** 2)

    loss = ExpectedCost(RLOO(2)).differentiable_loss(program, no_guide)
    (gradient,) = torch.autograd.grad(loss, pyro.param("a"))
    assert float(gradient) == pytest.approx(0.8)


# --- as an objective ----------------------------------------------------------------------------


class Policy(nn.Module):
    """A program that is a module."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.4, -0.2]))

    def forward(self, size: int) -> None:
        pyro.module("policy", self)
        with pyro.plate("data", size):
            law = dist.OneHotCategorical(logits=self.logits)
            z = pyro.sample("z", law)
            cost("price", (z * torch.tensor([1.0, 0.0])).sum(-1) ** 2)


def test_as_a_module() -> None:
    policy = Policy()
    module = ExpectedCost(RELAX())(policy)
    module(3).backward()
    names = {name for name, _ in module.named_parameters()}
    assert "model.logits" in names
    assert "estimators.z.log_temperature" in names
    assert policy.logits.grad is not None
    assert {name.split(".")[0] for name in module.state_dict()} == {"model", "estimators"}

    other = ExpectedCost(RELAX())(Policy())
    other.load_state_dict(module.state_dict())  # what is learnt waits for the first step
    other(3)
    loaded = other.estimators.state_dict()["z.log_temperature"]
    torch.testing.assert_close(loaded, module.estimators.state_dict()["z.log_temperature"])


def test_trained_by_an_optimiser_of_torch() -> None:
    policy = Policy()
    module = ExpectedCost(REBAR())(policy)
    module(4)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        module(4).backward()
        optimizer.step()
    assert float(policy.logits.detach().softmax(-1)[1]) > 0.9


@pytest.mark.parametrize("estimator", [REINFORCE(MovingAverage()), RLOO(4), DisARM(), REBAR()])
def test_in_svi(estimator: Any) -> None:
    svi = SVI(choice, no_guide, pyro.optim.Adam({"lr": 0.1}), ExpectedCost(estimator))
    before = svi.evaluate_loss()
    for _ in range(60):
        svi.step()
    assert before >= 0
    assert float(pyro.param("a").detach()) < -1


def test_evaluation_takes_the_most_probable_value() -> None:
    objective, greedy = ExpectedCost(RLOO(2)), handlers.mode()(choice)
    assert objective.loss(greedy, no_guide) == 2.0
    pyro.param("a").data.fill_(-0.4)
    assert objective.loss(greedy, no_guide) == 0.0


@pytest.mark.parametrize("handler", [handlers.mode(), handlers.given({"z": torch.tensor(1.0)})])
def test_a_handler_around_the_objective_comes_too_late(handler: Any) -> None:
    """It would do nothing, in silence."""
    with (
        pytest.raises(NonDiffError, match="around an objective, which has drawn site 'z'"),
        handler,
    ):
        ExpectedCost(RLOO(2)).loss(choice, no_guide)


def test_costs_that_are_counts() -> None:
    """Integers are numbers: a program need not say so."""

    def program() -> None:
        law = dist.Categorical(logits=torch.stack([parameter("a", 0.4), torch.tensor(0.0)], -1))
        with pyro.plate("data", 3):
            cost("price", pyro.sample("z", law))

    loss = ExpectedCost(RLOO(2), worlds="vectorized").differentiable_loss(program, no_guide)
    assert loss.dtype == torch.get_default_dtype()
    torch.autograd.grad(loss, pyro.param("a"))


def test_loss_of_many_particles_is_their_mean() -> None:
    objective = ExpectedCost(RLOO(2), num_particles=20_000)
    expected = 2 * float(torch.tensor(0.4).sigmoid())
    # the standard error is 0.007
    assert objective.loss(choice, no_guide) == pytest.approx(expected, abs=0.04)
