# %% [markdown]
# # A loss that an environment gives
#
# A policy learns to balance a pole. How soon it falls has no derivative, but its expectation has.
# What a better baseline is worth is measured.
#
# The lecture's first way out of a missing derivative is to make the network's decision random. It
# does not ask anything of the loss $c$ but its value:
#
# $$\nabla_\theta\, \mathbb{E}_{a \sim p_\theta}[c(a)]
#   = \mathbb{E}_{a \sim p_\theta}[(c(a) - b)\, \nabla_\theta \log p_\theta(a)]$$
#
# for any baseline $b$ that does not look at $a$.
#
# In Gymnasium's CartPole a cart moves to the left or to the right, so that the pole on it does not
# fall. An episode ends when it falls, or after 500 steps. What a step costs is minus the number of
# steps to come, in hundreds.
#
#     python tutorials/05a_environment.py
#     python tutorials/05a_environment.py --seeds 0 --device cuda

# %%
import copy
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _cartpole import Steps, play
from _pictures import curves, tidy
from _tutorial import Tutorial, smoke_test
from matplotlib.figure import Figure
from pyro.infer import SVI
from pyro.optim import Adam
from torch import Tensor, nn
from tqdm import trange

from pyro_nondiff.estimators import REINFORCE, RELAX, MovingAverage, NeuralBaseline
from pyro_nondiff.handlers import given
from pyro_nondiff.infer import ExpectedCost, no_guide
from pyro_nondiff.ops import cost

