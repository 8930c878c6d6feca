"""What lies outside the program: functions that are no maths of tensors, and costs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro.poutine import block
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..errors import NonDiffError
from ._op import op

__all__ = ["cost", "external"]


@op
def external(
    name: str,
    fn: Callable[..., Any],
    *args: Any,
    event_dim: int | Sequence[int] = 0,
    shape: Sequence[int] = (),
    batched: bool = False,
) -> Tensor:
    """The answer of anything: NumPy, a program, a simulator, a person.

    It has no gradient. ``fn`` is called on detached tensors, once for each element of the batch, so
    that it need not know of plates and worlds. Sites and ops inside it are no part of the program.

    Arguments:
        name: The op's name, unique in the program.
        fn: What is called. What it returns is copied.
        *args: Its arguments. Tensors have shape ``batch + event``, and their batch shapes are
            broadcast; all else is passed as it is.
        event_dim: How many dimensions at the right of each tensor belong to one call: a number, or
            one for each argument.
        shape: The shape of what one call returns.
        batched: Whether ``fn`` takes a batch: then it is called once, with tensors of shape
            ``(N,) + event``, and returns shape ``(N,) + shape``.

    Returns:
        Shape ``batch + shape``, on the device of the first tensor; floats are of the dtype of the
        first tensor of floats.

    Raises:
        NonDiffError: If ``fn`` raises, or returns what is no number, not finite, or of another
            shape.

    Example:
        >>> import numpy as np
        >>> from pyro_nondiff.ops import external
        >>> def rank(x):
        ...     return np.argsort(np.argsort(x.numpy()))
        >>> x = torch.tensor([[0.3, 0.1, 0.2], [1.0, 2.0, 3.0]])
        >>> external("rank", rank, x, event_dim=1, shape=(3,))
        tensor([[2, 0, 1],
                [0, 1, 2]])
        >>> external("length", len, x[0], event_dim=1)
        tensor(3)
    """
    rows, batch = _rows(name, args, event_dim)
    asked = Asked(name, fn, rows, batch.numel(), tuple(shape), batched)
    return call_outside(asked).reshape(batch + asked.shape)


class Asked(NamedTuple):
    """What an op asks of what lies outside.

    Arguments:
        name: The op's name.
        fn: What is called.
        rows: Its arguments; tensors have one batch dimension.
        size: The size of the batch.
        shape: The shape of what one call returns.
        batched: Whether it is called once for all.
    """

    name: str
    fn: Callable[..., Any]
    rows: Sequence[Any]
    size: int
    shape: tuple[int, ...]
    batched: bool


def call_outside(asked: Asked) -> Tensor:
    """All calls of an op, with what they answer put together.

    As one call it is seen by a ``TorchFunctionMode``.
    """
    name, fn, rows, size, shape, batched = asked
    tensors = tuple(x for x in rows if isinstance(x, Tensor))
    if has_torch_function(tensors):
        seen: Tensor = handle_torch_function(call_outside, tensors, asked)
        return seen
    floats = (x for x in tensors if x.is_floating_point())
    dtype = next(floats, torch.empty(())).dtype
    with torch.no_grad(), block():
        if batched:
            found = _answer(name, fn, rows)
            _check_shape(name, found, (size, *shape))
        else:
            answers = []
            for n in range(size):
                one = [x[n] if isinstance(x, Tensor) else x for x in rows]
                answers.append(_answer(name, fn, one))
                _check_shape(name, answers[-1], shape)
            found = torch.stack(answers) if answers else torch.empty(0, *shape)
    _check_finite(name, found)
    if found.is_floating_point():
        found = found.to(dtype)
    return found.to(tensors[0].device) if tensors else found


def cost(name: str, value: Tensor | np.ndarray | float) -> None:
    """Adds a cost to what is minimised.

    In an ELBO, this library's or Pyro's, it is ``pyro.factor(name, -value)``. A value that is no
    tensor has no gradient, and needs none: it reaches the parameters through the sample sites and
    ops that it depends on.

    Arguments:
        name: Its name, unique in the program.
        value: A cost for each element of the plates that it is in.

    Raises:
        NonDiffError: If a value that is no tensor is not finite or no number.

    Example:
        >>> from pyro_nondiff.ops import cost
        >>> def program():
        ...     cost("price", 3.0)
        >>> pyro.poutine.trace(program).get_trace().log_prob_sum()
        tensor(-3.)
    """
    if not isinstance(value, Tensor):
        value = _as_tensor(f"cost '{name}'", "it", value).to(torch.get_default_dtype())
        _check_finite(name, value)
    if am_i_wrapped():
        pyro.factor(name, -value)


def _rows(
    name: str, args: Sequence[Any], event_dim: int | Sequence[int]
) -> tuple[list[Any], torch.Size]:
    """The arguments with their batch as one dimension, detached, and the shape of the batch."""
    dims = [event_dim] * len(args) if isinstance(event_dim, int) else list(event_dim)
    if len(dims) != len(args):
        raise NonDiffError(
            f"op '{name}': event_dim has {len(dims)} entries for {len(args)} arguments. Give a "
            "number, or one for each argument."
        )
    batches, events = [], []
    for arg, dim in zip(args, dims, strict=True):
        place = arg.dim() - dim if isinstance(arg, Tensor) else 0
        if place < 0:
            raise NonDiffError(
                f"op '{name}': event_dim is {dim}, but an argument has shape {tuple(arg.shape)}."
            )
        shape = arg.shape if isinstance(arg, Tensor) else torch.Size()
        batches.append(shape[:place])
        events.append(shape[place:])
    batch = torch.broadcast_shapes(*batches)
    rows = [
        arg.detach().expand(batch + event).reshape(batch.numel(), *event)
        if isinstance(arg, Tensor)
        else arg
        for arg, event in zip(args, events, strict=True)
    ]
    return rows, batch


def _answer(name: str, fn: Callable[..., Any], args: Sequence[Any]) -> Tensor:
    called = getattr(fn, "__name__", repr(fn))
    try:
        found = fn(*args)
    except Exception as error:
        raise NonDiffError(
            f"op '{name}': {called} raised {type(error).__name__}: {error}"
        ) from error
    return _as_tensor(f"op '{name}'", called, found)


def _as_tensor(where: str, called: str, found: Any) -> Tensor:
    """A copy of numbers as a tensor: what they came from may be written to again."""
    try:
        return torch.as_tensor(found).detach().clone()
    except (RuntimeError, TypeError, ValueError) as error:
        raise NonDiffError(
            f"{where}: {called} gave {type(found).__name__}, which is no tensor: {error}. Give "
            "numbers, or arrays of them."
        ) from error


def _check_shape(name: str, found: Tensor, shape: tuple[int, ...]) -> None:
    if found.shape != shape:
        raise NonDiffError(
            f"op '{name}' returned shape {tuple(found.shape)} where {shape} was expected. Say what "
            "one call returns with shape=, what it takes with event_dim=, and with batched=True "
            "that it takes a batch."
        )


def _check_finite(name: str, found: Tensor) -> None:
    if not (finite := found.isfinite()).all():
        worst = found[~finite].flatten()[0].item()
        raise NonDiffError(
            f"op '{name}' returned {worst}, at {int((~finite).sum())} of {found.numel()} places. "
            "Return finite numbers: clip them, or make a failure a large cost."
        )
