"""Where the pixels of an output look in an image.

Positions count pixels of the image: (0, 0) is the centre of the top left pixel, x runs along the
width. They are computed from the middle of the output outwards, so that the identity has whole
numbers exactly, and in float32 at least.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._whole import whole

__all__ = ["Grid", "box_grid", "theta_grid", "wide"]


class Grid(NamedTuple):
    """The positions that an output of shape ``batch + (C, h, w)`` looks at.

    Both parts broadcast to ``batch + (1, h, w)``. Those of a box have size 1 in the dimension that
    they do not depend on.

    Arguments:
        x: Positions along the width.
        y: Positions along the height.
    """

    x: Tensor
    y: Tensor


class _Side(NamedTuple):
    """One side of an image and of an output.

    Lengths end at the outer edges of the pixels, or at the centres of the outer pixels if corners
    are aligned.

    Arguments:
        start: Where the image starts, in pixels from the centre of its first.
        image: The image's length.
        output: The output's length.
        steps: The output's pixels, counted from their middle.
    """

    start: float
    image: int
    output: int
    steps: Tensor

    @classmethod
    def of(cls, image: int, output: int, align_corners: bool, like: Tensor) -> "_Side":
        steps = torch.arange(output, dtype=like.dtype, device=like.device) - (output - 1) / 2
        if align_corners:
            # A single pixel lies in the middle, whatever the output's length.
            return cls(0.0, image - 1, max(output - 1, 1), steps)
        return cls(-0.5, image, output, steps)


def box_grid(
    box: Tensor, image: tuple[int, int], size: tuple[int, int], align_corners: bool = False
) -> Grid:
    """The positions of a box.

    Arguments:
        box: ``(x0, y0, w, h)`` in units of the image's sides, shape ``batch + (4,)``.
        image: The image's height and width.
        size: The output's height and width.
        align_corners: Whether a box ends at the centres of the outer pixels.
    """
    x0, y0, width, height = wide(box)[..., None, None, None, :].unbind(-1)

    def along(start: Tensor, length: Tensor, side: _Side) -> Tensor:
        inside = side.steps * (side.image / side.output) + side.image / 2
        return length * inside + (start * side.image + side.start)

    x = along(x0, width, _Side.of(image[1], size[1], align_corners, x0))
    y = along(y0, height, _Side.of(image[0], size[0], align_corners, y0))
    return Grid(x, y.mT)


@whole
def theta_grid(
    theta: Tensor, image: tuple[int, int], size: tuple[int, int], align_corners: bool = False
) -> Grid:
    """The positions of an affine or projective map of normalised coordinates.

    Arguments:
        theta: Shape ``batch + (2, 3)`` or ``batch + (3, 3)``.
        image: The image's height and width.
        size: The output's height and width.
        align_corners: Whether -1 and 1 are the centres of the outer pixels.
    """
    rows = wide(theta)[..., None, None, None, :, :].unbind(-2)
    across = _Side.of(image[1], size[1], align_corners, rows[0])
    down = _Side.of(image[0], size[0], align_corners, rows[0])

    def moved(row: Tensor, unit: float) -> Tensor:
        a, b, c = row.unbind(-1)
        sideways = a * (2 * unit / across.output) * across.steps
        return sideways + b * (2 * unit / down.output) * down.steps[:, None] + c * unit

    x, y = moved(rows[0], across.image / 2), moved(rows[1], down.image / 2)
    if len(rows) == 3:
        depth = moved(rows[2], 1.0)
        least = torch.finfo(depth.dtype).eps
        # On the horizon, where the depth is 0, a point lies outside of every image.
        depth = torch.where(depth.abs() < least, least, depth)
        x, y = x / depth, y / depth
    middle_x, middle_y = across.image / 2 + across.start, down.image / 2 + down.start
    return Grid(x + middle_x, y + middle_y)


def wide(x: Tensor) -> Tensor:
    """A tensor in at least float32, in which positions and weights are computed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
