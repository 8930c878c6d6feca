"""A program that reads a number at each step, wherever it is kept."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI

from pyro_nondiff.errors import NonDiffWarning
from pyro_nondiff.estimators import RLOO
from pyro_nondiff.infer import TraceEstimator_ELBO
from tests.infer.side_by_side import Training, compiled, same, train

Read = Callable[[], Any]
Change = Callable[[int], None]
Place = Callable[[], tuple[Read, Change]]


def guide(*args: Any) -> None:
    pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.3))))


def model_of(read: Read) -> Callable[..., None]:
    """A model whose cost is scaled by what is read at each step."""

    def model(*args: Any) -> None:
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
        pyro.factor("cost", -read() * (z - 0.2) ** 2)

    return model


def training(
    model: Callable[..., None], change: Change = lambda step: None, estimator: Any = None
) -> Training:
    elbo = TraceEstimator_ELBO(estimator or RLOO(2))
    return Training(model, guide, elbo, between=lambda step, optim: change(step))


def check_watched(place: Place) -> None:
    """A number in the place is watched, and what is done to it matters.

    With its first value kept, losses would not be those of the eager steps.
    """

    def make() -> Training:
        read, change = place()
        return training(model_of(read), change)

    assert same(make, steps=12).num_recordings > 1
    read, change = place()
    first = _what_is_read(read)
    change(3)
    assert _what_is_read(read) != first


def _what_is_read(read: Read) -> tuple[Any, Any]:
    """A number, and how it scales a factor of its own if it has one."""
    with poutine.trace() as capture:
        found = read()
    return found, capture.trace.nodes.get("more", {}).get("scale")


@contextmanager
def one_warning(match: str) -> Iterator[None]:
    with pytest.warns(NonDiffWarning, match=match) as record:
        yield
    assert len(record) == 1


def runs_eager(make: Callable[[], Training], match: str, steps: int = 8) -> None:
    """It trains as SVI does, and says once why it is not recorded."""
    eager = train(make, SVI, steps)
    with one_warning(match):
        found = train(make, compiled("replay"), steps)
    torch.testing.assert_close(found.losses, eager.losses)
    torch.testing.assert_close(found.parameters, eager.parameters)
