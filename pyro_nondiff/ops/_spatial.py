"""Parts of images: cut out of them, warped, and put on a canvas, with the nearest pixel for each.

What an op takes is checked here, for the handlers too.
"""

from collections.abc import Sequence

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from ..errors import NonDiffError
from ._grid import Grid, box_grid, theta_grid
from ._op import op
from ._pixels import put_nearest, take_nearest

__all__ = ["canvas_shape", "crop", "crop_grid", "paste", "paste_grid", "warp", "warp_grid"]


@op
def crop(name: str, image: Tensor, box: Tensor, size: tuple[int, int]) -> Tensor:
    r"""The part of an image in a box, at a size of its own, by the nearest pixel.

    The value at row :math:`i` and column :math:`j` is the pixel that the point

    .. math:: \left(x_0 + \frac{j + 1/2}{w'} w, \; y_0 + \frac{i + 1/2}{h'} h\right)

    lies in, for a ``size`` of :math:`(h', w')`; 0 outside of the image. It is what the pooling of
    detectors does: the gradient goes to the image, and none to the box. Under
    :class:`pyro_nondiff.handlers.SpatialTransformer` there is one.

    Convention:
        A box is ``(x0, y0, w, h)`` in units of the image's width and height. Its origin is the
        image's top left corner, x runs to the right and y down: ``(0, 0, 1, 1)`` is the whole
        image, and pixel ``(0, 0)`` has its centre half a pixel from both edges. A negative width
        or height mirrors: ``(1, 0, -1, 1)`` is the whole image from right to left. A width of 0
        repeats one column. An output of a single row or column looks at the middle of the box.

    Arguments:
        name: The op's name, unique in the program.
        image: Shape ``batch + (C, H, W)``, of floats.
        box: Shape ``batch + (4,)``. The two batch shapes broadcast, and an image that many boxes
            share is not copied.
        size: The output's height and width.

    Returns:
        Shape ``batch + (C,) + size``, of the image's dtype.

    Raises:
        NonDiffError: For shapes that do not fit or a dtype that is no float; with Pyro's
            validation on, for a box that is not finite. With validation off, such a box gives NaN.

    Example:
        >>> from pyro_nondiff.ops import crop
        >>> image = torch.arange(16.0).reshape(1, 4, 4)
        >>> crop("window", image, torch.tensor([0.25, 0.5, 0.5, 0.5]), (2, 2))
        tensor([[[ 9., 10.],
                 [13., 14.]]])

    References:
        | Fast R-CNN (Girshick, 2015)
        | https://arxiv.org/abs/1504.08083
    """
    return take_nearest(image, crop_grid(name, image, box, size))


@op
def warp(name: str, image: Tensor, theta: Tensor, size: tuple[int, int]) -> Tensor:
    r"""An image seen through an affine or projective map, by the nearest pixel.

    The value at a point :math:`(u, v)` of the output is the pixel at :math:`(x, y)` of the image,

    .. math:: \lambda \begin{pmatrix} x \\ y \\ 1 \end{pmatrix}
        = \theta \begin{pmatrix} u \\ v \\ 1 \end{pmatrix},

    and 0 outside of it; for a ``theta`` of two rows :math:`\lambda = 1`. The gradient goes to the
    image, and none to ``theta``. Under :class:`pyro_nondiff.handlers.SpatialTransformer` there is
    one.

    Convention:
        Coordinates are normalised, of output and image alike, as in torch's ``affine_grid``: -1
        and 1 are the outer edges of the outer pixels, x runs to the right and y down, and x comes
        first. ``theta`` maps the output to the image: to find a part at half the size, scale by
        0.5. A singular ``theta`` repeats a line or a pixel. The points of a projective map whose
        third coordinate is 0 lie outside of the image.

    Arguments:
        name: The op's name, unique in the program.
        image: Shape ``batch + (C, H, W)``, of floats.
        theta: Shape ``batch + (2, 3)``, or ``batch + (3, 3)``. The two batch shapes broadcast.
        size: The output's height and width.

    Returns:
        Shape ``batch + (C,) + size``, of the image's dtype.

    Raises:
        NonDiffError: As for :func:`crop`.

    Example:
        >>> from pyro_nondiff.ops import warp
        >>> image = torch.arange(9.0).reshape(1, 3, 3)
        >>> quarter_turn = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]])
        >>> warp("turned", image, quarter_turn, (3, 3))
        tensor([[[2., 5., 8.],
                 [1., 4., 7.],
                 [0., 3., 6.]]])

    References:
        | Spatial Transformer Networks (Jaderberg et al., 2015)
        | https://arxiv.org/abs/1506.02025
    """
    return take_nearest(image, warp_grid(name, image, theta, size))


