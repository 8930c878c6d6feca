# %% [markdown]
# # Quickstart: four estimators, one program
#
# A variational autoencoder whose code is a row of bits, trained four times from the same start.
# Only how its gradient is estimated differs.
#
# A bit is drawn, and a drawn bit does not move when its probability does a little: the program has
# no derivative. Pyro runs it, but somebody has to say how the encoder's gradient is *estimated*:
#
# | name | estimator | runs of the program a step |
# |---|---|---|
# | `REINFORCE` | score function, with a moving average of the cost as baseline | 1 |
# | `RLOO` | score function; the other sample is the baseline | 2 |
# | `DisARM` | an antithetic pair: the second sample flips what the first one drew | 2 |
# | `RELAX` | score function; relaxed runs and a small network are the baseline | 1 + 2 relaxed |
#
#     python tutorials/00_quickstart.py               # scikit-learn's digits, or MNIST where it is
#     python tutorials/00_quickstart.py --steps 10000 --device cuda

# %%
import statistics
import time
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _digits import mnist
from _pictures import curves, strip
from _tutorial import Tutorial, smoke_test
from matplotlib.figure import Figure
from pyro.infer import SVI
from pyro.optim import Adam
from torch import Tensor, nn
from tqdm import tqdm

from pyro_nondiff.diagnostics import gradient_statistics
from pyro_nondiff.estimators import REINFORCE, RELAX, RLOO, DisARM, MovingAverage
from pyro_nondiff.infer import TraceEstimator_ELBO

BATCH, BITS, HIDDEN = 100, 64, 200
GRADIENTS = 10 if smoke_test else 200  # drawn to measure a variance

# %% [markdown]
# ## The choice
#
# An estimator is a small immutable object. Nothing else in this file depends on which it is.

# %%
ESTIMATORS = {
    "REINFORCE": REINFORCE(baseline=MovingAverage(decay=0.9)),
    "RLOO": RLOO(num_samples=2),
    "DisARM": DisARM(),
    "RELAX": RELAX(),
}

# %% [markdown]
# ## The program
#
# An ordinary Pyro model and guide. Neither names an estimator.


