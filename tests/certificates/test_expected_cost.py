"""The expected cost of a program: exact expectations of every estimator, by enumeration.

Sums of up to ten thousand products of numbers below 100 round at 1e-12 in float64, so that a bias
above 1e-9 is one. What REBAR and RELAX do in soft worlds is integrated in ``test_own_guided``.
"""

import itertools
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_nondiff import noise
from pyro_nondiff.estimators import (
    REINFORCE,
    RLOO,
    DisARM,
    Enumerate,
    MeasureValued,
    MovingAverage,
    StraightThrough,
)
from pyro_nondiff.infer import ExpectedCost, config_estimator, no_guide
from pyro_nondiff.noise import Source
from pyro_nondiff.ops import cost
from pyro_nondiff.testing import Certificate, Walk, certify, exact_gradient, exact_loss

from . import own_programs as programs
from .checks import TOLERANCE, expectation
from .own_programs import Alone
from .programs import BERNOULLI, KINDS, parameter
from .test_structures import KnownCuts, chosen

pytestmark = pytest.mark.filterwarnings(
    # what it says is true of some programs, and costs variance only
    "ignore:site '.*' lies in a plate that the later guide site"
)

ESTIMATORS: dict[str, Any] = {
    "reinforce": REINFORCE(),
    "average": REINFORCE(MovingAverage()),
    "rloo": RLOO(2),
    "disarm": DisARM(),
    "enumerate": Enumerate(),
    "measure-valued": MeasureValued(),
}
ANY_LAW = ["reinforce", "average", "rloo", "enumerate"]


def check(estimator: Any, program: Alone, nodes: int = 2, **options: Any) -> Certificate:
    """Fails unless the expectation is exact, and there is a gradient at the decisions."""
    objective = ExpectedCost(estimator, **{"worlds": "vectorized", **options})
    found = certify(objective, program, no_guide, nodes=nodes)
    for name in ("a", "b"):
        if name in found.exact:
            assert float(found.exact[name].abs().max()) > 1e-3
    assert found.bias <= TOLERANCE
    return found


# --- one decision and many --------------------------------------------------------------------


@pytest.mark.parametrize("name", ESTIMATORS)
def test_one_decision(name: str) -> None:
    check(ESTIMATORS[name], programs.one_decision(BERNOULLI))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_decisions_in_a_row(name: str) -> None:
    check(ESTIMATORS[name], programs.decisions(BERNOULLI))


@pytest.mark.parametrize("kind", ["one_hot", "categorical", "bits"])
@pytest.mark.parametrize("name", ANY_LAW)
def test_other_laws(name: str, kind: str) -> None:
    check(ESTIMATORS[name], programs.one_decision(KINDS[kind]))
    pyro.clear_param_store()
    check(ESTIMATORS[name], programs.observed(KINDS[kind]))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_observation_is_a_cost(name: str) -> None:
    check(ESTIMATORS[name], programs.observed(BERNOULLI))


