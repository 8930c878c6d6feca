"""Faults planted in the laws, each of which a check of the contract or of the biases must see.

A check passes before its fault is planted, and fails after.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_nondiff.distributions import (
    HardConcrete,
    RelaxedBernoulli,
    RelaxedOneHotCategorical,
    StraightThroughBernoulli,
    StraightThroughOneHotCategorical,
    _surrogates,
    conditional,
    relax,
)
from pyro_nondiff.distributions._surrogates import SURROGATES, Drawn

from . import test_contract as laws
from .biases import CASES, Case, exact_gradients, expected_gradients
from .test_biases import EXACT

Patch = pytest.MonkeyPatch
Check = Callable[[], None]

# The package's function hides the module of the same name.
RELAXED = sys.modules[RelaxedBernoulli.__module__]


@dataclass(frozen=True)
class Bug:
    """A fault, and the checks that must see it.

    Arguments:
        plant: Puts it in.
        checks: Each of which fails then.
    """

    name: str
    plant: Callable[[Patch], None]
    checks: tuple[Check, ...]


def largest(gaps: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    return max(float((gaps[name] - others[name]).abs().max()) for name in gaps)


def has_no_bias(case: Case, gradient: str, degree: int) -> Check:
    """The claim that a gradient is exact for a cost."""

    def cost(y: Tensor) -> Tensor:
        return y**degree

    def check() -> None:
        mean = expected_gradients(case, gradient, 1.0, cost)
        assert largest(mean, exact_gradients(case, cost)) <= EXACT

    return check


def averages_gumbel(case: Case) -> Check:
    """The claim that ``gumbel_rao`` has the mean of ``gumbel``."""

    def check() -> None:
        means = [
            expected_gradients(case, name, 0.5, torch.square) for name in ("gumbel_rao", "gumbel")
        ]
        assert largest(*means) <= EXACT

    return check


def contract(kind: type[Any], test: str, *arguments: Any) -> Check:
    """One test of the contract of one law."""

    def check() -> None:
        getattr(kind(), f"test_{test}")(*arguments)

    return check


def wrong_order(patch: Patch) -> None:
    def rounded(hard: Tensor, soft: Tensor) -> Tensor:
        # without its brackets: 1 + s is rounded before s is taken off
        return hard.detach() + soft.to(hard.dtype) - soft.detach().to(hard.dtype)

    patch.setattr("pyro_nondiff.distributions.straight_through.straight_through", rounded)
    patch.setattr(RELAXED, "straight_through", rounded)


def no_gradient(patch: Patch) -> None:
    def constant(hard: Tensor, soft: Tensor) -> Tensor:
        return hard.detach() + 0 * soft.to(hard.dtype)

    patch.setattr("pyro_nondiff.distributions.straight_through.straight_through", constant)


def density_for_mass(patch: Patch) -> None:
    def log_prob(self: Any, value: Tensor) -> Tensor:
        kind = RelaxedOneHotCategorical if self.event_dim else RelaxedBernoulli
        found: Tensor = kind(self.temperature, logits=self.logits).log_prob(value)
        return found

    for kind in (StraightThroughBernoulli, StraightThroughOneHotCategorical):
        patch.setattr(kind, "log_prob", log_prob)


def looked_up(patch: Patch) -> None:
    def log_prob(self: Any, value: Tensor) -> Tensor:
        found: Tensor = laws.plain_law(self).log_prob(value.detach()) + 0 * value.sum(-1)
        return found

    patch.setattr(StraightThroughOneHotCategorical, "log_prob", log_prob)


def dropped_temperature(patch: Patch) -> None:
    def configured_as(self: Any, other: Any) -> Any:
        self.temperature, self.gradient = 1.0, other.gradient
        self.num_conditional = other.num_conditional
        return self

    for kind in (StraightThroughBernoulli, StraightThroughOneHotCategorical):
        patch.setattr(kind, "_configured_as", configured_as)


def swapped_conditional(patch: Patch) -> None:
    def swapped(law: Any, leaf: Tensor, value: Tensor, noise: Tensor) -> Tensor:
        return conditional(law, leaf, value.roll(1, -1) if law.event_dim else 1 - value, noise)

    patch.setattr(_surrogates, "conditional", swapped)


def differentiated_conditional(patch: Patch) -> None:
    def gumbel_rao(drawn: Drawn) -> Tensor:
        leaf, hard = torch.broadcast_tensors(drawn.logits, drawn.hard)
        perturbed = conditional(drawn.law, leaf, hard, _surrogates.draw(request_of(drawn)))
        return relax(drawn.law, perturbed, drawn.temperature).mean(0)

    patch.setitem(SURROGATES, "gumbel_rao", gumbel_rao)


def request_of(drawn: Drawn) -> Any:
    kind = "gumbel" if drawn.law.event_dim else "logistic"
    shape = (drawn.num_conditional, *drawn.hard.shape)
    return _surrogates.Request("", kind, shape, drawn.hard.dtype, "cpu", "v", drawn.law)


def reinmax_factor(patch: Patch) -> None:
    right = SURROGATES["reinmax"]

    def reinmax(drawn: Drawn) -> Tensor:
        return right(drawn) - 0.01 * relax(drawn.law, drawn.logits, 1.0)

    patch.setitem(SURROGATES, "reinmax", reinmax)


def reinmax_of_the_value(patch: Patch) -> None:
    """The middle at the probabilities, in place of half way to the value."""

    def reinmax(drawn: Drawn) -> Tensor:
        return 1.5 * relax(drawn.law, drawn.logits, drawn.temperature)

    patch.setitem(SURROGATES, "reinmax", reinmax)


def warm_identity(patch: Patch) -> None:
    patch.setitem(SURROGATES, "identity", lambda drawn: relax(drawn.law, drawn.logits, 1.02))


def shifted_samples(patch: Patch) -> None:
    for kind in (StraightThroughBernoulli, StraightThroughOneHotCategorical):
        right = kind._hard

        def hard(self: Any, noise: Tensor, right: Any = right) -> Tensor:
            # a logit wrong by 0.08: a probability of 1/2 wrong by 0.02
            away = torch.zeros_like(noise)
            away[..., 0 if self.event_dim else slice(None)] = 0.08
            found: Tensor = right(self, noise + away)
            return found

        patch.setattr(kind, "_hard", hard)


def density_without_scale(patch: Patch) -> None:
    patch.setattr(RELAXED, "log_of", lambda temperature: 0.0)
    patch.setattr("pyro_nondiff.distributions.hard_concrete.log_of", lambda temperature: 0.0)


def multiplied_by_the_temperature(patch: Patch) -> None:
    def hot(law: Any, perturbed: Tensor, temperature: Any) -> Tensor:
        return relax(law, perturbed, 1 / temperature)

    patch.setattr(RELAXED, "relax", hot)


def zero_for_nonzero(patch: Patch) -> None:
    patch.setattr(HardConcrete, "prob_zero", property(lambda self: self._above(0.0).sigmoid()))


def swapped_stretch(patch: Patch) -> None:
    right = HardConcrete._position
    patch.setattr(HardConcrete, "_position", lambda self, threshold: -right(self, threshold))


def clamped_density(patch: Patch) -> None:
    """Pyro's clamp of the values, as wide as a rounding error."""

    def log(x: Tensor) -> Tensor:
        return x.clamp(min=0.01).log()

    patch.setattr(RELAXED, "_log", log)


