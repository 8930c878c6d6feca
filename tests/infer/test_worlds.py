"""Programs that broadcast, that do not, and that do so wrongly."""

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_nondiff.errors import NonDiffError, NonDiffWarning
from pyro_nondiff.estimators import REBAR, REINFORCE, RLOO, AbstractEstimator, DisARM
from pyro_nondiff.infer import TraceEstimator_ELBO
from pyro_nondiff.testing import exact_gradient, exact_moments

pytestmark = pytest.mark.usefixtures("param_store")


def guide(*args: Any) -> None:
    logits = pyro.param("logits", torch.tensor([0.3, -0.4]))
    with pyro.plate("data", 2):
        pyro.sample("z", dist.Bernoulli(logits=logits))


def model_of(mean: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """A model whose likelihood has a mean of the user's making."""

    def model() -> None:
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(mean(z), 1.0), obs=torch.tensor([1.0, 2.0]))

    return model


def warnings_of(step: Callable[[], object]) -> list[str]:
    """What three steps warn of, in the words that tell the warnings apart."""
    words = ["run one by one", "check was skipped"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            step()
    assert all(issubclass(warning.category, NonDiffWarning) for warning in caught)
    return [word for warning in caught for word in words if word in str(warning.message)]


WRONG = {
    "first": lambda z: z[0] * torch.ones(2),
    "sum(0)": lambda z: z.sum(0),
    "any": lambda z: z + z.bool().any(),
    "flat": lambda z: z.flatten()[:2],
}


@pytest.mark.parametrize("estimator", [RLOO(2), DisARM()], ids=repr)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_broadcast_is_refused_and_falls_back(name: str, estimator: AbstractEstimator) -> None:
    model = model_of(WRONG[name])
    with pytest.raises(NonDiffError, match="does not run in vectorised worlds"):
        TraceEstimator_ELBO(estimator, worlds="vectorized").loss_and_grads(model, guide)
    elbo = TraceEstimator_ELBO(estimator)
    assert warnings_of(lambda: elbo.loss_and_grads(model, guide)) == ["run one by one"]


def test_the_check_names_the_site() -> None:
    model = model_of(WRONG["any"])
    with pytest.raises(NonDiffError, match="site 'x' of the model has another log-probability"):
        TraceEstimator_ELBO(RLOO(8), worlds="vectorized").loss_and_grads(model, guide)


def test_a_program_that_concatenates_runs_expanded() -> None:
    def model() -> None:
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            y = pyro.sample("y", dist.Bernoulli(0.3))
            both = torch.stack([z, y], -1)  # fails where z has no rows, and y has
            mean = torch.cat([both, both], -1).sum(-1)
            pyro.sample("x", dist.Normal(mean, 1.0), obs=torch.tensor([1.0, 2.0]))

    def wide_guide() -> None:
        guide()
        with pyro.plate("data", 2):
            pyro.sample("y", dist.Bernoulli(0.5), infer={"estimator": REINFORCE()})

    elbo = TraceEstimator_ELBO(DisARM(), worlds="vectorized")
    elbo.loss_and_grads(model, wide_guide)
    assert elbo.plan_of(model, wide_guide).mode == "expanded"


class Picture(nn.Module):
    """A bare convolution: four dimensions, and not one more."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 1, 3, padding=1)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((4, 4), 0.3)).to_event(2))
            mean = self.convolution(z.unsqueeze(-3)).squeeze(-3)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(2), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=x).to_event(2))


@pytest.mark.parametrize("estimator", [RLOO(2), DisARM(), REBAR()], ids=repr)
def test_bare_convolution_works_on_its_first_step(estimator: AbstractEstimator) -> None:
    picture = Picture()
    elbo = TraceEstimator_ELBO(estimator)
    with pytest.warns(NonDiffWarning, match="run one by one"):
        elbo.loss_and_grads(picture.model, picture.guide, torch.randn(2, 4, 4))
    assert picture.convolution.weight.grad is not None


class Dropped(nn.Module):
    """A program with randomness outside its sites."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def model(self) -> None:
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            mean = self.dropout(torch.ones(64)).sum() + z
            pyro.sample("x", dist.Normal(mean, 1.0), obs=torch.tensor([1.0, 2.0]))


def test_randomness_outside_sites_skips_the_check() -> None:
    elbo = TraceEstimator_ELBO(RLOO(2))
    model = Dropped().model
    assert warnings_of(lambda: elbo.loss_and_grads(model, guide)) == ["check was skipped"]


class Normed(nn.Module):
    """A program whose buffers move at each run, and whose first step is checked."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.3)).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.norm(x)).to_event(1))


@pytest.mark.parametrize("estimator", [REINFORCE(), RLOO(3), DisARM(), REBAR()], ids=repr)
def test_a_first_step_moves_buffers_once(estimator: AbstractEstimator) -> None:
    program, x = Normed(), torch.randn(8, 3)
    elbo = TraceEstimator_ELBO(estimator)
    elbo.loss_and_grads(program.model, program.guide, x)
    assert program.norm.num_batches_tracked == 1
    expected = 0.1 * x.mean(0)  # momentum 0.1 from a mean of zero
    torch.testing.assert_close(program.norm.running_mean, expected)
    assert program.norm.weight.grad is not None


@pytest.mark.parametrize("estimator", [REINFORCE(), RLOO(3), DisARM(), REBAR()], ids=repr)
def test_a_first_step_draws_once(estimator: AbstractEstimator) -> None:
    """The draws of a first step are those that the same step takes later."""
    model = model_of(lambda z: 2 * z)
    losses = []
    elbo = TraceEstimator_ELBO(estimator)
    for _ in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(7)
            losses.append(elbo.loss_and_grads(model, guide))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)


def test_a_smaller_last_batch_is_a_new_signature() -> None:
    program = Normed()
    elbo = TraceEstimator_ELBO(DisARM())
    for size in (8, 8, 3, 8):
        elbo.loss_and_grads(program.model, program.guide, torch.randn(size, 3))
    program.eval()
    elbo.loss_and_grads(program.model, program.guide, torch.randn(8, 3))


def branching_model() -> None:
    """Control flow on a sample: a site that only some worlds meet."""
    z = pyro.sample("z", dist.Bernoulli(0.3))
    mean = 2 * z
    if z.item():
        mean = mean + pyro.sample("y", dist.Bernoulli(0.6))
    pyro.sample("x", dist.Normal(mean, 1.0), obs=torch.tensor(1.0))


def branching_guide() -> None:
    logits = pyro.param("logits", torch.tensor([0.3, -0.4]))
    z = pyro.sample("z", dist.Bernoulli(logits=logits[0]))
    if z.item():
        pyro.sample("y", dist.Bernoulli(logits=logits[1]))


@pytest.mark.parametrize("estimator", [REINFORCE(), RLOO(2)], ids=repr)
def test_control_flow_on_a_sample_is_exact(estimator: AbstractEstimator) -> None:
    elbo = TraceEstimator_ELBO(estimator, worlds="sequential")
    mean, _, _ = exact_moments(elbo, branching_model, branching_guide)
    exact = exact_gradient(branching_model, branching_guide)
    # sums of a dozen terms of order 1 in float64
    torch.testing.assert_close(mean["logits"], exact["logits"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", [DisARM(), RLOO(3)], ids=repr)
def test_control_flow_falls_back_with_one_warning(estimator: AbstractEstimator) -> None:
    elbo = TraceEstimator_ELBO(estimator)
    found = warnings_of(lambda: elbo.loss_and_grads(branching_model, branching_guide))
    assert found == ["run one by one"]


@pytest.mark.parametrize("worlds", ["auto", "sequential"])
def test_control_flow_on_a_soft_value_is_refused(worlds: Any) -> None:
    elbo = TraceEstimator_ELBO(REBAR(), worlds=worlds)
    with pytest.raises(NonDiffError, match="site 'z': the program breaks its soft value by 'item'"):
        elbo.loss_and_grads(branching_model, branching_guide)


def test_structure_may_change_where_no_world_branches() -> None:
    model = model_of(lambda z: 2 * z)
    for estimator in (REINFORCE(), RLOO(2)):
        elbo = TraceEstimator_ELBO(estimator)
        for extra in (0, 2, 1):

            def longer(extra: int = extra) -> None:
                guide()
                for i in range(extra):
                    pyro.sample(f"a{i}", dist.Bernoulli(0.5), infer={"is_auxiliary": True})

            elbo.loss_and_grads(model, longer)


def test_structure_that_changes_with_branches_is_an_error() -> None:
    turns = iter(range(1000))

    def restless() -> None:
        guide()
        name = f"a{next(turns)}"
        pyro.sample(name, dist.Bernoulli(0.5), infer={"is_auxiliary": True})

    model = model_of(lambda z: 2 * z)
    with pytest.raises(NonDiffError, match=r"changed from .* between two runs"):
        TraceEstimator_ELBO(DisARM(), worlds="vectorized").loss_and_grads(model, restless)


def test_vectorised_programs_do_not_warn() -> None:
    model = model_of(lambda z: 2 * z)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for estimator in (RLOO(4), DisARM(), REBAR()):
            TraceEstimator_ELBO(estimator).loss_and_grads(model, guide)


@pytest.mark.parametrize(("vectorize", "worlds"), [(True, "vectorized"), (False, "sequential")])
def test_vectorize_particles_is_a_name_for_worlds(vectorize: bool, worlds: str) -> None:
    assert TraceEstimator_ELBO(vectorize_particles=vectorize).worlds == worlds
    mode = {"vectorized": "plain", "sequential": "sequential"}[worlds]
    elbo = TraceEstimator_ELBO(RLOO(2), vectorize_particles=vectorize)
    assert elbo.plan_of(model_of(lambda z: 2 * z), guide).mode == mode


def test_base_worlds_are_the_largest_wish() -> None:
    model = model_of(lambda z: 2 * z)
    assert TraceEstimator_ELBO(RLOO(3)).plan_of(model, guide).base == 3
    assert TraceEstimator_ELBO(RLOO(3), num_particles=5).plan_of(model, guide).base == 5
    assert TraceEstimator_ELBO(REINFORCE(), num_particles=2).plan_of(model, guide).base == 2
