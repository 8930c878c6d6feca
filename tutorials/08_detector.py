# %% [markdown]
# # A detector, whose crop is ignored or not
#
# A small Faster R-CNN finds and names the digits on a canvas: proposals from a grid, a crop of the
# features at each, and a head that names it and betters its box. The same program with the crop's
# derivative ignored, as is usual, and with a spatial transformer.
#
# A detector proposes boxes, cuts each out of a feature map, and looks at what it has got. The box
# decides *which* features are cut out, and that has no derivative. "Ignore it", says the lecture:
# the box has a loss of its own, and learns from that. So it is in Faster R-CNN, whose RoI pooling
# rounds a box to whole features. Here the program says `crop`, and three handlers say what it is:
#
# | handler | reads | gradient to the box | known as |
# |---|---|---|---|
# | `ignore` | the nearest features | none | RoI pooling |
# | `RoIAlign`, written below in four lines | between the features | none | RoI align |
# | `SpatialTransformer` | between the features | yes | RoI warping |
#
#     python tutorials/08_detector.py
#     python tutorials/08_detector.py --device cuda --seeds 0 1 2 3 4

# %%
from functools import cache
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _boxes import iou, middle_cells, pick, scores, survivors
from _canvases import Canvases, with_digits
from _digits import mnist
from _pictures import boxes as draw_boxes
from _pictures import curves, strip
from _tutorial import Tutorial, smoke_test
from matplotlib.figure import Figure
from pyro.infer import SVI
from pyro.optim import CosineAnnealingLR
from torch import Tensor, nn
from tqdm import trange

from pyro_nondiff.handlers import AbstractHandler, SpatialTransformer, ignore
from pyro_nondiff.infer import CompiledSVI, ExpectedCost, no_guide
from pyro_nondiff.nn import Localization
from pyro_nondiff.ops import crop

tutorial = Tutorial(__file__, "Train a detector.", steps=2000, smoke=3)
device = tutorial.device
BATCH = 32
SIZE, GRID = 64, 8  # pixels of a canvas, and cells of the grid, along a side
REGIONS = 8  # that are looked at, of each canvas
BACKGROUND = 10  # the label of a region with no digit
SHOWN = 6

# %% [markdown]
# ## The detector
#
# Two convolutions make a feature map of 16x16, two more a grid of 8x8 cells. Each cell says whether
# the middle of a digit lies in it, and proposes a box, which starts at 20x20 pixels around the
# cell's middle. The regions that are looked at are those of the most promising cells. A region is
# 7x7 features, whatever its box; the head names it, and moves its box once more.


