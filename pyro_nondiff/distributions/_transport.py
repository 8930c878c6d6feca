"""A law as a map from noise to values, so that worlds can share the noise.

=============================  ============  =================================
law                            noise         value
=============================  ============  =================================
Bernoulli                      logistic      1 where ``logits + noise > 0``
OneHotCategorical              gumbel        one-hot argmax of ``logits + noise``
Categorical                    gumbel        argmax of ``logits + noise``
Normal, MultivariateNormal     normal        ``loc + scale @ noise``
Exponential                    exponential   ``noise / rate``
TransformedDistribution        of its base   the transforms of its base's value
laws of this library           their own     ``from_noise``
=============================  ============  =================================
"""

from functools import singledispatch

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Exponential,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    TransformedDistribution,
)

from ._laws import Law, core
from ._maps import NoiseMap


@singledispatch
def _kind(law: Law) -> str | None:
    return None


_kind.register(Bernoulli, lambda law: "logistic")
_kind.register(Categorical, lambda law: "gumbel")
_kind.register(OneHotCategorical, lambda law: None if law.has_rsample else "gumbel")
_kind.register(Normal, lambda law: "normal")
_kind.register(MultivariateNormal, lambda law: "normal")
_kind.register(Exponential, lambda law: "exponential")
_kind.register(TransformedDistribution, lambda law: noise_kind(law.base_dist))
_kind.register(NoiseMap, lambda law: law.noise_kind)


@singledispatch
def _value(law: Law, noise: Tensor) -> Tensor:
    raise TypeError(f"{type(law).__name__} is no map of noise")


@_value.register
def _(law: Bernoulli, noise: Tensor) -> Tensor:
    return (law.logits + noise > 0).to(law._param.dtype)


@_value.register
def _(law: Categorical, noise: Tensor) -> Tensor:
    return (law.logits + noise).argmax(-1)


@_value.register
def _(law: OneHotCategorical, noise: Tensor) -> Tensor:
    scores = law.logits + noise
    return torch.zeros_like(scores, dtype=law._param.dtype).scatter(
        -1, scores.argmax(-1, keepdim=True), 1
    )


@_value.register
def _(law: Normal, noise: Tensor) -> Tensor:
    return law.loc + law.scale * noise.to(law.loc.dtype)


@_value.register
def _(law: MultivariateNormal, noise: Tensor) -> Tensor:
    noise = noise.to(law.loc.dtype).unsqueeze(-1)
    return law.loc + (law._unbroadcasted_scale_tril @ noise).squeeze(-1)


@_value.register
def _(law: Exponential, noise: Tensor) -> Tensor:
    return noise.to(law.rate.dtype) / law.rate


@_value.register
def _(law: TransformedDistribution, noise: Tensor) -> Tensor:
    value = transport(law.base_dist, noise)
    for transform in law.transforms:
        value = transform(value)
    return value


@_value.register
def _(law: NoiseMap, noise: Tensor) -> Tensor:
    return law.from_noise(noise)


def noise_kind(law: Law) -> str | None:
    """The kind of noise that a law is a map of, or None if it is none."""
    base = core(law)
    if isinstance(base, TransformedDistribution) and _shape(base) != _shape(law):
        return None  # expanded outside its transforms: its noise has not the law's shape
    return _kind(base)


def continuous(law: Law) -> bool:
    """Whether a law's map of noise is continuous in the law's parameters."""
    return noise_kind(law) is not None and not core(law).support.is_discrete


def noise_concentration(law: Law) -> Tensor | None:
    """The concentration of a law's ``"gamma"`` noise, None for noise of another kind."""
    found: Tensor | None = getattr(core(law), "noise_concentration", None)
    return found


def noise_shape(law: Law) -> torch.Size:
    """The shape of one draw of a law's noise: its batch shape, then what a value takes."""
    base = core(law)
    if isinstance(base, TransformedDistribution):
        return noise_shape(base.base_dist)
    if isinstance(base, Categorical):
        return _shape(law) + base._param.shape[-1:]
    return _shape(law)


def _shape(law: Law) -> torch.Size:
    return torch.Size(law.batch_shape + law.event_shape)


def transport(law: Law, noise: Tensor) -> Tensor:
    """The value that a law makes of noise, hard where the law is discrete.

    Arguments:
        law: A law with a :func:`noise_kind`.
        noise: Noise of :func:`noise_shape`, with any dimensions more at its left.
    """
    return _value(core(law), noise)
