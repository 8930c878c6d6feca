"""Laws of counts, whose noise cannot be enumerated: by Monte Carlo, with the power stated.

Each element of a plate of independent copies gives one draw of the gradient. The mean is compared
with the exact gradient by a self-normalised z, in two stages: 200,000 draws and, where z is beyond
one in a thousand, 800,000 fresh ones, beyond one in a million. So a right estimator fails in one
of a million runs an assertion, and the number of draws is asserted to be enough to see, with as
good a chance, a bias of 10 % of the gradient.
"""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_nondiff.estimators import REINFORCE, RLOO, DisARM, Enumerate, MovingAverage
from pyro_nondiff.estimators import score as score_room
from pyro_nondiff.infer import TraceEstimator_ELBO, config_estimator, planner

DRAWS = 200_000
SUSPICIOUS, WRONG = 3.29, 4.89
"""Two-sided quantiles of 1e-3 and 1e-6."""
POWER = 93.0
"""(4.89 + 4.75) squared: both errors are below 1e-6 at ``n >= 93 (sd / delta)^2`` draws."""
SHARE = 0.1

TOTAL = 3
SUPPORT = 60
"""A Poisson count of rate below 6 is larger with probability below 1e-40."""


@pytest.fixture(autouse=True)
def no_world_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check replays every world alone, which is most of the time with so many copies."""
    monkeypatch.setattr(planner, "check_worlds", lambda pair, chunk: None)


def first_law(kind: str, score: Tensor) -> Any:
    """A count of a rate or probability that a real number makes."""
    if kind == "binomial":
        return dist.Binomial(TOTAL, logits=score)
    return dist.Poisson(score.exp())


def support(kind: str) -> Tensor:
    return torch.arange(TOTAL + 1.0 if kind == "binomial" else SUPPORT + 0.0)


def terms(kind: str, p: Tensor, z: Tensor, y: Tensor) -> Tensor:
    """The model's log-probability; its cost is not linear in the counts."""
    prior = first_law(kind, p).log_prob(z) + dist.Bernoulli(logits=p + 2 - 0.2 * z).log_prob(y)
    return prior + dist.Normal(0.5 * z + y * z, 1.3).log_prob(torch.tensor(3.5))


def programs(kind: str, copies: int, order: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """A count and a bit, in either order in the guide, in a plate of independent copies."""

    def model(noise: Tensor) -> None:
        p = pyro.param("p", torch.tensor(0.3))
        with pyro.plate("copies", copies):
            shift = noise[2]
            z = pyro.sample("z", first_law(kind, p + shift))
            y = pyro.sample("y", dist.Bernoulli(logits=p + shift + 2 - 0.2 * z))
            obs = torch.tensor(3.5).expand(copies)
            pyro.sample("x", dist.Normal(0.5 * z + y * z, 1.3), obs=obs)

    def guide(noise: Tensor) -> None:
        a = pyro.param("a", torch.tensor(-0.4)) + noise[0]
        b = pyro.param("b", torch.tensor(0.6)) + noise[1]
        with pyro.plate("copies", copies):
            if order == "count-first":
                z = pyro.sample("z", first_law(kind, a))
                pyro.sample("y", dist.Bernoulli(logits=b - 0.5 * z))
            else:
                y = pyro.sample("y", dist.Bernoulli(logits=b))
                pyro.sample("z", first_law(kind, a + 0.5 * y))

    return model, guide


def exact(kind: str, order: str) -> Tensor:
    """The exact gradient of one copy for ``a``, ``b`` and ``p``, written out."""
    values = [torch.tensor(v, requires_grad=True) for v in (-0.4, 0.6, 0.3)]
    a, b, p = values
    z, y = torch.cartesian_prod(support(kind), torch.tensor([0.0, 1.0])).unbind(-1)
    if order == "count-first":
        guide = first_law(kind, a).log_prob(z) + dist.Bernoulli(logits=b - 0.5 * z).log_prob(y)
    else:
        guide = dist.Bernoulli(logits=b).log_prob(y) + first_law(kind, a + 0.5 * y).log_prob(z)
    loss = (guide.exp() * (guide - terms(kind, p, z, y))).sum()
    return torch.stack(torch.autograd.grad(loss, values))


def draws(estimators: dict[str, Any], kind: str, order: str, count: int) -> Tensor:
    """Independent draws of the gradient for ``a``, ``b`` and ``p``, ``(3, count)``."""
    model, guide = programs(kind, count, order)
    elbo = TraceEstimator_ELBO(worlds="vectorized")
    noise = torch.zeros(3, count, requires_grad=True)
    pair = model, config_estimator(guide, estimators)
    loss = elbo.differentiable_loss(*pair, noise)
    return torch.autograd.grad(loss, noise)[0]


def check_mean(estimators: dict[str, Any], kind: str, order: str) -> None:
    """The two stages, after the number of draws was found to be enough."""
    wanted = exact(kind, order)
    for stage, (count, limit) in enumerate([(DRAWS, SUSPICIOUS), (4 * DRAWS, WRONG)]):
        sample = draws(estimators, kind, order, count)
        deviation = sample.std(-1)
        needed = POWER * (deviation / (SHARE * wanted)).square().max()
        assert count >= needed, f"{float(needed):.0f} draws are needed"
        z = (sample.mean(-1) - wanted) / deviation * math.sqrt(count)
        if float(z.abs().max()) < limit:
            return
        assert stage == 0, f"z is {z.tolist()}"


CASES = {
    "reinforce": {"z": REINFORCE(), "y": DisARM()},
    "average": {"z": REINFORCE(MovingAverage()), "y": Enumerate()},
    "rloo": {"z": RLOO(2), "y": RLOO(2)},
}


@pytest.mark.parametrize("order", ["count-first", "bit-first"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["binomial", "poisson"])
def test_counts_have_the_exact_mean(kind: str, case: str, order: str) -> None:
    """Where the bit comes first, its branches each draw the count afresh."""
    check_mean(CASES[case], kind, order)


def test_a_bias_of_a_tenth_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = score_room.REINFORCE.estimate

    def wrong(self: Any, draw: Any, costs: Tensor, state: Any, context: Any) -> Any:
        return right(self, draw, 1.1 * costs, state, context)

    monkeypatch.setattr(score_room.REINFORCE, "estimate", wrong)
    with pytest.raises(AssertionError, match="z is"):
        check_mean(CASES["reinforce"], "poisson", "count-first")


@pytest.mark.parametrize("kind", ["binomial", "poisson"])
def test_support_is_all_of_the_law(kind: str) -> None:
    for score in (-0.4, 0.6):
        total = first_law(kind, torch.tensor(score)).log_prob(support(kind)).exp().sum()
        assert float(total) == pytest.approx(1.0, abs=1e-12)
