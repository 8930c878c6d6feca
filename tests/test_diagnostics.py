"""Statistics of gradients: exact where the noise is chosen, and nothing left behind."""

import copy
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import ELBO, SVI, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_nondiff import noise
from pyro_nondiff.diagnostics import Moments, gradient_statistics
from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.estimators import (
    REBAR,
    REINFORCE,
    RELAX,
    RLOO,
    DisARM,
    MovingAverage,
    NeuralBaseline,
)
from pyro_nondiff.infer import TraceEstimator_ELBO
from pyro_nondiff.testing import exact_moments

pytestmark = pytest.mark.usefixtures("param_store")

X = torch.tensor(0.7)
PRIOR = 0.3
POSTERIOR = torch.tensor(0.4)  # of the guide: two of five evenly spread uniforms give a one


def model() -> None:
    z = pyro.sample("z", dist.Bernoulli(torch.tensor(PRIOR)))
    pyro.sample("x", dist.Normal(2 * z - 1, 1.0), obs=X)


def guide() -> None:
    logit = pyro.param("logit", POSTERIOR.logit())
    pyro.sample("z", dist.Bernoulli(logits=logit))


def costs() -> Tensor:
    """``log q(z) - log p(x, z)`` at z = 0 and z = 1."""
    z = torch.tensor([0.0, 1.0])
    log_q = dist.Bernoulli(POSTERIOR).log_prob(z)
    log_p = dist.Bernoulli(torch.tensor(PRIOR)).log_prob(z)
    return log_q - log_p - dist.Normal(2 * z - 1, 1.0).log_prob(X)