tutorial = Tutorial(
    __file__,
    "Train a policy by what an environment says.",
    steps=500,
    smoke=20,
    unit="episodes",
    seeds=5,
    needs_data=False,
)
BATCH = 5  # episodes of a step
CHECK = max(tutorial.steps // (10 * BATCH), 1) * BATCH  # episodes from one checkpoint to the next
GRADIENTS = 3 if smoke_test else 100  # batches of episodes, to measure a variance

# %% [markdown]
# ## The program
#
# An environment cannot be asked what would have happened otherwise. So episodes are collected
# first, by the policy's own draws.


# %%
def law(policy: nn.Module, seen: Tensor) -> dist.Bernoulli:
    return dist.Bernoulli(logits=policy(seen[:, :4])[:, 0])  # the clock is for the baselines


def episodes(policy: nn.Module, number: int, seed: int) -> list[Steps]:
    return play(lambda seen: law(policy, seen).sample(), number, BATCH, seed, tutorial.device)


# %% [markdown]
# Then comes the program: one site with all collected steps. `given` gives it the actions that were
# taken, and keeps it random, so that its law has a score.


# %%
def program(policy: nn.Module, steps: Steps) -> None:
    pyro.module("policy", policy)
    with pyro.plate("steps", len(steps.action)):
        pyro.sample("action", law(policy, steps.seen))
        cost("to come", -steps.to_come / 100)


def acted(policy: nn.Module, steps: Steps) -> None:
    given({"action": steps.action})(program)(policy, steps)


# %% [markdown]
# The three estimators differ in the baseline alone. A moving average is one number for all steps. A
# neural baseline guesses the steps to come from what is seen. RELAX's control variate looks at a
# relaxed action too, and puts back what that takes from the expectation.


# %%
class ControlVariate(nn.Module):
    """What RELAX expects of a relaxed action in a state."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network(6)

    def forward(self, action: Tensor, seen: Tensor) -> Tensor:
        return self.net(torch.cat([action, seen.expand(*action.shape[:-1], 5)], -1))


def network(inputs: int, hidden: int = 64) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 1))


def seen(policy: nn.Module, steps: Steps) -> Tensor:
    return steps.seen


def neural_baseline() -> NeuralBaseline:
    return NeuralBaseline(network(5), input=seen, centre=True, normalise=True)


BASELINES = {  # each run makes an estimator with networks of its own
    "moving average": lambda: REINFORCE(MovingAverage()),
    "neural baseline": lambda: REINFORCE(neural_baseline()),
    "RELAX": lambda: RELAX(ControlVariate(), input=seen, relaxed_cost=False),
}

# %% [markdown]
# Five episodes make a step. After every 50 the policy plays 100 new ones, of which nobody learns.
#
# Whose gradient is calmest? To compare at the same parameters, the two other estimators watch the
# run of the moving average: they learn from the same episodes, and do not move the policy. At each
# checkpoint all three see the same 100 batches of new episodes, which give 100 gradients each.
#
# A network has to follow the policy, which improves fast at first: until it knows what is to come,
# it is no calmer than a plain average. Later it knows that a step at the end of an episode has
# little to come, whatever is done, which the average blames on the action.


# %%
def learn(name: str, seed: int) -> dict[str, Any]:
    policy = network(4, 32).to(tutorial.device)
    watching = list(BASELINES) if name == "moving average" else [name]
    objectives = {other: ExpectedCost(BASELINES[other]()) for other in watching}
    learners = [
        SVI(acted, no_guide, Adam(learning_rates(0.02 * (other == name))), objective)
        for other, objective in objectives.items()
    ]
    curve, variances = [], []
    for played in trange(BATCH, tutorial.steps + 1, BATCH, desc=name, disable=smoke_test):
        (steps,) = episodes(policy, BATCH, seed * tutorial.steps + played)
        for learner in reversed(learners):  # who moves the policy comes last
            learner.step(policy, steps)
        if played % CHECK == 0:
            fresh = episodes(policy, 100, 10**6 + played)
            curve.append((played, sum(len(steps.action) for steps in fresh) / 100))
            if len(objectives) > 1:
                fresh = episodes(policy, BATCH * GRADIENTS, 2 * 10**6 + played)
                variances.append([variance(each, policy, fresh) for each in objectives.values()])
    solved = next((played for played, length in curve if length >= 475), math.inf)
    return {"curve": curve, "variances": variances, "solved": solved, "length": curve[-1][1]}


def learning_rates(of_policy: float) -> Callable[[str], dict[str, float]]:
    return lambda name: {"lr": 3e-2 if name.startswith("estimator.") else of_policy}


def variance(objective: ExpectedCost, policy: nn.Module, batches: list[Steps]) -> float:
    """Of the policy's gradient, summed over its parameters. What the objective has learnt stays."""
    objective, gradients = copy.deepcopy(objective), []
    for steps in batches:
        loss = objective.differentiable_loss(acted, no_guide, policy, steps)
        found = torch.autograd.grad(loss, list(policy.parameters()))
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    return float(torch.stack(gradients).var(0).sum())


for name in BASELINES:
    tutorial.run(name, learn, name)

# %% [markdown]
# ## The result

# %%
COLOURS = ["#777777", "#b5441c", "#1f6f8b"]
variances = torch.tensor([run["variances"] for run in tutorial.results["moving average"]])
ratios = variances / variances[..., :1]  # of each seed, at each checkpoint, of each estimator
over_average = ratios.flatten(0, 1).quantile(0.5, 0).tolist()

figure = Figure(figsize=(9, 4), layout="constrained")
lengths, noise = figure.subplots(1, 2)
curves(lengths, tutorial.results, COLOURS)
lengths.axhline(475, color="black", linewidth=0.8, linestyle=":")
lengths.set(xlabel="episodes", ylabel="steps", title="Mean length of 100 episodes")
checks = range(CHECK, tutorial.steps + 1, CHECK)
for ratio, name, colour in zip(ratios.quantile(0.5, 0).T, BASELINES, COLOURS, strict=True):
    noise.plot(checks, ratio, "o-", color=colour, label=name)
noise.set(xlabel="episodes", yscale="log", title="Variance over the moving average's")
tidy(noise)
tutorial.picture(figure)

rows = []
for (name, runs), ratio in zip(tutorial.results.items(), over_average, strict=True):
    solved = [run["solved"] for run in runs]
    episodes_of = ", ".join(f"{n}" if n < math.inf else "not" for n in solved)
    rows.append([name, episodes_of, tutorial.spread(name, "length", 0), f"{ratio:.2f}"])
    share = sum(n < math.inf for n in solved) / len(solved)
    tutorial.claim(f"{name}: share of seeds solved within 500 episodes", share, ">=", 0.8)
    if name != "moving average":
        tutorial.claim(f"{name}: variance over the moving average's", ratio, "<=", 0.5)
head = ["baseline", "solved after episodes", "steps at the end", "variance / moving average"]
tutorial.table(head, rows, "Median over seeds, and over checkpoints for the variance")
tutorial.finish()
