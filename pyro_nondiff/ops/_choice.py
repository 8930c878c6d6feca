"""Choices: the largest of some scores, the item that it stands for, and a threshold."""

import torch
from torch import Tensor

from ._op import op

__all__ = ["argmax", "step"]


@op
def argmax(name: str, scores: Tensor, *, event_dim: int = 1) -> Tensor:
    """The one-hot vector of the largest score, without gradient."""
    index = scores.argmax(-1, keepdim=True)
    return torch.zeros_like(scores).scatter(-1, index, 1).detach()


@op
def step(name: str, x: Tensor, *, event_dim: int = 0) -> Tensor:
    """0 where ``x`` is negative, else 1, without gradient."""
    return (x >= 0).to(x.dtype)
