# %% [markdown]
# # Where to look: spatial transformers
#
# A network finds the digit, the sign, or the two digits to add, cuts them out and names them,
# without being told where they are. Against the same classifier without it, at equal parameters.
#
# A crop has no derivative in its place: move the place a little, and the same pixels are read, or
# suddenly others. The lecture's way out is to smooth it: read *between* the pixels. If $U_{ij}$ are
# the pixels, and a point $(u, v)$ of the part lies at $(x, y) = \theta \, (u, v, 1)^\top$ of the
# image, its value is
#
# $$V = \sum_{i,j} U_{ij} \, \max(0, 1 - |x - j|) \, \max(0, 1 - |y - i|),$$
#
# which has a derivative in $x$ and $y$, and so in the six numbers $\theta$. A small network, the
# *localisation net*, computes $\theta$ from the image, and is trained by the classifier's loss.
#
# The program says `warp`, and the handler `SpatialTransformer` around it says how it is smoothed.
#
#     python tutorials/06_spatial_transformer.py
#     python tutorials/06_spatial_transformer.py --device cuda --seeds 0 1 2 3 4

# %%
from collections.abc import Callable
from functools import lru_cache
from itertools import count
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _digits import Split
from _pictures import cut_out, tidy
from _scenes import Scenes, birds, cluttered_digits, signs, sums
from _tutorial import Tutorial, smoke_test
from matplotlib.figure import Figure
from pyro.infer import SVI
from pyro.optim import CosineAnnealingLR
from torch import Tensor, nn
from tqdm import trange

from pyro_nondiff.handlers import SpatialTransformer
from pyro_nondiff.infer import CompiledSVI, ExpectedCost, no_guide
from pyro_nondiff.nn import Localization
from pyro_nondiff.ops import warp

tutorial = Tutorial(__file__, "Train spatial transformers.", steps=3000, smoke=3)
data, device = tutorial.args.data, tutorial.device
BATCH, SIDE = 100, 28  # pictures of a batch, and pixels along a side of a part that is cut out

# %% [markdown]
# ## The classifiers
#
# One is fully connected, one has convolutions of stride 2. Both take a stack of `channels` pictures
# of `side` x `side` pixels. `width` is what makes them larger or smaller.


# %%
def fully_connected(channels: int, side: int, classes: int, width: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(channels * side * side, width), nn.ReLU()),
        *(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)),
    )


