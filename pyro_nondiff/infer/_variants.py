"""Which recording serves a call: one for each signature, made on its second call."""

import logging
import time
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ..errors import NonDiffWarning
from ._backends import Backend, Run, runner
from ._places import SIMPLE, STORE, Surroundings
from ._reading import NotRead
from ._recording import CannotRecordError, Recording, Wanted, record

_log = logging.getLogger(__name__)
_PACKAGE = str(Path(__file__).parents[1])

MOST_VALUES = 8
MOST_SHAPES = 64


class Outcome(NamedTuple):
    """A loss, and the parameters that were met, with their gradients."""

    loss: Tensor
    parameters: list[Tensor]


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
    values: list[Any] = [torch.get_default_dtype(), torch.is_autocast_enabled()]
    leaves: list[Tensor] = []
    unknown: list[str] = []

    def look(x: Any) -> Any:
        if isinstance(x, Tensor):
            leaves.append(x)
            return x.shape, x.dtype, x.device, x.requires_grad
        if type(x) in (dict, OrderedDict):
            return type(x), *((name, look(value)) for name, value in x.items())
        if type(x) in (tuple, list) or (isinstance(x, tuple) and hasattr(x, "_fields")):
            return type(x), *map(look, x)
        if isinstance(x, SIMPLE + (nn.Module, FunctionType, MethodType, torch.Size, torch.device)):
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
        wanted: What its first call did.
        watched: The numbers that it could reach.
        last: The tensors that were in its places when they were last looked at.
        recording: The recording, and the function that runs it.
        failed: Whether it cannot be recorded.
    """

    values: tuple[Any, ...]
    around: Surroundings
    wanted: Wanted
    watched: tuple[Any, ...] = ()
    last: list[Tensor] = field(default_factory=list)
    recording: Recording | None = None
    run: Run | None = None
    failed: bool = False

    def __post_init__(self) -> None:
        self.watched = self.around.values()
        self.last = [place.holder[place.key] for place in self.around.places]

    def fits(self, call: Call) -> bool:
        """Whether the variant serves a call with arguments of its shapes."""
        if call.values != self.values or self.around.values() != self.watched:
            return False
        now = [place.holder.get(place.key) for place in self.around.places]
        if not all(map(_same, now, self.last)):
            if not all(isinstance(tensor, Tensor) for tensor in now) or _look(now) != _look(
                self.last
            ):
                return False
            self.last = now
        return True


def _same(a: Any, b: Any) -> bool:
    return a is b


def _look(tensors: list[Any]) -> list[Any]:
    """What a recording takes for granted of tensors: their kinds, and which are the same."""
    first: dict[int, int] = {}
    return [
        (t.shape, t.dtype, t.device, t.requires_grad, first.setdefault(id(t), i))
        for i, t in enumerate(tensors)
    ]


class Routine:
    """Something that is done over and over, recorded for each signature.

    Arguments:
        do: Takes positional and keyword arguments; returns a loss, as a number or a tensor, and
            may add gradients to parameters.
        programs: What it runs, to find what they can reach.
        backend: How recordings are run; ``"eager"`` makes none.
    """

    def __init__(self, do: Callable[..., Any], programs: list[Any], backend: Backend) -> None:
        self.do = do
        self.programs = programs
        self.backend = backend
        self.num_recordings = 0
        self._variants: dict[Any, list[Variant]] = {}
        self._warned: set[str] = set()

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outcome:
        """Does it, by a recording if there is one."""
        call = call_of((args, kwargs))
        if self.backend == "eager" or self._refused(call):
            return self._eager(args, kwargs)[0]
        variants = self._variants.get(call.shapes, [])
        for variant in variants:
            if variant.fits(call):
                if variant.recording is None and not variant.failed:
                    self._record(variant, (args, kwargs), call)
                if variant.recording is None:
                    return self._eager(args, kwargs)[0]
                return _replay(variant, call)
        if self._too_many(variants, call):
            return self._eager(args, kwargs)[0]
        outcome, wanted, modules = self._eager(args, kwargs)
        variant = Variant(call.values, Surroundings(self.programs, modules), wanted)
        self._variants.setdefault(call.shapes, []).insert(0, variant)
        return outcome

    def _eager(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Outcome, Wanted, list[nn.Module]]:
        modules: dict[nn.Module, None] = {}
        handle = register_module_forward_pre_hook(lambda module, _: modules.setdefault(module))
        gradients = {}
        for tensor in STORE.values():
            gradients[tensor], tensor.grad = tensor.grad, None
        try:
            with poutine.trace(param_only=True) as capture:
                loss = self.do(*args, **kwargs)
        finally:
            handle.remove()
            found = {tensor: tensor.grad for tensor in gradients}
            for tensor, before in gradients.items():
                if before is not None:
                    tensor.grad = before if tensor.grad is None else before + tensor.grad
        nodes = capture.trace.nodes
        met = {name: site["value"].unconstrained() for name, site in nodes.items()}
        trained = [name for name, p in met.items() if found.get(p, p.grad) is not None]
        loss = loss.detach() if isinstance(loss, Tensor) else torch.as_tensor(loss)
        return Outcome(loss, list(met.values())), Wanted(list(met), trained), list(modules)

    def _refused(self, call: Call) -> bool:
        if call.unknown is not None:
            self._warn(
                f"an argument is a {call.unknown}, which may change unseen: the step is not "
                "recorded. Give tensors, numbers, and lists, tuples and dictionaries of them."
            )
        elif am_i_wrapped():
            self._warn(
                "there are handlers around the step, which a recording would not ask: it is not "
                "recorded. Put them around model and guide."
            )
        else:
            return False
        return True

    def _too_many(self, variants: list[Variant], call: Call) -> bool:
        if len(variants) >= MOST_VALUES:
            self._warn(
                f"{_changed(variants[0], call)} has had more than {MOST_VALUES} values, and each "
                "needs a recording: new ones run eager. Make a tensor of it."
            )
        elif len(self._variants) >= MOST_SHAPES:
            self._warn(
                f"the arguments have had more than {MOST_SHAPES} combinations of shapes: new ones "
                "run eager. Give batches of few sizes."
            )
        else:
            return False
        return True

    def _record(self, variant: Variant, arguments: Any, call: Call) -> None:
        start = time.perf_counter()
        wanted = variant.wanted
        try:
            missing = [name for name in wanted.met if name not in STORE]
            if missing:
                raise CannotRecordError(f"parameters {missing} are not in the param store")
            recording = record(
                lambda given: self.do(*given[0], **given[1]),
                arguments,
                call.leaves,
                variant.around,
                wanted,
                NotRead,
            )
        except Exception as error:
            variant.failed = True
            self._warn(f"the step is not recorded, and runs eager: {_reason(error)}")
            return
        variant.recording = recording
        self.num_recordings += 1
        size = recording.num_operations
        _log.info("recorded %d operations in %.1f s", size, time.perf_counter() - start)
        example = _inputs(recording, call)
        try:
            variant.run = runner(recording.graph, example, self.backend, size)
        except Exception as error:
            self._warn(f"inductor cannot compile the step, so it is replayed: {_reason(error)}")
            variant.run = runner(recording.graph, example, "replay", size)

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, NonDiffWarning, stacklevel=2)


def _inputs(recording: Recording, call: Call) -> list[Tensor]:
    tensors = [place.holder[place.key] for place in recording.places]
    return [*tensors, *(call.leaves[i] for i in recording.leaves), *recording.others]


def _replay(variant: Variant, call: Call) -> Outcome:
    recording, run = variant.recording, variant.run
    if recording is None or run is None:
        raise TypeError("a variant is recorded before it is replayed")
    loss, *rest = run(_inputs(recording, call))
    trained = len(recording.trained)
    for name, gradient in zip(recording.trained, rest[:trained], strict=True):
        parameter = STORE[name]
        before = parameter.grad
        parameter.grad = gradient if before is None else before + gradient
    for place, tensor in zip(recording.assigned, rest[trained:], strict=True):
        place.holder[place.key] = tensor
    return Outcome(loss, [STORE[name] for name in variant.wanted.met])


def _changed(variant: Variant, call: Call) -> str:
    """What differs between a variant and a call, in words."""
    for old, new in zip(variant.values, call.values, strict=True):
        if old != new:
            return f"an argument, now {new!r},"
    for place, old, new in zip(
        variant.around.watched, variant.watched, variant.around.values(), strict=True
    ):
        if old != new:
            return place.label
    return "something that the program can reach"


def _reason(error: BaseException) -> str:
    """What went wrong, and the innermost line that is no library's."""
    innermost = error
    while innermost.__cause__ is not None:
        innermost = innermost.__cause__
    text = str(error).strip().split("\n")[0]
    if "DataDependent" in type(innermost).__name__ or "data-dependent" in str(innermost):
        text = "it reads the value of a tensor"
    frames = traceback.extract_tb(innermost.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename and _PACKAGE not in f.filename]
    if not own:
        return text
    return f"{text}, at line {own[-1].lineno} of {own[-1].name}(): {own[-1].line}"
