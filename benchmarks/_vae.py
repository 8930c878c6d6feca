"""The Bernoulli variational autoencoder of the benchmarks, and its data."""

import gzip
import os
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

LINEAR = (784, 200)
NONLINEAR = (784, 200, 200, 200)


@dataclass
class VAE:
    """Pixels, bits, pixels, as a Pyro program.

    Arguments:
        name: Of the networks in the param store.
        infer: What the guide's site passes to Pyro.
        device: Where it runs.
        sizes: Of the encoder's layers, pixels first and bits last; the decoder's are the same
            from the end. LeakyReLU lies between them.
        site: The name of the bits, under which an estimator keeps what it learns.
    """

    name: str
    infer: dict[str, Any]
    device: str
    sizes: tuple[int, ...] = LINEAR
    site: str = "z"
    encoder: nn.Module = field(init=False)
    decoder: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.encoder = _layers(self.sizes).to(self.device)
        self.decoder = _layers(self.sizes[::-1]).to(self.device)
        self.prior = torch.zeros(self.sizes[-1], device=self.device)

    def model(self, x: Tensor) -> None:
        """Draw bits, then pixels."""
        pyro.module(f"{self.name}.decoder", self.decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample(self.site, dist.Bernoulli(logits=self.prior).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Draw bits from pixels."""
        pyro.module(f"{self.name}.encoder", self.encoder)
        with pyro.plate("data", len(x), dim=-1):
            law = dist.Bernoulli(logits=self.encoder(x)).to_event(1)
            pyro.sample(self.site, law, infer=self.infer)

    def copy_weights(self, other: "VAE") -> None:
        """Takes the weights of another of the same sizes."""
        self.encoder.load_state_dict(other.encoder.state_dict())
        self.decoder.load_state_dict(other.decoder.state_dict())


def _layers(sizes: tuple[int, ...]) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.LeakyReLU()]
    return nn.Sequential(*layers[:-1])


def vae_batch(size: int, device: str, start: int = 0) -> tuple[Tensor, str]:
    """A batch of binarised MNIST where it is to be had, of random pixels elsewhere.

    Arguments:
        size: How many images.
        device: Where they are put.
        start: The first of them.
    """
    folder = os.environ.get("PYRO_NONDIFF_DATA")
    path = Path(folder or "", "mnist", "t10k-images-idx3-ubyte.gz")
    if folder and path.exists():
        with gzip.open(path) as file:
            file.seek(16 + 784 * start)
            pixels = np.frombuffer(file.read(784 * size), np.uint8)
        x = torch.tensor(pixels.reshape(size, 784) > 127, dtype=torch.float32)
        return x.to(device), "MNIST"
    return torch.bernoulli(torch.full((size, 784), 0.2, device=device)), "random pixels"