@pytest.mark.parametrize("mask", ["none", "poutine", "law"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_plates_with_scales_and_masks(name: str, mask: str) -> None:
    check(ESTIMATORS[name], programs.buyers(BERNOULLI, mask))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_costs_of_numpy(name: str) -> None:
    check(ESTIMATORS[name], programs.looked_up)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_costs_of_something_outside(name: str) -> None:
    found = check(ESTIMATORS[name], programs.asked)
    pyro.clear_param_store()
    same = check(ESTIMATORS[name], programs.looked_up)
    torch.testing.assert_close(found.exact, same.exact)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_normal_between(name: str) -> None:
    """Two nodes of Normal noise: program and exact gradient are of a noise with two values."""
    check(ESTIMATORS[name], programs.normal_between(BERNOULLI))


@pytest.mark.parametrize("name", ANY_LAW)
def test_random_ops(name: str) -> None:
    check(ESTIMATORS[name], programs.randomized)


def test_auto() -> None:
    """With no estimator it is pathwise where the law has a path, and RLOO(4) elsewhere."""
    program = programs.one_decision(BERNOULLI)
    found = check(None, program)
    pyro.clear_param_store()
    assert found.total_variance == pytest.approx(check(RLOO(4), program).total_variance)


@pytest.mark.parametrize(
    "order",
    list(itertools.permutations([REINFORCE(), DisARM(), Enumerate()])),
    ids=lambda order: "-".join(type(estimator).__name__ for estimator in order),
)
def test_mixtures(order: Any) -> None:
    estimators = dict(zip(("z1", "z2", "z3"), order, strict=True))
    check(None, config_estimator(programs.decisions(BERNOULLI), estimators))


@pytest.mark.parametrize("estimator", [REINFORCE(), DisARM(), Enumerate()], ids=repr)
def test_particles(estimator: Any) -> None:
    """Two particles have the same mean, and half of the variance."""
    one = check(estimator, programs.observed(BERNOULLI))
    pyro.clear_param_store()
    two = check(estimator, programs.observed(BERNOULLI), num_particles=2)
    assert two.total_variance == pytest.approx(one.total_variance / 2, abs=TOLERANCE)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_loss_has_the_exact_mean(name: str) -> None:
    pair = programs.decisions(BERNOULLI), no_guide
    loss, _ = expectation(ExpectedCost(ESTIMATORS[name], worlds="vectorized"), pair)
    assert float(loss) == pytest.approx(float(exact_loss(*pair).detach()), abs=TOLERANCE)


@pytest.mark.parametrize("gradient", ["identity", "reinmax"])
def test_straight_through_is_biased_as_stated(gradient: str) -> None:
    """For one Bernoulli and a quadratic cost, ``reinmax`` is exact and ``identity`` is not.

    The identity's is the mean of the cost's slopes; the exact one is their half-sum, times the
    variance of the value in both.
    """
    objective = ExpectedCost(StraightThrough(gradient), worlds="vectorized")
    found = certify(objective, programs.one_decision(BERNOULLI), no_guide)
    q = torch.tensor(-0.4).sigmoid()
    slopes = [2 * 1.5 * (1.5 * z - 0.3) for z in (0.0, 1.0)]
    weights = {"identity": (1 - q, q), "reinmax": (0.5, 0.5)}[gradient]
    expected = q * (1 - q) * sum(w * slope for w, slope in zip(weights, slopes, strict=True))
    torch.testing.assert_close(found.mean["a"], expected, rtol=0, atol=TOLERANCE)
    assert (found.bias > 1e-2) == (gradient == "identity")
    torch.testing.assert_close(found.mean["p"], found.exact["p"], rtol=0, atol=TOLERANCE)


# --- sequential worlds ------------------------------------------------------------------------

EACH = {
    "disarm": {"z1": DisARM(), "z2": DisARM(), "z3": DisARM()},
    "enumerate": {"z1": Enumerate(), "z2": REINFORCE(), "z3": Enumerate()},
    "measure-valued": {"z1": MeasureValued(), "z2": REINFORCE(), "z3": MeasureValued()},
    "mixed": {"z1": DisARM(), "z2": Enumerate(), "z3": REINFORCE()},
}


def check_sequential(program: Alone, estimators: dict[str, Any]) -> None:
    """A piece of noise settles the value in every branch: ``KnownCuts`` knows all logits."""

    def configured() -> None:
        with poutine.infer_config(config_fn=lambda site: chosen(site, estimators)):
            program()

    def source_of(walk: Walk) -> Source:
        return KnownCuts(walk, hidden_costs(program))

    objective = ExpectedCost(worlds="sequential")
    objective.differentiable_loss(configured, no_guide)
    _, mean = expectation(objective, (configured, no_guide), source_of)
    for name, value in exact_gradient(configured, no_guide).items():
        assert float((mean[name] - value).abs().max()) <= TOLERANCE


def hidden_costs(program: Alone) -> Alone:
    """A program whose sample sites are those with a law alone."""

    def hidden() -> None:
        with poutine.block(hide_fn=lambda site: site.get("is_observed", False)):
            program()

    return hidden


@pytest.mark.parametrize("name", EACH)
def test_branches_that_run_one_by_one(name: str) -> None:
    check_sequential(programs.decisions(BERNOULLI), EACH[name])


@pytest.mark.parametrize("first", [REINFORCE(), DisARM(), Enumerate()], ids=repr)
@pytest.mark.parametrize("second", [REINFORCE(), DisARM(), Enumerate()], ids=repr)
def test_a_decision_that_not_every_run_meets(first: Any, second: Any) -> None:
    check_sequential(programs.branching(BERNOULLI), {"z": first, "w": second})


def test_auto_worlds_finds_out_that_sites_depend_on_values() -> None:
    objective = ExpectedCost(REINFORCE(), num_particles=2)
    program = programs.branching(BERNOULLI)
    with pytest.warns(UserWarning, match="run one by one"):
        objective.differentiable_loss(program, no_guide)
    assert objective.plan_of(program, no_guide).mode == "sequential"


# --- rewards to come --------------------------------------------------------------------------


class Fixed:
    """Logistic noise that makes Bernoulli values as they are wanted."""

    def __init__(self, values: dict[str, float]) -> None:
        self.values = values

    def __call__(self, request: noise.Request) -> Tensor:
        return torch.full(request.shape, 20.0 if self.values[request.site] else -20.0)


@pytest.mark.parametrize("discount", [1.0, 0.9, 0.5])
@pytest.mark.parametrize("worlds", ["vectorized", "sequential"])
def test_each_decision_pays_for_what_comes_after_it(worlds: Any, discount: float) -> None:
    """The estimate at a site is its score times the discounted costs to come, draw by draw.

    The toll before the first decision is nobody's; a cost that lies k sites later counts
    discount^k. The loss is the sum of all costs, whatever the discount.
    """
    objective = ExpectedCost(REINFORCE(), discount=discount, worlds=worlds)
    program = programs.decisions(BERNOULLI)
    for values in itertools.product((0.0, 1.0), repeat=3):
        with noise.source(Fixed(dict(zip(("z1", "z2", "z3"), values, strict=True)))):
            found = objective.site_gradients(program, no_guide)
            loss = objective.differentiable_loss(program, no_guide).detach()
        z1, z2, z3 = values
        costs = [1.3 * z1, (z2 - 0.4 * z1) ** 2, z1 * z3 + 0.3 * z2 * z3]
        assert float(loss) == pytest.approx(0.7 + 0.16 + sum(costs))
        logits = [-0.4, 0.6 - 0.4 * z1, 0.6 * z2 - z1]
        for i, (logit, value) in enumerate(zip(logits, values, strict=True)):
            score = value - float(torch.tensor(logit).sigmoid())
            to_come = sum(discount ** (k - i) * costs[k] for k in range(i, 3))
            assert float(found[f"z{i + 1}"]) == pytest.approx(score * to_come)


@pytest.mark.parametrize("estimator", [RLOO(2), DisARM(), Enumerate()], ids=repr)
def test_discounted_expectation(estimator: Any) -> None:
    """At each decision: that of a program whose later costs are discounted for it."""
    objective = ExpectedCost(estimator, discount=0.9, worlds="vectorized")
    found = certify(objective, two_decisions(1.0), no_guide).mean
    for weight, name in [(0.9, "a"), (1.0, "b")]:
        exact = exact_gradient(two_decisions(weight), no_guide)
        torch.testing.assert_close(found[name], exact[name], rtol=0, atol=TOLERANCE)


def two_decisions(weight: float) -> Alone:
    """The first decision reaches the second cost by its value, and through the second's law."""

    def program() -> None:
        first = pyro.sample("z1", BERNOULLI.law(parameter("a", -0.4)))
        cost("early", 1.3 * first)
        second = pyro.sample("z2", BERNOULLI.law(parameter("b", 0.6) - first))
        cost("late", weight * (second - 0.4 * first) ** 2)

    return program
