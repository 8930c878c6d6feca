"""However its worlds are run, a step with the same noise gives the same gradient."""

import zlib
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_nondiff import noise
from pyro_nondiff.estimators import REINFORCE, RLOO, DisARM, Enumerate, MovingAverage
from pyro_nondiff.infer import TraceEstimator_ELBO, config_estimator
from pyro_nondiff.noise import Request

from . import programs
from .programs import BERNOULLI, KINDS, Pair, Structure, parameter

pytestmark = pytest.mark.filterwarnings(
    # what it says is true of some structures, and costs variance only
    "ignore:site '.*' lies in a plate that the later guide site"
)

CLOSE = {"rtol": 0.0, "atol": 1e-10}
"""The same sums in another order."""


class Recorded:
    """Noise that depends on the site and the base world alone.

    Runs that follow one another ask for one base world each; one run of all of them asks for
    the noise of all at once.

    Arguments:
        worlds: The number of base worlds.
        together: Whether they are one run.
    """

    def __init__(self, worlds: int, together: bool) -> None:
        self.worlds = worlds
        self.together = together
        self.calls: dict[str, int] = {}

    def __call__(self, request: Request) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(request.site.encode()))
        table = torch.randn(self.worlds, 64, generator=generator)
        call = self.calls.get(request.site, 0)
        self.calls[request.site] = call + 1
        rows = table if self.together else table[call : call + 1]
        size = torch.Size(request.shape).numel() // len(rows)
        return rows[:, :size].reshape(request.shape)


