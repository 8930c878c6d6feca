"""What discrete and relaxed laws refuse, by this library's error, and what they warn of."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_nondiff.distributions import (
    ExponentialAnnealing,
    HardConcrete,
    LinearAnnealing,
    RelaxedBernoulli,
    RelaxedOneHotCategorical,
    StraightThroughBernoulli,
    StraightThroughOneHotCategorical,
    describe,
    relaxed,
)
from pyro_nondiff.errors import NonDiffError, NonDiffWarning
from pyro_nondiff.estimators import StraightThrough

INF, NAN = float("inf"), float("nan")

BERNOULLIS: dict[str, Callable[..., Any]] = {
    "StraightThroughBernoulli": StraightThroughBernoulli,
    "RelaxedBernoulli": lambda **kw: RelaxedBernoulli(kw.pop("temperature", 1.0), **kw),
}
ONE_HOTS: dict[str, Callable[..., Any]] = {
    "StraightThroughOneHotCategorical": StraightThroughOneHotCategorical,
    "RelaxedOneHotCategorical": lambda **kw: RelaxedOneHotCategorical(
        kw.pop("temperature", 1.0), **kw
    ),
}
GATES: dict[str, Callable[..., Any]] = {"HardConcrete": HardConcrete}


@pytest.mark.parametrize("temperature", [0.0, -1.0, INF, NAN, "zero", "negative", "one of three"])
@pytest.mark.parametrize("name", BERNOULLIS | ONE_HOTS | GATES)
def test_a_temperature_is_positive(name: str, temperature: Any) -> None:
    numbers = {
        "zero": torch.tensor(0.0),
        "negative": torch.tensor(-0.5),
        "one of three": torch.tensor([1.0, 0.0, 2.0]),
    }
    given = numbers.get(temperature, temperature) if isinstance(temperature, str) else temperature
    law = (BERNOULLIS | ONE_HOTS | GATES)[name]
    with pytest.raises(NonDiffError, match=f"{name}: temperature must be positive and finite"):
        law(logits=torch.zeros(3, 3), temperature=given)


def test_a_temperature_that_is_not_looked_into() -> None:
    """A tensor waits for its device: without validation it is not read."""
    law = StraightThroughBernoulli(
        logits=torch.zeros(3), temperature=torch.tensor(0.0), validate_args=False
    )
    assert law.batch_shape == (3,)


@pytest.mark.parametrize("name", BERNOULLIS | ONE_HOTS | GATES)
@pytest.mark.parametrize("shape", [(2,), (1, 3), (4, 3)], ids=str)
def test_a_temperature_broadcasts_to_the_batch_shape(name: str, shape: tuple[int, ...]) -> None:
    """Otherwise a value would not have the law's shape."""
    logits = torch.zeros(3, 4) if name in ONE_HOTS else torch.zeros(3)
    law = (BERNOULLIS | ONE_HOTS | GATES)[name]
    with pytest.raises(NonDiffError, match=f"{name}: temperature has shape .* batch shape .3,."):
        law(logits=logits, temperature=torch.ones(shape))


@pytest.mark.parametrize("number", [INF, -INF, NAN])
@pytest.mark.parametrize("name", BERNOULLIS | GATES)
def test_a_bernoulli_s_logits_are_finite(name: str, number: float) -> None:
    with pytest.raises(NonDiffError, match=f"{name}: 1 of logits are NaN or infinite"):
        (BERNOULLIS | GATES)[name](logits=torch.tensor([0.0, number]))


@pytest.mark.parametrize("number", [INF, NAN])
@pytest.mark.parametrize("name", ONE_HOTS)
def test_one_hot_logits_may_be_minus_infinity_alone(name: str, number: float) -> None:
    logits = torch.zeros(2, 3)
    logits[0, 1] = number
    with pytest.raises(NonDiffError, match=f"{name}: 1 of logits are NaN or plus infinity"):
        ONE_HOTS[name](logits=logits)
    logits[0, 1] = -INF
    assert ONE_HOTS[name](logits=logits).probs[0, 1] == 0
    logits[0] = -INF
    with pytest.raises(NonDiffError, match=f"{name}: logits leaves some element no category"):
        ONE_HOTS[name](logits=logits)


