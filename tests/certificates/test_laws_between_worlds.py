"""Laws that differ between worlds in more than a place, and laws that an estimator must refuse."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.distributions import transforms as transform
from torch import Tensor

from pyro_nondiff.distributions import ScaleGamma
from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.estimators import LAX, RLOO, DisARM, Enumerate, MeasureValued
from pyro_nondiff.infer import ExpectedCost, config_estimator, no_guide
from pyro_nondiff.infer.worlds import GuideWorlds
from pyro_nondiff.ops import cost
from pyro_nondiff.testing import certify

from .checks import TOLERANCE
from .programs import parameter


def positive(name: str, value: float) -> Tensor:
    return pyro.param(name, torch.tensor(value), constraint=constraints.positive)


def gamma_behind_a_bernoulli() -> None:
    """The concentration, and with it the noise, is another one in each branch."""
    b = pyro.sample("b", dist.Bernoulli(logits=parameter("a", 0.3)))
    z = pyro.sample("z", ScaleGamma(1 + 2 * b, positive("s", 2.0)))
    cost("price", z**2)


def check_varying_concentration(worlds: str, estimators: dict[str, Any]) -> None:
    """Gauss's rules are exact for the square of a number, and its logarithm is not met."""
    program = config_estimator(gamma_behind_a_bernoulli, estimators)
    found = certify(ExpectedCost(worlds=worlds), program, no_guide, nodes=6)  # type: ignore[arg-type]
    assert float(found.exact["a"].abs()) > 1
    assert found.bias <= TOLERANCE


@pytest.mark.parametrize("estimator", [DisARM(), Enumerate(), MeasureValued(), RLOO(2)], ids=repr)
@pytest.mark.parametrize("worlds", ["vectorized", "sequential"])
def test_gamma_noise_is_not_shared_across_concentrations(worlds: str, estimator: Any) -> None:
    check_varying_concentration(worlds, {"b": estimator})


def test_planted_noise_of_another_concentration_is_caught(monkeypatch: Any) -> None:
    def shared(self: Any, name: str, concentration: Any) -> Tensor | None:
        site = None if self.branch is None else self.branch.base.get(name)
        return None if site is None else site.noise

    monkeypatch.setattr(GuideWorlds, "_shared_noise", shared)
    with pytest.raises(AssertionError):
        check_varying_concentration("sequential", {"b": DisARM()})


@pytest.mark.parametrize("worlds", ["vectorized", "sequential"])
def test_measure_valued_moves_what_is_drawn_afresh(worlds: Any) -> None:
    """By Monte Carlo: such noise cannot be injected.

    The bound is five standard errors, which are half of the gradient of 62 at most: moved values
    that stay where they are give 0, and the wrong sign minus 62.
    """
    steps, particles = 40, 200 if worlds == "vectorized" else 20
    program = config_estimator(gamma_behind_a_bernoulli, {"b": DisARM(), "z": MeasureValued()})
    elbo = ExpectedCost(worlds=worlds, num_particles=particles)
    elbo.differentiable_loss(program, no_guide)
    leaf = pyro.param("s").unconstrained()
    draws = torch.stack(
        [
            torch.autograd.grad(elbo.differentiable_loss(program, no_guide), leaf)[0]
            for _ in range(steps)
        ]
    )
    p = torch.tensor(0.3).sigmoid()
    exact = 2 * 4 * ((1 - p) * 2 + p * 12)  # of s^2 k (k + 1), for the logarithm of s
    error = draws.std() / steps**0.5
    assert (draws.mean() - exact).abs() < 5 * error < exact / 2


# --- what LAX and MeasureValued take, and what not ----------------------------------------------


def pareto() -> None:
    z = pyro.sample("z", dist.Pareto(torch.tensor(1.0), 3 + positive("s", 2.0)))
    cost("price", z.log())


def squashed() -> None:
    base = dist.Normal(pyro.param("m", torch.zeros(2)), 0.3).to_event(1)
    z = pyro.sample("z", dist.TransformedDistribution(base, [transform.TanhTransform()]))
    cost("price", z.prod(-1))


@pytest.mark.parametrize("program", [pareto, squashed])
def test_lax_at_transforms_of_torch_and_pyro(program: Callable[[], None]) -> None:
    """The tanh of its network, and of the second law, is no polynomial: 1e-6 at 20 nodes."""
    found = certify(ExpectedCost(), config_estimator(program, {"z": LAX()}), no_guide, nodes=20)
    assert found.bias <= 1e-6


def test_lax_is_evaluated_without_gradient() -> None:
    def program() -> None:
        cost("price", pyro.sample("z", ScaleGamma(3.0, positive("s", 2.0))))

    ExpectedCost().loss(config_estimator(program, {"z": LAX()}), no_guide)


def learnt(kind: str) -> Any:
    """Transforms with something to learn, which lies ever deeper."""
    affine = transform.AffineTransform(parameter("a", 0.3), 2.0)
    return {
        "plain": [affine],
        "composed": [transform.ComposeTransform([affine])],
        "inverse": [affine.inv],
        "network": [transform.Planar(1)],
    }[kind]


@pytest.mark.parametrize("kind", ["plain", "composed", "inverse", "network"])
def test_lax_refuses_transforms_that_learn(kind: str) -> None:
    def program() -> None:
        base = dist.Normal(pyro.param("m", torch.zeros(1)), 1.0).to_event(1)
        cost("price", pyro.sample("z", dist.TransformedDistribution(base, learnt(kind))).sum(-1))

    refuse(program, LAX(), "site 'z': LAX needs .* TransformedDistribution")


def test_lax_refuses_a_transform_without_inverse() -> None:
    def program() -> None:
        cost("price", pyro.sample("z", dist.HalfNormal(positive("s", 2.0))))

    refuse(program, LAX(), "site 'z': LAX needs .* HalfNormal")


def test_measure_valued_refuses_a_gamma_of_other_parameters() -> None:
    def program() -> None:
        cost("price", pyro.sample("z", dist.Chi2(positive("df", 3.0))))

    refuse(program, MeasureValued(), "site 'z': MeasureValued needs .* Chi2")


def refuse(program: Callable[[], None], estimator: Any, match: str) -> None:
    with pytest.raises(NonDiffError, match=match):
        ExpectedCost().loss_and_grads(config_estimator(program, {"z": estimator}), no_guide)
