r"""The only place that draws a random number.

A law is a map from noise to values. The noise is drawn here, once a site, and its
source can be replaced: a certificate enumerates it, a test injects it.

===============  =============================  ======================================
kind             law of one number              serves
===============  =============================  ======================================
``logistic``     :math:`\log u - \log(1 - u)`   Bernoulli
``gumbel``       :math:`-\log(-\log u)`         Categorical, OneHotCategorical
``normal``       standard normal                Normal and its transforms
``exponential``  :math:`-\log u`                Exponential
``gamma``        standard Gamma                 Gamma of a fixed concentration
``rayleigh``     :math:`\sqrt{-2 \log u}`       measure-valued gradients
===============  =============================  ======================================

Noise is at least float32 whatever the dtype of the law, always finite, and the
logistic one is symmetric to the last bit, so that ``-noise`` is noise too.

Example:
    >>> import pyro_nondiff.noise as noise
    >>> request = noise.Request("z", "logistic", (3,), torch.float16, "cpu")
    >>> noise.draw(request).dtype
    torch.float32
    >>> with noise.source(lambda request: torch.zeros(request.shape)):
    ...     noise.draw(request)
    tensor([0., 0., 0.])
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Request", "draw", "source"]


@dataclass(frozen=True)
class Request:
    """What a source needs to know to draw the noise of one site.

    Arguments:
        site: The name of the site.
        kind: One of the kinds above.
        shape: The shape of the noise.
        dtype: The dtype of the law; the noise has it, or float32 if that is wider.
        device: The device of the noise.
        role: ``"u"`` for noise that a value is made of; ``"antithetic"`` if its
            negative is used beside it.
        law: The law that the noise is for.
        concentration: Of ``"gamma"`` noise, broadcasting with ``shape``.
    """

    site: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device | str
    role: str = "u"
    law: Any = None
    concentration: Tensor | None = None


Source = Callable[[Request], Tensor]


def _random(request: Request) -> Tensor:
    dtype = torch.promote_types(request.dtype, torch.float32)
    place: dict[str, Any] = {"dtype": dtype, "device": request.device}
    return _KINDS[request.kind](request, place)


def _logistic(request: Request, place: dict[str, Any]) -> Tensor:
    half_eps = torch.finfo(place["dtype"]).eps / 2
    return torch.rand(request.shape, **place).clamp(half_eps, 1 - half_eps).logit_()


def _exponential(request: Request, place: dict[str, Any]) -> Tensor:
    # drawn into random numbers, not into an empty tensor: under vmap that is one for all
    drawn = torch.rand(request.shape, **place).exponential_()
    return drawn.clamp(min=torch.finfo(place["dtype"]).tiny)


def _gamma(request: Request, place: dict[str, Any]) -> Tensor:
    if request.concentration is None:
        raise TypeError("gamma noise needs a concentration")
    concentration = request.concentration.detach().to(**place).expand(request.shape)
    return torch._standard_gamma(concentration).clamp(min=torch.finfo(place["dtype"]).tiny)


_KINDS: dict[str, Callable[[Request, dict[str, Any]], Tensor]] = {
    "logistic": _logistic,
    "gumbel": lambda request, place: -_exponential(request, place).log(),
    "normal": lambda request, place: torch.randn(request.shape, **place),
    "exponential": _exponential,
    "gamma": _gamma,
    "rayleigh": lambda request, place: (2 * _exponential(request, place)).sqrt(),
}

_SOURCE: ContextVar[Source] = ContextVar("pyro_nondiff_noise_source", default=_random)


def draw(request: Request) -> Tensor:
    """Draws the noise that a site asks for, from the source in force."""
    return _SOURCE.get()(request)


@contextmanager
def source(replacement: Source) -> Iterator[None]:
    """Replaces the source of all noise inside a ``with`` block.

    Arguments:
        replacement: A function from a :class:`Request` to noise of a shape that
            broadcasts with ``request.shape``.
    """
    token = _SOURCE.set(replacement)
    try:
        yield
    finally:
        _SOURCE.reset(token)
