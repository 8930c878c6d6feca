"""What a site can influence, by the order of the sites alone.

The terms of the objective are the log-probabilities of the model's sites and, with a
minus, the guide's. Two rules decide which of them are the cost of a site. Both assume
that no value travels from guide to model outside sample sites.

1. *Which terms.* Guide terms before the site cannot depend on it. A model term can,
   unless every latent site that the model has met up to it precedes the site in the
   guide. So each term has a *reach*: its own place in the guide's order or, for a model
   term, the last place among the latent sites met up to it. The cost of the site at
   place ``i`` is made of the terms with reach ``>= i``.
2. *Which plate frames.* A term keeps a frame of the site, so that each plate element
   pays for itself alone, only if no latent site outside that frame lies after the site
   and not after the term's reach: such a site may carry one element's value to another.
   Otherwise the frame is summed.

Both rules are monotone in the place of the site, so one pass from the last site to the
first finds all costs, in time linear in the number of terms.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

from torch import Tensor

from .record import Frame, Site

Frames = frozenset[Frame]


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of the objective, to be maximised.

    Arguments:
        site: The site it stands for, with the guide's or the model's law.
        value: Of shape ``(rows, base worlds, plates)``, scaled and masked.
        score: The log-probability of the values, neither scaled nor masked.
        reach: The place in the guide's order that the term can depend on.
        in_guide: Whether it enters with a minus.
        soft: The value in soft rows, with its gradient.
    """

    site: Site
    value: Tensor
    score: Tensor
    reach: int
    in_guide: bool
    soft: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a site.

    Arguments:
        value: Of shape ``(rows, base worlds, plates)``, to be minimised.
        totals: Of a soft cost, ``(rows, base worlds)``: each term once, summed over plates.
        left_out: The later site that keeps terms out of a soft cost, if any does.
        terms: How many terms of the model the cost is made of.
        shared: The names of the site's plates that a part of the cost lies outside of,
            with the latent site that joins their elements, or None if a term does.
    """

    value: Tensor
    shared: dict[str, str | None]
    totals: Tensor | None
    left_out: str | None
    terms: int


def reaches(guide: Sequence[Site], model: Sequence[Site]) -> dict[str, int]:
    """The reach of each model site: the last guide place met up to it, or -1."""
    place = {site.name: i for i, site in enumerate(guide)}
    reach, found = -1, {}
    for site in model:
        if site.latent:
            reach = max(reach, place[site.name])
        found[site.name] = reach
    return found


def site_costs(
    guide: Sequence[Site], terms: Iterable[Term], soft: bool = False, discount: float = 1.0
) -> dict[str, Cost]:
    """The cost of each latent site of the guide whose estimator estimates.

    Arguments:
        guide: The sites that are drawn, in their order: the guide's, then the model's own.
        terms: All terms of the objective.
        soft: Take the soft rows, with their gradient, of sites that have soft worlds. Terms
            that can depend on a site that breaks soft values are left out.
        discount: What a term is multiplied with for each later site that it waits for.
    """
    arriving: dict[int, list[Term]] = {}
    for term in terms:
        arriving.setdefault(term.reach, []).append(term)
    pool: dict[Frames, Tensor] = {}
    joined_by: dict[Frame, str] = {}
    left_out: str | None = None
    count = 0
    costs = {}
    for place in range(len(guide) - 1, -1, -1):
        site = guide[place]
        for term in arriving.get(place, ()):
            value = _part(term, soft)
            count += not term.in_guide
            _add(pool, term.site.frames, value if term.in_guide else -value)
        if not site.latent:
            continue
        frames = site.frames
        for lost in frozenset().union(*pool) - frames:
            joined_by[lost] = site.name
        pool = _keep(pool, frames)
        if site.estimator is not None and site.ask.estimated and (site.ask.soft or not soft):
            shared = _shared(pool, frames, joined_by)
            totals = _totals(pool) if soft else None
            costs[site.name] = Cost(reduce(add, pool.values()), shared, totals, left_out, count)
        if soft and site.breaks:
            pool, count, left_out = {}, 0, site.name
        if discount != 1:
            pool = {group: value * discount for group, value in pool.items()}
    return costs


def _part(term: Term, soft: bool) -> Tensor:
    if not soft:
        return term.value.detach()
    if term.soft is None:
        raise TypeError("a run with soft rows has soft terms")
    return term.soft


def _totals(pool: dict[Frames, Tensor]) -> Tensor:
    """The sum of the groups, each over its own plates: no term is counted twice."""
    flat = (value.reshape(*value.shape[:2], -1).sum(-1) for value in pool.values())
    return reduce(add, flat)


def _keep(pool: dict[Frames, Tensor], frames: Frames) -> dict[Frames, Tensor]:
    """Sums the pool over every frame but the given ones."""
    kept: dict[Frames, Tensor] = {}
    for group, value in pool.items():
        dims = sorted(frame.dim for frame in group - frames)
        _add(kept, group & frames, value.sum(dims, keepdim=True) if dims else value)
    return kept


def _add(pool: dict[Frames, Tensor], group: Frames, value: Tensor) -> None:
    pool[group] = pool[group] + value if group in pool else value


def _shared(
    pool: dict[Frames, Tensor], frames: Frames, joined_by: dict[Frame, str]
) -> dict[str, str | None]:
    common = frozenset.intersection(frames, *pool)
    missing = [frame for frame in frames - common if frame.size > 1]
    return {frame.name: joined_by.get(frame) for frame in missing}
