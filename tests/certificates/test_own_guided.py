"""The model's own sites behind a guide, and in soft worlds: exact expectations.

Hard worlds are enumerated: sums of ten thousand products round at 1e-12. Soft ones are integrated:
the rule's error at a step of 0.6 times the temperature is exp(-2 pi^2 / 0.6) = 5e-15, times
derivatives of the cost that are below 1e3 here. So a bias above 1e-9 is one.
"""

import zlib
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_nondiff import noise
from pyro_nondiff.errors import NonDiffWarning
from pyro_nondiff.estimators import (
    LAX,
    REBAR,
    REINFORCE,
    RELAX,
    RLOO,
    DisARM,
    Enumerate,
    MeasureValued,
)
from pyro_nondiff.infer import ExpectedCost, config_estimator, no_guide
from pyro_nondiff.ops import cost, external
from pyro_nondiff.testing import certify, certify_soft, exact_gradient
from pyro_nondiff.testing.quadrature import soft_mean

from . import own_programs as programs
from .checks import TOLERANCE, elbo_of, expectation
from .own_programs import OWN, TABLE
from .programs import BERNOULLI, KINDS, Pair, Structure, parameter
from .test_structures import KnownCuts

pytestmark = pytest.mark.filterwarnings(
    # what it says is true of some structures, and costs variance only
    "ignore:site '.*' lies in a plate that the later guide site"
)

HARD: dict[str, Any] = {
    "reinforce": REINFORCE(),
    "rloo": RLOO(2),
    "disarm": DisARM(),
    "enumerate": Enumerate(),
    "measure-valued": MeasureValued(),
}
GUIDED = [programs.downstream, programs.upstream, programs.between]


def check_exact(found: Any) -> None:
    assert float(found.exact["a"].abs().max()) > 1e-3
    assert float(found.exact["p"].abs().max()) > 1e-3
    assert found.bias <= TOLERANCE


# --- hard worlds ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("structure", GUIDED)
def test_hard_worlds(structure: Structure, name: str) -> None:
    check_exact(certify(elbo_of(HARD[name]), *structure(BERNOULLI)))


@pytest.mark.parametrize("kind", ["one_hot", "categorical", "bits"])
@pytest.mark.parametrize("name", ["reinforce", "rloo", "enumerate"])
def test_other_laws(name: str, kind: str) -> None:
    check_exact(certify(elbo_of(HARD[name]), *programs.downstream(KINDS[kind])))


@pytest.mark.parametrize("name", ["reinforce", "rloo", "disarm"])
def test_own_sites_in_a_plate(name: str) -> None:
    """The plate's elements meet in a later own site: their costs are then summed for each."""
    check_exact(certify(elbo_of(HARD[name]), *programs.in_a_plate(BERNOULLI)))


MIXED = [
    {"z": DisARM(), "own": Enumerate()},
    {"z": Enumerate(), "own": DisARM()},
    {"z": REINFORCE(), "own": DisARM()},
    {"z": RLOO(2), "own": REINFORCE()},
]


@pytest.mark.parametrize("estimators", MIXED, ids=repr)
@pytest.mark.parametrize("structure", [programs.downstream, programs.upstream])
def test_mixtures(structure: Structure, estimators: dict[str, Any]) -> None:
    check_exact(certify(elbo_of(None), *configured(structure(BERNOULLI), estimators)))


def configured(pair: Pair, estimators: dict[str, Any]) -> Pair:
    """A pair whose sites, of guide and model, have estimators of their own."""
    model, guide = pair
    of_guide = {name: each for name, each in estimators.items() if not name.startswith("own")}
    own = {name: each for name, each in estimators.items() if name.startswith("own")}
    return config_estimator(model, own), config_estimator(guide, of_guide)


@pytest.mark.parametrize("estimators", MIXED, ids=repr)
@pytest.mark.parametrize("structure", [programs.downstream, programs.upstream])
def test_worlds_that_run_one_by_one(structure: Structure, estimators: dict[str, Any]) -> None:
    pair = structure(BERNOULLI)
    elbo = elbo_of(None, worlds="sequential")
    both = configured(pair, estimators)

    def everything() -> None:  # a program of all sites, with the laws that they are drawn from
        trace = poutine.trace(pair[1]).get_trace()
        nodes = trace.nodes.items()
        values = {name: node["value"] for name, node in nodes if node["type"] == "sample"}
        with poutine.block(hide_fn=lambda site: site["is_observed"]):
            poutine.condition(pair[0], data=values)()

    _, mean = expectation(elbo, both, lambda walk: KnownCuts(walk, everything))
    for name, value in exact_gradient(*pair).items():
        assert float((mean[name] - value).abs().max()) <= TOLERANCE


