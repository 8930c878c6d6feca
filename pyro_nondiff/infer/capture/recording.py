"""Records a step as one graph of operations on the tensors that it finds."""

import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

from ...errors import NonDiffError
from ..generators import set_state_of, state_of
from .holders import STORE, Place
from .outside import OutsideCall, RecordOutside
from .places import Surroundings, swapped
from .reading import NotRead

_FRESH = (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.lift_fresh.default)


class CannotRecordError(NonDiffError):
    """A step that is no fixed list of operations on tensors."""


@dataclass(frozen=True)
class Recording:
    """A recorded step.

    Arguments:
        graph: The operations, as a function of the tensors in places, of some of the arguments'
            tensors, and of others that were found, in this order.
        places: Which of the places' tensors go in.
        leaves: Which of the arguments' tensors go in.
        others: Tensors that have no place.
        trained: The names of the parameters whose gradients come out behind the loss.
        assigned: Which of the places get the new tensors that come out last.
        calls: What the graph calls outside the program.
    """

    graph: fx.GraphModule
    places: list[int]
    leaves: list[int]
    others: list[Tensor]
    trained: list[str]
    assigned: list[int]
    calls: list[OutsideCall]

    @property
    def num_operations(self) -> int:
        """How many operations were recorded."""
        return sum(node.op == "call_function" for node in self.graph.graph.nodes)

    def inputs(self, tensors: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
        """What the graph takes, of what is in the places and of the arguments' tensors."""
        placed = [tensors[i] for i in self.places]
        return [*placed, *(leaves[i] for i in self.leaves), *self.others]


@dataclass(frozen=True)
class Met:
    """The parameters that a step met when it ran.

    Arguments:
        names: All of them.
        trained: Those that got a gradient.
        kinds: The kind of numbers that each ``external`` op answered.
    """

    names: list[str]
    trained: list[str]
    kinds: dict[str, torch.dtype]


def record(
    step: Callable[[Any], Tensor],
    arguments: Any,
    leaves: Sequence[Tensor],
    around: Surroundings,
    met: Met,
) -> Recording:
    """Records a step, changing nothing: parameters, buffers, generators and attributes are kept.

    Arguments:
        step: Takes the arguments, adds gradients to parameters, and returns the loss.
        arguments: Any tree of them.
        leaves: The tensors among them, in order.
        around: Where else tensors can be.
        met: What the step met when it ran, which the recorded one is to meet as well.

    Raises:
        CannotRecordError: If what was recorded would not do what the step does.
        Exception: Whatever stops the step when it finds no values in its tensors.
    """
    if not around.is_whole:
        raise CannotRecordError(
            f"the program reaches more than {len(around.watched)} things, which are not all watched"
        )
    for place in around.iterators:
        raise CannotRecordError(
            f"{place.label} is an iterator, which a recording would not move on. Give what it "
            "yields as an argument of the step"
        )
    for place in around.places:
        if has_hooks(place.value):
            raise CannotRecordError(
                f"{place.label} has a hook on its gradient, which a recording would not call. "
                "Clip gradients by the optimiser's clip_args, or mask them in the program"
            )
    tensors = {id(place.value): place.value for place in around.places}
    inputs = [*tensors.values(), *leaves]
    assigned: list[int] = []
    trained: list[str] = []
    outside = RecordOutside(met.kinds)

    def run(given: list[Tensor]) -> list[Tensor]:
        for old, new in zip(inputs, given, strict=True):
            new.requires_grad_(old.requires_grad)
            if isinstance(old, nn.Parameter):
                cast(Any, new)._is_param = True  # Pyro's modules look for parameters
        fakes = dict(zip(tensors, given, strict=False))
        rest = iter(given[len(tensors) :])
        args = tree_map_only(Tensor, lambda _: next(rest), arguments)
        with around.restored(), swapped(around.places, lambda old: fakes[id(old)]):
            _refresh_recurrent(around.modules)
            before = around.tensors()
            numbers = around.values()
            with outside, NotRead(), poutine.trace(param_only=True) as capture:
                loss = _loss(step(args))
            if changed := around.changed(numbers, alike=True):
                raise CannotRecordError(f"the step changes {changed.label}, which is no tensor")
            trained.extend(_trained(set(capture.trace.nodes), met))
            _check_strays(around, before)
            after = around.tensors()
            assigned.extend(i for i, old in enumerate(before) if after[i] is not old)
            moved = [_assigned(around.places[i], after[i]) for i in assigned]
            gradients = [STORE[name].grad for name in trained]
        return [loss, *gradients, *moved]

    example = [tensor.detach() for tensor in inputs]
    with _unchanged_generators(around.generators), pyro.validation_enabled(False):
        graph = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(example)
    _refresh_recurrent(around.modules)
    graph.graph.set_codegen(fx.graph.CodeGen())
    others = _lift(graph, inputs, trained)
    used = _drop_unused(graph, len(inputs) + len(others))
    first = {id(place.value): i for i, place in reversed(list(enumerate(around.places)))}
    count = len(tensors)
    return Recording(
        graph,
        [first[id(inputs[i])] for i in used if i < count],
        [i - count for i in used if count <= i < len(inputs)],
        [others[i - len(inputs)] for i in used if i >= len(inputs)],
        trained,
        assigned,
        outside.calls,
    )


def has_hooks(tensor: Tensor) -> bool:
    """Whether something is called with the gradient of a tensor."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def _loss(found: Any) -> Tensor:
    if not isinstance(found, Tensor):
        raise CannotRecordError(f"the objective returned {type(found).__name__}, and no tensor")
    return found.detach()


def _assigned(place: Place, found: Any) -> Tensor:
    if not isinstance(found, Tensor):
        raise CannotRecordError(
            f"the step puts {type(found).__name__} in the place of {place.label}"
        )
    return found.detach()


def _trained(found: set[str], met: Met) -> list[str]:
    """The parameters that have a gradient, which are those of the step that ran."""
    if found != set(met.names):
        raise CannotRecordError(f"the step met parameters {sorted(found)}, not {sorted(met.names)}")
    trained = [name for name in met.names if STORE[name].grad is not None]
    if lost := sorted(set(met.trained) - set(trained)):
        raise CannotRecordError(
            f"parameters {lost} get no gradient when the step is recorded: they are used by other "
            "ways than their places in modules or the param store"
        )
    return list({id(STORE[name]): name for name in trained}.values())


def _check_strays(around: Surroundings, before: Sequence[Any]) -> None:
    """A tensor that is no parameter of Pyro's gets a gradient in an eager step."""
    known = {id(value) for value in STORE.values()}
    for place, tensor in zip(around.places, before, strict=True):
        if id(tensor) not in known and tensor.is_leaf and tensor.grad is not None:
            raise CannotRecordError(
                f"{place.label} gets a gradient, and is not in the param store, so no optimiser "
                "moves it. Register it with pyro.module or pyro.param, or detach it"
            )


def _refresh_recurrent(modules: Sequence[nn.Module]) -> None:
    """Recurrent networks keep their parameters in a second list."""
    for module in modules:
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]


