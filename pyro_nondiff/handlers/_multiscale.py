"""Interpolation in an image and in coarser copies of it, and its adjoint."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ..ops._grid import Grid, wide
from ..ops._spatial import canvas_shape
from ._bilinear import interpolate, splat

__all__ = ["Multiscale"]


@dataclass(frozen=True)
class Multiscale:
    """The mean over levels, each of half the resolution, of what bilinear interpolation has.

    Arguments:
        border: Whether the outer pixels go on for ever; otherwise there is 0 outside.
        levels: How many: the coarsest has cells of ``2 ** (levels - 1)`` pixels.
    """

    border: bool
    levels: int

    def read(self, image: Tensor, grid: Grid) -> Tensor:
        """What an image has at some positions."""
        fine = wide(image)
        read = [
            interpolate(_pool(fine, cell), _coarser(grid, cell), self.border)
            for cell in self._cells()
        ]
        return torch.stack(read).mean(0).to(image.dtype)

    def write(self, patch: Tensor, grid: Grid, size: tuple[int, int]) -> Tensor:
        """A canvas of 0 with a patch at some positions: the adjoint of ``read``."""
        fine = wide(patch)
        written = []
        for cell in self._cells():
            shape = canvas_shape(patch, grid, (_count(size[0], cell), _count(size[1], cell)))
            coarse = splat(fine, _coarser(grid, cell), shape, self.border)
            written.append(_spread(coarse, cell, size))
        return torch.stack(written).mean(0).to(patch.dtype)

    def _cells(self) -> list[int]:
        return [2**level for level in range(self.levels)]


def _count(pixels: int, cell: int) -> int:
    return -(-pixels // cell)


def _coarser(grid: Grid, cell: int) -> Grid:
    """The same points, counted in cells."""
    shift = 0.5 / cell - 0.5
    return Grid(grid.x / cell + shift, grid.y / cell + shift)


def _pool(image: Tensor, cell: int) -> Tensor:
    """The mean of each cell: at the far edges, of the pixels that it has."""
    flat = avg_pool2d(image.reshape(-1, *image.shape[-2:]), cell, ceil_mode=True)
    return flat.reshape(*image.shape[:-2], *flat.shape[-2:])


def _spread(coarse: Tensor, cell: int, size: tuple[int, int]) -> Tensor:
    """The adjoint of the mean: each cell shared out among its pixels."""
    for dim, pixels in ((-2, size[0]), (-1, size[1])):
        first = torch.arange(0, pixels, cell, device=coarse.device)
        share = 1 / (pixels - first).clamp(max=cell).to(coarse.dtype)
        share = share.unsqueeze(-1) if dim == -2 else share
        coarse = (coarse * share).repeat_interleave(cell, dim).narrow(dim, 0, pixels)
    return coarse
