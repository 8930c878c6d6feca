# %% [markdown]
# # Autoencoders with discrete codes: which estimator?
#
# Four programs turn an image into bits or choices, and back. Such a code has no derivative: every
# estimator of the library trains them for the same time, and the noise of each is measured.
#
# The lecture's list is REINFORCE with baselines, Gumbel-softmax, straight-through, REBAR and RELAX.
# Here are also RLOO, DisARM and, where a code has few values, the exact sum. Pyro's own
# `TraceGraph_ELBO` runs beside them on the first program. This one has three seeds, the others one.
#
#     python tutorials/02_discrete_vae.py                        # half an hour of one core
#     python tutorials/02_discrete_vae.py --seeds 0 --steps 20   # seconds that each run trains
#     python tutorials/02_discrete_vae.py --device cuda

# %%
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _digits import binarized_mnist
from _timed import train_for
from _tutorial import Tutorial, smoke_test
from matplotlib import pyplot as plt
from pyro import poutine
from pyro.infer import SVI, TraceGraph_ELBO
from pyro.optim import Adam
from torch import Tensor, nn
from tqdm import tqdm

from pyro_nondiff import estimators
from pyro_nondiff.diagnostics import gradient_statistics
from pyro_nondiff.infer import CompiledSVI, TraceEstimator_ELBO, config_estimator

tutorial = Tutorial(__file__, "Train discrete VAEs.", steps=30, smoke=1, unit="seconds a run")
digits = binarized_mnist(tutorial.args.data)
train_images, test_images = (x[: 100 if smoke_test else None].to(tutorial.device) for x in digits)

# %% [markdown]
# ## The programs
#
# The guide maps an image to the logits of a code $z_0$, and that code to the logits of the next;
# the model comes back the same way. All maps are linear, as in the papers on REBAR and RELAX. A
# code is a row of variables: bits, or one-hot choices among more values. Nobody names an estimator.


