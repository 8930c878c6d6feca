"""Takes out of a recorded step what it does in vain, twice, or one by one."""

import operator
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, fx

from .outside import NAMESPACE

SMALL = 4096
"""Draws of more numbers than these are left alone: the call costs little beside the numbers."""

_aten = torch.ops.aten
_FILLS: dict[Any, int] = {_aten.ones_like.default: 1, _aten.zeros_like.default: 0}


def tensors(node: fx.Node) -> list[Tensor]:
    """The fake tensors that an operation returned when it was recorded."""
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return [x for x in values if isinstance(x, Tensor)]


def kind(node: fx.Node) -> str:
    """All about a node's tensors but their values."""
    return repr([(tuple(x.shape), x.stride(), x.dtype, x.device) for x in tensors(node)])


def storages(node: fx.Node) -> set[int]:
    """Which memory a node's tensors are in."""
    return {tensor.untyped_storage()._cdata for tensor in tensors(node)}


def touched(node: fx.Node) -> set[int]:
    """The memory that an operation reads, writes or returns."""
    return storages(node).union(*map(storages, node.all_input_nodes))


def operations(graph: fx.GraphModule) -> list[fx.Node]:
    """What a graph does, in order."""
    return [node for node in graph.graph.nodes if node.op == "call_function"]


def mutates(node: fx.Node) -> bool:
    """Whether an operation changes its first argument in place."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def changes(node: fx.Node) -> fx.Node:
    """Where the tensor comes from that an operation changes in place."""
    return cast(fx.Node, node.args[0])


def draws(node: fx.Node) -> bool:
    """Whether an operation draws random numbers, or may, outside: their order is to be kept."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.nondeterministic_seeded in target.tags or calls_outside(node)
    )


def calls_outside(node: fx.Node) -> bool:
    """Whether an operation is the call of an ``external`` op."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE


def simplify(graph: fx.GraphModule) -> None:
    """Makes a graph shorter that does the same."""
    seen = Counter(memory for node in graph.graph.nodes for memory in storages(node))
    for node in filter(mutates, operations(graph)):
        _keep_old(node, seen)
    changed = mutated(graph)
    for run in list(_runs_of_draws(graph, changed)):
        _draw_at_once(graph, run)
    met: dict[str, fx.Node] = {}
    for node in operations(graph):
        if mutates(node) or draws(node) or changed & touched(node):
            continue
        if node.target in _FILLS:
            _forget_what_it_is_like(node)
        same = _itself(node) or met.setdefault(repr((node.target, node.args, node.kwargs)), node)
        if same is not node:
            node.replace_all_uses_with(same, lambda user: user.op != "output")
    graph.graph.eliminate_dead_code()
    graph.recompile()


def mutated(graph: fx.GraphModule) -> set[int]:
    """The memory that a graph changes in place."""
    found: set[int] = set()
    return found.union(*(storages(changes(node)) for node in operations(graph) if mutates(node)))


def _keep_old(node: fx.Node, seen: dict[int, int]) -> None:
    """``x.logit_()`` becomes ``x.logit()`` if nothing else sees the memory of ``x``."""
    target, old = cast(torch._ops.OpOverload, node.target), changes(node)
    name = target._schema.name.removeprefix("aten::").removesuffix("_")
    new = getattr(getattr(_aten, name, None), target._overloadname, None)
    if new is None or old.op != "call_function" or len(tensors(node)) != 1:
        return
    if storages(old) == storages(node) and all(seen[memory] == 2 for memory in storages(old)):
        node.target = new
        node.meta = {"val": node.meta["val"].clone()}


def _runs_of_draws(graph: fx.GraphModule, changed: set[int]) -> Iterator[list[fx.Node]]:
    """Small draws of the same kind that follow each other, on the CPU.

    There uniform numbers come out of the generator one by one, in order: one call draws what many
    did. On a GPU it would draw others.
    """

    def what(node: fx.Node) -> str:
        if node.target is not _aten.rand.default or changed & storages(node):
            return ""
        (value,) = tensors(node)
        return kind(node) if value.device.type == "cpu" and 0 < value.numel() <= SMALL else ""

    for key, group in groupby(filter(draws, operations(graph)), what):
        nodes = list(group)
        if key and len(nodes) > 1:
            yield nodes


def _draw_at_once(graph: fx.GraphModule, nodes: list[fx.Node]) -> None:
    """A call costs 6 us beside the numbers, a row of a matrix 0.4 us."""
    values = [tensors(node)[0] for node in nodes]
    shape = [len(nodes), *values[0].shape]
    with graph.graph.inserting_before(nodes[0]):
        matrix = graph.graph.call_function(_aten.rand.default, (shape,), nodes[0].kwargs)
        rows = graph.graph.call_function(_aten.unbind.int, (matrix,))
    matrix.meta = {"val": values[0].new_empty(shape)}
    rows.meta = {"val": matrix.meta["val"].unbind()}
    for i, node in enumerate(nodes):
        with graph.graph.inserting_after(node):
            row = graph.graph.call_function(operator.getitem, (rows, i))
        row.meta = {"val": rows.meta["val"][i]}
        node.replace_all_uses_with(row)
        graph.graph.erase_node(node)


def _forget_what_it_is_like(node: fx.Node) -> None:
    """``ones_like(loss)``, where a backward pass starts, would wait for the whole loss."""
    (value,) = tensors(node)
    if value.is_contiguous():
        node.args = (list(value.shape), _FILLS[node.target])
        node.kwargs = {"dtype": value.dtype, "device": value.device}
        node.target = _aten.full.default


def _itself(node: fx.Node) -> fx.Node | None:
    """The argument of an operation that returns it as it is, such as ``x.detach()``."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node) or node.target is operator.getitem:
        return None
    new, old = node.meta.get("val"), first.meta.get("val")
    if not isinstance(new, Tensor) or not isinstance(old, Tensor):
        return None
    same = storages(node) == storages(first) and new.storage_offset() == old.storage_offset()
    return first if same and kind(node) == kind(first) else None
