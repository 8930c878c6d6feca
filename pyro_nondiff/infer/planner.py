"""Finds, on the first step of each signature, how a program is run in worlds."""

import warnings
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from ..errors import NonDiffError, NonDiffWarning
from .check import check_worlds, preserved
from .continuity import check_continuity
from .execute import Chunk, Pair, execute, run_pair, terms_of
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
        self._warned: set[str] = set()

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
            chunks = execute(pair, plan)
            if self._fits(plan, chunks, estimating):
                return chunks
        plan, chunks = self._first(pair, estimating)
        self._plans[key] = plan
        return chunks

    def warn(self, text: str) -> None:
        """Says something once."""
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, NonDiffWarning, stacklevel=2)

    def _fits(self, plan: Plan, chunks: list[Chunk], estimating: bool) -> bool:
        if plan.mode == "sequential":
            return True
        wanted = self._wanted(chunks, estimating)
        return (
            wanted.base <= plan.base
            and wanted.nesting <= plan.nesting
            and wanted.branches == plan.branches
        )

    def _wanted(self, chunks: list[Chunk], estimating: bool) -> Plan:
        run = chunks[0].run
        nesting = max(self.nesting, run.nesting)
        if not estimating:
            return Plan(self.num_particles, (), nesting)
        return Plan(max(self.num_particles, run.base), run.branches, nesting)

    def _first(self, pair: Pair, estimating: bool) -> tuple[Plan, list[Chunk]]:
        """The plan of a new signature: found by a run in one world, tried and checked."""
        with preserved() as restore:
            run = run_pair(pair, Plan(nesting=self.nesting))
            plan = self._wanted([Chunk(Plan(), run, [])], estimating)
            if plan.base == plan.num_rows == 1:
                return plan, [Chunk(plan, run, terms_of(run, plan))]
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
        chunks = execute(pair, plan)
        if plan.mode == "sequential":
            return chunks
        if not self._fits(plan, chunks, estimating):
            raise NonDiffError(
                f"the sites that branch changed from {plan.branches} to "
                f"{chunks[0].run.branches} between two runs of the guide. Vectorised branches "
                "need the same sites at every run: pass worlds='sequential', or use an "
                "estimator without branches, such as RLOO()."
            )
        with preserved() as restore:
            if plan.num_rows > plan.num_hard:
                check_continuity(pair, chunks[0])
            skipped = check_worlds(pair, chunks[0])
            restore()
        if skipped is not None:
            self.warn(f"the world check was skipped: {skipped}.")
        return chunks

    def _warn_sequential(self, reason: Exception) -> None:
        self.warn(
            "the program does not run in vectorised worlds, so they are run one by one, which is "
            "slower. Make it broadcast over dimensions at the left of its plates, or pass "
            f"worlds='sequential' to silence this. What failed: {reason}"
        )


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
