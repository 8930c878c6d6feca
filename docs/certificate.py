"""Writes ``certificate.rst``: what each estimator's expectation and variance exactly are.

python -m docs.certificate
"""

import warnings
from pathlib import Path
from typing import Any

import pyro
import torch

from pyro_nondiff.errors import NonDiffError, NonDiffWarning
from pyro_nondiff.estimators import (
    LAX,
    REBAR,
    REINFORCE,
    RELAX,
    RLOO,
    DisARM,
    Enumerate,
    MeasureValued,
    StraightThrough,
)
from pyro_nondiff.infer import (
    ExpectedCost,
    TraceEstimator_ELBO,
    config_estimator,
    no_guide,
)
from pyro_nondiff.testing import certify, certify_soft
from tests.certificates import continuous_programs, own_programs, programs, soft_programs

HEAD = """Certificate
===========

The bias of each estimator through a whole ELBO, without randomness: the largest absolute
difference, over all parameters of model and guide, between the exact expectation of the estimate
and the exact gradient. Gradients are of order 0.1 to 10; float64 rounds sums of this length at
about 1e-15. The programs are those of the test-suite. ``python -m docs.certificate`` writes this
page anew.

Hard worlds
-----------

All draws and all pieces of the noise are enumerated. The variance is summed over all parameters and
stands relative to REINFORCE without a baseline; it is not known exactly (n/a) where a categorical
site has another law in each row. *Runs* are rows of the program that a step evaluates.

.. list-table::
   :header-rows: 1

   * - program
     - law
     - estimator
     - bias
     - variance
     - runs
"""

SOFT_HEAD = """
Soft worlds
-----------

The noise is integrated by the trapezoid rule in a logistic variable; *base worlds* is the number of
its points. The rule is coarser where there are three dimensions, and what is left is its error.

.. list-table::
   :header-rows: 1

   * - program
     - estimator
     - bias
     - base worlds
"""

CONTINUOUS_HEAD = """
Continuous laws
---------------

The noise is integrated by Gauss's rules, which are exact here: the costs are polynomials of the
noise, and so is the control variate of LAX. For a Bernoulli all values are enumerated. *Runs* are
rows of the program that a step evaluates.

.. list-table::
   :header-rows: 1

   * - program
     - law
     - estimator
     - bias
     - runs
"""

BIASED_HEAD = """
Straight through
----------------

A straight-through gradient is biased, and this is by how much: the largest difference, and the
largest exact gradient to compare it with. The costs are quadratic in each value, so ``reinmax`` at
temperature 1 is exact until another site depends on the value. ``gumbel_rao`` has the mean of
``gumbel``, and ``identity`` that of ``softmax`` at temperature 1. More of this is on the page of
:doc:`laws/straight_through`.

.. list-table::
   :header-rows: 1

   * - program
     - gradient
     - temperature
     - bias
     - largest gradient
"""

OWN_HEAD = """
Expected costs, and the model's own sites
-----------------------------------------

Programs whose sites no guide draws, under :class:`pyro_nondiff.infer.ExpectedCost`, and models
with sites of their own behind a guide, in an ELBO. Costs that NumPy looks up have no derivative.
Where noise is integrated, *outcomes* are the points of the rule; else they are all draws.

.. list-table::
   :header-rows: 1

   * - program
     - estimator
     - bias
     - outcomes
"""

