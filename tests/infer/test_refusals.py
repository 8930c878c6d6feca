"""What cannot be served is refused by name, and nothing is trained."""

import re
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import Tensor, nn

from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.estimators import (
    REBAR,
    REINFORCE,
    RELAX,
    RLOO,
    AbstractEstimator,
    DisARM,
    Enumerate,
    MovingAverage,
    NeuralBaseline,
    Pathwise,
)
from pyro_nondiff.infer import TraceEstimator_ELBO, config_estimator

pytestmark = pytest.mark.usefixtures("param_store")

X = torch.tensor([0.5, -1.0, 2.0])


def model(x: Tensor) -> None:
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)


def guide(x: Tensor) -> None:
    logits = pyro.param("logits", torch.zeros(3))
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Bernoulli(logits=logits))


def categorical_model(x: Tensor) -> None:
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
        pyro.sample("x", dist.Normal(z.to(x.dtype), 1.0), obs=x)


def categorical_guide(x: Tensor) -> None:
    logits = pyro.param("logits", torch.zeros(3))
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Categorical(logits=logits))


def check_nothing_is_trained(
    model: Callable[..., Any], guide: Callable[..., Any], elbo: TraceEstimator_ELBO, match: str
) -> None:
    """One step is refused with a message, and leaves parameters, optimiser and states alone."""
    optimiser = pyro.optim.Adam({"lr": 0.1})
    svi = SVI(model, guide, optimiser, elbo)
    logits = pyro.param("logits", torch.zeros(3))
    before = logits.detach().clone()
    learnt = {name: value.clone() for name, value in elbo.states.state_dict().items()}
    with pytest.raises(NonDiffError, match=match):
        svi.step(X)
    torch.testing.assert_close(pyro.param("logits").detach(), before, rtol=0, atol=0)
    assert not optimiser.optim_objs
    assert all(
        torch.equal(value, learnt[n])
        for n, value in elbo.states.state_dict().items()
        if n in learnt
    )


@pytest.mark.parametrize(
    ("estimator", "match"),
    [
        (DisARM(), r"site 'z': DisARM pairs.*Categorical.*RLOO"),
        (Pathwise(), r"site 'z': Pathwise needs a law with rsample.*RLOO"),
        (Enumerate(max_size=2), r"site 'z'.*support has 3 values.*Raise max_size"),
        (REBAR(), r"site 'z': REBAR relaxes.*use OneHotCategorical"),
        (RELAX(), r"site 'z': RELAX relaxes.*use OneHotCategorical"),
    ],
)
def test_wrong_estimator_for_a_law(estimator: AbstractEstimator, match: str) -> None:
    elbo = TraceEstimator_ELBO(estimator)
    check_nothing_is_trained(categorical_model, categorical_guide, elbo, match)


def test_enumerate_of_an_infinite_support() -> None:
    def poisson(x: Tensor) -> None:
        pyro.param("logits", torch.zeros(3))
        pyro.sample("z", dist.Poisson(torch.tensor(3.0)))

    elbo = TraceEstimator_ELBO(Enumerate())
    check_nothing_is_trained(poisson, poisson, elbo, r"site 'z': Enumerate needs.*Poisson")


def test_guide_site_without_a_partner() -> None:
    def extra(x: Tensor) -> None:
        guide(x)
        pyro.sample("lonely", dist.Bernoulli(0.5))

    check_nothing_is_trained(
        model, extra, TraceEstimator_ELBO(), r"site 'lonely'.*does not have it.*is_auxiliary"
    )


def test_guide_site_that_the_model_observes() -> None:
    conditioned = pyro.poutine.condition(model, data={"z": torch.ones(3)})
    check_nothing_is_trained(conditioned, guide, TraceEstimator_ELBO(), r"site 'z'.*observes it")


def test_site_observed_in_the_guide() -> None:
    def observing(x: Tensor) -> None:
        guide(x)
        pyro.sample("y", dist.Bernoulli(0.5), obs=torch.tensor(1.0))

    check_nothing_is_trained(model, observing, TraceEstimator_ELBO(), r"site 'y' is observed")


def test_two_sites_of_one_name() -> None:
    def twice(x: Tensor) -> None:
        guide(x)
        pyro.sample("z", dist.Bernoulli(0.5))

    check_nothing_is_trained(model, twice, TraceEstimator_ELBO(), r"two sites named 'z'")


def test_batch_dimension_that_no_plate_declares() -> None:
    def loose(x: Tensor) -> None:
        logits = pyro.param("logits", torch.zeros(3))
        pyro.sample("z", dist.Bernoulli(logits=logits))

    match = r"site 'z' has batch shape \(3,\).*no plate declares.*to_event"
    check_nothing_is_trained(loose, loose, TraceEstimator_ELBO(REINFORCE()), match)
    check_nothing_is_trained(loose, loose, TraceEstimator_ELBO(RLOO(2)), match)