def score_moments(baseline: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """The exact mean and variance of REINFORCE's gradient for the logit."""
    z = torch.tensor([0.0, 1.0])
    gradient = (costs() - baseline) * (z - POSTERIOR)
    weights = torch.stack([1 - POSTERIOR, POSTERIOR])
    mean = (weights * gradient).sum()
    return mean, (weights * (gradient - mean) ** 2).sum()


def even_noise() -> Callable[[noise.Request], Tensor]:
    """Logistic noise with exactly the right share of ones in every five draws.

    Five is prime: every five samples see each of the draws once, as long as a sample
    takes the same number of draws, and that number is no multiple of five.
    """
    uniforms = cycle([0.1, 0.3, 0.5, 0.7, 0.9])
    return lambda request: torch.full(request.shape, next(uniforms)).logit()


class Scripted(ELBO):
    """An objective whose gradient for the parameter ``p`` is the next of a list."""

    def __init__(self, gradients: list[Tensor]) -> None:
        super().__init__()
        self.gradients = iter(gradients)

    def differentiable_loss(self, model: Any, guide: Any) -> Tensor:
        gradient = next(self.gradients)
        parameter = pyro.param("p", torch.zeros_like(gradient))
        return (parameter.expand_as(gradient) * gradient).sum()

    def _get_trace(self, *args: Any) -> Any:
        raise NotImplementedError


def scripted(gradients: list[Tensor]) -> Any:
    return gradient_statistics(Scripted(gradients), model, guide, num_samples=len(gradients))


# --- the numbers --------------------------------------------------------------------------


def test_sample_moments_of_given_gradients() -> None:
    # a sum of squares would lose most of the digits
    gradients = 1e6 + torch.randn(7, 2, 3, dtype=torch.float64)
    moments = scripted(list(gradients)).parameters["p"]
    torch.testing.assert_close(moments.mean, gradients.mean(0))
    torch.testing.assert_close(moments.variance, gradients.var(0))
    torch.testing.assert_close(moments.total_variance, gradients.var(0).sum())
    assert moments.num_samples == 7


def test_half_precision_is_summed_in_single() -> None:
    gradients = [torch.tensor(float(i % 2), dtype=torch.bfloat16) for i in range(1000)]
    moments = scripted(gradients).parameters["p"]
    assert moments.mean.dtype == torch.float32
    torch.testing.assert_close(moments.mean, torch.tensor(0.5, dtype=torch.float32))


def test_one_bernoulli_is_exact() -> None:
    with noise.source(even_noise()):
        found = gradient_statistics(TraceEstimator_ELBO(REINFORCE()), model, guide, num_samples=10)
    mean, variance = score_moments()
    for moments in (found.parameters["logit"], found.sites["z"]):
        torch.testing.assert_close(moments.mean, mean)
        torch.testing.assert_close(moments.variance, variance * 10 / 9)


def test_what_is_learnt_is_held_fixed() -> None:
    elbo = TraceEstimator_ELBO(REINFORCE(baseline=MovingAverage(decay=0.5)))
    for _ in range(3):
        elbo.differentiable_loss(model, guide)
    before = copy.deepcopy(elbo.states.state_dict())
    baseline = before["z.mean"] / before["z.weight"]
    with noise.source(even_noise()):
        found = gradient_statistics(elbo, model, guide, num_samples=10)
    mean, variance = score_moments(baseline)
    for moments in (found.parameters["logit"], found.sites["z"]):
        torch.testing.assert_close(moments.mean, mean)
        torch.testing.assert_close(moments.variance, variance * 10 / 9)
    torch.testing.assert_close(elbo.states.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("estimator", [RLOO(2), RLOO(4), DisARM()])
def test_agrees_with_the_exact_moments(estimator: Any) -> None:
    """Power: the variances differ by a factor of two or more between these estimators.

    The sample variance is within 35 % with a probability of more than 1 - 1e-6.
    """
    mean, variance, _ = exact_moments(TraceEstimator_ELBO(estimator), model, guide)
    found = gradient_statistics(TraceEstimator_ELBO(estimator), model, guide, num_samples=600)
    error = (found.mean["logit"] - mean["logit"]).abs()
    assert error < 5 * (variance["logit"] / 600).sqrt()
    torch.testing.assert_close(found.variance["logit"], variance["logit"], rtol=0.35, atol=0.0)


def test_constrained_parameters_are_measured_unconstrained() -> None:
    def positive_guide() -> None:
        odds = pyro.param("odds", POSTERIOR / (1 - POSTERIOR), constraint=dist.constraints.positive)
        pyro.sample("z", dist.Bernoulli(logits=odds.log()))

    elbo = TraceEstimator_ELBO(REINFORCE())
    with noise.source(even_noise()):
        found = gradient_statistics(elbo, model, positive_guide, num_samples=5)
    torch.testing.assert_close(found.mean["odds"], score_moments()[0])


def test_a_site_that_is_not_always_met_counts_as_zero() -> None:
    def branching_model() -> None:
        if pyro.sample("z", dist.Bernoulli(torch.tensor(PRIOR))):
            pyro.sample("y", dist.Bernoulli(torch.tensor(0.5)))

    def branching_guide() -> None:
        logit = pyro.param("logit", POSTERIOR.logit())
        if pyro.sample("z", dist.Bernoulli(logits=logit)):
            pyro.sample("y", dist.Bernoulli(logits=pyro.param("other", torch.tensor(1.0))))

    elbo = TraceEstimator_ELBO(REINFORCE())
    found = gradient_statistics(elbo, branching_model, branching_guide, num_samples=50)
    assert set(found.sites) == {"z", "y"}
    assert set(found.parameters) == {"logit", "other"}
    assert found.sites["y"].num_samples == 50
    # with y's logit at 1, its gradient is never 0 where y is met
    assert found.sites["y"].variance > 0


# --- ratios -------------------------------------------------------------------------------


def test_signal_to_noise_takes_the_noise_out_of_the_mean() -> None:
    moments = Moments(torch.tensor([3.0, 4.0]), torch.tensor([6.0, 4.0]), num_samples=2)
    torch.testing.assert_close(moments.signal_to_noise, torch.tensor(((25 - 5) / 10) ** 0.5))
    drowned = Moments(torch.tensor(0.1), torch.tensor(1.0), num_samples=10)
    assert drowned.signal_to_noise == 0


def test_signal_to_noise_without_noise() -> None:
    constant = scripted([torch.tensor([2.0, 1.0])] * 3)
    assert constant.signal_to_noise == torch.inf
    zero = scripted([torch.zeros(2)] * 3)
    assert zero.signal_to_noise == 0


def test_totals_are_of_all_parameters() -> None:
    def two_parameters() -> None:
        first = pyro.param("a", torch.tensor(0.1))
        second = pyro.param("b", torch.tensor(-0.5))
        pyro.sample("z", dist.Bernoulli(logits=first + second))

    found = gradient_statistics(TraceEstimator_ELBO(RLOO()), model, two_parameters, num_samples=40)
    torch.testing.assert_close(found.total_variance, 2 * found.variance["a"])
    torch.testing.assert_close(found.signal_to_noise, found.parameters["b"].signal_to_noise)
    table = str(found).splitlines()
    assert [row.rsplit(maxsplit=2)[0].strip() for row in table[1:]] == [
        "total",
        "site z",
        "parameter a",
        "parameter b",
    ]


# --- which objectives, which parameters ---------------------------------------------------


def test_objectives_of_pyro_have_no_sites() -> None:
    found = gradient_statistics(Trace_ELBO(), model, guide, num_samples=5)
    assert list(found.parameters) == ["logit"]
    assert found.sites == {}


def test_worlds_run_one_by_one_have_no_sites() -> None:
    elbo = TraceEstimator_ELBO(RLOO(2), worlds="sequential")
    found = gradient_statistics(elbo, model, guide, num_samples=5)
    assert found.variance["logit"] > 0
    assert found.sites == {}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logit = nn.Parameter(POSTERIOR.logit())
        self.frozen = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self) -> None:
        pyro.sample("z", dist.Bernoulli(logits=self.logit + self.frozen))


def test_parameters_of_plain_modules() -> None:
    with noise.source(even_noise()):
        elbo = TraceEstimator_ELBO(REINFORCE())
        found = gradient_statistics(elbo, model, Net(), num_samples=5)
    assert list(found.parameters) == ["guide.logit"]
    torch.testing.assert_close(found.mean["guide.logit"], score_moments()[0])


def test_parameters_of_estimators_are_left_out() -> None:
    baseline = NeuralBaseline(nn.Linear(1, 1), input=lambda: torch.ones(1))
    elbo = TraceEstimator_ELBO(REINFORCE(baseline))
    for _ in range(2):
        found = gradient_statistics(elbo, model, guide, num_samples=3)
        assert list(found.parameters) == ["logit"]
        elbo.loss_and_grads(model, guide)  # now the objective owns the net


def test_autoguides() -> None:
    def normal_model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X)

    auto = AutoNormal(normal_model)
    found = gradient_statistics(TraceEstimator_ELBO(), normal_model, auto, num_samples=5)
    assert set(found.parameters) == {"AutoNormal.locs.z", "AutoNormal.scales.z"}


