"""A bright patch is found by ``crop``: not by ignoring, slowly at random, fast by interpolation.

The window starts in the upper left corner. Of 10 seeds REINFORCE reached 0.9 of the brightest
window after 62 to 110 steps and stayed at 0.89 and above, LAX of 6 seeds after 71 to 122 and at
0.92; interpolation reached it after 32 to 35 steps. The bounds below leave room around that.
"""

import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from torch import Tensor

from pyro_nondiff.estimators import LAX, REINFORCE, MovingAverage
from pyro_nondiff.handlers import AbstractHandler, SpatialTransformer, ignore, mode, randomize
from pyro_nondiff.infer import ExpectedCost, no_guide

from .crop_program import bright_patch, found, look, search

pytestmark = pytest.mark.usefixtures("param_store")

CORNER = (0.05, 0.05)
SCALE = 0.08


def first_at(curve: list[float], level: float) -> int:
    """After how many steps a curve is first at a level; its length if it never is."""
    return next((n for n, value in enumerate(curve) if value >= level), len(curve))


@pytest.mark.parametrize("handler", [ignore(), ignore(sites="window")])
def test_ignoring_the_place_gives_it_no_gradient(handler: AbstractHandler) -> None:
    image = bright_patch()
    place = pyro.param("place", torch.tensor(CORNER))
    loss = ExpectedCost().differentiable_loss(
        handler(lambda image: look(CORNER, image)), no_guide, image
    )
    assert not loss.requires_grad
    curve = search(handler, ExpectedCost(), image, num_steps=5)
    assert len(set(curve)) == 1
    assert torch.equal(pyro.param("place"), place)


@pytest.mark.parametrize("kind", ["bilinear", "multiscale", "gaussian"])
def test_interpolation_finds_the_patch_fast(kind: str) -> None:
    handler = SpatialTransformer(kind, sigma=4.0)  # type: ignore[arg-type]
    curve = search(handler, ExpectedCost(), bright_patch(), num_steps=120)
    assert first_at(curve, 0.9) < 50
    assert min(curve[-20:]) > 0.95


@pytest.mark.parametrize("estimator", [lambda: REINFORCE(MovingAverage()), LAX])
def test_randomness_finds_the_patch_slowly(estimator: Callable[[], object]) -> None:
    objective = ExpectedCost(estimator())  # type: ignore[arg-type]
    curve = search(randomize(scale=SCALE), objective, bright_patch(), num_steps=500)
    assert 50 < first_at(curve, 0.9) < 400
    assert statistics.mean(curve[-100:]) > 0.85


def test_the_learnt_place_is_looked_at_under_mode() -> None:
    image = bright_patch()
    handler = randomize(scale=SCALE)
    search(handler, ExpectedCost(REINFORCE(MovingAverage())), image, num_steps=20)
    program = mode()(handler(lambda image: look(CORNER, image)))
    assert torch.equal(program(image), look(CORNER, image))


def digit(data_dir: Path) -> Tensor:
    """A cluttered digit whose strokes end ten pixels from the corner where the window starts."""
    with np.load(data_dir / "cluttered_mnist/mnist_sequence1_sample_5distortions5x5.npz") as file:
        return torch.tensor(file["X_train"][3].reshape(1, 40, 40), dtype=torch.get_default_dtype())


@pytest.mark.parametrize("kind", ["multiscale", "gaussian"])
def test_wide_filters_find_a_digit_out_of_sight(data_dir: Path, kind: str) -> None:
    handler = SpatialTransformer(kind, sigma=4.0)  # type: ignore[arg-type]
    curve = search(handler, ExpectedCost(), digit(data_dir), num_steps=120)
    assert min(curve[-20:]) > 0.95


def test_two_pixels_across_see_no_digit_far_away(data_dir: Path) -> None:
    image = digit(data_dir)
    curve = search(SpatialTransformer(), ExpectedCost(), image, num_steps=120)
    assert max(curve) < 0.3
    curve = search(SpatialTransformer(), ExpectedCost(), image, 120, start=(0.25, 0.25))
    assert min(curve[-20:]) > 0.95


def test_randomness_finds_a_digit_out_of_sight(data_dir: Path) -> None:
    objective = ExpectedCost(REINFORCE(MovingAverage()))
    curve = search(randomize(scale=SCALE), objective, digit(data_dir), num_steps=500)
    assert statistics.mean(curve[-100:]) > 0.8


def test_what_is_found_is_at_most_all() -> None:
    image = bright_patch()
    assert found(image, image[:, 17:33, 19:35]) == pytest.approx(1, abs=0.01)  # around its middle
