"""The signatures of a step: what a recording takes for granted."""

from collections import OrderedDict
from dataclasses import dataclass, field
from operator import is_
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .backends import Run
from .places import SIMPLE, Surroundings
from .recording import Met, Recording, has_hooks


class Call(NamedTuple):
    """What is known of the arguments of a call.

    Arguments:
        shapes: Their structure, with the shapes of tensors and the types of all else.
        values: What is no tensor.
        leaves: The tensors.
        unknown: The type of an argument that may hold anything, or None.
    """

    shapes: Any
    values: tuple[Any, ...]
    leaves: list[Tensor]
    unknown: str | None


def call_of(arguments: Any) -> Call:
    """Looks at the arguments of a call."""
    values: list[Any] = [torch.get_default_dtype(), torch.is_grad_enabled()]
    for device in ("cpu", "cuda"):
        values += torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    leaves: list[Tensor] = []
    unknown: list[str] = []

    def look(x: Any) -> Any:
        if isinstance(x, Tensor):
            leaves.append(x)
            return _kind(x)
        if type(x) in (dict, OrderedDict):
            return type(x), *((name, look(value)) for name, value in x.items())
        if type(x) in (tuple, list) or (isinstance(x, tuple) and hasattr(x, "_fields")):
            return type(x), *map(look, x)
        if isinstance(x, (*SIMPLE, nn.Module, FunctionType, MethodType)):
            values.append(x)
        else:
            unknown.append(type(x).__name__)
        return type(x)

    shapes = look(arguments)
    return Call(shapes, tuple(values), leaves, unknown[0] if unknown else None)


@dataclass
class Variant:
    """One signature: how its first call went, and the recording of the others.

    Arguments:
        values: What is no tensor among the arguments.
        around: What the program can reach.
        met: The parameters that its first call met.
        watched: What lay around it that is no tensor.
        last: The tensors that were in its places when they were last looked at.
        kinds: What it takes for granted of each of them.
        distinct: Which of them may be altered where they are.
        own_kinds: What it takes for granted of these.
        attempts: How often it was tried to record it.
        recording: The recording.
        run: What runs the recording.
    """

    values: tuple[Any, ...]
    around: Surroundings
    met: Met
    watched: list[Any] = field(init=False)
    last: list[Any] = field(init=False)
    kinds: list[Any] = field(init=False)
    distinct: list[int] = field(init=False)
    own_kinds: list[Any] = field(init=False)
    attempts: int = 0
    recording: Recording | None = None
    run: Run | None = None

    def __post_init__(self) -> None:
        self.watched = self.around.values()
        self.last = self.around.tensors()
        self.kinds = list(map(_kind, self.last))
        self.distinct = self.around.distinct()
        self.own_kinds = [self.kinds[i] for i in self.distinct]

    def changed(self, call: Call) -> str | None:
        """What differs between the variant and a call with arguments of its shapes, in words."""
        if call.values != self.values:
            pairs = zip(self.values, call.values, strict=True)
            return f"an argument, now {next(new for old, new in pairs if old != new)!r},"
        place = self.around.changed(self.watched)
        if place is not None and (isinstance(place.value, SIMPLE) or not self._follow()):
            return place.label
        now = self.around.tensors()
        if not all(map(is_, now, self.last)):
            if not all(isinstance(tensor, Tensor) for tensor in now):
                return "a tensor that is there no more"
            if _aliases(now) != _aliases(self.last):
                return "which of the tensors are the same"
            if list(map(_kind, now)) != self.kinds:
                return "a tensor's shape or kind"
        elif [_kind(now[i]) for i in self.distinct] != self.own_kinds:
            return "a tensor's shape or kind"  # it may be frozen where it is
        self.last = now
        return None

    def _follow(self) -> bool:
        """Turns to what has taken the place of things, if it is like them."""
        now = self.around.again()
        if not now.is_like(self.around, self.watched):
            return False
        self.around, self.watched = now, now.values()
        return True


def _kind(tensor: Tensor) -> Any:
    """What a recording takes for granted of a tensor."""
    dense = tensor.layout is torch.strided
    return (
        tensor.shape,
        tensor.stride() if dense else tensor.layout,
        tensor.dtype,
        tensor.device,
        tensor.requires_grad,
        has_hooks(tensor),
    )


def _aliases(tensors: list[Any]) -> list[int]:
    """For each tensor, where it is met first."""
    first: dict[int, int] = {}
    return [first.setdefault(id(tensor), i) for i, tensor in enumerate(tensors)]
