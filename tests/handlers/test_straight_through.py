"""straight_through: exactly the hard value, with the gradient of a smooth one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_nondiff.distributions import ExponentialAnnealing, StraightThroughOneHotCategorical
from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.handlers import straight_through
from pyro_nondiff.ops import argmax, step

SCORES = torch.tensor([[0.3, -1.0, 2.0], [5.0, 0.0, 5.0]])
G = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.25, 0.0]])


def gradient(z: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad((z * G).sum(), x)[0]


def check_straight_through_is_exactly_hard(dtype: torch.dtype) -> None:
    """Scores far apart and close together, where soft values round."""
    torch_scale = torch.logspace(-3, 2, 50, dtype=torch.float64)[:, None]
    scores = (torch_scale * torch.tensor([1.0, -1.3, 0.9])).to(dtype).requires_grad_()
    with straight_through(temperature=0.3):
        z, h = argmax("z", scores), step("h", scores)
    assert torch.equal(z, argmax("z", scores))
    assert torch.equal(h, step("h", scores))
    assert z.requires_grad
    assert h.requires_grad


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"], indirect=True)
def test_straight_through_is_exactly_hard(dtype: torch.dtype) -> None:
    check_straight_through_is_exactly_hard(dtype)


def test_planted_rounding_off_the_corner_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other order, ``(hard + soft) - soft.detach()``, rounds."""

    def rounding(
        handler: straight_through, hard: Tensor, scores: Tensor, soft: Any, event_dim: int
    ) -> Tensor:
        surrogate = soft(scores / handler.temperature)
        return hard + surrogate - surrogate.detach()

    monkeypatch.setattr(straight_through, "differentiate", rounding)
    with pytest.raises(AssertionError):
        check_straight_through_is_exactly_hard(torch.float32)


@pytest.mark.parametrize("name", ["softmax", "identity", "selected"])
def test_gradients_of_a_choice(name: str) -> None:
    scores = SCORES.clone().requires_grad_()
    with straight_through(name, temperature=0.5):
        z = argmax("z", scores)
    t = 0.5 if name == "softmax" else 1.0
    p = (SCORES / t).softmax(-1)
    g = G * z.detach() if name == "selected" else G
    expected = p * (g - (p * g).sum(-1, keepdim=True)) / t
    # the same products in another order
    torch.testing.assert_close(gradient(z, scores), expected)


@pytest.mark.parametrize("name", ["softmax", "identity", "selected"])
def test_gradients_of_a_threshold(name: str) -> None:
    x = SCORES.clone().requires_grad_()
    with straight_through(name, temperature=0.5):
        h = step("h", x)
    t = 0.5 if name == "softmax" else 1.0
    p = (SCORES / t).sigmoid()
    g = G * h.detach() if name == "selected" else G
    torch.testing.assert_close(gradient(h, x), g * p * (1 - p) / t)


@pytest.mark.parametrize("name", ["softmax", "identity", "selected"])
def test_gradients_are_those_of_the_law_without_noise(name: str) -> None:
    scores = SCORES.clone().requires_grad_()
    with straight_through(name, temperature=0.7):
        z = argmax("z", scores)
    law = StraightThroughOneHotCategorical(logits=scores, temperature=0.7, gradient=name)
    drawn = law.from_noise(torch.zeros_like(scores))
    assert torch.equal(z, drawn)
    # the law normalises its logits first
    torch.testing.assert_close(gradient(z, scores), gradient(drawn, scores))


@pytest.mark.parametrize("name", ["gumbel", "gumbel_rao", "reinmax", "none"])
def test_gradients_of_a_drawn_value_are_refused(name: str) -> None:
    with pytest.raises(NonDiffError, match=r"'softmax', 'identity', 'selected'.*randomize"):
        straight_through(name)


def test_temperature_may_be_a_tensor_or_a_schedule() -> None:
    schedule = ExponentialAnnealing(1.0, 0.25, num_steps=2)
    schedule.step()
    found = []
    for temperature in (0.5, torch.tensor([0.5, 0.5]), schedule):
        scores = SCORES.clone().requires_grad_()
        with straight_through(temperature=temperature):
            found.append(gradient(argmax("z", scores), scores))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=1e-6, atol=0)  # the schedule is in float32


def test_temperature_that_is_not_positive_is_refused() -> None:
    with pytest.raises(NonDiffError, match="straight_through: temperature must be positive"):
        straight_through(temperature=0.0)


def test_score_of_minus_infinity_takes_a_category_out() -> None:
    scores = torch.tensor([0.0, -torch.inf, 1.0], requires_grad=True)
    with straight_through():
        z = argmax("z", scores)
    assert torch.equal(z, torch.tensor([0.0, 0.0, 1.0]))
    slope = torch.autograd.grad(z[2], scores)[0]
    assert slope[1] == 0
    assert slope.isfinite().all()
