"""The world check: a program that broadcasts wrongly is told so, never trained wrongly."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ..errors import NonDiffError
from .costs import Term
from .execute import Chunk, Pair, run_recorded, terms_of
from .generators import random_states, set_random_states
from .plan import Plan, lift
from .record import Recorder, Site


@contextmanager
def preserved() -> Iterator[Callable[[], None]]:
    """Keeps random states, and the buffers of each module that runs in the block.

    Modules work on copies of their buffers, since a graph may hold the originals; at the end
    of the block the originals take over what has not been put back.

    Yields:
        A function that puts everything back to where the block began.
    """
    buffers: dict[nn.Module, dict[str, Tensor]] = {}

    def note(module: nn.Module, _: Any) -> None:
        if module not in buffers:
            buffers[module] = dict(module.named_buffers(recurse=False))
            for name, buffer in buffers[module].items():
                module._buffers[name] = buffer.clone()

    def put_back(keep: bool) -> None:
        for module, originals in buffers.items():
            for name, original in originals.items():
                if keep:
                    original.copy_(module.get_buffer(name))
                module._buffers[name] = original
        buffers.clear()

    generators = random_states()

    def restore() -> None:
        set_random_states(generators)
        put_back(keep=False)

    handle = register_module_forward_pre_hook(note)
    try:
        yield restore
    finally:
        handle.remove()
        with torch.no_grad():
            put_back(keep=True)


def check_worlds(pair: Pair, chunk: Chunk) -> str | None:
    """Replays worlds of a vectorised run alone, and compares all terms.

    Returns:
        Why the check was skipped, or None if all worlds agree.

    Raises:
        NonDiffError: If a term differs, with the site and the world.
    """
    if any(term.value.is_meta for term in chunk.terms):
        return None
    first, again = _alone(pair, chunk, 0, 0), _alone(pair, chunk, 0, 0)
    if any(not _close(first[key], again[key]) for key in first.keys() & again.keys()):
        return "the program has randomness outside its sample sites (dropout, say)"
    bases = sorted({0, min(1, chunk.plan.base - 1), chunk.plan.base - 1})
    for row in range(chunk.plan.num_rows):
        for base in bases:  # base worlds are alike: the first two and the last show a mistake
            alone = first if row == base == 0 else _alone(pair, chunk, row, base)
            _compare(chunk, alone, row, base)
    return None


_Key = tuple[str, bool]


def _alone(pair: Pair, chunk: Chunk, row: int, base: int) -> dict[_Key, Tensor]:
    """The terms of one world, run on its own with its values."""
    sites = in_row(chunk, row)
    values = {site.name: slice_value(site, chunk.plan, place, base) for site, place in sites}
    subsamples = dict(chunk.run.subsamples)
    plan = Plan(nesting=chunk.plan.nesting)
    with torch.no_grad():
        run = run_recorded(pair, Given(values, subsamples), subsamples, plan)
        terms = terms_of(pair, run, plan, soft=row >= chunk.plan.num_hard)
    return {(t.site.name, t.in_guide): t.value for t in terms}


def in_row(chunk: Chunk, row: int) -> Iterator[tuple[Site, int]]:
    """The latent sites of a vectorised run, each with its place of a row in its value.

    The model's own sites have their soft rows in a run of their own.
    """
    soft = row - chunk.plan.num_hard
    for site in chunk.sites:
        if not site.latent:
            continue
        if site.name in chunk.run.guide or soft < 0 or chunk.run.soft_model is None:
            yield site, row
        else:
            yield chunk.run.soft_model[site.name], soft


def slice_value(site: Site, plan: Plan, row: int, base: int) -> Tensor:
    """A value in one world, with the dimensions that it has in a run of its own."""
    event = site.value.shape[site.value.dim() - site.law.event_dim :]
    worlds = lift(site.value, plan.nesting + 2 + site.law.event_dim)
    worlds = worlds[row if worlds.shape[0] > 1 else 0]
    value = worlds[base if worlds.shape[0] > 1 else 0].detach()
    depth = max((-frame.dim for frame in site.frames), default=0)
    plates = value.shape[plan.nesting - depth : plan.nesting]
    return value.reshape(plates + event)


def _compare(chunk: Chunk, alone: Mapping[_Key, Tensor], row: int, base: int) -> None:
    for term in chunk.terms:
        name, value = term.site.name, _row(term, row, chunk.plan.num_hard)
        value = value[:, base : base + 1] if value.shape[1] > 1 else value
        expected = alone.get((name, term.in_guide))
        if expected is None or not _close(value, expected):
            program = "guide" if term.in_guide else "model"
            raise NonDiffError(
                f"site '{name}' of the {program} has another log-probability in world ({row}, "
                f"{base}) of a vectorised run than in that world alone: the program does not "
                f"broadcast over the {_dims(chunk.plan)} dimensions at the left of its plates. "
                "Index from the right (x[..., 0], sum(-1)), or pass worlds='sequential'."
            )


def _row(term: Term, row: int, num_hard: int) -> Tensor:
    value, place = term.value.detach(), row
    if row >= num_hard and term.soft is not None:
        value, place = term.soft.detach(), row - num_hard
    return value[place : place + 1] if value.shape[0] > 1 else value


def _dims(plan: Plan) -> int:
    return (plan.num_rows > 1) + (plan.base > 1 or plan.num_rows > 1)


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal but for the order in which sums were taken: half of the digits."""
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    try:
        return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    except RuntimeError:  # shapes that do not broadcast
        return False


class Given(Recorder):
    """A guide's run with all values given."""

    def __init__(self, values: Mapping[str, Tensor], subsamples: dict[str, Any]) -> None:
        super().__init__("guide", subsamples)
        self.values = values

    def give_value(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.values:
            raise NonDiffError(
                f"site '{name}' was met in one world and not in a vectorised run of all: the "
                "program's sites depend on values. Pass worlds='sequential'."
            )
        msg["value"], msg["done"] = self.values[name], True
