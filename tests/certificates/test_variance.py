"""Exact variances, which see what a mean cannot: a wrong coupling of worlds.

Two evaluations of the program are compared with two: a pair of DisARM, two worlds of RLOO, and two
particles of REINFORCE, whose mean has half of the variance of one.
"""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_nondiff.estimators import REINFORCE, RLOO, DisARM, Enumerate, MovingAverage
from pyro_nondiff.testing import certify

from . import programs
from .checks import elbo_of
from .programs import BERNOULLI, KINDS, Pair

CLOSE = 1e-12
"""Sums of a few numbers of order 10 in float64."""

LOGITS = [-3.0, -1.0, -0.2, 0.0, 0.5, 2.0]


def units(logits: list[float], cost: Callable[[Tensor], Tensor]) -> Pair:
    """Bernoulli units in one event, with a cost; model and guide are the same law."""

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(logits)).to_event(1))
        pyro.factor("cost", -cost(z))

    def guide() -> None:
        law = dist.Bernoulli(logits=pyro.param("logits", torch.tensor(logits)))
        pyro.sample("z", law.to_event(1))

    return model, guide


def variance(estimator: Any, pair: Pair, particles: int = 1) -> Tensor:
    """The exact variance of the logits' gradient, a unit, at the parameters' start."""
    pyro.clear_param_store()
    return certify(elbo_of(estimator, num_particles=particles), *pair).variance["logits"]


def total(estimator: Any, pair: Pair, particles: int = 1) -> float:
    return float(variance(estimator, pair, particles).sum())


# --- one unit: closed forms -----------------------------------------------------------------


@pytest.mark.parametrize("logit", LOGITS)
@pytest.mark.parametrize(("zero", "one"), [(4.0, 6.5), (0.3, -1.1)])
def test_one_unit(logit: float, zero: float, one: float) -> None:
    """The variances of one unit, with c = f(1) - f(0), p the probability of 1 and q of 0.

    - RLOO(2) is c/2 where two draws differ, which has probability 2 p q;
    - DisARM is c max(p, q)/2 where the pair differs, with probability 2 min(p, q);
    - REINFORCE is f(1) q with probability p, and - f(0) p with probability q.

    The first two have these variances whatever the costs, so DisARM is never worse. REINFORCE
    depends on the level of the costs: it is worse where they are not near to zero.
    """
    pair = units([logit], lambda z: (zero + (one - zero) * z).sum(-1))
    c, p = one - zero, float(torch.tensor(logit).sigmoid())
    q, mean = 1 - p, (one - zero) * p * (1 - p)
    disarm, rloo = total(DisARM(), pair), total(RLOO(2), pair)
    reinforce = total(REINFORCE(), pair, particles=2)
    assert rloo == pytest.approx(c**2 * p * q / 2 - mean**2, abs=CLOSE)
    assert disarm == pytest.approx(c**2 * p * q * max(p, q) / 2 - mean**2, abs=CLOSE)
    square = p * (one * q) ** 2 + q * (zero * p) ** 2
    assert reinforce == pytest.approx((square - mean**2) / 2, abs=CLOSE)
    assert disarm <= rloo
    if zero == 4.0:
        assert rloo < reinforce


def test_fair_coin_has_no_variance_under_disarm() -> None:
    """At probability 1/2 the partner is always the other value."""
    pair = units([0.0], lambda z: (4 + 2.5 * z).sum(-1))
    assert total(DisARM(), pair) < CLOSE < total(RLOO(2), pair)


# --- two units ------------------------------------------------------------------------------


def cubic(z: Tensor) -> Tensor:
    """The cost of a sum, not linear and not separable, away from zero."""
    return (z.sum(-1) - 0.45) ** 3 + 2.0


@pytest.mark.parametrize("first", [-3.0, 0.0, 2.0])
@pytest.mark.parametrize("second", [-1.0, 0.5])
def test_two_units_are_ordered(first: float, second: float) -> None:
    """As in the experiments of Dong, Mnih & Tucker (2020): DisARM, RLOO, REINFORCE."""
    pair = units([first, second], cubic)
    disarm, rloo = total(DisARM(), pair), total(RLOO(2), pair)
    assert disarm < rloo < total(REINFORCE(), pair, particles=2)
    assert total(Enumerate(), pair) < CLOSE


