# %% [markdown]
# # A loss that has no derivative
#
# The loss comes from an environment, or from a program that only says right or wrong. The
# expectation of such a loss has a derivative all the same, and here it trains a policy and a
# reader of digits.
#
# The lecture's first way out of a missing derivative is to make the network's decision random. It
# does not ask anything of the loss $c$ but its value:
#
# $$\nabla_\theta\, \mathbb{E}_{a \sim p_\theta}[c(a)]
#   = \mathbb{E}_{a \sim p_\theta}[(c(a) - b)\, \nabla_\theta \log p_\theta(a)]$$
#
# for any baseline $b$ that does not look at $a$. In part one the loss is how soon a pole falls, and
# the question is what a better baseline is worth. In part two a network sees two digits, and is
# only told whether the sum of what it read is right.
#
#     python tutorials/05_black_box_loss.py
#     python tutorials/05_black_box_loss.py --seeds 0 --device cuda

# %%
import statistics
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from _cartpole import Steps, play
from _digits import Split, mnist
from _pictures import tidy
from _tutorial import Tutorial, smoke_test
from matplotlib.figure import Figure
from pyro.infer import SVI
from pyro.optim import Adam, OneCycleLR
from torch import Tensor, nn
from tqdm import tqdm

from pyro_nondiff.distributions import LinearAnnealing
from pyro_nondiff.estimators import (
    REINFORCE,
    RELAX,
    RLOO,
    AbstractEstimator,
    Enumerate,
    MovingAverage,
    NeuralBaseline,
)
from pyro_nondiff.handlers import given, mode
from pyro_nondiff.infer import ExpectedCost, no_guide
from pyro_nondiff.ops import cost, external

# %% [markdown]
# ## Part one: an environment
#
# In Gymnasium's CartPole a cart moves to the left or to the right, so that the pole on it does not
# fall. An episode ends when it falls, or after 500 steps. What a step costs is minus the number of
# steps to come, in hundreds.
#
# An environment cannot be asked what would have happened otherwise. So episodes are collected
# first, by the policy's own draws.

# %%
EPISODES, BATCH, CHECK = (20, 5, 10) if smoke_test else (500, 5, 50)
GRADIENTS = 3 if smoke_test else 100  # batches of episodes, to measure a variance


def law(policy: nn.Module, seen: Tensor) -> dist.Bernoulli:
    return dist.Bernoulli(logits=policy(seen[:, :4])[:, 0])  # the clock is for the baselines


def episodes(policy: nn.Module, number: int, seed: int, device: torch.device) -> list[Steps]:
    return play(lambda seen: law(policy, seen).sample(), number, BATCH, seed, device)


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


BASELINES: dict[str, Callable[[], AbstractEstimator]] = {
    "moving average": lambda: REINFORCE(MovingAverage()),
    "neural baseline": lambda: REINFORCE(
        NeuralBaseline(network(5), input=seen, centre=True, normalise=True)
    ),
    "RELAX": lambda: RELAX(ControlVariate(), input=seen, relaxed_cost=False),
}

# %% [markdown]
# Five episodes make a step. After every 50 the policy plays 100 new ones, which count for nothing
# but the curve.
#
# Whose gradient is calmest? To compare at the same parameters, the two other estimators watch the
# run of the moving average: they learn from the same episodes, and do not move the policy. At each
# checkpoint all three see the same 100 batches of new episodes, which give 100 gradients each.
#
# A network has to follow the policy, which improves fast at first: until it knows what is to come,
# it is no calmer than a plain average. Later it knows that a step at the end of an episode has
# little to come, whatever is done, which the average blames on the action.


