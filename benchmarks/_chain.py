"""A chain of Bernoulli sites, each of which depends on the one before."""

from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch


@dataclass
class Chain:
    """Bits, each drawn from a linear function of the one before, and one observation.

    Arguments:
        name: Of the parameters in the param store.
        length: The number of bits.
        infer: What the guide's sites pass to Pyro.
        device: Where it runs.
    """

    name: str
    length: int
    infer: dict[str, Any]
    device: str

    def __post_init__(self) -> None:
        self.start = torch.zeros((), device=self.device)
        self.seen = torch.ones((), device=self.device)
        self.weights = torch.zeros(2, self.length, device=self.device)

    def model(self) -> None:
        """Each bit prefers to be as the one before."""
        z = self.start
        for t in range(self.length):
            z = pyro.sample(f"z{t}", dist.Bernoulli(logits=2 * z - 1))
        pyro.sample("x", dist.Normal(z, 1.0), obs=self.seen)

    def guide(self) -> None:
        """A slope and an offset for each bit, in two parameters for all."""
        weights = pyro.param(f"{self.name}.{self.length}", self.weights)
        z = self.start
        for t, (slope, offset) in enumerate(zip(*(row.unbind() for row in weights), strict=True)):
            law = dist.Bernoulli(logits=slope * z + offset)
            z = pyro.sample(f"z{t}", law, infer=self.infer)
