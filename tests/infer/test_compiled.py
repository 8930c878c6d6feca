"""A compiled step does what an eager one does, whatever the program."""

import sys
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_nondiff.distributions import ExponentialAnnealing
from pyro_nondiff.errors import NonDiffError, NonDiffWarning
from pyro_nondiff.estimators import (
    LAX,
    REBAR,
    REINFORCE,
    RELAX,
    RLOO,
    AbstractEstimator,
    DisARM,
    Enumerate,
    MeasureValued,
    MovingAverage,
    NeuralBaseline,
    StraightThrough,
)
from pyro_nondiff.handlers import randomize, soften
from pyro_nondiff.infer import CompiledSVI, ExpectedCost, TraceEstimator_ELBO, no_guide
from pyro_nondiff.ops import argmax, cost, external
from tests.infer.side_by_side import Training, compiled, same, train

pytestmark = pytest.mark.usefixtures("param_store")

ESTIMATORS = [
    REINFORCE(),
    REINFORCE(MovingAverage()),
    REINFORCE(MovingAverage() + NeuralBaseline(nn.Linear(6, 1), input=lambda x: x)),
    RLOO(3),
    DisARM(),
    Enumerate(),
    REBAR(),
    REBAR(second_order=True),
    RELAX(),
    RELAX(relaxed_cost=False),
    StraightThrough(gradient="gumbel", temperature=0.5),
]


# Adam divides a gradient by its size: where rounding alone is left of one, the quotient is its own.
ROUNDED = 1e-6


def batch(step: int, size: int = 5) -> tuple[Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.bernoulli(torch.full((size, 6), 0.4, device="cpu"), generator=generator)
    return (x.to(torch.get_default_device()),)


class Autoencoder:
    """Bits, and an indexed or a Gaussian site behind them if wanted."""

    def __init__(self, classes: bool = False) -> None:
        self.encoder, self.decoder = nn.Linear(6, 3), nn.Linear(3, 6)
        self.classes = classes

    def law(self, logits: Tensor) -> Any:
        if self.classes:
            return dist.OneHotCategorical(logits=logits)
        return dist.Bernoulli(logits=logits).to_event(1)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.law(x.new_zeros(3)))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.law(self.encoder(x)))


def autoencoder(estimator: AbstractEstimator, **options: Any) -> Callable[[], Training]:
    def make() -> Training:
        pair = Autoencoder(options.get("classes", False))
        loss = TraceEstimator_ELBO(deepcopy(estimator), worlds=options.get("worlds", "auto"))
        return Training(pair.model, pair.guide, loss, arguments=batch)

    return make


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_each_estimator(estimator: AbstractEstimator) -> None:
    assert same(autoencoder(estimator)).num_recordings == 1


@pytest.mark.parametrize("estimator", [RLOO(2), REBAR(), Enumerate()], ids=str)
def test_one_hot_sites(estimator: AbstractEstimator) -> None:
    assert same(autoencoder(estimator, classes=True)).num_recordings == 1


@pytest.mark.parametrize("estimator", [RLOO(2), DisARM()], ids=str)
def test_sequential_worlds(estimator: AbstractEstimator) -> None:
    assert same(autoencoder(estimator, worlds="sequential")).num_recordings == 1


@pytest.mark.parametrize("estimator", [LAX(), MeasureValued()], ids=str)
def test_continuous_sites(estimator: AbstractEstimator) -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=torch.tensor(1.0))

    def guide() -> None:
        law = dist.Normal(
            pyro.param("loc", torch.tensor(0.0)), pyro.param("scale", torch.tensor(1.0))
        )
        pyro.sample("z", law, infer={"estimator": estimator})

    assert same(lambda: Training(model, guide, TraceEstimator_ELBO())).num_recordings == 1