def convolutional(channels: int, side: int, classes: int, width: int) -> nn.Module:
    left = ((side - 5) // 2 - 2) // 2 + 1  # pixels of a side after two convolutions
    return nn.Sequential(
        *(nn.Conv2d(channels, width, 5, stride=2), nn.ReLU()),
        *(nn.Conv2d(width, 2 * width, 3, stride=2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(2 * width * left**2, 8 * width), nn.ReLU(), nn.Linear(8 * width, classes)),
    )


# %% [markdown]
# ## The localisation net
#
# It sees the picture at half its resolution: to find a thing takes less than to name it. Its last
# layer, `Localization`, starts with weights of 0, and looks at all of the picture until it has
# learnt better. `shape` is how many places it names. Two transformers in parallel begin alike, and
# part ways because the classifier reads each with weights of its own.


# %%
def localisation(channels: int, side: int, parts: int) -> nn.Module:
    left = (side // 2 - 5) // 2 - 1
    return nn.Sequential(
        *(nn.AvgPool2d(2), nn.Conv2d(channels, 16, 5, stride=2), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(16 * left**2, 32), nn.ReLU()),
        Localization(32, "affine", shape=(parts,)),
    )


# %% [markdown]
# ## The program
#
# `warp` cuts the parts out, one for each $\theta$ that the localisation net gives; the classifier
# sees them as channels. With no localisation net, it sees the picture. Nothing here says that a
# warp has no derivative, or what is done about it.


# %%
class Network(nn.Module):
    def __init__(self, classifier: nn.Module, where: nn.Module | None) -> None:
        super().__init__()
        self.classifier, self.where = classifier, where

    def forward(self, images: Tensor) -> Tensor:
        if self.where is not None:
            images = cut(images, self.where(images)).flatten(1, 2)
        return self.classifier(images)


def cut(images: Tensor, theta: Tensor) -> Tensor:
    return warp("parts", images[:, None], theta, (SIDE, SIDE))


def model(network: Network, images: Tensor, labels: Tensor | None = None) -> Tensor:
    pyro.module("network", network)
    with pyro.plate("data", len(images)):
        logits = network(images)
        pyro.sample("label", dist.Categorical(logits=logits), obs=labels)
    return logits


# %% [markdown]
# ## What is learnt
#
# | task | a picture | to learn from | for test |
# |---|---|---|---|
# | cluttered digits | a digit, five pieces of others; 40x40 | 60,000 | 10,000, and 1,000 |
# | signs | a traffic sign of 20 to 32 pixels; 48x48, in colour | 20,000 | 4,400 |
# | sums | two digits on two channels, their sum as label; 40x40 | 50,000 | 10,000 |
# | birds | a photograph of one of ten species; 80x80, in colour | 5,000 | 70 |
#
# All digits are MNIST's, and no digit or photograph of a test set is learnt from. 10,000 and 1,000
# of the cluttered ones are the file that comes with the published examples of spatial
# transformers; the others are made here. The signs are 3,560 and 880 photographs, pasted anywhere.
# The sums are the paper's: no single cut brings both digits to their place, since each lies
# somewhere else. The birds are the lecture's slide: 224 photographs are far too few to name
# species by, and there is no claim about them.
#
# A comparison is at equal parameters: the network with the most transformers has a classifier of a
# given width, and the classifiers of the others are as wide as gives them at least as many; the
# table has the numbers.

# %%
TASKS: dict[str, tuple[Callable[..., Scenes], int]] = {
    "cluttered digits": (cluttered_digits, 1),
    "sums": (sums, 2),
    "signs": (signs, 1),
    "birds": (birds, 2),
}
WIDTHS = {fully_connected: 128, convolutional: 16}


@lru_cache(maxsize=1)
def load(task: str) -> Scenes:
    return TASKS[task][0](data, 0.02 if smoke_test else 1.0).to(device)


def build(scenes: Scenes, classifier: Callable[..., nn.Module], parts: int, most: int) -> Network:
    channels, side = scenes.train.images.shape[1:3]

    def network(parts: int, width: int) -> Network:
        seen = (parts * channels, SIDE) if parts else (channels, side)
        where = localisation(channels, side, parts) if parts else None
        return Network(classifier(*seen, scenes.classes, width), where)

    with torch.device("meta"):  # to count parameters, none is drawn
        asked = size(network(most, WIDTHS[classifier]))
        width = next(width for width in count(4) if size(network(parts, width)) >= asked)
    return network(parts, width).to(device)


def size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# %% [markdown]
# ## Training
#
# There is nothing to draw, so the loss is the negative log-probability of the labels alone. The
# handler goes around the program. After training the test set is read a second time without it:
# by the nearest pixel, the plain program.


# %%
def train(task: str, classifier: Callable[..., nn.Module], parts: int, *, seed: int) -> Any:
    scenes = load(task)
    network = build(scenes, classifier, parts, TASKS[task][1])
    smooth = SpatialTransformer()(model)
    optimizer = CosineAnnealingLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 2e-3}, "T_max": tutorial.steps}
    )
    svi = (SVI if smoke_test else CompiledSVI)(smooth, no_guide, optimizer, ExpectedCost())
    for _ in trange(tutorial.steps, desc=f"{task}, {parts} parts", disable=smoke_test):
        batch = scenes.train.at(torch.randint(len(scenes.train), (BATCH,), device=device))
        svi.step(network, batch.images, batch.labels)
        optimizer.step()
    smoothly, hard = error(smooth, network, scenes.test), error(model, network, scenes.test)
    result = {"error": smoothly, "nearest": hard, "parameters": size(network)}
    if scenes.published is not None:
        result["published"] = error(smooth, network, scenes.published)
    return result | look(network, scenes.test.images[:8])


