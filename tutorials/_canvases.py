"""Canvases made from digits: moved, among clutter, or several on one."""

from dataclasses import dataclass

import torch
from _digits import Split
from torch import Tensor


@dataclass(frozen=True)
class Canvases:
    """Pictures that are made of digits, and where each digit lies.

    Arguments:
        images: Shape ``(number, size, size)``, in [0, 1].
        labels: Shape ``(number, most)``: each object's digit, in no order; -1 for no object.
        boxes: Shape ``(number, most, 4)``: the ink of each digit, as ``(x0, y0, w, h)`` in units of
            the canvas; 0 for no object.
    """

    images: Tensor
    labels: Tensor
    boxes: Tensor

    @property
    def counts(self) -> Tensor:
        """How many digits each canvas has."""
        return (self.labels >= 0).sum(-1)

    def __len__(self) -> int:
        return len(self.images)

    def at(self, indices: Tensor | slice) -> "Canvases":
        """Some of them."""
        return Canvases(self.images[indices], self.labels[indices], self.boxes[indices])

    def to(self, device: torch.device) -> "Canvases":
        """The same on a device."""
        moved = (t.to(device) for t in (self.images, self.labels, self.boxes))
        return Canvases(*moved)


def paste(canvases: Tensor, patches: Tensor, top: Tensor, left: Tensor) -> None:
    """Draw a patch ``(number, h, w)`` on each canvas in place; the brighter pixel stays."""
    rows = (top[:, None] + torch.arange(patches.shape[1]))[:, :, None]
    columns = (left[:, None] + torch.arange(patches.shape[2]))[:, None, :]
    which = torch.arange(len(canvases))[:, None, None]
    canvases[which, rows, columns] = canvases[which, rows, columns].maximum(patches)


def ink_boxes(images: Tensor) -> Tensor:
    """The box ``(left, top, right, bottom)`` around what is brighter than 1/4, in pixels."""
    ink = images > 0.25

    def ends(lines: Tensor) -> tuple[Tensor, Tensor]:
        last = lines.shape[1] - lines.flip(1).int().argmax(1)
        return lines.int().argmax(1), last

    (left, right), (top, bottom) = ends(ink.any(1)), ends(ink.any(2))
    return torch.stack([left, top, right, bottom], -1)


def with_digits(
    digits: Split,
    number: int,
    size: int,
    *,
    most: int = 1,
    least: int = 1,
    overlap: bool = False,
    seed: int = 0,
) -> Canvases:
    """Canvases with ``least`` to ``most`` digits each, at places of no order.

    Arguments:
        digits: Where the digits are taken from, each as often as any other.
        number: How many canvases are made.
        size: Their height and width in pixels.
        most: The most digits on one; every count from ``least`` on is as likely.
        least: The fewest.
        overlap: Whether the boxes of the digits' ink may overlap.
        seed: Of the generator. The same seed makes the same canvases.
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    counts = integers(least, most + 1, number)
    chosen = integers(0, len(digits), number, most)
    side = digits.images.shape[-1]
    ink = ink_boxes(digits.images)[chosen]
    places = integers(0, size - side + 1, number, most, 2)
    present = torch.arange(most) < counts[:, None]
    boxes = ink + places.repeat(1, 1, 2)
    while not overlap and (crowded := _overlapping(boxes, present)).any():
        fresh = integers(0, size - side + 1, number, most, 2)
        places = torch.where(crowded[:, None, None], fresh, places)
        boxes = ink + places.repeat(1, 1, 2)
    canvases = torch.zeros(number, size, size)
    for k in range(most):
        patches = digits.images[chosen[:, k]] * present[:, k, None, None]
        paste(canvases, patches, places[:, k, 1], places[:, k, 0])
    corner, extent = boxes[..., :2], boxes[..., 2:] - boxes[..., :2]
    placed = torch.cat([corner, extent], -1) / size * present[..., None]
    return Canvases(canvases, digits.labels[chosen].where(present, torch.tensor(-1)), placed)


def clutter(canvases: Tensor, digits: Split, pieces: int, side: int = 8, seed: int = 0) -> Tensor:
    """Copies of canvases with small pieces of other digits on them, as in cluttered MNIST."""
    generator = torch.Generator().manual_seed(seed)
    number, size = len(canvases), canvases.shape[-1]
    cluttered = canvases.clone()
    for _ in range(pieces):
        chosen = torch.randint(len(digits), (number,), generator=generator)
        # From the middle of a digit, where there is ink.
        spare = digits.images.shape[-1] - side - 8
        offset = 4 + torch.randint(0, spare + 1, (number, 2), generator=generator)
        rows = (offset[:, :1] + torch.arange(side))[:, :, None]
        columns = (offset[:, 1:] + torch.arange(side))[:, None, :]
        patches = digits.images[chosen[:, None, None], rows, columns]
        place = torch.randint(0, size - side + 1, (number, 2), generator=generator)
        paste(cluttered, patches, place[:, 0], place[:, 1])
    return cluttered


def _overlapping(boxes: Tensor, present: Tensor) -> Tensor:
    """Which canvases have two present digits whose boxes share a pixel."""
    low = boxes[:, :, None, :2].maximum(boxes[:, None, :, :2])
    high = boxes[:, :, None, 2:].minimum(boxes[:, None, :, 2:])
    shared = ((high - low) > 0).all(-1) & present[:, :, None] & present[:, None, :]
    return shared.triu(1).any(-1).any(-1)
