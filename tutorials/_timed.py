"""Training for a given time, to compare what takes different times a step."""

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from _tutorial import smoke_test
from tqdm import tqdm

EVALUATIONS = 12


def train_for(
    seconds: float, step: Callable[[], Any], evaluate: Callable[[], float]
) -> dict[str, Any]:
    """Take steps for some seconds; what was evaluated meanwhile, when, and how many steps it took.

    One thread is used. The clock stops while ``evaluate`` runs. It is the time of this process and
    of the compilers that it calls, so that what else runs on the machine does not count; where a
    GPU is in use it is the wall's. In smoke mode it runs for a moment.
    """
    torch.set_num_threads(1)
    seconds = 0.05 if smoke_test else seconds
    at, values, steps, spent = [], [], 0, 0.0
    with tqdm(total=seconds, unit="s", disable=smoke_test) as bar:
        while spent < seconds:
            begin, until = _clock(), min(seconds / EVALUATIONS, seconds - spent)
            while _clock() - begin < until:
                step()
                steps += 1
            spent += _clock() - begin
            at.append(spent)
            values.append(evaluate())
            bar.update(min(round(spent, 1), seconds) - bar.n)
    return {"at": at, "values": values, "steps": steps}


def _clock() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        return time.perf_counter()
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
