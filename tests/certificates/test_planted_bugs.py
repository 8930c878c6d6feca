"""Bugs planted into estimators and engine: a check that has passed must reject each of them.

Each bug replaces one function of the engine, or is an estimator or a baseline with the bug inside.
Most are killed by the exact expectation. Some leave it as it is: they are killed by an identity
with the paper's formula or by an exact variance, and a comment says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pytest
import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_nondiff import noise
from pyro_nondiff.distributions import _laws, transport
from pyro_nondiff.estimators import (
    REINFORCE,
    RLOO,
    DisARM,
    Enumerate,
    Estimate,
    MovingAverage,
    Reading,
    baselines,
)
from pyro_nondiff.estimators import exact as exact_room
from pyro_nondiff.infer import config_estimator, costs, elbo, execute, objective, pathwise, worlds
from pyro_nondiff.noise import Request
from pyro_nondiff.testing import certify

from . import programs, test_identities, test_structures, test_variance, test_worlds_agree
from .checks import TOLERANCE, elbo_of
from .programs import BERNOULLI, Pair

pytestmark = pytest.mark.filterwarnings(
    # what it says is true of some structures, and costs variance only
    "ignore:site '.*' lies in a plate that the later guide site"
)

Patch = pytest.MonkeyPatch
VISIBLE = 1e-6
"""A thousand times the bias that is taken for rounding."""


class BiasError(AssertionError):
    """A certificate has found a bias."""

    def __init__(self, size: float) -> None:
        super().__init__(f"the bias is {size:.1e}")
        self.size = size


@dataclass(frozen=True)
class Bug:
    """A bug, and the check that kills it.

    Arguments:
        name: What is wrong.
        plant: Puts the bug in.
        check: Passes before, and raises an ``AssertionError`` after.
    """

    name: str
    plant: Callable[[Patch], None]
    check: Callable[[], None]


BUGS: list[Bug] = []


def kills(check: Callable[[], None]) -> Callable[[Callable[[Patch], None]], None]:
    """Registers a bug under the check that is to kill it."""

    def register(plant: Callable[[Patch], None]) -> None:
        BUGS.append(Bug(plant.__name__, plant, check))

    return register


def unbiased(pair: Callable[[], Pair], estimator: Any, **options: Any) -> Callable[[], None]:
    """A check of the exact expectation; estimators by site where they are a dictionary."""

    def check() -> None:
        model, guide = pair()
        chosen = estimator() if callable(estimator) else estimator
        if isinstance(chosen, dict):
            guide, chosen = config_estimator(guide, chosen), None
        objective_ = elbo_of(chosen, **options)
        for _ in range(2):
            objective_.differentiable_loss(model, guide)
        size = certify(objective_, model, guide, nodes=2).bias
        if size > TOLERANCE:
            raise BiasError(size)

    return check


def of(structure: Callable[..., Pair], *arguments: Any) -> Callable[[], Pair]:
    """A structure of Bernoulli sites."""
    return lambda: structure(BERNOULLI, *arguments)


# --- costs and scores -------------------------------------------------------------------------


@kills(unbiased(of(programs.chain), REINFORCE()))
def cost_not_detached(patch: Patch) -> None:
    """The gradient runs through the cost that the score is weighted with."""
    right = costs._part
    patch.setattr(costs, "_part", lambda term, soft: right(term, soft) if soft else term.value)
    patch.setattr(objective, "_site_surrogate", surrogate_without_detach)


def surrogate_without_detach(site: Any, found: Estimate, rows: Any) -> Tensor:
    """A site's part of the surrogate, whose weight carries a gradient."""
    assert found.weight is not None
    return objective.sum_but(found.weight * rows.scores[: found.weight.shape[0]], 1)


# the score has mean zero, so what reaches the net has none: the net's own gradient is looked at
@kills(test_identities.test_neural_baseline)
def surrogate_reaches_the_net(patch: Patch) -> None:
    """The baseline's net is trained by the score, too."""
    patch.setattr(objective, "_site_surrogate", surrogate_without_detach)


@kills(unbiased(of(programs.scaled), REINFORCE()))
def scale_ignored(patch: Patch) -> None:
    """Terms count once whatever their scale."""
    patch.setattr(
        execute, "scale_and_mask", lambda x, scale=1.0, mask=None: scale_and_mask(x, mask=mask)
    )


@kills(unbiased(of(programs.nested_plates, "poutine"), REINFORCE()))
def mask_of_poutine_ignored(patch: Patch) -> None:
    """Masked terms count."""
    patch.setattr(
        execute, "scale_and_mask", lambda x, scale=1.0, mask=None: scale_and_mask(x, scale)
    )


