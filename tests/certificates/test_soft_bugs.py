"""Bugs planted into the soft half of the engine: the certificate must reject each."""

from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_nondiff.distributions import conditional, relax
from pyro_nondiff.estimators import REBAR, REINFORCE, control_variates
from pyro_nondiff.infer import (
    TraceEstimator_ELBO,
    config_estimator,
    costs,
    objective,
    planner,
    worlds,
)
from pyro_nondiff.testing import certify_soft
from pyro_nondiff.testing.quadrature import Grid

from . import soft_programs as programs
from .soft_programs import SoftPair

Patch = pytest.MonkeyPatch


def bias(estimator: Any, pair: SoftPair, step: float = 0.3, **grid: Any) -> float:
    guide = pair.guide
    if isinstance(estimator, dict):
        guide, estimator = config_estimator(guide, estimator), None
    elbo = TraceEstimator_ELBO(estimator, worlds="vectorized")
    return certify_soft(elbo, pair.model, guide, step=step, **grid).bias


def reject(
    estimator: Any, pair: SoftPair, monkeypatch: Patch, target: Any, name: str, bug: Any
) -> None:
    """The certificate passes before a bug is planted, and not after."""
    assert bias(estimator, pair) < 1e-9
    monkeypatch.setattr(target, name, bug)
    # an unbiased estimator is certified to 1e-9: a thousand times more is no rounding
    assert bias(estimator, pair) > 1e-6


def test_conditional_noise_not_differentiated(monkeypatch: Patch) -> None:
    def dropped(law: Any, leaf: Tensor, value: Tensor, noise: Tensor) -> Tensor:
        return conditional(law, leaf.detach(), value, noise) + 0 * leaf

    reject(REBAR(), programs.one_site(), monkeypatch, control_variates, "conditional", dropped)


def test_conditional_swapped(monkeypatch: Patch) -> None:
    def swapped(law: Any, leaf: Tensor, value: Tensor, noise: Tensor) -> Tensor:
        return conditional(law, leaf, 1 - value, noise)

    reject(REBAR(), programs.one_site(), monkeypatch, control_variates, "conditional", swapped)


def test_eta_off_by_two_percent(monkeypatch: Patch) -> None:
    right = control_variates._relaxed_cost

    def off(*args: Any) -> Any:
        combined = right(*args)
        return replace(combined, slopes=(1.02 * combined.slopes[0],))

    reject(REBAR(), programs.one_site(), monkeypatch, control_variates, "_relaxed_cost", off)


def test_twin_forgotten_in_the_slope(monkeypatch: Patch) -> None:
    right = control_variates._slopes

    def forgotten(*args: Any) -> Tensor:
        slopes = right(*args)
        return torch.stack([slopes[0], torch.zeros_like(slopes[1])])

    reject(REBAR(), programs.one_site(), monkeypatch, control_variates, "_slopes", forgotten)


def test_twin_at_a_stale_temperature(monkeypatch: Patch) -> None:
    calls = iter(range(10**9))

    def stale(law: Any, perturbed: Tensor, temperature: Tensor) -> Tensor:
        factor = 1.1 if perturbed.requires_grad and next(calls) % 2 else 1.0
        return relax(law, perturbed, temperature * factor)

    reject(
        REBAR(learn_temperature=False),
        programs.one_site(),
        monkeypatch,
        control_variates,
        "relax",
        stale,
    )


def test_second_noise_is_the_first(monkeypatch: Patch) -> None:
    right = Grid.__call__

    def same(self: Grid, request: Any) -> Tensor:
        if request.role == "v":
            return self._last_noise
        self._last_noise = right(self, request)
        return self._last_noise

    reject(REBAR(), programs.one_site(), monkeypatch, Grid, "__call__", same)


def test_hard_value_kept_downstream(monkeypatch: Patch) -> None:
    def kept(self: Any, law: Any, noise: Tensor, value: Tensor, *rest: Any) -> Tensor:
        rows = rest[-1]
        return value.detach() if rows is None else value.detach()[:1].expand_as(value)[rows]

    reject(
        {"z": REBAR(), "y": REINFORCE()},
        programs.two_sites(),
        monkeypatch,
        worlds.GuideWorlds,
        "_soft_values",
        kept,
    )


def test_terms_behind_a_site_that_breaks_kept(monkeypatch: Patch) -> None:
    right = costs.site_costs

    def keeping(guide: Any, terms: Any, *rest: Any, **options: Any) -> Any:
        for site in guide:
            site.breaks = False
        return right(guide, terms, *rest, **options)

    estimators = {"z": REBAR(), "y": REINFORCE()}
    with pytest.warns(UserWarning, match="cannot be relaxed"):
        reject(
            estimators, programs.categorical_behind(), monkeypatch, objective, "site_costs", keeping
        )


def test_thresholding_model_accepted(monkeypatch: Patch) -> None:
    def thresholding() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.3))
        programs.observe((z > 0.5) * 1.3 + 0.6 * z)

    monkeypatch.setattr(planner, "check_continuity", lambda pair, chunks: None)
    assert bias(REBAR(), SoftPair(thresholding, programs.one_site().guide)) > 1e-6


def test_shared_cost_counted_once_an_element(monkeypatch: Patch) -> None:
    right = costs._totals

    def broadcast(pool: Any) -> Tensor:
        shape = torch.broadcast_shapes(*(value.shape for value in pool.values()))
        return right({group: value.expand(shape) for group, value in pool.items()})

    reject(REBAR(), programs.shared_logit(), monkeypatch, costs, "_totals", broadcast)


def test_model_trained_by_the_control_variate(monkeypatch: Patch) -> None:
    right = control_variates.controlled

    def leaking(draw: Any, cost: Tensor, control: Any, state: Any) -> Any:
        found = right(draw, cost, control, state)
        # the engine detaches a gradient; multiplied into the leaf's own graph it would not
        return replace(found, gradients=(found.gradients[0] + 0.1 * control.twin.mean(),))

    reject(REBAR(), programs.one_site(), monkeypatch, control_variates, "controlled", leaking)


def test_score_of_the_soft_value(monkeypatch: Patch) -> None:
    right = control_variates._twins

    def soft_score(*args: Any) -> Any:
        draw = right(*args)
        biased = draw.scores[0] + 0.05 * (draw.soft[0].detach() - draw.values[0])
        return replace(draw, scores=(biased,))

    reject(REBAR(), programs.one_site(), monkeypatch, control_variates, "_twins", soft_score)
