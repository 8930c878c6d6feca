# %% [markdown]
# # Quickstart: four estimators, one program
#
# A variational autoencoder whose code is a row of bits has no derivative: a bit is drawn, and a
# drawn bit does not move when its probability does a little. Pyro runs such a program, but
# somebody has to say how the encoder's gradient is *estimated*. Here one program is trained four
# times, on real digits, from the same start, in the same number of steps, and only that choice
# differs:
#
# | name | estimator | runs of the program a step |
# |---|---|---|
# | `REINFORCE` | score function, with a moving average of the cost as baseline | 1 |
# | `RLOO-2` | score function; the other sample is the baseline | 2 |
# | `DisARM` | an antithetic pair: the second sample flips what the first one drew | 2 |
# | `RELAX` | score function; relaxed runs and a small network are the baseline | 1 + 2 relaxed |
#
# At the end a table says who won, and how much smaller the variance of its gradient is. `RLOO-4`
# and `REBAR` can be named too.
#
#     python tutorials/00_quickstart.py                       # 1,797 digits of 8x8, no download
#     python tutorials/00_quickstart.py --data mnist          # 70,000 of 28x28, see below
#     python tutorials/00_quickstart.py --estimators RLOO-4 RELAX --steps 10000 --device cuda

# %%
import argparse
import copy
import gzip
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import trange

from pyro_nondiff.diagnostics import gradient_statistics
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

smoke_test = "CI" in os.environ

STEPS = 20 if smoke_test else 3000
BATCH = 100
GRADIENTS = 10 if smoke_test else 200  # drawn to measure a variance

# %% [markdown]
# ## The choice
#
# An estimator is a small immutable object. Nothing else in this file depends on which it is.

# %%
ESTIMATORS: dict[str, AbstractEstimator] = {
    "REINFORCE": REINFORCE(baseline=MovingAverage(decay=0.9)),
    "RLOO-2": RLOO(num_samples=2),
    "DisARM": DisARM(),
    "RELAX": RELAX(),
    "RLOO-4": RLOO(num_samples=4),
    "REBAR": REBAR(),
}
SIDE_BY_SIDE = ["REINFORCE", "RLOO-2", "DisARM", "RELAX"]

# %% [markdown]
# ## The data
#
# scikit-learn brings 1,797 handwritten digits of 8x8 pixels along. They are made black and white,
# and every sixth is held out. MNIST is read from the folder `mnist` of `PYRO_NONDIFF_DATA`, from
# the four files in which it is published.


# %%
@dataclass(frozen=True)
class Data:
    """Black and white pictures, and the size of a model that suits them."""

    train: Tensor
    held_out: Tensor
    bits: int
    hidden: int
    learning_rate: float

    @property
    def side(self) -> int:
        return round(self.train.shape[-1] ** 0.5)


def load_small_digits() -> Data:
    pictures = torch.tensor(load_digits().data > 7.5, dtype=torch.float32)
    held_out = torch.arange(len(pictures)) % 6 == 5
    return Data(pictures[~held_out], pictures[held_out], bits=32, hidden=64, learning_rate=3e-3)


def load_mnist() -> Data:
    folder = os.environ.get("PYRO_NONDIFF_DATA")
    if not folder:
        sys.exit(
            "--data mnist: the environment variable PYRO_NONDIFF_DATA is not set. Set it to the "
            "folder of mnist/train-images-idx3-ubyte.gz and mnist/t10k-images-idx3-ubyte.gz."
        )

    def read(name: str) -> Tensor:
        path = Path(folder) / "mnist" / f"{name}-images-idx3-ubyte.gz"
        if not path.exists():
            sys.exit(f"--data mnist: there is no {path}. PYRO_NONDIFF_DATA is {folder}.")
        with gzip.open(path) as file:
            pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28 * 28)
        return torch.tensor(pixels > 127, dtype=torch.float32)

    return Data(read("train"), read("t10k"), bits=200, hidden=200, learning_rate=1e-3)


LOADERS = {"digits": load_small_digits, "mnist": load_mnist}

# %% [markdown]
# ## The program
#
# An ordinary Pyro model and guide. Neither names an estimator.


# %%
class VAE(nn.Module):
    """A row of bits is drawn, and a network draws a picture from it."""

    def __init__(self, pixels: int, bits: int, hidden: int) -> None:
        super().__init__()
        self.prior = nn.Parameter(torch.zeros(bits))
        self.encoder = network(pixels, hidden, bits)
        self.decoder = network(bits, hidden, pixels)

    def model(self, x: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(logits=self.prior).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))

    @torch.no_grad()
    def reconstruct(self, x: Tensor, samples: int = 20) -> Tensor:
        z = dist.Bernoulli(logits=self.encoder(x)).sample((samples,))
        return self.decoder(z).sigmoid().mean(0)


def network(inputs: int, hidden: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.LeakyReLU(), nn.Linear(hidden, outputs))


