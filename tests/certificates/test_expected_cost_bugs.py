"""Bugs planted into what draws the model's own sites: a check that has passed rejects each.

Most are killed by an exact expectation. One leaves it as it is, and is killed by an identity.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor

from pyro_nondiff import distributions, noise
from pyro_nondiff.estimators import REBAR, REINFORCE, RLOO, DisARM, Enumerate
from pyro_nondiff.infer import (
    ExpectedCost,
    costs,
    execute,
    expected_cost,
    no_guide,
    objective,
    worlds,
)
from pyro_nondiff.testing import certify, certify_soft
from tests.infer import test_expected_cost as options
from tests.infer import test_own_sites

from . import own_programs as programs
from . import test_expected_cost as expected
from . import test_own_guided as guided
from .checks import TOLERANCE, elbo_of
from .programs import BERNOULLI, Pair

pytestmark = pytest.mark.filterwarnings(
    "ignore:site '.*' lies in a plate that the later guide site",
    "ignore:site '.*' cannot be relaxed",
)

Patch = pytest.MonkeyPatch
Check = Callable[[], Any]
VISIBLE = 1e-6
"""A thousand times the bias that is taken for rounding."""


class BiasError(AssertionError):
    """A certificate has found a bias."""

    def __init__(self, size: float) -> None:
        super().__init__(f"the bias is {size:.1e}")
        self.size = size


BUGS: list[tuple[Callable[[Patch], None], Check]] = []


def kills(check: Check) -> Callable[[Callable[[Patch], None]], None]:
    """Registers a bug under the check that is to kill it."""

    def register(plant: Callable[[Patch], None]) -> None:
        BUGS.append((plant, check))

    return register


def unbiased(
    pair: Callable[[], Pair], estimators: Any, soft: bool = False, alone: bool = False
) -> Check:
    """A check of the exact expectation; estimators by site where they are a dictionary."""

    def check() -> None:
        both, chosen = pair(), estimators
        if isinstance(chosen, dict):
            both, chosen = guided.configured(both, chosen), None
        kind = ExpectedCost(chosen, worlds="vectorized") if alone else elbo_of(chosen)
        found = certify_soft(kind, *both, step=0.3) if soft else certify(kind, *both, nodes=2)
        if found.bias > TOLERANCE:
            raise BiasError(found.bias)

    return check


def of(structure: Callable[..., Pair], *arguments: Any) -> Callable[[], Pair]:
    return lambda: structure(BERNOULLI, *arguments)


def alone(program: Callable[..., Any], *arguments: Any) -> Callable[[], Pair]:
    return lambda: (program(BERNOULLI, *arguments), no_guide)


# --- the term of an own site ------------------------------------------------------------------


def own_terms(patch: Patch, change: Callable[[Any], Any]) -> None:
    right = execute._own_term
    patch.setattr(execute, "_own_term", lambda *args: change(right(*args)))


@kills(unbiased(of(programs.downstream), RLOO(2)))
def own_term_kept_as_a_prior(patch: Patch) -> None:
    """The model's log-probability of its own site stays in the objective."""
    own_terms(patch, lambda term: replace(term, value=-term.score))


@kills(unbiased(of(programs.upstream), REINFORCE()))
def own_term_kept_as_a_guides(patch: Patch) -> None:
    """The other half of the KL: the site's entropy is a cost."""
    own_terms(patch, lambda term: replace(term, value=term.score))


# --- which costs count ------------------------------------------------------------------------


@kills(unbiased(alone(programs.decisions), RLOO(2), alone=True))
def reach_off_by_one(patch: Patch) -> None:
    """A term does not count at the last own site before it."""
    right = execute.reaches

    def early(drawn: Any, model: Any) -> Any:
        observed = {site.name for site in model if site.observed}
        return {name: reach - (name in observed) for name, reach in right(drawn, model).items()}

    patch.setattr(execute, "reaches", early)


@kills(lambda: expected.test_each_decision_pays_for_what_comes_after_it("vectorized", 1.0))
def reach_too_far(patch: Patch) -> None:
    """Every cost counts at every decision: unbiased, and no longer the costs to come."""
    right = execute.reaches

    def late(drawn: Any, model: Any) -> Any:
        return dict.fromkeys(right(drawn, model), len(drawn) - 1)

    patch.setattr(execute, "reaches", late)


@kills(unbiased(of(programs.between), RLOO(2)))
def own_sites_in_front_of_the_guides(patch: Patch) -> None:
    """An own site is taken to be drawn before the guide's, so the guide's pay for less."""
    right = execute.reaches

    def reaches(drawn: Any, model: Any) -> Any:
        found, mine = right(drawn, model), [s.name for s in drawn if s.name.startswith("own")]
        return {name: found[name] - len(mine) * (name == "x") for name in found}

    patch.setattr(execute, "reaches", reaches)


