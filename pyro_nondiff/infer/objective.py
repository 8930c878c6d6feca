"""A step: from runs to the loss and to the surrogate whose gradient is the estimate."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add

import torch
from torch import Tensor

from ..errors import NonDiffError
from ..estimators import Context, Draw, Estimate
from .costs import Cost, site_costs
from .execute import Chunk, Pair
from .pathwise import base_draw, cat, pathwise, sum_but
from .plan import lift
from .record import Site


@dataclass
class Step:
    """What one step found, unreduced over base worlds.

    Arguments:
        loss: The loss of each base world, ``(K,)``, without gradient.
        surrogate: Its gradient is the estimate, ``(K,)``.
        site_surrogates: The part of the surrogate that each estimated site adds.
        own_losses: What trains the estimators' states.
        updates: To be called when the step has succeeded.
        joined: Pairs of sites: a local one, and the later one that joins its plate.
        left_out: Pairs of sites: one with soft worlds, and the later one that breaks them.
    """

    loss: Tensor
    surrogate: Tensor
    site_surrogates: dict[str, Tensor] = field(default_factory=dict)
    own_losses: list[Tensor] = field(default_factory=list)
    updates: list[Callable[[], None]] = field(default_factory=list)
    joined: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class _SiteRows:
    """One estimated site in all of its worlds, see :class:`pyro_nondiff.estimators.Draw`."""

    site: Site
    draw: Draw
    costs: Tensor
    scores: Tensor
    worlds: list[int]
    soft_totals: Tensor | None


def take_step(pair: Pair, chunks: Sequence[Chunk]) -> Step:
    """The loss and the surrogate of a step.

    Arguments:
        pair: The programs and their arguments.
        chunks: All runs of the step.
    """
    parts = [pathwise(chunk) for chunk in chunks]
    step = Step(-torch.cat([loss for loss, _ in parts]), -torch.cat([path for _, path in parts]))
    for rows in _estimated_sites(pair, chunks, step):
        _estimate(pair, rows, step)
    return step


def evaluate(chunks: Sequence[Chunk]) -> Tensor:
    """The loss of each base world, ``(K,)``."""
    return -torch.cat([pathwise(chunk)[0] for chunk in chunks])


def _estimate(pair: Pair, rows: _SiteRows, step: Step) -> None:
    site, scores = rows.site, rows.scores
    shape = tuple(scores.shape[1:])
    context = Context(site.name, pair.args, pair.kwargs, shape, rows.soft_totals)
    if site.estimator is None:
        raise TypeError("an estimated site has an estimator")
    if site.unserved:
        raise NonDiffError(
            f"site '{site.name}': its value is given, and {site.estimator!r} draws values of its "
            "own. Use REINFORCE with a baseline, or RELAX(relaxed_cost=False) for a Bernoulli or "
            "OneHotCategorical."
        )
    state = pair.state_of(site.name, site.estimator, site.law)
    found = site.estimator.estimate(rows.draw, rows.costs, state, context)
    surrogate = _site_surrogate(site, found, rows)
    known = step.site_surrogates.get(site.name)
    step.site_surrogates[site.name] = surrogate if known is None else torch.cat([known, surrogate])
    if surrogate.shape != step.surrogate.shape:  # a site that only some base worlds have met
        index = torch.tensor(rows.worlds, device=surrogate.device)
        surrogate = torch.zeros_like(step.surrogate).index_add(0, index, surrogate)
    step.surrogate = step.surrogate + surrogate
    if found.own_loss is not None:
        step.own_losses.append(found.own_loss)
    if found.update is not None:
        step.updates.append(found.update)


def _site_surrogate(site: Site, found: Estimate, rows: _SiteRows) -> Tensor:
    if found.weight is not None:
        scores = rows.scores[: found.weight.shape[0]]
        return sum_but(found.weight.detach() * scores, 1)
    if len(found.gradients) == len(rows.draw.parameters) > 0:
        pairs = zip(found.gradients, rows.draw.parameters, strict=True)
        return reduce(add, (sum_but(gradient.detach() * p, 0) for gradient, p in pairs))
    raise NonDiffError(
        f"site '{site.name}': {site.estimator!r} returned neither a weight for log_prob nor "
        "gradients, one for each of the parameters that it drew with."
    )


# --- the estimated part: a site with its costs in its own worlds -----------------------


def _estimated_sites(pair: Pair, chunks: Sequence[Chunk], step: Step) -> list[_SiteRows]:
    """Each estimated site, with base worlds that ran apart put side by side."""
    found: dict[str, list[_SiteRows]] = {}
    first = 0
    for chunk in chunks:
        worlds = list(range(first, first + chunk.plan.base))
        first += chunk.plan.base
        soft = chunk.plan.num_rows > chunk.plan.num_hard
        costs = site_costs(chunk.sites, chunk.terms, discount=pair.discount)
        soft_costs = site_costs(chunk.sites, chunk.terms, soft, pair.discount) if soft else {}
        for name, cost in costs.items():
            site = chunk.run.drawn[name]
            _check_shared(site, cost, step)
            rows = _site_rows(pair, site, cost, soft_costs.get(name), chunk, worlds, step)
            found.setdefault(name, []).append(rows)
    merged: list[_SiteRows] = []
    for parts in found.values():
        apart = len(parts) == 1 or parts[0].draw.leaves  # they are leaves of one run
        merged += parts if apart else [_side_by_side(parts)]
    return merged


def _site_rows(
    pair: Pair,
    site: Site,
    cost: Cost,
    soft_cost: Cost | None,
    chunk: Chunk,
    worlds: list[int],
    step: Step,
) -> _SiteRows:
    score = _score(site, chunk)
    hard, soft = chunk.plan.rows_of(site.name)
    values, scores, totals = [_own_rows(cost.value, hard)], [_own_rows(score, hard)], []
    if soft_cost is not None:
        _check_left_out(site, soft_cost, step)
        own = slice(soft.start - chunk.plan.num_hard, soft.stop - chunk.plan.num_hard)
        values.append(_rows(soft_cost.value, own))
        totals.append(_rows(soft_cost.totals, own))
    for row, branch in enumerate(chunk.branches.get(site.name, ())):
        branch_cost, branch_score = _branch_rows(pair, site.name, branch, row >= site.ask.hard)
        values.append(branch_cost.value)
        if row < site.ask.hard:
            scores.append(branch_score)
        else:
            _check_left_out(site, branch_cost, step)
            totals.append(_given(branch_cost.totals))
    return _SiteRows(
        site,
        base_draw(site, chunk.plan.nesting),
        cat(values, 0),
        cat(scores, 0),
        worlds,
        cat(totals, 0) if totals else None,
    )


def _score(site: Site, chunk: Chunk) -> Tensor:
    """What a weight is for: the site's log-probability, or the score that its path leaves out."""
    if site.correction is not None:
        return lift(site.correction, chunk.plan.nesting + 2)
    return next(t.score for t in chunk.terms if t.in_guide and t.site is site)


