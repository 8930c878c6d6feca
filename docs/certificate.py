"""Writes ``certificate.rst``: what each estimator's expectation and variance exactly are.

python -m docs.certificate
"""

import warnings
from pathlib import Path
from typing import Any

import pyro
import torch

from pyro_nondiff.errors import NonDiffError, NonDiffWarning
from pyro_nondiff.estimators import REBAR, REINFORCE, RELAX, RLOO, DisARM, Enumerate
from pyro_nondiff.infer import TraceEstimator_ELBO, config_estimator
from pyro_nondiff.testing import certify, certify_soft
from tests.certificates import programs, soft_programs

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


def main() -> None:
    """Certifies, and writes the page."""
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore", NonDiffWarning)
    page = HEAD + hard_rows() + SOFT_HEAD + soft_rows()
    Path(__file__).with_name("certificate.rst").write_text(page)


if __name__ == "__main__":
    main()
