"""soften: a smooth function in place of a hard one."""

import pytest
import torch

from pyro_nondiff.distributions import LinearAnnealing
from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.handlers import soften
from pyro_nondiff.ops import argmax, external, step

X = torch.tensor([[0.3, -1.0, 2.0], [5.0, 0.0, 4.0]])


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_values_are_softmax_and_sigmoid(temperature: float) -> None:
    with soften(temperature):
        z, h = argmax("z", X), step("h", X)
    exponentials = (X / temperature).exp()
    # the same functions, written out
    expected = exponentials / exponentials.sum(-1, keepdim=True)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(h, exponentials / (1 + exponentials))


def test_is_differentiable_twice() -> None:
    x = X.double().requires_grad_()
    with soften(0.5):
        torch.autograd.gradcheck(lambda x: argmax("z", x), x)
        torch.autograd.gradgradcheck(lambda x: step("h", x), x)


def test_becomes_the_hard_value_as_the_temperature_falls() -> None:
    with soften(1e-3):
        z, h = argmax("z", X), step("h", X[:, ::2])
    # the closest two scores are 1 apart: e^-1000 is 0
    assert torch.equal(z, argmax("z", X))
    assert torch.equal(h, step("h", X[:, ::2]))


def test_temperature_may_differ_by_row_and_change_with_the_steps() -> None:
    with soften(torch.tensor([1.0, 2.0])):
        z = argmax("z", X)
    expected = torch.stack([X[0].softmax(-1), (X[1] / 2).softmax(-1)])
    torch.testing.assert_close(z, expected, rtol=0, atol=0)
    schedule = LinearAnnealing(2.0, 1.0, num_steps=2)
    handler = soften(schedule)
    schedule.step()
    schedule.step()
    with handler:
        torch.testing.assert_close(step("h", X), X.sigmoid(), rtol=0, atol=0)


def test_passes_external_and_refuses_it_by_name() -> None:
    with soften():
        assert external("e", float, X[0, 0]) == X[0, 0]
    with pytest.raises(NonDiffError, match=r"soften has no rule for op 'e', .* of kind external"):
        soften(sites="e")(external)("e", float, X[0, 0])


def test_temperature_that_is_not_positive_is_refused() -> None:
    with pytest.raises(NonDiffError, match="soften: temperature must be positive"):
        soften(-1.0)
