"""Which estimator gives the most for its time: variance x time at one checkpoint of a VAE.

A Bernoulli VAE (linear: 784-200-784; nonlinear: two layers of 200 more on both sides) is
trained for a while, and then held fixed. What the estimators learn is trained there, and
the variance of the encoder's gradient and the time of one gradient step are measured, the
times interleaved. RLOO(2) is 1.

    python benchmarks/variance_time.py [--draws 200] [--adapt 600] [--models linear nonlinear]
"""

import argparse
import copy
import gzip
import os
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_nondiff.estimators import (
    REBAR,
    REINFORCE,
    RELAX,
    RLOO,
    AbstractEstimator,
    DisARM,
    MovingAverage,
)
from pyro_nondiff.infer import TraceEstimator_ELBO

ESTIMATORS: dict[str, Callable[[], AbstractEstimator]] = {
    "RLOO(2)": lambda: RLOO(2),
    "RLOO(4)": lambda: RLOO(4),
    "REINFORCE + moving average": lambda: REINFORCE(MovingAverage(0.95)),
    "DisARM": DisARM,
    "REBAR": lambda: REBAR(temperature=0.3),
    "RELAX": lambda: RELAX(temperature=0.3),
}


class VAE(nn.Module):
    """A model and a guide of 200 Bernoulli units."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.encoder = _layers([784, *[200] * hidden, 200])
        self.decoder = _layers([200, *[200] * hidden, 784])

    def model(self, x: Tensor) -> None:
        """The prior and the likelihood."""
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(logits=x.new_zeros(200)).to_event(1))
            logits = self.decoder(2 * z - 1)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """The posterior."""
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(2 * x - 1)).to_event(1))


def _layers(sizes: list[int]) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.LeakyReLU(0.3)]
    return nn.Sequential(*layers[:-1])


def load() -> Tensor:
    """Binary images of 784 pixels: MNIST if there, else scikit-learn's digits enlarged."""
    folder = os.environ.get("PYRO_NONDIFF_DATA")
    if folder:
        path = Path(folder) / "mnist" / "train-images-idx3-ubyte.gz"
        with gzip.open(path) as file:
            raw = np.frombuffer(file.read(), np.uint8, offset=16)
        images = torch.from_numpy(raw.copy()).reshape(-1, 784)[:10000].float() / 255
    else:
        from sklearn.datasets import load_digits

        digits = torch.from_numpy(load_digits().images).float()[:, None] / 16
        images = nn.functional.interpolate(digits, size=(28, 28), mode="bilinear").flatten(1)
    return (images > 0.5).float()


def train(vae: VAE, images: Tensor, steps: int, device: str) -> None:
    """Moves the VAE to the checkpoint."""
    elbo = TraceEstimator_ELBO(RLOO(4))
    optimiser = torch.optim.Adam(vae.parameters(), lr=1e-3)
    for _ in tqdm(range(steps), desc="checkpoint"):
        batch = images[torch.randint(len(images), (50,))].to(device)
        optimiser.zero_grad()
        elbo.differentiable_loss(vae.model, vae.guide, batch).backward()
        optimiser.step()


def adapt(elbo: TraceEstimator_ELBO, vae: VAE, images: Tensor, steps: int, device: str) -> None:
    """Trains what the estimators learn, and nothing else."""
    frozen = copy.deepcopy(vae.state_dict())
    optimiser: torch.optim.Optimizer | None = None
    for step in range(steps):
        batch = images[torch.randint(len(images), (50,))].to(device)
        elbo.differentiable_loss(vae.model, vae.guide, batch).backward()
        parameters = list(elbo.states.parameters())
        if parameters:
            optimiser = optimiser or torch.optim.Adam(parameters, lr=1e-2)
            for group in optimiser.param_groups:
                group["lr"] = 1e-2 * (1 - step / steps)
            optimiser.step()
            optimiser.zero_grad()
        vae.zero_grad()
    for key, value in vae.state_dict().items():
        if not torch.equal(value, frozen[key]):
            raise RuntimeError(f"{key} of the VAE has moved")


