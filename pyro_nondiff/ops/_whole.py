"""Functions of tensors that are seen from outside as one operation."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

__all__ = ["whole"]

P = ParamSpec("P")
R = TypeVar("R")


def whole(fn: Callable[P, R]) -> Callable[P, R]:
    """Makes a function one operation for a ``TorchFunctionMode``, as torch's own are.

    Soft worlds are watched for operations that are not continuous. An interpolation is made of
    such ones, ``floor`` among them, and is continuous as a whole.

    Arguments:
        fn: Its positional arguments are tensors, tuples of them, or anything else.
    """

    @wraps(fn)
    def seen(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = tuple(_tensors(args))
        if has_torch_function(tensors):
            answer: Any = handle_torch_function(seen, tensors, *args, **kwargs)
            result: R = answer
            return result
        return fn(*args, **kwargs)

    return seen


def _tensors(args: Any) -> Any:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, tuple):
            yield from _tensors(arg)
