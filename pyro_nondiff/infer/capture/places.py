"""What a program can reach from outside its arguments: tensors, numbers, words, objects.

A step is recorded as a function of the tensors that it finds in such places. They are looked up
again before each call, so that a change is seen, in place or by assignment. All else is watched:
a step that was recorded when it was different is stale.
"""

import random
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import partial
from io import IOBase
from operator import is_
from types import (
    FunctionType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, device, dtype, nn
from torch.distributions import Distribution

from ...estimators import AbstractEstimator
from ...estimators.baselines import AbstractBaseline
from .holders import (
    LIBRARIES,
    LONGEST,
    STORE,
    Attributes,
    Cell,
    Items,
    Place,
    Size,
    is_library,
    is_ours,
    slots_of,
)

SIMPLE = (bool, int, float, complex, str, bytes, type(None), dtype, device)

_MODULE = vars(nn.Module())
_OPEN = (
    Distribution,
    Messenger,
    ELBO,
    partial,
    Namespace,
    SimpleNamespace,
    AbstractEstimator,
    AbstractBaseline,
)
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_MOST = 20_000  # things that are watched


class Surroundings:
    """All that a program can reach from outside its arguments, as far as it can be found.

    These are the param store; the modules that ran; closures, and the globals that functions name;
    attributes of objects that are the user's own; and what lies in lists, tuples and dictionaries
    of at most 64 things. What other libraries hold, NumPy arrays among them, is known by identity.

    Arguments:
        programs: The functions, methods, modules and objectives to start from.
        modules: Modules that were seen to run.
        outside: What the programs call outside themselves, which may change as it likes.
    """

    def __init__(
        self,
        programs: Iterable[Any],
        modules: Iterable[nn.Module],
        outside: Iterable[Callable[..., Any]] = (),
    ) -> None:
        self._made_of = programs, modules, outside
        self.places: list[Place] = []
        self.watched: list[Place] = []
        self.modules: list[nn.Module] = []
        self._holders: list[tuple[MutableMapping[Any, Any], list[Any] | None]] = []
        self._steady: set[int] = set()
        self._met: dict[int, Any] = {}
        self._waiting: deque[tuple[Any, str]] = deque()
        own = {id(getattr(program, "__self__", program)) for program in programs}
        for fn in outside:
            parts = (fn, getattr(fn, "__self__", fn), getattr(fn, "__code__", fn))
            self._met.update({id(part): part for part in parts if id(part) not in own})
        self._keep(STORE, "parameter {}")
        store = pyro.get_param_store()
        self._holders += [(store._param_to_name, None), (store._constraints, None)]
        for thing in (*programs, *modules):
            self._waiting.append((thing, getattr(thing, "__name__", type(thing).__name__)))
        while self._waiting:
            self._visit(*self._waiting.popleft())
        # what is asked at each step
        self._read_watched = [(place.holder.get, place.key) for place in self.watched]
        self._read_places = [(place.holder.get, place.key) for place in self.places]

    @property
    def is_whole(self) -> bool:
        """Whether all that was found is watched."""
        return len(self.watched) <= _MOST

    @property
    def generators(self) -> list[Any]:
        """The generators of random numbers that the program holds."""
        found = [value for value in self.values() if isinstance(value, _GENERATORS)]
        return list({id(each): each for each in found}.values())

    @property
    def iterators(self) -> list[Place]:
        """Where the program holds an iterator that is not the user's own."""
        kinds = [(place, place.value) for place in self.watched]
        return [p for p, v in kinds if isinstance(v, Iterator) and not (_is_open(v) or _is_file(v))]

    def again(self) -> "Surroundings":
        """What can be reached now: things may have been replaced by others like them."""
        return Surroundings(*self._made_of)

    def is_like(self, other: "Surroundings", values: list[Any]) -> bool:
        """Whether the same places are there, with equal numbers and things of the same kinds.

        Arguments:
            other: What could be reached earlier.
            values: What was watched in it then.
        """
        pairs = ((self.watched, other.watched), (self.places, other.places))
        if any([p.label for p in a] != [p.label for p in b] for a, b in pairs):
            return False
        return all(map(_alike, self.values(), values))

    def values(self) -> list[Any]:
        """All that is watched, as it is now."""
        return [get(key) for get, key in self._read_watched]

    def distinct(self) -> list[int]:
        """Which of the places have tensors that may be altered where they are, each once."""
        first = {id(tensor): i for i, tensor in reversed(list(enumerate(self.tensors())))}
        return sorted(i for identity, i in first.items() if identity not in self._steady)

    def tensors(self) -> list[Any]:
        """What is in the places now: tensors, if nobody has put other things there."""
        return [get(key) for get, key in self._read_places]

    def changed(self, values: list[Any], alike: bool = False) -> Place | None:
        """Where something is not what it was, or None.

        Arguments:
            values: What was there.
            alike: Whether another thing of the same kind is no change.
        """
        found = self.values()
        if all(map(is_, found, values)):  # nearly always
            return None
        for place, now, before in zip(self.watched, found, values, strict=True):
            if now is before:
                continue
            same_number = isinstance(now, SIMPLE) and _alike(now, before)
            if not (same_number or (alike and _alike(now, before))):
                return place
        return None

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Puts everything back at the end of the block: it may hold what was recorded."""
        saved = [_present(*each) for each in self._holders]
        try:
            yield
        finally:
            for (holder, names), before in zip(self._holders, saved, strict=True):
                now = _present(holder, names)
                for key in reversed([key for key in now if key not in before]):
                    del holder[key]
                for key, value in before.items():
                    if key not in now or now[key] is not value:
                        holder[key] = value

    def _visit(self, thing: Any, label: str) -> None:
        if id(thing) in self._met or not self.is_whole:
            return
        if isinstance(thing, type):
            self._class(thing)
            return
        self._met[id(thing)] = thing  # kept alive: its identity is watched
        if isinstance(thing, nn.Module):
            self.modules.append(thing)
            (self._state if is_ours(type(thing)) else self._module)(thing, label)
        elif isinstance(thing, FunctionType):
            self._function(thing)
        elif isinstance(thing, MethodType):
            self._waiting += (
                (thing.__func__, label),
                (thing.__self__, type(thing.__self__).__name__),
            )
        elif isinstance(thing, staticmethod | classmethod):
            self._waiting.append((thing.__func__, label))
        elif isinstance(thing, property):
            self._waiting.append((thing.fget, label))
        elif isinstance(thing, list | tuple | dict | set | frozenset | deque):
            self._container(thing, label)
            if _is_open(thing):
                self._object(thing, label)
        elif _is_open(thing):
            self._object(thing, label)

    def _module(self, module: nn.Module, label: str) -> None:
        parts = module._parameters, module._buffers, module._modules
        hooks = module._forward_pre_hooks, module._forward_hooks
        for holder in (*parts, *hooks):
            self._keep(holder, label + ".{}")
        own = [name for name in vars(module) if name == "training" or name not in _MODULE]
        self._keep(vars(module), label + ".{}", own)
        self._size(label, vars(module), *parts, *hooks)
        self._class(type(module))

    def _state(self, module: nn.Module, label: str) -> None:
        """What an estimator has learnt: many tensors, of which parameters alone may be altered."""
        for holder in (module._parameters, module._buffers, module._modules):
            self._keep(holder, label + ".{}", watch=False)
        self._holders.append((vars(module), None))

    def _object(self, thing: Any, label: str) -> None:
        attributes = getattr(thing, "__dict__", {})
        self._keep(attributes, label + ".{}")
        self._size(label, attributes)
        if slots := slots_of(thing):
            self._keep(Attributes(thing, slots), label + ".{}", list(slots))
        if isinstance(thing, partial):
            given: dict[Any, Any] = {"func": thing.func, **dict(enumerate(thing.args))}
            self._keep(given, label + "[{}]", restore=False)
            self._keep(thing.keywords, label + "[{}]")
        self._class(type(thing))

    def _class(self, cls: type) -> None:
        """The functions and attributes of a class and its bases that are the user's own."""
        for each in cls.__mro__:
            if not is_library(each) and id(each) not in self._met:
                self._met[id(each)] = each
                names = [
                    name
                    for name, value in vars(each).items()
                    if not name.startswith("__") or isinstance(value, FunctionType)
                ]
                self._keep(Attributes(each, names), each.__name__ + ".{}", names)

    def _container(self, thing: Any, label: str) -> None:
        self._size(label, thing)
        if isinstance(thing, set | frozenset):
            return
        if len(thing) > LONGEST:
            if not isinstance(thing, tuple):
                self._holders.append((thing if isinstance(thing, dict) else Items(thing), None))
        elif isinstance(thing, tuple):
            self._keep(dict(enumerate(thing)), label + "[{}]", restore=False)
        else:
            self._keep(thing if isinstance(thing, dict) else Items(thing), label + "[{}]")

    def _size(self, label: str, *containers: Any) -> None:
        self.watched.append(Place(Size(*containers), "size", f"the size of {label}"))

    def _function(self, function: FunctionType) -> None:
        names, label = function.__code__.co_freevars, function.__name__
        for name, cell in zip(names, function.__closure__ or (), strict=True):
            self._keep(Cell(name, cell), label + ":{}", [name])
        if not is_library(function):
            self._home(function.__globals__, self._names(function.__code__), label + ":{}")
        if vars(function):
            self._keep(vars(function), label + ".{}")
        if function.__defaults__ or function.__kwdefaults__:
            self._waiting.append((function.__defaults__, f"default of {label}"))
            self._waiting.append((function.__kwdefaults__, f"default of {label}"))

    def _home(self, home: dict[str, Any], names: list[str], label: str) -> None:
        """The variables of a file that are named, and those of the user's files among them."""
        named = [name for name in dict.fromkeys(names) if name in home]
        self._keep(home, label, named)
        for name in named:
            if isinstance(file := home[name], ModuleType) and _is_users(file):
                others = [other for other in names if other != name]
                self._home(vars(file), others, f"{name}.{{}}")

    def _names(self, code: Any) -> list[str]:
        """The globals that a function's code may name, and those of the functions inside it."""
        inner = [const for const in code.co_consts if isinstance(const, type(code))]
        known = [each for each in inner if id(each) not in self._met]
        return [*code.co_names, *(name for each in known for name in self._names(each))]

    def _keep(
        self,
        holder: Mapping[Any, Any],
        label: str,
        names: Iterable[Any] | None = None,
        restore: bool = True,
        watch: bool = True,
    ) -> None:
        """Takes up what a mapping holds.

        Arguments:
            holder: The mapping.
            label: What to call each in a message, with braces for its key.
            names: Those of its keys that count; None for all.
            restore: Whether a recording may leave things in it that it made.
            watch: Whether what is no tensor may change, and what is one may be altered where it is.
        """
        if restore and isinstance(holder, MutableMapping):
            self._holders.append((holder, None if names is None else list(names)))
        for name in list(holder if names is None else names):
            value, called = holder.get(name), label.format(name)
            if isinstance(value, Tensor) and isinstance(holder, MutableMapping):
                self.places.append(Place(holder, name, called))
                if not (watch or value.requires_grad):
                    self._steady.add(id(value))
                continue
            if watch:
                self.watched.append(Place(holder, name, called))
            if not isinstance(value, (*SIMPLE, ModuleType)):
                self._waiting.append((value, called))


def _present(holder: Mapping[Any, Any], names: list[Any] | None) -> dict[Any, Any]:
    """What a mapping holds of some names, or all that it holds."""
    return {key: holder[key] for key in (holder if names is None else names) if key in holder}


def _alike(a: Any, b: Any) -> bool:
    """Whether two things are equal numbers, or such as the walk looks into and of one kind."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, (*SIMPLE, set, frozenset)):
        return bool(a == b)
    if isinstance(a, FunctionType):
        return a.__code__ is b.__code__
    if isinstance(a, MethodType):
        return _alike(a.__func__, b.__func__)
    return isinstance(a, nn.Module | list | tuple | dict) or _is_open(a)


def _is_open(thing: Any) -> bool:
    """Whether the attributes of an object are looked into."""
    if isinstance(thing, type):
        return False
    return isinstance(thing, _OPEN) or not is_library(type(thing))


def _is_file(thing: Any) -> bool:
    return isinstance(thing, IOBase)


def _is_users(file: ModuleType) -> bool:
    """Whether a file is the user's own, and no installed library's."""
    place = getattr(file, "__file__", None) or "site-packages"
    library = file.__name__.partition(".")[0] in LIBRARIES
    return not library and "site-packages" not in place and "dist-packages" not in place


@contextmanager
def swapped(places: list[Place], give: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Puts other tensors in places, and the old ones back at the end of the block."""
    saved = [place.value for place in places]
    try:
        for place, old in zip(places, saved, strict=True):
            _put(place, give(old))
        yield
    finally:
        for place, old in zip(places, saved, strict=True):
            _put(place, old)


def _put(place: Place, value: Any) -> None:
    if isinstance(place.holder, MutableMapping):
        place.holder[place.key] = value
