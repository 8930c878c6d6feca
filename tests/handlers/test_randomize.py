"""randomize: an op becomes a sample site. mode: a site takes its most probable value."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_nondiff.distributions import ExponentialAnnealing, StraightThroughBernoulli
from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.estimators import RLOO
from pyro_nondiff.handlers import mode, randomize, soften
from pyro_nondiff.handlers._randomize import _HardNormal
from pyro_nondiff.infer import ExpectedCost, no_guide
from pyro_nondiff.ops import argmax, cost, crop, external, paste, select, step, warp

X = torch.tensor([[0.3, -1.0, 2.0], [5.0, 0.0, 4.0]])


def sites(temperature: Any, **options: Any) -> Any:
    with randomize(temperature), poutine.trace() as recorded:
        argmax("z", X)
        step("h", X)
    return recorded.trace.nodes


def check_laws_have_the_scores_at_the_temperature_as_logits() -> None:
    nodes = sites(0.5)
    z, h = nodes["z"]["fn"], nodes["h"]["fn"]
    assert isinstance(z, dist.OneHotCategorical)
    assert isinstance(h, dist.Bernoulli)
    # the same numbers, normalised in two ways
    torch.testing.assert_close(z.probs, (2 * X).softmax(-1))
    torch.testing.assert_close(h.probs, (2 * X).sigmoid())
    assert not nodes["z"]["is_observed"]
    assert nodes["z"]["infer"] == {"randomized": True}


def test_laws_have_the_scores_at_the_temperature_as_logits() -> None:
    check_laws_have_the_scores_at_the_temperature_as_logits()


def test_planted_randomize_without_temperature_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_nondiff.handlers._randomize.current", lambda *args: 1.0)
    with pytest.raises(AssertionError):
        check_laws_have_the_scores_at_the_temperature_as_logits()


def test_temperature_may_be_a_tensor_or_a_schedule() -> None:
    schedule = ExponentialAnnealing(1.0, 0.25, num_steps=2)
    schedule.step()
    expected = (2 * X).softmax(-1)
    for temperature in (torch.tensor(0.5), schedule):
        probs = sites(temperature)["z"]["fn"].probs
        torch.testing.assert_close(probs, expected, rtol=1e-6, atol=0)  # the schedule's float32


def test_event_dim_says_what_no_plate_declares() -> None:
    with randomize(), poutine.trace() as recorded:
        argmax("z", X, event_dim=2)
        step("h", X, event_dim=1)
    z, h = (recorded.trace.nodes[name]["fn"] for name in ("z", "h"))
    assert (z.batch_shape, z.event_shape) == ((), (2, 3))
    assert (h.batch_shape, h.event_shape) == ((2,), (3,))


def test_values_are_hard_draws() -> None:
    with randomize():
        z, h = argmax("z", X.expand(4000, 2, 3)), step("h", X.expand(4000, 2, 3))
    assert torch.equal(z.unique(), torch.tensor([0.0, 1.0]))
    assert torch.equal(z.sum(-1), torch.ones(4000, 2))
    # five standard errors of the mean of 4000 draws of a probability: at most 5 * 0.5 / 63
    torch.testing.assert_close(z.mean(0), X.softmax(-1), rtol=0, atol=0.04)
    torch.testing.assert_close(h.mean(0), X.sigmoid(), rtol=0, atol=0.04)


def test_select_takes_the_drawn_item() -> None:
    with randomize(), poutine.trace() as recorded:
        found = select("v", X[0], torch.tensor([1.0, 2.0, 3.0]))
    assert found == (recorded.trace.nodes["v"]["value"] * torch.tensor([1.0, 2.0, 3.0])).sum()


def test_external_passes_and_is_refused_by_name() -> None:
    with randomize():
        assert external("e", float, X[0, 0]) == X[0, 0]
    with pytest.raises(NonDiffError, match="randomize has no rule for op 'e'"):
        randomize(sites="e")(external)("e", float, X[0, 0])


@pytest.mark.parametrize("inner_first", [True, False])
def test_mode_of_a_randomised_op_is_its_hard_value(inner_first: bool) -> None:
    handlers = [randomize(0.1), mode()] if inner_first else [mode(), randomize(0.1)]
    x = torch.cat([X, torch.zeros(1, 3)])
    with handlers[0], handlers[1]:
        z, h = argmax("z", x), step("h", x)
        v = select("v", x, torch.arange(3.0))
    assert torch.equal(z, argmax("z", x))
    assert torch.equal(h, step("h", x))
    assert torch.equal(v, select("v", x, torch.arange(3.0)))


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        (dist.Bernoulli(torch.tensor([0.2, 0.5, 0.7])), [0.0, 1.0, 1.0]),
        (dist.Bernoulli(torch.tensor([0.2, 0.7])).to_event(1), [0.0, 1.0]),
        (dist.Bernoulli(torch.tensor(0.7)).expand([2]), [1.0, 1.0]),
        (dist.Bernoulli(torch.tensor([0.2, 0.7])).mask(torch.tensor([True, False])), [0.0, 1.0]),
        (dist.OneHotCategorical(torch.tensor([0.2, 0.5, 0.3])), [0.0, 1.0, 0.0]),
        (dist.Categorical(torch.tensor([[0.2, 0.5, 0.3]])), [1]),
        (dist.Normal(torch.tensor([1.0, 2.0]), 3.0), [1.0, 2.0]),
        (dist.LogNormal(torch.zeros(1), 1.0), [torch.tensor(-1.0).exp()]),
        (dist.Delta(torch.tensor([4.0])), [4.0]),
        (StraightThroughBernoulli(torch.tensor([0.2, 0.7])), [0.0, 1.0]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_mode_of_a_law(law: Any, expected: list[float]) -> None:
    with mode():
        found = pyro.sample("x", law)
    torch.testing.assert_close(found, torch.tensor(expected))  # exp(-1) is rounded


@pytest.mark.parametrize(
    "law",
    [dist.Uniform(0.0, 1.0), dist.RelaxedBernoulliStraightThrough(torch.tensor(1.0), probs=0.5)],
    ids=["Uniform", "Relaxed"],
)
def test_law_without_mode_is_refused(law: Any) -> None:
    with pytest.raises(NonDiffError, match=r"mode: site 'x' has law .*mode.sites="), mode():
        pyro.sample("x", law)


def test_mode_leaves_observed_sites_plates_and_other_names() -> None:
    def program() -> None:
        with pyro.plate("data", 4, subsample_size=2):
            pyro.sample("x", dist.Uniform(0.0, 1.0), obs=torch.tensor([0.3, 0.4]))
            pyro.sample("y", dist.Uniform(0.0, 1.0))
            pyro.sample("z", dist.Normal(0.0, 1.0))

    trace = poutine.trace(mode(sites="z")(program)).get_trace()
    assert torch.equal(trace.nodes["z"]["value"], torch.zeros(2))
    assert torch.equal(trace.nodes["x"]["value"], torch.tensor([0.3, 0.4]))
    assert trace.nodes["y"]["value"].unique().numel() == 2


def test_mode_does_not_touch_ops_that_are_no_sites() -> None:
    with soften(), mode():
        assert torch.equal(argmax("z", X), X.softmax(-1))
    with pytest.raises(NonDiffError, match=r"mode: sites has \['z'\], but the program met \[\]"):
        mode(sites="z")(argmax)("z", X)


# --- places of images -------------------------------------------------------------------------

IMAGE = torch.arange(64.0).reshape(1, 8, 8)
BOX = torch.tensor([0.25, 0.25, 0.5, 0.5])
THETA = torch.tensor([[0.5, 0.0, 0.1], [0.0, 0.5, -0.2]])
PLACED = {
    "crop": (lambda: crop("place", IMAGE, BOX, (4, 4)), BOX),
    "paste": (lambda: paste("place", IMAGE, BOX, (8, 8)), BOX),
    "warp": (lambda: warp("place", IMAGE, THETA, (4, 4)), THETA),
}


# Where a scale is 0, and in which numbers the place then moves.
FIXED = {
    "crop": (torch.tensor([0.2, 0.1, 0.0, 0.0]), [0, 1]),
    "paste": (torch.tensor([0.0, 0.2, 0.0, 0.1]), [1, 3]),
    "warp": (torch.tensor([[0.0, 0.0, 0.2], [0.0, 0.0, 0.1]]), [2, 5]),
}


@pytest.mark.parametrize("name", PLACED)
def test_a_place_is_a_normal_site_and_what_is_there_stays_hard(name: str) -> None:
    program, place = PLACED[name]
    with poutine.trace() as recorded:
        value = randomize(scale=0.2)(program)()
    site = recorded.trace.nodes["place"]
    assert (site["fn"].batch_shape, site["fn"].event_shape) == ((), place.shape)
    assert torch.equal(site["fn"].mean, place)
    assert torch.equal(site["fn"].stddev, torch.full_like(place, 0.2))
    assert torch.equal(value, value.round())  # whole pixels, of whole numbers
    assert torch.equal(mode()(randomize()(program))(), program())


@pytest.mark.parametrize("name", PLACED)
@pytest.mark.parametrize("scale", [0.2, None])
def test_a_place_in_a_plate_is_expanded_and_has_no_path(name: str, scale: float | None) -> None:
    program, _ = PLACED[name]
    handler = randomize(scale=FIXED[name][0] if scale is None else scale)
    with poutine.trace() as recorded, pyro.plate("images", 3):
        value = handler(program)()
    law = recorded.trace.nodes["place"]["fn"]
    assert (law.batch_shape, law.has_rsample, len(value)) == ((3,), False, 3)


@pytest.mark.parametrize("name", PLACED)
def test_a_place_that_is_given_is_where_the_op_looks(name: str) -> None:
    program, place = PLACED[name]
    with randomize():
        found = poutine.condition(program, data={"place": place})()
    assert torch.equal(found, program())


def look() -> None:
    box = pyro.param("box", BOX)
    cost("dark", -crop("window", IMAGE, box, (4, 4)).mean((-1, -2, -3)))


def check_the_place_has_a_gradient(elbo: Any) -> None:
    """Its sign is known: the image grows brighter to the right and, eight times so, downwards."""
    found = torch.stack(
        [
            torch.autograd.grad(
                elbo.differentiable_loss(randomize()(look), no_guide), pyro.param("box")
            )[0][:2]
            for _ in range(4)
        ]
    )
    assert float(found.mean(0)[1]) < 0


@pytest.mark.parametrize("estimator", [None, RLOO(200)], ids=repr)
@pytest.mark.usefixtures("param_store")
def test_a_place_is_not_taken_for_pathwise(estimator: Any) -> None:
    # 800 draws: the gradient, 32 a box's height, is 15 standard errors away from 0
    check_the_place_has_a_gradient(ExpectedCost(estimator, num_particles=200))


@pytest.mark.usefixtures("param_store")
def test_planted_pathwise_place_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``rsample`` the site would be pathwise, and the hard crop has no path."""
    monkeypatch.setattr(_HardNormal, "has_rsample", True)
    with pytest.raises((AssertionError, RuntimeError)):
        check_the_place_has_a_gradient(ExpectedCost(num_particles=200))