COIN, CHOICE, CHAIN = CASES[0], CASES[1], CASES[2]
BERNOULLI, ONE_HOT = laws.TestBernoulliGumbel, laws.TestOneHotGumbel
BATCH = (3,)

BUGS = [
    Bug(
        "a straight-through in the wrong order",
        wrong_order,
        (
            contract(BERNOULLI, "density_is_finite_on_own_samples", torch.float32),
            contract(ONE_HOT, "density_is_finite_on_own_samples", torch.bfloat16),
            contract(
                laws.TestRelaxedOneHotCategoricalStraightThrough,
                "density_is_finite_on_own_samples",
                torch.float16,
            ),
        ),
    ),
    Bug(
        "a value without gradient",
        no_gradient,
        (
            contract(BERNOULLI, "a_gradient_reaches_every_parameter"),
            has_no_bias(CHOICE, "identity", 1),
        ),
    ),
    Bug(
        "the relaxed density for the discrete mass",
        density_for_mass,
        (
            contract(BERNOULLI, "mass_is_exact_and_sums_to_one"),
            contract(ONE_HOT, "divergence_from_itself_is_zero"),
        ),
    ),
    Bug(
        "a mass that is looked up",
        looked_up,
        (contract(ONE_HOT, "value_is_hard_and_its_score_has_a_gradient"),),
    ),
    Bug(
        "expand drops the temperature",
        dropped_temperature,
        (contract(BERNOULLI, "expand", BATCH), contract(ONE_HOT, "expand", BATCH)),
    ),
    Bug(
        "the conditional of the other value",
        swapped_conditional,
        (averages_gumbel(COIN), averages_gumbel(CHOICE)),
    ),
    Bug(
        "conditional noise that is differentiated",
        differentiated_conditional,
        (averages_gumbel(COIN), averages_gumbel(CHOICE)),
    ),
    Bug(
        "reinmax with a factor that is off by 2 %",
        reinmax_factor,
        (has_no_bias(COIN, "reinmax", 1), has_no_bias(CHOICE, "reinmax", 2)),
    ),
    Bug(
        "reinmax around the probabilities",
        reinmax_of_the_value,
        (has_no_bias(COIN, "reinmax", 2), has_no_bias(CHAIN, "reinmax", 2)),
    ),
    Bug(
        "an identity at another temperature",
        warm_identity,
        (has_no_bias(COIN, "identity", 1), has_no_bias(CHOICE, "identity", 1)),
    ),
    Bug(
        "samples of other logits",
        shifted_samples,
        (
            contract(BERNOULLI, "samples_follow_the_law"),
            contract(ONE_HOT, "samples_follow_the_law"),
        ),
    ),
    Bug(
        "a density without the temperature's power",
        density_without_scale,
        (
            contract(laws.TestRelaxedBernoulli, "density_integrates_to_one"),
            contract(laws.TestHardConcrete, "density_integrates_to_one"),
            contract(laws.TestRelaxedOneHotCategorical, "the_density_is_pyro_s"),
        ),
    ),
    Bug(
        "a relaxed value times its temperature",
        multiplied_by_the_temperature,
        (
            contract(laws.TestRelaxedBernoulli, "samples_follow_the_law"),
            contract(laws.TestRelaxedBernoulli, "pathwise_gradient_is_that_of_the_density"),
            contract(laws.TestRelaxedOneHotCategorical, "samples_follow_the_law"),
        ),
    ),
    Bug(
        "a closed gate's probability with the wrong sign",
        zero_for_nonzero,
        (contract(laws.TestHardConcrete, "closed_form_probabilities"),),
    ),
    Bug(
        "the ends of a stretch exchanged",
        swapped_stretch,
        (
            contract(laws.TestHardConcrete, "closed_form_probabilities"),
            contract(laws.TestHardConcrete, "density_integrates_to_one"),
            contract(laws.TestHardConcrete, "pathwise_gradient_is_that_of_the_density"),
        ),
    ),
    Bug(
        "a density of clamped values",
        clamped_density,
        (
            contract(laws.TestRelaxedBernoulli, "density_integrates_to_one"),
            contract(laws.TestRelaxedBernoulli, "pathwise_gradient_is_that_of_the_density"),
        ),
    ),
]


@pytest.mark.parametrize(
    ("bug", "check"),
    [pytest.param(b, c, id=f"{b.name}-{i}") for b in BUGS for i, c in enumerate(b.checks)],
)
def test_a_planted_bug_is_seen(bug: Bug, check: Check, monkeypatch: Patch) -> None:
    check()
    bug.plant(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        check()
