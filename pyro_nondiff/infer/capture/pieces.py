"""Cuts a recorded step into pieces, so that what repeats in it is compiled once.

A loop of a program is unrolled in the recording: a chain of 50 sites has 50 times the operations of
one. Inductor would compile all of them, and longer than in proportion. Here the operations are put
into an order in which those of one turn of a loop stand together, turns are joined into pieces, and
pieces that are the same function share one compiled one.
"""

import heapq
import operator
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from .simplify import (
    changes,
    draws,
    kind,
    mutated,
    mutates,
    operations,
    storages,
    tensors,
    touched,
)

SIZE = 200
"""About how many operations a piece of whole turns has.

For each operation it takes 8 ms to compile, and for each call 10 us beside the work.
"""

LARGEST = 1000
"""The most operations of a piece between those that repeat."""

LONGEST = 400
"""The most operations of one turn."""

FEWEST = 3
"""How many turns there must be, at least."""

WORTH = 8
"""The fewest operations that are compiled; fewer are done one by one."""

MANY = 16
"""More tensors than these are stacked by PyTorch, which takes less time than to pass them on."""

_JOINS = (torch.ops.aten.stack.default, torch.ops.aten.cat.default)
Compile = Callable[[fx.GraphModule, list[Tensor]], Callable[..., Sequence[Tensor]]]


class Piece:
    """Some operations of a graph, in their order, as a function.

    Arguments:
        nodes: The operations.
    """

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        own = set(nodes)
        self.nodes = list(nodes)
        args = (arg for node in nodes for arg in node.all_input_nodes)
        self.inputs = list(dict.fromkeys(arg for arg in args if arg not in own))
        self.outputs = [node for node in nodes if any(user not in own for user in node.users)]

    def key(self) -> str:
        """The same for two pieces that are the same function of tensors of the same kinds."""
        names = {node: f"%{i}" for i, node in enumerate([*self.inputs, *self.nodes])}
        order: dict[int, int] = {}
        memory = [[order.setdefault(s, len(order)) for s in storages(n)] for n in self.inputs]
        calls = [
            (str(n.target), map_arg(n.args, names.get), map_arg(n.kwargs, names.get))
            for n in self.nodes
        ]
        outputs = [names[node] for node in self.outputs]
        return repr((list(map(kind, self.inputs)), memory, calls, outputs))

    def module(self) -> fx.GraphModule:
        """The piece, as a function of its inputs that returns a tuple."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for i, node in enumerate(self.inputs):
            copies[node] = graph.placeholder(f"given_{i}")
        for node in self.nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in self.outputs))
        return fx.GraphModule(torch.nn.Module(), graph)

    def alone(self, given: set[int]) -> bool:
        """Whether nobody else sees what the piece changes in place.

        Arguments:
            given: Memory of the graph's inputs, which may be changed if it comes in as one tensor.
        """
        changed = set().union(*(storages(changes(node)) for node in self.nodes if mutates(node)))
        seen = [memory for node in self.inputs for memory in storages(node) & changed]
        left = {memory for node in self.outputs for memory in storages(node) & changed}
        return len(set(seen)) == len(seen) and given >= {*seen, *left}

    def example(self) -> list[Tensor]:
        """Tensors without values, as the piece will get."""
        return [tensor.detach() for node in self.inputs for tensor in tensors(node)]


def in_pieces(graph: fx.GraphModule, compile_one: Compile) -> tuple[fx.GraphModule, int]:
    """The same graph with compiled pieces in it, and how many different ones there are.

    Arguments:
        graph: A simplified graph.
        compile_one: Compiles a piece.

    Raises:
        CannotCutError: If pieces would change memory behind each other's back.
    """
    pieces = cut(operations(graph))
    _check_memory(graph, pieces)
    result = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            copies[node] = result.node_copy(node)
    compiled: dict[str, Callable[..., Any]] = {}
    for piece in pieces:
        if len(piece.nodes) < WORTH or all(map(_light, piece.nodes)):
            for node in piece.nodes:
                copies[node] = result.node_copy(node, copies.__getitem__)
            continue
        if (key := piece.key()) not in compiled:
            compiled[key] = _named(compile_one(piece.module(), piece.example()))
        call = result.call_function(compiled[key], tuple(copies[node] for node in piece.inputs))
        for i, node in enumerate(piece.outputs):
            copies[node] = result.call_function(operator.getitem, (call, i))
    (output,) = graph.graph.find_nodes(op="output")
    result.output(map_arg(output.args[0], copies.__getitem__))
    return fx.GraphModule(graph, result), len(compiled)


class CannotCutError(Exception):
    """A graph that can only be compiled whole."""


def _check_memory(graph: fx.GraphModule, pieces: Sequence[Piece]) -> None:
    inputs = [storages(node) for node in graph.graph.find_nodes(op="placeholder")]
    given = set().union(*inputs)
    if mutated(graph) and len(given) < len(inputs):
        raise CannotCutError("it changes tensors in place, and some of its inputs share memory")
    if not all(piece.alone(given) for piece in pieces):
        raise CannotCutError("it changes a tensor in place that several pieces use")


def _named(call: Callable[..., Any]) -> Callable[..., Any]:
    """A function that code can be generated for: it must not seem to be one of PyTorch."""

    def piece(*given: Tensor) -> Any:
        return call(*given)

    return piece


def cut(nodes: Sequence[fx.Node]) -> list[Piece]:
    """Pieces of whole turns, and pieces of what lies between them."""
    nodes = ordered(nodes)
    crossing = _crossing(nodes)
    pieces: list[Piece] = []
    done = 0
    for start, period, turns in _turns(nodes):
        start += int(crossing[start : start + period].argmin())
        length = period * max(1, SIZE // period)
        count = (turns - 1) * period // length
        while crossing[start + count * length] == len(nodes):
            count -= 1
        pieces += _between(nodes[done:start])
        bounds = [start + i * length for i in range(count + 1)]
        pieces += [Piece(nodes[a:b]) for a, b in pairwise(bounds)]
        done = bounds[-1]
    return [*pieces, *_between(nodes[done:])]


def _between(nodes: Sequence[fx.Node]) -> Iterator[Piece]:
    for _, group in groupby(nodes, _light):
        part = list(group)
        while part:
            size = LARGEST
            while size < len(part) and part[size].target is operator.getitem:
                size += 1
            yield Piece(part[:size])
            part = part[size:]


def _light(node: fx.Node) -> bool:
    """Whether PyTorch does it as fast: it looks at one tensor as many, or makes one of many."""
    if node.target is operator.getitem:
        return _light(node.all_input_nodes[0])
    if node.target in _JOINS:
        return len(node.all_input_nodes) > MANY
    many = isinstance(node.meta.get("val"), (list, tuple))
    return many and storages(node) <= storages(node.all_input_nodes[0])


def ordered(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The operations, each as soon as it can run, and those that were recorded late first.

    What takes nothing but what is there from the start waits until there is nothing else to do, so
    that a turn of a loop is finished before the next one starts. Constants do not wait.
    """
    need = _needs(nodes)
    place = {node: i for i, node in enumerate(nodes)}
    users: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
    constant: set[fx.Node] = set()
    source: set[fx.Node] = set()
    for node in nodes:
        for other in need[node]:
            users[other].append(node)
        if not draws(node) and all(arg in constant for arg in node.all_input_nodes):
            constant.add(node)
        elif all(arg not in place or _light(arg) for arg in node.all_input_nodes):
            source.add(node)
    missing = {node: len(need[node]) for node in nodes}
    waiting = [place[node] for node in nodes if not need[node] and node not in constant]
    ready = [node for node in reversed(nodes) if not need[node] and node in constant]
    order = []
    while ready or waiting:
        node = ready.pop() if ready else nodes[heapq.heappop(waiting)]
        order.append(node)
        items = []
        for user in users[node]:
            missing[user] -= 1
            if missing[user]:
                continue
            if user.target is operator.getitem:
                items.append(user)
            elif user in source:
                heapq.heappush(waiting, place[user])
            else:
                ready.append(user)
        ready += reversed(items)
    return order