def test_site_that_asks_to_be_enumerated() -> None:
    marked = pyro.infer.config_enumerate(guide)
    check_nothing_is_trained(model, marked, TraceEstimator_ELBO(), r"'z'.*enumerate.*Enumerate\(\)")


def test_nan_logits_name_the_place() -> None:
    def broken(x: Tensor) -> None:
        logits = pyro.param("logits", torch.zeros(3))
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Bernoulli(logits=logits / 0 * 0))

    match = r'guide failed before its first site, at line \d+ of broken.*pyro.sample\("z"'
    check_nothing_is_trained(model, broken, TraceEstimator_ELBO(), match)


def test_nan_logits_that_the_law_does_not_validate() -> None:
    def broken(x: Tensor) -> None:
        logits = pyro.param("logits", torch.zeros(3))
        with pyro.plate("data", 3):
            law = dist.Bernoulli(logits=logits * torch.nan, validate_args=False)
            pyro.sample("z", law)

    check_nothing_is_trained(model, broken, TraceEstimator_ELBO(), r"site 'z': the logits.*NaN")


def test_estimator_that_changes_between_steps() -> None:
    decay = iter([0.9, 0.8])

    def changing(x: Tensor) -> None:
        logits = pyro.param("logits", torch.zeros(3))
        with pyro.plate("data", 3):
            estimator = REINFORCE(MovingAverage(next(decay)))
            pyro.sample("z", dist.Bernoulli(logits=logits), infer={"estimator": estimator})

    elbo = TraceEstimator_ELBO()
    elbo.differentiable_loss(model, changing, X)
    check_nothing_is_trained(model, changing, elbo, r"site 'z': its estimator was.*decay=0.9.*0.8")


def test_net_that_is_built_anew_each_step() -> None:
    def changing(x: Tensor) -> None:
        logits = pyro.param("logits", torch.zeros(3))
        with pyro.plate("data", 3):
            baseline = NeuralBaseline(nn.Linear(1, 1), input=x[:, None])
            law = dist.Bernoulli(logits=logits)
            pyro.sample("z", law, infer={"estimator": REINFORCE(baseline)})

    elbo = TraceEstimator_ELBO()
    elbo.differentiable_loss(model, changing, X)
    check_nothing_is_trained(model, changing, elbo, r"site 'z'.*make modules once")


def test_param_store_left_from_another_estimator() -> None:
    """Another objective's network of the same site and name."""
    net = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 1))
    baseline = NeuralBaseline(net, lambda x: x.unsqueeze(-1))
    TraceEstimator_ELBO(REINFORCE(baseline)).loss_and_grads(model, guide, X)
    with pytest.raises(
        NonDiffError, match=r"has 'estimator.z\$\$\$net.0.weight' of shape \(4, 1\)"
    ):
        TraceEstimator_ELBO(RELAX()).loss_and_grads(model, guide, X)
    pyro.clear_param_store()
    TraceEstimator_ELBO(RELAX()).loss_and_grads(model, guide, X)


def test_baseline_of_the_wrong_shape() -> None:
    baseline = NeuralBaseline(nn.Linear(3, 2), input=lambda x: x)
    match = r"site 'z': the net of its NeuralBaseline returned shape \(2,\)"
    check_nothing_is_trained(model, guide, TraceEstimator_ELBO(REINFORCE(baseline)), match)


def test_control_variate_of_the_wrong_shape() -> None:
    elbo = TraceEstimator_ELBO(RELAX(nn.Linear(1, 2), relaxed_cost=False))

    def event_guide(x: Tensor) -> None:
        logits = pyro.param("logits", torch.zeros(3))
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Bernoulli(logits=logits[:, None]).to_event(1))

    def event_model(x: Tensor) -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(torch.full((1,), 0.3)).to_event(1))
            pyro.sample("x", dist.Normal(2 * z[..., 0], 1.0), obs=x)

    match = r"site 'z': the control variate of RELAX returned shape"
    check_nothing_is_trained(event_model, event_guide, elbo, match)


