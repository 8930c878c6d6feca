"""The item that a choice stands for: one of them, or a weighted sum."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import NonDiffError


def mix_tensor(name: str, weights: Tensor, items: Tensor, event_dim: int, hard: bool) -> Tensor:
    """One of the items along a dimension of a tensor, or their sum by weights.

    Arguments:
        name: The op's name.
        weights: Shape ``batch + (K,)``.
        items: Shape ``batch + (K,) + event``.
        event_dim: The number of dimensions of ``event``.
        hard: Whether the weights are known to be one-hot. Then the value is an item exactly, and
            the sum is its gradient, if the weights have one.
    """
    place = items.dim() - event_dim - 1
    if place < 0 or items.shape[place] != weights.shape[-1]:
        raise NonDiffError(
            f"op '{name}': {weights.shape[-1]} scores choose along dimension {-1 - event_dim} of "
            f"items of shape {tuple(items.shape)}. Give items of shape batch + (K,) + event, with "
            "event_dim the number of dimensions of event."
        )
    if not hard:
        return _sum(weights, items, event_dim)
    if not weights.requires_grad:
        return _take(weights, items, event_dim)
    total = _sum(weights, items, event_dim)
    return _take(weights, items, event_dim).detach() + (total - total.detach())


def mix_list(
    name: str,
    weights: Tensor,
    items: Sequence[Tensor | Callable[[], Any]],
    event_dim: int,
    hard: bool,
) -> Any:
    """As :func:`mix_tensor`, from a list of tensors and functions, called if they are needed."""
    if len(items) != weights.shape[-1]:
        raise NonDiffError(
            f"op '{name}': {weights.shape[-1]} scores choose from {len(items)} items. Give one "
            "score for each item."
        )
    needed = _needed(weights)
    values = [_evaluate(items[k]) for k in needed]
    if len(needed) == 1 and weights.shape[:-1].numel() == 1:
        return values[0]
    kinds = sorted({type(value).__name__ for value in values})
    if not all(isinstance(value, Tensor) for value in values):
        raise NonDiffError(
            f"op '{name}': items of kinds {kinds} have to be mixed, and only tensors can be. "
            "Choose one of them alone: with no handler, or ignore() or randomize()."
        )
    shapes = [tuple(value.shape) for value in values]
    try:
        values = list(torch.broadcast_tensors(*values))
    except RuntimeError as error:
        raise NonDiffError(
            f"op '{name}': items of shapes {shapes} have to be mixed. Let them have one shape, or "
            "choose one of them alone: with no handler, or ignore() or randomize()."
        ) from error
    if values[0].dim() < event_dim:
        raise NonDiffError(
            f"op '{name}': event_dim is {event_dim}, and items have shapes {shapes}."
        )
    stacked = torch.stack(values, values[0].dim() - event_dim)
    return mix_tensor(name, weights[..., needed], stacked, event_dim, hard)


def _needed(weights: Tensor) -> list[int]:
    """The items with weight in some element of the batch; all, for a gradient to the weights."""
    if weights.requires_grad:
        return list(range(weights.shape[-1]))
    some = (weights != 0).reshape(-1, weights.shape[-1]).any(0)
    found: list[int] = some.nonzero().flatten().tolist()
    return found


def _evaluate(item: Tensor | Callable[[], Any]) -> Any:
    return item if isinstance(item, Tensor) else item()


def _take(weights: Tensor, items: Tensor, event_dim: int) -> Tensor:
    """The items by their places in a flat list: nothing is expanded, forward or backward."""
    place = items.dim() - event_dim - 1
    index = weights.argmax(-1)
    batch, count = items.shape[:place], items.shape[place]
    first = torch.arange(batch.numel(), device=items.device).reshape(batch) * count
    places = first + index
    taken = items.flatten(0, place).index_select(0, places.flatten())
    return taken.reshape(places.shape + items.shape[place + 1 :])


def _sum(weights: Tensor, items: Tensor, event_dim: int) -> Tensor:
    dtype = torch.promote_types(weights.dtype, items.dtype)
    weights, items = weights.to(dtype), items.to(dtype)
    if event_dim == 0:
        return (weights * items).sum(-1)
    place = items.dim() - event_dim - 1
    event = items.shape[place + 1 :]
    items = items.flatten(place + 1)
    if weights.dim() > 1 and place > 0 and items.shape[-3] == 1:
        total = weights @ items.squeeze(-3)  # rows that share their items are one product
    else:
        total = (weights.unsqueeze(-2) @ items).squeeze(-2)
    return total.reshape(*total.shape[:-1], *event)