# %% [markdown]
# ## Training
#
# Every run starts from a copy of the same networks and sees the same batches in the same order.
# The held-out ELBO, in nats a picture, is the same estimate for all, on the same random numbers.


# %%
@dataclass
class Run:
    """What one training run found."""

    name: str
    vae: VAE
    elbo_at: dict[int, float] = field(default_factory=dict)
    halfway: dict[str, Tensor] = field(default_factory=dict)
    learnt: dict[str, Tensor] = field(default_factory=dict)
    milliseconds: float = 0.0
    variance: float = 0.0
    signal_to_noise: float = 0.0

    @property
    def elbo(self) -> float:
        return self.elbo_at[max(self.elbo_at)]


def batches(data: Data, steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    size = (BATCH,)
    return [torch.randint(len(data.train), size, generator=generator) for _ in range(steps)]


def held_out_elbo(vae: VAE, data: Data) -> float:
    """Nats a picture: the mean of 20 samples for each of at most 2,000 pictures."""
    pictures = data.held_out[:2000]
    elbo = TraceEstimator_ELBO(num_particles=20)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        total = sum(elbo.loss(vae.model, vae.guide, chunk) for chunk in pictures.split(500))
    return -total / len(pictures)


def learning_rate(parameter: str, data: Data) -> dict[str, float]:
    """What an estimator learns is named after it, and takes larger steps than the model."""
    return {"lr": 1e-2 if parameter.startswith("estimator.") else data.learning_rate}


def train(name: str, start: VAE, data: Data, steps: int) -> Run:
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    run = Run(name, copy.deepcopy(start))
    vae = run.vae
    elbo = TraceEstimator_ELBO(ESTIMATORS[name])
    svi = SVI(vae.model, vae.guide, Adam(lambda name: learning_rate(name, data)), loss=elbo)
    seconds, running = [], None
    bar = trange(steps, desc=f"{name:>9}", unit="step", mininterval=0.5)
    for step, indices in zip(bar, batches(data, steps), strict=True):
        if step % max(steps // 25, 1) == 0:
            run.elbo_at[step] = held_out_elbo(vae, data)
        if step == steps // 2:
            run.halfway = copy.deepcopy(vae.state_dict())
            run.learnt = copy.deepcopy(elbo.states.state_dict())
        batch = data.train[indices]
        begin = time.perf_counter()
        loss = svi.step(batch) / BATCH
        seconds.append(time.perf_counter() - begin)
        running = -loss if running is None else 0.98 * running - 0.02 * loss
        bar.set_postfix(ELBO=f"{running:.2f}", refresh=False)
    run.elbo_at[steps] = held_out_elbo(vae, data)
    run.milliseconds = 1e3 * statistics.median(seconds)
    return run


# %% [markdown]
# ## How noisy is a gradient?
#
# `gradient_statistics` draws the gradient of one step many times over, and trains nothing. To
# compare estimators, all of them are measured at the same parameters: those that the first run
# had halfway. What an estimator had learnt by then in its own run is loaded into a fresh one; a
# moving average is given fifty batches to settle.


# %%
def measure(run: Run, parameters: dict[str, Tensor], data: Data) -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(4)
    vae = copy.deepcopy(run.vae)
    vae.load_state_dict(parameters)
    elbo = TraceEstimator_ELBO(ESTIMATORS[run.name])
    elbo.states.load_state_dict(run.learnt)
    *others, last = batches(data, 51)
    for indices in others:
        elbo.differentiable_loss(vae.model, vae.guide, data.train[indices])
    found = gradient_statistics(elbo, vae.model, vae.guide, data.train[last], num_samples=GRADIENTS)
    run.variance = float(found.total_variance)
    run.signal_to_noise = float(found.sites["z"].signal_to_noise)


# %% [markdown]
# ## The result


# %%
def table(runs: list[Run]) -> str:
    reference = runs[0]
    head = ["estimator", "held-out ELBO", f"variance / {reference.name}", "signal/noise", "ms/step"]
    rows = [
        [
            run.name,
            f"{run.elbo:.2f}",
            f"{run.variance / reference.variance:.3f}",
            f"{run.signal_to_noise:.2f}",
            f"{run.milliseconds:.2f}",
        ]
        for run in runs
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        " | ".join(text.rjust(w) for text, w in zip(r, widths, strict=True)) for r in [head, *rows]
    ]
    return "\n".join([lines[0], "-|-".join("-" * w for w in widths), *lines[1:]])


def verdict(runs: list[Run]) -> str:
    best = max(runs, key=lambda run: run.elbo)
    if len(runs) == 1:
        return f"{best.name} reaches a held-out ELBO of {best.elbo:.2f} nats a picture."
    second = max((run for run in runs if run is not best), key=lambda run: run.elbo)
    calmest = min(runs, key=lambda run: run.variance)
    return (
        f"{best.name} wins: {best.elbo - second.elbo:.2f} nats a picture ahead of {second.name}, "
        f"after the same number of steps. {calmest.name} has the calmest gradient."
    )


_COLOURS = ["#777777", "#e08214", "#5e3c99", "#c51b7d", "#1b7837", "#2166ac"]
COLOURS = dict(zip(ESTIMATORS, _COLOURS, strict=True))


def figure(runs: list[Run], data: Data, path: Path) -> None:
    names, colours = [run.name for run in runs], [COLOURS[run.name] for run in runs]
    fig, (curves, variances, pictures) = plt.subplots(
        1, 3, figsize=(13, 4.4), width_ratios=[1.2, 0.75, 1.2], layout="constrained"
    )
    for run, colour in zip(runs, colours, strict=True):
        steps = [step for step in run.elbo_at if step > 0]
        values = [run.elbo_at[step] for step in steps]
        curves.plot(steps, values, color=colour, label=run.name, linewidth=2)
    curves.set(xlabel="step", ylabel="nats a picture", title="Held-out ELBO")
    curves.legend(frameon=False, loc="lower right")
    curves.grid(alpha=0.3)

    bars = variances.bar(names, [run.variance / runs[0].variance for run in runs], color=colours)
    variances.bar_label(bars, fmt="%.2g", padding=2)
    variances.set(title="Gradient variance", ylabel=f"relative to {runs[0].name}")
    variances.tick_params(axis="x", rotation=30)
    for axes in (curves, variances):
        axes.spines[["top", "right"]].set_visible(False)

    shown = data.held_out[:6]
    rows = [shown, *(run.vae.reconstruct(shown) for run in runs)]
    margin = max(data.side // 8, 1)
    pictures.imshow(montage(rows, data.side, margin), cmap="gray_r", vmin=0, vmax=1)
    height = data.side + 2 * margin
    pictures.set_yticks([height * (row + 0.5) - 0.5 for row in range(len(rows))])
    pictures.set_yticklabels(["data", *names])
    pictures.set(xticks=[], title="Held-out digits, reconstructed")
    pictures.tick_params(length=0)
    pictures.spines[:].set_visible(False)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def montage(rows: list[Tensor], side: int, margin: int) -> Tensor:
    """Rows of flat pictures as one picture, with white margins."""
    images = torch.stack(rows).reshape(len(rows), -1, side, side).cpu()
    framed = nn.functional.pad(images, (margin,) * 4)
    return framed.permute(0, 2, 1, 3).flatten(2, 3).flatten(0, 1)


def report(runs: list[Run], steps: int) -> dict[str, Any]:
    return {
        "steps": steps,
        "estimators": {
            run.name: {
                "held_out_elbo": run.elbo,
                "gradient_variance": run.variance,
                "signal_to_noise": run.signal_to_noise,
                "milliseconds_per_step": run.milliseconds,
                "curve": run.elbo_at,
            }
            for run in runs
        },
    }


# %% [markdown]
# ## Running it
#
# Steps are timed on one CPU thread: the tensors are too small to be worth sharing out.


# %%
def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a VAE with a code of bits four times.")
    parser.add_argument("--data", choices=list(LOADERS), default="digits")
    parser.add_argument(
        "--estimators",
        nargs="+",
        choices=list(ESTIMATORS),
        default=SIDE_BY_SIDE,
        metavar="NAME",
        help=f"some of {', '.join(ESTIMATORS)}; variances are relative to the first",
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--output", type=Path, default=Path("quickstart_output"))
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, found {args.steps}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    return args


def check(runs: dict[str, Run]) -> None:
    """What this tutorial claims."""
    plain = runs["REINFORCE"]
    for name in ("RLOO-2", "DisARM", "RELAX"):
        assert runs[name].elbo > plain.elbo, f"{name} does not beat REINFORCE"
        assert runs[name].variance < 0.5 * plain.variance, f"{name} is as noisy as REINFORCE"
    assert runs["RELAX"].variance < runs["RLOO-2"].variance, "the control variate does not help"


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    data = LOADERS[args.data]()
    on_device = {"train": data.train.to(args.device), "held_out": data.held_out.to(args.device)}
    data = replace(data, **on_device)
    pyro.set_rng_seed(0)
    start = VAE(data.train.shape[-1], data.bits, data.hidden).to(args.device)
    print(f"{len(data.train)} pictures of {data.side}x{data.side}, {data.bits} bits a picture")

    runs = [train(name, start, data, args.steps) for name in dict.fromkeys(args.estimators)]
    for run in runs:
        measure(run, runs[0].halfway, data)
    print(f"\n{table(runs)}\n\n{verdict(runs)}")

    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{args.data}.png"
    figure(runs, data, path)
    path.with_suffix(".json").write_text(json.dumps(report(runs, args.steps), indent=1))
    print(f"Curves and reconstructions: {path.resolve()}")

    if not smoke_test and args.steps >= STEPS and set(SIDE_BY_SIDE) <= {run.name for run in runs}:
        check({run.name: run for run in runs})


if __name__ == "__main__":
    main()
