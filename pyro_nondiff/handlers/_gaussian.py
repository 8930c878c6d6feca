"""Gaussian filters around positions, and their adjoint."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.special import ndtr

from ..distributions import Temperature
from ..distributions.temperature import current
from ..ops._grid import Grid

__all__ = ["Gaussian"]


@dataclass(frozen=True)
class Gaussian:
    """Reads the mean of an image under a Gaussian around each position.

    The share of a pixel is the integral of the Gaussian over it. So shares sum to 1 whatever the
    width, without a normaliser, which would vanish outside of the image.

    Arguments:
        border: Whether the outer pixels go on for ever; otherwise there is 0 outside.
        sigma: The standard deviation in pixels of the image.
    """

    border: bool
    sigma: Temperature

    def read(self, image: Tensor, grid: Grid) -> Tensor:
        """What an image has at some positions."""
        return self._apply("...cab,...ija,...ijb->...cij", image, grid, image.shape[-2:])

    def write(self, patch: Tensor, grid: Grid, size: tuple[int, int]) -> Tensor:
        """A canvas of 0 with a patch at some positions: the adjoint of ``read``."""
        return self._apply("...cij,...ija,...ijb->...cab", patch, grid, torch.Size(size))

    def _apply(self, equation: str, image: Tensor, grid: Grid, size: torch.Size) -> Tensor:
        dtype = torch.promote_types(image.dtype, grid.x.dtype)
        with _no_autocast(image.device.type):
            down = self._shares(grid.y.to(dtype), size[0])
            across = self._shares(grid.x.to(dtype), size[1])
            return torch.einsum(equation, image.to(dtype), down, across).to(image.dtype)

    def _shares(self, position: Tensor, count: int) -> Tensor:
        """The integral over each pixel of one side, in a last dimension."""
        position = position.squeeze(-3).unsqueeze(-1)
        edges = torch.arange(count + 1, dtype=position.dtype, device=position.device) - 0.5
        if self.border:
            edges = edges[1:-1]
        below: Tensor = ndtr((edges - position) / current(self.sigma))
        if self.border:  # the outer pixels have the tails
            below = pad(pad(below, (1, 0)), (0, 1), value=1.0)
        return below[..., 1:] - below[..., :-1]


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else nullcontext()
