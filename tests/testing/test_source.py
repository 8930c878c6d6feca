"""The pieces of an enumeration: their probabilities, and the value that each one settles."""

import itertools
import math
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_nondiff.distributions import noise_kind, noise_shape, transport
from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.noise import Request
from pyro_nondiff.testing import Enumeration, outcomes

TOLERANCE = 1e-14
"""A sum of at most a hundred probabilities in float64."""


def pieces(law: Any, shape: tuple[int, ...] | None = None, role: str = "u") -> Any:
    """The noise and the probability of each piece of a law's noise."""
    kind = noise_kind(law)
    assert kind is not None
    shape = tuple(noise_shape(law)) if shape is None else shape
    request = Request("z", kind, shape, torch.float64, "cpu", role, law)
    for walk in outcomes():
        noise = Enumeration(walk, nodes=5)(request)
        yield noise, walk.probability


def values(law: Any) -> dict[tuple[float, ...], float]:
    """The probability of each value that the pieces make."""
    found: dict[tuple[float, ...], float] = {}
    for noise, probability in pieces(law):
        value = tuple(transport(law, noise).flatten().tolist())
        found[value] = found.get(value, 0.0) + probability
    return found


LOGITS = torch.tensor([-0.4, 1.3])
LAWS = {
    "bernoulli": dist.Bernoulli(logits=LOGITS),
    "bits": dist.Bernoulli(logits=LOGITS).to_event(1),
    "one_hot": dist.OneHotCategorical(logits=torch.tensor([0.3, -1.0, 2.0])),
    "categorical": dist.Categorical(logits=torch.tensor([[0.3, -1.0, 2.0], [0.0, 0.0, -5.0]])),
    "masked_out": dist.Categorical(logits=torch.tensor([0.3, -torch.inf, 2.0])),
    "certain": dist.Bernoulli(logits=torch.tensor([40.0, -40.0])),
}


@pytest.mark.parametrize("name", LAWS)
def test_pieces_have_the_probabilities_of_their_values(name: str) -> None:
    law = LAWS[name]
    found = values(law)
    assert sum(found.values()) == pytest.approx(1.0, abs=TOLERANCE)
    for value, probability in found.items():
        shape = law.shape()
        wanted = law.log_prob(torch.tensor(value).reshape(shape)).sum().exp()
        assert probability == pytest.approx(float(wanted), abs=TOLERANCE)


def test_all_values_are_found() -> None:
    assert set(values(LAWS["bits"])) == set(itertools.product([0.0, 1.0], repeat=2))
    assert len(values(LAWS["categorical"])) == 9
    assert len(values(LAWS["masked_out"])) == 2


def test_antithetic_noise_settles_the_partner() -> None:
    """The four probabilities of a pair follow from its definition: u and 1 - u."""
    law = dist.Bernoulli(logits=torch.tensor(-0.4))
    found: dict[tuple[float, float], float] = {}
    for noise, probability in pieces(law, role="antithetic"):
        pair = float(transport(law, noise)), float(transport(law, -noise))
        found[pair] = found.get(pair, 0.0) + probability
    p = float(torch.tensor(-0.4).sigmoid())
    assert set(found) == {(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)}  # p < 1/2: never both
    assert found[1.0, 0.0] == pytest.approx(p, abs=TOLERANCE)
    assert found[0.0, 1.0] == pytest.approx(p, abs=TOLERANCE)
    assert found[0.0, 0.0] == pytest.approx(1 - 2 * p, abs=TOLERANCE)


def test_one_piece_settles_the_value_of_every_row() -> None:
    """Rows with other logits share the noise: each has its own law's probabilities."""
    rows = torch.tensor([[[-0.4, 1.3]], [[0.8, 0.1]], [[-0.4, -2.0]]])
    law, shape = dist.Bernoulli(logits=rows), (1, 1, 2)
    ones = torch.zeros_like(rows)
    for noise, probability in pieces(law, shape):
        assert noise.shape == shape
        ones += probability * transport(law, noise)
    torch.testing.assert_close(ones, rows.sigmoid(), rtol=0.0, atol=TOLERANCE)


def test_gumbel_rows_have_their_own_laws() -> None:
    logits = torch.tensor([[[0.3, -1.0, 2.0]], [[0.0, 1.0, -1.0]]])
    law = dist.OneHotCategorical(logits=logits)
    mean = torch.zeros_like(logits)
    for noise, probability in pieces(law, (1, 1, 3)):
        mean += probability * transport(law, noise)
    torch.testing.assert_close(mean, logits.softmax(-1), rtol=0.0, atol=TOLERANCE)


def test_base_worlds_are_independent() -> None:
    law = dist.Bernoulli(logits=torch.tensor(-0.4))
    p = float(torch.tensor(-0.4).sigmoid())
    both = sum(probability for noise, probability in pieces(law, (2,)) if bool((noise > 0.4).all()))
    assert both == pytest.approx(p * p, abs=TOLERANCE)


@pytest.mark.parametrize("power", range(10))
def test_normal_noise_has_the_moments_of_a_normal(power: int) -> None:
    """Five nodes integrate polynomials of degree 9: (power - 1)!! for even powers."""
    law = dist.Normal(torch.tensor(0.0), torch.tensor(1.0))
    moment = sum(probability * float(noise) ** power for noise, probability in pieces(law))
    wanted = float(np.prod(np.arange(1, power, 2))) if power % 2 == 0 else 0.0
    assert moment == pytest.approx(wanted, abs=1e-11)  # terms of order 100


@pytest.mark.parametrize("power", range(8))
@pytest.mark.parametrize("kind", ["exponential", "gamma", "rayleigh"])
def test_positive_noise_has_the_moments_of_its_law(kind: str, power: int) -> None:
    """Four nodes serve seven powers, odd ones of a Rayleigh number too."""
    concentration = torch.tensor(2.5) if kind == "gamma" else None
    request = Request("z", kind, (), torch.float64, "cpu", concentration=concentration)
    mean = 0.0
    for walk in outcomes():
        number = Enumeration(walk, nodes=4)(request).item()
        mean += walk.probability * number**power
    if kind == "rayleigh":
        moment = 2 ** (power / 2) * math.gamma(1 + power / 2)
    else:
        alpha = 1.0 if concentration is None else 2.5
        moment = math.gamma(alpha + power) / math.gamma(alpha)
    assert mean == pytest.approx(moment, rel=1e-12)


def test_normal_noise_of_several_numbers() -> None:
    law = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
    mean = torch.zeros(2, 2)
    count = 0
    for noise, probability in pieces(law):
        mean += probability * noise.unsqueeze(-1) * noise
        count += 1
    assert count == 25
    torch.testing.assert_close(mean, torch.eye(2), rtol=0.0, atol=1e-12)


def test_noise_of_an_unknown_role_is_refused() -> None:
    law: Any = dist.Bernoulli(logits=torch.tensor(-0.4))
    with pytest.raises(NonDiffError, match=r"site 'z'.*not 'v'"):
        list(pieces(law, role="v"))


def test_noise_is_of_the_law() -> None:
    noise: Tensor
    for noise, _ in pieces(dist.Bernoulli(logits=LOGITS)):
        assert noise.dtype == LOGITS.dtype
        assert torch.isfinite(noise).all()
