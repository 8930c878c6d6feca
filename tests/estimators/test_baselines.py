"""Baselines are read before they are updated, and hold what their formulas say."""

import pytest
import torch
from torch import Tensor, nn

from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.estimators import (
    REINFORCE,
    RLOO,
    AbstractBaseline,
    Context,
    DisARM,
    Draw,
    MovingAverage,
    NeuralBaseline,
)

COSTS = torch.tensor([[1.0, 4.0], [3.0, 0.0]])  # two base worlds, two plate elements
CONTEXT = Context("z", shape=(2, 2))


def read(baseline: AbstractBaseline, state: nn.Module, costs: Tensor) -> Tensor:
    """One step: what the baseline says, and then its update."""
    context = Context("z", shape=tuple(costs.shape))
    reading = baseline.read(state, costs, context)
    value = reading.value.detach().clone()
    reading.update(costs)
    return value


def test_moving_average_is_the_weighted_mean_of_the_past() -> None:
    baseline = MovingAverage(decay=0.8)
    state = baseline.make_state()
    past: list[float] = []
    for step in range(5):
        found = read(baseline, state, COSTS + step)
        weights = [0.8 ** (len(past) - 1 - i) for i in range(len(past))]
        expected = sum(w * f for w, f in zip(weights, past, strict=True)) / max(sum(weights), 1e-12)
        assert float(found) == pytest.approx(expected, rel=1e-12)
        past.append(2.0 + step)


def test_moving_average_takes_batches_of_any_size() -> None:
    baseline = MovingAverage()
    state = baseline.make_state()
    for size in (8, 8, 3):
        read(baseline, state, torch.ones(1, size))
    assert float(read(baseline, state, torch.ones(1, 5))) == pytest.approx(1.0)


def test_moving_average_per_element() -> None:
    baseline = MovingAverage(decay=0.5, per_element=True)
    state = baseline.make_state()
    read(baseline, state, COSTS)
    torch.testing.assert_close(read(baseline, state, COSTS), torch.tensor([2.0, 2.0]))
    with pytest.raises(NonDiffError, match=r"site 'z'.*per_element.*\(2,\).*\(3,\)"):
        read(baseline, state, torch.ones(1, 3))


def test_moving_average_follows_the_costs_dtype() -> None:
    baseline = MovingAverage()
    state = baseline.make_state()
    assert read(baseline, state, COSTS.float()).dtype == torch.float32


class Constant(nn.Module):
    """A net that says one number, whatever it sees."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.value.expand(x.shape[0], 1)


def test_neural_baseline_fits_by_squares() -> None:
    net = Constant(1.5)
    baseline = NeuralBaseline(net, input=torch.zeros(2, 3))
    reading = baseline.read(baseline.make_state(), COSTS, CONTEXT)
    torch.testing.assert_close(reading.value, torch.tensor([1.5, 1.5]))
    loss = reading.fit(COSTS)
    assert loss is not None
    torch.testing.assert_close(loss, (COSTS - 1.5).square().mean())


def test_neural_baseline_centres_and_normalises() -> None:
    net = Constant(0.5)
    baseline = NeuralBaseline(net, input=torch.zeros(2, 3), centre=True, normalise=True, decay=0.0)
    state = baseline.make_state()
    first = baseline.read(state, COSTS, CONTEXT)
    torch.testing.assert_close(first.value, torch.tensor([0.5, 0.5]))  # nothing known yet
    first.update(COSTS)
    mean, std = COSTS.mean(), COSTS.std(correction=0)
    second = baseline.read(state, COSTS, CONTEXT)
    torch.testing.assert_close(second.value, (mean + 0.5 * std).expand(2))
    loss = second.fit(COSTS)
    assert loss is not None
    torch.testing.assert_close(loss, ((COSTS - mean) / std - 0.5).square().mean())


def test_a_sum_fits_its_second_part_to_what_the_first_leaves() -> None:
    net = Constant(0.25)
    baseline = MovingAverage(decay=0.0) + NeuralBaseline(net, input=torch.zeros(2, 3))
    state = baseline.make_state()
    baseline.read(state, COSTS, CONTEXT).update(COSTS)
    reading = baseline.read(state, COSTS, CONTEXT)
    torch.testing.assert_close(reading.value, (COSTS.mean() + 0.25).expand(2))
    loss = reading.fit(COSTS)
    assert loss is not None
    torch.testing.assert_close(loss, (COSTS - COSTS.mean() - 0.25).square().mean())


def test_reinforce_subtracts_its_baseline() -> None:
    estimator = REINFORCE(MovingAverage(decay=0.0))
    state = estimator.make_state(None)
    draw = Draw(torch.zeros(1, 2, 2))
    for expected in (COSTS, COSTS - COSTS.mean()):
        found = estimator.estimate(draw, COSTS[None], state, CONTEXT)
        assert found.weight is not None
        assert found.update is not None
        torch.testing.assert_close(found.weight[0], expected)
        found.update()


def test_rloo_leaves_one_out() -> None:
    costs = torch.tensor([[[1.0], [4.0], [7.0]]])
    found = RLOO(3).estimate(Draw(torch.zeros(1, 3, 1)), costs, None, CONTEXT)
    expected = torch.tensor([[[1.0 - 5.5], [4.0 - 4.0], [7.0 - 2.5]]])
    torch.testing.assert_close(found.weight, expected)


def test_disarm_is_the_papers_formula() -> None:
    logits = torch.tensor([[0.3, -1.2, 2.0]])
    values = torch.tensor([[[1.0, 0.0, 1.0]], [[0.0, 0.0, 1.0]]])
    costs = torch.tensor([[5.0], [2.0]])
    found = DisARM().estimate(Draw(values, (logits,)), costs, None, CONTEXT)
    sign = torch.tensor([[1.0, 0.0, 0.0]])  # (-1)^b~ where the pair differs
    torch.testing.assert_close(found.gradients[0], 0.5 * 3.0 * sign * logits.abs().sigmoid())


def test_recipes_compare_by_what_they_say() -> None:
    net = nn.Linear(1, 1)
    assert RLOO(2) == RLOO(2)
    assert RLOO(2) != RLOO(3)
    same = [NeuralBaseline(net, input=torch.zeros(size)) for size in (2, 3)]
    assert same[0] == same[1]
    assert NeuralBaseline(nn.Linear(1, 1), input=torch.zeros(2)) != same[0]
