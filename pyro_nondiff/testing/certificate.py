"""The exact expectation and variance of an estimator, through a whole objective."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import noise
from ..infer import TraceEstimator_ELBO
from .exact import exact_gradient, gradients_of, parameters_of
from .source import Enumeration
from .walk import outcomes

__all__ = ["Certificate", "certify", "exact_moments"]

Program = Callable[..., Any]


@dataclass(frozen=True)
class Certificate:
    """What an estimator's gradient is, compared with what it should be.

    Arguments:
        exact: The exact gradient of each parameter of model and guide.
        mean: The exact expectation of the estimate.
        variance: Its exact variance, elementwise. It is NaN where a one-hot or indexed site
            differs between rows: rows then share their noise in another way than here. For the
            measure-valued gradient of a Normal's scale it is up to 5 % off with 30 nodes: the
            square has a kink, which no rule of polynomials sees.
        outcomes: How many outcomes were summed.
    """

    exact: dict[str, Tensor]
    mean: dict[str, Tensor]
    variance: dict[str, Tensor]
    outcomes: int

    @property
    def bias(self) -> float:
        """The largest absolute difference between expectation and exact gradient."""
        gaps = [(self.mean[name] - self.exact[name]).abs().max() for name in self.exact]
        return float(torch.stack(gaps).max())

    @property
    def total_variance(self) -> float:
        """The sum of all variances."""
        return float(torch.stack([v.sum() for v in self.variance.values()]).sum())


def certify(
    elbo: TraceEstimator_ELBO,
    model: Program,
    guide: Program,
    *args: Any,
    nodes: int = 12,
    **kwargs: Any,
) -> Certificate:
    """Compares an objective's gradient estimate with the exact gradient, without randomness.

    All outcomes of all draws and of the noise are enumerated, so choose a small program:
    their number is exponential in the number of discrete elements. What the estimators
    have learnt so far is held fixed.

    Arguments:
        elbo: An objective with the estimators to certify.
        model: A model.
        guide: Its guide, of discrete sites and continuous maps of noise.
        *args: Arguments of both.
        nodes: The number of quadrature nodes of each continuous number.
        **kwargs: Keyword arguments of both.

    Raises:
        NonDiffError: At a site of another law.

    Example:
        >>> from pyro_nondiff.estimators import DisARM
        >>> from pyro_nondiff.infer import TraceEstimator_ELBO
        >>> from pyro_nondiff.testing import certify
        >>> def model():
        ...     z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(2.0))
        >>> def guide():
        ...     logit = pyro.param("logit", torch.tensor(0.3))
        ...     pyro.sample("z", dist.Bernoulli(logits=logit))
        >>> certificate = certify(TraceEstimator_ELBO(DisARM()), model, guide)
        >>> certificate.bias < 1e-6
        True
    """
    mean, variance, count = exact_moments(elbo, model, guide, *args, nodes=nodes, **kwargs)
    exact = exact_gradient(model, guide, *args, nodes=nodes, **kwargs)
    exact = {name: exact[name] for name in mean}
    return Certificate(exact, mean, variance, count)


def exact_moments(
    elbo: TraceEstimator_ELBO,
    model: Program,
    guide: Program,
    *args: Any,
    nodes: int = 12,
    **kwargs: Any,
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """The exact mean and variance of an objective's gradient estimate.

    Where sites depend on values, the worlds of a step depend on what earlier steps met: the
    moments are those of a step after all outcomes have been met.

    Returns:
        Mean and variance of each parameter of model and guide by name, and the number of
        outcomes. What estimators learn is left out.
    """
    plan = None
    while plan != (plan := elbo.plan_of(model, guide, *args, **kwargs)):
        moments = _moments(elbo, model, guide, args, kwargs, nodes)
    return moments


def _moments(
    elbo: TraceEstimator_ELBO, model: Program, guide: Program, args: Any, kwargs: Any, nodes: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    elbo.differentiable_loss(model, guide, *args, **kwargs)  # parameters and states exist
    learnt = {name: value.clone() for name, value in elbo.states.state_dict().items()}
    found = parameters_of(model, guide)
    parameters = {name: p for name, p in found.items() if not name.startswith("estimator.")}
    mean = {name: torch.zeros_like(p) for name, p in parameters.items()}
    square = {name: torch.zeros_like(p) for name, p in parameters.items()}
    count, coupled = 0, True
    for walk in outcomes():
        source = Enumeration(walk, nodes)
        with noise.source(source):
            loss = elbo.differentiable_loss(model, guide, *args, **kwargs)
        elbo.states.load_state_dict(learnt)
        for name, gradient in gradients_of(loss, parameters).items():
            mean[name] += walk.probability * gradient
            square[name] += walk.probability * gradient**2
        count, coupled = count + 1, coupled and source.coupled
    variance = {name: square[name] - mean[name] ** 2 for name in mean}
    if not coupled:
        variance = {name: torch.full_like(value, torch.nan) for name, value in mean.items()}
    return mean, variance, count
