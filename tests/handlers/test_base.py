"""Which ops a handler is for, how it is put on, and who wins."""

import pyro
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.handlers import AbstractHandler, soften
from pyro_nondiff.handlers.base import Sites
from pyro_nondiff.ops import argmax, op, step

SCORES = torch.tensor([0.0, 2.0, 1.0])
HARD = torch.tensor([0.0, 1.0, 0.0])


def program(scores: Tensor) -> Tensor:
    return argmax("z", scores)


def test_context_decorator_and_wrapper_are_the_same() -> None:
    with soften():
        in_context = program(SCORES)
    wrapped = soften()(program)(SCORES)

    @soften()
    def decorated() -> Tensor:
        return program(SCORES)

    torch.testing.assert_close(in_context, SCORES.softmax(-1), rtol=0, atol=0)
    torch.testing.assert_close(wrapped, in_context, rtol=0, atol=0)
    torch.testing.assert_close(decorated(), in_context, rtol=0, atol=0)


def test_innermost_that_applies_wins() -> None:
    with soften(0.1), soften(10.0):
        found = program(SCORES)
    torch.testing.assert_close(found, (SCORES / 10).softmax(-1), rtol=0, atol=0)
    with soften(0.1), soften(10.0, sites=lambda name: name == "other"):
        found = program(SCORES)
    torch.testing.assert_close(found, (SCORES / 0.1).softmax(-1), rtol=0, atol=0)


@pytest.mark.parametrize(
    "sites", ["z", ["z"], {"z": 1}, lambda name: name == "z"], ids=["name", "list", "dict", "fn"]
)
def test_sites_pick_ops_by_name(sites: Sites) -> None:
    with soften(sites=sites):
        found = program(SCORES), step("h", SCORES)
    torch.testing.assert_close(found[0], SCORES.softmax(-1), rtol=0, atol=0)
    torch.testing.assert_close(found[1], torch.ones(3), rtol=0, atol=0)


def test_name_that_the_program_does_not_meet_is_an_error() -> None:
    with pytest.raises(NonDiffError, match=r"soften: sites has \['y'\], but .* met \['z'\]"):
        soften(sites=["y", "z"])(program)(SCORES)


def test_an_error_of_the_program_is_not_hidden_by_names_that_it_did_not_reach() -> None:
    with pytest.raises(KeyError), soften(sites="y"):
        raise KeyError


def test_a_handler_may_be_used_again() -> None:
    handler = soften(sites="z")
    handler(program)(SCORES)
    with pytest.raises(NonDiffError, match="met \\[\\]"), handler:
        pass


@op
def sign(name: str, x: Tensor) -> Tensor:
    """An op of the user's own, with no rule."""
    return x.sign()


def test_op_without_rule_passes_to_the_next_handler() -> None:
    class outer(AbstractHandler):
        pass

    @outer.rule(sign)
    def _(handler: outer, name: str, x: Tensor) -> Tensor:
        return x

    with outer(), soften():
        assert sign("s", SCORES) is SCORES


def test_op_without_rule_that_sites_picks_is_an_error() -> None:
    expected = r"soften has no rule for op 's', which is of kind sign: it knows \['argmax'"
    for sites in ("s", lambda name: True):
        with pytest.raises(NonDiffError, match=expected), soften(sites=sites):
            sign("s", SCORES)


def test_rules_are_a_class_s_own() -> None:
    class one(AbstractHandler):
        pass

    class two(AbstractHandler):
        pass

    one.rule(sign)(lambda handler, name, x: x)
    assert list(one.rules) == [sign]
    assert two.rules == {}


@pytest.mark.usefixtures("param_store")
def test_wrapped_module_keeps_its_parameters() -> None:
    class Program(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Parameter(SCORES.clone())

        def forward(self) -> Tensor:
            return argmax("z", self.scores)

    module = soften()(Program())
    assert isinstance(module, nn.Module)
    assert len(list(module.parameters())) == 1
    assert module().requires_grad


def test_block_between_hides_ops_from_a_handler() -> None:
    with soften(), poutine.block():
        hidden = program(SCORES)
    with soften(), poutine.block(hide=["z"]):
        hidden_by_name = program(SCORES)
    with soften(), poutine.block(hide=["other"]):
        seen = program(SCORES)
    torch.testing.assert_close(hidden, HARD, rtol=0, atol=0)
    torch.testing.assert_close(hidden_by_name, HARD, rtol=0, atol=0)
    torch.testing.assert_close(seen, SCORES.softmax(-1), rtol=0, atol=0)


def test_sample_sites_are_untouched() -> None:
    with soften():
        z = pyro.sample("z", pyro.distributions.Delta(SCORES))
    assert torch.equal(z, SCORES)
