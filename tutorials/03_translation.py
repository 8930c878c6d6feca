# %% [markdown]
# # Translation with attention, soft or hard
#
# A recurrent network translates English into French, and looks at the English sentence for each
# word it writes. One program learns with soft and with hard attention: only the handler differs.
#
# The lecture's attention has two kinds. *Soft* attention reads the mean of all places, weighted by
# a softmax, and has a gradient. *Hard* attention reads one place, which is drawn. It has no
# gradient, and the lecture trains it by REINFORCE. Here the program says `select`, and not how that
# is trained. The handler around it does: `soften()`, or `randomize()` with an estimator.
#
#     python tutorials/03_translation.py --data DATA         # Multi30k, 29,000 pairs of sentences
#     python tutorials/03_translation.py                     # sentences of a small grammar
#     python tutorials/03_translation.py --data DATA --steps 12 --device cuda

# %%
from functools import partial
from statistics import median
from timeit import repeat
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _pictures import alignment, curves
from _sentences import BEGIN, END, PAD, UNKNOWN, Corpus, Subset
from _tutorial import Tutorial, smoke_test
from matplotlib.figure import Figure
from pyro.infer import SVI
from pyro.optim import LambdaLR
from torch import Tensor, nn
from tqdm import trange

from pyro_nondiff.diagnostics import gradient_statistics
from pyro_nondiff.estimators import REBAR, REINFORCE, RLOO, Enumerate, MovingAverage
from pyro_nondiff.handlers import AbstractHandler, ignore, mode, randomize, soften
from pyro_nondiff.infer import ExpectedCost, no_guide
from pyro_nondiff.nn import AdditiveAttention
from pyro_nondiff.ops import argmax

BATCH, CANDIDATES = (16, 300) if smoke_test else (64, 1000)
EMBEDDING, HIDDEN = 192, 256

tutorial = Tutorial(__file__, "Translate with attention.", steps=6, smoke=1, unit="epochs")
corpus = Corpus(tutorial.args.data, tutorial.device, few=smoke_test)

# %% [markdown]
# ## The network
#
# An encoder reads the English sentence in both directions, and makes a vector of each word: the
# *memory*. A decoder reads the French words so far. Attention comes after it: each state of the
# decoder chooses a place in the memory, and the next word is decided by the state and by what is
# read there. What is read is not fed back. So given the sentences all choices are independent: they
# are one vectorised site, and the cost of a choice is the one word that it helps to write.
#
# The choice is made in `AdditiveAttention`, by the op `select` with the name `"source"`.


