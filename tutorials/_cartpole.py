"""Episodes of Gymnasium's CartPole, collected by the draws of a policy."""

from collections.abc import Callable
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from torch import Tensor

LIMIT = 500  # steps of the longest episode


class Steps(NamedTuple):
    """Steps of some episodes, one after the other.

    Arguments:
        seen: Shape ``(steps, 5)``: place and speed of cart and pole, and a clock in [0, 1).
        action: Shape ``(steps,)``: 1 to push to the right, 0 to the left.
        to_come: Shape ``(steps,)``: the number of steps from this one to the episode's end.
    """

    seen: Tensor
    action: Tensor
    to_come: Tensor


@torch.no_grad()
def play(
    act: Callable[[Tensor], Tensor], episodes: int, batch: int, seed: int, device: torch.device
) -> list[Steps]:
    """Whole episodes, played side by side.

    Arguments:
        act: Draws an action for each row of what is seen.
        episodes: How many are played.
        batch: How many of them make one ``Steps``.
        seed: Of the environment.
        device: Where the tensors are to be.
    """
    kind = gymnasium.VectorizeMode.VECTOR_ENTRY_POINT
    env = gymnasium.make_vec("CartPole-v1", episodes, kind)
    state, _ = env.reset(seed=seed)
    alive, rows = np.ones(episodes, bool), []
    while alive.any():
        clock = np.full((episodes, 1), len(rows) / LIMIT, np.float32)
        seen = torch.as_tensor(np.concatenate([state, clock], 1), device=device)
        action = act(seen)
        rows.append((seen, action, torch.as_tensor(alive.copy(), device=device)))
        state, _, fell, cut, _ = env.step(action.cpu().numpy().astype(int))
        alive &= ~(fell | cut)
    columns = [torch.stack(column) for column in zip(*rows, strict=True)]
    to_come = columns[2].float().flip(0).cumsum(0).flip(0)
    batches = zip(*(column.split(batch, dim=1) for column in (*columns, to_come)), strict=True)
    # Steps after an episode's end belong to none.
    return [Steps(seen[on], action[on], rest[on]) for seen, action, on, rest in batches]
