"""How a certificate is judged, and expectations that :func:`certify` does not take."""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_nondiff import noise
from pyro_nondiff.infer import TraceEstimator_ELBO
from pyro_nondiff.noise import Source
from pyro_nondiff.testing import Certificate, Enumeration, Walk, certify, outcomes

from .programs import Pair

TOLERANCE = 1e-9
"""Sums of up to ten thousand products of numbers below 100, in float64: rounding is 1e-12."""


def elbo_of(estimator: Any, **options: Any) -> TraceEstimator_ELBO:
    """An objective that runs its worlds at once, unless it is told otherwise."""
    return TraceEstimator_ELBO(estimator, **{"worlds": "vectorized", **options})


def check_unbiased(elbo: TraceEstimator_ELBO, pair: Pair, nodes: int = 2) -> Certificate:
    """Fails unless the objective's gradient has the exact expectation, and there is a gradient.

    Normal noise takes two nodes. That is no approximation: expectation and exact gradient are
    then those of a program whose noise has two values.
    """
    certificate = certify(elbo, *pair, nodes=nodes)
    smallest = min(float(value.abs().max()) for value in guide_gradients(certificate).values())
    assert smallest > 1e-3, "a gradient of zero is estimated by anything"
    assert certificate.bias <= TOLERANCE
    return certificate


def guide_gradients(certificate: Certificate) -> dict[str, Tensor]:
    """The exact gradients of the guide's parameters, by their names in ``programs``."""
    return {name: certificate.exact[name] for name in ("a", "b", "s") if name in certificate.exact}


def expectation(
    elbo: TraceEstimator_ELBO, pair: Pair, source_of: Callable[[Walk], Source] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The exact mean of the loss and of its gradients, from a source of one's own if given."""
    source_of = source_of or (lambda walk: Enumeration(walk, nodes=2))
    settle(elbo, pair, source_of)
    names = list(pyro.get_param_store())
    parameters = [pyro.param(name) for name in names]
    loss, means = torch.zeros(()), [torch.zeros_like(p) for p in parameters]
    for walk in outcomes():
        with noise.source(source_of(walk)):
            sample = elbo.differentiable_loss(*pair)
        loss += walk.probability * sample.detach()
        gradients = torch.autograd.grad(sample, parameters, allow_unused=True)
        for mean, gradient in zip(means, gradients, strict=True):
            if gradient is not None:
                mean += walk.probability * gradient
    return loss, dict(zip(names, means, strict=True))


def settle(elbo: TraceEstimator_ELBO, pair: Pair, source_of: Callable[[Walk], Source]) -> None:
    """Takes steps until no outcome adds to the plan."""
    plan = None
    while plan != (plan := elbo.plan_of(*pair)):
        for walk in outcomes():
            with noise.source(source_of(walk)):
                elbo.differentiable_loss(*pair)