# %%
def train_policy(name: str, device: torch.device, seed: int) -> dict[str, Any]:
    policy = network(4, 32).to(device)
    watching = list(BASELINES) if name == "moving average" else [name]
    objectives = {other: ExpectedCost(BASELINES[other]()) for other in watching}
    learners = [
        SVI(acted, no_guide, Adam(learning_rates(0.02 * (other == name))), objective)
        for other, objective in objectives.items()
    ]
    result: dict[str, Any] = {"curve": [], "variances": []}
    for played in tqdm(range(BATCH, EPISODES + 1, BATCH), desc=name, disable=smoke_test):
        (steps,) = episodes(policy, BATCH, seed * EPISODES + played, device)
        for learner in reversed(learners):  # who moves the policy comes last
            learner.step(policy, steps)
        if played % CHECK == 0:
            fresh = episodes(policy, BATCH * GRADIENTS, 10**6 + played, device)
            length = sum(len(steps.action) for steps in fresh[:20]) / BATCH / len(fresh[:20])
            result["curve"].append((played, length))
            if name == "moving average":
                variances = [
                    variance(objective, policy, fresh) for objective in objectives.values()
                ]
                result["variances"].append(variances)
    return result


def learning_rates(of_policy: float) -> Callable[[str], dict[str, float]]:
    return lambda name: {"lr": 1e-2 if name.startswith("estimator.") else of_policy}


def variance(objective: ExpectedCost, policy: nn.Module, batches: list[Steps]) -> float:
    """Of the policy's gradient, summed over its parameters."""
    gradients = []
    for steps in batches:
        loss = objective.differentiable_loss(acted, no_guide, policy, steps)
        found = torch.autograd.grad(loss, list(policy.parameters()))
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    return float(torch.stack(gradients).var(0).sum())


# %% [markdown]
# ## Part two: a program that only says right or wrong
#
# A network reads each of two digits, and draws what it reads. An ordinary Python function, called
# by `external`, knows the sum. It answers 1 for a wrong sum and 0 for a right one, and that is all
# the network ever learns about digits.


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


# %% [markdown]
# A network that has once been rewarded for a reading stops trying others: it says the same digit
# whatever it sees, since some sums are right by chance. An entropy bonus pays for trying, and it is
# annealed to 0. `Enumerate` asks for each of the ten readings of a digit, and is exact for it; RLOO
# asks for four drawn ones.

# %%
PAIRS = 100
READERS: dict[str, tuple[AbstractEstimator, float]] = {
    "RLOO(4), no bonus": (RLOO(4), 0.0),
    "RLOO(4), annealed bonus": (RLOO(4), 0.1),
    "Enumerate(), annealed bonus": (Enumerate(), 0.1),
}


