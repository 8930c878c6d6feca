"""Pictures in rows, what is looked at in them, and the frame of a plot."""

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

GAP = 1.1  # from one picture to the next, which are all as wide as 1


def strip(axes: Axes, images: Tensor, title: str) -> None:
    """Pictures ``(number, channels, height, width)`` in a row, dark on light if they are grey."""
    for number, image in enumerate(images.cpu().movedim(1, -1)):
        left = GAP * number
        extent = (left, left + 1, 1, 0)
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=1, extent=extent, interpolation="nearest")
        axes.add_patch(Rectangle((left, 0), 1, 1, fill=False, color="#bbbbbb", linewidth=0.8))
    axes.set_ylabel(title, rotation=0, ha="right", va="center")
    axes.set(xticks=[], yticks=[], xlim=(-0.05, GAP * len(images)), ylim=(1.05, -0.05))
    axes.spines[:].set_visible(False)


def tidy(axes: Axes) -> None:
    """A light grid, and a frame at the left and below only."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def alignment(axes: Axes, weights: Tensor, source: list[str], target: list[str]) -> None:
    """Where in a sentence each word of another one looks."""
    axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(source)), source, rotation=90)
    axes.set_yticks(range(len(target)), target)
    axes.tick_params(length=0)


def outline(axes: Axes, theta: Tensor, colours: Sequence[str]) -> None:
    """The edges of the parts ``(number, parts, 2, 3)`` that a map finds, on a row of pictures."""
    corners = torch.tensor([[-1.0, 1, 1, -1, -1], [-1, -1, 1, 1, -1], [1, 1, 1, 1, 1]])
    for number, places in enumerate((theta.cpu() @ corners + 1) / 2):
        for (x, y), colour in zip(places, colours, strict=False):
            axes.plot(x + GAP * number, y, color=colour, linewidth=1.8)


def boxes(axes: Axes, places: Tensor, **style: Any) -> None:
    """The boxes ``(number, boxes, 4)`` on a row of pictures; those of width 0 are left out."""
    for number, row in enumerate(places.cpu()):
        for x, y, width, height in row[row[:, 2] > 0].tolist():
            corner = (x + GAP * number, y)
            axes.add_patch(Rectangle(corner, width, height, fill=False, **style))