@pytest.mark.parametrize("number", [-0.1, 1.1, NAN, INF])
@pytest.mark.parametrize("name", BERNOULLIS)
def test_a_bernoulli_s_probs_are_probabilities(name: str, number: float) -> None:
    with pytest.raises(NonDiffError, match=rf"{name}: 1 of probs are outside of \[0, 1\]"):
        BERNOULLIS[name](probs=torch.tensor([0.5, number]))
    with pytest.raises(NonDiffError, match=r"probs are outside"):
        BERNOULLIS[name](probs=number)


@pytest.mark.parametrize("number", [-0.1, NAN, INF])
@pytest.mark.parametrize("name", ONE_HOTS)
def test_one_hot_probs_are_probabilities(name: str, number: float) -> None:
    with pytest.raises(NonDiffError, match=f"{name}: 1 of probs are negative or not finite"):
        ONE_HOTS[name](probs=torch.tensor([[0.5, number], [0.5, 0.5]]))
    with pytest.raises(NonDiffError, match=f"{name}: probs leaves some element no category"):
        ONE_HOTS[name](probs=torch.tensor([[0.0, 0.0], [0.5, 0.5]]))
    with pytest.raises(NonDiffError, match=f"{name}: logits leaves some element no category"):
        ONE_HOTS[name](logits=torch.zeros(2, 0))
    with pytest.raises(NonDiffError, match=f"{name}: logits must be a tensor whose last dim"):
        ONE_HOTS[name](logits=torch.tensor(0.0))


@pytest.mark.parametrize("name", BERNOULLIS | ONE_HOTS)
def test_probs_and_logits_exclude_each_other(name: str) -> None:
    law = (BERNOULLIS | ONE_HOTS)[name]
    half = torch.full((2,), 0.5)
    with pytest.raises(NonDiffError, match=f"{name}: give one of probs and logits, found both"):
        law(probs=half, logits=half)
    with pytest.raises(NonDiffError, match=f"{name}: give one of probs and logits, found neither"):
        law()


def test_without_validation_nothing_is_looked_into() -> None:
    """A captured step must not wait for values."""
    bad = torch.tensor([INF, 0.0])
    for law in (BERNOULLIS | GATES).values():
        law(logits=bad, validate_args=False)
    for law in ONE_HOTS.values():
        law(logits=bad, validate_args=False)


@pytest.mark.parametrize(
    "law",
    [
        lambda probs: StraightThroughBernoulli(probs=probs),
        lambda probs: StraightThroughOneHotCategorical(probs=probs),
    ],
)
def test_learnt_probabilities_at_a_corner_are_warned_of_once(law: Callable[..., Any]) -> None:
    corner = torch.tensor([0.0, 1.0], requires_grad=True)
    with pytest.warns(NonDiffWarning, match="2 of probs are exactly 0 or 1") as caught:
        law(corner)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        law(corner.detach())
        law(torch.tensor([0.3, 0.7], requires_grad=True))


@pytest.mark.parametrize("kind", [StraightThroughBernoulli, StraightThroughOneHotCategorical])
def test_gradients_have_names(kind: Callable[..., Any]) -> None:
    logits = torch.zeros(2)
    with pytest.raises(NonDiffError, match=r"gradient must be one of \['identity'.*found 'hard'"):
        kind(logits=logits, gradient="hard")
    for count in (0, -1):
        with pytest.raises(NonDiffError, match=f"num_conditional must be at least 1.*{count}"):
            kind(logits=logits, gradient="gumbel_rao", num_conditional=count)


def test_the_estimator_refuses_the_same() -> None:
    with pytest.raises(NonDiffError, match=r"StraightThrough: gradient must be one of"):
        StraightThrough("hard")
    with pytest.raises(NonDiffError, match=r"StraightThrough: temperature must be positive"):
        StraightThrough(temperature=0.0)
    with pytest.raises(NonDiffError, match=r"StraightThrough: temperature must be positive"):
        StraightThrough(temperature=torch.tensor(-1.0))
    with pytest.raises(NonDiffError, match=r"StraightThrough: num_conditional must be at least"):
        StraightThrough("gumbel_rao", num_conditional=0)


