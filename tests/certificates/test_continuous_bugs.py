"""Bugs planted into LAX, measure-valued and corrected pathwise gradients: each must be rejected."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor

from pyro_nondiff.distributions import Gamma, ScaleGamma, _marsaglia, gamma
from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.estimators import (
    LAX,
    REINFORCE,
    CorrectedPathwise,
    Estimate,
    MeasureValued,
    lax,
    measure_valued,
)
from pyro_nondiff.infer import planner, worlds

from . import programs, test_continuous, test_corrected_pathwise
from .checks import TOLERANCE
from .continuous_programs import (
    EXPONENTIAL,
    NORMAL,
    PAIR,
    SCALE_GAMMA,
    Polynomial,
    certified,
)
from .programs import BERNOULLI, Pair
from .test_corrected_pathwise import CASES, SCALAR
from .test_planted_bugs import VISIBLE, BiasError, Bug, Patch

pytestmark = pytest.mark.filterwarnings(
    # what it says is true of some structures, and costs variance only
    "ignore:site '.*' lies in a plate that the later guide site"
)

BUGS: list[Bug] = []


@pytest.fixture(autouse=True)
def no_world_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check replays every world alone."""
    monkeypatch.setattr(planner, "check_worlds", lambda pair, chunk: None)


def kills(check: Callable[[], None]) -> Callable[[Callable[[Patch], None]], None]:
    """Registers a bug under the check that is to kill it."""

    def register(plant: Callable[[Patch], None]) -> None:
        BUGS.append(Bug(plant.__name__, plant, check))

    return register


def unbiased(pair: Callable[[], Pair], estimator: Any) -> Callable[[], None]:
    """A check of the exact expectation."""

    def check() -> None:
        size = certified(pair(), estimator() if callable(estimator) else estimator, 4).bias
        if size > TOLERANCE:
            raise BiasError(size)

    return check


def both() -> Pair:
    """Location, scale, and a cost of degree 3."""
    return test_continuous.location_and_scale(test_continuous.dist.Normal)


LAXED = unbiased(both, lambda: LAX(Polynomial()))
MEASURED = unbiased(both, MeasureValued())


# --- LAX --------------------------------------------------------------------------------------


def control_by(patch: Patch, change: Callable[[Any, Tensor, Any], tuple[Any, Tensor, Any]]) -> None:
    """Changes draw, cost and control variate before they are put together."""
    right = lax.controlled
    patch.setattr(
        lax,
        "controlled",
        lambda draw, cost, control, state: right(*change(draw, cost, control), state),
    )


@kills(LAXED)
def slope_forgotten(patch: Patch) -> None:
    """What the control variate takes is not put back."""

    def change(draw: Any, cost: Tensor, control: Any) -> Any:
        slopes = tuple(torch.zeros_like(s) for s in control.slopes)
        return draw, cost, replace(control, slopes=slopes)

    control_by(patch, change)


@kills(LAXED)
def slope_off_by_two_percent(patch: Patch) -> None:
    """It is put back nearly."""

    def change(draw: Any, cost: Tensor, control: Any) -> Any:
        return draw, cost, replace(control, slopes=tuple(1.02 * s for s in control.slopes))

    control_by(patch, change)


@kills(LAXED)
def twin_added(patch: Patch) -> None:
    """The control variate has the wrong sign."""

    def change(draw: Any, cost: Tensor, control: Any) -> Any:
        return draw, cost, replace(control, twin=-control.twin)

    control_by(patch, change)


@kills(LAXED)
def control_variate_sees_the_cost(patch: Patch) -> None:
    """The baseline holds a tenth of the cost that it is taken from."""

    def change(draw: Any, cost: Tensor, control: Any) -> Any:
        return draw, cost, replace(control, twin=control.twin + 0.1 * cost.detach())

    control_by(patch, change)