def encoder_gradient(elbo: TraceEstimator_ELBO, vae: VAE, batch: Tensor) -> Tensor:
    """One draw of the encoder's gradient, flat."""
    loss = elbo.differentiable_loss(vae.model, vae.guide, batch)
    gradients = torch.autograd.grad(loss, list(vae.encoder.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def variance(elbo: TraceEstimator_ELBO, vae: VAE, batch: Tensor, draws: int) -> float:
    """The variance of the encoder's gradient, summed over its elements."""
    total: Any = 0.0
    square: Any = 0.0
    for _ in range(draws):
        gradient = encoder_gradient(elbo, vae, batch).double()
        total, square = total + gradient, square + gradient**2
    return float(((square - total**2 / draws) / (draws - 1)).sum())


def times(
    steps: dict[str, Callable[[], object]], rounds: int, device: str
) -> dict[str, list[float]]:
    """Milliseconds of each step, interleaved in random order."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for _ in range(rounds):
        for index in torch.randperm(len(names)).tolist():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(5):
                steps[names[index]]()
            if device == "cuda":
                torch.cuda.synchronize()
            found[names[index]].append((time.perf_counter() - start) * 200)
    return found


def full_step(elbo: TraceEstimator_ELBO, vae: VAE, batch: Tensor) -> Callable[[], object]:
    """One gradient step of everything that is trained."""

    def step() -> None:
        elbo.differentiable_loss(vae.model, vae.guide, batch).backward()
        vae.zero_grad()

    return step


def measure(name: str, images: Tensor, options: argparse.Namespace) -> None:
    """Prints the table of one model."""
    torch.manual_seed(0)
    vae = VAE(hidden=0 if name == "linear" else 2).to(options.device)
    train(vae, images, options.train, options.device)
    batch = images[:50].to(options.device)
    elbos = {key: TraceEstimator_ELBO(make()) for key, make in ESTIMATORS.items()}
    variances = {}
    for key, elbo in tqdm(elbos.items(), desc=name):
        adapt(elbo, vae, images, options.adapt, options.device)
        variances[key] = variance(elbo, vae, batch, options.draws)
    steps = {key: full_step(elbo, vae, batch) for key, elbo in elbos.items()}
    measured = times(steps, options.rounds, options.device)
    print(f"\n{name} VAE, batch 50, {options.draws} draws\n")
    print("| estimator | variance | ms (min..max) | time | variance x time |")
    print("|---|---|---|---|---|")
    for key in elbos:
        ratio = statistics.median(
            a / b for a, b in zip(measured[key], measured["RLOO(2)"], strict=True)
        )
        relative = variances[key] / variances["RLOO(2)"] * ratio
        ms = measured[key]
        print(
            f"| {key} | {variances[key]:.3g} | {statistics.median(ms):.2f} "
            f"({min(ms):.2f}..{max(ms):.2f}) | {ratio:.2f} | {relative:.2f} |"
        )
    for key in ("REBAR", "RELAX"):
        learnt = {
            k: round(float(v), 3) for k, v in elbos[key].states.state_dict().items() if not v.dim()
        }
        print(f"{key}: {learnt}")


def main() -> None:
    """Reads the options and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["linear", "nonlinear"])
    parser.add_argument("--train", type=int, default=1000, help="steps to the checkpoint")
    parser.add_argument("--adapt", type=int, default=600, help="steps of what estimators learn")
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="short, and check the variances")
    options = parser.parse_args()
    if options.smoke:
        options.models, options.train, options.adapt = ["linear"], 3, 3
        options.draws, options.rounds = 3, 1
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    images = load()
    for name in options.models:
        measure(name, images, options)


if __name__ == "__main__":
    main()
