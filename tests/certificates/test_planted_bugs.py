"""Bugs planted into the engine and the estimators: a certificate must reject every one.

Each has been shipped by somebody. Beside it stands the program that shows it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import Tensor

from pyro_nondiff.estimators import (
    REINFORCE,
    RLOO,
    DisARM,
    Draw,
    Enumerate,
    Estimate,
    MovingAverage,
    Reading,
    baselines,
)
from pyro_nondiff.infer import costs, execute, objective, worlds
from pyro_nondiff.testing import certify

from . import programs
from .checks import bias, elbo_of
from .programs import BERNOULLI

Patch = pytest.MonkeyPatch

pytestmark = pytest.mark.filterwarnings(
    # what it says is true of some programs, and costs variance only
    "ignore:site '.*' lies in a plate that the later guide site"
)


def reject(estimator: Any, pair: Any, monkeypatch: Patch, target: Any, name: str, bug: Any) -> None:
    """The certificate passes before a bug is planted, and not after."""
    assert found(estimator, pair) < 1e-9
    monkeypatch.setattr(target, name, bug)
    # an unbiased estimator is certified to 1e-9: a thousand times more is no rounding
    assert found(estimator, pair) > 1e-6


def found(estimator: Any, pair: Any) -> float:
    return bias(certify(elbo_of(estimator), *pair, nodes=2))


def changed(estimator: type[Any], change: Callable[[Estimate], Estimate]) -> Any:
    """An estimator's method whose result is changed."""
    right = estimator.estimate
    return lambda *args: change(right(*args))


def test_cost_not_detached(monkeypatch: Patch) -> None:
    """The score's weight carries a gradient of its own."""
    right = objective._site_surrogate

    def attached(site: Any, estimate: Estimate, rows: Any) -> Tensor:
        assert estimate.weight is not None
        return right(site, estimate, rows) + 0.5 * (rows.scores.square()).sum().reshape(1)

    reject(
        REINFORCE(),
        programs.one_site(BERNOULLI),
        monkeypatch,
        objective,
        "_site_surrogate",
        attached,
    )


def test_rloo_without_its_factor(monkeypatch: Patch) -> None:
    """The mean of all worlds, with the own one, as baseline."""

    def with_own(estimate: Estimate) -> Estimate:
        assert estimate.weight is not None
        return replace(estimate, weight=estimate.weight / 2)

    bug = changed(RLOO, with_own)
    reject(RLOO(2), programs.one_site(BERNOULLI), monkeypatch, RLOO, "estimate", bug)


def test_baseline_that_has_seen_the_cost(monkeypatch: Patch) -> None:
    """A moving average that is updated before it is read, as Storchastic's."""
    right = MovingAverage.read

    def early(self: MovingAverage, state: Any, cost: Tensor, context: Any) -> Reading:
        right(self, state, cost, context).update(cost)
        return right(self, state, cost, context)

    pair = programs.one_site(BERNOULLI)
    reject(REINFORCE(MovingAverage()), pair, monkeypatch, MovingAverage, "read", early)


def test_baseline_that_looks_at_its_own_value(monkeypatch: Patch) -> None:
    right = MovingAverage.read

    def leaking(self: MovingAverage, state: Any, cost: Tensor, context: Any) -> Reading:
        reading = right(self, state, cost, context)
        return replace(reading, value=reading.value + 0.3 * cost)

    pair = programs.one_site(BERNOULLI)
    reject(REINFORCE(MovingAverage()), pair, monkeypatch, MovingAverage, "read", leaking)


def test_disarm_without_its_sigmoid(monkeypatch: Patch) -> None:
    right = DisARM.estimate

    def without(self: DisARM, draw: Draw, cost: Tensor, state: Any, context: Any) -> Estimate:
        assert draw.logits is not None
        found = right(self, draw, cost, state, context)
        assert found.gradient is not None
        return replace(found, gradient=found.gradient / draw.logits.abs().sigmoid())

    reject(DisARM(), programs.one_site(BERNOULLI), monkeypatch, DisARM, "estimate", without)