@kills(unbiased(of(programs.nested_plates, "law"), REINFORCE()))
def mask_of_law_ignored(patch: Patch) -> None:
    """Terms of a law with a mask count."""
    patch.setattr(_laws, "scale_and_mask", lambda x, mask=None: x)


def scored_by(patch: Patch, score_of: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    """Makes the score of a guide's site from the site, its score and its scaled, masked term."""
    right = execute._scored

    def scored(site: Any, *args: Any) -> tuple[Tensor, Tensor]:
        score, value = right(site, *args)
        return score_of(site, score, value), value

    patch.setattr(execute, "_scored", scored)


@kills(unbiased(of(programs.scaled), REINFORCE()))
def score_scaled(patch: Patch) -> None:
    """The score is multiplied by the site's scale, as the cost is."""
    scored_by(patch, lambda site, score, value: scale_and_mask(score, site.scale))


@kills(unbiased(of(programs.masked_site, "poutine"), REINFORCE()))
def score_masked(patch: Patch) -> None:
    """A masked site has no score, though it is drawn."""
    scored_by(patch, lambda site, score, value: scale_and_mask(score, mask=site.mask))


@kills(unbiased(of(programs.masked_site, "law"), REINFORCE()))
def score_masked_by_the_law(patch: Patch) -> None:
    """The same for a mask of the law."""
    scored_by(patch, lambda site, score, value: value)


@kills(unbiased(of(programs.chain), REINFORCE()))
def guide_term_of_the_wrong_sign(patch: Patch) -> None:
    """The guide's log-probability is taken for a gain."""

    def negated(guide: Any, terms: Any, *rest: Any, **options: Any) -> Any:
        terms = [replace(t, value=-t.value) if t.in_guide else t for t in terms]
        return right(guide, terms, *rest, **options)

    right = objective.site_costs
    patch.setattr(objective, "site_costs", negated)


# --- which terms, which plates ----------------------------------------------------------------


def costs_by(patch: Patch, keep: Any) -> None:
    """Each site sums the terms in its reach at once, and keeps frames by a rule of one's own."""

    def site_costs(guide: Sequence[Any], terms: Any, **options: Any) -> dict[str, costs.Cost]:
        found = {}
        for place, site in enumerate(guide):
            if not site.latent or site.ask.pathwise:
                continue
            pool: dict[Any, Tensor] = {}
            for term in terms:
                if term.reach >= place:
                    value = term.value.detach()
                    costs._add(pool, term.site.frames, value if term.in_guide else -value)
            total = sum(keep(pool, site.frames).values(), torch.zeros(()))
            found[site.name] = costs.Cost(total, {}, None, None, 1)
        return found

    patch.setattr(objective, "site_costs", site_costs)


@kills(unbiased(of(programs.local_global_local), REINFORCE()))
def frame_kept_across_a_global(patch: Patch) -> None:
    """Plate elements pay for themselves alone, though they have met: Pyro's ``sum_to``."""
    costs_by(patch, costs._keep)


@kills(unbiased(of(programs.late_global), REINFORCE()))
def frame_kept_across_a_late_global(patch: Patch) -> None:
    """The same where the term itself has met no site outside the plate."""
    costs_by(patch, costs._keep)


@kills(unbiased(of(programs.late_global), REINFORCE()))
def reach_of_the_sites_that_the_law_names(patch: Patch) -> None:
    """The observation counts for the first site alone, though it has met one drawn later."""
    right = execute.reaches

    def reaches(guide: Sequence[Any], model: Sequence[Any]) -> dict[str, int]:
        found = right(guide, model)
        return {**found, "x": min(found["x"], 0)}

    patch.setattr(execute, "reaches", reaches)


# adds terms of mean zero, so the variance has to say it
@kills(test_variance.test_plates_pay_for_themselves_alone)
def no_frame_kept(patch: Patch) -> None:
    """Every element pays for all."""
    costs_by(patch, lambda pool, frames: costs._keep(pool, frozenset()))


@kills(unbiased(of(programs.reversed_layers), REINFORCE()))
def reach_of_the_last_site_met(patch: Patch) -> None:
    """A term is dropped when the site met last precedes, although a later one was met before."""

    def reaches(guide: Sequence[Any], model: Sequence[Any]) -> dict[str, int]:
        place, reach, found = {site.name: i for i, site in enumerate(guide)}, -1, {}
        for site in model:
            reach = place[site.name] if site.latent else reach
            found[site.name] = reach
        return found

    patch.setattr(execute, "reaches", reaches)


@kills(unbiased(of(programs.early_terms), REINFORCE()))
def reach_stops_at_the_next_site(patch: Patch) -> None:
    """A site pays for its own terms, not for what later sites make of its value."""

    def site_costs(guide: Sequence[Any], terms: Any, *rest: Any, **options: Any) -> Any:
        last = len(guide) - 1
        near = [t for t in terms if t.reach < last or t.in_guide]
        return right(guide, near, *rest, **options)

    right = objective.site_costs
    patch.setattr(objective, "site_costs", site_costs)


# a term that a site cannot influence has mean zero under its score
@kills(test_variance.test_stored_variance_of_one_world)
def earlier_terms_counted(patch: Patch) -> None:
    """Every site pays for every term."""
    right = execute._guide_term
    patch.setattr(execute, "_guide_term", lambda site, place, *rest: right(site, 1, *rest))


# --- sums and means ---------------------------------------------------------------------------


@kills(unbiased(of(programs.local_plate), REINFORCE()))
def mean_over_plate_elements(patch: Patch) -> None:
    """The surrogate of a plate's elements is averaged, not summed."""
    right = objective._site_surrogate

    def averaged(site: Any, found: Estimate, rows: Any) -> Tensor:
        elements = rows.scores.shape[2:].numel()
        return right(site, found, rows) / elements

    patch.setattr(objective, "_site_surrogate", averaged)


@kills(unbiased(of(programs.one_site), REINFORCE(), num_particles=2))
def sum_over_particles(patch: Patch) -> None:
    """Particles are added up."""
    right = elbo.take_step

    def take_step(*args: Any) -> Any:
        step = right(*args)
        return replace(step, surrogate=step.surrogate * len(step.loss))

    patch.setattr(elbo, "take_step", take_step)


@kills(unbiased(of(programs.one_site), RLOO(2)))
def own_cost_in_the_mean(patch: Patch) -> None:
    """RLOO's mean includes the world itself, and the factor K/(K - 1) is forgotten."""

    def estimate(self: Any, draw: Any, values: Tensor, state: Any, context: Any) -> Estimate:
        return Estimate(weight=values[:1] - values[:1].mean(1, keepdim=True))

    patch.setattr(RLOO, "estimate", estimate)


# --- baselines --------------------------------------------------------------------------------


def baseline_reads(patch: Patch, change: Callable[[Any, Tensor, Reading], Reading]) -> None:
    """Changes what a moving average says, from the average's state and the costs."""
    right = MovingAverage.read

    def read(self: MovingAverage, state: Any, values: Tensor, context: Any) -> Reading:
        return change(state, values, right(self, state, values, context))

    patch.setattr(MovingAverage, "read", read)


AVERAGED = unbiased(of(programs.reversed_layers), REINFORCE(MovingAverage()))


@kills(AVERAGED)
def baseline_leaks(patch: Patch) -> None:
    """The baseline has seen the cost of its own site's value."""
    baseline_reads(patch, lambda state, f, reading: replace(reading, value=reading.value + 0.1 * f))


@kills(AVERAGED)
def baseline_updated_before_it_is_read(patch: Patch) -> None:
    """The average already holds this step's cost."""

    def change(state: Any, values: Tensor, reading: Reading) -> Reading:
        reading.update(values)
        return replace(reading, value=state())

    baseline_reads(patch, change)


# any number is as good as another to the mean
@kills(test_identities.test_moving_average)
def start_of_the_average_not_corrected(patch: Patch) -> None:
    """The average starts at 0, and is drawn to it for long."""
    baseline_reads(patch, lambda state, f, reading: replace(reading, value=state.mean))


@kills(AVERAGED)
def state_that_trains_the_guide(patch: Patch) -> None:
    """What is learnt moves the guide's parameters, which a certificate holds fixed."""
    right = baselines.RunningMean.update

    def update(self: Any, observation: Tensor) -> None:
        right(self, observation)
        pyro.param("a").data += 0.01

    patch.setattr(baselines.RunningMean, "update", update)


# --- branches ---------------------------------------------------------------------------------


@kills(unbiased(of(programs.chain), DisARM()))
def downstream_value_replayed(patch: Patch) -> None:
    """A later site has the base run's value in every branch, though its law is another there."""
    right = worlds.GuideWorlds._values

    def values(self: Any, law: Any, given: Tensor | None, ask: Any) -> Tensor:
        value = right(self, law, given, ask)
        has_rows = value.dim() - law.event_dim == self.plan.nesting + 2
        return value[:1].expand_as(value) if has_rows else value

    patch.setattr(worlds.GuideWorlds, "_values", values)


# fresh noise for each row has the same mean, and more variance
@kills(test_variance.test_stored_variance_of_shared_noise)
def noise_drawn_for_each_row(patch: Patch) -> None:
    """Branches do not share the noise of later sites."""
    right = worlds.GuideWorlds._worldly
    patch.setattr(
        worlds.GuideWorlds,
        "_worldly",
        lambda self, shape, law, rows=False: right(self, shape, law, rows=True),
    )


# the same, where branches run one by one
@kills(lambda: test_worlds_agree.test_sequential_worlds_give_the_same(programs.chain, "disarm"))
def noise_drawn_for_each_run(patch: Patch) -> None:
    """A branch that runs alone draws its own noise."""
    right = worlds.GuideWorlds._noise

    def fresh(self: Any, name: str, law: Any, role: str) -> Tensor | None:
        given = right(self, name, law, role)
        return given if given is None or self.branch is None else 0.5 - given

    patch.setattr(worlds.GuideWorlds, "_noise", fresh)


@kills(unbiased(of(programs.one_site), DisARM()))
def row_weights_not_normalised(patch: Patch) -> None:
    """Each row enters the model's gradient whole."""
    right = pathwise._row_weights
    patch.setattr(pathwise, "_row_weights", lambda c, *args: right(c, *args) * c.plan.num_rows)


@kills(lambda: test_structures.test_branches_that_run_one_by_one("control-disarm-both"))
def row_weights_by_what_was_met(patch: Patch) -> None:
    """The rows of a run share its weight by the sites that this run has met."""
    right = pathwise._shares
    patch.setattr(
        pathwise, "_shares", lambda chunk: right(replace(chunk, planned=chunk.run.branches))
    )


def weighted_by(patch: Patch, factors: list[float]) -> None:
    """Multiplies the weights of two rows in the model's gradient."""
    right = pathwise._row_weights

    def weights(*args: Any) -> Tensor:
        found = right(*args)
        return found * torch.tensor(factors).reshape(-1, *[1] * (found.dim() - 1))

    patch.setattr(pathwise, "_row_weights", weights)


# both rows have the same law, so one alone is unbiased: the identity sees it ...
@kills(test_identities.test_disarm)
def model_gradient_of_the_partner_alone(patch: Patch) -> None:
    """The model learns from DisARM's second row only."""
    weighted_by(patch, [0.0, 2.0])


# ... and so does the variance
@kills(test_variance.test_the_models_gradient_is_averaged_over_the_pair)
def model_gradient_of_the_base_row_alone(patch: Patch) -> None:
    """The model learns from the base run only."""
    weighted_by(patch, [2.0, 0.0])


# --- DisARM -----------------------------------------------------------------------------------


def disarm_times(patch: Patch, factor: Callable[[Tensor], Tensor]) -> None:
    """Multiplies the estimate by a function of the logits."""
    right = DisARM.estimate

    def estimate(self: DisARM, draw: Any, *rest: Any) -> Estimate:
        found = right(self, draw, *rest)
        (gradient,), (leaf,) = found.gradients, draw.parameters
        return replace(found, gradients=(gradient * factor(leaf),))

    patch.setattr(DisARM, "estimate", estimate)


@kills(unbiased(of(programs.one_site), DisARM()))
def disarm_without_its_probability(patch: Patch) -> None:
    """The factor sigmoid(|logit|) is forgotten."""
    disarm_times(patch, lambda logits: 1 / logits.abs().sigmoid())


@kills(unbiased(of(programs.one_site), DisARM()))
def disarm_with_the_sign_swapped(patch: Patch) -> None:
    """The costs of the pair are taken for one another."""
    disarm_times(patch, lambda logits: -torch.ones_like(logits))


@kills(unbiased(of(programs.one_site), DisARM()))
def disarm_with_the_logit_unsigned(patch: Patch) -> None:
    """The factor is sigmoid(logit), right for one sign only."""
    disarm_times(patch, lambda logits: logits.sigmoid() / logits.abs().sigmoid())


@kills(unbiased(of(programs.one_site), DisARM()))
def disarm_with_a_fresh_partner(patch: Patch) -> None:
    """The partner has noise of its own in place of the negative."""
    right = DisARM.draw

    def draw(self: DisARM, law: Any, value: Tensor, given: Tensor, *rest: Any) -> Any:
        request = Request("partner", "logistic", tuple(given.shape), given.dtype, "cpu", law=law)
        pair = torch.stack([value, transport(law, noise.draw(request))])
        return replace(right(self, law, value, given, *rest), values=pair)

    patch.setattr(DisARM, "draw", draw)


@kills(unbiased(of(programs.one_site), DisARM()))
def disarm_with_the_opposite_value(patch: Patch) -> None:
    """The partner is the other value, in place of the value of the opposite noise."""
    right = DisARM.draw

    def draw(self: DisARM, law: Any, value: Tensor, *rest: Any) -> Any:
        return replace(right(self, law, value, *rest), values=torch.stack([value, 1 - value]))

    patch.setattr(DisARM, "draw", draw)


# --- Enumerate --------------------------------------------------------------------------------


def enumerate_weights(patch: Patch, change: Callable[[Tensor], Tensor]) -> None:
    """Changes the weights of the rows that are enumerated."""
    right = Enumerate.draw

    def draw(self: Enumerate, *args: Any) -> Any:
        found = right(self, *args)
        return replace(found, hard_weights=change(found.hard_weights))

    patch.setattr(Enumerate, "draw", draw)


@kills(unbiased(of(programs.one_site), Enumerate()))
def enumerate_with_weights_of_another_row(patch: Patch) -> None:
    """Each value has the probability of the next one."""
    enumerate_weights(patch, lambda weights: weights.roll(1, 0))


@kills(unbiased(of(programs.one_site), Enumerate()))
def enumerate_with_even_weights(patch: Patch) -> None:
    """All values count alike."""
    enumerate_weights(patch, lambda weights: torch.ones_like(weights) / len(weights))


@kills(unbiased(of(programs.reversed_layers), Enumerate()))
def enumerate_with_the_base_row(patch: Patch) -> None:
    """The value that was drawn is counted besides all values."""
    right = Enumerate.estimate

    def estimate(self: Enumerate, draw: Any, values: Tensor, *rest: Any) -> Estimate:
        found = right(self, draw, values, *rest)
        assert found.weight is not None
        return replace(found, weight=torch.cat([values[:1], found.weight[1:]]))

    patch.setattr(Enumerate, "estimate", estimate)


@kills(unbiased(lambda: programs.one_site(programs.CATEGORICAL), Enumerate()))
def enumerate_misses_a_value(patch: Patch) -> None:
    """The first category is enumerated twice, and the last one not at all."""
    right = exact_room._support

    def support(law: Any) -> Tensor:
        found = right(law)
        return torch.cat([found[:1], found[:-1]])

    patch.setattr(exact_room, "_support", support)


def shared_costs() -> None:
    """Either the sum over values is refused, or it is unbiased."""
    pair = programs.local_global_local(BERNOULLI)
    try:
        chosen = {"z": Enumerate(), "g": REINFORCE(), "w": REINFORCE()}
        unbiased(lambda: pair, chosen)()
    except objective.NonDiffError:
        return


@kills(shared_costs)
def enumerate_across_a_plate(patch: Patch) -> None:
    """Elements that share a cost are enumerated as if they did not."""
    patch.setattr(objective, "_check_shared", lambda site, cost, step: None)


# --- pathwise sites ---------------------------------------------------------------------------


def pathwise_terms(patch: Patch, change: Callable[[Tensor], Tensor]) -> None:
    """Changes the guide's terms of pathwise sites, where they are differentiated."""
    right = pathwise.pathwise

    def changed(chunk: Any) -> Any:
        terms = [
            replace(t, value=change(t.value))
            if t.in_guide and t.site.latent and t.site.ask.pathwise
            else t
            for t in chunk.terms
        ]
        return right(replace(chunk, terms=terms))

    patch.setattr(objective, "pathwise", changed)


@kills(unbiased(of(programs.continuous_after), REINFORCE()))
def entropy_of_a_pathwise_site_dropped(patch: Patch) -> None:
    """The guide's term is held constant, as if the value alone had a gradient."""
    pathwise_terms(patch, lambda value: value.detach())


@kills(unbiased(of(programs.continuous_before), REINFORCE()))
def entropy_of_a_pathwise_site_negated(patch: Patch) -> None:
    """The guide's term of a pathwise site has the wrong sign."""
    pathwise_terms(patch, lambda value: -value)


@kills(test_structures.test_normal_site_with_a_score_estimator)
def score_and_path_at_once(patch: Patch) -> None:
    """A value with a score keeps its own gradient."""
    right = worlds.GuideWorlds._values
    patch.setattr(
        worlds.GuideWorlds,
        "_values",
        lambda self, law, given, ask: right(self, law, given, replace(ask, pathwise=True)),
    )


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_bug_is_rejected(bug: Bug, monkeypatch: Patch) -> None:
    bug.check()
    pyro.clear_param_store()
    bug.plant(monkeypatch)
    with pytest.raises(AssertionError) as rejected:
        bug.check()
    if isinstance(rejected.value, BiasError):
        assert rejected.value.size > VISIBLE


def test_there_are_many_bugs() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 15
