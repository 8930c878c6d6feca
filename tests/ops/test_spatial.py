"""Crop, warp and paste by the nearest pixel: what they read, what they refuse."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.ops import _spatial, crop, paste, warp
from pyro_nondiff.ops._grid import Grid, box_grid

EPS = torch.finfo(torch.get_default_dtype()).eps
WHOLE = torch.tensor([0.0, 0.0, 1.0, 1.0])


def boxes(*batch: int) -> Tensor:
    """Boxes that partly stick out of the image."""
    return torch.cat([torch.rand(*batch, 2) - 0.3, torch.rand(*batch, 2) + 0.1], -1)


def theta_of(box: Tensor) -> Tensor:
    """The map that looks where a box does."""
    x0, y0, w, h = box.unbind(-1)
    zero = torch.zeros_like(w)
    rows = [torch.stack([w, zero, 2 * x0 + w - 1], -1), torch.stack([zero, h, 2 * y0 + h - 1], -1)]
    return torch.stack(rows, -2)


def pixel_by_pixel(image: Tensor, box: Tensor, size: tuple[int, int]) -> Tensor:
    """The crop of one image, as the docstring says it."""
    x0, y0, w, h = box.tolist()
    channels, height, width = image.shape
    found = torch.zeros(channels, *size)
    for i in range(size[0]):
        for j in range(size[1]):
            row = math.floor((y0 + (i + 0.5) / size[0] * h) * height)
            column = math.floor((x0 + (j + 0.5) / size[1] * w) * width)
            if 0 <= row < height and 0 <= column < width:
                found[:, i, j] = image[:, row, column]
    return found


def check_crop(size: tuple[int, int]) -> None:
    image, box = torch.rand(5, 2, 6, 7), boxes(5)
    found = crop("c", image, box, size)
    expected = [pixel_by_pixel(*pair, size) for pair in zip(image, box, strict=True)]
    # Pixels are copied: no tolerance.
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(4, 3), (1, 1), (13, 1)])
def test_crop_is_the_pixel_that_a_point_lies_in(size: tuple[int, int]) -> None:
    check_crop(size)


@pytest.mark.parametrize(
    "planted",
    [
        lambda grid: Grid(grid.x + 0.5, grid.y),
        lambda grid: Grid(grid.x, grid.y - 0.5),
        lambda grid: Grid(grid.x.flip(-1), grid.y),
        lambda grid: Grid(grid.y.mT, grid.x.mT),
    ],
    ids=["half a pixel right", "half a pixel up", "mirrored", "swapped"],
)
def test_planted_bug_in_positions_is_found(
    planted: Callable[[Grid], Grid], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_spatial, "box_grid", lambda *args: planted(box_grid(*args)))
    with pytest.raises(AssertionError, match="not equal"):
        check_crop((4, 4))


def test_whole_image_is_the_image() -> None:
    image = torch.rand(2, 3, 5, 7)
    assert torch.equal(crop("c", image, WHOLE, (5, 7)), image)
    assert torch.equal(warp("w", image, torch.eye(3), (5, 7)), image)
    assert torch.equal(warp("w", image, torch.eye(2, 3), (5, 7)), image)
    assert torch.equal(paste("p", image, WHOLE, (5, 7)), image)


def test_warp_looks_where_the_box_does() -> None:
    image, box = torch.rand(5, 1, 6, 7), boxes(5)
    found = warp("w", image, theta_of(box), (4, 3))
    assert torch.equal(found, crop("c", image, box, (4, 3)))


def test_warp_scales_a_projective_map_away() -> None:
    image, theta = torch.rand(1, 6, 6), torch.eye(3) + 0.1 * torch.randn(3, 3)
    # A power of two scales without rounding.
    assert torch.equal(warp("w", image, theta, (5, 5)), warp("w", image, -2 * theta, (5, 5)))


@pytest.mark.parametrize(
    ("box", "columns"),
    [
        ([1.0, 0.0, -1.0, 1.0], [2, 1, 0]),
        ([0.5, 0.0, 0.0, 1.0], [1, 1, 1]),
        ([1 / 3, 0.0, 1.0, 1.0], [1, 2, None]),
        ([-2.0, 0.0, 1.0, 1.0], [None, None, None]),
    ],
    ids=["mirrored", "no width", "sticks out", "outside"],
)
def test_boxes_at_the_limit(box: list[float], columns: list[int | None]) -> None:
    image = torch.rand(1, 2, 3)
    found = crop("c", image, torch.tensor(box), (2, 3))
    zero = torch.zeros(1, 2)
    expected = [zero if c is None else image[..., c] for c in columns]
    assert torch.equal(found, torch.stack(expected, -1))


def test_single_pixels() -> None:
    image = torch.rand(1, 3, 3)
    assert torch.equal(crop("c", image, WHOLE, (1, 1)), image[:, 1:2, 1:2])
    assert torch.equal(crop("c", image[:, :1, :1], WHOLE, (2, 2)), image[:, :1, :1].expand(1, 2, 2))


def test_paste_is_the_adjoint_of_crop() -> None:
    image, patch, box = torch.rand(5, 2, 6, 7), torch.rand(5, 2, 4, 3), boxes(5)
    read = (crop("c", image, box, (4, 3)) * patch).sum()
    written = (image * paste("p", patch, box, (6, 7))).sum()
    # Sums of 120 products below 1, in another order; 2e-12 in float64.
    torch.testing.assert_close(read, written, rtol=0, atol=1e4 * EPS)


def test_paste_keeps_the_sum() -> None:
    patch, box = torch.rand(2, 4, 3), torch.tensor([0.1, 0.2, 0.0, 0.5])
    canvas = paste("p", patch, box, (6, 7))
    # A sum of 24 numbers below 1.
    torch.testing.assert_close(canvas.sum(), patch.sum(), rtol=0, atol=100 * EPS)


def test_gradient_goes_to_the_image_only() -> None:
    image, box = torch.rand(1, 4, 4, requires_grad=True), WHOLE.clone().requires_grad_()
    theta = torch.eye(2, 3, requires_grad=True)
    for value in (
        crop("c", image, box, (2, 2)),
        warp("w", image, theta, (2, 2)),
        paste("p", image, box, (6, 6)),
    ):
        (gradient,) = torch.autograd.grad(value.sum(), image)
        assert gradient.any()
        assert not value.detach().requires_grad
    value = crop("c", image.detach(), box, (2, 2))
    assert not value.requires_grad


def test_batches_broadcast() -> None:
    image, box = torch.rand(3, 1, 5, 6), boxes(4, 1)
    found = crop("c", image, box, (2, 3))
    expected = crop("c", image.expand(4, 3, 1, 5, 6), box.expand(4, 3, 4), (2, 3))
    assert torch.equal(found, expected)
    patch = torch.rand(3, 1, 2, 2)
    pasted = paste("p", patch, box, (5, 6))
    assert torch.equal(pasted, paste("p", patch.expand(4, 3, 1, 2, 2), box.expand(4, 3, 4), (5, 6)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: crop("c", torch.rand(4, 4), WHOLE, (2, 2)), r"op 'c': crop: images are floats"),
        (lambda: crop("c", torch.ones(1, 4, 4).int(), WHOLE, (2, 2)), r"found torch.int32"),
        (lambda: crop("c", torch.rand(1, 0, 4), WHOLE, (2, 2)), r"images are floats"),
        (lambda: crop("c", torch.rand(1, 4, 4), WHOLE, (0, 2)), r"size is \(height, width\)"),
        (lambda: crop("c", torch.rand(1, 4, 4), WHOLE[:3], (2, 2)), r"box is of floats"),
        (lambda: crop("c", torch.rand(2, 1, 4, 4), boxes(3), (2, 2)), r"do not broadcast"),
        (lambda: warp("w", torch.rand(1, 4, 4), WHOLE, (2, 2)), r"op 'w': warp: theta is of"),
        (lambda: paste("p", torch.rand(1, 4, 4), WHOLE * math.nan, (2, 2)), r"op 'p': paste: box"),
        (lambda: warp("w", torch.rand(1, 4, 4), torch.eye(3) / 0, (2, 2)), r"not finite"),
    ],
)
def test_refusals_name_the_op(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(NonDiffError, match=message):
        call()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_place_that_is_not_finite_gives_nan(bad: float) -> None:
    box = torch.tensor([bad, 0.0, 1.0, 1.0])
    with pyro.validation_enabled(False):
        assert crop("c", torch.rand(1, 4, 4), box, (2, 2)).isnan().all()


def test_ops_are_recorded() -> None:
    def program() -> None:
        crop("window", torch.rand(1, 4, 4), WHOLE, (2, 2))

    trace = poutine.trace(program).get_trace()
    assert trace.nodes["window"]["value"].shape == (1, 2, 2)


def test_vmap_is_a_batch() -> None:
    image, box = torch.rand(3, 2, 5, 6), boxes(3)
    with pyro.validation_enabled(False):
        found = torch.vmap(lambda i, b: crop("c", i, b, (4, 3)))(image, box)
        pasted = torch.vmap(lambda i, b: paste("p", i, b, (4, 3)))(image, box)
    assert torch.equal(found, crop("c", image, box, (4, 3)))
    assert torch.equal(pasted, paste("p", image, box, (4, 3)))


def test_meta_device(meta: Callable[[Any], Any]) -> None:
    image, box = meta((torch.rand(3, 2, 5, 6), boxes(3)))
    assert crop("c", image, box, (4, 3)).shape == (3, 2, 4, 3)
    assert warp("w", image, theta_of(box), (4, 3)).shape == (3, 2, 4, 3)
    assert paste("p", image, box, (4, 3)).shape == (3, 2, 4, 3)