# %%
class VAE(nn.Module):
    """A row of bits is drawn, and a network draws a picture from it."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.prior = nn.Parameter(torch.zeros(BITS))
        self.encoder = network(pixels, BITS)
        self.decoder = network(BITS, pixels)

    def model(self, x: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=self.prior).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))


def network(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.LeakyReLU(), nn.Linear(HIDDEN, outputs))


# %% [markdown]
# ## Training
#
# Every run starts from the same seed: the same networks, and the same batches in the same order.
# The bound on held-out digits, in nats a picture, is the same estimate for all.


# %%
def train(name: str, train_set: Tensor, held_out: Tensor, steps: int, seed: int) -> dict[str, Any]:
    vae = VAE(train_set.shape[-1]).to(train_set.device)
    elbo = TraceEstimator_ELBO(ESTIMATORS[name])
    # What an estimator learns is named after it, and takes larger steps than the model.
    optim = Adam(lambda name: {"lr": 1e-2 if name.startswith("estimator.") else 2e-3})
    svi = SVI(vae.model, vae.guide, optim, loss=elbo)
    batches = torch.Generator().manual_seed(seed)
    result: dict[str, Any] = {"curve": []}
    seconds = []
    for step in tqdm(range(steps), desc=name, disable=smoke_test):
        if step == steps // 2:
            result["halfway"] = copy(vae.state_dict())
            result["learnt"] = copy(elbo.states.state_dict())
        batch = train_set[torch.randint(len(train_set), (BATCH,), generator=batches)]
        begin = time.perf_counter()
        svi.step(batch)
        seconds.append(time.perf_counter() - begin)
        if (step + 1) % max(steps // 20, 1) == 0:
            result["curve"].append((step + 1, bound(vae, held_out)))
    codes = dist.Bernoulli(logits=vae.encoder(held_out[:6])).sample((20,))
    result["reconstructed"] = vae.decoder(codes).sigmoid().mean(0).detach().cpu()
    result["bound"] = result["curve"][-1][1]
    result["milliseconds"] = 1e3 * statistics.median(seconds)
    return result


@torch.no_grad()
def bound(vae: VAE, pictures: Tensor) -> float:
    """Nats a picture: the mean of 10 samples for each of at most 1,000 pictures."""
    elbo = TraceEstimator_ELBO(num_particles=10)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return -elbo.loss(vae.model, vae.guide, pictures[:1000]) / len(pictures[:1000])


def copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


# %% [markdown]
# ## How noisy is a gradient?
#
# `gradient_statistics` draws the gradient of one step many times over, and trains nothing. To
# compare estimators, all of them are measured at the same parameters: those that the first run had
# halfway. What an estimator had learnt by then in its own run is loaded into a fresh one.


# %%
def measure(
    name: str, run: dict[str, Any], halfway: dict[str, Tensor], train_set: Tensor, seed: int
) -> dict[str, Any]:
    vae = VAE(train_set.shape[-1]).to(train_set.device)
    vae.load_state_dict(halfway)
    elbo = TraceEstimator_ELBO(ESTIMATORS[name])
    elbo.states.load_state_dict(run["learnt"])
    for batch in train_set[: 50 * BATCH].split(BATCH):  # a moving average settles
        elbo.differentiable_loss(vae.model, vae.guide, batch)
    batch = train_set[:BATCH]
    found = gradient_statistics(elbo, vae.model, vae.guide, batch, num_samples=GRADIENTS)
    return {"variance": float(found.sites["z"].variance.sum())}


# %% [markdown]
# ## The result

# %%
COLOURS = ["#777777", "#b5441c", "#1f6f8b", "#6a7d1e"]


def figure(runs: dict[str, Any], variances: dict[str, float], observed: Tensor) -> Figure:
    fig = Figure(figsize=(12, 4), layout="constrained")
    bounds, bars, pictures = fig.subfigures(1, 3, width_ratios=[1.1, 0.8, 1.4])
    axes = bounds.subplots()
    curves(axes, {name: [run] for name, run in runs.items()}, COLOURS)
    axes.set(xlabel="step", ylabel="nats a picture", title="Bound on held-out digits")
    axes = bars.subplots()
    relative = [variance / variances["REINFORCE"] for variance in variances.values()]
    axes.bar_label(axes.bar(list(variances), relative, color=COLOURS), fmt="%.2g", padding=2)
    axes.set(title="Variance of the gradient", ylabel="relative to REINFORCE")
    axes.tick_params(axis="x", rotation=30)
    axes.spines[["top", "right"]].set_visible(False)
    rows = {"data": observed, **{name: run["reconstructed"] for name, run in runs.items()}}
    side = round(observed.shape[-1] ** 0.5)
    for axes, (name, row) in zip(pictures.subplots(len(rows)), rows.items(), strict=True):
        strip(axes, row.unflatten(-1, (1, side, side)), name)
    pictures.suptitle("Held-out digits, reconstructed")
    return fig


def main() -> None:
    tutorial = Tutorial(
        __file__,
        "Train a VAE with a code of bits four times.",
        steps=3000,
        smoke=20,
        seeds=1,
        needs_data=False,
    )
    torch.set_num_threads(1)  # the tensors are too small to be worth sharing out
    splits = mnist(tutorial.args.data)
    train_set, held_out = ((s.images.flatten(1) > 0.5).float().to(tutorial.device) for s in splits)
    runs, variances = {}, {}
    for name in ESTIMATORS:
        (runs[name],) = tutorial.run(name, train, name, train_set, held_out, tutorial.steps)
    halfway = runs["REINFORCE"]["halfway"]
    for name, run in runs.items():
        (found,) = tutorial.run(f"variance of {name}", measure, name, run, halfway, train_set)
        variances[name] = found["variance"]
    rows = [
        [
            name,
            f"{run['bound']:.2f}",
            f"{variances[name] / variances['REINFORCE']:.3f}",
            f"{run['milliseconds']:.2f}",
        ]
        for name, run in runs.items()
    ]
    tutorial.table(["estimator", "held-out ELBO", "variance / REINFORCE", "ms a step"], rows)
    tutorial.picture(figure(runs, variances, held_out[:6].cpu()))
    plain = runs["REINFORCE"]["bound"]
    for name in ("RLOO", "DisARM", "RELAX"):
        gain, share = runs[name]["bound"] - plain, variances[name] / variances["REINFORCE"]
        tutorial.claim(f"{name}: nats above REINFORCE", gain, ">=", 0.0)
        tutorial.claim(f"{name}: variance over REINFORCE's", share, "<=", 0.5)
    share = variances["RELAX"] / variances["RLOO"]
    tutorial.claim("RELAX: variance over RLOO's", share, "<=", 1.0)
    tutorial.finish()


if __name__ == "__main__":
    main()
