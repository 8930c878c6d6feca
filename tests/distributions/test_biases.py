"""What the straight-through gradients claim of their bias, by enumeration and quadrature.

========================  ==========================================================================
gradient                  has no bias for
========================  ==========================================================================
``identity``              costs linear in the factor: as is ``softmax`` at temperature 1
``reinmax``               costs at most quadratic in the factor, at temperature 1 only
the others                constants
========================  ==========================================================================

As a function of one factor, the cost is what is expected of it after all later factors. A factor
whose value the logits of a later one depend on has a cost that is neither linear nor quadratic,
whatever the program's cost: its gradient is biased for every choice.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_nondiff import noise
from pyro_nondiff.distributions import StraightThroughBernoulli
from pyro_nondiff.noise import Request

from .biases import (
    CASES,
    DEGREES,
    GRADIENTS,
    TEMPERED,
    Axis,
    Quadrature,
    Row,
    bias_table,
    exact_gradients,
    expected_gradients,
    nodes,
)

EXACT = 1e-9
"""Of sums of 400,000 numbers below 10 in float64, of probabilities that sum to 1: 1e-14 is usual.
What the quadrature leaves out is below 1e-11."""

SURE = 1e-3
"""Where there is a bias, it is larger than this, and the quadrature is not what is seen."""

EXACT_DEGREE = {"identity": 1, "softmax": 1, "reinmax": 2}
"""Up to which degree of the cost in the factor a gradient has no bias, at temperature 1."""


def is_exact(row: Row) -> bool:
    """Whether a gradient's bias is claimed to be zero."""
    upstream = row.factors == "two dependent Bernoullis" and row.parameter == "first"
    degree = 0 if upstream or row.temperature != 1 else EXACT_DEGREE.get(row.gradient, 0)
    return DEGREES[row.cost] <= degree


def rows(**wanted: Any) -> list[Row]:
    """The rows of the table with some attributes."""
    return [r for r in bias_table() if all(getattr(r, k) == v for k, v in wanted.items())]


def label(row: Row) -> str:
    return f"{row.factors}-{row.parameter}-{row.gradient}-{row.temperature}-{row.cost}"


def test_the_table_has_every_case() -> None:
    counts = [len(GRADIENTS) + len(TEMPERED), len(DEGREES), sum(len(c.parameters) for c in CASES)]
    assert len(bias_table()) == math.prod(counts)
    assert len({label(row) for row in bias_table()}) == len(bias_table())


def test_bias_is_zero_where_it_is_claimed_and_nowhere_else() -> None:
    wrong = [label(row) for row in bias_table() if (row.bias <= EXACT) != is_exact(row)]
    assert not wrong
    assert all(row.bias > SURE for row in bias_table() if not is_exact(row))


def test_exact_gradients_are_not_zero() -> None:
    """Of zero, everything would be a good estimate."""
    assert all(max(map(abs, row.exact)) > 0.02 for row in bias_table())


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_gumbel_rao_has_the_mean_of_gumbel(temperature: float) -> None:
    pairs = zip(
        rows(gradient="gumbel", temperature=temperature),
        rows(gradient="gumbel_rao", temperature=temperature),
        strict=True,
    )
    for plain, averaged in pairs:
        assert plain.mean == pytest.approx(averaged.mean, abs=EXACT)


def test_softmax_at_temperature_one_is_the_identity() -> None:
    for same, row in zip(
        rows(gradient="identity"), rows(gradient="softmax", temperature=1.0), strict=True
    ):
        assert same.mean == pytest.approx(row.mean, abs=1e-12)


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_the_bias_of_gumbel_for_a_linear_cost_goes_with_the_temperature(case: Any) -> None:
    """As T goes to 0 the relaxed value's expectation is the hard one's."""

    def linear(y: Tensor) -> Tensor:
        return y

    exact = exact_gradients(case, linear)
    gaps = []
    for temperature in (1.0, 0.5, 0.25):
        mean = expected_gradients(case, "gumbel", temperature, linear)
        gaps.append(max(float((mean[name] - exact[name]).abs().max()) for name in exact))
    # the bias is of order T^2: a half of T leaves a quarter, or 0.4 where higher orders count
    assert gaps[1] < 0.45 * gaps[0]
    assert gaps[2] < 0.35 * gaps[1]


