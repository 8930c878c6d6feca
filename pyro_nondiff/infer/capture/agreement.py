"""Runs what was recorded beside the step itself, once: both have to do the same.

What changes from one step to the next in a place that is not watched, such as a generator of its
own, an iterator, or a seed, is found so.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..generators import random_states, set_random_states, set_state_of, state_of
from .backends import Run
from .outside import OutsideCall

_RELATIVE = 1e-3  # the same operations are done, in nearly the same order
_ABSOLUTE = 1e-5  # of the norm of all results


def run_beside(
    run: Run,
    inputs: Sequence[Tensor],
    calls: Sequence[OutsideCall],
    generators: Sequence[torch.Generator],
    step: Callable[[], Sequence[Tensor]],
) -> tuple[list[Tensor], list[Tensor]]:
    """Takes a step, and does what was recorded of it from where it began.

    Arguments:
        run: Runs the recording.
        inputs: The tensors that it takes; the step may change them.
        calls: What it calls outside; they give the step's answers again.
        generators: Those of the program, besides the global ones.
        step: Takes the step, and returns what was answered from outside.

    Returns:
        What came out of the recording, and copies of the inputs as it left them.
    """
    states = _states(generators)
    copies = [tensor.detach().clone() for tensor in inputs]
    answers = step()
    after = _states(generators)
    try:
        with _answered(calls, answers):
            _restore(generators, states)
            found = list(run(copies))
    finally:
        _restore(generators, after)
    return found, copies


def agree(found: Sequence[Tensor], expected: Sequence[Tensor | None]) -> bool:
    """Whether tensors are the same but for rounding."""
    norms = [_norm(tensor) for tensor in expected if tensor is not None]
    least = _ABSOLUTE * max(norms, default=0.0)
    return len(found) == len(expected) and all(
        b is not None and a.shape == b.shape and _norm(a, b) <= _RELATIVE * _norm(b) + least
        for a, b in zip(found, expected, strict=True)
    )


def _norm(tensor: Tensor, other: Tensor | None = None) -> float:
    values = [torch.nan_to_num(t.detach()) for t in (tensor, other) if t is not None]
    wide = [v.to(torch.complex128 if v.is_complex() else torch.float64) for v in values]
    return float((wide[0] - wide[1] if other is not None else wide[0]).abs().square().sum().sqrt())


def _states(generators: Sequence[torch.Generator]) -> Any:
    return random_states(), [state_of(each) for each in generators]


def _restore(generators: Sequence[torch.Generator], states: Any) -> None:
    global_states, own = states
    set_random_states(global_states)
    for each, state in zip(generators, own, strict=True):
        set_state_of(each, state)


@contextmanager
def _answered(calls: Sequence[OutsideCall], answers: Sequence[Tensor]) -> Iterator[None]:
    for call, answer in zip(calls, answers, strict=True):
        call.answer = answer
    try:
        yield
    finally:
        for call in calls:
            call.answer = None