HARD = {
    "one site": (programs.one_site, ("bernoulli", "one_hot", "categorical")),
    "three dependent sites": (programs.chain, ("bernoulli",)),
    "two layers, model reversed": (programs.reversed_layers, ("bernoulli", "categorical")),
    "local, global, local": (programs.local_global_local, ("bernoulli",)),
    "a Normal between": (programs.continuous_between, ("bernoulli",)),
}
SOFT: list[tuple[str, Any, Any, dict[str, Any]]] = [
    ("one site", soft_programs.one_site, REBAR(), {}),
    ("one site", soft_programs.one_site, RELAX(), {}),
    ("one site, black box", soft_programs.one_site, RELAX(relaxed_cost=False), {}),
    ("shared logit, in a plate", soft_programs.shared_logit, REBAR(), {}),
    ("two dependent sites", soft_programs.two_sites, REBAR(), {}),
    ("two dependent sites", soft_programs.two_sites, RELAX(), {}),
    ("before DisARM", soft_programs.two_sites, {"z": REBAR(), "y": DisARM()}, {}),
    ("before REINFORCE", soft_programs.two_sites, {"z": REBAR(), "y": REINFORCE()}, {}),
    ("two sites, model reversed", soft_programs.reversed_model, REBAR(), {}),
    ("one-hot of three", soft_programs.one_hot, REBAR(), {}),
    ("one-hot of three", soft_programs.one_hot, RELAX(), {}),
    (
        "one-hot of three before a Bernoulli",
        soft_programs.one_hot_then_bernoulli,
        REBAR(1.0),
        {"step": 0.9, "width": 18.0},
    ),
    ("a Normal between", soft_programs.normal_between, REBAR(), {"nodes": 2}),
    (
        "an indexed Categorical behind",
        soft_programs.categorical_behind,
        {"z": REBAR(), "y": REINFORCE()},
        {},
    ),
    ("nested plates, subsample, masks, scale", soft_programs.masked_plates, REBAR(), {}),
]
CONTINUOUS = {
    "one site": (programs.one_site, 1),
    "nested plates": (programs.nested_plates, 1),
    "three dependent sites": (programs.chain, 3),
}
LAWS = {
    "Normal": (continuous_programs.NORMAL, 1),
    "two Normals": (continuous_programs.PAIR, 2),
    "Exponential": (continuous_programs.EXPONENTIAL, 1),
    "ScaleGamma": (continuous_programs.SCALE_GAMMA, 1),
}
HARD_ESTIMATORS = (REINFORCE(), RLOO(2), DisARM(), Enumerate(), MeasureValued())
COSTS = {
    "one decision": own_programs.one_decision(programs.BERNOULLI),
    "three decisions in a row": own_programs.decisions(programs.BERNOULLI),
    "a Normal between": own_programs.normal_between(programs.BERNOULLI),
    "a scaled plate with a mask": own_programs.buyers(programs.BERNOULLI, "law"),
    "costs looked up by NumPy": own_programs.looked_up,
}
OWN = {
    "own site behind a guide's": own_programs.downstream(programs.BERNOULLI),
    "own site before a guide's": own_programs.upstream(programs.BERNOULLI),
    "own sites around a guide's": own_programs.between(programs.BERNOULLI),
}
SOFT_OWN: list[tuple[str, Any, Any]] = [
    ("one decision", None, REBAR()),
    ("one decision", None, RELAX()),
    ("one decision, black box", None, RELAX(relaxed_cost=False)),
    ("own site behind a guide's", own_programs.downstream, REBAR()),
    ("own site behind a guide's", own_programs.downstream, RELAX()),
    ("own site before a guide's", own_programs.upstream, REBAR()),
]
STRAIGHT_THROUGH: list[tuple[str, Any]] = [
    ("one Bernoulli", lambda: programs.one_site(programs.BERNOULLI)),
    ("one-hot of three", lambda: programs.one_site(programs.ONE_HOT)),
    ("two dependent Bernoullis", soft_programs.two_sites),
]
GRADIENTS = [
    ("identity", 1.0),
    ("selected", 1.0),
    ("softmax", 0.5),
    ("gumbel", 1.0),
    ("gumbel", 0.5),
    ("reinmax", 1.0),
    ("reinmax", 0.5),
]


def row(*cells: object) -> str:
    """One row of a list-table."""
    first, *others = (str(cell) for cell in cells)
    return "\n".join([f"   * - {first}", *(f"     - {cell}" for cell in others)]) + "\n"


def hard_rows() -> str:
    """The table of hard worlds."""
    rows = ""
    for title, (program, laws) in HARD.items():
        for law in laws:
            pair = program(programs.KINDS[law])
            plain = 1.0
            for estimator in (REINFORCE(), RLOO(2), DisARM(), Enumerate()):
                pyro.clear_param_store()
                elbo = TraceEstimator_ELBO(estimator, worlds="vectorized")
                try:
                    found = certify(elbo, *pair, nodes=2)
                except NonDiffError:  # a law or a structure that it refuses
                    continue
                plain = found.total_variance if estimator == REINFORCE() else plain
                plan = elbo.plan_of(*pair)
                ratio = f"{found.total_variance / plain:.2f}".replace("nan", "n/a")
                runs = plan.base * plan.num_rows
                rows += row(title, law, type(estimator).__name__, f"{found.bias:.0e}", ratio, runs)
    return rows


