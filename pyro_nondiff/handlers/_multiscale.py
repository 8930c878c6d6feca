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
        level = wide(image)
        read = interpolate(level, grid, self.border)
        for _ in range(1, self.levels):
            level, grid = _halve(level), _coarser(grid)
            read = read + interpolate(level, grid, self.border)
        return (read / self.levels).to(image.dtype)

    def write(self, patch: Tensor, grid: Grid, size: tuple[int, int]) -> Tensor:
        """A canvas of 0 with a patch at some positions: the adjoint of ``read``."""
        return (self._write(wide(patch), grid, size, self.levels) / self.levels).to(patch.dtype)

    def _write(self, patch: Tensor, grid: Grid, size: tuple[int, int], levels: int) -> Tensor:
        canvas = splat(patch, grid, canvas_shape(patch, grid, size), self.border)
        if levels == 1:
            return canvas
        half = ((size[0] + 1) // 2, (size[1] + 1) // 2)
        coarse = self._write(patch, _coarser(grid), half, levels - 1)
        return canvas + _double(coarse, size)


def _coarser(grid: Grid) -> Grid:
    """The same points, counted in cells of two by two pixels."""
    return Grid(grid.x / 2 - 0.25, grid.y / 2 - 0.25)


def _halve(image: Tensor) -> Tensor:
    """The mean of each cell: at the far edges, of the pixels that it has."""
    flat = avg_pool2d(image.reshape(-1, *image.shape[-2:]), 2, ceil_mode=True)
    return flat.reshape(*image.shape[:-2], *flat.shape[-2:])


def _double(coarse: Tensor, size: tuple[int, int]) -> Tensor:
    """The adjoint of the mean: each cell shared out among its pixels."""
    for dim, pixels in ((-2, size[0]), (-1, size[1])):
        shared = coarse.repeat_interleave(2, dim).narrow(dim, 0, pixels)
        share = torch.full((pixels,), 0.5, dtype=coarse.dtype, device=coarse.device)
        share[pixels - pixels % 2 :] = 1  # the only pixel of its cell
        coarse = shared * (share[:, None] if dim == -2 else share)
    return coarse
