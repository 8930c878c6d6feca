"""Ops and handlers among Pyro's own tools: what each does, defined.

::

    w ~ Normal        z = argmax(w + scores)        y ~ Normal(z . prices)
"""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.inspect import get_model_relations
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_nondiff.estimators import RLOO, Enumerate
from pyro_nondiff.handlers import mode, randomize, soften, straight_through
from pyro_nondiff.infer import TraceEstimator_ELBO, config_estimator
from pyro_nondiff.ops import argmax, cost, external, select

Program = Callable[..., Any]

SCORES = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
PRICES = torch.tensor([10.0, 20.0, 30.0])
LAST = torch.tensor([0.0, 0.0, 1.0])


def model(y: Tensor | None = None) -> Tensor:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1e-3).to_event(1))
    with pyro.plate("data", 2):
        z = argmax("z", w + SCORES)
        pyro.sample("y", dist.Normal((z * PRICES).sum(-1), 1e-3), obs=y)
    return z


def plain(fn: Program) -> Program:
    return fn


# --- Predictive ------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_returns_the_values_of_ops(parallel: bool) -> None:
    found = Predictive(model, num_samples=5, parallel=parallel)()
    assert found["z"].shape == (5, 2, 3)
    # w moves the scores by 1e-3, and they are 1 apart
    assert torch.equal(found["z"], argmax("z", SCORES).expand(5, 2, 3))


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_of_a_softened_model_returns_soft_values(parallel: bool) -> None:
    found = Predictive(soften()(model), num_samples=5, parallel=parallel)()
    # w has standard deviation 1e-3, and softmax a slope below 1: five of them
    torch.testing.assert_close(
        found["z"], SCORES.softmax(-1).expand(5, 2, 3), rtol=0, atol=5e-3 * 3**0.5
    )


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_draws_what_is_randomised(parallel: bool) -> None:
    found = Predictive(randomize(temperature=10.0)(model), num_samples=200, parallel=parallel)()
    assert found["z"].shape == (200, 2, 3)
    # the probabilities are at least 0.28: none is missed in 200 draws but for 1e-28
    assert torch.equal(found["z"].amax(0), torch.ones(2, 3))
    at_mode = Predictive(mode()(randomize()(model)), num_samples=2, parallel=parallel)()
    assert torch.equal(at_mode["z"], argmax("z", SCORES).expand(2, 2, 3))
    assert torch.equal(at_mode["y"], torch.tensor([20.0, 10.0]).expand(2, 2))


def test_predictive_takes_samples_of_what_is_randomised() -> None:
    given = {"z": LAST.expand(4, 2, 3)}
    found = Predictive(randomize()(model), given)()
    # y has standard deviation 1e-3: six of them
    torch.testing.assert_close(found["y"], torch.full((4, 2), 30.0), rtol=0, atol=6e-3)


# --- condition, do, replay, block ------------------------------------------------------


def test_condition_observes_what_is_randomised() -> None:
    observed = poutine.condition(randomize()(model), data={"z": LAST.expand(2, 3)})
    trace = poutine.trace(observed).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["z"]
    assert site["is_observed"]
    w = trace.nodes["w"]["value"]
    # the same log-probabilities, normalised in two ways
    expected = (w + SCORES).log_softmax(-1)[:, 2]
    torch.testing.assert_close(site["log_prob"], expected)


@pytest.mark.parametrize("smooth", [plain, soften(), straight_through()], ids=type)
def test_condition_replaces_the_value_of_an_op_that_is_no_site(
    smooth: Callable[[Program], Program],
) -> None:
    """As for ``pyro.deterministic``: no density, and what follows sees the value."""
    given = poutine.condition(smooth(model), data={"z": LAST.expand(2, 3)})
    trace = poutine.trace(given).get_trace()
    assert torch.equal(trace.nodes["_RETURN"]["value"], LAST.expand(2, 3))
    assert trace.nodes["z"]["fn"].log_prob(LAST.expand(2, 3)).sum() == 0


def test_do_intervenes_on_what_is_randomised() -> None:
    intervened = poutine.do(randomize()(model), data={"z": LAST.expand(2, 3)})
    trace = poutine.trace(intervened).get_trace()
    assert torch.equal(trace.nodes["_RETURN"]["value"], LAST.expand(2, 3))
    assert not trace.nodes["z"]["is_observed"]  # the site that was, whose value goes nowhere


def test_do_intervenes_on_an_op_that_is_no_site() -> None:
    trace = poutine.trace(poutine.do(model, data={"z": LAST.expand(2, 3)})).get_trace()
    assert torch.equal(trace.nodes["_RETURN"]["value"], LAST.expand(2, 3))


def test_replay_gives_a_randomised_op_its_value() -> None:
    program = randomize(temperature=100.0)(model)
    trace = poutine.trace(program).get_trace()
    for _ in range(10):
        again = poutine.trace(poutine.replay(program, trace=trace)).get_trace()
        assert torch.equal(again.nodes["z"]["value"], trace.nodes["z"]["value"])


def test_replay_computes_an_op_that_is_no_site_again() -> None:
    """Its value follows from those that are replayed."""
    trace = poutine.trace(model).get_trace()
    again = poutine.trace(poutine.replay(soften()(model), trace=trace)).get_trace()
    expected = (trace.nodes["w"]["value"] + SCORES).softmax(-1)
    torch.testing.assert_close(again.nodes["z"]["value"], expected, rtol=0, atol=0)


