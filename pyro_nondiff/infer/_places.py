"""Where tensors live outside a program: parameters, buffers, attributes, closures.

A step is recorded as a function of the tensors that it finds in such places. They are looked up
again before each call, so what changes between steps is seen, in place or by assignment.
"""

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, NamedTuple

import pyro
from torch import Tensor, dtype, nn

_MODULE = vars(nn.Module())
_LIBRARIES = ("torch.", "pyro.")
SIMPLE = (bool, int, float, complex, str, bytes, type(None), dtype)


class _Cell(MutableMapping[str, Any]):
    """The variable of a closure as a mapping with one key."""

    def __init__(self, name: str, cell: CellType) -> None:
        self.name, self.cell = name, cell

    def __getitem__(self, name: str) -> Any:
        return self.cell.cell_contents

    def __setitem__(self, name: str, value: Any) -> None:
        self.cell.cell_contents = value

    def __delitem__(self, name: str) -> None:
        raise TypeError("a closure keeps its variables")

    def __iter__(self) -> Iterator[str]:
        yield self.name

    def __len__(self) -> int:
        return 1


class _Store(MutableMapping[str, Any]):
    """The unconstrained values of Pyro's param store, which makes a new table when cleared."""

    def __getitem__(self, name: str) -> Any:
        return pyro.get_param_store()._params[name]

    def __setitem__(self, name: str, value: Any) -> None:
        pyro.get_param_store()._params[name] = value

    def __delitem__(self, name: str) -> None:
        del pyro.get_param_store()._params[name]

    def __iter__(self) -> Iterator[str]:
        return iter(pyro.get_param_store()._params)

    def __len__(self) -> int:
        return len(pyro.get_param_store()._params)


class Place(NamedTuple):
    """A place: a mapping, one of its keys, and what to call it in a message."""

    holder: MutableMapping[str, Any]
    key: str
    label: str


STORE = _Store()


class Surroundings:
    """All that a program can reach from outside its arguments, as far as it can be found.

    These are the param store; the modules that ran and their parts; the attributes of objects
    whose methods are the programs; closures; and the globals that functions name. Tensors are
    places. Numbers and words are watched: a step that was recorded with other ones is stale.

    Arguments:
        programs: The functions, methods and modules to start from.
        modules: Modules that were seen to run.
    """

    def __init__(self, programs: Iterable[Any], modules: Iterable[nn.Module]) -> None:
        self.places: list[Place] = []
        self.watched: list[Place] = []
        self.modules: list[nn.Module] = []
        self._holders: list[MutableMapping[Any, Any]] = []
        self._met: dict[int, Any] = {}
        self._keep(STORE, "parameter", list(STORE))
        store = pyro.get_param_store()
        self._holders += [store._param_to_name, store._constraints]
        for module in modules:
            self._visit(module, type(module).__name__)
        for program in programs:
            self._visit(program, getattr(program, "__name__", type(program).__name__))

    def values(self) -> tuple[Any, ...]:
        """The numbers and words that are watched, as they are now."""
        found = [place.holder.get(place.key) for place in self.watched]
        return tuple([v if isinstance(v, SIMPLE) else type(v) for v in found])

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Puts all attributes back at the end of the block: they may hold what was recorded."""
        saved = [dict(holder) for holder in self._holders]
        try:
            yield
        finally:
            for holder, values in zip(self._holders, saved, strict=True):
                if not isinstance(holder, _Cell):
                    for key in holder.keys() - values.keys():
                        del holder[key]
                holder.update(values)

    def _visit(self, thing: Any, label: str) -> None:
        if id(thing) in self._met:
            return
        self._met[id(thing)] = thing
        if isinstance(thing, nn.Module):
            for name, module in thing.named_modules(prefix=label):
                self._module(module, name)
        elif isinstance(thing, MethodType):
            self._visit(thing.__func__, label)
            self._object(thing.__self__, type(thing.__self__).__name__)
        elif isinstance(thing, partial):
            for inner in (thing.func, *thing.args, *thing.keywords.values()):
                self._visit(inner, label)
        elif isinstance(thing, FunctionType):
            self._function(thing)
        elif callable(thing) and not isinstance(thing, type) and hasattr(thing, "__dict__"):
            self._object(thing, label)

    def _module(self, module: nn.Module, label: str) -> None:
        if any(module is known for known in self.modules):
            return
        self._met[id(module)] = module
        self.modules.append(module)
        for holder in (module._parameters, module._buffers):
            self._keep(holder, label, list(holder))
        own = [name for name in vars(module) if name == "training" or name not in _MODULE]
        self._keep(vars(module), label, own)
        if not type(module).__module__.startswith(_LIBRARIES):
            self._visit(type(module).forward, label)

    def _object(self, thing: Any, label: str) -> None:
        """An object that is no module, and the modules that are its attributes."""
        if isinstance(thing, nn.Module):
            self._visit(thing, label)
        elif hasattr(thing, "__dict__") and not any(vars(thing) is h for h in self._holders):
            self._keep(vars(thing), label, list(vars(thing)))
            for name, value in list(vars(thing).items()):
                if isinstance(value, nn.Module | FunctionType | MethodType):
                    self._visit(value, f"{label}.{name}")

    def _function(self, function: FunctionType) -> None:
        names, label = function.__code__.co_freevars, function.__name__
        for name, cell in zip(names, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # it is not assigned yet
                continue
            self._keep(_Cell(name, cell), label, [name])
            self._visit(value, name)
        home = function.__globals__
        named = [name for name in function.__code__.co_names if name in home]
        self._keep(home, label, named, whole=False)
        for name in named:
            value = home[name]
            same = isinstance(value, FunctionType) and value.__globals__ is home
            if same or isinstance(value, nn.Module):
                self._visit(value, name)

    def _keep(
        self,
        holder: MutableMapping[str, Any],
        label: str,
        names: Iterable[str],
        whole: bool = True,
    ) -> None:
        if whole:
            self._holders.append(holder)
        for name in names:
            value = holder[name]
            if isinstance(value, Tensor):
                self.places.append(Place(holder, name, f"{label} '{name}'"))
            elif isinstance(value, SIMPLE):
                self.watched.append(Place(holder, name, f"{label} '{name}'"))


@contextmanager
def swapped(places: list[Place], give: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Puts other tensors in places, and the old ones back at the end of the block."""
    saved = [place.holder[place.key] for place in places]
    try:
        for place, old in zip(places, saved, strict=True):
            place.holder[place.key] = give(old)
        yield
    finally:
        for place, old in zip(places, saved, strict=True):
            place.holder[place.key] = old
