"""Continuous laws for the structures of ``programs``, and what is judged on them.

Costs are polynomials of the noise, so that Gauss's rules are exact with a few nodes: locations are
linear in earlier values, and a Gamma has the concentration of its prior, whose powers of the value
then cancel. Node numbers are even: an odd rule of a normal number has a node at 0, where the sign
of a Maxwell number jumps.
"""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_nondiff.distributions import InverseCDFExponential, ScaleGamma
from pyro_nondiff.infer import TraceEstimator_ELBO, config_estimator
from pyro_nondiff.testing import Certificate, certify_soft

from .checks import TOLERANCE
from .programs import Kind, Pair, _bits_number, _two

TRIL = torch.tensor([[0.8, 0.0], [0.3, 0.6]])

NORMAL = Kind("normal", lambda s: dist.Normal(0.8 * s, 0.7), lambda value: value)
PAIR = Kind(
    "pair",
    lambda s: dist.Normal(_two(s), torch.tensor([0.7, 1.1])).to_event(1),
    _bits_number,
)
MULTIVARIATE = Kind(
    "multivariate",
    lambda s: dist.MultivariateNormal(_two(s), scale_tril=TRIL),
    _bits_number,
)
EXPONENTIAL = Kind("exponential", lambda s: dist.Exponential((0.5 * s).exp()), lambda value: value)
INVERSE_CDF = Kind(
    "inverse_cdf", lambda s: InverseCDFExponential((0.5 * s).exp()), lambda value: value
)
SCALE_GAMMA = Kind(
    "scale_gamma", lambda s: ScaleGamma(2.5, (0.5 * s).exp()), lambda value: 0.4 * value
)
LOG_NORMAL = Kind(
    "log_normal", lambda s: dist.LogNormal(0.5 * s, torch.tensor(0.4)), lambda value: value.log()
)
AFFINE = Kind(
    "affine",
    lambda s: dist.TransformedDistribution(
        dist.Normal(s, 0.7), [dist.transforms.AffineTransform(0.3, -1.2)]
    ),
    lambda value: value,
)


class Polynomial(nn.Module):
    """A control variate of degree two in each number, whose expectation Gauss's rules find."""

    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.linear = nn.Parameter(torch.linspace(0.9, -0.4, size))
        self.square = nn.Parameter(torch.linspace(-0.3, 0.6, size))

    def forward(self, value: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        return ((self.linear + shift) * value + self.square * value**2).sum(-1)


def configured(pair: Pair, estimators: Any) -> Pair:
    """A pair whose guide's sites have estimators of their own: by name, or one for all."""
    if not isinstance(estimators, dict):
        estimators = dict.fromkeys(("z", "z1", "z2", "z3", "g", "w", "u"), estimators)
    names = _names(pair[1])
    chosen = {name: estimator for name, estimator in estimators.items() if name in names}
    return pair[0], config_estimator(pair[1], chosen)


def _names(guide: Callable[[], Any]) -> list[str]:
    from pyro import poutine

    with torch.random.fork_rng(devices=[]):
        return list(poutine.trace(guide).get_trace().nodes)


def certified(
    pair: Pair, estimators: Any, nodes: int, soft: bool = False, default: Any = None
) -> Certificate:
    """A certificate by one vectorised run. Without ``soft``, logistic noise has no nodes."""
    grid = {"step": 0.4, "width": 24.0} if soft else {"step": 1.0, "width": 0.0}
    elbo = TraceEstimator_ELBO(default, worlds="vectorized")
    return certify_soft(elbo, *configured(pair, estimators), nodes=nodes, **grid)


def check(certificate: Certificate) -> None:
    """Fails unless the expectation is exact, and there is a gradient."""
    smallest = min(float(certificate.exact[name].abs().max()) for name in certificate.exact)
    assert smallest > 1e-3, "a gradient of zero is estimated by anything"
    # sums of up to 1e5 products, of numbers below 1e3: rounding is 1e-11 at most
    assert certificate.bias <= TOLERANCE