@kills(LAXED)
def score_of_the_other_parameter(patch: Patch) -> None:
    """Scores and parameters come in different orders."""

    def change(draw: Any, cost: Tensor, control: Any) -> Any:
        return replace(draw, scores=draw.scores[::-1]), cost, control

    control_by(patch, change)


@kills(LAXED)
def score_through_the_value(patch: Patch) -> None:
    """The score at the leaves runs through the value that they make."""
    drawn: list[Tensor] = []
    score, move = lax.log_prob, lax.transport

    def transport(law: Any, given: Tensor) -> Tensor:
        drawn.append(given)
        return move(law, given)

    patch.setattr(lax, "transport", transport)
    patch.setattr(lax, "log_prob", lambda law, value: score(law, move(law, drawn[-1])))


@kills(unbiased(lambda: programs.masked_site(NORMAL), lambda: LAX(Polynomial())))
def lax_score_masked(patch: Patch) -> None:
    """A masked site has no score, though it is drawn."""

    def change(draw: Any, cost: Tensor, control: Any) -> Any:
        kept = torch.tensor([1.0, 0.0])
        return replace(draw, scores=tuple(kept * s for s in draw.scores)), cost, control

    control_by(patch, change)


# --- measure-valued gradients -----------------------------------------------------------------


def rule_by(patch: Patch, kind: type, change: Callable[..., Any]) -> None:
    """Changes the difference of a law, from its law, value, Rayleigh number and difference."""
    rule = measure_valued._RULES[kind]

    def difference(law: Any, value: Tensor, rayleigh: Tensor) -> Any:
        return change(law, value, rayleigh, rule.difference(law, value, rayleigh))

    patch.setitem(measure_valued._RULES, kind, rule._replace(difference=difference))


NORMAL_LAW = torch.distributions.Normal


def weighted(factors: dict[str, float]) -> Callable[..., Any]:
    """Multiplies the constants of some parameters."""

    def change(law: Any, value: Tensor, rayleigh: Tensor, found: Any) -> Any:
        return found._replace(
            weights={n: [factors.get(n, 1.0) * w for w in ws] for n, ws in found.weights.items()}
        )

    return change


@kills(MEASURED)
def constant_of_the_location_off_by_two_percent(patch: Patch) -> None:
    rule_by(patch, NORMAL_LAW, weighted({"loc": 1.02}))


@kills(MEASURED)
def constant_of_the_scale_off_by_two_percent(patch: Patch) -> None:
    rule_by(patch, NORMAL_LAW, weighted({"scale": 0.98}))


@kills(MEASURED)
def signs_of_the_location_swapped(patch: Patch) -> None:
    rule_by(patch, NORMAL_LAW, weighted({"loc": -1.0}))


@kills(MEASURED)
def rayleigh_for_maxwell(patch: Patch) -> None:
    """The scale's moved value has two degrees of freedom, not three."""

    def change(law: Any, value: Tensor, rayleigh: Tensor, found: Any) -> Any:
        sign = torch.where(value < law.loc, -1.0, 1.0)
        return found._replace(moved=[*found.moved[:2], law.loc + law.scale * sign * rayleigh])

    rule_by(patch, NORMAL_LAW, change)


@kills(MEASURED)
def maxwell_on_one_side(patch: Patch) -> None:
    """The moved value is always above the location."""

    def change(law: Any, value: Tensor, rayleigh: Tensor, found: Any) -> Any:
        far = law.loc + (found.moved[2] - law.loc).abs()
        return found._replace(moved=[*found.moved[:2], far])

    rule_by(patch, NORMAL_LAW, change)


# a Maxwell number drawn apart has the same law: the variance has to say it
@kills(test_continuous.test_coupled_scale_has_less_variance)
def maxwell_not_coupled(patch: Patch) -> None:
    """The moved value has the other sign than the value it is compared with, and its radius."""

    def change(law: Any, value: Tensor, rayleigh: Tensor, found: Any) -> Any:
        normal = (value - law.loc) / law.scale
        apart = (rayleigh**2 * 1.5).sqrt() * torch.where(normal < 0, 1.0, -1.0)
        return found._replace(moved=[*found.moved[:2], law.loc + law.scale * apart])

    rule_by(patch, NORMAL_LAW, change)