def test_stored_ratios() -> None:
    """A guard against another formula or coupling.

    Stored from a sum written apart from the engine, over the four values and over the nine pieces
    of the two uniform numbers. 1e-9 is the rounding of what was stored.
    """
    pair = units([-1.0, 0.5], cubic)
    rloo = total(RLOO(2), pair)
    assert total(DisARM(), pair) / rloo == pytest.approx(0.6347084755, abs=1e-9)
    reinforce = total(REINFORCE(), pair, particles=2)
    assert reinforce / rloo == pytest.approx(2.4259359800, abs=1e-9)


SHARED_NOISE = 0.2136074651
"""The variance of DisARM on two layers, as this engine had it when it was written."""


def test_stored_variance_of_shared_noise() -> None:
    """The noise of later sites is one for all worlds; a planted bug draws it afresh."""
    certificate = certify(elbo_of(DisARM()), *programs.reversed_layers(BERNOULLI))
    assert certificate.total_variance == pytest.approx(SHARED_NOISE, abs=1e-9)


ONE_WORLD = 7.3212373284
"""The variance of REINFORCE on two layers, from a sum over the four values apart from the engine.

It grows with each term that is not left out.
"""


def test_stored_variance_of_one_world() -> None:
    """A site does not pay for what it cannot influence."""
    certificate = certify(elbo_of(REINFORCE()), *programs.reversed_layers(BERNOULLI))
    assert certificate.total_variance == pytest.approx(ONE_WORLD, abs=1e-9)


# --- what enumeration and baselines leave -----------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_enumeration_of_a_single_site_has_no_variance(kind: str) -> None:
    """Of the guide's gradient and of the model's."""
    certificate = certify(elbo_of(Enumerate()), *programs.one_site(KINDS[kind]))
    assert certificate.total_variance < CLOSE
    pyro.clear_param_store()
    pair = programs.nested_plates(KINDS[kind], "poutine")
    assert certify(elbo_of(Enumerate()), *pair).total_variance < CLOSE * 100  # numbers of order 10


def test_a_baseline_lowers_the_variance() -> None:
    """An average of costs that are far from zero is a good guess."""
    pair = units([-1.0, 0.5], lambda z: cubic(z) + 20)
    plain = total(REINFORCE(), pair)
    pyro.clear_param_store()
    elbo = elbo_of(REINFORCE(MovingAverage()))
    for _ in range(20):
        elbo.differentiable_loss(*pair)
    with_average = float(certify(elbo, *pair).variance["logits"].sum())
    assert with_average < 0.1 * plain


def test_more_worlds_have_less_variance() -> None:
    """RLOO(3) by its own formula: a pair differs as often, and three pairs are averaged."""
    pair = units([-1.0, 0.5], cubic)
    two, three = total(RLOO(2), pair), total(RLOO(3), pair)
    assert three < two * 2 / 3 + CLOSE


def test_plates_pay_for_themselves_alone() -> None:
    """An element's cost is not in another's estimate: the variance is a sum over elements."""

    def model() -> None:
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(0.3)))
            pyro.factor("cost", -(4 + 2.5 * z))

    def guide() -> None:
        with pyro.plate("data", 2):
            logits = pyro.param("logits", torch.tensor([-1.0, 0.5]))
            pyro.sample("z", dist.Bernoulli(logits=logits))

    together = variance(REINFORCE(), (model, guide))
    apart = []
    for logit in (-1.0, 0.5):
        p, prior = torch.tensor(logit).sigmoid(), torch.tensor(0.3).sigmoid()
        one, zero = (p / prior).log() + 6.5, ((1 - p) / (1 - prior)).log() + 4.0
        mean = p * (1 - p) * (one - zero)
        square = p * (one * (1 - p)) ** 2 + (1 - p) * (zero * p) ** 2
        apart.append(square - mean**2)
    torch.testing.assert_close(together, torch.stack(apart), rtol=0.0, atol=CLOSE)


def test_the_models_gradient_is_averaged_over_the_pair() -> None:
    """An antithetic pair is at least as good as two draws: at most half of the variance."""
    pair = programs.one_site(BERNOULLI)
    one = certify(elbo_of(REINFORCE()), *pair).variance["p"]
    pyro.clear_param_store()
    both = certify(elbo_of(DisARM()), *pair).variance["p"]
    assert 0 < float(both) <= float(one) / 2
