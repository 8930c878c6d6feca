"""Smoothing by interpolation: the spatial transformer."""

from typing import Literal, Protocol

from torch import Tensor

from ..distributions import Temperature
from ..errors import NonDiffError
from ..ops import crop, paste, warp
from ..ops._grid import Grid
from ..ops._spatial import crop_grid, paste_grid, warp_grid
from ._bilinear import Bilinear
from ._gaussian import Gaussian
from ._multiscale import Multiscale
from .base import AbstractHandler, Sites

__all__ = ["SpatialTransformer"]


class Filter(Protocol):
    """How an image is read between its pixels, and a patch written there."""

    def read(self, image: Tensor, grid: Grid) -> Tensor:
        """What an image has at some positions."""

    def write(self, patch: Tensor, grid: Grid, size: tuple[int, int]) -> Tensor:
        """A canvas of 0 with a patch at some positions: the adjoint of ``read``."""


class SpatialTransformer(AbstractHandler):
    r"""Crops, warps and pastes between pixels, differentiable in the image and in the place.

    An image :math:`U` is read at a point :math:`(x, y)` through a filter :math:`k` around it, and
    ``paste`` is the adjoint: what a point reads, it writes to, in the same shares.

    .. math:: V = \sum_{i,j} U_{ij} \, k(x - j) \, k(y - i)

    ================  ====================================================================
    ``mode``          filter
    ================  ====================================================================
    ``"bilinear"``    :math:`k(d) = \max(0, 1 - |d|)`: the four pixels around the point
    ``"multiscale"``  the mean of that over ``levels`` copies of the image, each of half the
                      resolution of the one before
    ``"gaussian"``    the share of a Gaussian of width ``sigma`` that lies over the pixel, as
                      the filters of DRAW
    ================  ====================================================================

    The gradient to the place is that of the sum. For the bilinear filter, with rows alike,

    .. math:: \frac{\partial V}{\partial x} = \sum_{i,j} U_{ij} \max(0, 1 - |y - i|) \,
        \begin{cases} 1 & x < j \le x + 1 \\ -1 & x - 1 < j \le x \\ 0 & \text{else} \end{cases}

    which at a pixel's centre, where the two sides differ, is the derivative on the right. It sees
    two pixels across: a box that has to find something further away has no gradient to it. The
    other two modes see as far as their filters reach, ``2 ** (levels - 1)`` pixels or some
    ``sigma``, and blur what they read: begin with them, and go on with ``"bilinear"``. ``sigma``
    may be a schedule that does so.

    All modes have second derivatives, so control variates that are trained by their variance can
    be used. Positions and weights are computed in float32 at least, also under autocast, and the
    identity is exact. Outputs of more than 32768 numbers are read by torch's kernel, which rounds
    positions by :math:`2^{-24}` of the image's side: there, at a pixel's centre, the derivative may
    be that on the left. On a GPU a paste, and the gradient to an image, are sums in no fixed order.

    Convention:
        Places are as for :func:`pyro_nondiff.ops.crop` and :func:`pyro_nondiff.ops.warp`: boxes
        ``(x0, y0, w, h)`` in units of the image's sides from its top left corner, ``theta`` from
        normalised output coordinates to those of the image, x first. With ``align_corners=False``
        boxes and the coordinates -1 and 1 end at the outer edges of the outer pixels, as in those
        ops; with ``align_corners=True`` at their centres. In :math:`x` and :math:`y` above the
        centre of pixel ``(0, 0)`` is 0.

        A negative width or height mirrors, a width of 0 repeats one column, a single output row
        or column looks at the middle, and each has its gradient. A place outside of the image
        reads the padding. Without Pyro's validation, a place that is NaN makes the value NaN, and
        an infinite one does so or reads the padding.

    Arguments:
        mode: The filter.
        padding: What lies outside: ``"zeros"``, or ``"border"``: the outer pixels go on for ever,
            and a paste adds there what is outside.
        align_corners: Where boxes and coordinates end.
        levels: Of ``"multiscale"``.
        sigma: Of ``"gaussian"``, in pixels of the image or canvas: a number, a tensor of one
            element, or a schedule.
        sites: As for :class:`AbstractHandler`.

    Raises:
        NonDiffError: For another mode or padding, for ``levels`` or ``sigma`` that are not
            positive; at an op, as :func:`pyro_nondiff.ops.crop`.

    Example:
        >>> from pyro_nondiff.handlers import SpatialTransformer
        >>> from pyro_nondiff.ops import crop
        >>> image = torch.arange(16.0).reshape(1, 4, 4)
        >>> box = torch.tensor([0.125, 0.25, 0.5, 0.5], requires_grad=True)
        >>> with SpatialTransformer():
        ...     window = crop("window", image, box, (2, 2))
        >>> window.detach()
        tensor([[[4.5000, 5.5000],
                 [8.5000, 9.5000]]])
        >>> window.sum().backward()
        >>> box.grad
        tensor([16., 64.,  8., 32.])

    References:
        | Spatial Transformer Networks (Jaderberg et al., 2015)
        | https://arxiv.org/abs/1506.02025
        | DRAW: A Recurrent Neural Network For Image Generation (Gregor et al., 2015)
        | https://arxiv.org/abs/1502.04623
    """

    def __init__(
        self,
        mode: Literal["bilinear", "multiscale", "gaussian"] = "bilinear",
        padding: Literal["zeros", "border"] = "zeros",
        *,
        align_corners: bool = False,
        levels: int = 4,
        sigma: Temperature = 1.0,
        sites: Sites = None,
    ) -> None:
        super().__init__(sites)
        for name, given in (("levels", levels), ("sigma", sigma)):
            if isinstance(given, int | float) and not given > 0:
                raise NonDiffError(f"SpatialTransformer: {name} must be positive, found {given}.")
        paddings = {"zeros": False, "border": True}
        if padding not in paddings:
            raise _unknown("padding", padding, list(paddings))
        border = paddings[padding]
        filters: dict[str, Filter] = {
            "bilinear": Bilinear(border),
            "multiscale": Multiscale(border, levels),
            "gaussian": Gaussian(border, sigma),
        }
        if mode not in filters:
            raise _unknown("mode", mode, list(filters))
        self.filter = filters[mode]
        self.align_corners = align_corners


def _unknown(argument: str, given: str, known: list[str]) -> NonDiffError:
    return NonDiffError(f"SpatialTransformer: {argument} is one of {known}, found '{given}'.")


@SpatialTransformer.rule(crop)
def _(
    handler: SpatialTransformer, name: str, image: Tensor, box: Tensor, size: tuple[int, int]
) -> Tensor:
    return handler.filter.read(image, crop_grid(name, image, box, size, handler.align_corners))


@SpatialTransformer.rule(warp)
def _(
    handler: SpatialTransformer, name: str, image: Tensor, theta: Tensor, size: tuple[int, int]
) -> Tensor:
    return handler.filter.read(image, warp_grid(name, image, theta, size, handler.align_corners))


@SpatialTransformer.rule(paste)
def _(
    handler: SpatialTransformer, name: str, patch: Tensor, box: Tensor, size: tuple[int, int]
) -> Tensor:
    grid = paste_grid(name, patch, box, size, handler.align_corners)
    return handler.filter.write(patch, grid, size)
