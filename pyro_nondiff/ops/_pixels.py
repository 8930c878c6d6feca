"""Pixels of images by their place: reading them, writing to them, and the nearest to a position."""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ._grid import Grid

__all__ = ["flat_index", "put", "put_nearest", "take", "take_nearest"]


def flat_index(shape: torch.Size, row: Tensor, column: Tensor) -> Tensor:
    """The places of pixels in the memory of images.

    Arguments:
        shape: The images' shape, ``batch + (C, H, W)``. Where it is 1 and the positions' is not, a
            pixel is found more than once, and nothing is copied.
        row: Numbers of rows, shape ``batch + (1, h, w)``.
        column: Numbers of columns, alike.
    """
    *outer, height, width = shape
    first = torch.arange(prod(outer), device=row.device).mul(height * width)
    return (first.reshape(*outer, 1, 1) + row * width) + column


def take(flat: Tensor, index: Tensor) -> Tensor:
    """The pixels at some places of flat images."""
    return flat.index_select(0, index.reshape(-1)).reshape(index.shape)


def put(values: Tensor, index: Tensor, shape: torch.Size) -> Tensor:
    """Images of 0, with values added to pixels: the adjoint of :func:`take`.

    Arguments:
        values: What is added; it broadcasts with ``index``.
        index: Places in the memory of the images.
        shape: The images' shape.
    """
    flat = values.new_zeros(prod(shape))
    added = values.expand(index.shape).reshape(-1)
    return flat.index_add(0, index.reshape(-1), added).reshape(shape)


class _Nearest(NamedTuple):
    """The pixel nearest to each position, and 1 or 0: whether it lies in the image."""

    place: Tensor
    inside: Tensor


def _nearest(shape: torch.Size, grid: Grid) -> _Nearest:
    column, across = _round(grid.x, shape[-1])
    row, down = _round(grid.y, shape[-2])
    return _Nearest(flat_index(shape, row, column), across * down)


def _round(position: Tensor, count: int) -> tuple[Tensor, Tensor]:
    position = position.detach()
    found = (position + 0.5).floor()
    pixel = found.clamp(0, count - 1)
    # A position that is not finite has no pixel: NaN, never a wrong one.
    inside = (found == pixel) + (position - position)
    return pixel.nan_to_num().long(), inside


def take_nearest(image: Tensor, grid: Grid) -> Tensor:
    """The nearest pixels of an image, 0 outside."""
    nearest = _nearest(image.shape, grid)
    return take(image.reshape(-1), nearest.place) * nearest.inside.to(image.dtype)


def put_nearest(patch: Tensor, grid: Grid, shape: torch.Size) -> Tensor:
    """The adjoint of :func:`take_nearest`: what lies outside is lost."""
    nearest = _nearest(shape, grid)
    return put(patch * nearest.inside.to(patch.dtype), nearest.place, shape)
