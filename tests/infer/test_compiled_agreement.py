"""What a recording would not do again is found when it runs beside the step, or before."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyro_nondiff.estimators import REINFORCE
from pyro_nondiff.infer import TraceEstimator_ELBO
from pyro_nondiff.infer.capture.agreement import agree
from tests.infer.reading_programs import guide, model_of, runs_eager, training
from tests.infer.side_by_side import Training, same

pytestmark = pytest.mark.usefixtures("param_store")


GENERATORS: list[Callable[[int], Any]] = [
    random.Random,
    np.random.default_rng,
    np.random.RandomState,
]


@pytest.mark.parametrize("kind", GENERATORS, ids=lambda kind: kind.__name__)
def test_generators_of_the_program(kind: Callable[[int], Any]) -> None:
    def make() -> Training:
        generator = kind(0)
        return training(model_of(lambda: float(generator.random())), estimator=REINFORCE())

    runs_eager(make, "draws from Python's or NumPy's generator")


def test_a_generator_of_torch() -> None:
    def make() -> Training:
        generator = torch.Generator().manual_seed(0)
        read = lambda: torch.rand((), generator=generator)  # noqa: E731
        return training(model_of(read), estimator=REINFORCE())

    assert same(make).num_recordings == 1


@pytest.mark.parametrize("kind", ["count", "generator"])
def test_iterators(kind: str) -> None:
    def make() -> Training:
        values = itertools.count() if kind == "count" else (0.1 * k for k in range(100))
        return training(model_of(lambda: next(values)), estimator=REINFORCE())

    runs_eager(make, "is an iterator, which a recording would not move on")


def fixed_noise() -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return torch.rand(())


DIFFERENT = "did something else than the step itself"


@pytest.mark.filterwarnings("ignore:the world check was skipped")
def test_seeds_of_the_program() -> None:
    runs_eager(lambda: training(model_of(fixed_noise)), DIFFERENT)
    model = model_of(lambda: torch.rand(()))
    seeded = Training(poutine.seed(model, 3), guide, TraceEstimator_ELBO(REINFORCE()))
    runs_eager(lambda: seeded, DIFFERENT)


@pytest.mark.filterwarnings("ignore:the world check was skipped")
def test_dropout_that_is_drawn_again_for_the_backward_pass() -> None:
    """A checkpoint seeds its second run; a recording would take another mask for the gradient."""

    def make() -> Training:
        net = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))

        def model() -> None:
            pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))

        def program() -> None:
            pyro.module("net", net)
            found: Any = checkpoint(net, torch.ones(2), use_reentrant=False)
            pyro.sample("z", dist.Bernoulli(logits=found.squeeze(-1)))

        return Training(model, program, TraceEstimator_ELBO(REINFORCE()))

    runs_eager(make, DIFFERENT)


def test_agreement_is_of_each_tensor() -> None:
    ones, none = torch.ones(3), torch.zeros(3)
    assert agree([ones, none + 1e-7], [ones, none])
    assert not agree([ones, none], [ones, ones])
    assert not agree([ones * 1.01], [ones])
    assert not agree([ones], [None])
    assert not agree([ones], [ones, ones])
    assert not agree([torch.ones(2)], [ones])
