"""Does something over and over: each signature is recorded on its second call."""

import logging
import time
import warnings
from collections.abc import Callable, MutableMapping, Sequence
from traceback import extract_tb
from typing import Any, NamedTuple, cast

import torch
from pyro import poutine
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ...errors import NonDiffWarning
from ..lines import own_line
from .agreement import agree, run_beside
from .backends import Backend, Run, runner
from .holders import STORE
from .outside import NoteOutside
from .places import Surroundings
from .recording import CannotRecordError, Met, Recording, record
from .variants import Call, Variant, call_of

_log = logging.getLogger(__name__)

ATTEMPTS = 2
"""How often it is tried to record a signature: some steps settle on their second run."""

MOST_VALUES = 8
"""How many recordings are kept for arguments of the same shapes."""

MOST_SHAPES = 64
"""How many combinations of shapes are recorded."""


class Outcome(NamedTuple):
    """A loss, and the parameters that were met, with their gradients."""

    loss: Tensor
    parameters: list[Tensor]


class Eager(NamedTuple):
    """What is known of a call that ran as it is.

    Arguments:
        outcome: What came of it.
        met: The parameters that it met.
        modules: The modules that ran.
        outside: What it called outside the program.
    """

    outcome: Outcome
    met: Met
    modules: list[nn.Module]
    outside: NoteOutside


class Routine:
    """Something that is done over and over, recorded for each signature.

    Arguments:
        name: What to call it in a message.
        do: Takes positional and keyword arguments; returns a loss, as a number or a tensor, and
            may add gradients to parameters.
        programs: What it runs, to find what they can reach.
        backend: How recordings are run; ``"eager"`` makes none.
    """

    def __init__(
        self, name: str, do: Callable[..., Any], programs: list[Any], backend: Backend
    ) -> None:
        self.name = name
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
            return self._eager(args, kwargs).outcome
        variants = self._variants.setdefault(call.shapes, [])
        changed = None
        for variant in variants:
            changed = variant.changed(call)
            if changed is None:
                if variant.recording is None and variant.attempts < ATTEMPTS:
                    return self._record(variant, (args, kwargs), call)
                if variant.recording is None:
                    return self._eager(args, kwargs).outcome
                return _replay(variant, call)
        if self._too_many(variants, changed):
            return self._eager(args, kwargs).outcome
        eager = self._eager(args, kwargs)
        programs = [*self.programs, *call.values]
        around = Surroundings(programs, eager.modules, eager.outside.functions)
        variants.insert(0, Variant(call.values, around, eager.met))
        return eager.outcome

    def _eager(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Eager:
        """Does it as it is."""
        modules: dict[nn.Module, None] = {}
        handle = register_module_forward_pre_hook(lambda module, _: modules.setdefault(module))
        earlier = {tensor: tensor.grad for tensor in STORE.values()}
        for tensor in earlier:
            tensor.grad = None  # so that it shows which get one
        try:
            with NoteOutside() as outside, poutine.trace(param_only=True) as capture:
                loss = self.do(*args, **kwargs)
            sites = capture.trace.nodes.items()
            values = {name: cast(Any, site["value"]) for name, site in sites}
            met = {name: value.unconstrained() for name, value in values.items()}
            trained = [name for name, parameter in met.items() if parameter.grad is not None]
        finally:
            handle.remove()
            for tensor, gradient in earlier.items():
                _add_gradient(tensor, gradient)
        loss = loss.detach() if isinstance(loss, Tensor) else torch.as_tensor(loss)
        outcome = Outcome(loss, list(dict.fromkeys(met.values())))  # one may have two names
        return Eager(outcome, Met(list(met), trained, outside.dtypes), list(modules), outside)

    def _refused(self, call: Call) -> bool:
        if call.unknown is not None:
            self._warn(
                f"an argument is a {call.unknown}, which may change unseen: {self.name} is not "
                "recorded. Give tensors, numbers, and lists, tuples and dictionaries of them."
            )
        elif any(tensor.requires_grad for tensor in call.leaves):
            self._warn(
                "an argument requires a gradient, which a recording would not give it: "
                f"{self.name} is not recorded. Detach it, or compute it in the program."
            )
        elif am_i_wrapped():
            self._warn(
                f"there are handlers around {self.name}, which a recording would not ask: it is "
                "not recorded. Put them around model and guide."
            )
        else:
            return False
        return True

    def _too_many(self, variants: list[Variant], changed: str | None) -> bool:
        if len(variants) >= MOST_VALUES:
            self._warn(
                f"{changed} has had more than {MOST_VALUES} values, and each needs a recording: "
                "steps with new ones run eager. Make a tensor of it."
            )
        elif len(self._variants) > MOST_SHAPES:
            self._warn(
                f"the arguments have had more than {MOST_SHAPES} combinations of shapes: new ones "
                "run eager. Give batches of few sizes."
            )
        else:
            return False
        return True

    def _record(self, variant: Variant, arguments: Any, call: Call) -> Outcome:
        """Takes the step as it is, and records it if it can be."""
        start = time.perf_counter()
        variant.attempts += 1
        try:
            if missing := [name for name in variant.met.names if name not in STORE]:
                raise CannotRecordError(f"parameters {missing} are not in the param store")
            recording = record(
                lambda given: self.do(*given[0], **given[1]),
                arguments,
                call.leaves,
                variant.around,
                variant.met,
            )
        except Exception as error:
            if isinstance(error, CannotRecordError):
                variant.attempts = ATTEMPTS
            if variant.attempts == ATTEMPTS:
                self._warn(f"{self.name} is not recorded, and runs eager: {_reason(error)}.")
            return self._eager(*arguments).outcome
        size = recording.num_operations
        seconds = time.perf_counter() - start
        _log.info("%s: recorded %d operations in %.1f s", self.name, size, seconds)
        example = recording.inputs(variant.last, call.leaves)
        replay = runner(recording.graph, example, "replay", size)
        agrees, outcome = self._compare(variant, recording, replay, example, arguments)
        if not agrees:
            variant.attempts = ATTEMPTS
            self._warn(
                f"{self.name} is not recorded, and runs eager: what was recorded did something "
                "else than the step itself. The program may draw from a generator of its own, set "
                "a seed, or change something that is no tensor."
            )
            return outcome
        self.num_recordings += 1
        try:
            variant.run = runner(recording.graph, example, self.backend, size)
        except Exception as error:
            self._warn(f"inductor cannot compile {self.name}, so it is replayed: {_reason(error)}.")
            variant.run = replay
        variant.recording = recording
        return outcome

    def _compare(
        self,
        variant: Variant,
        recording: Recording,
        run: Run,
        inputs: Sequence[Tensor],
        arguments: Any,
    ) -> tuple[bool, Outcome]:
        """Takes the step as it is; also says whether a recording does the same."""
        earlier = [STORE[name].grad for name in recording.trained]
        outcomes: list[Outcome] = []

        def step() -> list[Tensor]:
            eager = self._eager(*arguments)
            outcomes.append(eager.outcome)
            return eager.outside.answers

        generators = [g for g in variant.around.generators if isinstance(g, torch.Generator)]
        try:
            found, moved = run_beside(run, inputs, recording.calls, generators, step)
        except Exception:
            if not outcomes:
                raise  # it is the program's own
            return False, outcomes[0]
        after = [STORE[name].grad for name in recording.trained]
        pairs = zip(earlier, after, strict=True)
        gradients = [b if a is None or b is None else b - a for a, b in pairs]
        now = variant.around.tensors()
        assigned = [now[i] for i in recording.assigned]
        count = 1 + len(gradients)
        agrees = (
            agree(found[:1], [outcomes[0].loss])
            and agree(found[1:count], gradients)
            and agree(found[count:], assigned)
            and agree(moved, inputs)
        )
        return agrees, outcomes[0]

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, NonDiffWarning, stacklevel=2)