# %%
class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Embedding(len(corpus.english), EMBEDDING)
        self.target = nn.Embedding(len(corpus.french), EMBEDDING)
        self.encoder = nn.GRU(EMBEDDING, HIDDEN // 2, bidirectional=True, batch_first=True)
        self.decoder = nn.GRU(EMBEDDING, HIDDEN, batch_first=True)
        self.start = nn.Linear(HIDDEN, HIDDEN)
        self.attention = AdditiveAttention(HIDDEN, HIDDEN, hidden_size=128)
        self.from_state = nn.Linear(HIDDEN, EMBEDDING)
        self.from_source = nn.Linear(HIDDEN, EMBEDDING, bias=False)
        self.bias = nn.Parameter(torch.zeros(len(corpus.french)))
        self.dropout = nn.Dropout(0.2)
        nn.init.normal_(self.source.weight, std=EMBEDDING**-0.5)
        nn.init.normal_(self.target.weight, std=EMBEDDING**-0.5)

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The memory, where it is no padding, and the decoder's first state."""
        real = source != PAD
        # Backwards it starts in the padding, which in training is a few words long.
        memory, _ = self.encoder(self.dropout(self.source(source)))
        mean = (memory * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        return self.dropout(memory), real[:, None], self.start(mean).tanh()[None]

    def decode(self, before: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The state behind each French word, and the last one to go on from."""
        states, last = self.decoder(self.dropout(self.target(before)), state)
        return self.dropout(states), last

    def scores(self, states: Tensor, memory: Tensor, real: Tensor, words: Any) -> Tensor:
        """How well each of some French words fits as the next; their embeddings are the weights."""
        seen = self.attention("source", states, memory, mask=real)
        hidden = (self.from_state(states) + self.from_source(seen)).tanh()
        return hidden @ self.target.weight[words].mT + self.bias[words]


# %% [markdown]
# ## The program
#
# The expected cost of the French words is minimised, by `ExpectedCost`: a choice is drawn from its
# own law in the program, with no prior and no guide.
#
# A softmax over all 4,900 French words would be most of a step. So `corpus` gives 1,000
# of them to compare with: those of the batch, and others at random whose scores are raised, as if
# they stood for all that are left out. A translation compares with all.


# %%
def program(net: Translator, source: Tensor, target: Tensor, among: Subset) -> None:
    pyro.module("net", net)
    memory, real, first = net.encode(source)
    states, _ = net.decode(target[:, :-1], first)
    sentences = pyro.plate("sentences", len(source), dim=-2)
    words = pyro.plate("words", target.shape[1] - 1, dim=-1)
    with sentences, words, pyro.poutine.mask(mask=target[:, 1:] != PAD):
        scores = net.scores(states, memory, real, among.words) + among.correction
        pyro.sample("word", dist.Categorical(logits=scores), obs=among.places)


# %% [markdown]
# A translation is greedy: it takes the best word each time, and, with `mode` around the handler,
# the most probable place.


# %%
@torch.no_grad()
def translate(net: Translator, source: Tensor, longest: int = 40) -> Tensor:
    memory, real, state = net.encode(source)
    words = torch.full((len(source), 1), BEGIN, device=source.device)
    while words.shape[1] <= longest and not (words == END).any(1).all():
        states, state = net.decode(words[:, -1:], state)
        scores = net.scores(states, memory, real, slice(None))
        scores[..., UNKNOWN] = -torch.inf
        words = torch.cat([words, scores.argmax(-1)], 1)
    return words[:, 1:]


# %% [markdown]
# ## Training
#
# A variant is a handler, and what estimates the gradient of a drawn choice. REINFORCE compares the
# cost of a word with that of the average word; RLOO with the *same* word's under other choices, of
# which it draws four. The epochs are equal, the times are not.
#
# Sentences of similar length share a batch. The learning rate falls to zero.

# %%
VARIANTS: dict[str, tuple[AbstractHandler, Any]] = {
    "soft": (soften(), None),
    "hard, RLOO": (randomize(), RLOO(num_samples=4)),
    "hard, REINFORCE": (randomize(), REINFORCE(baseline=MovingAverage())),
}


def bleu(net: Translator, handler: AbstractHandler, part: str) -> float:
    found = corpus.bleu(part, partial(mode()(handler(translate)), net.eval()))
    net.train()
    return found


def learn(name: str, seed: int) -> dict[str, Any]:
    handler, estimator = VARIANTS[name]
    net, curve = Translator().to(tutorial.device), []
    steps = tutorial.steps * -(-len(corpus.pairs["train"]) // BATCH)
    adam = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 3e-3, "fused": True}}
    optimizer = LambdaLR({**adam, "lr_lambda": lambda step: 1 - step / steps})
    svi = SVI(handler(program), no_guide, optimizer, ExpectedCost(estimator))
    bar = trange(steps, desc=name, disable=smoke_test, mininterval=1)
    for epoch in range(1, tutorial.steps + 1):
        for batch in corpus.epoch(BATCH, CANDIDATES):
            svi.step(net, *batch)
            optimizer.step()
            bar.update()
        curve.append((epoch, bleu(net, handler, "val")))
        bar.set_postfix(BLEU=f"{curve[-1][1]:.1f}")
    return {"curve": curve, "bleu": bleu(net, handler, "test"), "net": net.state_dict()}


for name in VARIANTS:
    seeds = 1 if name == "hard, REINFORCE" else None  # it is there to compare with
    tutorial.run(name, learn, name, seeds=seeds)

# %% [markdown]
# ## What a step costs, and how noisy it is
#
# `gradient_statistics` draws the gradient of one step many times with fixed parameters: those of
# the hard network that RLOO has trained. `Enumerate` is exact: it asks for each word at every
# place, which are as many softmaxes as the English sentence has words. REBAR asks at a hard choice
# and two soft ones.
#
# In a translation hard attention saves the sum over all places. It needs their scores all the same.

# %%
SAMPLES = 2 if smoke_test else 20
ESTIMATORS = {
    "soft": None,
    "REINFORCE": REINFORCE(baseline=MovingAverage()),
    "RLOO": RLOO(num_samples=4),
    "REBAR": REBAR(),
    "Enumerate": Enumerate(),
}


def trained(name: str, seed: int) -> Translator:
    net = Translator().to(tutorial.device)
    net.dropout.eval()
    net.load_state_dict(tutorial.results[name][tutorial.seeds.index(seed)]["net"])
    return net


def gradient(estimator: str, seed: int) -> dict[str, float]:
    """What a gradient of a batch takes, and its variance for the scores of all places."""
    objective = ExpectedCost(ESTIMATORS[estimator])
    smoothed = (soften() if estimator == "soft" else randomize())(program)
    batch = corpus.batch("val", torch.arange(BATCH), CANDIDATES)
    step = objective, smoothed, no_guide, trained("hard, RLOO", seed), *batch
    # A moving average settles meanwhile.
    seconds = median(repeat(partial(ExpectedCost.loss_and_grads, *step), number=1, repeat=SAMPLES))
    found = gradient_statistics(*step, num_samples=SAMPLES).sites
    variance = float(found["source"].total_variance) if "source" in found else 0.0
    return {"variance": variance, "milliseconds": 1000 * seconds}


def speed(name: str, seed: int) -> dict[str, float]:
    """What the translation of a sentence takes; hard attention just takes the best place then."""
    handler = soften() if name == "soft" else ignore()
    greedy = partial(mode()(handler(translate)), trained("hard, RLOO", seed))
    seconds = median(repeat(lambda: corpus.translated("test", greedy), number=1, repeat=3))
    return {"milliseconds": 1000 * seconds / len(corpus.pairs["test"])}


for name in ESTIMATORS:
    tutorial.run(f"gradient, {name}", gradient, name)
for name in ("soft", "hard"):
    tutorial.run(f"speed, {name}", speed, name)

# %% [markdown]
# ## Where does it look?
#
# Under the handler of its variant, `argmax` gives a network's choice for each French word: a weight
# for each place, or one of them.


# %%
@torch.no_grad()
def show(axes: Any, name: str, sentence: str) -> None:
    net, handler = trained(name, tutorial.seeds[0]), VARIANTS[name][0]
    source = corpus.english.numbers([sentence]).to(tutorial.device)
    memory, real, first = net.encode(source)
    words = mode()(handler(translate))(net, source)
    states, _ = net.decode(nn.functional.pad(words[:, :-1], (1, 0), value=BEGIN), first)
    weights = mode()(handler(argmax))("weights", net.attention.scores(states, memory, real))
    read, written = [corpus.english.words[n] for n in source[0]], corpus.french.words
    alignment(axes, weights[0].cpu(), read, [written[n] for n in words[0]])
    axes.set_title(name)


SENTENCE = "A small boy in a red shirt throws a ball to his black dog on the beach."
figure = Figure(figsize=(9, 8.6), layout="constrained")
grid = figure.subplot_mosaic([["soft", "hard, RLOO"], ["curve", "curve"]], height_ratios=[5, 3])
for name in ("soft", "hard, RLOO"):
    show(grid[name], name, SENTENCE)
curves(grid["curve"], {name: tutorial.results[name] for name in VARIANTS}, ["C0", "C1", "C2"])
grid["curve"].set(xlabel="epoch", ylabel="BLEU", title="Greedy translations, validation set")
tutorial.picture(figure)

# %% [markdown]
# ## The result

# %%
rows = [[n, tutorial.spread(n, "bleu", 1), tutorial.spread(n, "seconds", 0)] for n in VARIANTS]
tutorial.table(["trained with", "BLEU", "s"], rows, "Greedy translations of the test set")
most = tutorial.median("gradient, REINFORCE", "variance")
rows = []
for name in ESTIMATORS:
    share = tutorial.median(f"gradient, {name}", "variance") / most
    rows.append([name, tutorial.spread(f"gradient, {name}", "milliseconds", 0), f"{share:.3f}"])
title = "The gradient of one batch, and its variance for the scores of all places"
tutorial.table(["", "ms", "variance, relative to REINFORCE"], rows, title)
rows = [[name, tutorial.spread(f"speed, {name}", "milliseconds", 1)] for name in ("soft", "hard")]
tutorial.table(["attention", "ms to translate a sentence"], rows)
soft, hard, plain = (tutorial.median(name, "bleu") for name in VARIANTS)
tutorial.claim("soft attention: BLEU", soft, ">=", 48)
tutorial.claim("what hard attention by RLOO loses against soft", soft - hard, "<=", 6)
tutorial.claim("what RLOO gains over REINFORCE", hard - plain, ">=", 3)
tutorial.finish()
