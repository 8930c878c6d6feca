"""What ``time_to_elbo.py`` finds: runs, the level they are to reach, a table and a picture."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

matplotlib.use("Agg")

PYRO = "Pyro TraceGraph_ELBO + average"
BIASED = "straight-through Gumbel"
TARGET = 8


@dataclass
class Run:
    """A candidate's training at one learning rate.

    Arguments:
        candidate: Its name.
        learning_rate: Of Adam.
        seconds: When it was evaluated, with all that came before, compilation included.
        train: The ELBO of training images at these times.
        held_out: The ELBO of held-out images at these times.
        first: Seconds of the first two steps: the eager one, and the one that is recorded.
        steps: How many steps it took.
    """

    candidate: str
    learning_rate: float
    seconds: list[float] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    first: float = 0.0
    steps: int = 0

    def reached(self, which: str, level: float) -> float | None:
        """When it was first evaluated at the level or above."""
        for second, elbo in zip(self.seconds, getattr(self, which), strict=True):
            if elbo >= level:
                return second
        return None

    @property
    def milliseconds(self) -> float:
        """Of a step after the first two."""
        return 1e3 * (self.seconds[-1] - self.first) / (self.steps - 2)


def levels(runs: list[Run]) -> dict[str, float]:
    """Pyro's ELBOs over the last tenth of its time, at the best of its learning rates."""
    found = []
    for run in runs:
        if run.candidate == PYRO:
            last = max(1, len(run.seconds) // 10)
            ends = {"train": run.train[-last:], "held_out": run.held_out[-last:]}
            found.append({which: statistics.mean(elbos) for which, elbos in ends.items()})
    return max(found, key=lambda end: end["held_out"])


def best_runs(runs: list[Run]) -> dict[str, Run]:
    """Of each candidate the run first at the held-out level, else that which came nearest."""
    level = levels(runs)["held_out"]

    def merit(run: Run) -> tuple[bool, float]:
        second = run.reached("held_out", level)
        return (False, max(run.held_out)) if second is None else (True, -second)

    found: dict[str, Run] = {}
    for run in runs:
        if run.candidate not in found or merit(run) > merit(found[run.candidate]):
            found[run.candidate] = run
    return found


def table(runs: list[Run]) -> Iterator[str]:
    """A row a candidate, at its best learning rate."""
    level = levels(runs)
    yield (
        "| candidate | Adam's rate | ms a step | first two steps, s | s to held-out level | sooner "
        "| sooner, without compilation | s to training level | sooner |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    best = best_runs(runs)
    own = {which: best[PYRO].reached(which, value) or 0.0 for which, value in level.items()}
    for name, run in best.items():
        held_out, trained = (run.reached(which, level[which]) for which in ("held_out", "train"))
        cells = [f"{run.learning_rate:g}", f"{run.milliseconds:.2f}", f"{run.first:.1f}"]
        if held_out is None:
            cells += [f"not in {run.seconds[-1]:.0f}: {max(run.held_out):.2f}", "", ""]
        else:
            cells += [f"{held_out:.1f}", f"{own['held_out'] / held_out:.1f}"]
            cells.append(f"{(own['held_out'] - best[PYRO].first) / (held_out - run.first):.1f}")
        if trained is None:
            cells += [f"not in {run.seconds[-1]:.0f}: {max(run.train):.2f}", ""]
        else:
            cells += [f"{trained:.1f}", f"{own['train'] / trained:.1f}"]
        yield f"| {name} | {' | '.join(cells)} |"


def verdict(runs: list[Run]) -> Iterator[str]:
    """What was asked for, and what was found."""
    level = levels(runs)["held_out"]
    best = best_runs(runs)
    times = {name: run.reached("held_out", level) for name, run in best.items()}
    reached = {n: t for n, t in times.items() if t is not None and n not in (PYRO, BIASED)}
    if not reached or times[PYRO] is None:
        yield "No estimator has reached the level."
        return
    name = min(reached, key=reached.__getitem__)
    sooner = times[PYRO] / reached[name]
    met = "yes" if sooner >= TARGET else "no"
    yield "| target | found | at least | met |"
    yield "|---|---|---|---|"
    what = f"best estimator without bias, {name}: sooner than Pyro"
    yield f"| {what} | {sooner:.1f} | {TARGET} | {met} |"


def picture(runs: list[Run], path: Path) -> None:
    """The held-out ELBO against seconds, each curve named at its end."""
    level = levels(runs)["held_out"]
    best = best_runs(runs)
    figure, axes = plt.subplots(figsize=(9, 5.5))
    ends: list[tuple[float, float, str, Any]] = []
    for name, run in best.items():
        style = "--" if name == BIASED else "-"
        (line,) = axes.plot(run.seconds, run.held_out, style, linewidth=1.6)
        ends.append((run.held_out[-1], run.seconds[-1], name, line.get_color()))
    axes.axhline(level, color="0.6", linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(level - 25, max(max(run.held_out) for run in best.values()) + 2)
    axes.set_xlabel("seconds of one core, compilation included")
    axes.set_ylabel("ELBO of held-out images, nats")
    axes.set_title(f"Pyro's level: {level:.1f} nats", loc="left", fontsize=10, color="0.4")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _label(axes, ends)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def _label(axes: Any, ends: list[tuple[float, float, str, Any]]) -> None:
    """Names to the right of the axes, apart from each other, with a line to their curve's end."""
    low, high = axes.get_ylim()
    gap = (high - low) / 18
    place = high + gap / 2
    for elbo, second, name, color in sorted(ends, key=lambda end: (-end[0], end[1])):
        end = max(elbo, low)
        place = min(place - gap, end)
        axes.annotate(
            name,
            (second, end),
            xytext=(1.04, place),
            textcoords=("axes fraction", "data"),
            color=color,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.6,
                "alpha": 0.5,
                "relpos": (0, 0.5),
            },
        )