def bypasses() -> int:
    """How often inductor compiled what torch does not keep on disk."""
    utils = sys.modules.get("torch._dynamo.utils")
    return utils.counters["inductor"]["fxgraph_cache_bypass"] if utils else 0


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("estimator", [RLOO(2), RELAX()], ids=str)
def test_inductor(estimator: AbstractEstimator) -> None:
    before = bypasses()
    svi = same(autoencoder(estimator), "inductor", rtol=ROUNDED)
    assert svi.num_recordings == 1
    assert bypasses() == before


def test_eager_backend() -> None:
    assert same(autoencoder(RLOO(2)), "eager").num_recordings == 0


# --- Pyro's own objectives ------------------------------------------------------------------


def normal_model(x: Tensor) -> None:
    scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=3) as index:
        pyro.sample("x", dist.Normal(mean, scale), obs=x[index].sum(-1))


def mixture(x: Tensor) -> None:
    weights = pyro.param("weights", torch.ones(2) / 2, constraint=dist.constraints.simplex)
    places = pyro.param("places", torch.tensor([0.0, 4.0]))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(places[z], 1.0), obs=x.sum(-1))


@pytest.mark.parametrize(
    "loss",
    [
        Trace_ELBO(),
        Trace_ELBO(num_particles=3),
        Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
        TraceMeanField_ELBO(),
    ],
    ids=lambda loss: f"{type(loss).__name__}-{loss.num_particles}-{loss.vectorize_particles}",
)
def test_objectives_of_pyro(loss: Any) -> None:
    def make() -> Training:
        return Training(normal_model, AutoNormal(normal_model), loss, arguments=batch)

    assert same(make).num_recordings == 1


def test_enumeration_of_pyro() -> None:
    def make() -> Training:
        loss = TraceEnum_ELBO(max_plate_nesting=1)
        return Training(config_enumerate(mixture), lambda x: None, loss, arguments=batch)

    assert same(make).num_recordings == 1


def test_sampled_sites_under_pyro() -> None:
    """The score-function gradient of Pyro's own objective."""

    def make() -> Training:
        pair = Autoencoder()
        return Training(pair.model, pair.guide, Trace_ELBO(), arguments=batch)

    assert same(make).num_recordings == 1


# --- programs -------------------------------------------------------------------------------


def test_buffers_and_recurrent_networks() -> None:
    """What a module keeps goes on, and a recurrent network's second list of weights is seen."""

    def make() -> Training:
        norm, recurrent = nn.BatchNorm1d(6), nn.GRU(6, 3, batch_first=True)
        pair = Autoencoder()

        def guide(x: Tensor) -> None:
            pyro.module("norm", norm)
            pyro.module("recurrent", recurrent)
            with pyro.plate("data", len(x)):
                logits = recurrent(norm(x).unsqueeze(1))[0][:, 0]
                pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))

        def between(step: int, optim: Any) -> None:
            moments.append(norm.running_mean.clone())

        loss = TraceEstimator_ELBO(RLOO(2))
        return Training(pair.model, guide, loss, arguments=batch, between=between)

    moments: list[Tensor] = []
    same(make)
    half = len(moments) // 2
    torch.testing.assert_close(torch.stack(moments[:half]), torch.stack(moments[half:]))
    assert not torch.equal(moments[-1], moments[-2])


def test_pyro_modules() -> None:
    class Regression(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)
            self.weight = PyroSample(dist.Normal(0.0, 1.0).expand([6]).to_event(1))

        def forward(self, x: Tensor) -> None:
            mean = (x * self.weight).sum(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, self.scale), obs=x.sum(-1))

    def make() -> Training:
        model = Regression()
        return Training(model, AutoNormal(model), TraceEstimator_ELBO(), arguments=batch)

    assert same(make).num_recordings == 1


@pytest.mark.parametrize("handler", [soften(temperature=0.5), randomize()], ids=["soft", "random"])
def test_handled_ops(handler: Any) -> None:
    def program() -> None:
        choice = argmax("choice", pyro.param("scores", torch.tensor([0.1, 0.0, -0.1])))
        cost("price", (choice * torch.tensor([3.0, 1.0, 2.0])).sum(-1))

    def make() -> Training:
        return Training(handler(program), no_guide, ExpectedCost(RLOO(4)))

    assert same(make).num_recordings == 1


