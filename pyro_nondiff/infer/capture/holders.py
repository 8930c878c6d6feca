"""Ways to read and write what a program can reach, each as a mapping."""

import sys
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from types import CellType, FunctionType, MemberDescriptorType
from typing import Any, NamedTuple

import pyro

LIBRARIES = {"torch", "pyro", "numpy", "pyro_nondiff", *sys.stdlib_module_names} - {"__main__"}
LONGEST = 64  # of the lists and dictionaries that are looked into


class Place(NamedTuple):
    """A place: a mapping, one of its keys, and what to call it in a message."""

    holder: Mapping[Any, Any]
    key: Any
    label: str

    @property
    def value(self) -> Any:
        """What is there now, or None."""
        return self.holder.get(self.key)


class Cell(MutableMapping[str, Any]):
    """The variable of a closure as a mapping with one key."""

    def __init__(self, name: str, cell: CellType) -> None:
        self.name, self.cell = name, cell

    def __getitem__(self, name: str) -> Any:
        try:
            return self.cell.cell_contents
        except ValueError:  # it is not assigned
            raise KeyError(name) from None

    def __setitem__(self, name: str, value: Any) -> None:
        self.cell.cell_contents = value

    def __delitem__(self, name: str) -> None:
        del self.cell.cell_contents

    def __iter__(self) -> Iterator[str]:
        yield self.name

    def __len__(self) -> int:
        return 1


class Items(MutableMapping[int, Any]):
    """A list, or a deque, as a mapping from its places."""

    def __init__(self, items: Any) -> None:
        self.items_ = items

    def __getitem__(self, place: int) -> Any:
        try:
            return self.items_[place]
        except IndexError:
            raise KeyError(place) from None

    def __setitem__(self, place: int, value: Any) -> None:
        self.items_[place] = value

    def __delitem__(self, place: int) -> None:
        del self.items_[place]

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.items_)))

    def __len__(self) -> int:
        return len(self.items_)


class Attributes(MutableMapping[str, Any]):
    """Attributes that lie in no dictionary that can be written to: of slots, and of classes."""

    def __init__(self, thing: Any, names: Iterable[str]) -> None:
        self.thing, self.names = thing, list(names)
        self.kind: Any = type if isinstance(thing, type) else object

    def __getitem__(self, name: str) -> Any:
        found = vars(self.thing) if self.kind is type else slots_of(self.thing)
        return found[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.kind.__setattr__(self.thing, name, value)

    def __delitem__(self, name: str) -> None:
        self.kind.__delattr__(self.thing, name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.names if self.get(name) is not None)

    def __len__(self) -> int:
        return len(list(iter(self)))


class Size(Mapping[str, Any]):
    """How many things are in containers, as a mapping with one key; of a small set, which."""

    def __init__(self, *containers: Any) -> None:
        self.containers = containers

    def __getitem__(self, key: str) -> int:
        first = self.containers[0]
        if isinstance(first, set) and len(first) <= LONGEST:
            return hash(frozenset(first))
        return sum(map(len, self.containers))

    def get(self, key: str, default: Any = None) -> int:
        return self[key]

    def __iter__(self) -> Iterator[str]:
        yield "size"

    def __len__(self) -> int:
        return 1


class Store(MutableMapping[str, Any]):
    """The unconstrained values of Pyro's param store, which makes a new table when cleared."""

    def __getitem__(self, name: str) -> Any:
        return pyro.get_param_store()._params[name]

    def get(self, name: str, default: Any = None) -> Any:
        return pyro.get_param_store()._params.get(name, default)

    def __setitem__(self, name: str, value: Any) -> None:
        pyro.get_param_store()._params[name] = value

    def __delitem__(self, name: str) -> None:
        del pyro.get_param_store()._params[name]

    def __iter__(self) -> Iterator[str]:
        return iter(pyro.get_param_store()._params)

    def __len__(self) -> int:
        return len(pyro.get_param_store()._params)


STORE = Store()


def is_library(thing: type | FunctionType) -> bool:
    """Whether a class or a function is one of a library that the step stands on."""
    return (thing.__module__ or "").partition(".")[0] in LIBRARIES


def slots_of(thing: Any) -> dict[str, Any]:
    """The attributes of an object that lie in slots of its classes."""
    found = {}
    for cls in [cls for cls in type(thing).__mro__ if "__slots__" in vars(cls)]:
        for name, member in vars(cls).items():
            if isinstance(member, MemberDescriptorType) and not is_library(cls):
                with suppress(AttributeError):  # it is not assigned
                    found[name] = member.__get__(thing)
    return found


def is_ours(cls: type) -> bool:
    """Whether a class is one of this library."""
    return cls.__module__.partition(".")[0] == "pyro_nondiff"