def test_disarm_with_its_sign_swapped(monkeypatch: Patch) -> None:
    def swapped(estimate: Estimate) -> Estimate:
        assert estimate.gradient is not None
        return replace(estimate, gradient=-estimate.gradient)

    bug = changed(DisARM, swapped)
    reject(DisARM(), programs.one_site(BERNOULLI), monkeypatch, DisARM, "estimate", bug)


def test_disarm_with_another_partner(monkeypatch: Patch) -> None:
    """The opposite value in place of that of the opposite noise."""
    right = DisARM.draw

    def opposite(self: DisARM, law: Any, value: Tensor, *rest: Any) -> Draw:
        draw = right(self, law, value, *rest)
        return replace(draw, values=torch.stack([value, 1 - value]))

    reject(DisARM(), programs.one_site(BERNOULLI), monkeypatch, DisARM, "draw", opposite)


def test_enumeration_weighed_by_the_wrong_rows(monkeypatch: Patch) -> None:
    right = Enumerate.draw

    def shifted(*args: Any) -> Draw:
        draw = right(*args)
        assert draw.hard_weights is not None
        return replace(draw, hard_weights=draw.hard_weights.roll(1, 0))

    reject(Enumerate(), programs.one_site(BERNOULLI), monkeypatch, Enumerate, "draw", shifted)


def test_enumeration_across_a_plate(monkeypatch: Patch) -> None:
    """The refusal is switched off: the sum over both elements at once is biased."""

    def model() -> None:
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(0.3))
        mean = 2 * z.prod(-1, keepdim=True)
        pyro.sample("x", dist.Normal(mean, 1.0), obs=torch.tensor([1.7]))

    def guide() -> None:
        logit = pyro.param("a", torch.tensor(0.3))
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Bernoulli(logits=logit))

    monkeypatch.setattr(objective, "_check_shared", lambda site, cost, step: None)
    assert found(Enumerate(), (model, guide)) > 1e-6


def test_plate_frame_kept_across_a_global_site(monkeypatch: Patch) -> None:
    """What ``MultiFrameTensor.sum_to`` does for programs local, global, local."""
    right = costs._keep

    def kept(pool: Any, frames: Any) -> Any:
        return pool if not frames else right(pool, frames)

    pair = programs.local_global_local(BERNOULLI)
    reject(REINFORCE(), pair, monkeypatch, costs, "_keep", kept)


def test_only_the_frames_that_a_term_has_met_are_judged(monkeypatch: Patch) -> None:
    """A term of the model that has not met the global site, but one that was drawn after it."""
    right = execute.reaches

    def met_only(guide: Any, model: Any) -> dict[str, int]:
        return {
            name: min(reach, 0) if name == "x" else reach
            for name, reach in right(guide, model).items()
        }

    pair = programs.late_global(BERNOULLI)
    reject(REINFORCE(), pair, monkeypatch, execute, "reaches", met_only)


def test_model_term_dropped_by_its_own_place(monkeypatch: Patch) -> None:
    """A term counts for the sites up to its last latent one, not to its own alone."""

    def own(guide: Any, model: Any) -> dict[str, int]:
        return {site.name: 0 if site.observed else i for i, site in enumerate(model)}

    reject(REINFORCE(), programs.chain(BERNOULLI), monkeypatch, execute, "reaches", own)


def test_scale_ignored_in_the_cost(monkeypatch: Patch) -> None:
    right = execute.scale_and_mask

    def unscaled(value: Tensor, scale: Any, mask: Any) -> Tensor:
        scaled: Tensor = right(value, scale, mask)
        return scaled if value.requires_grad else right(value, 1.0, mask)

    pair = programs.scaled(BERNOULLI)
    reject(REINFORCE(), pair, monkeypatch, execute, "scale_and_mask", unscaled)


