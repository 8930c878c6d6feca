"""One optimiser for all parameters moves them as Pyro's one for each, and saves what it saves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import (
    SGD,
    Adagrad,
    Adam,
    AdamW,
    ClippedAdam,
    ExponentialLR,
    PyroOptim,
    ReduceLROnPlateau,
    RMSprop,
)
from pyro.optim.multi import MixedMultiOptimizer
from torch import Tensor, nn

from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.estimators import RELAX, RLOO, AbstractEstimator
from pyro_nondiff.infer import CompiledSVI, TraceEstimator_ELBO
from tests.infer.side_by_side import Training, compiled, same, train

pytestmark = pytest.mark.usefixtures("param_store")

Make = Callable[[], PyroOptim]


def program(optim: Make, change: Any = lambda step, optim: None) -> Callable[[], Training]:
    def make() -> Training:
        net = nn.Linear(1, 2)

        def model() -> None:
            z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
            bias = pyro.param("bias", torch.tensor(0.5))
            pyro.sample("x", dist.Normal(2 * z.sum(-1) + bias, 1.0), obs=torch.tensor(2.0))

        def guide() -> None:
            pyro.module("net", net)
            pyro.sample("z", dist.Bernoulli(logits=net(torch.ones(1))).to_event(1))

        elbo = TraceEstimator_ELBO(RLOO(2))
        return Training(model, guide, elbo, optim(), between=change)

    return make


def by_name(name: str) -> dict[str, float]:
    return {"lr": 0.2} if name == "bias" else {"lr": 0.02, "weight_decay": 0.1}


OPTIMISERS: dict[str, Make] = {
    "Adam": lambda: Adam({"lr": 0.1, "betas": (0.8, 0.9)}),
    "Adam, amsgrad": lambda: Adam({"lr": 0.1, "amsgrad": True}),
    "Adam, foreach chosen": lambda: Adam({"lr": 0.1, "foreach": True}),
    "AdamW": lambda: AdamW({"lr": 0.1, "weight_decay": 0.2}),
    "SGD": lambda: SGD({"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "RMSprop": lambda: RMSprop({"lr": 0.1}),
    "Adagrad": lambda: Adagrad({"lr": 0.1}),
    "ClippedAdam": lambda: ClippedAdam({"lr": 0.1, "lrd": 0.9, "clip_norm": 0.05}),
    "options by name": lambda: Adam(by_name),
    "clipped values": lambda: SGD({"lr": 0.1}, {"clip_value": 0.05}),
    "clipped norms": lambda: SGD({"lr": 0.1}, {"clip_norm": 0.05}),
    "clipped by name": lambda: SGD(
        {"lr": 0.1}, lambda module, name: {"clip_norm": 0.05 if name == "bias" else 9.0}
    ),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_moves_as_in_pyro(name: str) -> None:
    same(program(OPTIMISERS[name]), steps=12)


def test_the_optimisers_differ() -> None:
    """So that one in place of another would be found."""
    ends = [
        torch.cat([v.flatten() for v in train(program(make), SVI, 12).parameters.values()])
        for name, make in OPTIMISERS.items()
        if "chosen" not in name
    ]
    for i, end in enumerate(ends):
        for other in ends[:i]:
            assert not torch.allclose(end, other, rtol=1e-4)


SCHEDULERS: dict[str, Make] = {
    "exponential": lambda: ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.2}, "gamma": 0.7}
    ),
    "on a plateau": lambda: ReduceLROnPlateau(
        {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.2}, "patience": 0, "factor": 0.3}
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str) -> None:
    def change(step: int, optim: Any) -> None:
        optim.step(*([1.0] if name == "on a plateau" else []))

    rates: list[float] = []

    def note(step: int, optim: Any) -> None:
        change(step, optim)
        first = next(iter(optim.optim_objs.values()))
        rates.append(first.optimizer.param_groups[0]["lr"])

    same(program(SCHEDULERS[name], note), steps=6)
    assert rates[5] < rates[0]


def test_one_optimiser_steps_parameters_of_equal_options() -> None:
    svi = train(program(OPTIMISERS["options by name"]), compiled("replay")).svi
    (groups,) = svi._optimizer._joined.values()
    sizes = sorted(len(group.optimizer.param_groups[0]["params"]) for group in groups)
    assert sizes == [1, 2]
    assert all(group.optimizer.defaults["fused"] for group in groups)


def test_a_parameter_without_gradient_goes_on_by_momentum() -> None:
    """As in Pyro, where gradients are set to zero and not taken away."""

    def make() -> Training:
        def model(both: bool) -> None:
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
            loc = pyro.param("loc", torch.tensor(0.0))
            pyro.sample("x", dist.Normal(z + loc if both else z, 1.0), obs=torch.tensor(2.0))

        def guide(both: bool) -> None:
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.0))))

        elbo = TraceEstimator_ELBO(RLOO(2))
        arguments = lambda step: (step < 4,)  # noqa: E731
        return Training(model, guide, elbo, Adam({"lr": 0.1}), arguments)

    same(make, steps=10)


# --- checkpoints ------------------------------------------------------------------------------


def autoencoder(estimator: AbstractEstimator) -> tuple[Any, Any, Any]:
    net = nn.Linear(2, 3)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x.sum(-1))

    def guide(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=net(x)).to_event(1))

    return model, guide, TraceEstimator_ELBO(estimator)


def steps(svi: Any, first: int, last: int) -> list[float]:
    losses = []
    with torch.random.fork_rng():
        for step in range(first, last):
            torch.manual_seed(step)
            losses.append(float(svi.step(torch.arange(8.0).reshape(4, 2) / 8)))
    return losses


KINDS = {"SVI": SVI, "CompiledSVI": compiled("replay")}


@pytest.mark.parametrize(
    "make", [OPTIMISERS["Adam"], OPTIMISERS["ClippedAdam"], SCHEDULERS["exponential"]]
)
@pytest.mark.parametrize("saver", KINDS)
@pytest.mark.parametrize("loader", KINDS)
def test_a_checkpoint_of_either_loads_in_the_other(
    make: Make, saver: str, loader: str, tmp_path: Path
) -> None:
    def started(kind: str) -> tuple[Any, PyroOptim, Any]:
        pyro.clear_param_store()
        torch.manual_seed(3)
        optim = make()
        model, guide, elbo = autoencoder(RELAX())
        return KINDS[kind](model, guide, optim, elbo), optim, elbo

    with torch.random.fork_rng():
        svi, optim, elbo = started(saver)
        steps(svi, 0, 5)
        pyro.get_param_store().save(str(tmp_path / "params"))
        optim.save(str(tmp_path / "optim"))
        torch.save(elbo.states.state_dict(), tmp_path / "elbo")
        expected = steps(svi, 5, 10)
        svi, optim, elbo = started(loader)
        pyro.get_param_store().load(str(tmp_path / "params"))
        optim.load(str(tmp_path / "optim"))
        elbo.states.load_state_dict(torch.load(tmp_path / "elbo"))
        for module in (svi.guide.__closure__[0].cell_contents,):
            pyro.module("net", module, update_module_params=True)
        found = steps(svi, 5, 10)
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_module_form_sees_what_is_trained() -> None:
    model, guide, elbo = autoencoder(RELAX())
    guide_net = nn.ModuleList([guide.__closure__[0].cell_contents])
    svi = CompiledSVI(model, guide, Adam({"lr": 0.1}), elbo, backend="replay")
    steps(svi, 0, 5)
    state = elbo.states.state_dict()
    store = pyro.get_param_store()
    torch.testing.assert_close(state["z.eta"], store["estimator.z$$$eta"].detach())
    torch.testing.assert_close(guide_net[0].weight, store["net$$$weight"])
    assert float(state["z.baseline.weight"]) == pytest.approx(1 - 0.9**5)


# --- refusals ---------------------------------------------------------------------------------


class _Both(PyroOptim):
    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Steps in a way of its own."""


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        (torch.optim.Adam([torch.zeros(1)]), "must be one of pyro.optim, .* found Adam"),
        (MixedMultiOptimizer([]), "must be one of pyro.optim, .* found MixedMultiOptimizer"),
        (_Both(torch.optim.Adam, {"lr": 0.1}), "_Both takes steps of its own"),
    ],
)
def test_optimisers_that_cannot_be_carried_over(optim: Any, message: str) -> None:
    model, guide, elbo = autoencoder(RLOO(2))
    with pytest.raises(NonDiffError, match=message):
        CompiledSVI(model, guide, optim, elbo)


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        (Adam({"rate": 0.1}), r"parameter 'net\$\$\$\w+': its optimiser cannot be made: .*rate"),
        (PyroOptim(torch.optim.LBFGS, {}), "LBFGS runs the program again"),
        (PyroOptim(lambda parameters: len(parameters), {}), "its optimiser is int"),
        (Adam(lambda name: 0.1), r"parameter 'net\$\$\$\w+': its optimiser cannot be made"),
    ],
)
def test_options_that_cannot_be_used(optim: PyroOptim, message: str) -> None:
    model, guide, elbo = autoencoder(RLOO(2))
    net = guide.__closure__[0].cell_contents
    before = net.weight.detach().clone()
    svi = CompiledSVI(model, guide, optim, elbo, backend="replay")
    with pytest.raises(NonDiffError, match=message):
        steps(svi, 0, 1)
    torch.testing.assert_close(net.weight.detach(), before, rtol=0, atol=0)
