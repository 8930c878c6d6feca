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


def curves(axes: Axes, runs: dict[str, list[dict[str, Any]]], colours: Sequence[str]) -> None:
    """A line for each name: the median over its runs of ``run["curve"]``, points ``(x, y)``.

    With a thin line for each run, where there are several.
    """
    for (name, found), colour in zip(runs.items(), colours, strict=True):
        points = torch.tensor([run["curve"] for run in found])
        axes.plot(*points.median(0).values.T, color=colour, label=name, linewidth=2)
        for line in points if len(points) > 1 else ():
            axes.plot(*line.T, color=colour, linewidth=0.7, alpha=0.4)
    axes.legend(frameon=False)
    tidy(axes)


def alignment(axes: Axes, weights: Tensor, source: list[str], target: list[str]) -> None:
    """Where in a sentence each word of another one looks."""
    axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(source)), source, rotation=90)
    axes.set_yticks(range(len(target)), target)
    axes.tick_params(length=0)


def cut_out(
    figure: Any, images: Tensor, theta: Tensor, parts: dict[str, Tensor], colours: Sequence[str]
) -> None:
    """Pictures in a row, the outlines of what a map cuts out of them, and below it the parts."""
    picture, *below = figure.subplots(1 + len(parts), 1)
    strip(picture, _visible(images), "picture")
    _outline(picture, theta, colours)
    for axes, (title, seen) in zip(below, parts.items(), strict=True):
        strip(axes, _visible(seen), title)


def boxes(axes: Axes, places: Tensor, **style: Any) -> None:
    """The boxes ``(number, boxes, 4)`` on a row of pictures; those of width 0 are left out."""
    for number, row in enumerate(places.cpu()):
        for x, y, width, height in row[row[:, 2] > 0].tolist():
            corner = (x + GAP * number, y)
            axes.add_patch(Rectangle(corner, width, height, fill=False, **style))


def looked_at(axes: Axes, image: Tensor, weights: Tensor) -> None:
    """A picture ``(channels, height, width)``, dark on light, and over it a grid of weights."""
    extent = (0, 1, 1, 0)
    axes.imshow(1 - image.cpu().expand(3, -1, -1).movedim(0, -1), extent=extent)
    red, strength = torch.ones_like(weights), 0.7 * (weights / weights.max()).sqrt()
    axes.imshow(red, cmap="autumn_r", vmin=0, vmax=1, extent=extent, alpha=strength)
    axes.set(xticks=[], yticks=[])


def _visible(images: Tensor) -> Tensor:
    """Two channels as a grey and a green ink; three, of -1/2 to 1/2, as colours of 0 to 1."""
    if images.shape[1] == 2:
        absorbed = torch.tensor([[0.8, 0.8, 0.8], [0.9, 0.3, 0.8]], device=images.device)
        return (1 - torch.einsum("nchw,cr->nrhw", images, absorbed)).clamp(0, 1)
    return images + 0.5 if images.shape[1] == 3 else images


def _outline(axes: Axes, theta: Tensor, colours: Sequence[str]) -> None:
    """The edges of the parts ``(number, parts, 2, 3)`` that a map finds, on a row of pictures."""
    corners = torch.tensor([[-1.0, 1, 1, -1, -1], [-1, -1, 1, 1, -1], [1, 1, 1, 1, 1]])
    for number, places in enumerate((theta.cpu() @ corners + 1) / 2):
        for (x, y), colour in zip(places, colours, strict=False):
            axes.plot(x + GAP * number, y, color=colour, linewidth=1.8)