@kills(unbiased(of(programs.in_a_plate), RLOO(2)))
def frames_kept_across_a_later_own_site(patch: Patch) -> None:
    """Elements of a plate that meet in an own site outside it each pay for themselves alone."""
    right = costs._keep

    def keep(pool: Any, frames: Any) -> Any:
        return pool if not frames else right(pool, frames)

    patch.setattr(costs, "_keep", keep)


@kills(unbiased(alone(programs.buyers), REINFORCE(), alone=True))
def scale_of_a_cost_ignored(patch: Patch) -> None:
    """A cost in a subsampled plate counts once, not once for each that it stands for."""
    right = execute._scored

    def unscaled(site: Any, *rest: Any) -> Any:
        site = replace(site, scale=1.0) if site.name == "price" else site
        return right(site, *rest)

    patch.setattr(execute, "_scored", unscaled)


# --- two runs of the model --------------------------------------------------------------------


@kills(unbiased(of(programs.downstream), {"z": REBAR(), "own": REINFORCE()}, soft=True))
def hard_value_kept_in_the_soft_run(patch: Patch) -> None:
    """An own site behind a soft value has its hard draw there."""
    right = worlds.GuideWorlds._draw

    def draw(self: Any, name: str, law: Any) -> Tensor:
        value = right(self, name, law)
        known = self._known.get(name)
        if known is None or known.draw is None:
            return value
        self._drawn["breaks"] = False
        return known.draw.values[0].detach().expand_as(value)

    patch.setattr(worlds.GuideWorlds, "_draw", draw)


@kills(unbiased(lambda: indexed(), REBAR(), soft=True))
def breaks_lost_for_own_sites(patch: Patch) -> None:
    """What the soft run found to break soft values is not told to the costs."""
    right = execute.run_recorded

    def forgetful(*args: Any) -> Any:
        run = right(*args)
        for site in run.own.values():
            site.breaks = False
        return run

    patch.setattr(execute, "run_recorded", forgetful)


def indexed() -> Pair:
    return guided.with_an_index()


@kills(lambda: one_noise_a_site())
def soft_run_with_noise_of_its_own(patch: Patch) -> None:
    """Own sites are drawn anew for the soft rows: unbiased, but for nothing more variable."""
    right = worlds.GuideWorlds.start_model
    patch.setattr(
        worlds.GuideWorlds, "start_model", lambda self, rows, known: right(self, rows, {})
    )


def one_noise_a_site() -> None:
    """A step asks for each site's noise once, however often the model runs."""
    pair = guided.configured(programs.downstream(BERNOULLI), {"z": REBAR(), "own": DisARM()})
    elbo, asked = elbo_of(None), []
    elbo.differentiable_loss(*pair)

    def source(request: noise.Request) -> Tensor:
        asked.append((request.site, request.role))
        return torch.zeros(request.shape) + 0.3

    with noise.source(source):
        elbo.differentiable_loss(*pair)
    assert sorted(asked) == [("own", "antithetic"), ("z", "u"), ("z", "v")]


@kills(unbiased(of(programs.downstream), {"z": DisARM(), "own": REBAR()}, soft=True))
def own_rows_at_the_wrong_place(patch: Patch) -> None:
    """The soft rows of an own site begin where all rows begin, not where the soft ones do."""
    right = worlds._placed
    patch.setattr(worlds, "_placed", lambda rows, own, start: right(rows, own, max(start - 1, 0)))


# --- values that are given ----------------------------------------------------------------------


@kills(test_own_sites.test_a_given_value_has_the_score_of_its_law)
def score_of_a_given_value_dropped(patch: Patch) -> None:
    """A value that comes from outside is taken for an observation."""
    right = execute._own_term

    def dropped(site: Any, *rest: Any) -> Any:
        term = right(site, *rest)
        return replace(term, score=term.score.detach() + 0 * term.score)

    patch.setattr(execute, "_own_term", dropped)


@kills(test_own_sites.test_relax_of_a_given_value_has_the_right_mean)
def noise_of_a_given_value_shifted(patch: Patch) -> None:
    """The logits are left in the noise, and added to it once more."""
    patch.setattr(
        worlds.GuideWorlds,
        "_noise_given",
        lambda self, name, law, value: distributions.conditional(
            law, law.logits.detach(), value, self._noise(name, law, "given")
        ),
    )


