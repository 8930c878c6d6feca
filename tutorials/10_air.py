# %% [markdown]
# # Attend, infer, repeat: how many, what, and where
#
# A program that draws pictures of digits is run backwards: shown a picture, it says how many digits
# there are, where each one is, and what it looks like, though nobody ever told it what a digit is.
#
# Everything of the lecture comes together here. *How many* is a discrete choice. *Where* decides
# about a crop and a paste, which have no derivative either. Each gets its gradient in its own way,
# and all of that is said from outside of one Pyro program:
#
# | | in the program | its gradient |
# |---|---|---|
# | how many | a one-hot count | the exact sum over all counts: `Enumerate` |
# | where | a Normal place, to `crop` and to `paste` at | pathwise, `SpatialTransformer` |
# | what | a Normal code | pathwise |
#
# The same program is trained by other estimators as well, and under Pyro's `TraceGraph_ELBO` with a
# neural baseline, as in [Pyro's tutorial](https://pyro.ai/examples/air.html) on this model of
# [Eslami et al. (2016)](https://arxiv.org/abs/1603.08575).
#
#     python tutorials/10_air.py
#     python tutorials/10_air.py --device cuda --steps 20000      # canvases of 50x50

# %%
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from _canvases import Canvases, with_digits
from _digits import Split, mnist
from _pictures import boxes, strip
from _tutorial import Tutorial, smoke_test
from pyro import poutine
from pyro.infer import SVI, TraceGraph_ELBO
from torch import Tensor, nn
from tqdm import trange

from pyro_nondiff.distributions import ExponentialAnnealing
from pyro_nondiff.estimators import RLOO, AbstractEstimator, Enumerate
from pyro_nondiff.handlers import SpatialTransformer
from pyro_nondiff.infer import CompiledSVI, TraceEstimator_ELBO, config_estimator
from pyro_nondiff.nn import batchify
from pyro_nondiff.ops import crop, paste

tutorial = Tutorial(__file__, "Count, find and draw digits.", steps=600, smoke=15)
MOST, BATCH, CODE, HIDDEN = 2, 64, 20, 200

# %% [markdown]
# ## The data
#
# Canvases with none, one or two digits of MNIST, which are made smaller, so that two have room
# beside each other. Training sees no labels and no boxes: the true count is for the score alone.

# %%
LARGE = tutorial.device.type == "cuda"
SIZE, SIDE = (50, 21) if LARGE else (32, 14)  # of a canvas, and of a digit, in pixels


def canvases(digits: Split, number: int, seed: int) -> Canvases:
    small = nn.functional.interpolate(digits.images[:, None], (SIDE, SIDE), mode="area")[:, 0]
    made = with_digits(Split(small, digits.labels), number, SIZE, most=MOST, least=0, seed=seed)
    return made.to(tutorial.device)


train_digits, test_digits = mnist(tutorial.args.data)
train = canvases(train_digits, 1_000 if smoke_test else 60_000, seed=0)
test = canvases(test_digits, 200 if smoke_test else 10_000, seed=1)

# %% [markdown]
# ## The program
#
# The model draws a count, and a place and a code for each digit. A network makes a patch of the
# code, and the patch is pasted on the canvas at its place. A digit that is not there costs nothing:
# `poutine.mask` takes its terms out of both programs.
#
# The guide says how many digits it sees. Then it looks for them one by one: it says where the first
# is, crops that part, encodes it, and looks again at what the picture has left when that one is
# taken away. A second digit is found as soon as a first is.
#
# Digits are drawn badly at first, and a count of 0 would be the safest guess for ever. So the prior
# of a count $n$ is $p(n) \propto w^n$, where $w$ falls from 100 to 1/100 in the course of the first
# steps: in the beginning digits are welcome, in the end each must be worth its while.


