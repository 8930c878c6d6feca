"""What a law is made of, and the same law made of something else."""

from collections.abc import Mapping
from functools import singledispatch

import pyro.distributions as dist
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    MultivariateNormal,
    OneHotCategorical,
    TransformedDistribution,
)

from ._laws import Law, core


def parameters(law: Law) -> dict[str, Tensor]:
    """The tensors that a law is made of, by the names of its arguments; logits for probabilities.

    Arguments:
        law: A law; its wrappers are looked through.
    """
    return _parameters(core(law))


@singledispatch
def _parameters(base: Law) -> dict[str, Tensor]:
    found = {name: getattr(base, name, None) for name in base.arg_constraints}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


@_parameters.register
def _(base: Bernoulli | Categorical | OneHotCategorical) -> dict[str, Tensor]:
    return {"logits": base.logits}


@_parameters.register
def _(base: MultivariateNormal) -> dict[str, Tensor]:
    return {"loc": base.loc, "scale_tril": base.scale_tril}


@_parameters.register
def _(base: TransformedDistribution) -> dict[str, Tensor]:
    return parameters(base.base_dist)


def with_parameters(law: Law, new: Mapping[str, Tensor]) -> Law:
    """A law of the same kind made of other tensors, without masks.

    Arguments:
        law: A law.
        new: Tensors by the names of :func:`parameters`; they may have other batch dimensions.
    """
    base = core(law)
    made = _made(base, new)
    count = len(law.event_shape) - len(base.event_shape)  # a base may be torch's own law
    return dist.Independent(made, count) if count else made


@singledispatch
def _made(base: Law, new: Mapping[str, Tensor]) -> Law:
    return type(base)(**new, validate_args=False)


@_made.register
def _(base: TransformedDistribution, new: Mapping[str, Tensor]) -> Law:
    inner = with_parameters(base.base_dist, new)
    return dist.TransformedDistribution(inner, base.transforms, validate_args=False)


def event_dims(law: Law, parameter: Tensor) -> int:
    """How many dimensions of one of its parameters lie at the right of a law's batch shape."""
    base = core(law)
    return parameter.dim() - len(base.batch_shape) + int(law.event_dim - base.event_dim)


def base_row(law: Law, rank: int) -> Law:
    """A law at the first of its rows, the base run's.

    Arguments:
        law: A law with batch shape ``(rows, ...)`` if that has ``rank`` dimensions; one of
            fewer has no rows and comes back as it is.
        rank: How many dimensions a batch shape with rows has.
    """
    if len(law.batch_shape) < rank or law.batch_shape[0] == 1:
        return law
    return with_parameters(law, {name: p[:1] for name, p in parameters(law).items()})
