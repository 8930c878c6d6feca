"""Sites that the model alone draws: the exact expectation of their estimators."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_nondiff import distributions, handlers
from pyro_nondiff.estimators import (
    REBAR,
    REINFORCE,
    RELAX,
    RLOO,
    DisARM,
    Enumerate,
    MeasureValued,
)
from pyro_nondiff.infer import ExpectedCost, TraceEstimator_ELBO, execute, no_guide
from pyro_nondiff.ops import cost, external, step
from pyro_nondiff.testing import certify, certify_soft, exact_gradient

from .checks import TOLERANCE
from .programs import parameter

TABLE = np.array([0.3, -1.0, 2.0, 0.7])


class Case(NamedTuple):
    """A program, the guide of its other sites, and the objective for both."""

    program: Callable[[], Any]
    guide: Callable[[], Any] = no_guide
    objective: type[TraceEstimator_ELBO] = ExpectedCost


def two_decisions(price: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
    def program() -> None:
        with pyro.plate("data", 2):
            leaf = parameter("a", 0.3) + torch.tensor([0.0, -0.8])
            first = pyro.sample("first", dist.Bernoulli(logits=leaf))
            cost("early", parameter("m", 0.6) * first)
            leaf = parameter("b", 0.4) * first - parameter("c", 0.2)
            second = pyro.sample("second", dist.Bernoulli(logits=leaf))
            cost("late", price(first, second))

    return program


def look_up(first: Tensor, second: Tensor) -> Tensor:
    """A table of NumPy: there is no derivative."""
    return external("table", lambda i: TABLE[int(i)], (first + 2 * second).detach())


def with_a_normal_between() -> None:
    first = pyro.sample("first", dist.Bernoulli(logits=parameter("a", 0.3)))
    x = pyro.sample("x", dist.Normal(first * parameter("m", 0.4), 1.0))
    second = pyro.sample("second", dist.Bernoulli(logits=parameter("b", 0.4) * x - 0.2))
    cost("late", (first * 1.3 - second * 0.6 + x * 0.3) ** 2)


def behind_a_guide() -> None:
    z = pyro.sample("z", dist.Bernoulli(logits=parameter("p", -0.2)))
    with handlers.randomize():
        first = step("first", parameter("a", 0.3) + z * 0.7)
    mean = first + z * parameter("m", 0.3)
    pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.tensor(0.7))


def guide() -> None:
    pyro.sample("z", dist.Bernoulli(logits=parameter("q", 0.6)))


CASES = {
    "look-up": Case(two_decisions(look_up)),
    "normal": Case(with_a_normal_between),
    "guided": Case(behind_a_guide, guide, TraceEstimator_ELBO),
}
HARD = [REINFORCE(), RLOO(2), DisARM(), Enumerate(), MeasureValued()]


@pytest.mark.parametrize("estimator", HARD, ids=repr)
@pytest.mark.parametrize("name", CASES)
def test_hard_worlds(name: str, estimator: Any) -> None:
    case = CASES[name]
    found = certify(
        case.objective(estimator, worlds="vectorized"), case.program, case.guide, nodes=3
    )
    assert float(found.exact["a"].abs().max()) > 1e-3
    assert found.bias <= TOLERANCE


def smooth() -> None:
    first = pyro.sample("first", dist.Bernoulli(logits=parameter("a", 0.3)))
    leaf = parameter("b", 0.4) * first - parameter("c", 0.2)
    second = pyro.sample("second", dist.Bernoulli(logits=leaf))
    cost("late", (first * 1.3 - second * parameter("m", 0.6) + first * second - 0.4) ** 2)


SOFT = {"smooth": Case(smooth), "guided": CASES["guided"]}


@pytest.mark.parametrize("estimator", [REBAR(), RELAX(), RELAX(relaxed_cost=False)], ids=repr)
@pytest.mark.parametrize("name", SOFT)
def test_soft_worlds(name: str, estimator: Any) -> None:
    case = SOFT[name]
    objective = case.objective(estimator, worlds="vectorized")
    found = certify_soft(objective, case.program, case.guide, step=0.3)
    assert float(found.exact["a"].abs().max()) > 1e-3
    assert found.bias <= TOLERANCE


def test_entropy_bonus_is_a_cost_of_the_law() -> None:
    """The same program with the entropy written out has the same exact gradient."""

    def explicit() -> None:
        first = pyro.sample("first", dist.Bernoulli(logits=parameter("a", 0.3)))
        cost("h", -0.5 * dist.Bernoulli(logits=parameter("a", 0.3)).entropy())
        leaf = parameter("b", 0.4) * first - parameter("c", 0.2)
        second = pyro.sample("second", dist.Bernoulli(logits=leaf))
        cost("g", -0.5 * dist.Bernoulli(logits=leaf).entropy())
        cost("late", (first * 1.3 - second * parameter("m", 0.6) + first * second - 0.4) ** 2)

    found = certify(ExpectedCost(RLOO(2), entropy_bonus=0.5), smooth, no_guide)
    for name, exact in exact_gradient(explicit, no_guide).items():
        torch.testing.assert_close(found.mean[name], exact, rtol=0, atol=TOLERANCE)
        assert (found.exact[name] - exact).abs().max() > 1e-3 or name == "m"


def test_discount_weighs_later_costs_at_a_site() -> None:
    """The estimate at the first site is that of a program whose second cost is discounted."""

    def scaled() -> None:
        first = pyro.sample("first", dist.Bernoulli(logits=parameter("a", 0.3)))
        leaf = (parameter("b", 0.4) * first - parameter("c", 0.2)).detach()
        second = pyro.sample("second", dist.Bernoulli(logits=leaf))
        late = (first * 1.3 - second * parameter("m", 0.6) + first * second - 0.4) ** 2
        cost("late", 0.9 * late)

    found = certify(ExpectedCost(REINFORCE(), discount=0.9), smooth, no_guide)
    exact = exact_gradient(scaled, no_guide)
    torch.testing.assert_close(found.mean["a"], exact["a"], rtol=0, atol=TOLERANCE)
    for name in ("b", "c", "m"):  # nothing lies between these and the cost
        torch.testing.assert_close(found.mean[name], found.exact[name], rtol=0, atol=TOLERANCE)


# --- planted bugs -----------------------------------------------------------------------------

Patch = pytest.MonkeyPatch


def prior_kept(patch: Patch) -> None:
    """An own site's log-probability is left in the objective."""
    right = execute._own_term

    def kept(site: Any, place: int, plan: Any, soft: bool) -> Any:
        term = right(site, place, plan, soft)
        return replace(term, value=term.score)

    patch.setattr(execute, "_own_term", kept)


def cost_out_of_reach(patch: Patch) -> None:
    """The second site does not pay for what lies behind it."""
    right = execute.reaches

    def early(drawn: Any, model: Any) -> Any:
        return {name: reach - (name == "late") for name, reach in right(drawn, model).items()}

    patch.setattr(execute, "reaches", early)


def no_bonus_for_the_law(patch: Patch) -> None:
    """The entropy is that of a law without its parameters."""
    patch.setattr(execute, "entropy", lambda law: distributions.entropy(law).detach())


@pytest.mark.parametrize(
    ("plant", "check"),
    [
        (prior_kept, lambda: test_hard_worlds("look-up", RLOO(2))),
        (cost_out_of_reach, lambda: test_hard_worlds("look-up", RLOO(2))),
        (no_bonus_for_the_law, test_entropy_bonus_is_a_cost_of_the_law),
    ],
)
def test_bug_is_rejected(plant: Any, check: Any, monkeypatch: Patch) -> None:
    check()
    pyro.clear_param_store()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()