# --- what lies outside ----------------------------------------------------------------------


def shop(answer: Callable[[Tensor], Any]) -> Callable[[], Training]:
    def program() -> None:
        logits = pyro.param("logits", torch.zeros(3))
        with pyro.plate("buyers", 4):
            item = pyro.sample("item", dist.Categorical(logits=logits))
            cost("price", external("look up", answer, item))
            external("note", note, item)  # its answer is not used

    notes: list[int] = []

    def note(item: Tensor) -> int:
        assert type(item) is Tensor
        notes.append(int(item))
        return 0

    def make() -> Training:
        notes.clear()
        return Training(program, no_guide, ExpectedCost(RLOO(4)))

    make.notes = notes  # type: ignore[attr-defined]
    return make


@pytest.mark.parametrize("backend", ["replay", pytest.param("inductor", marks=pytest.mark.slow)])
def test_external_ops_are_called_at_each_step(backend: str, request: Any) -> None:
    if backend == "inductor":
        request.getfixturevalue("compiler")
    make = shop(lambda item: [3.0, 1.0, 2.0][int(item)])
    train(make, SVI)
    expected = list(make.notes)  # type: ignore[attr-defined]
    assert same(make, backend, rtol=ROUNDED).num_recordings == 1
    assert make.notes == expected  # type: ignore[attr-defined]


def test_what_an_external_op_calls_may_change() -> None:
    """It keeps a state of its own, which is no part of the program."""

    class Market:
        calls = 0

        def price(self, item: Tensor) -> float:
            self.calls += 1
            return float(item) + self.calls / 100

    def make() -> Training:
        return shop(Market().price)()

    assert same(make).num_recordings == 1


def test_whole_numbers_from_outside() -> None:
    """Python has two kinds of them, and a function may return either."""

    def make() -> Training:
        whole: list[int] = []
        made = shop(lambda item: int(item) if whole else float(item))()
        made.between = lambda step, optim: whole.append(step) if step == 4 else None
        return made

    assert same(make).num_recordings == 1


def test_a_function_that_holds_a_list_of_tensors_of_the_step() -> None:
    def program() -> None:
        item = pyro.sample("item", dist.Categorical(logits=pyro.param("logits", torch.zeros(3))))
        held = [pyro.param("logits").detach() * 2]
        cost("price", external("look up", lambda item: float(held[0][item]), item) + item)

    with pytest.warns(NonDiffWarning, match="'look up' calls a function that holds a tensor"):
        train(lambda: Training(program, no_guide, ExpectedCost(RLOO(4))), compiled("replay"))


def test_an_error_outside_trains_nothing() -> None:
    broken = False

    def answer(item: Tensor) -> float:
        if broken:
            raise OSError("no line")
        return float(item)

    trained = train(shop(answer), compiled("replay"))
    broken = True
    with pytest.raises(NonDiffError, match="'look up': answer raised OSError: no line"):
        trained.svi.step()
    torch.testing.assert_close(pyro.param("logits").detach(), trained.parameters["logits"])
    broken = False
    trained.svi.step()
    assert trained.svi.num_recordings == 1


# --- the interface --------------------------------------------------------------------------


def test_smaller_last_batch_is_recorded_anew() -> None:
    def make() -> Training:
        pair = Autoencoder()
        return Training(
            pair.model,
            pair.guide,
            TraceEstimator_ELBO(RLOO(2)),
            arguments=lambda step: batch(step, 3 if step % 3 == 2 else 5),
        )

    assert same(make, steps=12).num_recordings == 2


def test_evaluation_changes_nothing() -> None:
    trained = train(autoencoder(RELAX()), compiled("replay"))
    svi = trained.svi
    for step in range(4):
        with torch.random.fork_rng():
            torch.manual_seed(step)
            found = svi.evaluate_loss(*batch(step))
            torch.manual_seed(step)
            expected = svi.loss.loss(svi.model, svi.guide, *batch(step))
        assert isinstance(found, Tensor)
        assert float(found) == pytest.approx(expected, rel=1e-12)
    assert svi.num_recordings == 2
    for name, value in trained.parameters.items():
        torch.testing.assert_close(pyro.param(name).detach(), value, rtol=0, atol=0)


