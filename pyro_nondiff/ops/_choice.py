"""Choices: the largest of some scores, the item that it stands for, and a threshold."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import NonDiffError
from ._mix import mix_list, mix_tensor
from ._op import decide, op

__all__ = ["argmax", "select", "step"]


@op
def argmax(name: str, scores: Tensor, *, event_dim: int = 1) -> Tensor:
    r"""The one-hot vector of the largest score.

    .. math:: z_k = [k = \mathrm{argmax}_j \, s_j]

    It has no gradient. Of equal scores the first one counts.

    Arguments:
        name: The op's name, unique in the program.
        scores: Shape ``(..., K)``.
        event_dim: How many dimensions at the right are one event, if a handler makes the op a
            sample site: the choice itself, and those at its left that no plate declares.

    Returns:
        Shape ``(..., K)``, of the dtype of ``scores``.

    Raises:
        NonDiffError: If there is no dimension to choose along.

    Example:
        >>> from pyro_nondiff.ops import argmax
        >>> argmax("z", torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 3.0]]))
        tensor([[0., 1., 0.],
                [1., 0., 0.]])
    """
    if scores.dim() == 0 or scores.shape[-1] == 0:
        raise NonDiffError(
            f"op '{name}': argmax chooses along the last dimension, and scores have shape "
            f"{tuple(scores.shape)}. Give at least one score."
        )
    index = scores.argmax(-1, keepdim=True)
    return torch.zeros_like(scores).scatter(-1, index, 1)


def select(
    name: str,
    scores: Tensor,
    items: Tensor | Sequence[Tensor | Callable[[], Any]],
    *,
    event_dim: int = 0,
) -> Any:
    r"""The item with the largest score: hard attention.

    .. math:: v = \sum_k z_k v_k, \qquad z = \mathrm{argmax}(s)

    The choice :math:`z` is the op :func:`argmax` of the same name, and handlers answer for that: a
    soft choice makes the sum above, a hard one without gradient takes the chosen item alone. Then
    of a list of functions only the chosen one is *called*, and what they return may be of
    different kinds. The gradient goes to the chosen item, and to the scores if the choice has one.

    Arguments:
        name: The op's name, unique in the program.
        scores: Shape ``batch + (K,)``. If they have no batch, or one of size 1, a hard choice from
            a list returns the item as it is.
        items: A tensor of shape ``batch + (K,) + event``; or a list of ``K`` tensors of shape
            ``batch + event`` or functions without arguments. With a list the choice is waited for,
            so a step that has one cannot be captured; a batch evaluates all items that it chooses.
        event_dim: The number of dimensions of ``event``.

    Returns:
        For tensors, shape ``batch + event``.

    Raises:
        NonDiffError: If there are not as many items as scores; for items of different kinds or
            shapes that have to be mixed.

    Example:
        >>> from pyro_nondiff.handlers import soften
        >>> from pyro_nondiff.ops import select
        >>> scores = torch.tensor([0.0, 0.0, 1.0])
        >>> select("v", scores, torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), event_dim=1)
        tensor([5., 6.])
        >>> select("w", scores, [lambda: 1 / 0, lambda: 1 / 0, lambda: "only this one"])
        'only this one'
        >>> with soften(temperature=0.5):
        ...     select("v", scores, torch.tensor([1.0, 3.0, 5.0]))
        tensor(4.3610)

    References:
        | Show, Attend and Tell: Neural Image Caption Generation with Visual Attention
          (Xu et al., 2015)
        | https://arxiv.org/abs/1502.03044
    """
    weights, hard = decide(argmax, name, scores)
    if isinstance(items, Tensor):
        return mix_tensor(name, weights, items, event_dim, hard)
    return mix_list(name, weights, items, event_dim, hard)


@op
def step(name: str, x: Tensor, *, event_dim: int = 0) -> Tensor:
    """0 where ``x`` is negative, else 1: a threshold unit.

    It has no gradient.

    Arguments:
        name: The op's name, unique in the program.
        x: Of any shape.
        event_dim: How many dimensions at the right are one event, if a handler makes the op a
            sample site: those that no plate declares.

    Returns:
        Of the shape and dtype of ``x``.

    Example:
        >>> from pyro_nondiff.ops import step
        >>> step("h", torch.tensor([-0.1, 0.0, 3.0]))
        tensor([0., 1., 1.])

    References:
        | Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation
          (Bengio et al., 2013)
        | https://arxiv.org/abs/1308.3432
    """
    return (x < 0).logical_not().to(x.dtype)
