"""The objective among Pyro's own tools: handlers, guides, SVI and the param store."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoGuideList, AutoNormal
from torch import Tensor, nn

from pyro_nondiff.errors import NonDiffWarning
from pyro_nondiff.estimators import (
    REBAR,
    REINFORCE,
    RELAX,
    RLOO,
    AbstractEstimator,
    DisARM,
    Enumerate,
    MovingAverage,
    NeuralBaseline,
)
from pyro_nondiff.infer import TraceEstimator_ELBO, TraceREINFORCE_ELBO, config_estimator
from pyro_nondiff.testing import certify

pytestmark = pytest.mark.usefixtures("param_store")

X = torch.tensor([0.5, -1.0, 2.0])
ALL = [REINFORCE(MovingAverage()), RLOO(2), DisARM(), Enumerate(), REBAR(), RELAX()]


def model(x: Tensor) -> None:
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)


def guide(x: Tensor) -> None:
    logits = pyro.param("logits", torch.zeros(3))
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Bernoulli(logits=logits))


def test_loss_is_that_of_trace_elbo() -> None:
    """Where the guide is certain the loss has no noise, and both must say the same."""

    def certain(x: Tensor) -> None:
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Bernoulli(logits=torch.tensor([40.0, -40.0, 40.0])))

    expected = Trace_ELBO().loss(model, certain, X)
    elbo = TraceEstimator_ELBO(num_particles=2)
    assert elbo.loss(model, certain, X) == pytest.approx(expected, rel=1e-12)
    assert float(elbo.loss_and_grads(model, certain, X)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("estimator", ALL, ids=repr)
def test_loss_and_grads_is_the_differentiable_loss(estimator: AbstractEstimator) -> None:
    elbo = TraceEstimator_ELBO(estimator)
    elbo.differentiable_loss(model, guide, X)
    start = {name: value.clone() for name, value in elbo.states.state_dict().items()}
    logits = pyro.param("logits").unconstrained()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        loss = elbo.differentiable_loss(model, guide, X)
        (expected,) = torch.autograd.grad(loss, logits)
    elbo.states.load_state_dict(start)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        found = elbo.loss_and_grads(model, guide, X)
    torch.testing.assert_close(found, loss.detach(), rtol=0, atol=0)
    # the same sums, once with the loss's value added and taken away
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("estimator", ALL, ids=repr)
def test_svi_finds_the_posterior(estimator: AbstractEstimator) -> None:
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), TraceEstimator_ELBO(estimator))
    for _ in range(800):
        svi.step(X)
    # log-odds of the prior, and of the likelihoods N(2, 1) and N(0, 1)
    exact = (torch.tensor(0.3).logit() + 2 * X - 2).sigmoid()
    # Adam at 0.05 leaves the logits about 0.3 from the optimum, a tenth of a probability
    torch.testing.assert_close(pyro.param("logits").sigmoid().detach(), exact, rtol=0, atol=0.12)


class Encoder(nn.Module):
    """A guide that is a module, with what its estimator learns."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Bernoulli(logits=self.net(x[:, None])[:, 0]))


def baseline() -> NeuralBaseline:
    return NeuralBaseline(nn.Linear(1, 1), input=lambda x: x[:, None], centre=True)


class Model(nn.Module):
    def forward(self, x: Tensor) -> None:
        model(x)


@pytest.mark.parametrize("estimator", [REINFORCE(baseline()), REBAR(), RELAX()], ids=repr)
def test_module_has_what_estimators_learn(estimator: AbstractEstimator) -> None:
    module = TraceEstimator_ELBO(estimator)(Model(), Encoder())
    module(X)
    names = {name for name, _ in module.named_parameters()}
    assert "guide.net.weight" in names
    assert any(name.startswith("estimators.z.") for name in names)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module(X).backward()
    optimiser.step()
    changed = {n for n, value in module.state_dict().items() if not torch.equal(value, before[n])}
    assert {name for name in names if name.startswith("estimators.")} <= changed
    assert not list(pyro.get_param_store())


@pytest.mark.parametrize(
    "estimator", [REINFORCE(MovingAverage(per_element=True)), RELAX()], ids=repr
)
def test_state_dict_goes_round_before_the_first_step(estimator: AbstractEstimator) -> None:
    first = TraceEstimator_ELBO(estimator)(Model(), Encoder())
    for _ in range(3):
        first(X)
    saved = first.state_dict()
    second = TraceEstimator_ELBO(estimator)(Model(), Encoder())
    second.load_state_dict(saved)
    for state in (second.state_dict(), None):
        if state is None:  # after the first step the waiting state is in use
            with torch.random.fork_rng():
                torch.manual_seed(0)
                loaded = second(X)
            first.load_state_dict(saved)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                torch.testing.assert_close(loaded, first(X), rtol=0, atol=0)
        else:
            assert state.keys() == saved.keys()
            assert all(torch.equal(value, saved[name]) for name, value in state.items())


