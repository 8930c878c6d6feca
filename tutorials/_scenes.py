"""Labelled pictures, in most of which the thing to name is small, moved, or among clutter."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _canvases import clutter, with_digits
from _digits import Split, mnist
from torch import Tensor

from pyro_nondiff.handlers import SpatialTransformer
from pyro_nondiff.ops import crop

TRAIN, TEST = 50_000, 10_000


@dataclass(frozen=True)
class Scenes:
    """What a classifier learns from, and what it is tested on.

    Arguments:
        train: Pictures of shape ``(number, channels, size, size)``, and their labels.
        test: As ``train``, made of digits or signs that are not in it.
        classes: How many labels there are.
        published: A test set that was published, if there is one.
    """

    train: Split
    test: Split
    classes: int
    published: Split | None = None

    def to(self, device: torch.device) -> "Scenes":
        """The same on a device."""
        published = self.published and self.published.to(device)
        return Scenes(self.train.to(device), self.test.to(device), self.classes, published)


def cluttered_digits(folder: Path | None, scale: float = 1.0) -> Scenes:
    """A digit on 40x40 pixels, with five pieces of others.

    50,000 made here, and the 10,000 to learn from that Sonderby published. Their digits are those
    of the same part of MNIST.
    """
    train, test = (
        _cluttered(digits, round(number * scale), seed)
        for seed, (digits, number) in enumerate(zip(mnist(folder), (TRAIN, TEST), strict=True))
    )
    if folder is None or not (folder / "cluttered_mnist").is_dir():
        return Scenes(train, test, 10)
    file = np.load(folder / "cluttered_mnist" / "mnist_sequence1_sample_5distortions5x5.npz")
    more, published = (
        Split(
            torch.tensor(file[f"X_{part}"]).reshape(-1, 1, 40, 40),
            torch.tensor(file[f"y_{part}"], dtype=torch.long).flatten(),
        ).at(slice(round(number * scale)))
        for part, number in (("train", 10_000), ("test", 1_000))
    )
    images, labels = torch.cat([train.images, more.images]), torch.cat([train.labels, more.labels])
    return Scenes(Split(images, labels), test, 10, published)


def sums(folder: Path | None, scale: float = 1.0) -> Scenes:
    """Two digits, each on a channel of its own of 40x40 pixels, and their sum."""

    def made(digits: Split, number: int, seed: int) -> Split:
        pair = [with_digits(digits, number, 40, seed=2 * seed + n) for n in range(2)]
        images = torch.stack([canvases.images for canvases in pair], 1)
        return Split(images, sum(canvases.labels[:, 0] for canvases in pair))

    train, test = mnist(folder)
    number, tests = round(TRAIN * scale), round(TEST * scale)
    return Scenes(made(train, number, 0), made(test, tests, 1), 19)


def signs(folder: Path | None, scale: float = 1.0) -> Scenes:
    """A traffic sign of 20 to 32 pixels, on 48x48 in colour, with numbers from -1/2 to 1/2.

    20,000 canvases of 3,560 photographs to learn from, and 4,400 of 880 others for test. Without a
    folder ``gtsrb_small`` in ``folder``: digits, tinted.
    """
    if folder is None or not (folder / "gtsrb_small").is_dir():
        print("the traffic signs are not at hand (see --data): tinted digits instead")
        tint = torch.tensor([1.0, 0.4, 0.2])[:, None, None]
        train, test = (
            Split(split.images[:, None] * tint - 0.5, split.labels) for split in mnist(folder)
        )
        classes = 10
    else:
        file = np.load(folder / "gtsrb_small" / "gtsrb_small_40x40.npz")
        train, test = (
            Split(
                _stretched(torch.tensor(file[f"x_{part}"]).movedim(-1, 1) / 255),
                torch.tensor(file[f"y_{part}"], dtype=torch.long),
            )
            for part in ("train", "test")
        )
        classes = 43
    return Scenes(
        _pasted(train, round(20_000 * scale), 0), _pasted(test, round(4_400 * scale), 1), classes
    )


def birds(folder: Path, scale: float = 1.0) -> Scenes:
    """A bird of one of ten species, on 80x80 in colour, with numbers from -1/2 to 1/2.

    5,000 parts to learn from, some mirrored, of 224 photographs of 96x96 pixels; the middles of 70
    others for test.
    """
    file = np.load(folder / "cub10_small" / "cub200_2010_10species_96x96.npz")
    images = torch.tensor(file["image"]).movedim(-1, 1) / 255 - 0.5
    labels, is_test = torch.tensor(file["label"], dtype=torch.long), torch.tensor(file["is_test"])
    generator = torch.Generator().manual_seed(0)
    (learnt,) = (~is_test).nonzero(as_tuple=True)
    chosen = learnt[torch.randint(len(learnt), (round(5_000 * scale),), generator=generator)]
    offsets = torch.randint(0, 17, (len(chosen), 2), generator=generator).tolist()
    parts = [
        images[bird, :, y : y + 80, x : x + 80].flip([-1] * (n % 2))
        for n, (bird, (y, x)) in enumerate(zip(chosen, offsets, strict=True))
    ]
    test = Split(images[is_test][:, :, 8:88, 8:88], labels[is_test])
    return Scenes(Split(torch.stack(parts), labels[chosen]), test, 10)


def _cluttered(digits: Split, number: int, seed: int) -> Split:
    canvases = with_digits(digits, number, 40, seed=seed)
    images = clutter(canvases.images, digits, pieces=5, side=5, seed=seed)
    return Split(images[:, None], canvases.labels[:, 0])


def _stretched(images: Tensor) -> Tensor:
    """The same with the contrast of a good photograph: many of the signs are dark, or pale."""
    levels = torch.tensor([0.05, 0.95])
    low, high = images.flatten(1).quantile(levels, dim=1)[..., None, None, None]
    return ((images - low) / (high - low)).clamp(0, 1) - 0.5


def _pasted(patches: Split, number: int, seed: int, size: int = 48) -> Split:
    """Each patch on the same number of canvases."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(patches), generator=generator)
    chosen = order[torch.arange(number) % len(patches)]
    canvases = torch.zeros(number, 3, size, size)
    side = (20 + 12 * torch.rand(number, generator=generator)) / size
    _paste(canvases, patches.images[chosen], side, generator)
    return Split(canvases, patches.labels[chosen])


def _paste(canvases: Tensor, patches: Tensor, side: Tensor, generator: torch.Generator) -> None:
    """Draw a patch on each canvas in place, with sides of this share of the canvas's, anywhere."""
    corner = torch.rand(len(canvases), 2, generator=generator) * (1 - side[:, None])
    # Where the whole canvas lies, seen from the patch: most of it is outside.
    box = torch.cat([-corner, torch.ones_like(corner)], -1) / side[:, None]
    size = (canvases.shape[-2], canvases.shape[-1])
    with SpatialTransformer():
        for canvas, patch, place in zip(
            canvases.split(1000), patches.split(1000), box.split(1000), strict=True
        ):
            cover = crop("cover", torch.ones_like(patch[:, :1]), place, size)
            canvas.mul_(1 - cover).add_(crop("patch", patch, place, size))
