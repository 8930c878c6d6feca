"""Where a localisation layer looks: at its start at first, and then where its formula says."""

import math

import pytest
import torch
from torch import Tensor, nn

from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.handlers import SpatialTransformer
from pyro_nondiff.nn import Localization
from pyro_nondiff.ops import crop, warp

FEATURES = 5
START = torch.tensor([[0.5, 0.1, -0.2], [0.0, 0.7, 0.3]])
BOX = torch.tensor([0.1, 0.2, 0.4, 0.6])


def moved(layer: Localization, numbers: list[float]) -> Tensor:
    """What the layer returns if its numbers are these."""
    with torch.no_grad():
        layer.linear.bias.copy_(torch.tensor(numbers))
    return layer(torch.randn(FEATURES)).detach()


@pytest.mark.parametrize("place", ["affine", "attention", "translation"])
@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_it_starts_at_the_whole_image(place: str, shape: tuple[int, ...]) -> None:
    layer = Localization(FEATURES, place, shape=shape)  # type: ignore[arg-type]
    found = layer(torch.randn(4, 7, FEATURES))
    assert found.shape == (4, 7, *shape, 2, 3)
    assert (found == torch.eye(2, 3)).all()


def test_it_starts_where_it_is_told() -> None:
    starts = torch.stack([START, 2 * START])
    layer = Localization(FEATURES, start=starts, shape=(2,))
    torch.testing.assert_close(layer(torch.randn(4, FEATURES)), starts.expand(4, 2, 2, 3))
    anchors = BOX + torch.arange(6.0)[:, None]  # one for each place of a feature map
    found = Localization(FEATURES, "box", start=anchors)(torch.randn(4, 6, FEATURES))
    torch.testing.assert_close(found, anchors.expand(4, 6, 4))
    assert (
        Localization(FEATURES, "box")(torch.randn(FEATURES)) == torch.tensor([0, 0, 1, 1])
    ).all()


def test_numbers_move_it_as_the_table_says() -> None:
    d = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    for place, change in {
        "affine": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]],
        "attention": [[1.0, 0.0, 2.0], [0.0, 1.0, 3.0]],
        "translation": [[0.0, 0.0, 1.0], [0.0, 0.0, 2.0]],
    }.items():
        layer = Localization(FEATURES, place, start=START)  # type: ignore[arg-type]
        found = moved(layer, d[: layer.linear.out_features])
        torch.testing.assert_close(found, START + torch.tensor(change))
    box = moved(Localization(FEATURES, "box", start=BOX), [0.5, -0.25, math.log(2), math.log(0.5)])
    middle, sides = torch.tensor([0.3 + 0.2, 0.5 - 0.15]), torch.tensor([0.8, 0.3])
    torch.testing.assert_close(box, torch.cat([middle - sides / 2, sides]))


def test_it_betters_a_place_that_was_found_before() -> None:
    layer = Localization(FEATURES, "box")
    found = moved(layer, [0.5, -0.25, math.log(2), math.log(0.5)])
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 2.0, 0.5]))
    places = torch.rand(4, 3, 4)
    again = layer(torch.randn(4, 3, FEATURES), start=places)
    sides = places[..., 2:] * torch.tensor([2.0, 0.5])
    middle = places[..., :2] + places[..., 2:] * torch.tensor([1.0, 0.25])
    torch.testing.assert_close(again, torch.cat([middle - sides / 2, sides], -1))
    theta = torch.randn(4, 1, 2, 3)
    assert (Localization(FEATURES)(torch.randn(4, 7, FEATURES), start=theta) == theta).all()


def test_a_map_and_a_box_cut_out_the_same() -> None:
    image = torch.rand(3, 8, 8)
    x0, y0, w, h = BOX.tolist()
    theta = torch.tensor([[w, 0.0, 2 * x0 + w - 1], [0.0, h, 2 * y0 + h - 1]])
    features = torch.randn(FEATURES)
    with SpatialTransformer():
        by_map = warp("map", image, Localization(FEATURES, start=theta)(features), (4, 4))
        by_box = crop("box", image, Localization(FEATURES, "box", start=BOX)(features), (4, 4))
    torch.testing.assert_close(by_map, by_box)


def test_it_learns_where_to_look() -> None:
    image = torch.zeros(1, 12, 12)
    image[0, 3:7, 5:9] = 1.0
    start = torch.tensor([0.1, 0.1, 0.6, 0.6])
    layer = Localization(FEATURES, "box", start=start)
    features, optimizer = torch.ones(FEATURES), torch.optim.Adam(layer.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        with SpatialTransformer():
            part = crop("part", image, layer(features), (6, 6))
        (-part.mean()).backward()
        optimizer.step()
    found = layer(features).detach()
    assert ((found[:2] > 0.2) & (found[:2] + found[2:] < 0.8)).all()
    assert (layer.start == start).all()


def test_its_start_moves_with_it_and_is_saved() -> None:
    layer = Localization(FEATURES, start=START).to(torch.float32)
    assert layer(torch.randn(FEATURES, dtype=torch.float32)).dtype == torch.float32
    other = Localization(FEATURES)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other.start, START.to(torch.float32).to(other.start.dtype))


def test_faults_are_named() -> None:
    with pytest.raises(NonDiffError, match=r"place is one of .* found 'circle'"):
        Localization(FEATURES, "circle")  # type: ignore[arg-type]
    with pytest.raises(NonDiffError, match=r"start of place='affine' .*\(2, 3\), found .*\(4,\)"):
        Localization(FEATURES, start=BOX)
    with pytest.raises(NonDiffError, match="of floats"):
        Localization(FEATURES, "box", start=torch.tensor([0, 0, 1, 1]))
    with pytest.raises(RuntimeError):
        nn.Sequential(nn.Linear(3, 4), Localization(FEATURES))(torch.randn(3))
