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
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from _arguments import parsed, timing_parser
from _timing import measure, quiet_machine, ratios
from _variance import BATCH, adapt, encoder_gradient, some, variance
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


def train(vae: VAE, images: Tensor, steps: int) -> None:
    """Moves the VAE to the checkpoint."""
    elbo = TraceEstimator_ELBO(RLOO(4))
    optimiser = torch.optim.Adam(vae.parameters(), lr=1e-3)
    for _ in tqdm(range(steps), desc="checkpoint"):
        optimiser.zero_grad()
        elbo.differentiable_loss(vae.model, vae.guide, some(images)).backward()
        optimiser.step()


def check_still(vae: VAE, frozen: dict[str, Tensor]) -> None:
    """The VAE is where it was while estimators learnt."""
    for key, value in vae.state_dict().items():
        if not torch.equal(value, frozen[key]):
            raise RuntimeError(f"{key} of the VAE has moved")


def full_step(elbo: TraceEstimator_ELBO, vae: VAE, batch: Tensor) -> Callable[[], object]:
    """One gradient step of everything that is trained."""

    def step() -> None:
        elbo.differentiable_loss(vae.model, vae.guide, batch).backward()
        vae.zero_grad()

    return step


def report(name: str, images: Tensor, options: argparse.Namespace) -> None:
    """Prints the table of one model."""
    torch.manual_seed(0)
    vae = VAE(hidden=0 if name == "linear" else 2).to(options.device)
    images = images.to(options.device)
    train(vae, images, options.train)
    frozen = copy.deepcopy(vae.state_dict())
    batch = images[:BATCH]
    elbos = {key: TraceEstimator_ELBO(make()) for key, make in ESTIMATORS.items()}
    variances = {}
    for key, elbo in tqdm(elbos.items(), desc=name):
        adapt(elbo, vae, images, options.adapt)
        check_still(vae, frozen)
        variances[key] = variance(encoder_gradient(elbo, vae, batch), options.draws)
    steps = {key: full_step(elbo, vae, batch) for key, elbo in elbos.items()}
    measured = measure(steps, options.rounds, options.seconds, options.device)
    print(f"\n{name} VAE, batch 50, {options.draws} draws\n")
    print("| estimator | variance | ms (min..max) | time | variance x time |")
    print("|---|---|---|---|---|")
    for key in elbos:
        ratio = statistics.median(ratios(measured, key, "RLOO(2)"))
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
    parser = timing_parser(
        "Measure variance and time of gradients.", "short, and check that the VAE keeps still", 15
    )
    parser.add_argument("--models", nargs="+", default=["linear", "nonlinear"])
    parser.add_argument("--train", type=int, default=1000, help="steps to the checkpoint")
    parser.add_argument("--adapt", type=int, default=600, help="steps of what estimators learn")
    parser.add_argument("--draws", type=int, default=200)
    options = parsed(parser)
    if options.smoke:
        options.models, options.train, options.adapt = ["linear"], 3, 3
        options.draws, options.rounds, options.seconds = 3, 1, 0.0
    images = load()
    with quiet_machine():
        for name in options.models:
            report(name, images, options)


if __name__ == "__main__":
    main()
