# %% [markdown]
# # Captions with attention, soft or hard
#
# A network describes a canvas of digits, "three above seven below one", and looks at a cell of it
# for each word. Where each digit lies is known: does the network look at what it names?
#
# The network is that of "Show, Attend and Tell": convolutions make a grid of vectors, a recurrent
# network writes words, and attention is between them, soft or hard. As in the tutorial on
# translation, the program says `select`, and the handler around it says how that is trained.
#
#     python tutorials/04_captioning.py --data DATA          # canvases of MNIST's digits
#     python tutorials/04_captioning.py --data DATA --steps 10000 --device cuda

# %%
from collections.abc import Callable
from statistics import median
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _canvases import Canvases, with_digits
from _digits import mnist
from _tutorial import Tutorial, smoke_test
from matplotlib.figure import Figure
from pyro.infer import SVI
from pyro.optim import LambdaLR
from torch import Tensor, nn
from tqdm import trange

from pyro_nondiff.distributions import LinearAnnealing
from pyro_nondiff.estimators import REINFORCE, RLOO, MovingAverage
from pyro_nondiff.handlers import mode, randomize, soften
from pyro_nondiff.infer import ExpectedCost, no_guide
from pyro_nondiff.nn import AdditiveAttention
from pyro_nondiff.ops import argmax

SIZE, CELLS, MOST, CHANNELS, HIDDEN, BATCH = 64, 8, 3, 64, 128, 64
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
WORDS = [*DIGITS, "above", "below", ".", "<begin>"]
ABOVE, BELOW, END, BEGIN = range(10, 14)

tutorial = Tutorial(__file__, "Caption canvases of digits.", steps=2000, smoke=10, seeds=1)
learn, held_out = mnist(tutorial.args.data)
train_set = with_digits(learn, 300 if smoke_test else 20_000, SIZE, most=MOST, seed=0)
test_set = with_digits(held_out, 100 if smoke_test else 2000, SIZE, most=MOST, seed=1)

# %% [markdown]
# ## The captions
#
# One to three digits are named from left to right. Between two of them a word says whether the one
# is above or below the next. So each caption has one truth.


# %%
def captions(canvases: Canvases) -> tuple[Tensor, Tensor]:
    """Words of shape ``(number, 2 * MOST)``, and the box of the digit that each one names."""
    x0, y0, w, h = canvases.boxes.unbind(-1)
    present = canvases.labels >= 0
    order = torch.where(present, x0 + w / 2, 2.0).argsort(1)
    digits, middle, present = (x.gather(1, order) for x in (canvases.labels, y0 + h / 2, present))
    relations = torch.where(middle < middle.roll(-1, 1), ABOVE, BELOW)
    followed = present.roll(-1, 1) & (torch.arange(MOST) < MOST - 1)
    names, between = digits.where(present, END), relations.where(followed, END)
    boxes = canvases.boxes.gather(1, order[..., None].expand(-1, -1, 4))
    where = torch.stack([boxes, torch.zeros_like(boxes)], 2).flatten(1, 2)
    return torch.stack([names, between], 2).flatten(1), where


# %% [markdown]
# ## The network
#
# The decoder starts from a gist of the whole canvas, in sixteen parts. A cell's key says what is
# there and where it is; its value says only what is there.