def _branch_rows(pair: Pair, name: str, branch: Chunk, soft: bool) -> tuple[Cost, Tensor]:
    costs = site_costs(branch.sites, branch.terms, soft, pair.discount)
    score = next(t.score for t in branch.terms if t.in_guide and t.site.name == name)
    return costs[name], score


def _own_rows(x: Tensor, own: slice) -> Tensor:
    count = 1 + own.stop - own.start
    if x.shape[0] == 1:
        return x.expand(count, *x.shape[1:])
    return x[:1] if count == 1 else torch.cat([x[:1], x[own]])


def _rows(x: Tensor | None, own: slice) -> Tensor:
    found = _given(x)
    return found[own] if len(found) > 1 else found.expand(own.stop - own.start, *found.shape[1:])


def _given(x: Tensor | None) -> Tensor:
    if x is None:
        raise TypeError("a soft cost has totals")
    return x


def _side_by_side(rows: list[_SiteRows]) -> _SiteRows:
    draws = [r.draw for r in rows]
    return _SiteRows(
        rows[0].site,
        Draw(
            cat([d.values for d in draws], 1),
            tuple(cat(list(each), 0) for each in zip(*(d.parameters for d in draws), strict=True)),
            _cat_given([d.hard_weights for d in draws], 1),
            coefficients=tuple(
                cat(list(each), 1) for each in zip(*(d.coefficients for d in draws), strict=True)
            ),
        ),
        cat([r.costs for r in rows], 1),
        cat([r.scores for r in rows], 1),
        [world for r in rows for world in r.worlds],
        None,
    )


def _cat_given(tensors: list[Tensor | None], dim: int) -> Tensor | None:
    given = [tensor for tensor in tensors if tensor is not None]
    return cat(given, dim) if len(given) == len(tensors) else None


def _check_shared(site: Site, cost: Cost, step: Step) -> None:
    for plate, other in cost.shared.items():
        if site.ask.per_element:
            why = f"through site '{other}'" if other else "in a term outside the plate"
            raise NonDiffError(
                f"site '{site.name}': {site.estimator!r} sums over the values of each element of "
                f"plate '{plate}' at once, but the elements share a cost {why}, where that sum "
                "is biased. Use RLOO(), or DisARM() for a Bernoulli."
            )
        if other is not None:
            step.joined.append((site.name, other))


def _check_left_out(site: Site, cost: Cost, step: Step) -> None:
    if cost.left_out is None:
        return
    if cost.terms == 0:
        raise NonDiffError(
            f"site '{site.name}': no term of the model is left for the control variate of "
            f"{site.estimator!r}, since all can depend on site '{cost.left_out}', which cannot be "
            "relaxed. Use RELAX(relaxed_cost=False) or RLOO(), or draw a OneHotCategorical there."
        )
    step.left_out.append((site.name, cost.left_out))
