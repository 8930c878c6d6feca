"""Bugs planted into the recording of a step, each of which a comparison with SVI must catch."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from pyro_nondiff.estimators import REINFORCE, RELAX, MovingAverage
from pyro_nondiff.infer.capture import fused, outside, places, recording, routine
from tests.infer import test_compiled, test_compiled_changes, test_fused

pytestmark = pytest.mark.usefixtures("param_store")

Patch = pytest.MonkeyPatch


def draws_are_constants(patch: Patch) -> None:
    """The noise of the recording is used again at each step."""
    old = recording._lift

    def lift(graph: fx.GraphModule, *args: Any) -> list[Tensor]:
        for node in list(graph.graph.nodes):
            if node.target is torch.ops.aten.rand.default:
                with graph.graph.inserting_before(node):
                    half = graph.graph.call_function(
                        torch.ops.aten.full.default, (node.args[0], 0.4)
                    )
                node.replace_all_uses_with(half)
        return old(graph, *args)

    patch.setattr(recording, "_lift", lift)


def another_loss(patch: Patch) -> None:
    patch.setattr(recording, "_loss", lambda found: found.detach() * 1.001)


def a_gradient_is_lost(patch: Patch) -> None:
    old = recording._trained
    patch.setattr(recording, "_trained", lambda found, met: old(found, met)[1:])


def gradients_are_swapped(patch: Patch) -> None:
    old = routine.record

    def record(*args: Any) -> Any:
        found = old(*args)
        found.trained.reverse()
        return found

    patch.setattr(routine, "record", record)


def numbers_are_not_watched(patch: Patch) -> None:
    patch.setattr(places.Surroundings, "changed", lambda self, values, alike=False: None)


def only_functions_are_looked_into(patch: Patch) -> None:
    patch.setattr(places.Surroundings, "_object", lambda self, thing, label: None)


def containers_are_not_looked_into(patch: Patch) -> None:
    patch.setattr(places.Surroundings, "_container", lambda self, thing, label: None)


def classes_are_not_looked_into(patch: Patch) -> None:
    patch.setattr(places.Surroundings, "_class", lambda self, cls: None)


def another_code_is_no_change(patch: Patch) -> None:
    patch.setattr(places, "_alike", lambda a, b: type(a) is type(b))


def assignments_are_dropped(patch: Patch) -> None:
    old = routine._replay

    def replay(variant: Any, call: Any) -> Any:
        kept = [variant.around.places[i] for i in variant.recording.assigned]
        with places.swapped(kept, lambda old: old):
            return old(variant, call)

    patch.setattr(routine, "_replay", replay)


def places_are_those_of_the_recording(patch: Patch) -> None:
    """What has taken the place of a tensor is not seen."""
    old = recording.Recording.inputs
    kept: dict[int, list[Tensor]] = {}

    def inputs(self: Any, tensors: Any, leaves: Any) -> list[Tensor]:
        return kept.setdefault(id(self), old(self, tensors, leaves))

    patch.setattr(recording.Recording, "inputs", inputs)


def outside_is_called_once(patch: Patch) -> None:
    old, answers = outside.OutsideCall.__call__, {}

    def call(self: Any, tensors: Any) -> Tensor:
        if id(self) not in answers:
            answers[id(self)] = self, old(self, tensors)
        return answers[id(self)][1].clone()

    patch.setattr(outside.OutsideCall, "__call__", call)


def an_unused_answer_is_not_asked_for(patch: Patch) -> None:
    old = recording._lift

    def lift(graph: fx.GraphModule, *args: Any) -> list[Tensor]:
        graph.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        return old(graph, *args)

    patch.setattr(recording, "_lift", lift)


def shapes_do_not_count(patch: Patch) -> None:
    old = routine.call_of
    patch.setattr(routine, "call_of", lambda arguments: old(arguments)._replace(shapes=None))


def options_are_read_once(patch: Patch) -> None:
    patch.setattr(fused._Joined, "fits", lambda self: True)


def all_options_are_those_of_the_first(patch: Patch) -> None:
    patch.setattr(fused, "_grouped", lambda ps, singles: [fused._Joined(ps, singles)])


def nothing_is_clipped(patch: Patch) -> None:
    old = fused.FusedOptimizer._meet

    def meet(self: Any, parameter: Tensor) -> None:
        old(self, parameter)
        self.optim.grad_clip[parameter] = None

    patch.setattr(fused.FusedOptimizer, "_meet", meet)


def momentum_stops(patch: Patch) -> None:
    old = fused.FusedOptimizer.step

    def step(self: Any, parameters: Any) -> None:
        self._moved.clear()
        old(self, parameters)

    patch.setattr(fused.FusedOptimizer, "step", step)


def the_rate_does_not_decay(patch: Patch) -> None:
    old = fused._Joined.step

    def step(self: Any) -> None:
        before = [dict(options) for options in self.options]
        old(self)
        for options, values in zip(self.options, before, strict=True):
            options.update(values)
        self.optimizer.param_groups[0].update({k: before[0][k] for k in self.keys})

    patch.setattr(fused._Joined, "step", step)


def _changes(place: Callable[[], Any]) -> Callable[[], None]:
    return lambda: test_compiled_changes.test_numbers_are_watched(place)


def _estimator(estimator: Any) -> Callable[[], None]:
    return lambda: test_compiled.test_each_estimator(estimator)


def _optimiser(name: str) -> Callable[[], None]:
    return lambda: test_fused.test_moves_as_in_pyro(name)


BUGS: list[tuple[Callable[[Patch], None], Callable[[], None]]] = [
    (draws_are_constants, _estimator(REINFORCE())),
    (another_loss, _estimator(REINFORCE())),
    (a_gradient_is_lost, _estimator(REINFORCE(MovingAverage()))),
    (gradients_are_swapped, _estimator(RELAX())),
    (numbers_are_not_watched, _changes(test_compiled_changes.a_closure)),
    (numbers_are_not_watched, test_compiled_changes.test_a_number_that_the_program_keeps),
    (only_functions_are_looked_into, _changes(test_compiled_changes.an_attribute)),
    (containers_are_not_looked_into, _changes(test_compiled_changes.a_list)),
    (classes_are_not_looked_into, _changes(test_compiled_changes.a_class_attribute)),
    (another_code_is_no_change, _changes(test_compiled_changes.a_function)),
    (assignments_are_dropped, test_compiled_changes.test_a_tensor_that_the_program_keeps),
    (
        places_are_those_of_the_recording,
        lambda: test_compiled_changes.test_tensors_are_inputs("a list", in_place=False),
    ),
    (outside_is_called_once, test_compiled.test_what_an_external_op_calls_may_change),
    (
        an_unused_answer_is_not_asked_for,
        lambda: test_compiled.test_external_ops_are_called_at_each_step("replay", None),
    ),
    (shapes_do_not_count, test_compiled.test_smaller_last_batch_is_recorded_anew),
    (options_are_read_once, lambda: test_fused.test_schedulers("exponential")),
    (all_options_are_those_of_the_first, _optimiser("options by name")),
    (nothing_is_clipped, _optimiser("clipped values")),
    (momentum_stops, test_fused.test_a_parameter_without_gradient_goes_on_by_momentum),
    (the_rate_does_not_decay, _optimiser("ClippedAdam")),
]


@pytest.mark.parametrize(("bug", "check"), BUGS, ids=lambda x: getattr(x, "__name__", ""))
def test_bug_is_caught(
    bug: Callable[[Patch], None], check: Callable[[], None], monkeypatch: Patch
) -> None:
    bug(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, UserWarning, pytest.fail.Exception)):
        check()
    with suppress(AttributeError):
        monkeypatch.undo()


@pytest.mark.parametrize("check", [check for _, check in BUGS])
def test_checks_pass_without_a_bug(check: Callable[[], None]) -> None:
    """So that what they find is the bug."""
    check()
