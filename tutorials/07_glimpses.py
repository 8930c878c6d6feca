# %% [markdown]
# # Glimpses: hard attention by REINFORCE, or a spatial transformer
#
# A recurrent network looks at a large picture through a small window, three times, and says which
# digit it has seen. One program is trained by REINFORCE, RLOO, LAX, and as a spatial transformer.
#
# What a window shows has no derivative in the window's place: the place picks pixels. The lecture
# has two ways out. The place may be drawn at random, and the network that chose it trained by the
# score function, of which it says that it "does not work well". Or the window is read between the
# pixels, and then it has a derivative. Here both are handlers round the same program. As a
# yardstick, the same network looks at random places.
#
#     python tutorials/07_glimpses.py
#     python tutorials/07_glimpses.py --seeds 0 --steps 20000 --device cuda

# %%
from typing import Any

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from _canvases import Canvases, clutter, with_digits
from _digits import Split, mnist
from _pictures import boxes as draw_boxes
from _pictures import curves, strip
from _tutorial import Tutorial, smoke_test
from matplotlib.figure import Figure
from pyro.infer import SVI
from pyro.optim import LambdaLR
from torch import Tensor, nn
from tqdm import tqdm

from pyro_nondiff.estimators import LAX, REINFORCE, RLOO, AbstractEstimator, MovingAverage
from pyro_nondiff.handlers import AbstractHandler, SpatialTransformer, mode, randomize
from pyro_nondiff.infer import ExpectedCost, no_guide
from pyro_nondiff.nn import batchify
from pyro_nondiff.ops import crop

SIZE, WINDOW, GLIMPSES, HIDDEN, BATCH = 60, 24, 3, 128, 64
TEST = 100 if smoke_test else 10_000

# %% [markdown]
# ## The program
#
# A blurred view of the whole picture makes the first state. From each state the network decides
# where to look next; what it sees there, at half the resolution, makes the next state. `crop` is
# the op without a derivative. The label is observed, so its negative log-probability is the cost.


