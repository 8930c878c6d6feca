"""The page of the docs: what it says still holds, and no bias on it is more than rounding."""

from pathlib import Path
from typing import Any

import pytest

from pyro_nondiff.estimators import MeasureValued, StraightThrough
from pyro_nondiff.infer import ExpectedCost, no_guide
from pyro_nondiff.testing import certify

from . import own_programs, programs
from .checks import TOLERANCE, elbo_of
from .test_bias import ESTIMATORS

PAGE = Path(__file__).parents[2] / "docs" / "certificate.rst"
NAMES = {
    "REINFORCE": "reinforce",
    "RLOO": "rloo2",
    "DisARM": "disarm",
    "Enumerate": "enumerate",
}
CHEAP = {
    ("one site", "bernoulli"): programs.one_site,
    ("one site", "one_hot"): programs.one_site,
    ("one site", "categorical"): programs.one_site,
    ("two layers, model reversed", "bernoulli"): programs.reversed_layers,
}


def tables() -> list[list[dict[str, str]]]:
    """The list-tables of the page: a dictionary a row, by the header's cells."""
    found: list[list[list[str]]] = []
    for line in PAGE.read_text().splitlines():
        if line.startswith(".. list-table::"):
            found.append([])
        elif line.startswith("   * - "):
            found[-1].append([line.removeprefix("   * - ")])
        elif line.startswith("     - "):
            found[-1][-1].append(line.removeprefix("     - "))
    return [[dict(zip(rows[0], row, strict=True)) for row in rows[1:]] for rows in found]


ROWS = [row for row in tables()[0] if (row["program"], row["law"]) in CHEAP]


def test_page_has_all_estimators_and_no_bias_but_of_straight_through() -> None:
    hard, soft, continuous, biased, own = tables()
    assert {row["estimator"] for row in hard} == set(NAMES)
    assert {row["estimator"] for row in continuous} == {"LAX", "MeasureValued"}
    assert {row["estimator"] for row in own} == {*NAMES, "MeasureValued", "REBAR", "RELAX"}
    assert all(float(row["bias"]) <= TOLERANCE for row in [*hard, *continuous, *own])
    # quadrature leaves an error of its own, 1e-7 in three dimensions
    assert all(float(row["bias"]) <= 1e-7 for row in soft)
    exact = [row["program"] for row in biased if float(row["bias"]) <= TOLERANCE]
    assert exact == ["one Bernoulli", "one-hot of three"]  # reinmax, of a quadratic cost
    assert all(float(row["bias"]) > 1e-3 for row in biased if row["program"] not in exact)


@pytest.mark.parametrize("law", ["BERNOULLI", "ONE_HOT"])
@pytest.mark.parametrize("gradient", ["identity", "selected", "reinmax"])
def test_straight_through_row_still_holds(gradient: str, law: str, param_store: Any) -> None:
    title = {"BERNOULLI": "one Bernoulli", "ONE_HOT": "one-hot of three"}[law]
    stated = next(
        row
        for row in tables()[3]
        if (row["program"], row["gradient"], row["temperature"]) == (title, gradient, "1")
    )
    pair = programs.one_site(getattr(programs, law))
    certificate = certify(elbo_of(StraightThrough(gradient)), *pair)
    assert certificate.bias == pytest.approx(float(stated["bias"]), abs=0.000051)
    largest = max(float(exact.abs().max()) for exact in certificate.exact.values())
    assert largest == pytest.approx(float(stated["largest gradient"]), abs=0.000051)


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: f"{row['program']}-{row['law']}-{row['estimator']}"
)
def test_row_still_holds(row: dict[str, str], param_store: Any) -> None:
    """Runs as stated; variance to the digits that are printed; no bias."""
    structure = CHEAP[row["program"], row["law"]]
    pair = structure(programs.KINDS[row["law"]])
    plain = certify(elbo_of(ESTIMATORS["reinforce"]()), *pair, nodes=2).total_variance
    param_store.clear()
    elbo = elbo_of(ESTIMATORS[NAMES[row["estimator"]]]())
    certificate = certify(elbo, *pair, nodes=2)
    plan = elbo.plan_of(*pair)
    assert plan.base * plan.num_rows == int(row["runs"])
    assert certificate.total_variance / plain == pytest.approx(float(row["variance"]), abs=0.005001)
    assert certificate.bias <= TOLERANCE


COSTS = {
    "one decision": own_programs.one_decision(programs.BERNOULLI),
    "a Normal between": own_programs.normal_between(programs.BERNOULLI),
    "costs looked up by NumPy": own_programs.looked_up,
}
COST_ROWS = [
    row
    for row in tables()[4]
    if row["program"] in COSTS and row["estimator"] not in ("REBAR", "RELAX")
]


@pytest.mark.parametrize("row", COST_ROWS, ids=lambda row: f"{row['program']}-{row['estimator']}")
def test_row_of_an_expected_cost_still_holds(row: dict[str, str], param_store: Any) -> None:
    """Outcomes as stated; no bias."""
    estimator = MeasureValued() if row["estimator"] == "MeasureValued" else None
    estimator = estimator or ESTIMATORS[NAMES[row["estimator"]]]()
    objective = ExpectedCost(estimator, worlds="vectorized")
    found = certify(objective, COSTS[row["program"]], no_guide, nodes=2)
    assert found.outcomes == int(row["outcomes"])
    assert found.bias <= TOLERANCE


def test_cheap_rows_are_on_the_page() -> None:
    assert len(ROWS) == 4 + 3 + 3 + 4
    assert len(COST_ROWS) == 3 * 5