def test_on_meta(meta: Callable[[Any], Any]) -> None:
    net = meta(nn.Linear(3, 4))
    data = meta(torch.ones(5, 3))

    def meta_model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(x.new_full((4,), 0.5)).to_event(1))

    def meta_guide(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=net(x)).to_event(1))

    with pyro.validation_enabled(False):
        elbo = TraceEstimator_ELBO(RLOO(2))
        found = gradient_statistics(elbo, meta_model, meta_guide, data, num_samples=3)
    assert found.total_variance.is_meta
    assert found.signal_to_noise.is_meta


# --- nothing is left behind ---------------------------------------------------------------


class Normed(nn.Module):
    """A guide whose module has buffers that a run in training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.4 * torch.ones(3)).to_event(1))

    def guide(self, x: Tensor) -> None:
        pyro.module("net", self.net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.net(x)).to_event(1))


def everything(normed: Normed, elbo: TraceEstimator_ELBO) -> dict[str, Any]:
    store = pyro.get_param_store()
    state = {f"state {k}": v for k, v in elbo.states.state_dict().items()}
    state |= {f"module {k}": v for k, v in normed.net.state_dict().items()}
    state |= {f"store {k}": v.detach() for k, v in store.items()}
    state |= {f"grad {k}": p.grad for k, p in normed.net.named_parameters()}
    state["rng"] = torch.get_rng_state()
    return {name: None if value is None else value.clone() for name, value in state.items()}


@pytest.mark.parametrize(
    "estimator", [REINFORCE(MovingAverage()), RLOO(2), DisARM(), REBAR(), RELAX()], ids=repr
)
@pytest.mark.parametrize("steps", [0, 2])
def test_leaves_everything_as_it_was(estimator: Any, steps: int) -> None:
    normed, x = Normed(), torch.randn(4, 2)
    elbo = TraceEstimator_ELBO(estimator)
    for _ in range(steps):
        elbo.loss_and_grads(normed.model, normed.guide, x)
    before, parameters = everything(normed, elbo), list(normed.net.parameters())
    gradient_statistics(elbo, normed.model, normed.guide, x, num_samples=3)
    after = everything(normed, elbo)
    assert list(after) == list(before)
    for name, value in before.items():
        assert value is None or torch.equal(value, after[name]), name
    assert all(a is b for a, b in zip(parameters, normed.net.parameters(), strict=True))


def losses(measured: bool) -> Iterator[float]:
    pyro.clear_param_store()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        elbo = TraceEstimator_ELBO(REINFORCE(MovingAverage()))
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss=elbo)
        for _ in range(4):
            if measured:
                gradient_statistics(elbo, model, guide, num_samples=2)
            yield svi.step()


def test_training_goes_on_as_if_not_measured() -> None:
    assert list(losses(measured=True)) == list(losses(measured=False))


def test_two_calls_draw_the_same() -> None:
    elbo = TraceEstimator_ELBO(RLOO(2))
    first, second = (gradient_statistics(elbo, model, guide, num_samples=4) for _ in range(2))
    assert torch.equal(first.variance["logit"], second.variance["logit"])


def test_an_error_leaves_everything_as_it_was() -> None:
    elbo = TraceEstimator_ELBO(RLOO(2))
    states, rng = elbo.states, torch.get_rng_state()
    runs = []

    def failing_guide() -> None:
        guide()
        runs.append(None)
        if len(runs) > 20:
            raise KeyError("the data has gone")

    with pytest.raises(KeyError, match="the data has gone"):
        gradient_statistics(elbo, model, failing_guide)
    assert elbo.states is states
    assert torch.equal(torch.get_rng_state(), rng)
    assert len(pyro.get_param_store()) == 0


def test_gradients_are_taken_under_no_grad() -> None:
    with torch.no_grad():
        found = gradient_statistics(TraceEstimator_ELBO(RLOO(2)), model, guide, num_samples=4)
    assert found.total_variance > 0
    assert not found.mean["logit"].requires_grad


# --- bad input ----------------------------------------------------------------------------


def test_one_sample_has_no_variance() -> None:
    with pytest.raises(NonDiffError, match="num_samples must be at least 2"):
        gradient_statistics(TraceEstimator_ELBO(), model, guide, num_samples=1)


def test_objectives_without_a_loss_to_differentiate() -> None:
    with pytest.raises(NonDiffError, match="TraceGraph_ELBO has no differentiable_loss"):
        gradient_statistics(TraceGraph_ELBO(), model, guide)


def test_programs_without_parameters() -> None:
    def fixed_guide() -> None:
        pyro.sample("z", dist.Bernoulli(POSTERIOR))

    with pytest.raises(NonDiffError, match="depends on no parameter"):
        gradient_statistics(TraceEstimator_ELBO(), model, fixed_guide)


def test_shapes_that_change() -> None:
    sizes = iter([2, 2, 2, 2, 3, 3, 3, 3])  # guide and model, for a parameter and for a site

    def model_of_any_size() -> None:
        with pyro.plate("data", next(sizes)):
            pyro.sample("z", dist.Bernoulli(torch.tensor(PRIOR)))

    def guide_of_any_size() -> None:
        logit = pyro.param("logit", torch.tensor(0.0))
        size = next(sizes)
        with pyro.plate("data", size):
            pyro.sample("z", dist.Bernoulli(logits=logit.expand(size)))

    elbo = TraceEstimator_ELBO(REINFORCE())
    with pytest.raises(NonDiffError, match=r"site 'z': its gradient had shape \(2,\)"):
        gradient_statistics(elbo, model_of_any_size, guide_of_any_size)
