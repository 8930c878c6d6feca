"""How the benchmarks time: interleaved, in one process, by ratios inside a round."""

import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import pyro
import torch
from torch._inductor import config as inductor
from torch._inductor.utils import fresh_cache
from torch.fx.experimental.proxy_tensor import make_fx

Step = Callable[[], object]
Times = dict[str, list[float]]


def measure(steps: dict[str, Step], rounds: int, seconds: float, device: str) -> Times:
    """Milliseconds a step: for each candidate, one number a round.

    Arguments:
        steps: The candidates.
        rounds: How often each is timed.
        seconds: About how long it runs each time.
        device: On the CPU the process's own time is read; elsewhere the wall's.
    """
    clock = time.process_time if device == "cpu" else time.perf_counter
    sync = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    repeats = {}
    for name, step in steps.items():
        for _ in range(3):  # the first steps plan, check and allocate
            step()
        sync()
        begin = clock()
        for _ in range(3):
            step()
        sync()
        repeats[name] = max(1, round(3 * seconds / max(clock() - begin, 1e-6)))
    times: Times = {name: [] for name in steps}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(steps), len(steps)):
            step = steps[name]
            sync()
            begin = clock()
            for _ in range(repeats[name]):
                step()
            sync()
            times[name].append(1e3 * (clock() - begin) / repeats[name])
    return times


def ratios(times: Times, name: str, to: str) -> list[float]:
    """The ratio of two candidates in each round."""
    return [a / b for a, b in zip(times[name], times[to], strict=True)]


def spread(values: list[float]) -> str:
    """Median, and least and greatest in brackets."""
    middle = statistics.median(values)
    return f"{middle:.2f} ({min(values):.2f} to {max(values):.2f})"


def ratio_table(times: Times, to: list[str]) -> Iterator[str]:
    """A row a candidate: milliseconds, and ratios to some of them."""
    yield f"| candidate | ms a step | {' | '.join(f'/ {name}' for name in to)} |"
    yield "|---|---|" + "---|" * len(to)
    for name in times:
        cells = [spread(ratios(times, name, other)) for other in to]
        yield f"| {name} | {spread(times[name])} | {' | '.join(cells)} |"


def growth(all_times: dict[int, Times], name: str) -> list[float]:
    """Time a site in the longest chain, over that in the second longest; 1 is linear growth.

    Both are counted from the shortest chain, so that what a step costs without sites drops out. A
    number of samples is as good as a length.
    """
    first, *_, middle, last = sorted(all_times)

    def slopes(length: int) -> list[float]:
        pairs = zip(all_times[length][name], all_times[first][name], strict=True)
        return [(long - short) / (length - first) for long, short in pairs]

    return [a / b for a, b in zip(slopes(last), slopes(middle), strict=True)]


def cpu_seconds() -> float:
    """The time of this process and of the compilers that it has called."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


@cache
def header_seconds() -> float:
    """Lets inductor compile its header, which it does once a machine, and tells the time."""
    begin = cpu_seconds()
    example = torch.ones(64)
    with torch.no_grad():
        torch._inductor.compile(make_fx(lambda x: (x.exp() + 1,))(example), [example])
    return cpu_seconds() - begin


@contextmanager
def cold_compiler() -> Iterator[None]:
    """Inductor finds nothing of earlier runs, and calls its compilers one after the other.

    Its header alone is there.
    """
    with inductor.patch(compile_threads=1):
        header_seconds()
        with fresh_cache():
            yield


@contextmanager
def quiet_machine(validation: bool = False) -> Iterator[None]:
    """One thread, and Pyro's validation off unless it is wanted."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pyro.validation_enabled(validation):
        yield
    torch.set_num_threads(threads)