@torch.no_grad()
def error(program: Callable[..., Tensor], network: Network, test: Split) -> float:
    """Of a hundred pictures, how many are named wrongly."""
    guesses = [program(network, images).argmax(-1) for images in test.images.split(500)]
    return 100 * float((torch.cat(guesses) != test.labels).double().mean())


@torch.no_grad()
@SpatialTransformer()
def look(network: Network, images: Tensor) -> dict[str, Tensor]:
    """Where a network looks, and what it sees there, at first and after training."""
    if network.where is None:
        return {}
    theta, first = network.where(images), network.where[-1].start
    parts, before = cut(images, theta), cut(images, first)
    return {"images": images, "theta": theta, "parts": parts, "before": before}


# %% [markdown]
# ## The result

# %%
RUNS = [
    *(("cluttered digits", fully_connected, parts) for parts in (0, 1)),
    *(("cluttered digits", convolutional, parts) for parts in (0, 1)),
    *(("signs", convolutional, parts) for parts in (0, 1)),
    *(("sums", convolutional, parts) for parts in (0, 1, 2)),
]
if data is not None and (data / "cub10_small").is_dir():
    RUNS.append(("birds", convolutional, 2))
rows = []
for task, classifier, parts in RUNS:
    what = f"{task}, {classifier.__name__.replace('_', ' ')}"
    name, without = f"{what}, {parts} transformers", f"{what}, 0 transformers"
    run = tutorial.run(name, train, task, classifier, parts)[0]
    row = [*what.split(", "), parts, f"{run['parameters']:,}", tutorial.spread(name, "error")]
    ratio = ""
    if without in tutorial.results:
        share = tutorial.median(name, "error") / tutorial.median(without, "error")
        ratio = f"{share:.2f}"
        if parts == TASKS[task][1]:
            asked = 0.4 if classifier is fully_connected else 0.7
            tutorial.claim(f"{what}: error with {parts} / without", share, "<=", asked)
    published = tutorial.spread(name, "published", 1) if "published" in run else ""
    rows.append([*row, ratio, tutorial.spread(name, "nearest"), published])
head = ["task", "classifier", "transformers", "parameters", "test error, %", "ratio"]
tutorial.table([*head, "by nearest pixels, %", "published test set, %"], rows)

# %% [markdown]
# The picture shows what is cut out: its outline, and below it what the classifier gets to see. Of
# signs and birds there is such a picture in the output folder only, since the photographs are not
# ours to publish.

# %%
COLOURS = ["#999999", "#c51b7d", "#2166ac"]


def gallery(figure: Any, name: str) -> None:
    run = tutorial.results[name][0]
    parts = {"at first": run["before"][:, 0], "learnt": run["parts"][:, 0]}
    if "2 transformers" in name:
        parts = {f"learnt, {k + 1}": seen for k, seen in enumerate(run["parts"].unbind(1))}
    cut_out(figure, run["images"], run["theta"], parts, COLOURS[1:])
    figure.suptitle(name.rsplit(", ", 1)[0], fontsize="medium")


def errors(axes: Any) -> None:
    for name, (task, _, parts) in zip(tutorial.results, RUNS, strict=True):
        if task != "birds":
            label = name.replace("1 transformers", "1 transformer")
            bar = axes.barh(label, tutorial.median(name, "error"), color=COLOURS[parts])
            axes.bar_label(bar, fmt="%.1f", padding=2)
    axes.invert_yaxis()
    axes.set(xlabel="test error, %")
    tidy(axes)


PICTURES = [
    "cluttered digits, convolutional, 1 transformers",
    "sums, convolutional, 2 transformers",
    "signs, convolutional, 1 transformers",
    "birds, convolutional, 2 transformers",
]
figure, photographs = (Figure(figsize=(7.6, tall), layout="constrained") for tall in (8.2, 6))
top, *below = figure.subfigures(3, 1, height_ratios=[1, 1.2, 1.2])
errors(top.subplots())
for part, name in zip([*below, *photographs.subfigures(2, 1)], PICTURES, strict=True):
    if name in tutorial.results:
        gallery(part, name)
photographs.savefig(tutorial.folder / "photographs.png", dpi=110)
tutorial.picture(figure)
tutorial.finish()
