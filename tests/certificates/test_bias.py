"""The exact bias of every estimator is zero, through whole objectives, in every structure."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.estimators import (
    REINFORCE,
    RLOO,
    Auto,
    DisARM,
    Enumerate,
    MovingAverage,
    NeuralBaseline,
)

from . import programs
from .checks import check_unbiased, elbo_of
from .programs import BERNOULLI, KINDS, Kind, Structure

pytestmark = pytest.mark.filterwarnings(
    # what it says is true of some structures, and costs variance only
    "ignore:site '.*' lies in a plate that the later guide site"
)


def neural() -> NeuralBaseline:
    """A baseline that is not zero, with running averages."""
    net = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(net.weight, 0.4)
    torch.nn.init.constant_(net.bias, 0.2)
    return NeuralBaseline(net, input=torch.tensor([0.7]), centre=True, normalise=True)


ESTIMATORS: dict[str, Callable[[], Any]] = {
    "reinforce": REINFORCE,
    "moving_average": lambda: REINFORCE(MovingAverage(decay=0.6)),
    "neural": lambda: REINFORCE(neural()),
    "sum": lambda: REINFORCE(MovingAverage() + neural()),
    "disarm": DisARM,
    "enumerate": Enumerate,
    "rloo2": RLOO,
    "rloo3": lambda: RLOO(num_samples=3),
    "auto": Auto,
}


@dataclass(frozen=True)
class Case:
    """A structure, with its number of discrete elements and of normal ones."""

    structure: Structure
    units: int
    normals: int = 0


CASES = [
    Case(programs.one_site, 1),
    Case(programs.shared_logit, 2),
    Case(programs.chain, 3),
    Case(programs.reversed_layers, 2),
    Case(programs.early_terms, 2),
    Case(programs.nested_plates, 2),
    Case(programs.scaled, 2),
    Case(programs.local_plate, 3),
    Case(programs.local_global_local, 5),
    Case(programs.late_global, 5),
    Case(programs.one_of_two_plates, 4),
    Case(programs.plates_that_share_a_dimension, 5),
    Case(programs.sequential_plate, 2),
    Case(programs.auxiliary, 2),
    Case(programs.guide_factor, 2),
    Case(programs.continuous_before, 1, 1),
    Case(programs.continuous_between, 2, 1),
    Case(programs.continuous_after, 2, 2),
    Case(programs.continuous_global, 3, 1),
]
REFUSES_ENUMERATION = {
    "local_global_local",
    "late_global",
    "one_of_two_plates",
    "plates_that_share_a_dimension",
    "continuous_global",
}
"""Structures in which plate elements share a cost."""

SIZES = {"bernoulli": 2, "one_hot": 3, "categorical": 3, "bits": 4}
BASELINED = {"one_site", "chain", "nested_plates", "local_plate", "continuous_between"}
"""A baseline enters the estimate in one place: these structures have every shape of it."""
MOST_OUTCOMES = {"bernoulli": 250, "one_hot": 100, "categorical": 100, "bits": 70}
LARGE = {
    "local_global_local-bernoulli-disarm",
    "late_global-bernoulli-rloo2",
    "early_terms-bernoulli-auto",
}
"""Worth their two seconds each."""


def outcomes_of(case: Case, kind: str, estimator: str) -> float:
    """About how many outcomes a certificate sums."""
    base = SIZES[kind] ** case.units * 2**case.normals
    if estimator in ("disarm", "enumerate"):
        return 4.0**case.units * 2**case.normals * (1 if kind == "bernoulli" else base)
    return float(base ** {"rloo2": 2, "rloo3": 3, "auto": 4}.get(estimator, 1))


def applies(case: Case, kind: str, estimator: str) -> bool:
    """Whether an estimator serves a case, and there is something new to see."""
    structure = case.structure.__name__
    if estimator == "disarm":
        return kind in ("bernoulli", "bits")
    if estimator == "enumerate":
        return structure not in REFUSES_ENUMERATION
    if estimator in ("moving_average", "neural", "sum"):
        return structure in BASELINED
    return True


def cases() -> Iterator[Any]:
    """All combinations that apply and are small enough."""
    for case in CASES:
        for kind in KINDS:
            for estimator in [name for name in ESTIMATORS if applies(case, kind, name)]:
                label = f"{case.structure.__name__}-{kind}-{estimator}"
                if outcomes_of(case, kind, estimator) <= MOST_OUTCOMES[kind] or label in LARGE:
                    yield pytest.param(case.structure, KINDS[kind], estimator, id=label)


@pytest.mark.parametrize(("structure", "kind", "estimator"), list(cases()))
def test_gradient_has_no_bias(structure: Structure, kind: Kind, estimator: str) -> None:
    elbo, pair = elbo_of(ESTIMATORS[estimator]()), structure(kind)
    for _ in range(3):  # what is learnt is not at its start
        elbo.differentiable_loss(*pair)
    check_unbiased(elbo, pair)
    if estimator in ("moving_average", "neural", "sum"):
        learnt = elbo.states.state_dict()
        averages = [value for name, value in learnt.items() if name.endswith(".mean")]
        assert averages
        assert all(value.abs().min() > 0 for value in averages)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.structure.__name__)
def test_enumeration_is_refused_where_elements_share_a_cost(case: Case) -> None:
    elbo, pair = elbo_of(Enumerate()), case.structure(BERNOULLI)
    if case.structure.__name__ in REFUSES_ENUMERATION:
        with pytest.raises(NonDiffError, match=r"elements share a cost"):
            elbo.differentiable_loss(*pair)
    else:
        elbo.differentiable_loss(*pair)
