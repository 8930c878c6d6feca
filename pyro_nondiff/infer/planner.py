"""Finds, on the first step of each signature, how a program is run in worlds."""

import math
import warnings
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from ..errors import NonDiffError, NonDiffWarning
from .check import check_worlds, preserved
from .continuity import check_continuity
from .execute import Chunk, Pair, alone, execute, run_pair
from .lookups import lookups, scored_by_model
from .plan import Mode, Plan

Worlds = Literal["auto", "vectorized", "sequential"]

_MODES: dict[str, tuple[Mode, ...]] = {
    "auto": ("plain", "expanded", "sequential"),
    "vectorized": ("plain", "expanded"),
    "sequential": ("sequential",),
}


class Planner:
    """Holds one plan for each signature, and runs programs by it.

    Arguments:
        num_particles: The least number of base worlds.
        max_plate_nesting: The user's bound, or infinity to find it.
        worlds: ``"auto"``, ``"vectorized"`` or ``"sequential"``.
    """

    def __init__(self, num_particles: int, max_plate_nesting: float, worlds: Worlds) -> None:
        self.num_particles = num_particles
        self.nesting = 0 if max_plate_nesting == float("inf") else int(max_plate_nesting)
        self.modes = _MODES[worlds]
        self._plans: dict[Any, Plan] = {}
        self._least: dict[Any, Plan] = {}
        self.warned: set[str] = set()

    def run(self, pair: Pair, estimating: bool) -> list[Chunk]:
        """Runs guide and model in all worlds of a step.

        Arguments:
            pair: The programs and their arguments.
            estimating: Whether gradients are wanted; without, there are base worlds alone,
                as many as particles.
        """
        key = _signature(pair), estimating
        plan = self._plans.get(key)
        if plan is not None:
            chunks = execute(pair, plan, estimating)
            wanted = self._wanted(chunks, estimating)
            if plan.mode == "sequential":
                self._plans[key] = plan.union(wanted)
                return chunks
            if _fits(plan, wanted):
                return chunks
            self._least[key] = plan.union(wanted)
            del self._plans[key]
            if plan.single:
                return chunks
        least = self._least.get(key, Plan())
        self._plans[key], chunks = self._first(pair, estimating, least)
        for text in lookups(scored_by_model(chunks[0])):
            self.warn(text)
        return chunks

    def plan(self, pair: Pair) -> Plan:
        """The plan of a step with gradients."""
        key = _signature(pair), True
        while key not in self._plans:  # a run that meets new sites drops the plan that it had
            self.run(pair, estimating=True)
        return self._plans[key]

    def warn(self, text: str) -> None:
        """Says something once."""
        if text not in self.warned:
            self.warned.add(text)
            warnings.warn(text, NonDiffWarning, stacklevel=2)

    def _wanted(self, chunks: list[Chunk], estimating: bool) -> Plan:
        found = Plan(self.num_particles, nesting=self.nesting)
        for chunk in chunks:
            run = chunk.run
            asked = Plan(run.base, run.branches) if estimating else Plan()
            found = found.union(asked).union(Plan(nesting=run.nesting))
        return found

    def _first(self, pair: Pair, estimating: bool, least: Plan) -> tuple[Plan, list[Chunk]]:
        """The plan of a new signature: found by a run in one world, tried and checked."""
        with preserved() as restore:
            run = run_pair(pair, Plan(nesting=self.nesting))
            plan = least.union(self._wanted([Chunk(Plan(), run, [])], estimating))
            if plan.single:
                return plan, [alone(pair, run, plan, estimating)]
            reasons: list[Exception] = []
            for mode in self.modes:
                restore()
                try:
                    chunks = self._attempt(pair, replace(plan, mode=mode), estimating)
                except Exception as error:
                    if mode == "sequential":
                        raise
                    reasons.append(error)
                    continue
                if mode == "sequential" and reasons:
                    self._warn_sequential(reasons[0])
                return replace(plan, mode=mode), chunks
            raise NonDiffError(
                "the program does not run in vectorised worlds. Make it broadcast over dimensions "
                "at the left of its plates, or pass worlds='auto' or 'sequential'. What failed: "
                f"{reasons[0]}"
            ) from reasons[0]

    def _attempt(self, pair: Pair, plan: Plan, estimating: bool) -> list[Chunk]:
        """Runs by a plan, and checks on the same draws and on more that it may be run so."""
        chunks = execute(pair, plan, estimating)
        if plan.mode != "sequential" and not _fits(plan, self._wanted(chunks, estimating)):
            raise NonDiffError(
                f"the sites that branch changed from {plan.branches} to "
                f"{chunks[0].run.branches} between two runs of the guide. Vectorised branches "
                "need the same sites at every run: pass worlds='sequential', or use an "
                "estimator without branches, such as RLOO()."
            )
        with preserved() as restore:
            self._check(pair, plan, chunks, estimating)
            restore()
        return chunks

    def _check(self, pair: Pair, plan: Plan, chunks: list[Chunk], estimating: bool) -> None:
        check_continuity(pair, chunks)
        if plan.mode == "sequential":
            return
        for draw in range(_draws(chunks[0])):
            drawn = chunks if draw == 0 else execute(pair, plan, estimating)
            skipped = check_worlds(pair, drawn[0])
            if skipped is not None:
                self.warn(f"the world check was skipped: {skipped}.")
                return

    def _warn_sequential(self, reason: Exception) -> None:
        self.warn(
            "the program does not run in vectorised worlds, so they are run one by one, which is "
            "slower. Make it broadcast over dimensions at the left of its plates, or pass "
            f"worlds='sequential' to silence this. What failed: {reason}"
        )


def _fits(plan: Plan, wanted: Plan) -> bool:
    """Whether a vectorised run has the worlds that its sites asked for."""
    enough = wanted.base <= plan.base and wanted.nesting <= plan.nesting
    return enough and wanted.branches == plan.branches


def _draws(chunk: Chunk) -> int:
    """How many draws the world check takes: where values are few, one may show no difference."""
    values = sum(site.value.numel() for site in chunk.sites if site.latent)
    worlds = chunk.plan.num_rows * chunk.plan.base
    return min(16, math.ceil(32 * worlds / max(values, 1)))


def _signature(pair: Pair) -> Any:
    """What a plan depends on: programs, shapes, and whether modules are in training."""
    programs = (pair.model, pair.guide)
    modes = tuple(fn.training for fn in programs if isinstance(fn, nn.Module))
    return tuple(hash(fn) for fn in programs), modes, _key(pair.args), _key(pair.kwargs)


def _key(argument: object) -> object:
    if isinstance(argument, Tensor):
        return argument.shape, argument.dtype, argument.device
    if isinstance(argument, dict):
        return tuple((name, _key(value)) for name, value in argument.items())
    if isinstance(argument, tuple | list):
        return type(argument), *map(_key, argument)
    return argument if isinstance(argument, int | float | str | None) else type(argument)
