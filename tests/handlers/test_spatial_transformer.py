"""Crop, warp and paste between pixels: values, derivatives, limits, and what they agree with."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import affine_grid, grid_sample

from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.estimators import REBAR
from pyro_nondiff.handlers import SpatialTransformer, _bilinear
from pyro_nondiff.infer import TraceEstimator_ELBO
from pyro_nondiff.ops import crop, paste, warp
from pyro_nondiff.ops._grid import Grid

MODES = ["bilinear", "multiscale", "gaussian"]
PADDINGS = ["zeros", "border"]
WHOLE = torch.tensor([0.0, 0.0, 1.0, 1.0])
EPS = torch.finfo(torch.get_default_dtype()).eps
every_mode = pytest.mark.parametrize("mode", MODES)
every_padding = pytest.mark.parametrize("padding", PADDINGS)


@pytest.fixture(params=["composed", "kernel"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test by both ways of interpolation, whatever the size of its output."""
    monkeypatch.setattr(_bilinear, "_SMALL", 0 if request.param == "kernel" else math.inf)


def boxes(*batch: int) -> Tensor:
    """Boxes that partly stick out of the image."""
    return torch.cat([torch.rand(*batch, 2) - 0.3, torch.rand(*batch, 2) + 0.1], -1)


def maps(batch: int, rows: int) -> Tensor:
    """Maps in the neighbourhood of the identity."""
    return torch.eye(3)[:rows] + 0.2 * torch.randn(batch, rows, 3)


def tent(position: Tensor, count: int, padding: str) -> Tensor:
    """The lecture's weights of all pixels at some positions, in a last dimension."""
    if padding == "border":
        position = position.clamp(0, count - 1)
    return (1 - (position[..., None] - torch.arange(count)).abs()).clamp(min=0)


def by_formula(image: Tensor, box: Tensor, size: tuple[int, int], padding: str) -> Tensor:
    """The crop as a sum over all pixels."""
    x0, y0, w, h = box[..., None].unbind(-2)
    (height, width), (rows, columns) = image.shape[-2:], size
    x = (x0 + w * (torch.arange(columns) + 0.5) / columns) * width - 0.5
    y = (y0 + h * (torch.arange(rows) + 0.5) / rows) * height - 0.5
    down, across = tent(y, height, padding), tent(x, width, padding)
    return torch.einsum("bcij,bhi,bwj->bchw", image, down, across)


def check_formula(padding: str = "zeros") -> None:
    image, box = torch.rand(5, 2, 6, 7), boxes(5).requires_grad_()
    with SpatialTransformer(padding=padding):
        found = crop("c", image, box, (4, 4))
    expected = by_formula(image, box, (4, 4), padding)
    # Positions of up to 10 pixels are rounded a few times, and slopes are below 1 a pixel.
    torch.testing.assert_close(found, expected, rtol=0, atol=100 * EPS)
    weight = torch.rand_like(found)
    (slope,) = torch.autograd.grad((found * weight).sum(), box)
    (expected_slope,) = torch.autograd.grad((expected * weight).sum(), box)
    # Sums of 32 such slopes, times the image's 7 pixels.
    torch.testing.assert_close(slope, expected_slope, rtol=0, atol=100 * 32 * EPS)


@every_padding
@pytest.mark.usefixtures("way")
def test_bilinear_is_the_lecture_s_sum_with_its_gradient(padding: str) -> None:
    check_formula(padding)


