"""Calls of what lies outside the program, as operations of a recorded graph.

A graph holds an operator with a number that stands for what is called. Nothing is called while the
step is recorded.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import has_side_effect
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ...errors import NonDiffError
from ...ops._outside import Asked, call_outside

_calls: WeakValueDictionary[int, "OutsideCall"] = WeakValueDictionary()
_numbers = count()

NAMESPACE = "pyro_nondiff"
"""Of the operator."""

TENSOR = object()
"""Stands for a tensor among the arguments of a call."""


@dataclass(eq=False)
class OutsideCall:
    """One call of an ``external`` op in a recorded step.

    Arguments:
        asked: What the op asks, with :data:`TENSOR` for each tensor.
        dtype: Of what it answered when the step ran.
        answer: What to answer in its place, if anything.
    """

    asked: Asked
    dtype: torch.dtype
    answer: Tensor | None = None

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """Calls it."""
        if self.answer is not None:
            return self.answer.clone()
        given = iter(tensors)
        rows = [next(given) if row is TENSOR else row for row in self.asked.rows]
        found = call_outside(self.asked._replace(rows=rows))
        if self.dtype.is_floating_point and not found.is_complex():
            found = found.to(self.dtype)  # a price may be a whole number once
        if found.dtype != self.dtype:
            raise NonDiffError(
                f"op '{self.asked.name}' returned {found.dtype}, and {self.dtype} when its step "
                "was recorded. Return numbers of one kind."
            )
        return found


class NoteOutside(TorchFunctionMode):
    """Notes what ``external`` ops call and answer, and the kind of numbers of each."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Callable[..., Any]] = []
        self.dtypes: dict[str, torch.dtype] = {}
        self.answers: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is call_outside:
            (asked,) = args
            self.functions.append(asked.fn)
            self.dtypes[asked.name] = found.dtype
            self.answers.append(found)
        return found


class RecordOutside(TorchFunctionMode):
    """Puts calls into the graph that is being recorded.

    Arguments:
        dtypes: What each op answered when the step ran.
    """

    def __init__(self, dtypes: Mapping[str, torch.dtype]) -> None:
        super().__init__()
        self.dtypes = dtypes
        self.calls: list[OutsideCall] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is call_outside:
            return self._record(*args)
        return func(*args, **(kwargs or {}))

    def _record(self, asked: Asked) -> Tensor:
        if asked.name not in self.dtypes:
            raise NonDiffError(f"op '{asked.name}' is met at some steps and not at others")
        if _holds_fake(asked.fn):
            raise NonDiffError(
                f"op '{asked.name}' calls a function that holds a tensor of the step. Give it as "
                "an argument of the op"
            )
        tensors = [row for row in asked.rows if isinstance(row, Tensor)]
        rest = [TENSOR if isinstance(row, Tensor) else row for row in asked.rows]
        call = OutsideCall(asked._replace(rows=rest), self.dtypes[asked.name])
        self.calls.append(call)
        number = next(_numbers)
        _calls[number] = call
        found: Tensor = operator()(tensors or [torch.empty(())], number)
        return found


def _holds_fake(fn: Any) -> bool:
    held: list[Any] = [*fn.args, *fn.keywords.values()] if isinstance(fn, partial) else []
    for cell in getattr(fn, "__closure__", None) or ():
        with suppress(ValueError):  # it is not assigned
            held.append(cell.cell_contents)
    return any(isinstance(thing, FakeTensor) for thing in tree_leaves(held))


@cache
def operator() -> Any:
    """The operator, which is made when the first such step is recorded."""
    name = f"{NAMESPACE}::outside"
    torch.library.define(name, "(Tensor[] rows, int call) -> Tensor")

    @torch.library.impl(name, "default")
    def outside(rows: list[Tensor], call: int) -> Tensor:
        known = _calls[call]
        return known(rows)

    def answer(rows: list[Tensor], call: int) -> Tensor:
        known = _calls[call]
        shape = (known.asked.size, *known.asked.shape)
        return rows[0].new_empty(shape, dtype=known.dtype)

    torch.library.register_fake(name, answer)

    found = getattr(torch.ops, NAMESPACE).outside.default
    has_side_effect(found)
    return found
