"""Decisions in an environment: episodes are collected, and become one program.

The recipe is that of ``docs/expected_cost.rst``.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor, nn

from pyro_nondiff import handlers
from pyro_nondiff.estimators import REINFORCE, RELAX, RLOO, DisARM, MovingAverage
from pyro_nondiff.infer import ExpectedCost, no_guide
from pyro_nondiff.ops import cost, external

pytestmark = pytest.mark.usefixtures("param_store")


class Episodes:
    """Steps of episodes side by side, ``(time, episodes)``, each with a mask.

    Arguments:
        seen: What the policy saw, ``(time, episodes, numbers)``.
        actions: What it did.
        rewards: What it got for it.
        alive: Whether the episode was still going on.
    """

    def __init__(self, seen: Tensor, actions: Tensor, rewards: Tensor, alive: Tensor) -> None:
        self.seen, self.actions, self.rewards, self.alive = seen, actions, rewards, alive

    @property
    def to_come(self) -> Tensor:
        """The sum of this step's reward and those behind it."""
        return (self.rewards * self.alive).flip(0).cumsum(0).flip(0)


def collect(env: Any, policy: nn.Module, seed: int, steps: int) -> Episodes:
    """One episode in each of the environments, by the policy's own draws."""
    number = torch.get_default_dtype()
    seen, _ = env.reset(seed=seed)
    alive = np.ones(env.num_envs, bool)
    rows = []
    while alive.any() and len(rows) < steps:
        x = torch.as_tensor(seen, dtype=number)
        with torch.no_grad():
            action = dist.Bernoulli(logits=policy(x)[..., 0]).sample()
        seen, reward, ended, cut, _ = env.step(action.numpy().astype(np.int64))
        rows.append((x, action, torch.as_tensor(reward, dtype=number), torch.tensor(alive)))
        alive &= ~(ended | cut)
    return Episodes(*(torch.stack(column) for column in zip(*rows, strict=True)))


def program(policy: nn.Module, episodes: Episodes) -> None:
    """One site over all steps, each with the cost of what came after it."""
    pyro.module("policy", policy)
    alive = episodes.alive.flatten()
    with pyro.plate("steps", len(alive)), poutine.mask(mask=alive):
        logits = policy(episodes.seen.flatten(0, 1))[..., 0]
        pyro.sample("action", dist.Bernoulli(logits=logits))
        cost("to come", -episodes.to_come.flatten() / 10)


def acted(policy: nn.Module, episodes: Episodes) -> None:
    """The program, with the actions that were taken."""
    handlers.given({"action": episodes.actions.flatten()})(program)(policy, episodes)


@pytest.mark.parametrize(
    "make",
    [lambda: REINFORCE(MovingAverage()), lambda: RELAX(relaxed_cost=False)],
    ids=["REINFORCE", "RELAX"],
)
def test_cart_pole(make: Callable[[], Any], seed: int) -> None:
    """From 26 steps an episode to 190 of 200, in the mean of five times eight episodes.

    Over 30 seeds with each estimator, the first five had at most 36, and the best five at least 96.
    """
    gymnasium = pytest.importorskip("gymnasium")
    env = gymnasium.make_vec("CartPole-v1", num_envs=8, vectorization_mode="vector_entry_point")
    policy = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
    svi = SVI(acted, no_guide, pyro.optim.Adam({"lr": 0.02}), ExpectedCost(make()))
    lengths = []
    for n in range(40):
        episodes = collect(env, policy, seed % 2**20 + n, steps=200)
        lengths.append(float(episodes.alive.sum(0).float().mean()))
        svi.step(policy, episodes)
    env.close()
    means = [float(np.mean(lengths[n : n + 5])) for n in range(36)]
    assert means[0] < 45
    assert max(means) > 75


# --- a site a step ------------------------------------------------------------------------------