@op
def paste(name: str, patch: Tensor, box: Tensor, size: tuple[int, int]) -> Tensor:
    r"""A patch, put into a box of an empty canvas: the adjoint of :func:`crop`.

    .. math:: \langle \mathrm{crop}(U), P \rangle = \langle U, \mathrm{paste}(P) \rangle

    Each pixel of the patch is *added* to the pixel of the canvas that :func:`crop` would read it
    from; what lies outside is lost. So nothing is divided by the box's size, and a box of any size,
    also of 0, has a value. The sum of the patch is the sum of the canvas. To keep the brightness
    instead, multiply by the number of canvas pixels that a patch pixel covers, ``w * W / w'``
    times ``h * H / h'``. If that is more than 1, the nearest pixels leave gaps between them: use a
    larger patch, or a handler whose filter is as wide.

    The gradient goes to the patch, and none to the box. Under
    :class:`pyro_nondiff.handlers.SpatialTransformer` there is one.

    Convention:
        Boxes are as for :func:`crop`, in units of the canvas's width and height.

    Arguments:
        name: The op's name, unique in the program.
        patch: Shape ``batch + (C, h', w')``, of floats.
        box: Shape ``batch + (4,)``. The two batch shapes broadcast.
        size: The canvas's height and width.

    Returns:
        Shape ``batch + (C,) + size``, of the patch's dtype.

    Raises:
        NonDiffError: As for :func:`crop`.

    Example:
        >>> from pyro_nondiff.ops import paste
        >>> patch = torch.tensor([[[1.0, 2.0]]])
        >>> paste("object", patch, torch.tensor([0.5, 0.0, 0.5, 0.5]), (2, 4))
        tensor([[[0., 0., 1., 2.],
                 [0., 0., 0., 0.]]])

    References:
        | DRAW: A Recurrent Neural Network For Image Generation (Gregor et al., 2015), whose write
          is the adjoint of its read
        | https://arxiv.org/abs/1502.04623
    """
    grid = paste_grid(name, patch, box, size)
    return put_nearest(patch, grid, canvas_shape(patch, grid, size))


def crop_grid(
    name: str, image: Tensor, box: Tensor, size: tuple[int, int], align_corners: bool = False
) -> Grid:
    """Where a crop looks, its arguments checked."""
    _check("crop", name, image, box, size, ((4,),))
    return box_grid(box, (image.shape[-2], image.shape[-1]), size, align_corners)


def warp_grid(
    name: str, image: Tensor, theta: Tensor, size: tuple[int, int], align_corners: bool = False
) -> Grid:
    """Where a warp looks, its arguments checked."""
    _check("warp", name, image, theta, size, ((2, 3), (3, 3)))
    return theta_grid(theta, (image.shape[-2], image.shape[-1]), size, align_corners)


def paste_grid(
    name: str, patch: Tensor, box: Tensor, size: tuple[int, int], align_corners: bool = False
) -> Grid:
    """Where on its canvas a patch comes, the arguments checked."""
    _check("paste", name, patch, box, size, ((4,),))
    return box_grid(box, size, (patch.shape[-2], patch.shape[-1]), align_corners)


def canvas_shape(patch: Tensor, grid: Grid, size: tuple[int, int]) -> torch.Size:
    """The shape of the canvas that a patch is put on."""
    batch = torch.broadcast_shapes(patch.shape[:-3], grid.x.shape[:-3])
    return torch.Size([*batch, patch.shape[-3], *size])


def _check(
    kind: str,
    name: str,
    image: Tensor,
    place: Tensor,
    size: Sequence[int],
    events: Sequence[tuple[int, ...]],
) -> None:
    """Refuses what an op cannot serve, with the op's name."""
    what = "box" if events == ((4,),) else "theta"
    fault = None
    if image.dim() < 3 or 0 in image.shape[-3:] or not image.is_floating_point():
        found = f"{image.dtype} of shape {tuple(image.shape)}"
        fault = f"images are floats of shape batch + (channels, height, width), found {found}"
    elif len(size) != 2 or min(size) < 1:
        fault = f"size is (height, width), both at least 1, found {size}"
    elif tuple(place.shape[-len(events[0]) :]) not in events or not place.is_floating_point():
        found = f"{place.dtype} of shape {tuple(place.shape)}"
        shapes = " or ".join(f"batch + {event}" for event in events)
        fault = f"{what} is of floats, of shape {shapes}, found {found}"
    elif not _broadcast(image.shape[:-3], place.shape[: -len(events[0])]):
        shapes = f"{tuple(image.shape)} and {tuple(place.shape)}"
        fault = f"the batch shapes of image and {what} do not broadcast, found {shapes}"
    elif is_validation_enabled() and not place.is_meta and not place.isfinite().all():
        fault = f"{what} has values that are not finite. Look at what computes it"
    if fault:
        raise NonDiffError(f"op '{name}': {kind}: {fault}.")


def _broadcast(first: Sequence[int], second: Sequence[int]) -> bool:
    pairs = zip(reversed(first), reversed(second), strict=False)
    return all(a == b or 1 in (a, b) for a, b in pairs)
