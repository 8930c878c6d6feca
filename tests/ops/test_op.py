"""An op is an effect: it has a name, is recorded once, and runs with an empty stack."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.handlers import AbstractHandler
from pyro_nondiff.ops import Drawn, argmax, external, op, select, step

SCORES = torch.tensor([0.0, 2.0, 1.0])
HARD = torch.tensor([0.0, 1.0, 0.0])


def test_runs_with_an_empty_stack() -> None:
    assert torch.equal(argmax("z", SCORES), HARD)


def test_is_recorded_like_a_deterministic_site() -> None:
    def program() -> None:
        argmax("z", SCORES)
        select("v", SCORES, torch.arange(3.0))
        step("h", SCORES)
        external("e", float, SCORES[0])

    trace = poutine.trace(program).get_trace()
    recorded = {name: trace.nodes[name] for name in ("z", "v", "h", "e")}
    assert all(site["infer"]["_deterministic"] for site in recorded.values())
    assert torch.equal(recorded["z"]["value"], HARD)
    assert torch.equal(recorded["v"]["value"], HARD)  # the choice, not the item
    assert torch.equal(recorded["h"]["value"], torch.ones(3))
    assert recorded["e"]["value"] == 0
    assert trace.log_prob_sum() == 0


def test_two_of_the_same_name_are_refused_by_pyro() -> None:
    def program() -> None:
        argmax("z", SCORES)
        argmax("z", SCORES)

    with pytest.raises(RuntimeError, match="Multiple sample sites named 'z'"):
        poutine.trace(program).get_trace()


def test_name_comes_first() -> None:
    with pytest.raises(NonDiffError, match=r"argmax: the first .* found Tensor\. Write argmax"):
        argmax(SCORES)


def test_signature_and_docstring_are_the_function_s() -> None:
    @op
    def half(name: str, x: Tensor) -> Tensor:
        """Half."""
        return x / 2

    assert half.__name__ == "half"
    assert half.__doc__ == "Half."
    assert half("h", SCORES)[1] == 1


def test_value_that_is_drawn_may_be_made_of_the_site_s() -> None:
    class shifted(AbstractHandler):
        pass

    @shifted.rule(step)
    def _(handler: shifted, name: str, x: Tensor) -> Drawn:
        return Drawn(dist.Delta(x), then=lambda drawn: drawn + 1)

    with shifted(), poutine.trace() as recorded:
        assert step("h", torch.tensor(2.0)) == 3
    assert recorded.trace.nodes["h"]["value"] == 2
    assert not recorded.trace.nodes["h"]["is_observed"]


def test_value_given_by_pyro_is_no_longer_hard() -> None:
    """A ``select`` then sums by the weights that ``condition`` has given."""
    weights = torch.tensor([0.5, 0.5, 0.0])
    with poutine.condition(data={"v": weights}):
        found = select("v", SCORES, torch.tensor([1.0, 3.0, 9.0]))
    assert found == 2


def test_op_in_a_plate_keeps_its_value() -> None:
    def program() -> Tensor:
        with pyro.plate("outer", 4, dim=-2), pyro.plate("data", 2):
            return argmax("z", SCORES.expand(2, 3))

    trace = poutine.trace(program).get_trace()
    assert trace.nodes["_RETURN"]["value"].shape == (2, 3)
    assert trace.nodes["z"]["fn"].batch_shape == (4, 2)
    trace.compute_log_prob()
