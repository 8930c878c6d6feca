"""Smoothing by randomness: an op becomes a sample site, and is run at its mode afterwards."""

from functools import singledispatch
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Bernoulli

from ..distributions import Law, Temperature, check_temperature, core, describe
from ..distributions.temperature import current
from ..errors import NonDiffError
from ..ops import Drawn, argmax, crop, paste, step, warp
from ..ops._op import Op, plain
from .base import AbstractChooser, AbstractHandler, Rule, Sites

__all__ = ["mode", "randomize"]


class randomize(AbstractHandler):
    r"""The op becomes a sample site of its name: stochastic activations, hard attention.

    ==========================  ===================================================
    op                          law
    ==========================  ===================================================
    ``argmax``, ``select``      ``OneHotCategorical(logits=scores / temperature)``
    ``step``                    ``Bernoulli(logits=x / temperature)``
    ``crop``, ``paste``         ``Normal(box, scale)``
    ``warp``                    ``Normal(theta, scale)``
    ==========================  ===================================================

    So every estimator of the library serves it, and ``pyro.poutine.condition``, ``do`` and
    ``replay`` mean what they mean for any site. The value is hard, unless the site's estimator has
    soft worlds, as REBAR has: a ``select`` then sums there.

    The place of a crop is drawn, and the crop at it stays hard: it has no gradient to the place.
    The Normal is therefore drawn without one, so that an objective takes its estimator for discrete
    sites, or the one that is chosen by name, such as LAX.

    The site belongs to the program that has the op. In a guide, it wants its prior in the model;
    in a model alone it adds no KL, see :doc:`/expected_cost`.

    Arguments:
        temperature: A number, a tensor that broadcasts with the batch shape, or a schedule.
        scale: The standard deviation of a place, in its own units: a number, or a tensor that
            broadcasts with the box or ``theta``. Where a tensor of a place's own shape is 0, the
            number stays as it is, and the site has the others only, as a vector:
            ``torch.tensor([0.1, 0.1, 0.0, 0.0])`` moves a box of fixed size.
        sites: As for :class:`AbstractHandler`.

    Raises:
        NonDiffError: For a temperature or a scale that is not positive, or a scale with zeros that
            has not the shape of the place.

    Example:
        >>> from pyro_nondiff.handlers import randomize
        >>> from pyro_nondiff.ops import argmax
        >>> with randomize(temperature=0.5), pyro.poutine.trace() as recorded:
        ...     z = argmax("z", torch.tensor([0.0, 1.0]))
        >>> recorded.trace.nodes["z"]["fn"].probs
        tensor([0.1192, 0.8808])

    References:
        | Recurrent Models of Visual Attention (Mnih et al., 2014)
        | https://arxiv.org/abs/1406.6247
    """

    def __init__(
        self,
        temperature: Temperature = 1.0,
        *,
        scale: float | Tensor = 0.1,
        sites: Sites = None,
    ) -> None:
        check_temperature("randomize", temperature, validate=True)
        if isinstance(scale, float | int) and not scale > 0:
            raise NonDiffError(f"randomize: scale must be positive, found {scale}.")
        super().__init__(sites)
        self.temperature = temperature
        self.scale = scale
        self.moving = _moving(scale)


def _moving(scale: float | Tensor) -> Tensor | None:
    """Which numbers of a place are drawn, as indices of the flattened place; None for all."""
    if not isinstance(scale, Tensor) or bool((scale > 0).all()):
        return None
    if bool((scale < 0).any()) or not bool((scale > 0).any()):
        raise NonDiffError(f"randomize: scale must be positive somewhere, found {scale}.")
    return scale.flatten().nonzero()[:, 0]


@randomize.rule(argmax)
def _(handler: randomize, name: str, scores: Tensor, *, event_dim: int = 1) -> Drawn:
    logits = scores / current(handler.temperature, 1)
    return Drawn(dist.OneHotCategorical(logits=logits).to_event(event_dim - 1))


@randomize.rule(step)
def _(handler: randomize, name: str, x: Tensor, *, event_dim: int = 0) -> Drawn:
    logits = x / current(handler.temperature)
    return Drawn(dist.Bernoulli(logits=logits).to_event(event_dim))


