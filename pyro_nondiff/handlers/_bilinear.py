"""Bilinear interpolation between the four pixels around a position, and its adjoint.

There are two ways to the same value. Composed operations have all derivatives, take images that are
shared in any way, and find whole positions exactly. They write a dozen arrays of the output's size,
which takes twice the time of torch's kernel as soon as the arrays are large.
"""

from dataclasses import dataclass
from functools import partial
from itertools import dropwhile
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vjp
from torch.nn.functional import grid_sample

from ..ops._grid import Grid
from ..ops._pixels import flat_index, put, take
from ..ops._spatial import canvas_shape
from ..ops._whole import whole

__all__ = ["Bilinear", "interpolate", "splat"]

# Up to here the composed operations are as fast as the kernel: their arrays stay in the cache.
_SMALL = 2**15


@dataclass(frozen=True)
class Bilinear:
    """Reads images and writes patches at positions between pixels.

    Arguments:
        border: Whether the outer pixels go on for ever; otherwise there is 0 outside.
    """

    border: bool

    def read(self, image: Tensor, grid: Grid) -> Tensor:
        """What an image has at some positions."""
        return interpolate(image, grid, self.border)

    def write(self, patch: Tensor, grid: Grid, size: tuple[int, int]) -> Tensor:
        """A canvas of 0 with a patch at some positions: the adjoint of ``read``."""
        return splat(patch, grid, canvas_shape(patch, grid, size), self.border)


@whole
def interpolate(image: Tensor, grid: Grid, border: bool) -> Tensor:
    """What an image has at positions between its pixels.

    Arguments:
        image: Shape ``batch + (C, H, W)``.
        grid: The positions.
        border: Whether the outer pixels go on for ever; otherwise there is 0 outside.
    """
    dtype = torch.promote_types(image.dtype, grid.x.dtype)
    x, y = grid.x.to(dtype), grid.y.to(dtype)
    shape = canvas_shape(image, grid, (y.shape[-2], x.shape[-1]))
    if prod(shape) > _SMALL and _shared_by_worlds(image.shape[:-3], shape[:-3]):
        value = _by_kernel(image.to(dtype), x, y, shape, border)
    else:
        value = _compose(image.to(dtype), x, y, border)
    return value.to(image.dtype)


@whole
def splat(patch: Tensor, grid: Grid, shape: torch.Size, border: bool) -> Tensor:
    """A canvas of 0 with a patch added at positions between pixels: the adjoint of reading there.

    Arguments:
        patch: Shape ``batch + (C, h, w)``.
        grid: The positions.
        shape: The canvas's shape.
        border: Whether what lies outside is added to the outer pixels; otherwise it is lost.
    """
    dtype = torch.promote_types(patch.dtype, grid.x.dtype)
    corners = _corners(shape, grid.x.to(dtype), grid.y.to(dtype), border)
    shares = torch.stack([patch * below * beside for _, below, beside in corners])
    places = torch.stack([place for place, _, _ in corners])
    return put(shares, places, shape).to(patch.dtype)


class _Corner(NamedTuple):
    """One of the four pixels around each position.

    Arguments:
        place: Where it is in the memory of the images.
        below: The weight of its row.
        beside: The weight of its column.
    """

    place: Tensor
    below: Tensor
    beside: Tensor


def _corners(shape: torch.Size, x: Tensor, y: Tensor, border: bool) -> list[_Corner]:
    columns, rows = _neighbours(x, shape[-1], border), _neighbours(y, shape[-2], border)
    return [
        _Corner(flat_index(shape, row, column), below, beside)
        for row, below in rows
        for column, beside in columns
    ]


def _neighbours(position: Tensor, count: int, border: bool) -> list[tuple[Tensor, Tensor]]:
    """The pixels on both sides of a position, and the tent around each at the position.

    Where the tent has a kink, its derivative is that on the right.
    """
    low = position.detach().floor()
    share = position - low
    found = []
    for pixel, weight in ((low, 1 - share), (low + 1, share)):
        inner = pixel.clamp(0, count - 1)
        if not border:
            weight = weight * (inner == pixel)
        found.append((inner.nan_to_num().long(), weight))
    return found


def _compose(image: Tensor, x: Tensor, y: Tensor, border: bool) -> Tensor:
    flat = image.reshape(-1)
    corners = _corners(image.shape, x, y, border)
    upper_left, upper_right, lower_left, lower_right = (
        take(flat, place) * beside for place, _, beside in corners
    )
    upper, lower = upper_left + upper_right, lower_left + lower_right
    return upper * corners[0].below + lower * corners[2].below


def _shared_by_worlds(images: torch.Size, batch: torch.Size) -> bool:
    """Whether only dimensions at the left of all images' are larger in the batch."""
    own = tuple(dropwhile(lambda size: size == 1, images))
    return tuple(batch[len(batch) - len(own) :]) == own


def _by_kernel(image: Tensor, x: Tensor, y: Tensor, shape: torch.Size, border: bool) -> Tensor:
    """By the kernel, which has one grid an image: what worlds read there stands in more rows."""
    if border:  # there torch's kernel reads any memory at NaN, and may end the process
        hidden = ((x - x) + (y - y)).detach()
        x, y = (part.nan_to_num(0.0, 0.0, 0.0) for part in (x, y))
    images = image.reshape(-1, *image.shape[-3:])
    height, width = image.shape[-2:]
    parts = (x + 0.5) / (width / 2) - 1, (y + 0.5) / (height / 2) - 1
    place = (*shape[:-3], 1, *shape[-2:])
    grid = torch.stack([part.expand(place) for part in parts], -1)
    rows = grid.reshape(-1, len(images), *shape[-2:], 2).transpose(0, 1).flatten(1, 2)
    kernel: Any = _Kernel.apply
    value: Tensor = kernel(images, rows, border).unflatten(2, (-1, shape[-2]))
    value = value.movedim(2, 0).reshape(shape)
    return value + hidden if border else value


class _Kernel(torch.autograd.Function):
    """torch's kernel, with the composed operations for second and further derivatives.

    Older releases of torch have no second one.

    Arguments of ``apply``:
        image: Shape ``(N, C, H, W)``.
        grid: Shape ``(N, h, w, 2)``; -1 and 1 are the image's outer edges.
        border: Whether the outer pixels go on for ever.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(image: Tensor, grid: Tensor, border: bool) -> Tensor:
        padding = "border" if border else "zeros"
        return grid_sample(image, grid, padding_mode=padding, align_corners=False)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        image, grid, ctx.border = inputs
        ctx.save_for_backward(image, grid)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        image, grid = ctx.saved_tensors
        if torch.is_grad_enabled():  # a derivative of the gradient is wanted
            composed: Any = vjp(partial(_compose_grid, border=ctx.border), image, grid)
            return (*composed[1](gradient), None)
        bilinear, corners, wanted = 0, False, list(ctx.needs_input_grad[:2])
        pull = torch.ops.aten.grid_sampler_2d_backward
        return (*pull(gradient, image, grid, bilinear, int(ctx.border), corners, wanted), None)


def _compose_grid(image: Tensor, grid: Tensor, border: bool) -> Tensor:
    x, y = grid[:, None].unbind(-1)
    height, width = image.shape[-2:]
    return _compose(image, ((x + 1) * width - 1) / 2, ((y + 1) * height - 1) / 2, border)