def test_svi_trains_estimators_at_their_own_rate() -> None:
    seen = []

    def rate(name: str) -> dict[str, float]:
        seen.append(name)
        return {"lr": 0.5 if name.startswith("estimator.z.") else 0.0}

    elbo = TraceREINFORCE_ELBO(baseline())
    svi = SVI(model, guide, pyro.optim.Adam(rate), elbo)
    svi.step(X)
    weight = elbo.states.state_dict()["z.net.weight"].clone()
    logits = pyro.param("logits").detach().clone()
    svi.step(X)
    assert "estimator.z.net.weight" in seen
    assert not torch.equal(elbo.states.state_dict()["z.net.weight"], weight)
    torch.testing.assert_close(pyro.param("logits").detach(), logits, rtol=0, atol=0)


def test_estimators_resume_from_the_param_store() -> None:
    elbo = TraceREINFORCE_ELBO(baseline())
    SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), elbo).step(X)
    saved = {
        name: value.detach().clone() for name, value in pyro.get_param_store().named_parameters()
    }
    again = TraceREINFORCE_ELBO(baseline())
    SVI(model, guide, pyro.optim.Adam({"lr": 0.0}), again).step(X)
    found = again.states.state_dict()["z.net.weight"]
    torch.testing.assert_close(found, saved["estimator.z$$$net.weight"], rtol=0, atol=0)


HANDLED: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "scale": lambda fn: poutine.scale(fn, scale=3.0),
    "mask": lambda fn: poutine.mask(fn, mask=torch.tensor([True, False, True])),
    "condition": lambda fn: poutine.condition(fn, data={"unused": torch.zeros(())}),
    "block": lambda fn: poutine.block(fn, hide=["unused"]),
}


@pytest.mark.parametrize("estimator", [REINFORCE(), DisARM(), Enumerate()], ids=repr)
@pytest.mark.parametrize("handler", HANDLED)
def test_handlers_keep_the_gradient_exact(handler: str, estimator: AbstractEstimator) -> None:
    handled = HANDLED[handler]
    elbo = TraceEstimator_ELBO(estimator)
    # sums of a few dozen terms of order 10 in float64
    assert certify(elbo, handled(model), handled(guide), X).bias < 1e-12


def test_subsamples_are_shared_by_guide_model_and_worlds() -> None:
    seen: list[Tensor] = []

    def sub_model() -> None:
        with pyro.plate("data", 20, subsample_size=3) as index:
            seen.append(index)
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(2 * z, 1.0), obs=torch.arange(20.0)[index])

    def sub_guide() -> None:
        logits = pyro.param("many", torch.zeros(20))
        with pyro.plate("data", 20, subsample_size=3) as index:
            seen.append(index)
            pyro.sample("z", dist.Bernoulli(logits=logits[index]))

    for worlds in ("vectorized", "sequential"):
        elbo = TraceEstimator_ELBO(DisARM(), num_particles=2, worlds=worlds)  # type: ignore[arg-type]
        elbo.loss_and_grads(sub_model, sub_guide)
        seen.clear()
        elbo.loss_and_grads(sub_model, sub_guide)
        assert len(seen) == (2 if worlds == "vectorized" else 8)
        assert all(torch.equal(index, seen[0]) for index in seen)


def test_auxiliary_deterministic_and_factor() -> None:
    def rich_model(x: Tensor) -> None:
        model(x)
        pyro.deterministic("twice", 2 * x)
        pyro.factor("factor", -x.sum())

    def rich_guide(x: Tensor) -> None:
        guide(x)
        pyro.sample("aux", dist.Bernoulli(0.4), infer={"is_auxiliary": True})
        pyro.factor("weight", 0.5 * x.sum(), has_rsample=True)

    assert certify(TraceEstimator_ELBO(REINFORCE()), rich_model, rich_guide, X).bias < 1e-12