def _needs(nodes: Sequence[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """What must run before each operation.

    It is what the operation takes, the draw before a draw, and uses of memory before its change.
    """
    need: dict[fx.Node, set[fx.Node]] = {node: set() for node in nodes}
    changed: dict[int, fx.Node] = {}
    used: dict[int, list[fx.Node]] = {}
    last: fx.Node | None = None
    for node in nodes:
        need[node].update(arg for arg in node.all_input_nodes if arg in need)
        if draws(node):
            need[node].update([last] if last else [])
            last = node
        for memory in touched(node):
            if memory in changed:
                need[node].add(changed[memory])
            if mutates(node):
                need[node].update(used.get(memory, ()))
                changed[memory] = node
            used.setdefault(memory, []).append(node)
    return need


def _crossing(nodes: Sequence[fx.Node]) -> np.ndarray:
    """How many tensors would pass a cut before each operation; all, where there must be none."""
    place = {node: i for i, node in enumerate(nodes)}
    change = np.zeros(len(nodes) + 2, dtype=int)
    for node, i in place.items():
        change[i + 1] += 1
        change[max((place.get(user, len(nodes)) for user in node.users), default=i) + 1] -= 1
    crossing = change.cumsum()[: len(nodes) + 1]
    items = [i for node, i in place.items() if node.target is operator.getitem]
    crossing[items] = len(nodes)  # an item stays with what it is taken from
    return crossing


def _turns(nodes: Sequence[fx.Node]) -> Iterator[tuple[int, int, int]]:
    """Where operations repeat: the place of the first, how many a turn has, and the turns."""
    kinds: dict[str, int] = {}
    marks = np.array([kinds.setdefault(_mark(node), len(kinds)) for node in nodes])
    size = len(marks)
    covered, periods = np.zeros(size, dtype=int), np.ones(size, dtype=int)
    for period in range(1, min(LONGEST, size // FEWEST) + 1):
        places = np.arange(size - period)
        unlike = np.where(marks[:-period] == marks[period:], size - period, places)
        alike = np.minimum.accumulate(unlike[::-1])[::-1] - places  # so many from here on
        reach = np.where(alike >= (FEWEST - 1) * period, alike + period, 0)
        better = reach > covered[:-period]
        covered[:-period][better] = reach[better]
        periods[:-period][better] = period
    start = 0
    while start < size:
        period = int(periods[start])
        turns = int(covered[start]) // period
        if turns * period < SIZE:
            start += 1
            continue
        yield start, period, turns
        start += turns * period


def _mark(node: fx.Node) -> str:
    """What an operation is, whatever it is done to."""
    args, kwargs = map_arg((node.args, node.kwargs), lambda _: "%")
    return repr((str(node.target), args, kwargs, kind(node)))