class _HardNormal(dist.Normal):
    """Drawn without gradient: the hard op would swallow it in silence.

    A class, since ``has_rsample_(False)`` is lost when a plate expands the law.
    """

    has_rsample = False


def _of_the_place(
    handler: randomize, name: str, place: Tensor, event_dim: int
) -> tuple[Tensor, Tensor]:
    """Which numbers of a place move, and how far."""
    moving, scale = handler.moving, handler.scale
    if moving is None or not isinstance(scale, Tensor) or scale.shape != place.shape[-event_dim:]:
        raise NonDiffError(
            f"randomize: a scale with zeros must have the shape {tuple(place.shape[-event_dim:])} "
            f"of the place of op '{name}', found {scale}."
        )
    moving = moving.to(place.device)
    return moving, scale.to(place.device).flatten()[moving]


def _at_a_random_place(op: Op, event_dim: int) -> Rule:
    """The rule of an op that has a place: it is drawn, and the op does its hard thing there."""

    def rule(
        handler: randomize, name: str, image: Tensor, place: Tensor, size: tuple[int, int]
    ) -> Drawn:
        if handler.moving is None:
            law: Any = _HardNormal(place, handler.scale)
            return Drawn(
                law.to_event(event_dim), then=lambda drawn: plain(op)(name, image, drawn, size)
            )
        moving, scale = _of_the_place(handler, name, place, event_dim)
        flat = place.flatten(-event_dim)
        law = _HardNormal(flat[..., moving], scale)

        def look(drawn: Tensor) -> Tensor:
            whole = flat.expand(torch.broadcast_shapes((*drawn.shape[:-1], 1), flat.shape))
            moved = whole.index_copy(-1, moving, drawn.to(flat.dtype))
            cut: Tensor = plain(op)(
                name, image, moved.unflatten(-1, place.shape[-event_dim:]), size
            )
            return cut

        return Drawn(law.to_event(1), then=look)

    return rule


randomize.rule(crop)(_at_a_random_place(crop, 1))
randomize.rule(paste)(_at_a_random_place(paste, 1))
randomize.rule(warp)(_at_a_random_place(warp, 2))


class mode(AbstractChooser):
    """A random site takes its most probable value: evaluation, and greedy decoding.

    It serves the program's own sample sites and those that :class:`randomize` makes, in either
    order of nesting. Observed sites, and ops that are no sites, stay as they are. A Bernoulli of
    even odds is 1, as ``step(0)`` is; of equal probabilities the first one counts.

    Arguments:
        sites: The sample sites that it is for: names, a predicate on names, or None for all.

    Raises:
        NonDiffError: For a site whose law has no known mode; at the end of a program that did not
            meet one of the names.

    Example:
        >>> from pyro_nondiff.handlers import mode, randomize
        >>> from pyro_nondiff.ops import step
        >>> with mode(), randomize():
        ...     step("h", torch.tensor([-0.1, 0.1])), pyro.sample("x", dist.Normal(3.0, 1.0))
        (tensor([0., 1.]), tensor(3.))
    """

    def __init__(self, *, sites: Sites = None) -> None:
        super().__init__(sites)

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg) and self.gives(msg):
            msg["value"], msg["done"] = most_probable(msg["name"], msg["fn"]), True


def most_probable(name: str, law: Law) -> Tensor:
    """The mode of a law, under its wrappers.

    Arguments:
        name: The site's name.
        law: Its law.

    Raises:
        NonDiffError: If there is none.
    """
    try:
        found = _mode(core(law))
    except NotImplementedError:
        found = None
    if found is None or found.isnan().any():
        raise NonDiffError(
            f"mode: site '{name}' has law {describe(law)}, which has no mode to take. Name the "
            "sites that have one: mode(sites=...)."
        )
    return found.expand(law.batch_shape + law.event_shape)


@singledispatch
def _mode(law: Law) -> Tensor | None:
    found: Tensor | None = getattr(law, "mode", None)
    return found


@_mode.register
def _(law: Bernoulli) -> Tensor:
    even: Tensor = law.logits >= 0  # torch's mode of even odds is NaN
    return even.to(law.logits.dtype)


@_mode.register
def _(law: dist.Delta) -> Tensor:
    value: Tensor = law.v
    return value