def soft_rows() -> str:
    """The table of soft worlds."""
    rows = ""
    for title, program, estimator, grid in SOFT:
        pyro.clear_param_store()
        torch.manual_seed(0)  # of the networks that RELAX makes
        pair = program()
        guide = pair.guide
        name = "RELAX" if isinstance(estimator, RELAX) else "REBAR"
        if isinstance(estimator, dict):
            guide, estimator = config_estimator(guide, estimator), None
        elbo = TraceEstimator_ELBO(estimator, worlds="vectorized")
        found = certify_soft(elbo, pair.model, guide, **{"step": 0.3, **grid})
        rows += row(title, name, f"{found.bias:.0e}", found.outcomes)
    return rows


def continuous_rows() -> str:
    """The table of continuous laws, and of measure-valued gradients of a discrete one."""
    rows = ""
    for title, (program, nodes) in CONTINUOUS.items():
        pair = program(programs.BERNOULLI)
        rows += continuous_row(title, "Bernoulli", MeasureValued(), pair, certify)
        for law, (kind, size) in LAWS.items():
            if nodes > 1 and law != "Normal":  # its scale is no polynomial of the value before
                continue
            for estimator in (MeasureValued(), LAX(continuous_programs.Polynomial(size))):
                grid = {"step": 1.0, "width": 0.0, "nodes": 6 if nodes > 1 else 4}
                pair = program(kind)
                rows += continuous_row(title, law, estimator, pair, certify_soft, **grid)
    return rows


def continuous_row(
    title: str, law: str, estimator: Any, pair: Any, certifier: Any, **grid: Any
) -> str:
    """One row of that table; none for a law or structure that is refused."""
    pyro.clear_param_store()
    pair = continuous_programs.configured(pair, estimator)
    elbo = TraceEstimator_ELBO(worlds="vectorized")
    try:
        found = certifier(elbo, *pair, **grid)
        pyro.clear_param_store()
        plan = TraceEstimator_ELBO(worlds="vectorized").plan_of(*pair)
    except NonDiffError:
        return ""
    runs = plan.base * plan.num_rows
    return row(title, law, type(estimator).__name__, f"{found.bias:.0e}", runs)


def biased_rows() -> str:
    """The table of straight-through gradients."""
    rows = ""
    for title, program in STRAIGHT_THROUGH:
        for gradient, temperature in GRADIENTS:
            pyro.clear_param_store()
            estimator = StraightThrough(gradient, temperature)
            elbo = TraceEstimator_ELBO(estimator, worlds="vectorized")
            if gradient == "gumbel":
                found = certify_soft(elbo, *program(), step=0.3)
            else:
                found = certify(elbo, *program())
            largest = max(float(exact.abs().max()) for exact in found.exact.values())
            bias = f"{found.bias:.0e}" if found.bias < 1e-9 else f"{found.bias:.4f}"
            rows += row(title, gradient, f"{temperature:g}", bias, f"{largest:.4f}")
    return rows


def own_rows() -> str:
    """The table of expected costs, and of the model's own sites."""
    rows = ""
    pairs: dict[str, Any] = {title: (program, no_guide) for title, program in COSTS.items()}
    for title, pair in (pairs | OWN).items():
        for estimator in HARD_ESTIMATORS:
            pyro.clear_param_store()
            kind = ExpectedCost if title in COSTS else TraceEstimator_ELBO
            found = certify(kind(estimator, worlds="vectorized"), *pair, nodes=2)
            rows += row(title, type(estimator).__name__, f"{found.bias:.0e}", found.outcomes)
    for title, structure, estimator in SOFT_OWN:
        pyro.clear_param_store()
        torch.manual_seed(0)  # of the networks that RELAX makes
        pair = structure(programs.BERNOULLI) if structure else pairs["one decision"]
        kind = TraceEstimator_ELBO if structure else ExpectedCost
        found = certify_soft(kind(estimator, worlds="vectorized"), *pair, step=0.3)
        rows += row(title, type(estimator).__name__, f"{found.bias:.0e}", found.outcomes)
    return rows


def main() -> None:
    """Certifies, and writes the page."""
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore", NonDiffWarning)
    page = HEAD + hard_rows() + SOFT_HEAD + soft_rows()
    page += CONTINUOUS_HEAD + continuous_rows() + BIASED_HEAD + biased_rows()
    page += OWN_HEAD + own_rows()
    Path(__file__).with_name("certificate.rst").write_text(page)


if __name__ == "__main__":
    main()
