"""What every other room asks of a law: its core, its score, and its logits."""

from collections.abc import Callable
from functools import singledispatch
from typing import Any, TypeAlias, cast

import torch
from pyro.distributions import Distribution, MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.util import broadcast_shape, scale_and_mask
from torch import Tensor
from torch.distributions import Bernoulli, Independent, OneHotCategorical
from torch.nn.functional import softplus

from ._maps import NoiseMap

Law: TypeAlias = Any
"""A Pyro distribution. Pyro's own laws, and wrappers of them, have no type in common."""


def core(law: Law) -> Law:
    """The law under its ``to_event``, ``expand`` and ``mask`` wrappers."""
    while isinstance(law, (Independent, MaskedDistribution, ExpandedDistribution)):
        law = law.base_dist
    return law


def logits(law: Law) -> Tensor | None:
    """The logits of a law under its wrappers, or None for a law without."""
    return getattr(core(law), "logits", None)


def rewrap(law: Law, change: Callable[[Law], Law]) -> Law:
    """A law with another core, under the same ``to_event``, ``expand`` and ``mask`` wrappers.

    Arguments:
        law: A law.
        change: A function from its core to the new one, of the same batch shape.
    """
    if isinstance(law, Independent):
        return rewrap(law.base_dist, change).to_event(law.reinterpreted_batch_ndims)
    if isinstance(law, MaskedDistribution):
        return rewrap(law.base_dist, change).mask(law._mask)
    if isinstance(law, ExpandedDistribution):
        return rewrap(law.base_dist, change).expand(law.batch_shape)
    return change(law)


def describe(law: Law) -> str:
    """A law's name as a user wrote it."""
    return type(core(law)).__name__


def dtype_and_device(law: Law) -> tuple[torch.dtype, torch.device]:
    """Where a law lives, read off the first of its parameters."""
    base: Any = core(law)
    if isinstance(base, NoiseMap):
        return base.like.dtype, base.like.device
    while hasattr(base, "base_dist"):
        base = core(base.base_dist)
    for name in base.arg_constraints:
        parameter = base.__dict__.get(name)
        if isinstance(parameter, Tensor):
            return parameter.dtype, parameter.device
    if isinstance(base, OneHotCategorical):
        return base._param.dtype, base._param.device
    return torch.get_default_dtype(), torch.get_default_device()


@singledispatch
def _core_score(law: Law, value: Tensor) -> Tensor:
    return cast(Tensor, law.log_prob(value))


@_core_score.register(OneHotCategorical)
def _(law: OneHotCategorical, value: Tensor) -> Tensor:
    if not value.requires_grad:
        return cast(Tensor, law.log_prob(value))
    # torch looks the value up, which gives it no gradient: score it by the extension
    # that is linear in the value and equal at the corners.
    if law._validate_args:
        law._validate_sample(value)
    return extended_score(law, value)


def _is_difference(law: Law) -> bool:
    """Whether a law's score is a difference of two parts, both precise enough to be subtracted."""
    if not isinstance(law, Bernoulli) or type(law).log_prob is not Bernoulli.log_prob:
        return False
    return torch.finfo(law._param.dtype).bits >= 32


@_core_score.register(Bernoulli)
def _(law: Bernoulli, value: Tensor) -> Tensor:
    if not _is_difference(law):
        return cast(Tensor, law.log_prob(value))
    return _bernoulli_score(law, value, 0)


def _bernoulli_score(law: Bernoulli, value: Tensor, count: int, soft: bool = False) -> Tensor:
    """The score of bits, summed over the last dimensions.

    Where worlds or plate elements share logits, the part that is no function of the value is
    summed by itself, once for all of them.
    """
    logits = _unexpanded(law.logits, count)
    if logits.numel() == torch.broadcast_shapes(value.shape, law.logits.shape).numel():
        score = extended_score(law, value) if soft else law.log_prob(value)
        return _sum_rightmost(score, count)
    if law._validate_args and not soft:
        law._validate_sample(value)
    return _sum_rightmost(value * law.logits, count) - _sum_rightmost(softplus(logits), count)