def test_unknown_site_in_config_estimator() -> None:
    configured = config_estimator(guide, {"w": DisARM()})
    check_nothing_is_trained(
        model, configured, TraceEstimator_ELBO(), r"config_estimator names \['w'\].*\['z'\]"
    )


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: config_estimator(guide, {"z": "RLOO"}), r"site 'z'.*found 'RLOO'"),  # type: ignore[dict-item]
        (lambda: TraceEstimator_ELBO(RLOO), r"every site.*object such as RLOO"),  # type: ignore[arg-type]
        (lambda: TraceEstimator_ELBO(num_particles=0), "num_particles must be at least 1, found 0"),
        (lambda: TraceEstimator_ELBO(worlds="all"), "worlds must be"),  # type: ignore[arg-type]
        (
            lambda: TraceEstimator_ELBO(worlds="sequential", vectorize_particles=True),
            "Give one of them",
        ),
        (lambda: RLOO(1), r"num_samples >= 2.*found 1"),
        (lambda: MovingAverage(decay=1.0), r"decay must lie in \[0, 1\), found 1.0"),
        (lambda: REINFORCE(baseline=0.5), "REINFORCE needs a baseline object, found 0.5"),  # type: ignore[arg-type]
        (lambda: NeuralBaseline(torch.sin, input=X), "needs a torch.nn.Module"),  # type: ignore[arg-type]
        (lambda: Enumerate(0), "max_size must be at least 1"),
        (lambda: REBAR(temperature=0.0), "temperature must be positive, found 0.0"),
        (lambda: RELAX(temperature=-1.0), "temperature must be positive, found -1.0"),
        (lambda: RELAX(torch.sin), "needs a torch.nn.Module"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments(make: Callable[[], object], match: str) -> None:
    with pytest.raises(NonDiffError, match=match):
        make()


def test_wrong_type_at_the_site() -> None:
    def typed(x: Tensor) -> None:
        logits = pyro.param("logits", torch.zeros(3))
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Bernoulli(logits=logits), infer={"estimator": "RLOO"})

    check_nothing_is_trained(model, typed, TraceEstimator_ELBO(), r"site 'z'.*found 'RLOO'")


def test_guide_made_of_effects() -> None:
    from_effects = pyro.infer.autoguide.AutoNormalMessenger(model)
    with pytest.raises(NonDiffError, match="AutoNormalMessenger is a guide made of effects"):
        TraceEstimator_ELBO().loss(model, from_effects, X)


def test_enumerate_where_plate_elements_share_a_cost() -> None:
    def shared(x: Tensor) -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=x[:1])

    match = r"site 'z': Enumerate.*plate 'data'.*in a term outside the plate"
    check_nothing_is_trained(shared, guide, TraceEstimator_ELBO(Enumerate()), match)


def test_enumerate_where_a_later_site_joins_the_plate() -> None:
    def joined(x: Tensor) -> None:
        guide(x)
        pyro.sample("w", dist.Bernoulli(0.5))

    def with_w(x: Tensor) -> None:
        w = pyro.sample("w", dist.Bernoulli(0.5))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(2 * z + w, 1.0), obs=x)

    configured = config_estimator(joined, {"z": Enumerate()})
    match = r"site 'z': Enumerate.*plate 'data'.*through site 'w'"
    check_nothing_is_trained(with_w, configured, TraceEstimator_ELBO(REINFORCE()), match)


@pytest.mark.parametrize(
    ("break_it", "operation"),
    [
        (lambda z: (z > 0.5).to(z.dtype), "gt|__gt__"),
        (lambda z: z.round(), "round"),
        (lambda z: torch.tensor([0.0, 1.0])[z.long()], "long"),
        (lambda z: z.detach(), "detach"),
        (lambda z: z * float(z.sum() > 1), "gt|__gt__"),
    ],
)
def test_model_that_breaks_a_soft_value(
    break_it: Callable[[Tensor], Tensor], operation: str
) -> None:
    def breaking(x: Tensor) -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(break_it(z), 1.0), obs=x)

    elbo = TraceEstimator_ELBO(REBAR(), worlds="vectorized")
    match = rf"site 'z'.*breaks its soft value by '({operation})', at line \d+ of"
    check_nothing_is_trained(breaking, guide, elbo, match)


def test_cost_without_gradient() -> None:
    def external(x: Tensor) -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(0.3).mask(False))
            pyro.factor("cost", torch.zeros_like(z).detach())

    def quiet(x: Tensor) -> None:
        logits = pyro.param("logits", torch.zeros(3))
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Bernoulli(logits=logits).mask(False))

    elbo = TraceEstimator_ELBO(REBAR(), worlds="vectorized")
    match = r"site 'z': the cost of its soft worlds has no gradient.*relaxed_cost=False"
    check_nothing_is_trained(external, quiet, elbo, match)


def test_messages_have_no_addresses() -> None:
    with pytest.raises(NonDiffError) as caught:
        TraceEstimator_ELBO(DisARM()).loss_and_grads(categorical_model, categorical_guide, X)
    assert not re.search(r"0x[0-9a-f]+", str(caught.value))