class _NoReading(TorchDispatchMode):
    """Fails where a value is read: on a GPU the host would wait for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} reads a value")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("estimator", [REINFORCE(MovingAverage()), RELAX()], ids=str)
def test_step_reads_no_value(estimator: AbstractEstimator) -> None:
    svi = train(autoencoder(estimator), compiled("replay")).svi
    with _NoReading():
        svi.step(*batch(0))
    eager = train(autoencoder(estimator), SVI).svi
    with pytest.raises(AssertionError, match="_local_scalar_dense"), _NoReading():
        eager.step(*batch(0))  # the check sees what it is for


def test_recording_changes_nothing() -> None:
    """The second step, which is recorded, draws and moves as the others do, and no more."""
    pair = Autoencoder()
    svi = CompiledSVI(
        pair.model,
        pair.guide,
        pyro.optim.Adam({"lr": 0.0}),
        TraceEstimator_ELBO(REINFORCE(MovingAverage())),
        backend="replay",
    )
    svi.step(*batch(0))
    weight, attributes = pair.encoder.weight, dict(vars(pair.encoder))
    before = {name: value.clone() for name, value in pair.encoder.state_dict().items()}
    svi.step(*batch(0))
    assert svi.num_recordings == 1
    assert pair.encoder.weight is weight
    assert vars(pair.encoder) == attributes
    for name, value in pair.encoder.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_gradients_are_added_to_those_that_are_there() -> None:
    svi = train(autoencoder(RLOO(2)), compiled("replay")).svi
    parameters = [value.unconstrained() for value in pyro.get_param_store().values()]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        svi._step(batch(0), {})
        first = [parameter.grad.clone() for parameter in parameters]
        torch.manual_seed(0)
        svi._step(batch(0), {})
    for parameter, gradient in zip(parameters, first, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "fast"}, "backend must be 'inductor', 'replay' or 'eager', found 'fast'"),
        ({"loss": lambda *args: 0.0}, "loss must be an ELBO, .* found function"),
    ],
)
def test_arguments_are_checked(change: dict[str, Any], message: str) -> None:
    pair = Autoencoder()
    given = {"loss": TraceEstimator_ELBO(), "backend": "replay"} | change
    with pytest.raises(NonDiffError, match=message):
        CompiledSVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.1}), **given)


def test_first_step_is_validated() -> None:
    def model() -> None:
        pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Bernoulli(0.5), obs=torch.tensor(2.0))

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.0))))

    svi = CompiledSVI(
        model, guide, pyro.optim.Adam({"lr": 0.1}), TraceEstimator_ELBO(), backend="replay"
    )
    with pytest.raises(ValueError, match="support"):
        svi.step()
    assert float(pyro.param("logit").detach()) == 0


def test_schedules_are_inputs() -> None:
    """A temperature that changes at each step is recorded once."""

    def make() -> Training:
        schedule = ExponentialAnnealing(1.0, 0.1, num_steps=6)

        def program() -> None:
            choice = argmax("choice", pyro.param("scores", torch.tensor([0.1, 0.0, -0.1])))
            cost("price", (choice * torch.tensor([3.0, 1.0, 2.0])).sum(-1))

        model = soften(temperature=schedule)(program)
        return Training(
            model, no_guide, ExpectedCost(), between=lambda step, optim: schedule.step()
        )

    assert same(make).num_recordings == 1


def test_handlers_of_pyro_around_the_programs() -> None:
    def make() -> Training:
        pair = Autoencoder()
        model, guide = (poutine.scale(fn, scale=0.5) for fn in (pair.model, pair.guide))
        return Training(model, guide, TraceEstimator_ELBO(RLOO(2)), arguments=batch)

    assert same(make).num_recordings == 1