def step(elbo: TraceEstimator_ELBO, pair: Pair) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients of a step with recorded noise."""
    elbo.differentiable_loss(*pair)  # with other noise: how worlds are run is found out
    for buffer in elbo.states.buffers():
        buffer.fill_(0.7)
    parameters = dict(pyro.get_param_store().named_parameters())
    worlds = elbo.unreduced(*pair).loss.shape[0]
    with noise.source(Recorded(worlds, together=elbo.worlds != "sequential")):
        loss = elbo.differentiable_loss(*pair)
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(parameters.items(), found, strict=True)
    }
    return loss.detach(), gradients


def check_agree(estimator: Any, pair: Pair, **options: Any) -> None:
    """Fails unless sequential worlds give what vectorised ones give."""
    together = step(TraceEstimator_ELBO(estimator, worlds="vectorized", **options), pair)
    apart = step(TraceEstimator_ELBO(estimator, worlds="sequential", **options), pair)
    torch.testing.assert_close(apart, together, **CLOSE)


ESTIMATORS = {
    "reinforce": REINFORCE(),
    "average": REINFORCE(MovingAverage()),
    "rloo": RLOO(3),
    "disarm": DisARM(),
    "enumerate": Enumerate(),
}
STRUCTURES = {
    programs.chain: {},
    programs.reversed_layers: {},
    programs.nested_plates: {},
    programs.scaled: {},
    programs.local_plate: {},
    programs.local_global_local: {"enumerate"},
    programs.late_global: {"enumerate"},
    programs.one_of_two_plates: {"enumerate"},
    programs.plates_that_share_a_dimension: {"enumerate"},
    programs.sequential_plate: {},
    programs.auxiliary: {},
    programs.continuous_between: {},
    programs.continuous_global: {"enumerate"},
}
"""Structures, with the estimators that refuse them."""

COMBINATIONS = [
    pytest.param(structure, name, id=f"{structure.__name__}-{name}")
    for structure, refused in STRUCTURES.items()
    for name in ESTIMATORS
    if name not in refused
]


@pytest.mark.parametrize(("structure", "name"), COMBINATIONS)
def test_sequential_worlds_give_the_same(structure: Structure, name: str) -> None:
    check_agree(ESTIMATORS[name], structure(BERNOULLI))


@pytest.mark.parametrize("kind", ["one_hot", "categorical", "bits"])
@pytest.mark.parametrize("name", ["reinforce", "rloo", "enumerate"])
@pytest.mark.parametrize("structure", [programs.chain, programs.local_plate])
def test_sequential_worlds_with_other_laws(structure: Structure, name: str, kind: str) -> None:
    check_agree(ESTIMATORS[name], structure(KINDS[kind]))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_sequential_worlds_with_particles(name: str) -> None:
    check_agree(ESTIMATORS[name], programs.local_plate(BERNOULLI), num_particles=4)


def test_sequential_worlds_with_a_mixture() -> None:
    model, guide = programs.chain(BERNOULLI)
    estimators = {"z1": DisARM(), "z2": Enumerate(), "z3": RLOO(2)}
    check_agree(None, (model, config_estimator(guide, estimators)))


def mixed_shapes(concatenate: bool) -> Pair:
    """A model that joins two values; with ``concatenate`` they must have one shape."""

    def model() -> None:
        p = parameter("p", 0.3)
        with pyro.plate("data", 2):
            u = pyro.sample("u", dist.Bernoulli(logits=p))
            z = pyro.sample("z", dist.Bernoulli(logits=p))
            pair = (u, z) if concatenate else torch.broadcast_tensors(u, z)
            both = torch.cat([value.unsqueeze(-1) for value in pair], -1)
            loc = both.prod(-1) + (both * torch.tensor([1.0, -0.4])).sum(-1)
            pyro.sample("x", dist.Normal(loc, 1.3), obs=torch.tensor([0.8, -0.9]))

    def guide() -> None:
        a, b = parameter("a", -0.4), parameter("b", 0.6)
        with pyro.plate("data", 2):
            pyro.sample("u", dist.Bernoulli(logits=a * torch.tensor([1.0, -0.7])))
            pyro.sample("z", dist.Bernoulli(logits=b * torch.tensor([1.0, 0.2])))

    return model, guide


@pytest.mark.parametrize("first", [REINFORCE(), RLOO(2)], ids=repr)
@pytest.mark.parametrize("second", [DisARM(), Enumerate()], ids=repr)
def test_expanded_worlds_give_the_same(first: Any, second: Any) -> None:
    found = []
    for concatenate, worlds, mode in [
        (False, "auto", "plain"),
        (True, "auto", "expanded"),
        (True, "sequential", "sequential"),
    ]:
        model, guide = mixed_shapes(concatenate)
        pair = model, config_estimator(guide, {"u": first, "z": second})
        elbo = TraceEstimator_ELBO(worlds=worlds)
        found.append(step(elbo, pair))
        plans = {plan.mode for plan in elbo._planner._plans.values()}
        assert plans == {mode}
    torch.testing.assert_close(found[1], found[0], **CLOSE)
    torch.testing.assert_close(found[2], found[0], **CLOSE)


# --- the plate's own subsample ----------------------------------------------------------------


@pytest.mark.parametrize("worlds", ["vectorized", "sequential"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_drawn_subsample_is_one_for_all_worlds(name: str, worlds: str) -> None:
    """A step under ``subsample_size`` is the step under the indices that it drew."""
    data, drawn = torch.tensor([0.3, -0.8, 1.2, 2.1]), []

    def pair(given: Tensor | None) -> Pair:
        def plate() -> Any:
            if given is None:
                return pyro.plate("data", 4, subsample_size=2)
            return pyro.plate("data", 4, subsample=given)

        def model() -> None:
            p = parameter("p", 0.3)
            with plate() as index:
                drawn.append(index.clone())
                z = pyro.sample("z", dist.Bernoulli(logits=p))
                pyro.sample("x", dist.Normal(1.5 * z - p, 1.3), obs=data[index])

        def guide() -> None:
            a = parameter("a", -0.4)
            with plate() as index:
                drawn.append(index.clone())
                pyro.sample("z", dist.Bernoulli(logits=a * data[index]))

        return model, guide

    elbo = TraceEstimator_ELBO(ESTIMATORS[name], worlds=worlds)
    own = pair(None)
    elbo.differentiable_loss(*own)
    seen = set()
    for _ in range(4):
        start = len(drawn)
        found = step(elbo, own)
        last = drawn[-1]
        assert len(drawn) > start + 1
        seen.add(tuple(sorted(last.tolist())))
        given = step(TraceEstimator_ELBO(ESTIMATORS[name], worlds=worlds), pair(last))
        torch.testing.assert_close(found, given, **CLOSE)
    assert all(0 <= i < 4 for indices in seen for i in indices)