def _unexpanded(x: Tensor, count: int) -> Tensor:
    """A tensor without the copies that it was expanded to, but in the last dimensions."""
    for dim in range(x.dim() - count):
        if x.stride(dim) == 0 and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x


def extended_score(law: Law, value: Tensor) -> Tensor:
    """The extension of a discrete law's score that is linear in each factor of the value."""
    if isinstance(law, Bernoulli):
        return value * law.logits - softplus(law.logits)
    if isinstance(law, OneHotCategorical):
        # a category that is masked out has log-probability -inf, and 0 * -inf is NaN
        return (value * law.logits.masked_fill(law.logits == -torch.inf, 0)).sum(-1)
    return _core_score(law, value)


def log_prob(law: Law, value: Tensor, soft: bool = False) -> tuple[Tensor, Tensor]:
    """The log-probability of a value, without and with the law's own masks.

    A ``soft`` value is not validated, and scored by the multilinear extension.

    An estimator differentiates the first: masking a site changes what it costs, not
    how it is drawn. The cost is made of the second. Without masks they are the same
    tensor.
    """
    if isinstance(law, Independent):
        count = law.reinterpreted_batch_ndims
        if _is_difference(law.base_dist):
            score = _bernoulli_score(law.base_dist, value, count, soft)
            return score, score
        both = log_prob(law.base_dist, value, soft)
        return _each(both, lambda x: _sum_rightmost(x, count))
    if isinstance(law, MaskedDistribution):
        score, masked = log_prob(law.base_dist, value, soft)
        return score, scale_and_mask(masked, mask=law._mask)
    if isinstance(law, ExpandedDistribution):
        batch = value.shape[: value.dim() - law.event_dim]
        shape = broadcast_shape(law.batch_shape, batch)
        return _each(log_prob(law.base_dist, value, soft), lambda x: x.expand(shape))
    score = extended_score(law, value) if soft else _core_score(law, value)
    return score, score


def entropy(law: Law) -> Tensor:
    """The entropy of a law, with its own masks.

    Raises:
        NotImplementedError: For a law whose entropy is not known.
    """
    if isinstance(law, Independent):
        return _sum_rightmost(entropy(law.base_dist), law.reinterpreted_batch_ndims)
    if isinstance(law, MaskedDistribution):
        return cast(Tensor, scale_and_mask(entropy(law.base_dist), mask=law._mask))
    if isinstance(law, ExpandedDistribution):
        return entropy(law.base_dist).expand(law.batch_shape)
    return cast(Tensor, law.entropy())


def score_correction(law: Law, value: Tensor) -> Tensor | None:
    """The score of what a value's path leaves out, or None for a law whose path is whole.

    It is the log-density of the noise where that depends on the parameters, as an accepted
    proposal's does, with a gradient at fixed noise. Masks are left out, as for every score.

    Arguments:
        law: The law that has drawn the value.
        value: The value as it was drawn.
    """
    if isinstance(law, Independent):
        found = score_correction(law.base_dist, value)
        return None if found is None else _sum_rightmost(found, law.reinterpreted_batch_ndims)
    if isinstance(law, MaskedDistribution | ExpandedDistribution):
        return score_correction(law.base_dist, value)
    if not partly_pathwise(law):
        return None
    return cast(Tensor, law.score_parts(value).score_function)


def partly_pathwise(law: Law) -> bool:
    """Whether a law says that a part of its gradient does not go through its value."""
    base = core(law)
    own_parts = type(base).score_parts is not Distribution.score_parts
    return bool(getattr(base, "partly_pathwise", own_parts))


def _each(both: tuple[Tensor, Tensor], change: Any) -> tuple[Tensor, Tensor]:
    first = change(both[0])
    return first, first if both[1] is both[0] else change(both[1])


def _sum_rightmost(x: Tensor, count: int) -> Tensor:
    return x.sum(tuple(range(-count, 0))) if count else x
