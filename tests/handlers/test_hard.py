"""ignore and replay: hard values without gradient."""

from typing import Any

import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.handlers import ignore, replay, soften
from pyro_nondiff.ops import argmax, external, step

SCORES = torch.tensor([[0.3, -1.0, 2.0], [5.0, 0.0, 5.0]])


def test_ignore_is_hard_and_keeps_other_handlers_away() -> None:
    scores = SCORES.clone().requires_grad_()
    with soften(), ignore():
        z, h = argmax("z", scores), step("h", scores)
    assert torch.equal(z, torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
    assert not z.requires_grad
    assert not h.requires_grad


def test_ignore_serves_any_op() -> None:
    with ignore(sites="e"):
        assert external("e", float, SCORES[0, 0]) == SCORES[0, 0]


def ask(prompt: Tensor) -> float:
    raise AssertionError("the person was asked again")


def program(x: Tensor, fn: Any = ask) -> Tensor:
    return external("answer", fn, x) + argmax("z", torch.stack([x, -x]))[0]


def test_replay_calls_nothing() -> None:
    trace = poutine.trace(program).get_trace(torch.tensor(1.0), lambda x: 5.0)
    x = torch.tensor(-1.0, requires_grad=True)
    found = replay(trace)(program)(x)
    assert found == 6  # the choice was replayed too
    assert not found.requires_grad
    assert replay(trace, sites="answer")(program)(x) == 5


def test_replay_passes_ops_that_it_does_not_know() -> None:
    assert replay({"answer": torch.tensor(5.0)})(program)(torch.tensor(-1.0)) == 5
    with pytest.raises(NonDiffError, match=r"replay has no value for op 'z': it knows .'answer'."):
        replay({"answer": torch.tensor(5.0)}, sites=["answer", "z"])(program)(torch.tensor(-1.0))
