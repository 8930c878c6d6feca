"""Trains the same program with ``SVI`` and with ``CompiledSVI``, on the same draws."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from pyro.optim import Adam, PyroOptim
from torch import Tensor

from pyro_nondiff.infer import CompiledSVI

Program = Callable[..., Any]
STEPS = 8


@dataclass
class Training:
    """A program to be trained, made anew for each kind of SVI.

    Arguments:
        model: The model.
        guide: The guide.
        loss: The objective.
        optim: The optimiser.
        arguments: The arguments of each step, given its number.
        between: What is done after each step.
    """

    model: Program
    guide: Program
    loss: Any
    optim: PyroOptim | None = None
    arguments: Callable[[int], tuple[Any, ...]] = lambda step: ()
    between: Callable[[int, PyroOptim], None] = lambda step, optim: None


@dataclass
class Trained:
    """What came of it.

    Arguments:
        svi: What took the steps.
        losses: The loss of each step.
        parameters: All parameters at the end.
        optim: The optimiser.
        after: A number that torch's generator draws at the end.
    """

    svi: Any
    losses: Tensor
    parameters: dict[str, Tensor]
    optim: PyroOptim
    after: Tensor


def train(make: Callable[[], Training], kind: Callable[..., Any], steps: int = STEPS) -> Trained:
    """Trains from an empty param store, each step from a seed of its own."""
    pyro.clear_param_store()
    with torch.random.fork_rng():
        torch.manual_seed(11)
        training = make()
        optim = training.optim or Adam({"lr": 0.05})
        svi = kind(training.model, training.guide, optim, training.loss)
        losses = []
        for step in range(steps):
            torch.manual_seed(step)
            losses.append(torch.as_tensor(svi.step(*training.arguments(step))))
            training.between(step, optim)
        after = torch.rand(())
    parameters = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    return Trained(svi, torch.stack(losses), parameters, optim, after)


def compiled(backend: str) -> Callable[..., CompiledSVI]:
    """``CompiledSVI`` with a backend, as :func:`train` wants it."""
    return lambda *args: CompiledSVI(*args, backend=backend)


def same(
    make: Callable[[], Training],
    backend: str = "replay",
    steps: int = STEPS,
    rtol: float = 1e-9,
) -> CompiledSVI:
    """Checks that both train alike; returns the compiled one.

    Arguments:
        make: Makes the program.
        backend: Of the compiled one.
        steps: How many are taken.
        rtol: In float64, rounding of sums in another order, and some steps of it.
    """
    eager = train(make, SVI, steps)
    found = train(make, compiled(backend), steps)
    close = {"rtol": rtol, "atol": rtol, "check_dtype": False}
    torch.testing.assert_close(found.losses, eager.losses, **close)
    torch.testing.assert_close(found.parameters, eager.parameters, **close)
    torch.testing.assert_close(found.after, eager.after)
    return found.svi
