"""Recorded steps do the same when they are simplified, reordered, cut and compiled."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import Adam
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_nondiff.estimators import REINFORCE, RLOO, MovingAverage
from pyro_nondiff.infer import TraceEstimator_ELBO
from pyro_nondiff.infer.capture import backends, pieces, routine
from pyro_nondiff.infer.capture.pieces import CannotCutError, cut, in_pieces, ordered
from pyro_nondiff.infer.capture.simplify import operations, simplify
from pyro_nondiff.infer.compiled import CompiledSVI

ESTIMATORS = {"rloo": RLOO(2), "average": REINFORCE(baseline=MovingAverage())}
Function = Callable[..., Any]

pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")


@pytest.fixture(autouse=True)
def _short_pieces(monkeypatch: pytest.MonkeyPatch, param_store: None) -> None:
    monkeypatch.setattr(pieces, "SIZE", 60)


def plain(module: fx.GraphModule, _example: list[Tensor]) -> Function:
    """Stands in for a compiler."""
    return module.forward


def recorded(
    monkeypatch: pytest.MonkeyPatch, estimator: str, length: int
) -> tuple[fx.GraphModule, list[Tensor]]:
    """The recorded step of a chain of bits."""
    weights = torch.linspace(-1, 1, 2 * length).reshape(2, length)

    def model() -> None:
        z = torch.zeros(())
        for t in range(length):
            z = pyro.sample(f"z{t}", dist.Bernoulli(logits=2 * z - 1))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(()))

    def guide() -> None:
        rows = pyro.param(f"weights.{length}", weights)
        z = torch.zeros(())
        for t, (slope, offset) in enumerate(zip(*(row.unbind() for row in rows), strict=True)):
            z = pyro.sample(f"z{t}", dist.Bernoulli(logits=slope * z + offset))

    found = []

    def keep(graph: fx.GraphModule, example: list[Tensor], backend: Any, size: int) -> Any:
        found.append((graph, [tensor.detach() for tensor in example]))
        return backends.runner(graph, example, backend, size)

    with monkeypatch.context() as patch:
        patch.setattr(routine, "runner", keep)
        elbo = TraceEstimator_ELBO(ESTIMATORS[estimator])
        svi = CompiledSVI(model, guide, Adam({"lr": 1e-3}), elbo, backend="replay")
        svi.step()
        svi.step()
    return found[0]


def graph_of(function: Function, *example: Tensor) -> fx.GraphModule:
    """A recorded function."""
    return make_fx(function, tracing_mode="fake")(*example)


def outcome(call: Function, example: list[Tensor]) -> list[Tensor]:
    """What a function returns, how it leaves its arguments, and the number drawn next."""
    given = [tensor.clone() for tensor in example]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        return [*call(*given), *given, torch.rand(())]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Equal up to the rounding of a sum in another order."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_chain(monkeypatch: pytest.MonkeyPatch, estimator: str) -> None:
    graph, example = recorded(monkeypatch, estimator, 30)
    expected = outcome(graph.forward, example)
    size = len(operations(graph))
    simplify(graph)
    assert len(operations(graph)) < 0.8 * size
    assert_same(outcome(graph.forward, example), expected)
    whole, _ = in_pieces(graph, plain)
    assert_same(outcome(whole.forward, example), expected)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_chain_compiled_in_pieces(monkeypatch: pytest.MonkeyPatch, estimator: str) -> None:
    graph, example = recorded(monkeypatch, estimator, 12)
    expected = outcome(graph.forward, example)
    compiled = []
    inductor = backends._inductor
    monkeypatch.setattr(backends, "WHOLE", 100)
    monkeypatch.setattr(
        backends, "_inductor", lambda *args: compiled.append(args) or inductor(*args)
    )
    run = backends.runner(graph, example, "inductor", len(operations(graph)))
    assert len(compiled) > 1
    assert_same(outcome(lambda *given: run(list(given)), example), expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_number_of_different_pieces_does_not_grow(
    monkeypatch: pytest.MonkeyPatch, estimator: str
) -> None:
    counts, pieces = [], []
    for length in (80, 160):
        graph, _ = recorded(monkeypatch, estimator, length)
        simplify(graph)
        counts.append(in_pieces(graph, plain)[1])
        pieces.append(len(cut(operations(graph))))
    assert counts[0] == counts[1] < pieces[0] < pieces[1]


def test_errors_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, example = recorded(monkeypatch, "average", 30)
    expected = outcome(graph.forward, example)
    simplify(graph)

    def wrong(module: fx.GraphModule, _example: list[Tensor]) -> Function:
        return lambda *given: [tensor * 1.00001 for tensor in module(*given)]

    whole, _ = in_pieces(graph, wrong)
    with pytest.raises(AssertionError):
        assert_same(outcome(whole.forward, example), expected)


def test_pieces_that_differ_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    def loop(x: Tensor) -> list[Tensor]:
        for i in range(40):
            x = torch.sin(x) * (1 + i // 20) + torch.cos(x) - 0.5
        return [x]

    graph, example = graph_of(loop, torch.ones(3)), [torch.ones(3)]
    expected = outcome(graph.forward, example)
    whole, _ = in_pieces(graph, plain)
    assert_same(outcome(whole.forward, example), expected)
    monkeypatch.setattr(pieces.Piece, "key", lambda self: str(len(self.nodes)))
    whole, _ = in_pieces(graph, plain)
    with pytest.raises(AssertionError):
        assert_same(outcome(whole.forward, example), expected)


def test_draws_of_all_kinds_keep_their_order() -> None:
    def draw(x: Tensor) -> list[Tensor]:
        found = [torch.rand(3) for _ in range(4)]
        found += [torch.rand(2), torch.rand(2), torch.randn(3), torch.rand(2)]
        found += [torch.empty(3).exponential_(), torch.rand(3).logit_(), torch.bernoulli(x)]
        found += [torch.rand(3, dtype=torch.float64), torch.rand(3), torch.rand(3).mul_(2)]
        return [sum((a.sum() * i for i, a in enumerate(found)), x), *found]

    example = [torch.full((3,), 0.5)]
    graph = graph_of(draw, *example)
    expected = outcome(graph.forward, example)
    assert_same(outcome(draw, example), expected)
    simplify(graph)
    drawn = [node for node in operations(graph) if node.target is torch.ops.aten.rand.default]
    assert len(drawn) < 11
    assert_same(outcome(graph.forward, example), expected)
    whole, _ = in_pieces(graph, plain)
    assert_same(outcome(whole.forward, example), expected)


def change(x: Tensor, y: Tensor) -> list[Tensor]:
    """Reads and changes its arguments, through views too."""
    total = torch.zeros(())
    for i in range(30):
        row = y[i % 3]
        before = x.clamp(min=0.1) + row
        x.mul_(0.9)
        row.add_(x.sum())
        after = x.clamp(min=0.1) + row
        total = total + (before * after).sum()
    return [total, y.sum()]


def test_changes_in_place_keep_their_order() -> None:
    example = [torch.linspace(-1, 1, 4), torch.ones(3, 4)]
    graph = graph_of(change, *example)
    expected = outcome(graph.forward, example)
    assert_same(outcome(change, example), expected)
    simplify(graph)
    assert_same(outcome(graph.forward, example), expected)
    (output,) = graph.graph.find_nodes(op="output")
    for node in ordered(operations(graph)):
        output.prepend(node)
    graph.recompile()
    assert_same(outcome(graph.forward, example), expected)


def test_memory_that_is_shared_is_not_cut() -> None:
    def share(x: Tensor, y: Tensor) -> list[Tensor]:
        for _ in range(30):
            x.mul_(0.5)
            y = torch.sin(y) + 1
        return [y]

    x = torch.ones(3)
    graph = graph_of(share, x, x[:2])
    with pytest.raises(CannotCutError, match="share memory"):
        in_pieces(graph, plain)
    graph = graph_of(change, torch.ones(4), torch.ones(3, 4))
    with pytest.raises(CannotCutError, match="several pieces"):
        in_pieces(graph, plain)