# --- soft worlds ------------------------------------------------------------------------------


SOFT = {
    "rebar": lambda: REBAR(),
    "rebar of second order": lambda: REBAR(eta=0.6, second_order=True),
    "relax": lambda: RELAX(),
    "black box": lambda: RELAX(relaxed_cost=False),
}


@pytest.mark.parametrize("name", SOFT)
def test_one_decision(name: str) -> None:
    objective = ExpectedCost(SOFT[name](), worlds="vectorized")
    check_exact(certify_soft(objective, programs.one_decision(BERNOULLI), no_guide, step=0.3))


@pytest.mark.parametrize("name", SOFT)
def test_one_hot_decision(name: str) -> None:
    program = programs.one_decision(KINDS["one_hot"])
    objective = ExpectedCost(SOFT[name](), worlds="vectorized")
    check_exact(certify_soft(objective, program, no_guide, step=0.3))


def in_numpy(z: Tensor, own: Tensor) -> np.ndarray:
    return TABLE[tuple(x.detach().numpy().astype(int) for x in torch.broadcast_tensors(z, own))]


def outside(z: Tensor, own: Tensor) -> Tensor:
    return external("both", lambda i, j: TABLE[int(i), int(j)], z, own)


@pytest.mark.parametrize(
    ("price", "behind"),
    [
        (in_numpy, "reinforce"),
        (in_numpy, "disarm"),
        (in_numpy, "enumerate"),
        (in_numpy, "measure-valued"),
        (outside, "reinforce"),
    ],
)
def test_black_box_cost_without_a_gradient(price: Any, behind: str) -> None:
    """RELAX with a network alone needs no relaxed cost, so costs may come from anywhere."""

    def program() -> None:
        z = pyro.sample("z", dist.Bernoulli(logits=parameter("a", -0.4)))
        law = dist.Bernoulli(logits=parameter("p", 0.3) - z)
        cost("price", price(z, pyro.sample("own", law, infer={"estimator": HARD[behind]})))

    objective = ExpectedCost(RELAX(relaxed_cost=False), worlds="vectorized")
    check_exact(certify_soft(objective, program, no_guide, step=0.3))