# --- bonus and discount -------------------------------------------------------------------------


def bonus_check() -> None:
    options.test_entropy_bonus_is_a_cost_before_each_site(0.7, RLOO(2), "vectorized")


@kills(bonus_check)
def bonus_with_the_wrong_sign(patch: Patch) -> None:
    """Entropy is a cost."""
    right = execute._bonus_term

    def negated(*args: Any) -> Any:
        term = right(*args)
        return replace(term, value=-term.value)

    patch.setattr(execute, "_bonus_term", negated)


@kills(bonus_check)
def bonus_without_scale_and_mask(patch: Patch) -> None:
    """A site in a subsampled plate has the bonus of one element."""
    right = execute._entropy
    patch.setattr(
        execute, "_entropy", lambda site, plan: right(replace(site, scale=1.0, mask=None), plan)
    )


@kills(bonus_check)
def bonus_of_a_law_without_its_mask(patch: Patch) -> None:
    """The elements that a law's own mask takes away have their entropy."""
    right = distributions.entropy

    def unmasked(law: Any) -> Tensor:
        base = getattr(law, "base_dist", law)
        return right(base if type(law).__name__ == "MaskedDistribution" else law)

    patch.setattr(execute, "entropy", unmasked)


@kills(bonus_check)
def bonus_reached_by_nothing(patch: Patch) -> None:
    """The entropy of a law is no cost of the sites before it, which decide it."""
    right = execute._bonus_term
    patch.setattr(execute, "_bonus_term", lambda site, reach, *rest: right(site, -1, *rest))


@kills(lambda: options.test_entropy_bonus_in_soft_worlds(REBAR()))
def bonus_without_a_slope_in_soft_rows(patch: Patch) -> None:
    """The control variate sees an entropy without a slope, as that of the hard row is."""
    right = execute._bonus_term

    def hard(*args: Any) -> Any:
        term = right(*args)
        return term if term.soft is None else replace(term, soft=term.soft.detach())

    patch.setattr(execute, "_bonus_term", hard)


@kills(options.test_a_schedule_is_read_at_each_step)
def schedule_read_once(patch: Patch) -> None:
    """The bonus stays where the schedule began."""
    patch.setattr(
        expected_cost.ExpectedCost,
        "_bonus",
        lambda self: getattr(self.entropy_bonus, "start", self.entropy_bonus),
    )


def discount_check() -> None:
    expected.test_each_decision_pays_for_what_comes_after_it("vectorized", 0.9)


@kills(discount_check)
def discount_twice(patch: Patch) -> None:
    """A cost one site later counts the square."""
    right = objective.site_costs

    def twice(guide: Any, terms: Any, soft: bool = False, discount: float = 1.0) -> Any:
        return right(guide, terms, soft, discount**2)

    patch.setattr(objective, "site_costs", twice)


@kills(discount_check)
def discount_of_what_comes_at_once(patch: Patch) -> None:
    """The cost right after a decision is discounted too."""
    right = objective.site_costs

    def early(guide: Any, terms: Any, soft: bool = False, discount: float = 1.0) -> Any:
        found = right(guide, terms, soft, discount)
        return {name: replace(cost, value=discount * cost.value) for name, cost in found.items()}

    patch.setattr(objective, "site_costs", early)


@kills(discount_check)
def discount_of_the_loss(patch: Patch) -> None:
    """The loss itself is discounted."""
    right = objective.pathwise

    def discounted(chunk: Any) -> Any:
        loss, path = right(chunk)
        return 0.9 * loss, path

    patch.setattr(objective, "pathwise", discounted)


@kills(lambda: guided.test_hard_worlds(programs.downstream, "enumerate"))
def rows_of_an_own_site_not_weighted(patch: Patch) -> None:
    """The rows that enumerate an own site count alike, whatever their probability."""
    right = Enumerate.draw

    def even(self: Any, *args: Any) -> Any:
        found = right(self, *args)
        return replace(found, hard_weights=torch.ones_like(found.hard_weights) / 2)

    patch.setattr(Enumerate, "draw", even)


@pytest.mark.parametrize(("plant", "check"), BUGS, ids=lambda each: each.__name__)
def test_bug_is_rejected(plant: Any, check: Check, monkeypatch: Patch) -> None:
    check()
    pyro.clear_param_store()
    plant(monkeypatch)
    with pytest.raises(AssertionError) as rejected:
        check()
    if isinstance(rejected.value, BiasError):
        assert rejected.value.size > VISIBLE


def test_there_are_many_bugs() -> None:
    assert len({plant.__name__ for plant, _ in BUGS}) == len(BUGS) >= 20
