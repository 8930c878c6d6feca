"""Modules that want one batch dimension, made to broadcast over any number of them."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import NonDiffError

__all__ = ["batchify"]

Dims = int | Sequence[int]


def batchify(
    module: nn.Module, event_dim: Dims, *, in_dims: Dims = 0, out_dims: Dims = 0
) -> nn.Module:
    r"""A module that takes any number of batch dimensions, from one that takes exactly one.

    .. math:: f(x)_{b_1 \dots b_m} = \mathrm{module}(\mathrm{flat}(x))_{b_1 \dots b_m}

    ``Conv2d``, ``BatchNorm2d`` or ``GRU`` refuse a second batch dimension, or take it for something
    else. In a program there are some: of plates, of particles, and of the worlds of an estimator at
    the left of all. They become one for the module, and its results get them back.

    The module has to treat the rows of a batch alone. A ``BatchNorm`` in training does not: it is
    right before the first draw, where all worlds share one row, and wrong after it. The check of
    worlds then refuses to vectorise the program.

    Arguments:
        module: The module. Its parameters are those of the result, under ``module``.
        event_dim: How many dimensions of an argument, from the right, are not batch: 3 for an image
            ``(C, H, W)``. One number for all positional arguments, or one for each. Arguments that
            are no tensors, and those given by keyword, are passed on.
        in_dims: Where the module wants the batch dimension of an argument, alike: 1 for the state
            of a ``GRU``. For the caller batch dimensions come first all the same.
        out_dims: Where the batch dimension of each returned tensor is, alike.

    Shapes:
        Each argument has shape ``batch + event``; batch shapes broadcast. Each returned tensor has
        the broadcast batch shape, and then what the module returns without its batch dimension.

    Raises:
        NonDiffError: For an argument with fewer dimensions than its event, for batch shapes that do
            not broadcast, for one number too few or too many, and for a returned tensor that does
            not have the batch's size where ``out_dims`` says.

    Example:
        >>> from pyro_nondiff.nn import batchify
        >>> encode = batchify(torch.nn.Conv2d(1, 8, 3, stride=2), event_dim=3)
        >>> encode(torch.zeros(5, 4, 1, 9, 9)).shape  # 5 worlds of 4 images
        torch.Size([5, 4, 8, 4, 4])
        >>> gru = torch.nn.GRU(3, 6, batch_first=True)
        >>> read = batchify(gru, event_dim=(2, 2), in_dims=(0, 1), out_dims=(0, 1))
        >>> states, last = read(torch.zeros(5, 4, 7, 3), torch.zeros(4, 1, 6))
        >>> states.shape, last.shape
        (torch.Size([5, 4, 7, 6]), torch.Size([5, 4, 1, 6]))
    """
    return _Batchified(module, event_dim, in_dims, out_dims)


class _Batchified(nn.Module):
    """A module between a reshape of what it takes and one of what it returns."""

    def __init__(self, module: nn.Module, event_dim: Dims, in_dims: Dims, out_dims: Dims) -> None:
        super().__init__()
        self.module = module
        self.event_dim, self.in_dims, self.out_dims = event_dim, in_dims, out_dims

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        event_dims = self._each("event_dim", self.event_dim, len(args), "arguments")
        in_dims = self._each("in_dims", self.in_dims, len(args), "arguments")
        batch = self._batch(args, event_dims)
        flat = [
            _flatten(arg, batch, event_dim).movedim(0, in_dim) if isinstance(arg, Tensor) else arg
            for arg, event_dim, in_dim in zip(args, event_dims, in_dims, strict=True)
        ]
        leaves, tree = tree_flatten(self.module(*flat, **kwargs))
        out_dims = self._each("out_dims", self.out_dims, len(leaves), "returned tensors")
        pairs = zip(leaves, out_dims, strict=True)
        return tree_unflatten([self._unflatten(leaf, dim, batch) for leaf, dim in pairs], tree)

    def extra_repr(self) -> str:
        return f"event_dim={self.event_dim}, in_dims={self.in_dims}, out_dims={self.out_dims}"

    def _each(self, name: str, dims: Dims, count: int, what: str) -> Sequence[int]:
        if isinstance(dims, int):
            return [dims] * count
        if len(dims) != count:
            raise self._error(f"{name} has {len(dims)} numbers, found {count} {what}")
        return dims

    def _batch(self, args: Sequence[Any], event_dims: Sequence[int]) -> torch.Size:
        shapes = []
        for arg, event_dim in zip(args, event_dims, strict=True):
            if not isinstance(arg, Tensor):
                continue
            if arg.dim() < event_dim:
                found = f"an argument of shape {tuple(arg.shape)}"
                raise self._error(f"event_dim is {event_dim}, found {found}")
            shapes.append(arg.shape[: arg.dim() - event_dim])
        try:
            return torch.Size(torch.broadcast_shapes(*shapes))
        except RuntimeError as error:
            found = " and ".join(str(tuple(shape)) for shape in shapes)
            raise self._error(f"batch shapes do not broadcast, found {found}") from error

    def _unflatten(self, leaf: Any, dim: int, batch: torch.Size) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if not -leaf.dim() <= dim < leaf.dim() or leaf.shape[dim] != prod(batch):
            wanted = f"out_dims says that dimension {dim} of a returned tensor is the batch's"
            found = f"a tensor of shape {tuple(leaf.shape)} for {prod(batch)} rows"
            raise self._error(f"{wanted}, found {found}")
        first = leaf.movedim(dim, 0)
        return first.reshape(*batch, *first.shape[1:])

    def _error(self, fault: str) -> NonDiffError:
        return NonDiffError(f"batchify({type(self.module).__name__}): {fault}.")


def _flatten(arg: Tensor, batch: torch.Size, event_dim: int) -> Tensor:
    event = arg.shape[arg.dim() - event_dim :]
    return arg.expand(*batch, *event).reshape(prod(batch), *event)