@pytest.mark.parametrize(
    "law", [dist.Poisson(torch.tensor(2.0)), dist.Normal(0.0, 1.0).expand((3,)).to_event(1)]
)
def test_laws_without_a_twin(law: Any) -> None:
    name = "Poisson" if isinstance(law, dist.Poisson) else "Normal"
    with pytest.raises(NonDiffError, match=f"{name} has no relaxed twin.*Bernoulli, Categorical"):
        relaxed(law, 0.5)


@pytest.mark.parametrize("kind", [RelaxedBernoulli, RelaxedOneHotCategorical])
def test_a_relaxed_value_has_no_discrete_mass(kind: Callable[..., Any]) -> None:
    with pytest.raises(NonDiffError, match="a relaxed value has only a relaxed density"):
        kind(0.5, logits=torch.zeros(2), relaxed_density=False)


@pytest.mark.parametrize("stretch", [(0.0, 1.1), (-0.1, 1.0), (0.2, 0.8), (1.1, -0.1)])
def test_a_stretch_contains_both_ends(stretch: tuple[float, float]) -> None:
    with pytest.raises(NonDiffError, match=r"stretch must reach below 0 and above 1"):
        HardConcrete(torch.zeros(2), stretch=stretch)


@pytest.mark.parametrize("kind", [ExponentialAnnealing, LinearAnnealing])
@pytest.mark.parametrize(
    ("arguments", "name"),
    [((0.0, 1.0, 2), "start"), ((1.0, -1.0, 2), "end"), ((1.0, INF, 2), "end"), ((1, 1, 0), "num")],
)
def test_schedules_are_positive(kind: Any, arguments: tuple[float, ...], name: str) -> None:
    with pytest.raises(NonDiffError, match=f"{kind.__name__}: {name}.* must be positive"):
        kind(*arguments)


def test_only_a_linear_schedule_ends_at_zero_and_is_no_temperature() -> None:
    with pytest.raises(NonDiffError, match="ExponentialAnnealing: end must be positive"):
        ExponentialAnnealing(1.0, 0.0, 2)
    schedule = LinearAnnealing(1.0, 0.0, 2)
    with pytest.raises(NonDiffError, match=r"temperature must be positive, and .* ends at 0"):
        RelaxedBernoulli(schedule, logits=torch.zeros(2))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(ExponentialAnnealing, [1.0, 0.5, 0.25, 0.25]), (LinearAnnealing, [1.0, 0.625, 0.25, 0.25])],
)
def test_schedules(kind: Any, expected: list[float]) -> None:
    schedule = kind(1.0, 0.25, num_steps=2)
    value: Tensor = schedule.value
    found = []
    for _ in expected:
        found.append(float(schedule.value))
        schedule.step()
    assert found == pytest.approx(expected, rel=1e-6)  # the numbers are those of float32 at least
    assert schedule.value is value, "a step that was recorded must see the change"
    for other in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert torch.equal(other.value, value)
        assert "num_steps=2" in repr(other)
    fresh = kind(1.0, 0.25, num_steps=2)
    fresh.load_state_dict(schedule.state_dict())
    assert torch.equal(fresh.value, value)
    law = StraightThroughBernoulli(logits=torch.zeros(3), temperature=fresh, gradient="gumbel")
    assert law.rsample().shape == (3,)


@pytest.mark.parametrize("straight_through", [False, True])
def test_twins_of_wrapped_laws(straight_through: bool) -> None:
    mask = torch.tensor([True, False, True])
    logits = torch.tensor([0.3, -1.0, 2.0])
    many = torch.randn(3, 4)
    laws = {
        "RelaxedBernoulli": dist.Bernoulli(logits=logits),
        "RelaxedOneHotCategorical": dist.OneHotCategorical(logits=many),
    }
    for name, base in laws.items():
        for law in (base, base.to_event(1), base.expand((2, 3)), base.mask(mask).to_event(1)):
            twin = relaxed(law, 0.5, straight_through=straight_through)
            assert twin.batch_shape == law.batch_shape
            assert twin.event_shape == law.event_shape
            value = twin.rsample()
            assert value.shape == law.shape()
            assert describe(twin) == name
            if straight_through:
                torch.testing.assert_close(twin.log_prob(value), law.log_prob(value))
    twin = relaxed(dist.Categorical(logits=many), 0.5)
    assert twin.batch_shape == (3,)
    assert twin.event_shape == (4,)
