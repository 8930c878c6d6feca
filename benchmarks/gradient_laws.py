"""Pathwise, score-function and measure-valued gradients of the same laws, by their exact variance.

The comparison of Mohamed et al. (2020), section 3: each law under several costs. Nothing is drawn:
mean and variance are sums over the nodes of quadrature rules, through the whole objective.

    python benchmarks/gradient_laws.py
"""

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_nondiff import noise
from pyro_nondiff.distributions import ScaleGamma
from pyro_nondiff.errors import NonDiffWarning
from pyro_nondiff.estimators import REINFORCE, RLOO, MeasureValued, Pathwise
from pyro_nondiff.infer import ExpectedCost, config_estimator, no_guide
from pyro_nondiff.noise import Request
from pyro_nondiff.testing import certify, outcomes

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
    total = found.total_variance
    if name == "measure-valued" and isinstance(law(), dist.Normal) and law().scale.requires_grad:
        total = polar_variance(objective, chosen, float(found.exact["p"]))
    return f"{total:.3g}", plan.base * plan.num_rows


def polar_variance(objective: ExpectedCost, program: Callable[[], None], exact: float) -> float:
    r"""The variance of a measure-valued gradient of a Normal law.

    The square of the scale's estimate has a factor :math:`|n| \sqrt{n^2 + w^2}`, whose kink a rule
    in :math:`n` and :math:`w` does not see: it is 2 to 5 % off. With :math:`n = \pm m \sin t` and
    :math:`w = m \cos t`, of a Maxwell number :math:`m`, there is none.
    """
    m, m_weights = maxwell_rule(32)
    t, t_weights = angle_rule(24)
    mean = square = 0.0
    for walk in outcomes():
        radius = m[walk.choose(list(m_weights))]
        angle = t[walk.choose(list(t_weights))]
        sign = (-1, 1)[walk.choose([0.5, 0.5])]
        pair = {"normal": sign * radius * np.sin(angle), "rayleigh": radius * np.cos(angle)}

        def source(request: Request, pair: dict[str, float] = pair) -> Tensor:
            return torch.full(request.shape, pair[request.kind])

        with noise.source(source):
            loss = objective.differentiable_loss(program, no_guide)
        gradient = float(torch.autograd.grad(loss, pyro.param("p").unconstrained())[0])
        mean += walk.probability * gradient
        square += walk.probability * gradient**2
    if abs(mean - exact) > 1e-6 * max(1.0, abs(exact)):
        raise RuntimeError(f"the rule is off by {mean - exact:.1e}: take more nodes")
    return square - mean**2


def maxwell_rule(count: int) -> tuple[Any, Any]:
    """Nodes and weights on (0, 10), beyond which a Maxwell number has a probability of 2e-21."""
    x, weights = np.polynomial.legendre.leggauss(count)
    x = 5 * (1 + x)
    weights = weights * x**2 * np.exp(-(x**2) / 2)
    return x, weights / weights.sum()


def angle_rule(count: int) -> tuple[Any, Any]:
    """Nodes and weights on (0, pi/2) of an angle whose sine is uniform."""
    x, weights = np.polynomial.legendre.leggauss(count)
    t = (1 + x) * np.pi / 4
    weights = weights * np.cos(t)
    return t, weights / weights.sum()


NODES = {"pathwise": 40, "score": 40, "score, RLOO(2)": 32, "measure-valued": 32}
"""Rules of fewer nodes where a step has two numbers. A cosine under a Gamma law needs most."""


def main() -> None:
    """Print a table a law."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="one law alone; all is checked anyway")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore", NonDiffWarning)
    for title, law in list(LAWS.items())[: 1 if args.smoke else None]:
        rows = {name: [variance(law, cost, name) for cost in COSTS.values()] for name in ESTIMATORS}
        print(f"\n| {title} | runs | " + " | ".join(COSTS) + " |")
        print("|---" * (2 + len(COSTS)) + "|")
        for name, row in rows.items():
            print(f"| {name} | {row[0][1]} | " + " | ".join(text for text, _ in row) + " |")


if __name__ == "__main__":
    main()