def mixed_model(x: Tensor) -> None:
    """A scale to infer, and a discrete site for each datum."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(2 * z, scale), obs=x)


@pytest.mark.parametrize("auto", [AutoNormal, AutoDelta, AutoDiagonalNormal])
@pytest.mark.parametrize("discrete_first", [False, True])
@pytest.mark.parametrize("estimator", [REINFORCE(), RLOO(2), DisARM(), REBAR()], ids=repr)
def test_autoguides_beside_a_discrete_guide(
    auto: Any, discrete_first: bool, estimator: AbstractEstimator
) -> None:
    parts = [auto(poutine.block(mixed_model, hide=["z"])), guide]
    guides = AutoGuideList(mixed_model)
    for part in reversed(parts) if discrete_first else parts:
        guides.append(part)
    elbo = TraceEstimator_ELBO(estimator, num_particles=20, worlds="vectorized")
    svi = SVI(mixed_model, guides, pyro.optim.Adam({"lr": 0.05}), elbo)
    joined = pytest.warns(NonDiffWarning, match="'z' lies in a plate.*'(scale|_Auto)")
    with joined if discrete_first else nullcontext():
        losses = [svi.step(X)]
    losses += [svi.step(X) for _ in range(79)]
    # the loss falls by more than a nat; its noise over ten steps of 20 particles is a tenth of that
    assert sum(losses[-10:]) / 10 < sum(losses[:10]) / 10 - 0.3


def test_mixed_laws_under_mixed_estimators() -> None:
    def mixed(x: Tensor) -> None:
        b = pyro.sample("b", dist.Bernoulli(0.3))
        o = pyro.sample("o", dist.OneHotCategorical(torch.tensor([0.2, 0.5, 0.3])))
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.6, 0.4])))
        mean = b + (o * torch.tensor([0.0, 1.0, 3.0])).sum(-1) * b + c
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x[0])

    def mixed_guide(x: Tensor) -> None:
        w = pyro.param("w", torch.tensor([0.3, -0.2, 0.1, 0.4]))
        b = pyro.sample("b", dist.Bernoulli(logits=w[0]), infer={"estimator": DisARM()})
        logits = torch.stack([w[1] * b, w[2] + b, 0 * b], -1)
        pyro.sample("o", dist.OneHotCategorical(logits=logits))
        pyro.sample("c", dist.Categorical(logits=torch.stack([w[3] * b, 1 - b], -1)))

    configured = config_estimator(mixed_guide, {"o": Enumerate()})
    assert certify(TraceEstimator_ELBO(REINFORCE()), mixed, configured, X).bias < 1e-12


def chosen(estimator: AbstractEstimator | None, **outside: Any) -> str:
    """The estimator in force at a site that names its own."""

    def own(x: Tensor) -> None:
        logits = pyro.param("logits", torch.zeros(3))
        with pyro.plate("data", 3):
            infer = {"estimator": RLOO(3)} if outside.get("own") else {}
            pyro.sample("z", dist.Bernoulli(logits=logits), infer=infer)

    guide: Callable[..., Any] = own
    for choice in outside.get("choices", ()):
        guide = config_estimator(guide, {"z": choice})
    elbo = TraceEstimator_ELBO(estimator)
    elbo.differentiable_loss(model, guide, X)
    return repr(elbo.states._recipes["z"])


def test_precedence() -> None:
    assert chosen(None) == "RLOO(num_samples=4)"
    assert chosen(RLOO(2)) == "RLOO(num_samples=2)"
    assert chosen(RLOO(2), own=True) == "RLOO(num_samples=3)"
    assert chosen(RLOO(2), own=True, choices=[RLOO(5)]) == "RLOO(num_samples=5)"
    assert chosen(RLOO(2), own=True, choices=[RLOO(5), RLOO(6)]) == "RLOO(num_samples=6)"


def test_config_estimator_keeps_a_modules_parameters() -> None:
    encoder = Encoder()
    configured = config_estimator(encoder, {"z": DisARM()})
    assert isinstance(configured, nn.Module)
    assert list(configured.parameters()) == list(encoder.parameters())
    module = TraceEstimator_ELBO()(Model(), configured)
    for _ in range(2):
        module(X).backward()
    assert encoder.net.weight.grad is not None


def test_laws_with_rsample_stay_pathwise_unless_named() -> None:
    def normal(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.3))
        pyro.sample("n", dist.Normal(loc, 1.0))

    def normal_model(x: Tensor) -> None:
        n = pyro.sample("n", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(n, 1.0), obs=x[0])

    plain = TraceEstimator_ELBO(REINFORCE())
    named = config_estimator(normal, {"n": REINFORCE()})
    assert not plain.unreduced(normal_model, normal, X).site_surrogates
    assert set(plain.unreduced(normal_model, named, X).site_surrogates) == {"n"}
    for program in (normal, named):
        # two nodes on both sides make the same discrete program of it
        assert certify(plain, normal_model, program, X, nodes=20).bias < (
            1e-12 if program is normal else 1e-6
        )