@pytest.mark.parametrize(
    "planted",
    [
        lambda grid: Grid(grid.x + 0.5, grid.y),
        lambda grid: Grid(grid.y.mT, grid.x.mT),
        lambda grid: Grid(grid.x, grid.y.detach()),
        lambda grid: Grid(grid.x.half().to(grid.x.dtype), grid.y),
    ],
    ids=["half a pixel", "x and y swapped", "no gradient to y", "half precision"],
)
@pytest.mark.usefixtures("way")
def test_planted_bug_in_positions_is_found(
    planted: Callable[[Grid], Grid], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = _bilinear.interpolate
    monkeypatch.setattr(
        _bilinear, "interpolate", lambda image, grid, border: right(image, planted(grid), border)
    )
    with pytest.raises(AssertionError, match="not close"):
        check_formula()


def test_planted_bug_in_weights_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _bilinear._neighbours

    def swapped(*args: Any) -> list[tuple[Tensor, Tensor]]:
        (lower, near), (upper, far) = right(*args)
        return [(lower, far), (upper, near)]

    monkeypatch.setattr(_bilinear, "_neighbours", swapped)
    with pytest.raises(AssertionError, match="not close"):
        check_formula()


def test_slope_at_a_pixel_s_centre_is_that_on_the_right() -> None:
    image = torch.tensor([[[1.0, 3.0, 7.0]]])
    box = WHOLE.clone().requires_grad_()
    slopes = {}
    for padding in PADDINGS:
        with SpatialTransformer(padding=padding):
            value = crop("c", image, box, (1, 3))
        found = [torch.autograd.grad(v, box, retain_graph=True)[0][0] for v in value.flatten()]
        slopes[padding] = [slope.item() / 3 for slope in found]
    assert slopes["zeros"] == [2.0, 4.0, -7.0]
    assert slopes["border"] == [2.0, 4.0, 0.0]


@every_mode
@every_padding
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", ["crop", "warp", "projective", "paste"])
def test_first_and_second_derivatives(mode: str, padding: str, kind: str) -> None:
    image = torch.rand(2, 1, 5, 4, dtype=torch.float64, requires_grad=True)
    place = {"warp": maps(2, 2), "projective": maps(2, 3)}.get(kind, boxes(2))
    place = place.double().requires_grad_()
    op = {"crop": crop, "paste": paste}.get(kind, warp)
    handler = SpatialTransformer(mode, padding, levels=2, sigma=0.7)

    def value(image: Tensor, place: Tensor) -> Tensor:
        with handler:
            return op("op", image, place, (3, 3))

    assert gradcheck(value, (image, place))
    # In random directions: entry by entry takes ten times as long.
    assert gradgradcheck(value, (image, place), fast_mode=True)


@every_mode
@every_padding
@pytest.mark.parametrize("align_corners", [False, True])
def test_paste_is_the_adjoint_of_crop(mode: str, padding: str, align_corners: bool) -> None:
    image, patch, box = torch.rand(5, 2, 6, 7), torch.rand(5, 2, 4, 3), boxes(5)
    with SpatialTransformer(mode, padding, align_corners=align_corners):
        read = (crop("c", image, box, (4, 3)) * patch).sum()
        written = (image * paste("p", patch, box, (6, 7))).sum()
    # Sums of some hundred products below 1, in another order; 2e-12 in float64.
    torch.testing.assert_close(read, written, rtol=0, atol=1e4 * EPS)


def test_planted_bug_in_the_adjoint_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A paste that divides by the share which reached the canvas, to keep the brightness."""
    right = _bilinear.splat

    def brightened(patch: Tensor, *args: Any) -> Tensor:
        share = right(torch.ones_like(patch), *args)
        return right(patch, *args) / share.clamp(min=1e-3)

    monkeypatch.setattr(_bilinear, "splat", brightened)
    with pytest.raises(AssertionError, match="not close"):
        test_paste_is_the_adjoint_of_crop("bilinear", "zeros", False)


@pytest.mark.parametrize("size", [1, 7, 28, 64, 100])
@pytest.mark.parametrize("align_corners", [False, True])
def test_identity_in_float32(size: int, align_corners: bool) -> None:
    image = torch.rand(2, 1, size, size, dtype=torch.float32)
    with SpatialTransformer(align_corners=align_corners):
        cropped = crop("c", image, WHOLE.float(), (size, size))
        warped = warp("w", image, torch.eye(2, 3, dtype=torch.float32), (size, size))
        pasted = paste("p", image, WHOLE.float(), (size, size))
    for found in (cropped, warped, pasted):
        # Positions are whole numbers exactly, if they are counted from the middle.
        torch.testing.assert_close(found, image, rtol=0, atol=1e-6)


def test_identity_in_float32_by_the_kernel() -> None:
    image = torch.rand(16, 1, 100, 100, dtype=torch.float32)
    with SpatialTransformer():
        found = crop("c", image, WHOLE.float().expand(16, 4), (100, 100))
    # The kernel's positions are rounded by 2**-24 of each side: 6e-6 pixels, where slopes are 1.
    torch.testing.assert_close(found, image, rtol=0, atol=2 * 100 * 2**-24)


@every_mode
@every_padding
def test_forward_then_inverse_on_the_interior(mode: str, padding: str) -> None:
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    # A plane, which every filter here reproduces: what remains is the error of the positions.
    plane = (0.3 * rows + 0.1 * columns)[None].to(torch.get_default_dtype())
    turn = torch.tensor([[0.9, -0.3, 0.05], [0.3, 0.9, -0.02], [0.0, 0.0, 1.0]])
    with SpatialTransformer(mode, padding, levels=3):
        there = warp("there", plane, turn, (40, 40))
        back = warp("back", there, turn.inverse(), (40, 40))
    # A Gaussian of one pixel, summed by pixels, ripples by exp(-2 pi^2) = 3e-9.
    torch.testing.assert_close(back[:, 14:-14, 14:-14], plane[:, 14:-14, 14:-14], rtol=0, atol=1e-5)


@every_padding
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.usefixtures("way")
def test_agrees_with_torch(padding: str, align_corners: bool) -> None:
    image, theta = torch.rand(3, 2, 6, 7), maps(3, 2)
    grid = affine_grid(theta, [3, 2, 5, 4], align_corners=align_corners)
    expected = grid_sample(image, grid, padding_mode=padding, align_corners=align_corners)
    with SpatialTransformer(padding=padding, align_corners=align_corners):
        found = warp("w", image, theta, (5, 4))
    # The same formula, with positions of up to 10 pixels rounded in another order.
    torch.testing.assert_close(found, expected, rtol=0, atol=200 * EPS)


def test_agrees_with_kornia() -> None:
    kornia = pytest.importorskip("kornia.geometry.transform")
    image, theta = torch.rand(3, 2, 9, 8), maps(3, 3)
    box = torch.cat([0.4 * torch.rand(3, 2), 0.2 + 0.3 * torch.rand(3, 2)], -1)
    # kornia's boxes are corners in pixels, clockwise, here from centre to centre.
    x0, y0, w, h = (box * torch.tensor([7, 8, 7, 8])).unbind(-1)
    corners = [(x0, y0), (x0 + w, y0), (x0 + w, y0 + h), (x0, y0 + h)]
    pixels = torch.stack([torch.stack(corner, -1) for corner in corners], -2)
    with SpatialTransformer(align_corners=True):
        cropped = crop("c", image, box, (5, 4))
        warped = warp("w", image, theta, (5, 4))
    expected = kornia.crop_and_resize(image, pixels, (5, 4), align_corners=True)
    # kornia solves for the map, and divides by a depth to which it adds an epsilon of 1e-8.
    torch.testing.assert_close(cropped, expected, rtol=0, atol=1e-5)
    expected = kornia.homography_warp(image, theta, (5, 4), align_corners=True)
    torch.testing.assert_close(warped, expected, rtol=0, atol=1e-5)


@every_mode
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("way")
def test_positions_are_not_rounded_to_the_image_s_dtype(mode: str, dtype: torch.dtype) -> None:
    image, box = torch.rand(2, 1, 64, 64).to(dtype), boxes(2).to(dtype)
    handler = SpatialTransformer(mode)
    with handler:
        found = crop("c", image, box, (9, 9))
        expected = crop("c", image.double(), box.double(), (9, 9))
        with torch.autocast(image.device.type, dtype=torch.bfloat16):
            in_autocast = crop("c", image, box, (9, 9))
    assert found.dtype == dtype
    assert torch.equal(in_autocast, found)
    # The result is rounded once; a position rounded to 8 bits would be off by a quarter of a pixel.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=torch.finfo(dtype).eps)


@every_mode
@every_padding
@pytest.mark.usefixtures("way")
def test_places_at_the_limit_have_values_and_gradients(mode: str, padding: str) -> None:
    image = torch.rand(1, 6, 6)
    horizon = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    places = {
        "mirrored": torch.tensor([1.0, 0.0, -1.0, 1.0]),
        "no size": torch.tensor([0.3, 0.4, 0.0, 0.0]),
        "singular": torch.ones(2, 3),
        "horizon": horizon,
        "far outside": torch.tensor([1e20, 0.0, 1.0, 1.0]),
    }
    for name, place in places.items():
        place.requires_grad_()
        with SpatialTransformer(mode, padding):
            value = (crop if place.dim() == 1 else warp)("op", image, place, (3, 3))
        (gradient,) = torch.autograd.grad(value.sum(), place)
        assert value.isfinite().all(), name
        assert gradient.isfinite().all(), name


@every_mode
def test_outside_is_the_padding(mode: str) -> None:
    image, box = 1 + torch.rand(1, 6, 6), torch.tensor([-20.0, 0.0, 1.0, 1.0], requires_grad=True)
    with SpatialTransformer(mode):
        value = crop("c", image, box, (6, 6))
    assert not value.any()
    assert not torch.autograd.grad(value.sum(), box)[0].any()
    with SpatialTransformer(mode, "border"):
        value = crop("c", image, box, (6, 6))
    torch.testing.assert_close(value, value[..., :1].expand(1, 6, 6), rtol=0, atol=0)
    assert (value >= 1).all()


@every_mode
def test_single_pixels(mode: str) -> None:
    image, box = torch.rand(1, 1, 5), WHOLE.clone().requires_grad_()
    for align_corners in (False, True):
        with SpatialTransformer(mode, "border", align_corners=align_corners):
            middle = crop("c", image, box, (1, 1))
            same = crop("c", image[..., :1], box, (3, 3))
            longest = crop("c", image, box, (1, 9))
        if mode == "bilinear":
            assert torch.equal(middle, image[..., 2:3])
        torch.testing.assert_close(same, image[..., :1].expand(1, 3, 3), rtol=0, atol=4 * EPS)
        assert longest.shape == (1, 1, 9)


def test_far_away_spot_is_seen_by_the_wider_filters() -> None:
    image = torch.zeros(1, 32, 32)
    image[:, 16, 24] = 1
    box = torch.tensor([0.4, 0.4, 0.2, 0.2], requires_grad=True)
    gradients = {}
    for mode in MODES:
        with SpatialTransformer(mode, levels=5, sigma=4.0):
            value = crop("c", image, box, (6, 6))
        gradients[mode] = torch.autograd.grad(value.sum(), box)[0][0].item()
    assert gradients["bilinear"] == 0
    assert gradients["multiscale"] > 0
    assert gradients["gaussian"] > 0


@every_mode
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("images", "places"),
    [
        ((3,), (4, 1)),
        ((1, 3), (4, 3)),
        ((), (4, 3)),
        ((4, 1), (3,)),
        ((4, 3), ()),
        ((1, 1), (1, 2)),
    ],
)
def test_images_and_boxes_broadcast(
    mode: str, images: tuple[int, ...], places: tuple[int, ...]
) -> None:
    batch = torch.broadcast_shapes(images, places)
    image, box = torch.rand(*images, 2, 5, 6), boxes(*places).requires_grad_()
    with SpatialTransformer(mode):
        found = crop("c", image, box, (2, 3))
        expected = crop("c", image.expand(*batch, 2, 5, 6), box.expand(*batch, 4), (2, 3))
        pasted = paste("p", image, box, (7, 7))
    # Both ways of interpolation may be met, and round positions of up to 10 pixels differently.
    torch.testing.assert_close(found, expected, rtol=0, atol=200 * EPS)
    weight = torch.rand_like(found)
    slopes = [torch.autograd.grad((v * weight).sum(), box)[0] for v in (found, expected)]
    # Sums of up to 144 slopes below 1 a pixel, of 6 pixels.
    torch.testing.assert_close(*slopes, rtol=0, atol=6 * 144 * 10 * EPS)
    assert pasted.shape == (*batch, 2, 7, 7)


@every_mode
@pytest.mark.usefixtures("way")
def test_vmap_is_a_batch(mode: str) -> None:
    image, box = torch.rand(3, 2, 5, 6), boxes(3)
    with pyro.validation_enabled(False), SpatialTransformer(mode):
        found = torch.vmap(lambda i, b: crop("c", i, b, (4, 3)))(image, box)
        expected = crop("c", image, box, (4, 3))
        slope = torch.func.grad(lambda b: crop("c", image, b, (4, 3)).sum())(box)
    # A batch of one may be summed in another order.
    torch.testing.assert_close(found, expected, rtol=0, atol=200 * EPS)
    assert slope.shape == box.shape


@every_mode
@pytest.mark.usefixtures("way")
def test_meta_device(mode: str, meta: Callable[[Any], Any]) -> None:
    image, box = meta((torch.rand(3, 2, 5, 6), boxes(3).requires_grad_()))
    with pyro.validation_enabled(False), SpatialTransformer(mode):
        crop("c", image, box, (4, 3)).sum().backward()
        paste("p", image, box, (4, 3)).sum().backward()
    assert box.grad.shape == (3, 4)


def test_sigma_may_be_learnt() -> None:
    sigma = torch.tensor(0.8, requires_grad=True)
    with SpatialTransformer("gaussian", sigma=sigma):
        crop("c", torch.rand(1, 5, 5), WHOLE, (3, 3)).square().sum().backward()
    assert sigma.grad is not None
    assert sigma.grad != 0


def test_sites_pick_the_ops_that_are_smoothed() -> None:
    image, box = torch.rand(1, 5, 5), torch.tensor([0.1, 0.1, 0.5, 0.5])
    hard = crop("c", image, box, (3, 3))
    with SpatialTransformer(sites="soft"):
        assert torch.equal(crop("hard", image, box, (3, 3)), hard)
        assert not torch.equal(crop("soft", image, box, (3, 3)), hard)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "cubic"}, r"mode is one of .*, found 'cubic'"),
        ({"padding": "reflection"}, r"padding is one of \['zeros', 'border'\], found 'reflection'"),
        ({"levels": 0}, r"levels must be positive, found 0"),
        ({"sigma": -1.0}, r"sigma must be positive, found -1.0"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(NonDiffError, match=f"SpatialTransformer: {message}"):
        SpatialTransformer(**arguments)


def test_place_that_is_not_finite_is_refused() -> None:
    image, box = torch.rand(1, 5, 5), torch.tensor([math.nan, 0.0, 1.0, 1.0])
    with SpatialTransformer(), pytest.raises(NonDiffError, match="op 'c': crop: box has values"):
        crop("c", image, box, (3, 3))


@every_mode
@every_padding
@pytest.mark.usefixtures("way")
def test_nan_is_not_hidden(mode: str, padding: str) -> None:
    image, box = torch.rand(1, 5, 5), torch.tensor([math.nan, 0.0, 1.0, 1.0], requires_grad=True)
    with pyro.validation_enabled(False), SpatialTransformer(mode, padding):
        value = crop("c", image, box, (3, 3))
    # torch's kernel would read outside of its memory here, with the outer pixels going on.
    torch.autograd.grad(value.sum(), box)
    assert value.isnan().all()


@pytest.mark.usefixtures("param_store")
def test_soft_worlds_go_through_an_interpolation_and_not_through_a_pixel() -> None:
    image, target = torch.rand(1, 8, 8), torch.rand(1, 3, 3)

    def model() -> None:
        right = pyro.sample("right", dist.Bernoulli(torch.tensor(0.5)))
        rest = torch.tensor([0.2, 0.4, 0.4])
        box = torch.cat([0.3 * right[..., None], rest.expand(*right.shape, 3)], -1)
        window = crop("window", image, box, (3, 3))
        pyro.sample("seen", dist.Normal(window, 0.1).to_event(3), obs=target)

    def guide() -> None:
        logit = pyro.param("logit", torch.tensor(0.0))
        pyro.sample("right", dist.Bernoulli(logits=logit))

    def step(model: Callable[[], None]) -> float:
        return SVI(model, guide, Adam({"lr": 0.1}), TraceEstimator_ELBO(REBAR())).step()

    assert math.isfinite(step(SpatialTransformer()(model)))
    with pytest.raises(NonDiffError, match=r"site 'right'.*breaks its soft value"):
        step(model)
