"""Smoothing by a softmax: soft attention."""

from torch import Tensor

from ..distributions import Temperature, check_temperature
from ..distributions.temperature import current
from ..ops import argmax, step
from .base import AbstractHandler, Sites

__all__ = ["soften"]


class soften(AbstractHandler):
    """A softmax or a logistic function in place of the hard value."""

    def __init__(self, temperature: Temperature = 1.0, *, sites: Sites = None) -> None:
        check_temperature("soften", temperature, validate=True)
        super().__init__(sites)
        self.temperature = temperature


@soften.rule(argmax)
def _softmax(handler: soften, name: str, scores: Tensor, event_dim: int = 1) -> Tensor:
    return (scores / current(handler.temperature, 1)).softmax(-1)


@soften.rule(step)
def _sigmoid(handler: soften, name: str, x: Tensor, event_dim: int = 0) -> Tensor:
    return (x / current(handler.temperature)).sigmoid()
