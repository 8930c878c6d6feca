"""Smoothing by a softmax: soft attention."""

from typing import Any

from torch import Tensor

from ..distributions import Temperature, check_temperature
from ..distributions.temperature import current
from ..ops import argmax, step
from .base import AbstractHandler, Sites

__all__ = ["soften"]


class soften(AbstractHandler):
    r"""A softmax or a logistic function in place of the hard value: soft attention.

    ==========  =======================================================
    op          value
    ==========  =======================================================
    ``argmax``  :math:`\mathrm{softmax}(s / T)`
    ``select``  :math:`\sum_k \mathrm{softmax}(s / T)_k v_k`, of all items
    ``step``    :math:`\sigma(x / T)`
    ==========  =======================================================

    The value is not the one that the program has without handler, but near to it at a low
    temperature: train under an annealed one, and compare with the hard program at the end.

    Arguments:
        temperature: :math:`T`: a number, a tensor that broadcasts with the batch shape, or a
            schedule.
        sites: As for :class:`AbstractHandler`. For an op that is neither, such as ``external``,
            there is :class:`perturb`.

    Raises:
        NonDiffError: For a temperature that is not positive.

    Example:
        >>> from pyro_nondiff.handlers import soften
        >>> from pyro_nondiff.ops import step
        >>> with soften(temperature=0.5):
        ...     step("h", torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0.1192, 0.5000, 0.8808])

    References:
        | Neural Machine Translation by Jointly Learning to Align and Translate
          (Bahdanau et al., 2015)
        | https://arxiv.org/abs/1409.0473
    """

    def __init__(self, temperature: Temperature = 1.0, *, sites: Sites = None) -> None:
        check_temperature("soften", temperature, validate=True)
        super().__init__(sites)
        self.temperature = temperature


@soften.rule(argmax)
def _(handler: soften, name: str, scores: Tensor, **options: Any) -> Tensor:
    return (scores / current(handler.temperature, 1)).softmax(-1)


@soften.rule(step)
def _(handler: soften, name: str, x: Tensor, **options: Any) -> Tensor:
    return (x / current(handler.temperature)).sigmoid()
