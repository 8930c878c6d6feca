"""REBAR and RELAX have the exact gradient as expectation, by quadrature over their noise."""

from collections.abc import Callable
from typing import Any

import pyro
import pytest
from pyro.infer import SVI
from torch import nn

from pyro_nondiff.errors import NonDiffWarning
from pyro_nondiff.estimators import REBAR, REINFORCE, RELAX, DisARM
from pyro_nondiff.infer import (
    TraceEstimator_ELBO,
    TraceREBAR_ELBO,
    TraceRELAX_ELBO,
    config_estimator,
)
from pyro_nondiff.testing import Certificate, certify_soft

from . import soft_programs as programs
from .soft_programs import SoftPair

TOLERANCE = 1e-9
"""The rule's error at a step of 0.6 times the temperature is exp(-2 pi^2 / 0.6) = 5e-15, times
derivatives of the cost that are below 1e3 here; sums of 1e5 rounded products add 1e-11."""


def check(
    estimator: Any,
    pair: SoftPair,
    temperature: float = 0.5,
    tolerance: float = TOLERANCE,
    **grid: Any,
) -> Certificate:
    """Fails unless the expectation is the exact gradient, and there is a gradient to estimate."""
    guide = pair.guide
    if isinstance(estimator, dict):
        guide, estimator = config_estimator(guide, estimator), None
    elbo = TraceEstimator_ELBO(estimator, worlds="vectorized")
    grid = {"step": 0.6 * min(temperature, 1), **grid}
    certificate = certify_soft(elbo, pair.model, guide, **grid)
    assert float(certificate.exact["a"].abs().max()) > 1e-3
    assert certificate.bias <= tolerance
    return certificate


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("eta", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("temperature", [0.3, 0.5, 1.0])
def test_rebar_at_one_site(temperature: float, eta: float, second_order: bool) -> None:
    estimator = REBAR(temperature, eta, second_order=second_order)
    check(estimator, programs.one_site(), temperature)


RELAXES = {
    "relaxed cost": lambda: RELAX(),
    "black box": lambda: RELAX(relaxed_cost=False),
    "own net": lambda: RELAX(nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)), eta=0.3),
}


@pytest.mark.parametrize("name", RELAXES)
def test_relax_at_one_site(name: str) -> None:
    check(RELAXES[name](), programs.one_site())


@pytest.mark.parametrize("make", [TraceREBAR_ELBO, TraceRELAX_ELBO])
def test_after_training_the_control_variate(make: Callable[[], TraceEstimator_ELBO]) -> None:
    pair, elbo = programs.one_site(), make()
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam(only_estimators), elbo)
    for _ in range(30):
        svi.step()
    learnt = float(elbo.states.state_dict()["z.log_temperature"].exp())
    assert learnt != 0.5
    certificate = certify_soft(elbo, pair.model, pair.guide, step=0.5 * learnt)
    assert certificate.bias <= TOLERANCE


def only_estimators(name: str) -> dict[str, float]:
    """Learning rates that hold model and guide fixed."""
    return {"lr": 0.02 if name.startswith("estimator.") else 0.0}


@pytest.mark.parametrize("estimator", [REBAR(), RELAX()], ids=["REBAR", "RELAX"])
def test_shared_logit(estimator: Any) -> None:
    check(estimator, programs.shared_logit())


@pytest.mark.parametrize(
    "pair", [programs.two_sites(), programs.reversed_model()], ids=["", "reversed"]
)
@pytest.mark.parametrize(
    "behind", [REBAR(), DisARM(), REINFORCE()], ids=["REBAR", "DisARM", "REINFORCE"]
)
def test_two_dependent_sites(behind: Any, pair: SoftPair) -> None:
    check({"z": REBAR(), "y": behind}, pair)


def test_relax_beside_relax() -> None:
    check(RELAX(), programs.two_sites())


@pytest.mark.parametrize("estimator", [REBAR(), RELAX(), RELAX(relaxed_cost=False)], ids=repr)
def test_one_hot(estimator: Any) -> None:
    check(estimator, programs.one_hot())


def test_one_hot_before_bernoulli() -> None:
    # three dimensions: a coarser rule, of error exp(-2 pi^2 / 0.9) = 3e-10 and exp(-18) = 2e-8
    pair = programs.one_hot_then_bernoulli()
    check(REBAR(1.0), pair, 1.0, 1e-7, step=0.9, width=18.0)


def test_normal_between() -> None:
    # two normal nodes: expectation and exact gradient are of a program whose noise has two values
    check(REBAR(), programs.normal_between(), nodes=2)


def test_categorical_behind() -> None:
    estimators = {"z": REBAR(), "y": REINFORCE()}
    with pytest.warns(NonDiffWarning, match="site 'y' cannot be relaxed.*variate of site 'z'"):
        check(estimators, programs.categorical_behind())


def test_masked_plates() -> None:
    check(REBAR(), programs.masked_plates())