def train_reader(name: str, train: Split, test: Split, steps: int, seed: int) -> dict[str, Any]:
    net = nn.Sequential(
        *[nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.ReLU()],
        *[nn.Conv2d(8, 16, 5, stride=2, padding=2), nn.ReLU(), nn.Flatten()],
        *[nn.Linear(16 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10)],
    ).to(train.images.device)
    estimator, start = READERS[name]
    bonus = LinearAnnealing(start, 0.0, num_steps=int(0.8 * steps)) if start else None
    objective = ExpectedCost(estimator, entropy_bonus=bonus or 0.0, worlds="vectorized")
    adam = {"optimizer": torch.optim.Adam, "optim_args": {}}
    optim = OneCycleLR(adam | {"max_lr": 4e-3, "total_steps": steps + 1})
    svi = SVI(read, no_guide, optim, objective)
    curve = []
    for step in tqdm(range(1, steps + 1), desc=name, disable=smoke_test):
        chosen = torch.randint(len(train), (2 * PAIRS,))
        batch = train.at(chosen.to(train.images.device))
        # All digits of a batch are moved by some pixels, lest the network learn them by heart.
        moved = batch.images.roll(torch.randint(-2, 3, (2,)).tolist(), (1, 2))
        svi.step(net, moved, sums(batch.labels))
        if bonus is not None:
            bonus.step()
        optim.step()
        if step % max(steps // 20, 1) == 0:
            curve.append((step, right_sums(net, test)))
    with torch.no_grad():
        digits = net(test.images[:, None]).argmax(-1) == test.labels
    return {"curve": curve, "sums": curve[-1][1], "digits": 100 * float(digits.float().mean())}


def sums(labels: Tensor) -> Tensor:
    first, second = labels.chunk(2)
    return first + second


def right_sums(net: nn.Module, test: Split) -> float:
    """The most probable readings' right sums, in percent: the same program under ``mode``."""
    even = test.at(slice(len(test) // 2 * 2))
    wrong = ExpectedCost().loss(mode()(read), no_guide, net, even.images, sums(even.labels))
    return 100 - 100 * wrong / (len(even) // 2)


# %% [markdown]
# ## The result

# %%
COLOURS = ["#777777", "#b5441c", "#1f6f8b"]


def solved_at(run: dict[str, Any]) -> float:
    """After how many episodes the mean over 100 new ones first was 475."""
    return next((float(played) for played, length in run["curve"] if length >= 475), float("inf"))


def ratios(runs: list[dict[str, Any]]) -> Tensor:
    """Variances over the moving average's, ``(seeds, checkpoints, estimators)``."""
    variances = torch.tensor([run["variances"] for run in runs])
    return variances / variances[..., :1]


def figure(policies: dict[str, Any], readers: dict[str, Any]) -> Figure:
    fig, (lengths, noise, right) = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for name, colour in zip(policies, COLOURS, strict=True):
        curves = torch.tensor([run["curve"] for run in policies[name]])
        lengths.plot(*curves.median(0).values.T, color=colour, label=name, linewidth=2)
        for curve in curves:
            lengths.plot(*curve.T, color=colour, linewidth=0.7, alpha=0.4)
    lengths.axhline(475, color="black", linewidth=0.8, linestyle=":")
    lengths.set(xlabel="episodes", ylabel="steps", title="CartPole: mean length of 100 episodes")
    relative = ratios(policies["moving average"]).quantile(0.5, 0).T
    for name, ratio, colour in zip(policies, relative, COLOURS, strict=True):
        noise.plot(curves[0, :, 0], ratio, "o-", color=colour, label=name)
    noise.set(xlabel="episodes", yscale="log", title="Variance over the moving average's")
    for (name, runs), colour in zip(readers.items(), COLOURS, strict=True):
        curve = torch.tensor([run["curve"] for run in runs]).median(0).values
        right.plot(*curve.T, color=colour, label=name, linewidth=2)
    right.set(xlabel="steps", ylabel="% right", title="Sums of two test digits", ylim=(0, 100))
    for axes in (lengths, noise, right):
        axes.legend(frameon=False)
        tidy(axes)
    return fig


def main() -> None:
    tutorial = Tutorial(
        __file__, "Train a policy, and a reader of sums.", steps=10_000, smoke=20, seeds=5
    )
    train, test = (split.to(tutorial.device) for split in mnist(tutorial.args.data))
    policies = {name: tutorial.run(name, train_policy, name, tutorial.device) for name in BASELINES}
    readers = {}
    for name, (estimator, _) in READERS.items():
        seeds = 1 if isinstance(estimator, Enumerate) else 3  # it is there to compare with
        arguments = (name, train, test, tutorial.steps)
        readers[name] = tutorial.run(name, train_reader, *arguments, seeds=seeds)
    relative = ratios(policies["moving average"]).flatten(0, 1).quantile(0.5, 0).tolist()
    rows = []
    for (name, runs), ratio in zip(policies.items(), relative, strict=True):
        solved = [solved_at(run) for run in runs]
        last = statistics.median(run["curve"][-1][1] for run in runs)
        episodes = ", ".join(f"{n:.0f}" if n < float("inf") else "not" for n in solved)
        rows.append([name, episodes, f"{last:.0f}", f"{ratio:.2f}"])
        count = sum(n <= 500 for n in solved) / len(solved)
        tutorial.claim(f"{name}: share of seeds solved within 500 episodes", count, ">=", 0.8)
    head = ["baseline", "solved after episodes", "steps at the end", "variance / moving average"]
    tutorial.table(head, rows, "CartPole: median over seeds, and over checkpoints for the variance")
    for name, ratio in list(zip(policies, relative, strict=True))[1:]:
        tutorial.claim(f"{name}: variance over the moving average's", ratio, "<=", 0.5)
    rows = [[name, *(tutorial.spread(name, key) for key in ("sums", "digits"))] for name in READERS]
    tutorial.table(["estimator", "sums right, %", "digits right, %"], rows, "Sums of two digits")
    found = tutorial.median("RLOO(4), annealed bonus", "sums")
    tutorial.claim("sums right, %, by RLOO(4) with an annealed bonus", found, ">=", 97.0)
    tutorial.picture(figure(policies, readers))
    tutorial.finish()


if __name__ == "__main__":
    main()