def _replay(variant: Variant, call: Call) -> Outcome:
    recording, run = variant.recording, variant.run
    if recording is None or run is None:
        raise TypeError("a variant is recorded before it is replayed")
    loss, *rest = run(recording.inputs(variant.last, call.leaves))
    count = len(recording.trained)
    for name, gradient in zip(recording.trained, rest[:count], strict=True):
        _add_gradient(STORE[name], gradient)
    for i, tensor in zip(recording.assigned, rest[count:], strict=True):
        place = variant.around.places[i]
        cast(MutableMapping[Any, Any], place.holder)[place.key] = _to_keep(tensor)
    met = dict.fromkeys(STORE[name] for name in variant.met.names)
    return Outcome(_to_keep(loss), list(met))


def _to_keep(result: Tensor) -> Tensor:
    """A result that stays: a CUDA graph writes to the same memory at each step."""
    return result.clone() if result.is_cuda else result


def _add_gradient(parameter: Tensor, gradient: Tensor | None) -> None:
    if gradient is not None:
        before = parameter.grad
        parameter.grad = gradient if before is None else before + gradient


def _reason(error: BaseException) -> str:
    """What went wrong, and the innermost line that is no library's."""
    innermost = error
    while innermost.__cause__ is not None:
        innermost = innermost.__cause__
    text = str(error).strip().split("\n")[0]
    if "DataDependent" in type(innermost).__name__ or "data-dependent" in str(innermost):
        text = "it reads the value of a tensor"
    place = own_line(extract_tb(innermost.__traceback__))
    return text if place is None else f"{text}, at {place}"