# %%
class Glimpses(nn.Module):
    """Three looks through a window; with ``decide=False`` from the middle, whatever is seen."""

    def __init__(self, decide: bool) -> None:
        super().__init__()
        self.blur = nn.Sequential(nn.AvgPool2d(5), nn.Flatten(), nn.Linear(144, HIDDEN), nn.ReLU())
        self.decide = decide
        self.where = nn.Sequential(nn.Linear(HIDDEN, 64), nn.ReLU(), nn.Linear(64, 2))
        for parameter in self.where[-1].parameters():
            nn.init.zeros_(parameter)  # the first look is at the middle
        halved = (WINDOW // 2) ** 2
        see = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(halved, HIDDEN), nn.ReLU())
        self.see = batchify(see, event_dim=3)  # estimators may ask for more worlds than one
        self.core = batchify(nn.GRUCell(HIDDEN, HIDDEN), event_dim=1)
        self.classify = nn.Linear(HIDDEN, 10)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The scores of the digits, and where the network decided to look."""
        pyro.module("glimpses", self)
        images, side, boxes = images[:, None], WINDOW / SIZE, []
        with pyro.plate("data", len(images)):
            state = self.blur(images)
            for look in range(GLIMPSES):
                middle = 0.5 + 0.5 * self.where(state).tanh() * self.decide
                box = torch.cat([middle - side / 2, torch.full_like(middle, side)], -1)
                window = crop(f"look {look}", images, box, (WINDOW, WINDOW))
                state = self.core(self.see(window), state)
                boxes.append(box)
            scores = self.classify(state)
            pyro.sample("label", dist.Categorical(logits=scores), obs=labels)
        return scores, boxes


# %% [markdown]
# ## The choices
#
# `randomize` draws the window's place from a Normal law around what the network decided; a scale of
# 0 leaves its size alone. The estimators then say how the network is told whether that was a good
# place. Under `SpatialTransformer` nothing is drawn.


# %%
def moved_by(scale: float) -> AbstractHandler:
    return randomize(scale=torch.tensor([scale, scale, 0.0, 0.0]))


CHOICES: dict[str, tuple[AbstractHandler, AbstractEstimator | None]] = {
    "random places": (moved_by(0.25), REINFORCE()),
    "REINFORCE": (moved_by(0.1), REINFORCE(MovingAverage())),
    "RLOO": (moved_by(0.1), RLOO(num_samples=2)),
    "LAX": (moved_by(0.1), LAX()),
    "spatial transformer": (SpatialTransformer(), None),
}
SCORE_FUNCTION = ["REINFORCE", "RLOO", "LAX"]

# %% [markdown]
# ## Training
#
# Every step sees canvases that were not seen before: a digit anywhere on 60x60 pixels, alone or
# among four pieces of other digits. All choices see the same, and learn at the same rates, which
# fall to 0: the layers that decide where to look learn at a quarter of the rate of the others,
# since a window that runs away early does not come back.


# %%
def canvases(digits: Split, number: int, pieces: int, seed: int) -> Canvases:
    made = with_digits(digits, number, SIZE, seed=seed)
    images = clutter(made.images, digits, pieces, seed=seed + 10**9)
    return Canvases(images, made.labels, made.boxes)


def train(
    name: str, pieces: int, digits: Split, test: Canvases, steps: int, seed: int
) -> dict[str, Any]:
    handler, estimator = CHOICES[name]
    net = Glimpses(decide=name != "random places").to(test.images.device)
    objective = ExpectedCost(estimator, worlds="vectorized")
    adam = {"optimizer": torch.optim.Adam, "optim_args": rates}
    optim = LambdaLR({**adam, "lr_lambda": lambda step: 1 - step / steps})
    svi = SVI(handler(net), no_guide, optim, objective)
    curve = []
    for step in tqdm(range(steps), desc=name, disable=smoke_test):
        if step % 100 == 0:
            fresh = canvases(digits, 100 * BATCH, pieces, seed * steps + step + 1)
            fresh = fresh.to(test.images.device)
        batch = fresh.at(slice(step % 100 * BATCH, step % 100 * BATCH + BATCH))
        svi.step(batch.images, batch.labels[:, 0])
        optim.step()
        if (step + 1) % max(steps // 10, 1) == 0:
            curve.append((step + 1, error(handler, net, test.at(slice(2000)))))
    result = {"curve": curve, "error": error(handler, net, test)}
    with torch.no_grad():
        first = test.at(slice(4))
        _, boxes = mode()(handler(net))(first.images, first.labels[:, 0])
        result["boxes"] = torch.stack(boxes, 1).cpu()
    return result


def rates(name: str) -> dict[str, float]:
    if name.startswith("estimator."):
        return {"lr": 1e-2}
    return {"lr": 5e-4 if ".where." in name else 2e-3}


# %% [markdown]
# For the test, `mode` takes the decided place; random places stay random. The spatial transformer
# is tested as it was trained.
#
# A step of RLOO runs the program twice. The other estimators, and the spatial transformer, run it
# once.


# %%
@torch.no_grad()
def error(handler: AbstractHandler, net: Glimpses, test: Canvases) -> float:
    """In percent."""
    program = mode()(handler(net)) if net.decide else handler(net)
    wrong = 0
    for start in range(0, len(test), 1000):
        part = test.at(slice(start, start + 1000))
        scores, _ = program(part.images, part.labels[:, 0])
        wrong += int((scores.argmax(-1) != part.labels[:, 0]).sum())
    return 100 * wrong / len(test)


# %% [markdown]
# ## The result

# %%
COLOURS = ["#aaaaaa", "#b5441c", "#d9a441", "#6a7d1e", "#1f6f8b"]
LOOKS = ["#8fb8c8", "#4a8fa8", "#b5441c"]
PIECES = {"translated": 0, "cluttered": 4}


def figure(runs: dict[tuple[str, str], list[dict[str, Any]]], shown: Tensor) -> Figure:
    fig = plt.figure(figsize=(12, 4), layout="constrained")
    left, right = fig.subfigures(1, 2, width_ratios=[1.5, 1])
    for axes, kind in zip(left.subplots(1, 2, sharey=True), PIECES, strict=True):
        curves(axes, {name: runs[kind, name] for name in CHOICES}, COLOURS)
        axes.set(xlabel="step", title=f"{kind.capitalize()} digits: test error, %", ylim=(0, 90))
    for axes, name in zip(right.subplots(2), ("REINFORCE", "spatial transformer"), strict=True):
        strip(axes, shown[:, None], name.replace(" ", "\n"))
        looks = runs["cluttered", name][0]["boxes"].split(1, dim=1)
        for look, colour in zip(looks, LOOKS, strict=True):
            draw_boxes(axes, look, color=colour, linewidth=1.5)
    right.suptitle("Where it looks: first, second, third", fontsize="large")
    return fig


def main() -> None:
    tutorial = Tutorial(__file__, "Look at digits through a window.", steps=5000, smoke=10)
    digits, held_out = mnist(tutorial.args.data)
    runs = {}
    for kind, pieces in PIECES.items():
        test = canvases(held_out, TEST, pieces, seed=0).to(tutorial.device)
        for name in CHOICES:
            arguments = (name, pieces, digits, test, tutorial.steps)
            runs[kind, name] = tutorial.run(f"{name}, {kind}", train, *arguments)
    rows = [
        [name, *(tutorial.spread(f"{name}, {kind}", "error", 1) for kind in PIECES)]
        for name in CHOICES
    ]
    tutorial.table(["choice", *(f"{kind} digits" for kind in PIECES)], rows, "Test error, %")
    for kind in PIECES:
        errors = {name: tutorial.median(f"{name}, {kind}", "error") for name in CHOICES}
        best = min(errors[name] for name in SCORE_FUNCTION)
        share = errors["spatial transformer"] / best
        tutorial.claim(f"{kind}: spatial transformer's error over the best other", share, "<=", 0.8)
        share = errors["REINFORCE"] / errors["random places"]
        tutorial.claim(f"{kind}: REINFORCE's error over random places'", share, "<=", 0.75)
    tutorial.picture(figure(runs, test.images[:4].cpu()))
    tutorial.finish()


if __name__ == "__main__":
    main()