def test_a_scale_is_positive() -> None:
    with pytest.raises(NonDiffError, match="randomize: scale must be positive, found 0"):
        randomize(scale=0)


@pytest.mark.parametrize("name", FIXED)
def test_a_number_of_a_place_stays_where_its_scale_is_0(name: str) -> None:
    program, place = PLACED[name]
    scale, moving = FIXED[name]
    with poutine.trace() as recorded:
        value = randomize(scale=scale)(program)()
    site = recorded.trace.nodes["place"]
    assert (site["fn"].batch_shape, site["fn"].event_shape) == ((), (2,))
    assert torch.equal(site["fn"].mean, place.flatten()[moving])
    assert torch.equal(site["fn"].stddev, scale.flatten()[moving])
    moved = place.flatten().clone()
    moved[moving] = site["value"]
    op = {"crop": crop, "paste": paste, "warp": warp}[name]
    size = (8, 8) if name == "paste" else (4, 4)
    assert torch.equal(value, op("alone", IMAGE, moved.reshape(place.shape), size))
    assert torch.equal(mode()(randomize(scale=scale)(program))(), program())


@pytest.mark.usefixtures("param_store")
def test_a_place_that_moves_in_some_numbers_has_a_gradient_in_worlds() -> None:
    handler = randomize(scale=torch.tensor([0.1, 0.1, 0.0, 0.0]))
    elbo = ExpectedCost(RLOO(200), num_particles=200)
    loss = elbo.differentiable_loss(handler(look), no_guide)
    (found,) = torch.autograd.grad(loss, pyro.param("box"))
    assert found[1] < 0
    assert torch.equal(found[2:], torch.zeros(2))


def test_a_scale_with_zeros_has_the_shape_of_the_place() -> None:
    with pytest.raises(NonDiffError, match=r"shape \(4,\) of the place of op 'place'"):
        randomize(scale=torch.tensor([0.1, 0.0]))(PLACED["crop"][0])()


@pytest.mark.parametrize("scale", [[0.0, 0.0, 0.0, 0.0], [0.1, -0.1, 0.0, 0.0]])
def test_a_scale_with_zeros_is_positive_somewhere_and_nowhere_negative(scale: list[float]) -> None:
    with pytest.raises(NonDiffError, match="randomize: scale must be positive somewhere"):
        randomize(scale=torch.tensor(scale))
