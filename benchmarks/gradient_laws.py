"""Pathwise, score-function and measure-valued gradients of the same laws, by their exact variance.

The comparison of Mohamed et al. (2020), section 3: each law under several costs. Nothing is drawn:
mean and variance are sums over the nodes of quadrature rules, through the whole objective.

    python benchmarks/gradient_laws.py
"""

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_nondiff.distributions import ScaleGamma
from pyro_nondiff.errors import NonDiffWarning
from pyro_nondiff.estimators import REINFORCE, RLOO, MeasureValued, Pathwise
from pyro_nondiff.infer import ExpectedCost, config_estimator, no_guide
from pyro_nondiff.testing import certify

COSTS: dict[str, Callable[[Tensor], Tensor]] = {
    "x": lambda x: x,
    "x^2": lambda x: x**2,
    "x^3": lambda x: x**3,
    "exp(-x/2)": lambda x: (-x / 2).exp(),
    "cos x": torch.cos,
}

ESTIMATORS = {
    "pathwise": Pathwise(),
    "score": REINFORCE(),
    "score, RLOO(2)": RLOO(2),
    "measure-valued": MeasureValued(),
}


def positive(name: str, value: float) -> Tensor:
    """A positive parameter."""
    return pyro.param(name, torch.tensor(value), constraint=constraints.positive)


LAWS: dict[str, Callable[[], Any]] = {
    "Normal(1, 1), loc": lambda: dist.Normal(pyro.param("p", torch.tensor(1.0)), 1.0),
    "Normal(1, 1), log scale": lambda: dist.Normal(1.0, positive("p", 1.0)),
    "Exponential(1), log rate": lambda: dist.Exponential(positive("p", 1.0)),
    "Gamma(3, 1), log scale": lambda: ScaleGamma(3.0, positive("p", 1.0)),
}


def variance(
    law: Callable[[], Any], cost: Callable[[Tensor], Tensor], name: str
) -> tuple[str, int]:
    """The exact variance of one estimator's gradient, and the rows that a step evaluates."""

    def program() -> None:
        x = pyro.sample("x", law())
        pyro.factor("cost", -cost(x))

    estimator = ESTIMATORS[name]
    pyro.clear_param_store()
    chosen = config_estimator(program, {"x": estimator})
    objective = ExpectedCost(worlds="vectorized")
    found = certify(objective, chosen, no_guide, nodes=NODES[name])
    scale = max(1.0, float(found.exact["p"].abs()))
    if found.bias > 1e-6 * scale:
        raise RuntimeError(f"{name} is off by {found.bias:.1e}: take more nodes")
    plan = objective.plan_of(chosen, no_guide)
    return f"{found.total_variance:.3g}", plan.base * plan.num_rows


NODES = {"pathwise": 40, "score": 40, "score, RLOO(2)": 32, "measure-valued": 32}
"""Rules of fewer nodes where a step has two numbers. A cosine under a Gamma law needs most."""


def main() -> None:
    """Print a table a law."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore", NonDiffWarning)
    for title, law in LAWS.items():
        rows = {name: [variance(law, cost, name) for cost in COSTS.values()] for name in ESTIMATORS}
        print(f"\n| {title} | runs | " + " | ".join(COSTS) + " |")
        print("|---" * (2 + len(COSTS)) + "|")
        for name, row in rows.items():
            print(f"| {name} | {row[0][1]} | " + " | ".join(text for text, _ in row) + " |")


if __name__ == "__main__":
    main()
