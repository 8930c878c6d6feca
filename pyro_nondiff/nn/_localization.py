"""Where to look: the last layer of a localisation network."""

from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import NonDiffError

__all__ = ["Localization"]

# How each number that is predicted moves the map: theta = start + sum of number times matrix.
_MAPS: dict[str, list[list[list[float]]]] = {
    "translation": [[[0, 0, 1], [0, 0, 0]], [[0, 0, 0], [0, 0, 1]]],
    "attention": [[[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [0, 0, 0]], [[0, 0, 0], [0, 0, 1]]],
    "affine": [[[float(n == 3 * i + j) for j in range(3)] for i in range(2)] for n in range(6)],
}
_STARTS: dict[str, Tensor] = {
    **dict.fromkeys(_MAPS, torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])),
    "box": torch.tensor([0.0, 0.0, 1.0, 1.0]),
}


class Localization(nn.Module):
    r"""A linear layer that says where to look, and looks at a given place before it has learnt.

    Its weights and biases are 0 at first: what it returns is then ``start``, for any features. The
    numbers :math:`d` that it computes from features move that place:

    =================  ====  ==============================================================
    ``place``          d     what is returned, from a start :math:`\theta_0` or box
    =================  ====  ==============================================================
    ``"affine"``       6     :math:`\theta_0 + ((d_1, d_2, d_3), (d_4, d_5, d_6))`
    ``"attention"``    3     :math:`\theta_0 + ((d_1, 0, d_2), (0, d_1, d_3))`
    ``"translation"``  2     :math:`\theta_0 + ((0, 0, d_1), (0, 0, d_2))`
    ``"box"``          4     a box whose middle is moved by :math:`(d_1 w_0, d_2 h_0)`, of
                             width :math:`w_0 e^{d_3}` and height :math:`h_0 e^{d_4}`
    =================  ====  ==============================================================

    The first three are maps for :func:`pyro_nondiff.ops.warp`, the last is for
    :func:`pyro_nondiff.ops.crop`. Under :class:`pyro_nondiff.handlers.SpatialTransformer` the layer
    is trained by what is done with the part that is cut out; with a loss of its own, as the boxes
    of a detector, it needs no handler.

    Arguments:
        in_features: The size of the features.
        place: What is returned.
        start: The place at first, which broadcasts: shape ``batch + shape + (2, 3)``, or
            ``+ (4,)`` for a box. The whole image if it is None. It is a buffer.
        shape: Of several places for one vector of features.

    Shapes:
        Features of shape ``batch + (in_features,)`` give places of shape
        ``batch + shape + (2, 3)`` or ``batch + shape + (4,)``.

    Raises:
        NonDiffError: For a ``place`` that is not in the table, or a ``start`` that is none.

    Example:
        >>> from torch import nn
        >>> from pyro_nondiff.handlers import SpatialTransformer
        >>> from pyro_nondiff.nn import Localization
        >>> from pyro_nondiff.ops import warp
        >>> where = nn.Sequential(
        ...     nn.Flatten(-3), nn.Linear(64, 32), nn.ReLU(), Localization(32, "attention")
        ... )
        >>> image = torch.rand(10, 1, 8, 8)
        >>> with SpatialTransformer():
        ...     part = warp("part", image, where(image), size=(8, 8))
        >>> bool((part == image).all())
        True
        >>> Localization(32, "box", start=torch.tensor([0.25, 0.25, 0.5, 0.5]))(torch.rand(32))
        tensor([0.2500, 0.2500, 0.5000, 0.5000], grad_fn=<CatBackward0>)

    References:
        | Spatial Transformer Networks (Jaderberg et al., 2015)
        | https://arxiv.org/abs/1506.02025
        | Rich feature hierarchies for accurate object detection and semantic segmentation (Girshick
          et al., 2014), whose boxes move in this way
        | https://arxiv.org/abs/1311.2524
    """

    start: Tensor
    maps: Tensor | None

    def __init__(
        self,
        in_features: int,
        place: Literal["affine", "attention", "translation", "box"] = "affine",
        *,
        start: Tensor | None = None,
        shape: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        if place not in _STARTS:
            raise NonDiffError(
                f"Localization: place is one of {list(_STARTS)}, found '{place}'. Other maps are "
                "made of numbers that a linear layer gives."
            )
        whole = _STARTS[place].to(torch.get_default_dtype())
        start = whole if start is None else start.detach().clone()
        if start.shape[-whole.dim() :] != whole.shape or not start.is_floating_point():
            raise NonDiffError(
                f"Localization: the start of place='{place}' is of floats, of shape "
                f"batch + {tuple(whole.shape)}, found {start.dtype} of shape {tuple(start.shape)}."
            )
        numbers = len(_MAPS[place]) if place in _MAPS else 4
        self.place, self.shape = place, tuple(shape)
        self.linear = nn.Linear(in_features, int(torch.Size(shape).numel()) * numbers)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("start", start)
        maps = start.new_tensor(_MAPS[place]) if place in _MAPS else None
        self.register_buffer("maps", maps, persistent=False)

    def forward(self, features: Tensor, start: Tensor | None = None) -> Tensor:
        """Where to look: see :class:`Localization`.

        Arguments:
            features: Shape ``batch + (in_features,)``.
            start: A place to start from in this call: one that was found before, to be bettered.
        """
        start = self.start if start is None else start
        numbers: Tensor = self.linear(features).unflatten(-1, (*self.shape, -1))
        if self.maps is not None:
            shift = (numbers[..., None, None] * self.maps).sum(-3)
            return start + shift
        corner, sides = start[..., :2], start[..., 2:]
        moved, grown = numbers[..., :2] * sides, sides * numbers[..., 2:].exp()
        return torch.cat([corner + (moved + (sides - grown) / 2), grown], -1)

    def extra_repr(self) -> str:
        """What the layer's ``repr`` says."""
        return f"place={self.place!r}, shape={self.shape}"
