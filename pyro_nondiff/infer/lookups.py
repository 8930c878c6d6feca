"""Finds the sites where a model looks a straight-through value up, which gives it no gradient."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributions import Law, describe
from .execute import Chunk


class Scored(NamedTuple):
    """A site of a guide, and what the model says of its value."""

    name: str
    guide_law: Law
    model_law: Law
    value: Tensor
    score: Tensor


def scored_by_model(chunk: Chunk) -> Iterator[Scored]:
    """The pathwise sites that guide and model share."""
    for term in chunk.terms:
        partner = chunk.run.guide.get(term.site.name)
        if partner is not None and partner.ask.pathwise and not term.in_guide:
            yield Scored(partner.name, partner.law, term.site.law, partner.value, term.value)


def lookups(sites: Iterable[Scored]) -> list[str]:
    """What to say of each discrete value with a gradient that the model's score does not have."""
    return [
        f"site '{site.name}': the model's {describe(site.model_law)} looks the straight-through "
        "value up, which gives it no gradient there, and the guide ends far from the posterior. "
        "Draw StraightThroughOneHotCategorical or StraightThroughBernoulli in the model too."
        for site in sites
        if _discrete(site.guide_law)
        and site.value.requires_grad
        and not _depends(site.score, site.value)
    ]


def _discrete(law: Law) -> bool:
    try:
        return bool(law.support.is_discrete)
    except NotImplementedError:  # Pyro's Rejector says nothing of its support
        return False


def _depends(score: Tensor, value: Tensor) -> bool:
    if not score.requires_grad:
        return False
    found = torch.autograd.grad(score.sum(), value, retain_graph=True, allow_unused=True)
    return found[0] is not None
