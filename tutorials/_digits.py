"""Digits: MNIST, its fixed binarisation, or scikit-learn's where these are not at hand."""

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.io import loadmat
from sklearn.datasets import load_digits
from torch import Tensor, nn


@dataclass(frozen=True)
class Split:
    """Pictures of shape ``(number, height, width)`` with numbers in [0, 1], and their labels."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Split":
        """The same on a device."""
        return Split(self.images.to(device), self.labels.to(device))

    def at(self, indices: Tensor | slice) -> "Split":
        """Some of them."""
        return Split(self.images[indices], self.labels[indices])


def mnist(folder: Path | None) -> tuple[Split, Split]:
    """60,000 digits to learn from and 10,000 to test on, of 28x28 pixels.

    Without a folder ``mnist`` in ``folder``: scikit-learn's 1,797 digits, enlarged from 8x8, with
    every sixth for test.
    """
    if folder is None or not (folder / "mnist").is_dir():
        print("MNIST is not at hand (see --data): scikit-learn's 1,797 digits, enlarged, instead")
        return _small_digits()
    return _mnist_part(folder / "mnist", "train"), _mnist_part(folder / "mnist", "t10k")


def binarized_mnist(folder: Path | None) -> tuple[Tensor, Tensor]:
    """Black and white digits of shape ``(number, 784)``: 50,000 to learn from, 10,000 for test.

    Without a folder ``binarized_mnist`` in ``folder``: scikit-learn's digits, enlarged, and cut at
    1/2.
    """
    if folder is None or not (folder / "binarized_mnist").is_dir():
        print("binarised MNIST is not at hand (see --data): scikit-learn's digits instead")
        return tuple((split.images.flatten(1) > 0.5).float() for split in _small_digits())

    def read(part: str) -> Tensor:
        bits = loadmat(folder / "binarized_mnist" / f"binarized_mnist_{part}.mat")["X"]
        return torch.tensor(bits, dtype=torch.float32)

    return read("train"), read("test")


def _mnist_part(folder: Path, part: str) -> Split:
    pixels = np.frombuffer(_unzipped(folder / f"{part}-images-idx3-ubyte.gz"), np.uint8, offset=16)
    labels = np.frombuffer(_unzipped(folder / f"{part}-labels-idx1-ubyte.gz"), np.uint8, offset=8)
    images = torch.tensor(pixels.reshape(-1, 28, 28), dtype=torch.float32) / 255
    return Split(images, torch.tensor(labels, dtype=torch.long))


def _unzipped(path: Path) -> bytes:
    with gzip.open(path) as file:
        return file.read()


def _small_digits() -> tuple[Split, Split]:
    digits = load_digits()
    small = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    large = nn.functional.interpolate(small, size=(20, 20), mode="bilinear", align_corners=False)
    images = nn.functional.pad(large, (4,) * 4)[:, 0].clamp(0, 1)
    both = Split(images, torch.tensor(digits.target))
    test = torch.arange(len(both)) % 6 == 5
    return both.at(~test), both.at(test)
