"""Plain discrete laws of parameters that were looked into, with this library's errors."""

from typing import Any

import torch
from pyro.distributions import Bernoulli, OneHotCategorical
from torch import Tensor
from torch.distributions import Categorical, Distribution

from ..errors import NonDiffError


def validating(validate_args: bool | None) -> bool:
    """Whether a law validates: as it was told, else by torch's default."""
    default: bool = Distribution._validate_args
    return default if validate_args is None else validate_args


def make_bernoulli(
    owner: str, new: Any, probs: Any, logits: Any, validate_args: bool | None
) -> None:
    """Makes an empty instance a Bernoulli law.

    Arguments:
        owner: Whose parameters they are, for the message.
        new: The instance.
        probs: Probabilities of 1, or None.
        logits: Their logits, or None.
        validate_args: As in Pyro.

    Raises:
        NonDiffError: For parameters that are none.
    """
    name, given = _one_of(owner, probs, logits)
    if (tensor := _looked_into(given, validate_args)) is not None:
        if name == "logits":
            bad, what = ~tensor.isfinite(), "NaN or infinite. Keep them finite: clamp(-80, 80)."
        else:
            bad, what = ~((tensor >= 0) & (tensor <= 1)), "outside of [0, 1]."
        _refuse(owner, name, bad, what)
    Bernoulli.__init__(new, probs, logits, validate_args=False)
    new._validate_args = validating(validate_args)


def make_one_hot(owner: str, new: Any, probs: Any, logits: Any, validate_args: bool | None) -> None:
    """Makes an empty instance a one-hot categorical law, of an empty batch too.

    Torch refuses an empty batch, and half-precision probabilities that it has normalised itself.
    The arguments are those of :func:`make_bernoulli`.
    """
    name, given = _one_of(owner, probs, logits)
    if not isinstance(given, Tensor) or given.dim() < 1:
        raise NonDiffError(f"{owner}: {name} must be a tensor whose last dimension is categories.")
    if (tensor := _looked_into(given, validate_args)) is not None:
        if name == "logits":
            bad = tensor.isnan() | (tensor == torch.inf)
            what = "NaN or plus infinity. Minus infinity takes a category out."
            empty = (tensor == -torch.inf).all(-1)
        else:
            bad, what = ~((tensor >= 0) & tensor.isfinite()), "negative or not finite."
            empty = (tensor == 0).all(-1)
        _refuse(owner, name, bad, what)
        if tensor.shape[-1] == 0 or empty.any():
            raise NonDiffError(f"{owner}: {name} leaves some element no category at all.")
    new._categorical = Categorical(probs, logits, validate_args=False)
    shapes = given.shape[:-1], given.shape[-1:]
    Distribution.__init__(new, *shapes, validate_args=False)
    new._validate_args = validating(validate_args)


def bernoulli(owner: str, probs: Any, logits: Any, validate_args: bool | None) -> Any:
    """A Bernoulli law, see :func:`make_bernoulli`."""
    new = Bernoulli.__new__(Bernoulli)
    make_bernoulli(owner, new, probs, logits, validate_args)
    return new


def one_hot(owner: str, probs: Any, logits: Any, validate_args: bool | None) -> Any:
    """A one-hot categorical law, see :func:`make_one_hot`."""
    new = OneHotCategorical.__new__(OneHotCategorical)
    make_one_hot(owner, new, probs, logits, validate_args)
    return new


def _one_of(owner: str, probs: Any, logits: Any) -> tuple[str, Any]:
    if (probs is None) == (logits is None):
        found = "neither" if probs is None else "both"
        raise NonDiffError(f"{owner}: give one of probs and logits, found {found}.")
    return ("probs", probs) if logits is None else ("logits", logits)


def _looked_into(given: Any, validate_args: bool | None) -> Tensor | None:
    """The numbers, where there are any that may be waited for."""
    if not validating(validate_args) or (isinstance(given, Tensor) and given.is_meta):
        return None
    return torch.as_tensor(given)


def _refuse(owner: str, name: str, bad: Tensor, what: str) -> None:
    if bad.any():
        raise NonDiffError(f"{owner}: {int(bad.sum())} of {name} are {what}")