@kills(unbiased(lambda: programs.one_site(EXPONENTIAL), MeasureValued()))
def addition_not_scaled(patch: Patch) -> None:
    """The exponential number that is added has rate 1."""

    def change(law: Any, value: Tensor, rayleigh: Tensor, found: Any) -> Any:
        return found._replace(moved=[value + rayleigh**2 / 2])

    rule_by(patch, torch.distributions.Exponential, change)


@kills(unbiased(lambda: programs.one_site(SCALE_GAMMA), MeasureValued()))
def concentration_forgotten(patch: Patch) -> None:
    """The constant is an Exponential law's."""
    rule_by(patch, ScaleGamma, weighted({"scale": 1 / 2.5}))


@kills(unbiased(lambda: programs.one_site(BERNOULLI), MeasureValued()))
def difference_without_its_sign(patch: Patch) -> None:
    """The value's cost is taken for that of 1."""

    def change(law: Any, value: Tensor, rayleigh: Tensor, found: Any) -> Any:
        weight = law.probs * (1 - law.probs)
        return found._replace(weights={"logits": [weight, -weight]})

    rule_by(patch, torch.distributions.Bernoulli, change)


@kills(lambda: test_continuous.test_poisson_by_direct_enumeration(2.0))
def count_moved_down(patch: Patch) -> None:
    """The difference is taken to the count below."""

    def change(law: Any, value: Tensor, rayleigh: Tensor, found: Any) -> Any:
        one = torch.ones_like(value)
        return found._replace(moved=[(value - 1).clamp(min=0)], weights={"rate": [one, -one]})

    rule_by(patch, torch.distributions.Poisson, change)


@kills(unbiased(lambda: programs.one_site(PAIR), MeasureValued()))
def all_numbers_moved_at_once(patch: Patch) -> None:
    """An event moves as a whole."""
    right = measure_valued._one_each
    patch.setattr(
        measure_valued, "_one_each", lambda law, value: torch.ones_like(right(law, value))
    )


@kills(unbiased(lambda: programs.one_site(EXPONENTIAL), MeasureValued()))
def moved_worlds_trained_on(patch: Patch) -> None:
    """The moved worlds enter the model's gradient, though their values have another law."""
    right = MeasureValued.ask
    patch.setattr(MeasureValued, "ask", lambda self, law: replace(right(self, law), hard_mass=1.0))


def shared_costs() -> None:
    """Either the plate's elements are refused, or their mean is exact."""
    pair = programs.local_global_local(BERNOULLI)
    try:
        unbiased(lambda: pair, {"z": MeasureValued(), "g": REINFORCE(), "w": REINFORCE()})()
    except NonDiffError:
        return


@kills(shared_costs)
def elements_moved_across_a_plate(patch: Patch) -> None:
    """Elements that share a cost are moved at once as if they did not."""
    right = MeasureValued.ask
    patch.setattr(
        MeasureValued, "ask", lambda self, law: replace(right(self, law), per_element=False)
    )


def several_particles() -> None:
    """Worlds one by one and two particles have the mean, and half the variance, of one."""
    test_continuous.test_particles(MeasureValued(), "sequential")


@kills(several_particles)
def weights_of_the_first_particle(patch: Patch) -> None:
    """Each particle's costs are multiplied with what belongs to the first."""
    right = MeasureValued.estimate

    def estimate(self: Any, draw: Any, *rest: Any) -> Estimate:
        first = tuple(c[:, :1].expand_as(c).flip(0) for c in draw.coefficients)
        return right(self, replace(draw, coefficients=first), *rest)

    patch.setattr(MeasureValued, "estimate", estimate)


# --- accepted proposals -----------------------------------------------------------------------

MASKED = next(case for case in CASES if case.name == "masked-by-law")
PARTICLES = next(case for case in CASES if case.name == "particles")


