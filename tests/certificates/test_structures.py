"""Bias where estimators meet: mixtures by site, particles, subsamples, sequential worlds."""

import itertools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_nondiff.distributions import core
from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.estimators import (
    REINFORCE,
    RLOO,
    DisARM,
    Enumerate,
    MovingAverage,
    Pathwise,
)
from pyro_nondiff.infer import config_estimator
from pyro_nondiff.noise import Request
from pyro_nondiff.testing import Enumeration, Walk, certify, exact_gradient, exact_loss

from . import programs
from .checks import TOLERANCE, check_unbiased, elbo_of, expectation
from .programs import BERNOULLI, KINDS, Pair, Structure

pytestmark = pytest.mark.filterwarnings(
    # what it says is true of some structures, and costs variance only
    "ignore:site '.*' lies in a plate that the later guide site"
)


def configured(pair: Pair, **estimators: Any) -> Pair:
    """A pair whose guide's sites have estimators of their own."""
    return pair[0], config_estimator(pair[1], estimators)


# --- mixtures -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "order",
    list(itertools.permutations([REINFORCE(), DisARM(), Enumerate()])),
    ids=lambda order: "-".join(type(estimator).__name__ for estimator in order),
)
def test_mixture_in_a_chain(order: Any) -> None:
    pair = configured(programs.chain(BERNOULLI), z1=order[0], z2=order[1], z3=order[2])
    check_unbiased(elbo_of(None), pair)