# %%
class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        middle = (torch.arange(GRID) + 0.5) / GRID
        y, x = torch.meshgrid(middle, middle, indexing="ij")
        side = torch.full_like(x, 20 / SIZE)
        boxes = torch.stack([x - side / 2, y - side / 2, side, side], -1).flatten(0, 1)
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        )
        self.grid = nn.Sequential(
            *(nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()),
        )
        self.digit = nn.Linear(32, 1)
        self.place = Localization(32, "box", start=boxes)
        self.head = nn.Sequential(nn.Flatten(-3), nn.Linear(32 * 7 * 7, 64), nn.ReLU())
        self.label = nn.Linear(64, BACKGROUND + 1)
        self.better = Localization(64, "box")

    def propose(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The features, and of each cell how likely it has a digit, and its box."""
        features = self.features(images[:, None])
        cells = self.grid(features).flatten(-2).mT
        return features, self.digit(cells).squeeze(-1), self.place(cells)

    def look(self, features: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
        """The label of each region, as logits, and a better box."""
        seen = self.head(crop("regions", features[:, None], regions, (7, 7)))
        return self.label(seen), self.better(seen, start=regions)


def best(digit: Tensor, boxes: Tensor) -> Tensor:
    """The boxes of the cells that promise most. Which they are has no derivative either."""
    return pick(boxes, digit.topk(REGIONS, -1).indices)


# %% [markdown]
# ## What it is told
#
# In training, the truth is observed: which cells have a digit, where it is, and of each region
# that overlaps a digit by half (an intersection over union, IoU, of 0.5) its label and its box. Of
# others it is told that they are background. Boxes are observed with Laplace noise: the loss is
# their absolute error.


# %%
def model(detector: Detector, images: Tensor, labels: Tensor, boxes: Tensor) -> None:
    pyro.module("detector", detector)
    features, digit, places = detector.propose(images)
    has_digit, box = middle_cells(boxes, labels >= 0, GRID)
    # Cells with a digit are looked at for certain: the head has something to learn from.
    regions = best(digit + 1e3 * has_digit, places)
    logits, better = detector.look(features, regions)
    overlap, which = iou(regions, boxes).max(-1)
    found = overlap >= 0.5
    label = labels.gather(-1, which).where(found, BACKGROUND)
    with pyro.plate("canvases", len(images), dim=-2):
        with pyro.plate("cells", GRID**2, dim=-1):
            pyro.sample("digit", dist.Bernoulli(logits=digit), obs=has_digit.float())
            pyro.sample("place", near(places, has_digit), obs=box)
        with pyro.plate("regions looked at", REGIONS, dim=-1):
            pyro.sample("label", dist.Categorical(logits=logits), obs=label)
            pyro.sample("box", near(better, found), obs=pick(boxes, which))


def near(boxes: Tensor, present: Tensor) -> dist.TorchDistribution:
    return dist.Laplace(boxes, 0.05).to_event(1).mask(present)


# %% [markdown]
# ## The third handler
#
# A handler learns what to do with an op by `rule`, and a handler's rules are inherited. RoI align
# is a spatial transformer that does not see where its box comes from.


# %%
class RoIAlign(SpatialTransformer):
    """Reads between the features, and has no gradient to the box (Mask R-CNN)."""


@RoIAlign.rule(crop)
def _(handler: Any, name: str, image: Tensor, box: Tensor, size: tuple[int, int]) -> Tensor:
    return SpatialTransformer.rules[crop](handler, name, image, box.detach(), size)


HANDLERS: dict[str, AbstractHandler] = {
    "ignore": ignore(),
    "RoIAlign": RoIAlign(),
    "SpatialTransformer": SpatialTransformer(),
}

# %% [markdown]
# ## Detection
#
# A detection is a region that is no background. Of two whose boxes share more than 0.3, the one
# that is surer of its label stays. A detection is right if it overlaps a digit of its label by at
# least 0.5, and no surer one has that digit.


# %%
@torch.no_grad()
def detect(detector: Detector, images: Tensor) -> dict[str, Tensor]:
    """Of each canvas the regions, the surest first; the label is -1 if it is no detection."""
    features, digit, places = detector.propose(images)
    regions = best(digit, places)
    logits, boxes = detector.look(features, regions)
    sure, labels = logits.softmax(-1)[..., :BACKGROUND].max(-1)
    sure, order = sure.sort(descending=True)
    boxes, regions = pick(boxes, order), pick(regions, order)
    stays = survivors(boxes, sure, least=0.5, most_shared=0.3)
    return {"boxes": boxes, "regions": regions, "labels": labels.gather(1, order).where(stays, -1)}


# %% [markdown]
# ## Training
#
# On 20,000 canvases of 64x64 pixels with one to three digits of MNIST, whose ink does not overlap;
# 2,000 of other digits are for test.


# %%
@cache
def load() -> tuple[Canvases, Canvases]:
    train, test = mnist(tutorial.args.data)
    numbers = (100, 50) if smoke_test else (20_000, 2_000)
    pairs = zip((train, test), numbers, strict=True)
    made = [with_digits(d, n, SIZE, most=3, seed=seed) for seed, (d, n) in enumerate(pairs)]
    return made[0].to(device), made[1].to(device)


def train(handler: AbstractHandler, *, seed: int) -> dict[str, Any]:
    canvases, test = load()
    detector = Detector().to(device)
    optimizer = CosineAnnealingLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 2e-3}, "T_max": tutorial.steps}
    )
    kind = SVI if smoke_test else CompiledSVI
    svi = kind(handler(model), no_guide, optimizer, ExpectedCost())
    for _ in trange(tutorial.steps, desc=type(handler).__name__, disable=smoke_test):
        batch = canvases.at(torch.randint(len(canvases), (BATCH,), device=device))
        svi.step(detector, batch.images, batch.labels, batch.boxes)
        optimizer.step()
    with handler:
        parts = [detect(detector, images) for images in test.images.split(500)]
    found = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    shown = {key: value[:SHOWN].cpu() for key, value in found.items()}
    truth = {"images": test.images[:SHOWN].cpu(), "truth": test.boxes[:SHOWN].cpu()}
    return scores(found, test.boxes, test.labels) | shown | truth


for name, handler in HANDLERS.items():
    tutorial.run(name, train, handler)

# %% [markdown]
# ## The result

# %%
head = ["crop", "F1 at IoU 0.5, %", "F1 at IoU 0.8, %", "mean IoU", "mean IoU of the proposals"]
digits = {"f1": 1, "strict": 1, "iou": 3, "proposed": 3}
rows = [[name, *(tutorial.spread(name, *item) for item in digits.items())] for name in HANDLERS]
tutorial.table(head, rows)
gain = tutorial.median("SpatialTransformer", "iou") - tutorial.median("ignore", "iou")
tutorial.claim("mean IoU with SpatialTransformer, less that with ignore", gain, ">=", 0.0)

# %% [markdown]
# All three find the digits. What a box is worth shows when a detection has to fit better than by a
# half: below, F1 as a function of the IoU that is asked for. The mean overlap gains most by reading
# between the features: a head that sees them rounded cannot tell by how much a box is off. F1 at
# 0.8 gains by the gradient to the box, though the box has a loss of its own. The proposals of both
# are no better than those of `ignore`, it is the last boxes that are.

# %%
COLOURS = dict(zip(HANDLERS, ["#c51b7d", "#e08214", "#2166ac"], strict=True))
figure = Figure(figsize=(7.6, 7.2), layout="constrained")
top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.35])
axes = top.subplots()
curves(axes, tutorial.results, list(COLOURS.values()))
axes.set(xlabel="IoU that a right detection needs", ylabel="F1, %")
for axes, (name, colour) in zip(bottom.subplots(3), COLOURS.items(), strict=True):
    run = tutorial.results[name][0]
    strip(axes, run["images"][:, None], name.replace("Spatial", "Spatial\n"))
    draw_boxes(axes, run["truth"], color="#c4c4c4", linewidth=3)
    detections = run["boxes"] * (run["labels"] >= 0)[..., None]
    draw_boxes(axes, detections, color=colour, linewidth=1.5)
bottom.suptitle("Detections, over the true boxes in grey", fontsize="medium")
tutorial.picture(figure)
tutorial.finish()