class Corridor:
    """Walks that begin in the middle and end at either side; the right one is worth something.

    It has the interface of Gymnasium's vector environments.
    """

    num_envs = 5

    def reset(self, seed: int = 0) -> tuple[np.ndarray, dict[str, Any]]:
        self.place = np.array([0, 1, -1, 0, 2])
        return self.seen(), {}

    def seen(self) -> np.ndarray:
        return np.stack([self.place / 3, self.place**2 / 9], -1)

    def step(self, action: np.ndarray) -> tuple[Any, ...]:
        self.place = np.clip(self.place + 2 * action - 1, -3, 3)
        ended = np.abs(self.place) == 3
        reward = np.where(self.place == 3, 1.0, -0.1)
        return self.seen(), reward, ended, np.zeros(self.num_envs, bool), {}


def step_by_step(policy: nn.Module, steps: int) -> None:
    """The environment is part of the program: a site and a cost a step, a plate of episodes."""
    pyro.module("policy", policy)
    env = Corridor()
    x = torch.as_tensor(env.reset()[0])
    alive = torch.ones(env.num_envs, dtype=torch.bool)
    with pyro.plate("episodes", env.num_envs):
        for n in range(steps):
            with poutine.mask(mask=alive):
                law = dist.Bernoulli(logits=policy(x.to(torch.get_default_dtype()))[..., 0])
                action = pyro.sample(f"action {n}", law)
                seen, reward, ended, _, _ = env.step(action.numpy().astype(int))
                cost(f"cost {n}", -torch.as_tensor(reward) / 10)
            x, alive = torch.as_tensor(seen), alive & ~torch.as_tensor(ended)


def gradients(run: Callable[..., None], objective: ExpectedCost, *args: Any) -> list[Tensor]:
    policy = args[0]
    loss = objective.differentiable_loss(run, no_guide, *args)
    return list(torch.autograd.grad(loss, list(policy.parameters())))


def test_collected_steps_and_a_site_a_step_have_the_same_gradient() -> None:
    """On the same actions, number by number: costs to come are summed by hand or by order."""
    policy = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    episodes = collect(Corridor(), policy, 0, steps=6)
    assert not episodes.alive.all()  # some have ended before others
    together = gradients(acted, ExpectedCost(REINFORCE()), policy, episodes)
    taken = {f"action {n}": action for n, action in enumerate(episodes.actions)}
    given = handlers.given(taken)(step_by_step)
    apart = gradients(given, ExpectedCost(REINFORCE()), policy, len(episodes.actions))
    torch.testing.assert_close(together, apart)
    assert max(float(g.abs().max()) for g in together) > 1e-2


def test_finished_episodes_add_nothing() -> None:
    """Steps behind the end of an episode may be anything: they have no cost."""
    policy = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    episodes = collect(Corridor(), policy, 0, steps=6)
    other = Episodes(*vars(episodes).values())
    other.seen = torch.where(episodes.alive.unsqueeze(-1), other.seen, 5.0)
    other.actions = torch.where(episodes.alive, other.actions, 0.0)
    other.rewards = torch.where(episodes.alive, other.rewards, 100.0)
    objective = ExpectedCost(REINFORCE())
    expected = gradients(acted, objective, policy, episodes)
    torch.testing.assert_close(gradients(acted, objective, policy, other), expected)


def walk(logit: Tensor, steps: int) -> None:
    """The same corridor with no NumPy of its own: ``external`` calls the environment."""
    place = torch.zeros(())
    for n in range(steps):
        action = pyro.sample(f"action {n}", dist.Bernoulli(logits=logit + 0.1 * place))
        place = external(f"place {n}", move, place, action)
        cost(f"cost {n}", external(f"reward {n}", lambda x: -1.0 if x == 2 else 0.1, place))


def move(place: Tensor, action: Tensor) -> float:
    return float((place + 2 * action - 1).clamp(-2, 2))


@pytest.mark.parametrize("estimator", [RLOO(4), DisARM()], ids=repr)
def test_an_environment_that_is_called_in_worlds(estimator: Any) -> None:
    """Estimators that branch need an environment that can be entered at any state."""

    def run() -> None:
        walk(pyro.param("logit", torch.tensor(0.0)), 4)

    objective = ExpectedCost(estimator)
    svi = SVI(run, no_guide, pyro.optim.Adam({"lr": 0.1}), objective)
    for _ in range(40):
        svi.step()
    assert objective.plan_of(run, no_guide).mode != "sequential"
    assert float(pyro.param("logit").detach()) > 1
