"""The exact loss and its gradient, against closed forms and against Pyro's own enumeration."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn

from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.testing import exact_gradient, exact_loss

from ..certificates import programs
from ..certificates.programs import KINDS, parameter

pytestmark = pytest.mark.usefixtures("param_store")

CLOSE = {"rtol": 0.0, "atol": 1e-11}
"""Sums of at most a thousand numbers of order 10 in float64."""


def softplus(x: Tensor) -> Tensor:
    return torch.nn.functional.softplus(x)


def test_divergence_of_two_bernoullis() -> None:
    """Without an observation the loss is KL(q | p)."""

    def model() -> None:
        pyro.sample("z", dist.Bernoulli(logits=parameter("p", 0.3)))

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=parameter("a", -0.4)))

    loss = exact_loss(model, guide)
    a, p = pyro.param("a"), pyro.param("p")
    q = a.sigmoid()
    wanted = q * (a - p) - softplus(a) + softplus(p)
    torch.testing.assert_close(loss, wanted, **CLOSE)
    found = exact_gradient(model, guide)
    gradients = torch.autograd.grad(wanted, [a, p])
    torch.testing.assert_close([found["a"], found["p"]], list(gradients), **CLOSE)


def test_normal_site_by_quadrature() -> None:
    """KL of two normals minus the expected log-likelihood of a linear model: degree 2."""

    def model() -> None:
        u = pyro.sample("u", dist.Normal(0.3, 1.2))
        pyro.sample("x", dist.Normal(2 * u, 1.3), obs=torch.tensor(0.8))

    def guide() -> None:
        pyro.sample("u", dist.Normal(parameter("a", -0.4), parameter("s", -0.2).exp()))

    loss = exact_loss(model, guide, nodes=3)
    a, s = pyro.param("a"), pyro.param("s").exp()
    law = torch.distributions.Normal
    divergence = torch.distributions.kl_divergence(law(a, s), law(0.3, 1.2))
    likelihood = law(2 * a, 1.3).log_prob(torch.tensor(0.8)) - (2 * s / 1.3) ** 2 / 2
    torch.testing.assert_close(loss, divergence - likelihood, **CLOSE)


def test_quadrature_converges_where_it_is_not_exact() -> None:
    """The mean of a logistic function under a normal, to the digits of 2000 nodes' trapezoid."""

    def model() -> None:
        u = pyro.sample("u", dist.Normal(0.3, 1.2))
        pyro.factor("f", u.sigmoid())

    def guide() -> None:
        pyro.sample("u", dist.Normal(0.3, 1.2))

    grid = torch.linspace(-12, 12, 2001)
    weight = torch.distributions.Normal(0.0, 1.0).log_prob(grid).exp() * (grid[1] - grid[0])
    wanted = -((0.3 + 1.2 * grid).sigmoid() * weight).sum()
    errors = [abs(float(exact_loss(model, guide, nodes=n) - wanted)) for n in (4, 12, 40)]
    assert errors[2] < 1e-9 < errors[0]
    assert errors[2] < errors[1] < errors[0]


PLAIN = [
    programs.one_site,
    programs.shared_logit,
    programs.chain,
    programs.reversed_layers,
    programs.early_terms,
    programs.local_plate,
    programs.sequential_plate,
]


@pytest.mark.parametrize("kind", ["bernoulli", "one_hot", "categorical"])
@pytest.mark.parametrize("structure", PLAIN)
def test_gradient_is_that_of_trace_enum(structure: Callable[..., Any], kind: str) -> None:
    """Pyro sums over the guide's values in parallel; its gradient must be ours.

    It enumerates no joint values of an event, so there are no bits here.
    """
    model, guide = structure(KINDS[kind])
    found = exact_gradient(model, guide)
    elbo = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
    loss = elbo.differentiable_loss(model, config_enumerate(guide))
    names = list(found)
    parameters = [pyro.param(name).unconstrained() for name in names]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for name, gradient in zip(names, gradients, strict=True):
        wanted = torch.zeros(()) if gradient is None else gradient
        torch.testing.assert_close(found[name], wanted, **CLOSE)
    torch.testing.assert_close(exact_loss(model, guide).detach(), loss.detach(), **CLOSE)


def test_scales_and_masks_act_as_in_pyro() -> None:
    """One value is certain, so the loss is that of Pyro's trace."""
    kept = torch.tensor([True, False])

    def program(observed: bool) -> Callable[[], None]:
        def run() -> None:
            with poutine.scale(scale=0.3), pyro.plate("data", 2), poutine.mask(mask=kept):
                z = pyro.sample("z", dist.Bernoulli(logits=torch.full((2,), 60.0)))
                if observed:
                    law = dist.Normal(z, 1.3).mask(torch.tensor([True, True]))
                    pyro.sample("x", law, obs=torch.tensor([0.8, 5.0]))

        return run

    wanted = -0.3 * dist.Normal(1.0, 1.3).log_prob(torch.tensor(0.8))
    torch.testing.assert_close(exact_loss(program(True), program(False)), wanted, **CLOSE)


def test_parameters_of_modules_are_found() -> None:
    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logit = nn.Parameter(torch.tensor(-0.4))

        def forward(self) -> None:
            pyro.sample("z", dist.Bernoulli(logits=self.logit))

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(0.3)))
        pyro.sample("x", dist.Normal(z, 1.3), obs=torch.tensor(0.8))

    guide = Guide()
    found = exact_gradient(model, guide)
    wanted = torch.autograd.grad(exact_loss(model, guide), guide.logit)[0]
    assert set(found) == {"logit"}
    torch.testing.assert_close(found["logit"], wanted, **CLOSE)
    assert abs(float(wanted)) > 1e-3


def test_a_law_that_cannot_be_enumerated_is_refused() -> None:
    def program() -> None:
        pyro.sample("n", dist.Poisson(torch.tensor(2.0)))

    with pytest.raises(NonDiffError, match=r"site 'n': Poisson"):
        exact_loss(program, program)
