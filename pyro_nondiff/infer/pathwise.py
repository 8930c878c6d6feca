"""The objective itself, averaged over rows: what is differentiated through the values."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial, reduce
from operator import add

import torch
from torch import Tensor

from ..distributions import event_dims
from ..estimators import Draw
from .costs import Frames
from .execute import Chunk
from .plan import lift, lift_behind
from .record import Site

WeightsOf = Callable[[Frames], Tensor | None]


def pathwise(chunk: Chunk) -> tuple[Tensor, Tensor]:
    """The objective's value, and the part that is differentiated through the values.

    Arguments:
        chunk: Base worlds with their branches.

    Returns:
        Both of shape ``(K,)``.
    """
    path: list[Tensor] = []
    score: list[Tensor] = []
    for piece, weights_of in _pieces(chunk):
        for term in piece.terms:
            value = -term.value if term.in_guide else term.value
            scored = term.in_guide and term.site.latent and not term.site.ask.pathwise
            total = _weighted(value.detach() if scored else value, weights_of(term.site.frames))
            (score if scored else path).append(total)
    if not path:
        path = [torch.zeros_like(score[0])]
    surrogate = reduce(add, path).expand(chunk.plan.base)
    return reduce(add, score, surrogate.detach()), surrogate


def _weighted(value: Tensor, weights: Tensor | None) -> Tensor:
    """A term summed over plates and rows, ``(K or 1,)``."""
    if weights is not None and value.shape[0] == weights.shape[0]:
        value = value * weights
    return sum_but(value, 1)


def _pieces(chunk: Chunk) -> Iterator[tuple[Chunk, WeightsOf]]:
    """The runs that hold the rows, each with the weights of its rows for a term's frames."""
    met = [site for site in chunk.sites if site.ask.hard]
    if chunk.plan.num_hard > 1:
        yield chunk, cache(partial(_row_weights, chunk, met))
        return
    base, shares = _shares(chunk)
    yield chunk, lambda frames: None if base == 1 else _ones(chunk) * base
    for site in met if chunk.branches else ():
        weights_of = cache(partial(_site_weights, site, chunk, shares[site.name]))
        for row, branch in enumerate(chunk.branches[site.name][: site.ask.hard]):
            yield branch, partial(_one_row, weights_of, row)


def _one_row(weights_of: Callable[[Frames], Tensor], row: int, frames: Frames) -> Tensor:
    return weights_of(frames)[row : row + 1]


def _row_weights(chunk: Chunk, met: list[Site], frames: Frames) -> Tensor:
    """The weight of each row of a vectorised run, ``(rows, K or 1, plates)``."""
    base, shares = _shares(chunk)
    weights = [_site_weights(site, chunk, shares[site.name], frames) for site in met]
    return cat([_ones(chunk) * base, *weights], 0)


def _shares(chunk: Chunk) -> tuple[float, dict[str, float]]:
    """The share of the base row, and that of each branching site; they sum to one.

    They must not depend on what the base run drew, or rows would be preferred by their values.
    So they are shares of what was planned: the base row stands in for a planned site that the
    run has not met, and a site that was not planned has no share in this step.
    """
    planned = [at for at in chunk.planned if at.hard]
    base = min((at.base_mass for at in planned), default=1.0)
    total = base + sum(at.hard_mass for at in planned)
    met = {at.site: at.hard_mass / total for at in planned if at.site in chunk.run.drawn}
    return 1 - sum(met.values()), dict.fromkeys(chunk.run.drawn, 0.0) | met


def _site_weights(site: Site, chunk: Chunk, share: float, frames: Frames) -> Tensor:
    """The weights of a site's hard rows for a term in given frames.

    A term outside a plate of the site does not depend on the site's value there: the mean over
    that plate is taken.
    """
    ask = site.ask
    weights = base_draw(site, chunk.plan.nesting).hard_weights
    if weights is None:
        ones = _ones(chunk)
        return (ones * (share / ask.hard)).expand(ask.hard, *ones.shape[1:])
    weights = weights * (share / ask.hard_mass)
    dims = sorted(frame.dim for frame in site.frames - frames)
    return weights.mean(dims, keepdim=True) if dims else weights


def _ones(chunk: Chunk) -> Tensor:
    like = chunk.terms[0].value
    return like.new_ones((1,) * like.dim())


def base_draw(site: Site, nesting: int) -> Draw:
    """A draw with all dimensions, at the base row; what costs depend on stays as it is."""
    if site.draw is None:
        raise TypeError("a latent site has a draw")
    draw, rank = site.draw, nesting + 2
    full = rank + site.law.event_dim
    values = lift_behind(draw.values, full)[:, 0]
    if not draw.parameters and draw.hard_weights is None:
        return Draw(values)
    hard, ranks = draw.hard_weights, [rank + event_dims(site.law, p) for p in draw.parameters]
    return replace(
        draw,
        values=values,
        parameters=_base_row(draw.parameters, ranks),
        scores=_base_row(draw.scores, ranks),
        coefficients=tuple(lift_behind(c, full)[:, 0] for c in draw.coefficients),
        hard_weights=None if hard is None else lift_behind(hard, rank)[:, 0],
    )


def _base_row(tensors: tuple[Tensor, ...], ranks: list[int]) -> tuple[Tensor, ...]:
    return tuple(lift(x, rank)[0] for x, rank in zip(tensors, ranks[: len(tensors)], strict=True))


def cat(tensors: list[Tensor], dim: int) -> Tensor:
    """Concatenates tensors whose other dimensions broadcast."""
    if len(tensors) == 1:
        return tensors[0]
    shapes = [(*t.shape[:dim], 1, *t.shape[dim + 1 :]) for t in tensors]
    shape = torch.broadcast_shapes(*shapes)
    wide = [t.expand(shape[:dim] + t.shape[dim : dim + 1] + shape[dim + 1 :]) for t in tensors]
    return torch.cat(wide, dim)


def sum_but(x: Tensor, dim: int) -> Tensor:
    """Sums over all dimensions but one."""
    dims = [d for d in range(x.dim()) if d != dim]
    return x.sum(dims) if dims else x
