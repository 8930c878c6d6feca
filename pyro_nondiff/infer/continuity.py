"""Refuses a program that is not continuous in its soft values.

A control variate has to be a continuous function of the soft value. A program that
thresholds, rounds or indexes by it is not, and its gradient would be biased without a
sign. So on the first step of a signature one soft world is run under a watch.
"""

from collections.abc import Callable, Sequence
from traceback import FrameSummary, extract_stack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..distributions import continuous, relaxable
from ..errors import NonDiffError
from .check import Given, in_row, slice_value
from .execute import Chunk, Pair, run_recorded
from .lines import line, own_line
from .plan import Plan
from .record import Site

_ROUND = {"round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "heaviside", "floor_divide"}
_CONVERT = {"bool", "int", "long", "item", "tolist", "numpy", "detach", "__array__"}
_IMPLICIT = {"__bool__", "__int__", "__float__", "__index__", "__floordiv__"}
_STEPS = frozenset(_ROUND | _CONVERT | _IMPLICIT)
_HARMLESS = frozenset(["isnan", "isinf", "isfinite", "requires_grad_", "dim", "size"])


def check_continuity(pair: Pair, chunks: Sequence[Chunk]) -> None:
    """Runs one soft world of each site that has some, and follows its soft values.

    Raises:
        NonDiffError: At the first operation that breaks the path from a soft value, with the
            site, the operation and the line.
    """
    chunk = chunks[0]
    if any(term.value.is_meta for term in chunk.terms):
        return
    for at in chunk.run.branches:
        if at.soft and chunk.branches:
            _watch_branch(pair, chunk, chunk.branches[at.site][at.hard])
        elif at.soft and chunk.plan.num_rows > chunk.plan.num_hard:
            _watch_row(pair, chunk, chunk.plan.rows_of(at.site)[1].start)


def _watch_row(pair: Pair, chunk: Chunk, row: int) -> None:
    """Watches one soft row of a vectorised run."""
    rank = chunk.plan.nesting + 2
    values, soft = {}, set()
    for site, place in in_row(chunk, row):
        values[site.name] = slice_value(site, chunk.plan, place, 0)
        rows = site.value.dim() == rank + site.law.event_dim and len(site.value) > 1
        if _is_soft(site, values[site.name], rows):
            soft.add(site.name)
    _watch_world(pair, chunk, values, soft)


def _watch_branch(pair: Pair, chunk: Chunk, branch: Chunk) -> None:
    """Watches a soft world that ran alone."""
    values, soft = {}, set()
    for site in branch.sites:
        if site.latent:
            values[site.name] = site.value.detach().clone()
            twin = chunk.run.drawn.get(site.name)
            moved = twin is None or not torch.equal(twin.value, site.value)
            if _is_soft(site, site.value, moved):
                soft.add(site.name)
    _watch_world(pair, branch, values, soft)


def _watch_world(pair: Pair, chunk: Chunk, values: dict[str, Tensor], soft: set[str]) -> None:
    """Runs one soft world with its soft values marked."""
    watch = _Watch()
    for name in soft:
        watch.mark(values[name].requires_grad_(), name)
    subsamples = dict(chunk.run.subsamples)
    plan = Plan(nesting=chunk.plan.nesting)
    with torch.enable_grad(), watch:
        run_recorded(pair, Given(values, subsamples), subsamples, plan)


def _is_soft(site: Site, value: Tensor, moved: bool) -> bool:
    """Whether a value depends on a soft one: it is relaxed, or continuous and has moved."""
    if relaxable(site.law):
        return bool(((value != 0) & (value != 1)).any())
    return moved and continuous(site.law)


class _Watch(TorchFunctionMode):
    """Follows marked tensors through all operations."""

    def __init__(self) -> None:
        super().__init__()
        self._marked: dict[int, tuple[Tensor, str]] = {}

    def mark(self, value: Tensor, site: str) -> None:
        """Says that a tensor depends on a site's soft value."""
        self._marked[id(value)] = (value, site)  # held, so that no other gets its id

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = [self._marked.get(id(leaf)) for leaf in tree_leaves((args, kwargs))]
        site = next((known[1] for known in inputs if known is not None), None)
        if site is not None:
            self._follow(func, result, site)
        return result

    def _follow(self, func: Callable[..., Any], result: Any, site: str) -> None:
        name = getattr(func, "__name__", str(func))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        steps = name in _STEPS or any(not x.requires_grad for x in outputs)
        if steps and not _looks_only(name):
            self._refuse(name, site)
        for output in outputs:
            if output.requires_grad:
                self.mark(output, site)

    def _refuse(self, name: str, site: str) -> None:
        frames = [f for f in extract_stack() if "continuity.py" not in f.filename]
        if any(_is_validation(frame) for frame in frames):
            return
        raise NonDiffError(
            f"site '{site}': the program breaks its soft value by '{name}', at "
            f"{own_line(frames) or line(frames[-1])}. Its estimator needs a program that is "
            "continuous in the value. Use RLOO(), DisARM() or RELAX(relaxed_cost=False) for this "
            "site."
        )


def _looks_only(name: str) -> bool:
    """Whether an operation takes a tensor's shape, or asks something that changes nothing."""
    shaped = name.endswith("_like") or name.startswith(("new_", "__get__"))
    return shaped or name in _HARMLESS


def _is_validation(frame: FrameSummary) -> bool:
    """Whether a frame only looks at a value to validate it."""
    library = "distributions" in frame.filename and "site-packages" in frame.filename
    return library and ("constraints" in frame.filename or frame.name in _VALIDATION)


_VALIDATION = frozenset({"_validate_sample", "__init__"})