# %%
class AIR(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        see = nn.Sequential(
            *[nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU()],
            *[nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()],
            *[nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()],
            *[nn.Linear(32 * ((SIZE + 7) // 8) ** 2, HIDDEN), nn.ReLU()],
        )
        self.see = batchify(see, event_dim=3)
        self.count = network(HIDDEN, MOST + 1)
        self.place = network(HIDDEN, 2 * 3)
        self.encode = network(SIDE**2, 2 * CODE)
        self.decode = network(CODE, SIDE**2)
        nn.init.constant_(self.decode[-1].bias, -2.0)  # patches are dark at first
        self.worth = ExponentialAnnealing(100.0, 0.01, num_steps=2 * tutorial.steps // 5)

    def model(self, picture: Tensor) -> Tensor:
        pyro.module("air", self)
        zeros, canvas = picture.new_zeros, picture.new_zeros(())
        prior = self.worth.value.log() * torch.arange(MOST + 1, device=picture.device)
        with pyro.plate("pictures", len(picture)):
            count = pyro.sample("count", dist.OneHotCategorical(logits=prior))
            for k in range(MOST):
                there = count[..., k + 1 :].sum(-1)
                with poutine.mask(mask=there > 0):
                    where = pyro.sample(f"where {k}", dist.Normal(zeros(3), 1).to_event(1))
                    what = pyro.sample(f"what {k}", dist.Normal(zeros(CODE), 1).to_event(1))
                digit = self.draw(f"digit {k}", where, what)
                canvas = canvas + there[..., None, None, None] * digit
            pyro.sample("picture", dist.Normal(canvas, 0.3).to_event(3), obs=picture)
        return canvas

    def draw(self, name: str, where: Tensor, what: Tensor) -> Tensor:
        patch = self.decode(what).sigmoid().unflatten(-1, (1, SIDE, SIDE))
        # A paste keeps the sum of a patch. To keep its brightness, what a pixel covers:
        covers = (box(where)[..., 2, None, None, None] * SIZE / SIDE) ** 2
        return paste(name, patch * covers, box(where), (SIZE, SIZE))

    def guide(self, picture: Tensor) -> None:
        pyro.module("air", self)
        with pyro.plate("pictures", len(picture)):
            seen = self.see(picture)
            count = pyro.sample("count", dist.OneHotCategorical(logits=self.count(seen)))
            left = picture
            for k in range(MOST):
                with poutine.mask(mask=count[..., k + 1 :].sum(-1) > 0):
                    where = pyro.sample(f"where {k}", normal(self.place(self.see(left))))
                    glimpse = crop(f"glimpse {k}", left, box(where), (SIDE, SIDE))
                    what = pyro.sample(f"what {k}", normal(self.encode(glimpse.flatten(-3))))
                left = left - self.draw(f"explained {k}", where, what)


def network(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs))


def normal(parameters: Tensor) -> dist.TorchDistribution:
    loc, scale = parameters.chunk(2, -1)
    return dist.Normal(loc, nn.functional.softplus(scale)).to_event(1)


def box(where: Tensor) -> Tensor:
    """A square ``(x0, y0, w, h)``: about the size of a digit, and its middle in the middle half."""
    side = SIDE / SIZE * (0.1 * where[..., :1]).exp()
    corner = 0.5 + 0.25 * where[..., 1:] - side / 2
    return torch.cat([corner, side, side], -1)


# %% [markdown]
# ## The choice
#
# `SpatialTransformer` around model and guide says how the crops and pastes are smoothed.
# `config_estimator` says how the count is estimated: `Enumerate` runs each of its three values in a
# world of its own. These share all that does not depend on the count, which here is everything but
# the sum of the digits on the canvas: three counts cost little more than one.
#
# Pyro's objective takes the same two programs. Its baseline for the count, a network of the
# picture, is configured from outside too. It learns at a rate of 0.01, which did better here than
# 0.1.

# %%
smooth = SpatialTransformer()


def by(estimator: AbstractEstimator, air: AIR) -> CompiledSVI:
    guide = config_estimator(air.guide, {"count": estimator})
    optim, elbo = pyro.optim.Adam({"lr": 1e-3}), TraceEstimator_ELBO()
    backend = "inductor" if tutorial.steps > 2000 else "replay"  # is it worth to compile?
    return CompiledSVI(smooth(air.model), smooth(guide), optim, elbo, backend=backend)


def by_pyro(air: AIR) -> SVI:
    net = nn.Sequential(nn.Flatten(), network(SIZE**2, 1), nn.Flatten(0)).to(tutorial.device)

    def guide(picture: Tensor) -> None:
        entry = {"nn_baseline": pyro.module("baseline", net), "nn_baseline_input": picture}
        choice = {"count": {"baseline": entry}}
        poutine.infer_config(air.guide, lambda site: choice.get(site["name"], {}))(picture)

    optim = pyro.optim.Adam(lambda name: {"lr": 1e-2 if "baseline" in name else 1e-3})
    return SVI(smooth(air.model), smooth(guide), optim, TraceGraph_ELBO())


# %% [markdown]
# ## Training
#
# Every 25 steps the most probable count of some test canvases is compared with the true one.

# %%
EVERY, ENOUGH = 5 if smoke_test else 25, 0.90


@torch.no_grad()
def accuracy(air: AIR, canvases: Canvases) -> float:
    parts = canvases.images[:, None].split(500)
    found = torch.cat([air.count(air.see(part)).argmax(-1) for part in parts])
    return (found == canvases.counts).float().mean().item()


def learn(make: Callable[[AIR], Any], steps: int, *, seed: int) -> dict[str, Any]:
    air = AIR().to(tutorial.device)
    svi, some = make(air), test.at(slice(2000))
    curve = []
    for step in (bar := trange(1, steps + 1, disable=smoke_test)):
        indices = torch.randint(len(train), (BATCH,), device=tutorial.device)
        svi.step(train.images[indices, None])
        air.worth.step()
        if step % EVERY == 0:
            curve.append(accuracy(air, some))
            bar.set_postfix(counts=curve[-1])
    reached = [EVERY * n for n, right in enumerate(curve, 1) if right >= ENOUGH]
    elbo = TraceEstimator_ELBO().loss(smooth(air.model), smooth(air.guide), some.images[:, None])
    found = {"reached": min(reached, default=math.inf), "accuracy": accuracy(air, test)}
    return {**found, "elbo": -elbo / len(some), "curve": curve, "air": air.state_dict()}


PYRO = "TraceGraph_ELBO, neural baseline"
tutorial.run("Enumerate", learn, partial(by, Enumerate()), tutorial.steps)
tutorial.run(PYRO, learn, by_pyro, stopped := 2 * tutorial.steps)
tutorial.run("RLOO(4)", learn, partial(by, RLOO(4)), tutorial.steps, seeds=1)

# %% [markdown]
# ## What came of it
#
# A count that is drawn is praised and blamed for all that was drawn with it, so its gradient is
# noise for as long as the digits are bad. It learns later, or settles on one digit for good.

# %%
columns = {"reached": 0, "accuracy": 3, "elbo": 1}
head = ["the count by", f"steps to {ENOUGH:.0%}", "accuracy at the end", "ELBO, nats a canvas"]
rows = [
    [name, *(tutorial.spread(name, key, digits) for key, digits in columns.items())]
    for name in tutorial.results
]
tutorial.table(head, [[cell.replace("inf", "never") for cell in row] for row in rows])

# %% [markdown]
# The picture shows test canvases, and what the program that was trained by `Enumerate` draws of
# them, at the places that it has chosen.

# %%
air, shown = AIR().to(tutorial.device), test.at(test.counts > 0).images[:10, None]
air.load_state_dict(tutorial.results["Enumerate"][0]["air"])
with torch.no_grad():
    found = poutine.trace(smooth(air.guide)).get_trace(shown)
    drawn = poutine.replay(smooth(air.model), found)(shown)
figure, (above, below, curves) = plt.subplots(
    3, figsize=(10, 5), height_ratios=[1, 1, 3], layout="constrained"
)
strip(above, shown, "shown")
strip(below, drawn, "drawn")
for k, colour in enumerate(("red", "blue")):
    there = found.nodes["count"]["value"].argmax(-1) > k
    places = box(found.nodes[f"where {k}"]["value"]) * there[:, None]
    boxes(below, places[:, None], color=colour, linewidth=1.5)
for colour, (name, runs) in enumerate(tutorial.results.items()):
    right = torch.tensor([run["curve"] for run in runs]).T
    lines = curves.plot(EVERY * torch.arange(1, len(right) + 1), right, f"C{colour}", alpha=0.8)
    lines[0].set_label(name)
curves.axhline(ENOUGH, color="gray", linewidth=0.8, linestyle="--")
curves.set(xlabel="step", ylabel="counts that are right", xlim=(0, stopped), ylim=(0.3, 1))
curves.legend(frameon=False, loc="lower right")
tutorial.picture(figure)

accurate = tutorial.median("Enumerate", "accuracy")
needed = tutorial.median("Enumerate", "reached") / min(tutorial.median(PYRO, "reached"), stopped)
tutorial.claim("accuracy of the count, by Enumerate", accurate, ">=", 0.95 if LARGE else 0.90)
tutorial.claim("steps to 90%, relative to TraceGraph_ELBO's", needed, "<=", 0.5)
tutorial.finish()