def test_block_hides_ops_from_a_trace_outside() -> None:
    trace = poutine.trace(poutine.block(model, hide=["z"])).get_trace()
    assert "z" not in trace
    assert "y" in trace


@pytest.mark.parametrize("smooth", [plain, randomize()], ids=type)
def test_op_has_the_plates_of_its_place(smooth: Callable[[Program], Program]) -> None:
    trace = poutine.trace(smooth(model)).get_trace()
    assert [frame.name for frame in trace.nodes["z"]["cond_indep_stack"]] == ["data"]
    assert trace.nodes["z"]["fn"].batch_shape == (2,)
    trace.compute_log_prob()


# --- the picture of a model ------------------------------------------------------------


def test_relations_show_ops_as_deterministic_and_randomised_ones_as_sampled() -> None:
    hard = get_model_relations(model, include_deterministic=True)
    assert hard["sample_sample"]["z"] == ["w"]
    assert hard["sample_dist"]["z"] == "Deterministic"
    drawn = get_model_relations(randomize()(model))
    assert drawn["sample_sample"] == {"w": [], "z": ["w"], "y": ["z"]}
    assert drawn["sample_dist"]["z"] == "OneHotCategorical"
    assert drawn["plate_sample"] == {"data": ["z", "y"]}


def test_render_model() -> None:
    pytest.importorskip("graphviz")
    assert "z" in pyro.render_model(randomize()(model)).source
    assert "z" in pyro.render_model(model, render_deterministic=True).source


# --- objectives ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "elbo",
    [Trace_ELBO(), TraceEstimator_ELBO(), TraceEstimator_ELBO(RLOO(2), num_particles=3)],
    ids=lambda elbo: type(elbo).__name__,
)
@pytest.mark.usefixtures("param_store")
def test_gradient_reaches_what_decides_in_any_objective(elbo: Any) -> None:
    """A model of a parameter, a soft choice and data, with nothing random in it."""

    class Shop(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Parameter(SCORES.clone())

        def forward(self) -> None:
            with pyro.plate("data", 2):
                price = select("v", self.scores, PRICES)
                pyro.sample("y", dist.Normal(price, 1.0), obs=torch.tensor([12.0, 12.0]))

    program = soften()(Shop())
    loss = elbo.differentiable_loss(program, lambda: None)
    loss.backward()
    scores = program.module.scores
    weights = scores.detach().softmax(-1)
    price = weights @ PRICES
    slope = (price - 12.0)[:, None] * weights * (PRICES - price[:, None])
    # one product, written out; a mean over three particles
    torch.testing.assert_close(scores.grad, slope)


@pytest.mark.usefixtures("param_store")
def test_svi_trains_a_program_under_a_handler() -> None:
    def program() -> None:
        scores = pyro.param("scores", torch.zeros(3))
        pyro.sample("y", dist.Normal(select("v", scores, PRICES), 1.0), obs=torch.tensor(30.0))

    svi = SVI(soften()(program), lambda: None, pyro.optim.Adam({"lr": 0.3}), Trace_ELBO())
    for _ in range(30):
        svi.step()
    assert select("v", pyro.param("scores"), PRICES) == 30  # and run hard


def test_external_is_called_once_a_run() -> None:
    calls = []

    def program() -> Tensor:
        return external("e", lambda: float(len(calls.append(1) or calls)))

    assert poutine.trace(program).get_trace().nodes["e"]["value"] == 1
    assert len(calls) == 1


@randomize()
def guide() -> Tensor:
    return argmax("z", torch.tensor([0.0, 1.0, 2.0]))


def priced() -> None:
    z = pyro.sample("z", dist.OneHotCategorical(torch.ones(3)))
    cost("price", (z * PRICES).sum(-1))


def test_randomised_op_is_enumerated_by_pyro_and_by_us() -> None:
    expected = TraceEnum_ELBO(max_plate_nesting=0).loss(priced, config_enumerate(guide))
    chosen = config_estimator(guide, {"z": Enumerate()})
    found = TraceEstimator_ELBO().differentiable_loss(priced, chosen)
    # three products, summed in another order, in the seven digits of float32
    assert float(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceEstimator_ELBO(RLOO(3))], ids=type)
def test_loss_at_the_mode_is_that_of_the_hard_program(elbo: Any) -> None:
    log_ratio = math.log(1 / 3) - torch.tensor([0.0, 1.0, 2.0]).log_softmax(-1)[2]
    expected = float(PRICES[2] - log_ratio)
    # the same three terms, in the seven digits of float32
    assert elbo.loss(priced, mode()(guide)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceGraph_ELBO(), TraceMeanField_ELBO()], ids=type)
@pytest.mark.filterwarnings("error")
def test_op_in_a_guide_is_no_latent_site_that_the_model_lacks(elbo: Any) -> None:
    def one_site() -> None:
        pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    @soften()
    def choosing_guide() -> None:
        pyro.sample("w", dist.Normal(0 * argmax("z", SCORES[0]), 1.0).to_event(1))

    # the guide is the prior, term by term
    assert elbo.loss(one_site, choosing_guide) == 0.0
