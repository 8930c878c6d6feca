"""Boxes of detectors, ``(x0, y0, w, h)``: their overlap, which to keep, and how many are right."""

import torch
from torch import Tensor


def iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of each box ``(..., n, 4)`` with each of ``(..., m, 4)``."""
    low, sides = boxes[..., None, :].split(2, -1)
    other_low, other_sides = others[..., None, :, :].split(2, -1)
    shared = (low + sides).minimum(other_low + other_sides) - low.maximum(other_low)
    area = shared.clamp(min=0).prod(-1)
    return area / (sides.prod(-1) + other_sides.prod(-1) - area)


def pick(boxes: Tensor, which: Tensor) -> Tensor:
    """The boxes ``(..., n, 4)`` at the numbers ``(..., m)``."""
    return boxes.gather(-2, which[..., None].expand(*which.shape, 4))


def middle_cells(boxes: Tensor, present: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """Which of ``grid * grid`` cells have the middle of a box that is present, and that box.

    Arguments:
        boxes: Shape ``(number, most, 4)``.
        present: Shape ``(number, most)``.
        grid: The number of cells along a side.
    """
    column, row = ((boxes[..., :2] + boxes[..., 2:] / 2) * grid).long().unbind(-1)
    cells = torch.arange(grid**2, device=boxes.device)[:, None]
    inside = ((row * grid + column)[:, None] == cells) & present[:, None]
    return inside.any(-1), pick(boxes, inside.int().argmax(-1))


def survivors(boxes: Tensor, scores: Tensor, least: float, most_shared: float) -> Tensor:
    """Which boxes have at least a score, and share little with each that is kept and scores more.

    Arguments:
        boxes: Shape ``(number, n, 4)``, the highest score first.
        scores: Shape ``(number, n)``.
        least: The score that is asked for.
        most_shared: The largest IoU of two that are kept.
    """
    kept = scores >= least
    shared = iou(boxes, boxes) > most_shared
    for n in range(1, boxes.shape[1]):
        kept[:, n] &= ~(shared[:, n, :n] & kept[:, :n]).any(-1)
    return kept


def right_detections(
    boxes: Tensor, labels: Tensor, truth: Tensor, true_labels: Tensor, least: float
) -> Tensor:
    """The number of the object that each detection finds, -1 for none; an object is found once.

    Arguments:
        boxes: Shape ``(number, n, 4)``, the surest first.
        labels: Shape ``(number, n)``; -1 for what is no detection.
        truth: The boxes of the objects, shape ``(number, most, 4)``.
        true_labels: Shape ``(number, most)``; -1 for no object.
        least: The IoU that a detection needs with an object of its label.
    """
    overlap = iou(boxes, truth)
    able = (labels[..., None] == true_labels[:, None]) & (overlap >= least)
    free, found = true_labels >= 0, torch.full_like(labels, -1)
    for n in range(labels.shape[1]):
        fit, which = overlap[:, n].where(able[:, n] & free, -1.0).max(-1)
        found[:, n] = which.where(fit >= 0, -1)
        free &= torch.arange(free.shape[1], device=free.device) != found[:, n, None]
    return found


def f1(found: Tensor, labels: Tensor, true_labels: Tensor) -> float:
    """The harmonic mean of precision and recall, in per cent."""
    detections, objects = (labels >= 0).sum(), (true_labels >= 0).sum()
    return 200 * float((found >= 0).sum()) / float(detections + objects)


def mean_iou(boxes: Tensor, truth: Tensor, found: Tensor) -> float:
    """The mean overlap of boxes with the objects that they find, see :func:`right_detections`."""
    fit = iou(boxes, truth).gather(-1, found.clamp(min=0)[..., None])[found >= 0]
    return float(fit.sum()) / max(len(fit), 1)


LEAST = [0.5 + 0.05 * n for n in range(10)]  # IoU of a right detection


def scores(
    found: dict[str, Tensor], truth: Tensor, true_labels: Tensor
) -> dict[str, float | list[tuple[float, float]]]:
    """How well digits are found: F1 as it depends on the IoU that is asked for, and mean overlaps.

    Arguments:
        found: ``boxes``, ``labels`` and ``regions``, the boxes before the last step.
        truth: As in :func:`right_detections`.
        true_labels: As there.
    """
    right = [
        right_detections(found["boxes"], found["labels"], truth, true_labels, least)
        for least in LEAST
    ]
    curve = [f1(which, found["labels"], true_labels) for which in right]
    return {
        "curve": [*zip(LEAST, curve, strict=True)],
        "f1": curve[0],
        "strict": curve[6],
        "iou": mean_iou(found["boxes"], truth, right[0]),
        "proposed": mean_iou(found["regions"], truth, right[0]),
    }