def corrected(case: Any = SCALAR, boost: int = 1) -> Callable[[], None]:
    """A check over the density of what is accepted."""
    return lambda: test_corrected_pathwise.test_exact_mean_given_the_boosts(case, boost)


def correction_by(patch: Patch, change: Callable[[Tensor], Tensor]) -> None:
    """Changes the score that the path leaves out."""
    right = worlds.score_correction

    def score_correction(law: Any, value: Tensor) -> Tensor | None:
        found = right(law, value)
        return None if found is None else change(found)

    patch.setattr(worlds, "score_correction", score_correction)


@kills(corrected())
def correction_dropped(patch: Patch) -> None:
    correction_by(patch, lambda score: score.detach())


@kills(corrected())
def correction_doubled(patch: Patch) -> None:
    correction_by(patch, lambda score: 2 * score)


@kills(corrected(MASKED))
def correction_masked(patch: Patch) -> None:
    """A masked element's proposal was accepted all the same. Its cost must say so."""
    correction_by(patch, lambda score: score * torch.tensor([1.0, 0.0]))


@kills(corrected(PARTICLES))
def own_cost_in_the_baseline(patch: Patch) -> None:
    """The mean that is taken off includes the particle itself."""

    def estimate(self: Any, draw: Any, costs: Tensor, *rest: Any) -> Estimate:
        return Estimate(weight=costs[:1] - costs[:1].mean(1, keepdim=True))

    patch.setattr(CorrectedPathwise, "estimate", estimate)


def accepted_by(patch: Patch, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """Changes what an accepted proposal is, from the concentration and the proposal."""
    patch.setattr(gamma, "accepted_value", change)


@kills(corrected())
def jacobian_forgotten(patch: Patch) -> None:
    """The density of the value is taken for that of the proposal."""
    right = _marsaglia.accepted_value

    def change(concentration: Tensor, accepted: Tensor) -> tuple[Tensor, Tensor]:
        log_value, _ = right(concentration, accepted)
        density = (concentration - 1) * log_value - log_value.exp() - torch.lgamma(concentration)
        return log_value, density

    accepted_by(patch, change)


@kills(corrected())
def density_of_the_proposal(patch: Patch) -> None:
    """The density that is differentiated does not depend on the concentration's map."""
    right = _marsaglia.accepted_value

    def change(concentration: Tensor, accepted: Tensor) -> tuple[Tensor, Tensor]:
        fixed, _ = right(concentration.detach(), accepted)
        density = (concentration - 1) * fixed - fixed.exp() - torch.lgamma(concentration)
        return right(concentration, accepted)[0], density

    accepted_by(patch, change)


@kills(corrected(boost=4))
def boost_off_by_one(patch: Patch) -> None:
    """The proposal is of a law with one boost more than there are uniform numbers."""
    right = _marsaglia.unboost
    patch.setattr(gamma, "unboost", lambda alpha, drawn: right(alpha, drawn[1:]))


@kills(corrected(boost=4))
def boosts_of_the_next_concentration(patch: Patch) -> None:
    """The exponents are 1 / (alpha + i + 1)."""
    right = _marsaglia.unboost
    patch.setattr(gamma, "unboost", lambda alpha, drawn: right(alpha + 1, drawn))


@kills(corrected(boost=4))
def boosts_not_differentiated(patch: Patch) -> None:
    """The uniform numbers' exponents are constants."""
    right = _marsaglia.unboost
    patch.setattr(gamma, "unboost", lambda alpha, drawn: right(alpha.detach(), drawn))


@kills(corrected())
def path_forgotten(patch: Patch) -> None:
    """The score alone."""
    right = Gamma.rsample

    def rsample(self: Any, *shape: Any) -> Tensor:
        value = right(self, *shape).detach()
        self._last = value, self._last[1]
        return value

    patch.setattr(Gamma, "rsample", rsample)


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
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 30