class Square(nn.Module):
    """A control variate whose expectation Gauss's rule finds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3, -0.7]))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight[0] * x + self.weight[1] * x**2


def test_lax_at_a_continuous_decision() -> None:
    """Score, cost and control variate are polynomials of degree at most 5 in the noise."""
    lax = LAX(Square())

    def program() -> None:
        law = dist.Normal(parameter("a", -0.4), parameter("p", 0.3).exp())
        x = pyro.sample("x", law, infer={"estimator": lax})
        cost("price", x**3 - x)

    check_exact(certify_soft(ExpectedCost(), program, no_guide, nodes=6))


TWO: dict[str, dict[str, Any]] = {
    "rebar at the guide's, disarm at the own": {"z": REBAR(), "own": DisARM()},
    "rebar at the guide's, reinforce at the own": {"z": REBAR(), "own": REINFORCE()},
    "disarm at the guide's, rebar at the own": {"z": DisARM(), "own": REBAR()},
    "enumerate at the guide's, rebar at the own": {"z": Enumerate(), "own": REBAR()},
    "both": {"z": REBAR(), "own": REBAR()},
    "relax before rebar": {"z": RELAX(), "own": REBAR()},
}


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("structure", [programs.downstream, programs.upstream])
def test_guide_and_model_draw(structure: Structure, name: str) -> None:
    pair = configured(structure(BERNOULLI), TWO[name])
    check_exact(certify_soft(elbo_of(None), *pair, step=0.3))


def with_an_index() -> Pair:
    """An own site that cannot be relaxed, behind a term that it does not reach."""

    def model() -> None:
        p = parameter("p", 0.3)
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("early", dist.Normal(1.2 * z * z, 1.0), obs=torch.tensor(1.0))
        law = dist.Categorical(logits=torch.stack([p * z, 1 - z, z * z], -1))
        own = pyro.sample("own", law, infer={**OWN, "estimator": REINFORCE()})
        pyro.sample("x", dist.Normal(z + 0.4 * own + z * own, 1.0), obs=torch.tensor(1.5))

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=parameter("a", -0.4)))

    return model, guide


def test_indexed_own_site_behind_a_soft_world() -> None:
    """What can depend on it is left out of the control variate, and one warning says so."""
    with pytest.warns(NonDiffWarning, match="site 'own' cannot be relaxed.*variate of site 'z'"):
        found = certify_soft(elbo_of(REBAR()), *with_an_index(), step=0.3)
    check_exact(found)


class Coin(TorchDistribution):
    """A law that the library knows no map of noise of, and that quadrature can draw all the same.

    It asks for noise of its own, row by row, as if each row were a Categorical of two.
    """

    arg_constraints = {"logits": constraints.real}  # noqa: RUF012
    support = constraints.boolean

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Coin":
        return Coin(self.logits.expand(batch_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        if self.logits.dim() == 2:
            return torch.stack([Coin(row).sample() for row in self.logits])
        pair = torch.stack([torch.zeros_like(self.logits), self.logits], -1).detach()
        law, shape = dist.Categorical(logits=pair), tuple(pair.shape)
        request = noise.Request("coin", "gumbel", shape, pair.dtype, "cpu", "u", law)
        return (pair + noise.draw(request)).argmax(-1).to(pair.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        return dist.Bernoulli(logits=self.logits).log_prob(value)


def tossed(law: Any) -> Pair:
    """A term that the own site does not reach, and one that it does."""

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("early", dist.Normal(1.2 * z * z, 1.0), obs=torch.tensor(1.0))
        infer = {**OWN, "estimator": REINFORCE()}
        own = pyro.sample("own", law(parameter("p", 0.3) - 0.8 * z), infer=infer)
        pyro.sample("x", dist.Normal(z + 0.4 * own + z * own, 1.0), obs=torch.tensor(1.5))

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=parameter("a", -0.4)))

    return model, guide


@pytest.mark.filterwarnings("ignore:site 'own' cannot be relaxed")
@pytest.mark.parametrize("estimator", [REINFORCE(), RLOO(2), REBAR(), RELAX()], ids=repr)
def test_own_site_that_no_noise_makes(estimator: Any) -> None:
    """It is drawn afresh in each row where its law is another; soft rows leave it out."""
    exact = exact_gradient(*tossed(lambda logits: dist.Bernoulli(logits=logits)))
    pair, elbo = tossed(Coin), elbo_of(estimator)
    soft = isinstance(estimator, REBAR | RELAX)
    mean = soft_mean(elbo, *pair, step=0.3)[0] if soft else expectation(elbo, pair)[1]
    for name, value in exact.items():
        assert float(value.abs()) > 1e-3
        assert float((mean[name] - value).abs()) <= TOLERANCE


# --- one by one, with soft worlds ---------------------------------------------------------------


def by_role(request: noise.Request) -> Tensor:
    """The same noise for a site's role in every run, however often it is asked for."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{request.site} {request.role}".encode()))
    return torch.randn(torch.Size(request.shape), generator=generator)


@pytest.mark.parametrize("name", TWO)
def test_soft_worlds_that_run_one_by_one(name: str) -> None:
    """With the same noise they give what all at once do, to the order of sums.

    The own site depends on the soft value. One that does not keeps its hard value in a vectorised
    run, and is relaxed in a run alone: two control variates for the same estimate.
    """
    pair = configured(programs.downstream(BERNOULLI), TWO[name])
    apart, together = elbo_of(None, worlds="sequential"), elbo_of(None)
    found = []
    for elbo in (together, apart):
        elbo.differentiable_loss(*pair)
        if elbo is apart:
            apart.states.load_state_dict(together.states.state_dict())
        learnt = {key: value.clone() for key, value in elbo.states.state_dict().items()}
        with noise.source(by_role):
            loss = elbo.differentiable_loss(*pair)
        elbo.states.load_state_dict(learnt)
        leaves = [pyro.param("a"), pyro.param("p")]
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-10)
    assert float(found[0][1].abs()) > 1e-6
