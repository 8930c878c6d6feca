"""argmax and step: hard values, no gradient."""

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.handlers import ignore, perturb, randomize, soften, straight_through
from pyro_nondiff.ops import argmax, select, step


def test_argmax_is_one_hot_of_the_largest_in_each_row() -> None:
    scores = torch.randn(4, 1, 3, 5)
    z = argmax("z", scores)
    assert z.shape == scores.shape
    assert torch.equal(z.sum(-1), torch.ones(4, 1, 3))
    assert torch.equal((z * scores).sum(-1), scores.max(-1).values)


def test_argmax_of_equal_scores_is_the_first() -> None:
    assert torch.equal(argmax("z", torch.zeros(3)), torch.tensor([1.0, 0.0, 0.0]))


def test_step_is_zero_below_zero_else_one() -> None:
    h = step("h", torch.tensor([-1.0, -0.0, 0.0, 1e-30, torch.inf]))
    assert torch.equal(h, torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0]))


@pytest.mark.parametrize("op", [argmax, step])
def test_has_no_gradient(op: Callable[..., Tensor]) -> None:
    assert not op("z", torch.randn(3, requires_grad=True)).requires_grad


@pytest.mark.parametrize("op", [argmax, step])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"], indirect=True)
def test_keeps_the_dtype(op: Callable[..., Tensor], dtype: torch.dtype) -> None:
    assert op("z", torch.zeros(3, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("op", [argmax, step])
@pytest.mark.parametrize(
    "handler",
    [poutine.trace(), ignore(), soften(), straight_through(), randomize(), perturb(3)],
    ids=lambda handler: type(handler).__name__,
)
def test_waits_for_no_value(handler: Any, op: Callable[..., Tensor]) -> None:
    """Recording does not, even under validation, but the law of a random op has its own."""
    scores = torch.zeros(3, device="meta")
    with pyro.validation_enabled(not isinstance(handler, randomize)), handler:
        assert op("z", scores).is_meta
        assert select("v", scores, torch.zeros(3, device="meta")).is_meta


@pytest.mark.parametrize("scores", [torch.zeros(()), torch.zeros(2, 0)])
def test_argmax_needs_something_to_choose_from(scores: Tensor) -> None:
    with pytest.raises(NonDiffError, match="op 'z': argmax chooses along the last dimension"):
        argmax("z", scores)