@pytest.mark.parametrize("logit", [-3.0, -0.4, 0.0, 1.7])
def test_closed_forms_of_one_bernoulli(logit: float) -> None:
    """Of z, z^2 and z^3, whose exact gradient is p (1 - p), from the papers' formulas by hand."""
    p = 1 / (1 + math.exp(-logit))
    leaf = torch.tensor(logit, dtype=torch.float64, requires_grad=True)
    for degree in (1, 2, 3):
        at = {1: float(degree), 0: float(degree == 1)}  # the cost's slope at 1 and at 0
        for gradient, by_hand in (
            ("identity", p * at[1] + (1 - p) * at[0]),
            ("selected", p * at[1]),
            ("softmax", p * at[1] + (1 - p) * at[0]),
            ("reinmax", (at[0] + at[1]) / 2),
        ):
            source = Quadrature([Axis.of(2, is_one_hot=False, noisy=False)])
            with noise.source(source):
                law = StraightThroughBernoulli(logits=leaf.expand(2), gradient=gradient)
                value = law.rsample()
            (found,) = torch.autograd.grad((source.weight * value**degree).sum(), leaf)
            assert float(found) == pytest.approx(p * (1 - p) * by_hand, abs=1e-12)


def gumbel_moments(case: Any, temperature: float) -> tuple[Tensor, Tensor]:
    """The variance of the gumbel gradient between values, and within them, of a linear cost."""
    source = Quadrature([Axis.of(2, is_one_hot=False, noisy=True)])
    logit = case.parameters["logit"].expand(len(source.rows)).clone().requires_grad_()
    with noise.source(source):
        value = StraightThroughBernoulli(
            logits=logit, temperature=temperature, gradient="gumbel"
        ).rsample()
    (slope,) = torch.autograd.grad(value.sum(), logit)
    one = value.detach()
    mean = (source.weight * slope).sum()
    given = [(source.weight * slope * b).sum() / (source.weight * b).sum() for b in (1 - one, one)]
    centre = torch.where(one > 0, given[1], given[0])
    within = (source.weight * (slope - centre).square()).sum()
    between = (source.weight * (centre - mean).square()).sum()
    return between, within


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_gumbel_rao_varies_less_by_what_it_averages(temperature: float) -> None:
    """With two conditional noises the variance given the value is half that of gumbel's."""
    case = CASES[0]
    between, within = gumbel_moments(case, temperature)
    t, w = nodes()
    points = torch.cartesian_prod(t, t)
    weights = torch.cartesian_prod(w, w).prod(-1).repeat(2)
    fresh = points.T.repeat(1, 2)
    hard = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat_interleave(len(points))
    logit = case.parameters["logit"].expand(len(hard)).clone().requires_grad_()

    def source(request: Request) -> Tensor:
        if request.role == "v":
            return fresh
        return torch.where(hard > 0, 50.0, -50.0)

    law = StraightThroughBernoulli(
        logits=logit, temperature=temperature, gradient="gumbel_rao", num_conditional=2
    )
    with noise.source(source):
        value = law.rsample()
    assert torch.equal(value, hard)
    (slope,) = torch.autograd.grad(value.sum(), logit)
    weights = weights * law.log_prob(hard).detach().exp()
    mean = (weights * slope).sum()
    variance = (weights * (slope - mean).square()).sum()
    torch.testing.assert_close(variance, between + within / 2, rtol=0, atol=EXACT)
    # at these temperatures more than half of the variance is within
    assert variance < 0.75 * (between + within)