@contextmanager
def _unchanged_generators(generators: Sequence[Any]) -> Iterator[None]:
    """Refuses draws of other generators than torch's, which a graph would repeat."""
    others = [each for each in generators if not isinstance(each, torch.Generator)]
    others += [random, np.random]
    states = [state_of(each) for each in others]
    try:
        yield
    finally:
        now = [state_of(each) for each in others]
        for each, state in zip(others, states, strict=True):
            set_state_of(each, state)
    if pickle.dumps(states) != pickle.dumps(now):
        raise CannotRecordError("the step draws from Python's or NumPy's generator")


def _lift(graph: fx.GraphModule, inputs: Sequence[Tensor], trained: Sequence[str]) -> list[Tensor]:
    """Makes inputs of tensors that were met elsewhere, so that their changes are seen."""
    nodes = graph.graph
    placeholders = [node for node in nodes.nodes if node.op == "placeholder"]
    known = {id(old): node for old, node in zip(inputs, placeholders, strict=True)}
    names = {id(STORE[name]): name for name in trained}
    others: list[Tensor] = []
    for node in [node for node in nodes.nodes if node.op == "get_attr"]:
        tensor = getattr(graph, str(node.target))
        if not isinstance(tensor, Tensor) or all(user.target in _FRESH for user in node.users):
            continue  # it was made in the run
        if id(tensor) in names:
            raise CannotRecordError(
                f"parameter '{names[id(tensor)]}' is reached by a way that was not found: no "
                "gradient would come back"
            )
        if id(tensor) not in known:
            with nodes.inserting_after(placeholders[-1]):
                placeholders.append(nodes.placeholder(f"other_{len(others)}"))
            placeholders[-1].meta = dict(node.meta)
            known[id(tensor)] = placeholders[-1]
            others.append(tensor)
        node.replace_all_uses_with(known[id(tensor)])
        nodes.erase_node(node)
    return others


def _drop_unused(graph: fx.GraphModule, count: int) -> list[int]:
    """Takes away the inputs that no operation uses; returns the places of the rest."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    used = [i for i in range(count) if placeholders[i].users]
    for node in placeholders:
        if not node.users:
            graph.graph.erase_node(node)
    graph.recompile()
    return used