# %%
class Captioner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = [(1, 16, 5, 2), (16, 32, 3, 2), (32, 64, 3, 2), (64, CHANNELS, 3, 1)]
        layers: list[nn.Module] = []
        for before, after, kernel, stride in sizes:
            convolution = nn.Conv2d(before, after, kernel, stride, kernel // 2)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
        self.encoder = nn.Sequential(*layers)
        self.key = nn.Linear(CHANNELS, HIDDEN)
        self.place = nn.Parameter(0.1 * torch.randn(CELLS**2, HIDDEN))
        self.gist = nn.Linear(CELLS**2 * CHANNELS, HIDDEN)
        self.word = nn.Embedding(len(WORDS), HIDDEN)
        self.decoder = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.attention = AdditiveAttention(HIDDEN, HIDDEN, hidden_size=64)
        self.from_state = nn.Linear(HIDDEN, HIDDEN)
        self.from_cell = nn.Linear(CHANNELS, HIDDEN, bias=False)
        self.output = nn.Linear(HIDDEN, len(WORDS))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of the cells, and the decoder's first state."""
        grid = self.encoder(images[:, None])
        values = grid.flatten(2).mT
        return self.key(values) + self.place, values, self.gist(grid.flatten(1)).tanh()[None]

    def scores(self, states: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """How well each word fits as the next."""
        seen = self.attention("cell", states, keys, values)
        return self.output((self.from_state(states) + self.from_cell(seen)).tanh())


# %% [markdown]
# ## The program


# %%
def program(net: Captioner, images: Tensor, words: Tensor) -> None:
    pyro.module("net", net)
    keys, values, first = net.encode(images)
    before = nn.functional.pad(words[:, :-1], (1, 0), value=BEGIN)
    states, _ = net.decoder(net.word(before), first)
    each, step = pyro.plate("images", len(images), dim=-2), pyro.plate("words", 2 * MOST, dim=-1)
    with each, step, pyro.poutine.mask(mask=before != END):
        scores = net.scores(states, keys, values)
        pyro.sample("word", dist.Categorical(logits=scores), obs=words)


@torch.no_grad()
def describe(net: Captioner, images: Tensor) -> tuple[Tensor, Tensor]:
    """The best words one by one, and the weight of each cell for each."""
    keys, values, state = net.encode(images)
    words, weights = [torch.full((len(images), 1), BEGIN, device=images.device)], []
    for _ in range(2 * MOST):
        states, state = net.decoder(net.word(words[-1]), state)
        weights.append(argmax("weights", net.attention.scores(states, keys)))
        words.append(net.scores(states, keys, values).argmax(-1))
    return torch.cat(words[1:], 1), torch.cat(weights, 1)


# %% [markdown]
# ## Training and test
#
# A word is compared with the true one at its place in the caption. Of the weight for a digit's name
# we ask how much lies on cells that touch the box of that digit's ink.

# %%
Handler = Callable[[Callable[..., Any]], Callable[..., Any]]
VARIANTS: dict[str, tuple[Handler, Any]] = {
    "soft": (soften(), None),
    "hard, RLOO": (randomize(), RLOO(num_samples=16)),
    "hard, REINFORCE": (randomize(), REINFORCE(baseline=MovingAverage())),
}


def inside(weights: Tensor, boxes: Tensor) -> Tensor:
    """How much of the weight lies on cells that touch a box."""
    start, end = boxes[..., :2, None], (boxes[..., :2] + boxes[..., 2:])[..., None]
    low = torch.arange(CELLS, device=weights.device) / CELLS
    columns, rows = ((low < end) & (low + 1 / CELLS > start)).unbind(-2)
    return (weights * (rows[..., None] & columns[..., None, :]).flatten(-2)).sum(-1)


def train(name: str, seed: int) -> dict[str, Any]:
    handler, estimator = VARIANTS[name]
    net, (words, _) = Captioner().to(tutorial.device), captions(train_set)
    images, words = train_set.images.to(tutorial.device), words.to(tutorial.device)
    adam = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 3e-3, "fused": True}}
    optimizer = LambdaLR({**adam, "lr_lambda": lambda step: 1 - step / tutorial.steps})
    bonus = LinearAnnealing(0.3, 0.0, num_steps=3 * tutorial.steps // 4)
    objective = ExpectedCost(estimator, entropy_bonus=bonus)
    svi = SVI(handler(program), no_guide, optimizer, objective)
    losses = []
    for _ in trange(tutorial.steps, desc=name, disable=smoke_test, mininterval=1):
        rows = torch.randint(len(images), (BATCH,))
        losses.append(float(svi.step(net, images[rows], words[rows])) / BATCH)
        optimizer.step()
        bonus.step()
    true, boxes = (x.to(tutorial.device) for x in captions(test_set))
    said, weights = mode()(handler(describe))(net.eval(), test_set.images.to(tutorial.device))
    asked = nn.functional.pad(true[:, :-1], (1, 0), value=BEGIN) != END
    found = {
        "word accuracy": 100 * float((said == true)[asked].float().mean()),
        "inside": 100 * float(inside(weights, boxes)[true < ABOVE].mean()),
        "losses": losses,
    }
    return {**found, "words": said[:SHOWN], "weights": weights[:SHOWN]}


SHOWN = 4
for name in VARIANTS:
    tutorial.run(name, train, name)

# %% [markdown]
# ## Where does it look?


# %%
def show(axes: Any, image: Tensor, word: str, weights: Tensor) -> None:
    """A canvas, and on it the cells that a word looks at."""
    axes.imshow(image, cmap="gray_r", extent=(0, SIZE, SIZE, 0))
    grid = weights.reshape(CELLS, CELLS).cpu()
    red, strength = torch.ones_like(grid), 0.7 * (grid / grid.max()).sqrt()
    where = {"extent": (0, SIZE, SIZE, 0), "alpha": strength}
    axes.imshow(red, cmap="autumn_r", vmin=0, vmax=1, **where)
    axes.set(xticks=[], yticks=[], title=word)


figure = Figure(figsize=(9, 4.2), layout="constrained")
canvas = int(test_set.counts[:SHOWN].argmax())
for axes_row, name in zip(figure.subplots(2, 2 * MOST - 1), ("soft", "hard, RLOO"), strict=True):
    result = tutorial.results[name][0]
    for k, axes in enumerate(axes_row):
        word, weights = (result[key][canvas, k] for key in ("words", "weights"))
        show(axes, test_set.images[canvas], WORDS[word], weights)
    axes_row[0].set_ylabel(name)
tutorial.picture(figure)

# %% [markdown]
# ## The result

# %%
tutorial.table(
    ["attention", "words right, %", "weight inside the named digit's box, %", "loss at the end"],
    [
        [
            name,
            tutorial.spread(name, "word accuracy", 1),
            tutorial.spread(name, "inside", 1),
            f"{median(tutorial.results[name][0]['losses'][-100:]):.3f}",
        ]
        for name in VARIANTS
    ],
)
for name, asked in (("soft", 80), ("hard, RLOO", 70)):
    tutorial.claim(f"{name}: words right, %", tutorial.median(name, "word accuracy"), ">=", 95)
    tutorial.claim(f"{name}: inside the box, %", tutorial.median(name, "inside"), ">=", asked)
tutorial.finish()
