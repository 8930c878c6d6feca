# %% [markdown]
# # A loss that only says right or wrong
#
# A network reads two digits, and is told nothing but whether the sum of what it read is right. It
# learns to read digits all the same.
#
# The loss is an ordinary Python program. It cannot be differentiated, and asks for digits, not for
# probabilities. So the network draws what it reads, and the expected loss is minimised. A network
# that has once been rewarded for a reading stops trying others: it says the same digit whatever it
# sees, since some sums are right by chance. An entropy bonus pays for trying, and it is annealed
# to 0.
#
#     python tutorials/05b_right_or_wrong.py
#     python tutorials/05b_right_or_wrong.py --seeds 0 --device cuda

# %%
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _digits import mnist
from _pictures import curves
from _tutorial import Tutorial, smoke_test
from matplotlib.figure import Figure
from pyro.infer import SVI
from pyro.optim import OneCycleLR
from torch import Tensor, nn
from tqdm import trange

from pyro_nondiff.distributions import LinearAnnealing
from pyro_nondiff.estimators import RLOO, Enumerate
from pyro_nondiff.handlers import mode
from pyro_nondiff.infer import ExpectedCost, no_guide
from pyro_nondiff.ops import cost, external

tutorial = Tutorial(__file__, "Train a reader of sums.", steps=10_000, smoke=20)
train, test = (split.to(tutorial.device) for split in mnist(tutorial.args.data))

# %% [markdown]
# ## The program
#
# A network says how likely each reading of a digit is, and two digits are drawn. An ordinary Python
# function, called by `external`, knows the sum. It answers 1 for a wrong sum and 0 for a right one,
# and that is all the network ever learns about digits.


# %%
def grade(first: Tensor, second: Tensor, total: Tensor) -> list[float]:
    answers = zip(first.tolist(), second.tolist(), total.tolist(), strict=True)
    return [0.0 if a + b == known else 1.0 for a, b, known in answers]


def read(net: nn.Module, images: Tensor, totals: Tensor) -> None:
    pyro.module("net", net)
    first, second = net(images[:, None]).chunk(2)
    with pyro.plate("pairs", len(totals)):
        a = pyro.sample("a", dist.Categorical(logits=first))
        b = pyro.sample("b", dist.Categorical(logits=second))
        cost("wrong", external("grade", grade, a, b, totals, batched=True))


def sums(labels: Tensor) -> Tensor:
    """Those of the first half and the second, which make the pairs."""
    first, second = labels.chunk(2)
    return first + second


# %% [markdown]
# ## Training
#
# `Enumerate` asks for each of the ten readings of a digit, and is exact for that digit; RLOO asks
# for four drawn ones. For the test, `mode` takes the most probable readings, in the same program.

# %%
PAIRS = 100
READERS = {  # an estimator, and whether there is a bonus
    "RLOO(4), no bonus": (RLOO(4), False),
    "RLOO(4), annealed bonus": (RLOO(4), True),
    "Enumerate(), annealed bonus": (Enumerate(), True),
}


def learn(name: str, seed: int) -> dict[str, Any]:
    net = nn.Sequential(
        *[nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.ReLU()],
        *[nn.Conv2d(8, 16, 5, stride=2, padding=2), nn.ReLU(), nn.Flatten()],
        *[nn.Linear(16 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10)],
    ).to(tutorial.device)
    estimator, annealed = READERS[name]
    bonus = LinearAnnealing(0.1, 0.0, num_steps=int(0.8 * tutorial.steps))
    objective = ExpectedCost(
        estimator, entropy_bonus=bonus if annealed else 0.0, worlds="vectorized"
    )
    rates = {"max_lr": 4e-3, "total_steps": tutorial.steps + 1}
    optim = OneCycleLR({"optimizer": torch.optim.Adam, "optim_args": {}, **rates})
    svi = SVI(read, no_guide, optim, objective)
    curve = []
    for step in trange(1, tutorial.steps + 1, desc=name, disable=smoke_test):
        batch = train.at(torch.randint(len(train), (2 * PAIRS,)).to(tutorial.device))
        # All digits of a batch are moved by some pixels, lest the network learn them by heart.
        moved = batch.images.roll(torch.randint(-2, 3, (2,)).tolist(), (1, 2))
        svi.step(net, moved, sums(batch.labels))
        bonus.step()
        optim.step()
        if step % max(tutorial.steps // 20, 1) == 0:
            curve.append((step, right_sums(net)))
    with torch.no_grad():
        digits = net(test.images[:, None]).argmax(-1)
    right = 100 * float((digits == test.labels).float().mean())
    return {"curve": curve, "sums": curve[-1][1], "right": right, "digits": digits}


def right_sums(net: nn.Module) -> float:
    """In percent."""
    even = test.at(slice(len(test) // 2 * 2))
    wrong = ExpectedCost().loss(mode()(read), no_guide, net, even.images, sums(even.labels))
    return 100 - 100 * wrong / (len(even) // 2)


for name, (estimator, _) in READERS.items():
    seeds = 1 if isinstance(estimator, Enumerate) else None  # it is there to compare with
    tutorial.run(name, learn, name, seeds=seeds)

# %% [markdown]
# ## The result

# %%
COLOURS = ["#777777", "#b5441c", "#1f6f8b"]
SHOWN = 6


def figure() -> Figure:
    fig = Figure(figsize=(10, 4), layout="constrained")
    left, right = fig.subfigures(1, 2, width_ratios=[1, 1.2])
    axes = left.subplots()
    curves(axes, tutorial.results, COLOURS)
    axes.set(xlabel="step", ylabel="%", title="Sums of two test digits that are right")
    right.suptitle("What each network reads")
    for n, axes in enumerate(right.subplots(2, SHOWN // 2).flat):
        pair = [2 * n, 2 * n + 1]
        axes.imshow(torch.cat([*test.images[pair].cpu()], 1), cmap="gray_r")
        axes.set_axis_off()
        for line, (runs, colour) in enumerate(zip(tutorial.results.values(), COLOURS, strict=True)):
            first, second = runs[0]["digits"][pair].tolist()
            text = f"{first} + {second} = {first + second}"
            axes.text(28, 40 + 9 * line, text, color=colour, ha="center")
    return fig


tutorial.picture(figure())
rows = [[name, *(tutorial.spread(name, key) for key in ("sums", "right"))] for name in READERS]
tutorial.table(["estimator", "sums right, %", "digits right, %"], rows)
found = tutorial.median("RLOO(4), annealed bonus", "sums")
tutorial.claim("sums right, %, by RLOO(4) with an annealed bonus", found, ">=", 97.0)
collapsed = tutorial.median("RLOO(4), no bonus", "sums")
tutorial.claim("sums right, %, by RLOO(4) without it", collapsed, "<=", 50.0)
tutorial.finish()