MIXTURES = {
    "disarm-enumerate": (programs.local_plate, {"g": DisARM(), "z": Enumerate()}),
    "enumerate-disarm": (programs.local_plate, {"g": Enumerate(), "z": DisARM()}),
    "enumerate-rloo": (programs.local_plate, {"g": Enumerate(), "z": RLOO()}),
    "rloo-disarm": (programs.local_plate, {"g": RLOO(), "z": DisARM()}),
    "average-enumerate": (
        programs.local_plate,
        {"g": REINFORCE(MovingAverage()), "z": Enumerate()},
    ),
    "continuous": (programs.continuous_between, {"z1": DisARM(), "z2": Enumerate()}),
    "continuous-reversed": (programs.continuous_between, {"z1": Enumerate(), "z2": DisARM()}),
    "pathwise-by-name": (
        programs.continuous_between,
        {"z1": REINFORCE(), "u": Pathwise(), "z2": RLOO()},
    ),
    "joined": (programs.local_global_local, {"z": REINFORCE(), "g": Enumerate(), "w": DisARM()}),
    "late": (programs.late_global, {"z": REINFORCE(), "g": DisARM(), "w": REINFORCE()}),
    "two-plates": (programs.one_of_two_plates, {"z": DisARM(), "w": REINFORCE()}),
    "one-dimension": (
        programs.plates_that_share_a_dimension,
        {"z": DisARM(), "w": Enumerate()},
    ),
    "auxiliary": (programs.auxiliary, {"u": Enumerate(), "z": DisARM()}),
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_mixture(mixture: str) -> None:
    structure, estimators = MIXTURES[mixture]
    check_unbiased(elbo_of(None), configured(structure(BERNOULLI), **estimators))


@pytest.mark.parametrize("worlds", ["vectorized", "sequential"])
def test_enumeration_is_refused_across_plates_at_one_dimension(worlds: str) -> None:
    """By the order of the sites, what follows in the second plate may depend on the first."""
    pair = programs.plates_that_share_a_dimension(BERNOULLI)
    pair = configured(pair, z=Enumerate(), w=DisARM())
    with pytest.raises(NonDiffError, match=r"'z'.*plate 'pair'"):
        elbo_of(None, worlds=worlds).differentiable_loss(*pair)


@pytest.mark.parametrize("kind", ["one_hot", "categorical", "bits"])
@pytest.mark.parametrize("first", [Enumerate(), REINFORCE()], ids=repr)
def test_mixture_of_enumeration_and_score(first: Any, kind: str) -> None:
    second = REINFORCE() if isinstance(first, Enumerate) else Enumerate()
    pair = configured(programs.reversed_layers(KINDS[kind]), z1=first, z2=second)
    check_unbiased(elbo_of(None), pair)


def test_normal_site_with_a_score_estimator() -> None:
    """REINFORCE by name takes the pathwise gradient away, and its score is integrated exactly.

    Score and cost are polynomials of degree 2 and 4 in the noise; 6 nodes serve degree 11.
    """

    def model() -> None:
        u = pyro.sample("u", dist.Normal(0.3, 1.2))
        pyro.sample("x", dist.Normal(u**2 - u, 1.3), obs=torch.tensor(0.8))

    def guide() -> None:
        a, s = programs.parameter("a", -0.4), programs.parameter("s", -0.2)
        pyro.sample("u", dist.Normal(a, s.exp()))

    certificate = check_unbiased(elbo_of(None), configured((model, guide), u=REINFORCE()), nodes=6)
    pathwise = certify(elbo_of(None), model, guide, nodes=6)
    assert certificate.total_variance > 2 * pathwise.total_variance  # it was another estimator


# --- particles and the loss -----------------------------------------------------------------


@pytest.mark.parametrize("estimator", [REINFORCE(), DisARM(), Enumerate()], ids=repr)
@pytest.mark.parametrize("structure", [programs.one_site, programs.reversed_layers])
def test_particles(structure: Structure, estimator: Any) -> None:
    """Two particles have the same mean, and half of the variance."""
    one = check_unbiased(elbo_of(estimator), structure(BERNOULLI))
    pyro.clear_param_store()
    two = check_unbiased(elbo_of(estimator, num_particles=2), structure(BERNOULLI))
    assert two.total_variance == pytest.approx(one.total_variance / 2, abs=TOLERANCE)


def test_more_particles_than_asked_for() -> None:
    """RLOO uses all base worlds."""
    pair = programs.reversed_layers(BERNOULLI)
    three = check_unbiased(elbo_of(RLOO(3)), pair)
    pyro.clear_param_store()
    more = check_unbiased(elbo_of(RLOO(2), num_particles=3), pair)
    assert more.total_variance == pytest.approx(three.total_variance, abs=TOLERANCE)


@pytest.mark.parametrize("estimator", [REINFORCE(), RLOO(), DisARM(), Enumerate()], ids=repr)
@pytest.mark.parametrize(
    "structure", [programs.chain, programs.scaled, programs.nested_plates, programs.local_plate]
)
def test_loss_has_the_exact_mean(structure: Structure, estimator: Any) -> None:
    pair = structure(BERNOULLI)
    loss, _ = expectation(elbo_of(estimator), pair)
    exact = exact_loss(*pair, nodes=2).detach()
    assert float(loss) == pytest.approx(float(exact), abs=TOLERANCE)


def test_larger_max_plate_nesting() -> None:
    check_unbiased(elbo_of(DisARM(), max_plate_nesting=3), programs.local_plate(BERNOULLI))


# --- subsamples and masks -------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["none", "poutine", "law"])
@pytest.mark.parametrize("estimator", [REINFORCE(), RLOO(), DisARM(), Enumerate()], ids=repr)
def test_nested_plates_with_masks(mask: str, estimator: Any) -> None:
    check_unbiased(elbo_of(estimator), programs.nested_plates(BERNOULLI, mask, (2,)))


@pytest.mark.parametrize("mask", ["poutine", "law"])
@pytest.mark.parametrize("kind", ["one_hot", "categorical", "bits"])
@pytest.mark.parametrize("estimator", [REINFORCE(), Enumerate()], ids=repr)
def test_masks_with_other_laws(mask: str, kind: str, estimator: Any) -> None:
    check_unbiased(elbo_of(estimator), programs.nested_plates(KINDS[kind], mask, (2,)))


@pytest.mark.parametrize("mask", ["poutine", "law"])
@pytest.mark.parametrize("estimator", [REINFORCE(), RLOO(), DisARM(), Enumerate()], ids=repr)
def test_masked_site_with_an_observation(mask: str, estimator: Any) -> None:
    """The mask takes the site's terms away; its score and its rows' weights stay."""
    check_unbiased(elbo_of(estimator), programs.masked_site(BERNOULLI, mask))


@pytest.mark.parametrize("mask", ["none", "poutine", "law"])
@pytest.mark.parametrize("estimator", [REINFORCE(), DisARM(), Enumerate()], ids=repr)
def test_larger_subsample(mask: str, estimator: Any) -> None:
    check_unbiased(elbo_of(estimator), programs.nested_plates(BERNOULLI, mask, (2, 0)))


@pytest.mark.parametrize("estimator", [REINFORCE(), DisARM(), Enumerate()], ids=repr)
def test_mean_over_subsamples_is_the_full_gradient(estimator: Any) -> None:
    """Subsamples are equally probable, so the mean of their means is that of all data."""
    means = []
    for index in range(3):
        pair = programs.nested_plates(BERNOULLI, "none", (index,))
        means.append(certify(elbo_of(estimator), *pair).mean)
    exact = exact_gradient(*programs.nested_plates(BERNOULLI, "none", (0, 1, 2)))
    for name, value in exact.items():
        mean = torch.stack([mean[name] for mean in means]).mean(0)
        assert float((mean - value).abs().max()) <= TOLERANCE


# --- sequential worlds ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", [REINFORCE(), REINFORCE(MovingAverage())], ids=repr)
def test_control_flow_on_a_sample(kind: str, estimator: Any) -> None:
    elbo, pair = elbo_of(estimator, worlds="sequential"), programs.control_flow(KINDS[kind])
    for _ in range(200):  # until the site that some runs meet has its average
        elbo.differentiable_loss(*pair)
        if len(list(elbo.states.children())) == 2:
            break
    check_unbiased(elbo, pair)


@pytest.mark.parametrize(
    ("kind", "samples"),
    [("bernoulli", 2), ("bernoulli", 3), ("one_hot", 2), ("categorical", 2), ("bits", 2)],
)
def test_control_flow_with_rloo(kind: str, samples: int) -> None:
    elbo = elbo_of(RLOO(samples), worlds="sequential")
    check_unbiased(elbo, programs.control_flow(KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_control_flow_with_wishes_that_grow(kind: str) -> None:
    """Only some runs meet the site that asks for a second base world."""
    elbo = elbo_of(None, worlds="sequential")
    model, plain = programs.control_flow(KINDS[kind])
    estimators = {"z": REINFORCE(), "w": RLOO()}

    def guide() -> None:
        with poutine.infer_config(config_fn=lambda site: chosen(site, estimators)):
            plain()

    check_unbiased(elbo, (model, guide))


class KnownCuts:
    """A source that enumerates logistic noise between all logits that a site can have.

    Sequential branches share a base run's noise and have other logits: a piece must settle the
    value of every world, not of the base run alone.

    Arguments:
        walk: The path to follow.
        guide: A guide of Bernoulli sites without plates.
    """

    def __init__(self, walk: Walk, guide: Callable[[], Any]) -> None:
        self.walk = walk
        self.cuts = possible_logits(guide)

    def __call__(self, request: Request) -> Tensor:
        cuts = sorted({sign * logit for logit in self.cuts[request.site] for sign in (1, -1)})
        below = torch.tensor([*cuts, torch.inf]).sigmoid()
        piece = self.walk.choose(below.diff(prepend=below.new_zeros(1)).tolist())
        ends = [cuts[0] - 2, *cuts, cuts[-1] + 2]
        return torch.full(request.shape, (ends[piece] + ends[piece + 1]) / 2)


def possible_logits(guide: Callable[[], Any]) -> dict[str, list[float]]:
    """The logits of each Bernoulli site of a guide, over all values of the sites before it."""
    found: dict[str, set[float]] = {}
    queue: list[dict[str, Tensor]] = [{}]
    while queue:
        values = queue.pop()
        trace = poutine.trace(poutine.condition(guide, data=values)).get_trace()
        sites = {name: node for name, node in trace.nodes.items() if node["type"] == "sample"}
        for name, node in sites.items():
            found.setdefault(name, set()).add(core(node["fn"]).logits.item())
        free = [name for name in sites if name not in values]
        if free:
            queue += [{**values, free[0]: torch.tensor(value)} for value in (0.0, 1.0)]
    return {name: sorted(logits) for name, logits in found.items()}


SEQUENTIAL = {
    "control-disarm": (programs.control_flow, {"z": DisARM(), "w": REINFORCE()}),
    "control-enumerate": (programs.control_flow, {"z": Enumerate(), "w": REINFORCE()}),
    "control-disarm-both": (programs.control_flow, {"z": DisARM(), "w": DisARM()}),
    "control-enumerate-both": (programs.control_flow, {"z": Enumerate(), "w": Enumerate()}),
    "control-mixed": (programs.control_flow, {"z": Enumerate(), "w": DisARM()}),
    "layers-disarm": (programs.reversed_layers, {"z1": DisARM(), "z2": DisARM()}),
    "layers-both": (programs.reversed_layers, {"z1": Enumerate(), "z2": DisARM()}),
    "chain-mixed": (programs.chain, {"z1": DisARM(), "z2": REINFORCE(), "z3": Enumerate()}),
}


@pytest.mark.parametrize("case", SEQUENTIAL)
def test_branches_that_run_one_by_one(case: str) -> None:
    structure, estimators = SEQUENTIAL[case]
    model, plain = structure(BERNOULLI)

    def guide() -> None:
        with poutine.infer_config(config_fn=lambda site: chosen(site, estimators)):
            plain()

    elbo = elbo_of(None, worlds="sequential")
    elbo.differentiable_loss(model, guide)
    _, mean = expectation(elbo, (model, guide), lambda walk: KnownCuts(walk, plain))
    for name, value in exact_gradient(model, guide).items():
        assert float((mean[name] - value).abs().max()) <= TOLERANCE


def chosen(site: Any, estimators: dict[str, Any]) -> dict[str, Any]:
    """The ``infer`` entry that chooses a site's estimator, where not every run meets the site."""
    return {"estimator": estimators[site["name"]]} if site["name"] in estimators else {}


def test_known_cuts_agree_with_enumeration() -> None:
    """Both sources serve a run without branches, and find the same means."""
    pair = programs.reversed_layers(BERNOULLI)
    own = expectation(elbo_of(REINFORCE()), pair, lambda walk: KnownCuts(walk, pair[1]))
    usual = expectation(elbo_of(REINFORCE()), pair, lambda walk: Enumeration(walk))
    for name, value in usual[1].items():
        assert float((own[1][name] - value).abs().max()) <= TOLERANCE
    assert certify(elbo_of(REINFORCE()), *pair).bias <= TOLERANCE