def test_mask_ignored(monkeypatch: Patch) -> None:
    right = execute.scale_and_mask
    pair = programs.nested_plates(BERNOULLI, "poutine")
    reject(
        REINFORCE(),
        pair,
        monkeypatch,
        execute,
        "scale_and_mask",
        lambda value, scale, mask: right(value, scale, None),
    )


def test_score_scaled_like_the_cost(monkeypatch: Patch) -> None:
    right = execute._scored

    def scaled(*args: Any) -> tuple[Tensor, Tensor]:
        _, value = right(*args)
        return value, value

    reject(REINFORCE(), programs.scaled(BERNOULLI), monkeypatch, execute, "_scored", scaled)


def test_downstream_value_replayed(monkeypatch: Patch) -> None:
    """A branch that keeps the base run's later values: biased by what they depend on."""
    right = worlds.GuideWorlds._values

    def replayed(self: Any, law: Any, noise: Any, ask: Any) -> Tensor:
        value = right(self, law, noise, ask)
        rows = value.dim() - law.event_dim == self.plan.nesting + 2 and len(value) > 1
        return value[:1].expand_as(value) if rows else value

    reject(
        DisARM(), programs.chain(BERNOULLI), monkeypatch, worlds.GuideWorlds, "_values", replayed
    )


def test_rows_weighed_without_norm(monkeypatch: Patch) -> None:
    right = objective._vectorised_weights

    def unnormed(chunk: Any) -> Tensor | None:
        weights = right(chunk)
        return None if weights is None else 2 * weights

    pair = programs.chain(BERNOULLI)
    reject(DisARM(), pair, monkeypatch, objective, "_vectorised_weights", unnormed)


def test_entropy_of_a_pathwise_site_forgotten(monkeypatch: Patch) -> None:
    pathwise = objective._pathwise

    def without(chunk: Any) -> tuple[Tensor, Tensor]:
        terms = [t for t in chunk.terms if not (t.in_guide and t.site.ask.pathwise)]
        return pathwise(replace(chunk, terms=terms))

    pair = programs.continuous_between(BERNOULLI)
    reject(REINFORCE(), pair, monkeypatch, objective, "_pathwise", without)


def test_sum_over_particles_for_the_mean(monkeypatch: Patch) -> None:
    def summed(estimate: Estimate) -> Estimate:
        assert estimate.weight is not None
        return replace(estimate, weight=estimate.weight * estimate.weight.shape[1])

    bug = changed(RLOO, summed)
    reject(RLOO(2), programs.one_site(BERNOULLI), monkeypatch, RLOO, "estimate", bug)


def test_mean_over_plate_elements_for_the_sum(monkeypatch: Patch) -> None:
    right = objective._sum_but

    def averaged(x: Tensor, dim: int) -> Tensor:
        return right(x, dim) / (x.shape[-1] if x.dim() > 2 else 1)

    def surrogate(site: Any, estimate: Estimate, rows: Any) -> Tensor:
        assert estimate.weight is not None
        return averaged(estimate.weight.detach() * rows.scores, 1)

    pair = programs.local_plate(BERNOULLI)
    reject(REINFORCE(), pair, monkeypatch, objective, "_site_surrogate", surrogate)


def test_a_state_that_trains_the_guide(monkeypatch: Patch) -> None:
    """The certificate holds states fixed: training them must not move what it certifies."""
    right = baselines.RunningMean.update
    pair = programs.one_site(BERNOULLI)
    elbo = elbo_of(REINFORCE(MovingAverage()))
    svi = SVI(*pair, pyro.optim.Adam({"lr": 0.0}), elbo)
    for _ in range(5):
        svi.step()
    assert bias(certify(elbo, *pair, nodes=2)) < 1e-9

    def doubling(self: Any, observation: Tensor) -> None:
        right(self, observation)
        for value in pyro.get_param_store()._params.values():
            value.data += 0.01

    monkeypatch.setattr(baselines.RunningMean, "update", doubling)
    assert bias(certify(elbo, *pair, nodes=2)) > 1e-6