# %%
class VAE(nn.Module):
    def __init__(self, codes: int, units: int, values: int) -> None:
        super().__init__()
        self.values, self.sites = values, [f"z{n}" for n in range(codes)]
        sizes = [(784, units)] + [(units, units)] * (codes - 1)
        self.encoders = nn.ModuleList(nn.Linear(below, above) for below, above in sizes)
        self.decoders = nn.ModuleList(nn.Linear(above, below) for below, above in sizes)
        self.prior = nn.Parameter(torch.zeros(units))
        self.to(tutorial.device)
        self.mean = train_images.mean(0)
        self.decoders[0].bias.data = self.mean.clamp(1e-3, 1 - 1e-3).logit()

    def law(self, logits: Tensor) -> dist.Distribution:
        if self.values == 2:
            return dist.Bernoulli(logits=logits).to_event(1)
        return dist.OneHotCategorical(logits=logits.unflatten(-1, (-1, self.values))).to_event(1)

    def code(self, site: str, logits: Tensor) -> Tensor:
        z = pyro.sample(site, self.law(logits))
        return 2 * z - 1 if self.values == 2 else z.flatten(-2)

    def model(self, x: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("data", len(x), dim=-1):
            logits = self.prior
            for site, decoder in zip(self.sites[::-1], self.decoders[::-1], strict=True):
                logits = decoder(self.code(site, logits))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("data", len(x), dim=-1):
            row = x - self.mean
            for site, encoder in zip(self.sites, self.encoders, strict=True):
                row = self.code(site, encoder(row))


PROGRAMS: dict[str, Callable[[], VAE]] = {
    "200 bits": lambda: VAE(codes=1, units=200, values=2),
    "200 bits from 200 bits": lambda: VAE(codes=2, units=200, values=2),
    "20 choices of 10": lambda: VAE(codes=1, units=200, values=10),
    "2 choices of 8": lambda: VAE(codes=1, units=16, values=8),
}
SEEDS = dict.fromkeys(PROGRAMS, 1) | {"200 bits": 3}

# %% [markdown]
# ## The estimators
#
# Each is a small object, chosen from outside for each site, and says itself which laws it serves:
# DisARM no choices of ten, `Enumerate` no code of more than 1,024 values. Straight-through is
# biased, the others are not. REINFORCE's baseline is a network of the image, fitted to the centred
# and normalised cost.


# %%
def network() -> nn.Module:
    layers = nn.Linear(784, 100), nn.Tanh(), nn.Linear(100, 1), nn.Flatten(0)
    return nn.Sequential(*layers).to(tutorial.device)


def neural() -> estimators.NeuralBaseline:
    return estimators.NeuralBaseline(network(), lambda x: x, centre=True, normalise=True)


ESTIMATORS: dict[str, Callable[[], estimators.AbstractEstimator]] = {
    "REINFORCE": lambda: estimators.REINFORCE(neural()),
    "RLOO(4)": lambda: estimators.RLOO(num_samples=4),
    "DisARM": estimators.DisARM,
    "REBAR": estimators.REBAR,
    "RELAX": estimators.RELAX,
    "ST Gumbel-softmax": lambda: estimators.StraightThrough("gumbel", temperature=0.5),
    "Enumerate": estimators.Enumerate,
}


def served(program: str) -> list[str]:
    law = (vae := PROGRAMS[program]()).law(vae.prior)
    return [name for name, make in ESTIMATORS.items() if make().refuse(law) is None]


def ours(name: str, vae: VAE) -> Callable[[Tensor], None]:
    return config_estimator(vae.guide, {site: ESTIMATORS[name]() for site in vae.sites})


# %% [markdown]
# Pyro's `TraceGraph_ELBO` reads baselines from the sites. The best one tried is a network added to
# the decaying average: the average alone ends 4 nats behind it or more. The best learning rate for
# it is 3e-3, out of four from 1e-3 to 1e-2, and the best decay 0.9.

# %%
PYRO = "TraceGraph_ELBO"


def theirs(vae: VAE) -> Callable[[Tensor], None]:
    net = network()

    def guide(x: Tensor) -> None:
        pyro.module("baseline", net)
        options = {"nn_baseline": net, "nn_baseline_input": x, "use_decaying_avg_baseline": True}
        with poutine.infer_config(config_fn=lambda site: {"baseline": options}):
            vae.guide(x)

    return guide


# %% [markdown]
# ## Training, for equal time
#
# What an estimator or a baseline learns is named after it, and has a learning rate of its own.
# `CompiledSVI` records a step and replays it. In a longer run it should compile it as well, with
# `backend="inductor"`: it halves the time of a step, but compiling takes as long as such a run.

# %%
pyro.enable_validation(False)


def adam(rate: float, own: float) -> Adam:
    return Adam(lambda name: {"lr": own if name.startswith(("estimator.", "baseline.")) else rate})


def batch() -> Tensor:
    return train_images[torch.randint(len(train_images), (100,), device=tutorial.device)]


def elbo(vae: VAE, images: Tensor, samples: int) -> float:
    objective = TraceEstimator_ELBO(num_particles=samples)
    return -sum(objective.loss(vae.model, vae.guide, x) for x in images.split(1000)) / len(images)


def train(program: str, name: str, *, seed: int) -> dict[str, Any]:
    vae, loss = PROGRAMS[program](), TraceEstimator_ELBO()
    if name == PYRO:
        svi = SVI(vae.model, theirs(vae), adam(3e-3, 1e-3), TraceGraph_ELBO())
    else:
        svi = CompiledSVI(vae.model, ours(name, vae), adam(3e-3, 1e-2), loss, backend="replay")
    some = train_images[:1000]
    run = train_for(tutorial.steps, lambda: svi.step(batch()), lambda: elbo(vae, some, 5))
    ends = {"train": elbo(vae, train_images[:10000], 1), "test": elbo(vae, test_images, 1)}
    return {**run, **ends, "vae": vae.state_dict(), "learnt": loss.states.state_dict()}


for program in PROGRAMS:
    for name in served(program):
        tutorial.run(f"{program}, {name}", train, program, name, seeds=SEEDS[program])
tutorial.run(f"200 bits, {PYRO}", train, "200 bits", PYRO)

# %% [markdown]
# ## How noisy is a gradient?
#
# All are measured at one checkpoint, the weights that RLOO(4) has reached, and relative to RLOO(2),
# which learns nothing and need not be trained. What the others learnt in their own runs first
# settles at the checkpoint, in steps at which the model's rate is 0. Where the checkpoint lies
# matters: after 300 steps of RLOO(4) on 200 bits, REBAR's ratio was 0.10 and RELAX's 0.07, a half
# and less of what they are after 1,000.


# %%
def variance(vae: VAE, guide: Callable[[Tensor], None], learnt: dict[str, Tensor]) -> float:
    pyro.clear_param_store()
    objective = TraceEstimator_ELBO(estimators.RLOO(num_samples=2))
    objective.states.load_state_dict(learnt)
    settling = SVI(vae.model, guide, adam(0.0, 1e-2), objective)
    for _ in range(2 if smoke_test else 200):
        settling.step(batch())
    draws, fixed = 2 if smoke_test else 100, train_images[:100]
    found = gradient_statistics(objective, vae.model, guide, fixed, num_samples=draws).variance
    return float(sum(found[name].sum() for name in found if "encoders" in name))


def variances(program: str, *, seed: int) -> dict[str, Any]:
    index, vae = tutorial.seeds.index(seed), PROGRAMS[program]()
    runs = {name: tutorial.results[f"{program}, {name}"][index] for name in served(program)}
    vae.load_state_dict(runs["RLOO(4)"]["vae"])
    unit = variance(vae, vae.guide, {})
    bar = tqdm(runs.items(), desc="variances", disable=smoke_test)
    return {name: variance(vae, ours(name, vae), run["learnt"]) / unit for name, run in bar}


for program in PROGRAMS:
    tutorial.run(f"{program}, variance", variances, program, seeds=SEEDS[program])

# %% [markdown]
# ## The result
#
# An estimator is worth what it saves in noise for what it costs in time. REBAR and RELAX run the
# model twice more, with relaxed codes, where RLOO(4) runs it three times more with hard ones. The
# exact sum has no noise, but runs it once for each of 64 codes. A bias may not matter at first:
# straight-through is fast on bits, and falls behind on the code with few values. There a code is
# nearly certain, so that the samples of RLOO agree and cancel, and relaxed ones do not.

# %%
COLOURS = dict(zip([*ESTIMATORS, PYRO], plt.get_cmap("Dark2").colors, strict=True))
figure, axes = plt.subplots(2, 2, figsize=(10, 9), layout="constrained")
for program, panel in zip(PROGRAMS, axes.flat, strict=True):
    rows = []
    for name in [*served(program), PYRO] if program == "200 bits" else served(program):
        run = tutorial.results[key := f"{program}, {name}"][0]
        noise = "" if name == PYRO else tutorial.spread(f"{program}, variance", name, 3)
        panel.plot(run["at"], run["values"], color=COLOURS[name], label=f"{name}  {noise[:5]}")
        ends = [tutorial.spread(key, part, 1) for part in ("train", "test")]
        rows.append([name, *ends, f"{tutorial.median(key, 'steps'):.0f}", noise])
    head = ["estimator", "train ELBO", "test ELBO", "steps", "encoder's variance / RLOO(2)"]
    tutorial.table(head, rows, f"{program}, seeds: {len(tutorial.results[key])}")
    panel.set(title=program, xlabel="seconds of one core", ylabel="train ELBO, nats")
    panel.set_ylim(panel.dataLim.y1 - 28, panel.dataLim.y1 + 1)
    panel.legend(title="encoder's variance / RLOO(2)", loc="lower right", fontsize=9)
tutorial.picture(figure)

level = tutorial.median(f"200 bits, {PYRO}", "train")
for name in ("REBAR", "RELAX"):
    ratio = tutorial.median("200 bits, variance", name)
    tutorial.claim(f"200 bits: encoder's variance, {name} / RLOO(2)", ratio, "<=", 0.25)
    ahead = tutorial.median(f"200 bits, {name}", "train") - level
    tutorial.claim(f"200 bits: nats of {name} above {PYRO}", ahead, ">=", 5)
tutorial.finish()
