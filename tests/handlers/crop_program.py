"""A program that looks for a bright patch by ``crop``, for its tests and for the docs."""

from functools import partial

import pyro
import pyro.optim
import torch
from pyro.infer import SVI
from torch import Tensor
from torch.nn.functional import avg_pool2d

from pyro_nondiff.handlers import AbstractHandler
from pyro_nondiff.infer import TraceEstimator_ELBO, no_guide
from pyro_nondiff.ops import cost, crop

SIDE, WINDOW = 40, 16


def bright_patch() -> Tensor:
    """A soft bright patch at the lower right of a dark image, among four small squares."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    image = torch.exp(-((x - 27) ** 2 + (y - 25) ** 2) / (2 * 4.0**2))
    for column, row in ((6, 30), (33, 6), (14, 8), (20, 36)):
        image = image + 0.4 * ((x - column).abs() < 2) * ((y - row).abs() < 2)
    return image.clamp(max=1).unsqueeze(0)


def look(start: tuple[float, float], image: Tensor) -> Tensor:
    """Looks at one window of the image; a dark one is dear."""
    place = pyro.param("place", lambda: torch.tensor(start))
    box = torch.cat([place, torch.full((2,), WINDOW / SIDE)])
    window = crop("window", image, box, (WINDOW, WINDOW))
    cost("darkness", -10 * window.mean((-1, -2, -3)))
    return window


def found(image: Tensor, window: Tensor) -> float:
    """How bright a window is, compared with the brightest there is."""
    return float(window.mean() / avg_pool2d(image, WINDOW, stride=1).max())


def search(
    handler: AbstractHandler,
    objective: TraceEstimator_ELBO,
    image: Tensor,
    num_steps: int,
    start: tuple[float, float] = (0.05, 0.05),
) -> list[float]:
    """Trains the place under a handler; after each step, what the hard program finds there."""
    pyro.clear_param_store()
    program = partial(look, start)
    svi = SVI(handler(program), no_guide, pyro.optim.Adam({"lr": 0.01}), objective)
    curve = []
    for _ in range(num_steps):
        svi.step(image)
        with torch.no_grad():
            curve.append(found(image, program(image)))
    return curve
