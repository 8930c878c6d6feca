"""Sites that the model has and the guide does not: drawn from the model's own law, without KL."""

import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_nondiff import handlers, noise
from pyro_nondiff.errors import NonDiffError, NonDiffWarning
from pyro_nondiff.estimators import REBAR, REINFORCE, RELAX, RLOO, Enumerate, MovingAverage
from pyro_nondiff.infer import TraceEstimator_ELBO, config_estimator, no_guide

pytestmark = pytest.mark.usefixtures("param_store")


def logit() -> Tensor:
    return pyro.param("logit", torch.tensor(0.4))


def model(infer: dict[str, Any] | None = None) -> None:
    z = pyro.sample("z", dist.Bernoulli(0.3))
    own = pyro.sample("own", dist.Bernoulli(logits=logit() + z), infer=infer or {})
    pyro.sample("x", dist.Normal(own + z, 1.0), obs=torch.tensor(1.0))


def guide() -> None:
    pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(-0.2))))


def auxiliary_model() -> None:
    model({"is_auxiliary": True})


def test_a_forgotten_site_is_named_once() -> None:
    elbo = TraceEstimator_ELBO(RLOO(2))
    with pytest.warns(NonDiffWarning, match="site 'own' is latent in the model, and the guide"):
        elbo.loss_and_grads(model, guide)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        elbo.loss_and_grads(model, guide)


def test_a_site_that_is_meant_is_not_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TraceEstimator_ELBO(RLOO(2)).loss_and_grads(auxiliary_model, guide)


@pytest.mark.parametrize("worlds", ["vectorized", "sequential"])
def test_its_estimator_is_chosen_like_any_other(worlds: Any) -> None:
    elbo = TraceEstimator_ELBO(RLOO(2), worlds=worlds)
    configured = config_estimator(auxiliary_model, {"own": REBAR()})
    elbo.loss_and_grads(configured, guide)
    assert "own" in elbo.states._modules
    assert [branches.site for branches in elbo.plan_of(configured, guide).branches] == ["own"]


def test_a_site_of_the_model_that_is_observed_in_the_guide() -> None:
    def observing() -> None:
        guide()
        pyro.sample("own", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    with pytest.raises(NonDiffError, match="site 'own' is latent in the model, and observed"):
        TraceEstimator_ELBO(RLOO(2)).loss_and_grads(auxiliary_model, observing)


@pytest.mark.filterwarnings("ignore:site 'own' cannot be relaxed")
def test_a_law_without_noise_behind_a_soft_site_in_many_base_worlds() -> None:
    """Its rows are hard ones alone: one dimension of size 1, which its draws must keep."""

    def counting() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("early", dist.Normal(z, 1.0), obs=torch.tensor(0.3))
        rate = (logit() + z).exp()
        own = pyro.sample("own", dist.Poisson(rate), infer={"is_auxiliary": True})
        pyro.sample("x", dist.Normal(own, 1.0), obs=torch.tensor(1.0))

    elbo = TraceEstimator_ELBO(REBAR(), num_particles=3, worlds="vectorized")
    counted = config_estimator(counting, {"own": REINFORCE()})
    assert elbo.unreduced(counted, guide).loss.shape == (3,)


# --- values that come from a handler inside ---------------------------------------------------


def policy(data: Tensor) -> None:
    logits = pyro.param("policy", torch.tensor([0.3, -0.7]))
    with pyro.plate("steps", len(data)):
        law = dist.Bernoulli(logits=logits[0] + logits[1] * data)
        action = pyro.sample("action", law, infer={"is_auxiliary": True})
        pyro.factor("cost", -(action.detach() * 2 - data).abs(), has_rsample=False)


def given(value: Tensor) -> Any:
    """The policy with its actions given."""
    return handlers.given({"action": value})(policy)


DATA = torch.tensor([0.5, -1.0, 2.0, 0.1])
ACTIONS = torch.tensor([1.0, 0.0, 0.0, 1.0])


def test_a_given_value_has_the_score_of_its_law() -> None:
    elbo = TraceEstimator_ELBO(REINFORCE())
    loss = elbo.differentiable_loss(given(ACTIONS), no_guide, DATA)
    (found,) = torch.autograd.grad(loss, pyro.param("policy").unconstrained())
    leaf = pyro.param("policy")
    law = dist.Bernoulli(logits=leaf[0] + leaf[1] * DATA)
    cost = (ACTIONS * 2 - DATA).abs()
    (expected,) = torch.autograd.grad((cost * law.log_prob(ACTIONS)).sum(), leaf)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(loss.detach(), cost.sum())


def test_relax_of_a_given_value_has_the_right_mean() -> None:
    """Both values of one action by their probability, and the noise by the trapezoid rule.

    Its error is about exp(-2 pi^2 / 0.6) = 5e-15. Both noises take the same node: each part of
    the estimate depends on one of them alone. The network's weights are large, so that it matters.
    """
    nodes = torch.arange(-25, 25.1, 0.3)
    weights = nodes.sigmoid() * (-nodes).sigmoid()
    weights = weights / weights.sum()
    elbo = TraceEstimator_ELBO(RELAX(relaxed_cost=False))
    many = DATA[:1].expand(len(nodes))
    elbo.differentiable_loss(given(torch.zeros_like(many)), no_guide, many)
    with torch.no_grad():
        for parameter in elbo.states.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    p = float((0.3 - 0.7 * DATA[0]).sigmoid())
    means = []
    for value in (0.0, 1.0):
        with noise.source(lambda request: nodes.expand(request.shape)):
            program = given(torch.full_like(many, value))
            gradients = elbo.site_gradients(program, no_guide, many)["action"]
        means.append((weights * gradients).sum())
    exact = p * (1 - p) * ((2 - DATA[0]).abs() - DATA[0].abs())
    tolerance = 1e-9 if exact.dtype == torch.float64 else 1e-4
    mean = (1 - p) * means[0] + p * means[1]
    torch.testing.assert_close(mean, exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("estimator", [RLOO(2), Enumerate(), REBAR()], ids=repr)
def test_an_estimator_that_draws_cannot_serve_a_given_value(estimator: Any) -> None:
    with pytest.raises(NonDiffError, match="site 'action': its value is given"):
        TraceEstimator_ELBO(estimator).loss_and_grads(given(ACTIONS), no_guide, DATA)


def test_a_baseline_serves_a_given_value() -> None:
    elbo = TraceEstimator_ELBO(REINFORCE(MovingAverage()))
    elbo.loss_and_grads(given(ACTIONS), no_guide, DATA)
    assert float(elbo.states.get_submodule("action").mean) != 0
