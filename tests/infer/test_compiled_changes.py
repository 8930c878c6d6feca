"""What changes between the steps of a compiled SVI is seen, or makes it run eager and say so."""

import random
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.optim import Adam
from torch import Tensor, nn

from pyro_nondiff.estimators import REINFORCE, RLOO
from pyro_nondiff.infer import CompiledSVI, TraceEstimator_ELBO
from tests.infer.reading_programs import (
    Change,
    Place,
    Read,
    check_watched,
    guide,
    model_of,
    one_warning,
    runs_eager,
    training,
)
from tests.infer.side_by_side import Training, compiled, same, train

pytestmark = pytest.mark.usefixtures("param_store")

BETA = 0.5


# --- places: each is a way to read a number, and to change it --------------------------------


def a_closure() -> tuple[Read, Change]:
    beta = 0.5

    def change(step: int) -> None:
        nonlocal beta
        beta = 0.5 + step // 3

    return lambda: beta, change


def a_global() -> tuple[Read, Change]:
    def change(step: int) -> None:
        global BETA
        BETA = 0.5 + step // 3

    change(0)
    return lambda: BETA, change


def an_attribute() -> tuple[Read, Change]:
    class Options:
        beta = 0.5

    options = Options()
    return lambda: options.beta, lambda step: setattr(options, "beta", 0.5 + step // 3)


def a_class_attribute() -> tuple[Read, Change]:
    class Options:
        beta = 0.5

    options = Options()
    return lambda: options.beta, lambda step: setattr(Options, "beta", 0.5 + step // 3)


def a_namespace() -> tuple[Read, Change]:
    options = Namespace(loss=Namespace(beta=0.5))
    return lambda: options.loss.beta, lambda step: setattr(options.loss, "beta", 0.5 + step // 3)


def a_list() -> tuple[Read, Change]:
    betas = [0.5]
    return lambda: betas[0], lambda step: betas.__setitem__(0, 0.5 + step // 3)


def the_size_of_a_list() -> tuple[Read, Change]:
    betas = [0.5]
    return lambda: sum(betas), lambda step: betas.append(1.0) if step == 3 else None


def a_dictionary_in_a_dictionary() -> tuple[Read, Change]:
    options = {"loss": {"beta": 0.5}}
    return lambda: options["loss"]["beta"], lambda step: options["loss"].update(
        beta=0.5 + step // 3
    )


def a_replaced_dictionary() -> tuple[Read, Change]:
    options = Namespace(loss={"beta": 0.5})
    return lambda: options.loss["beta"], lambda step: setattr(
        options, "loss", {"beta": 0.5 + step // 3}
    )


def a_default() -> tuple[Read, Change]:
    def read(options: Any = Namespace(beta=0.5)) -> Any:  # noqa: B008
        return options.beta

    return read, lambda step: setattr(read.__defaults__[0], "beta", 0.5 + step // 3)


def a_function() -> tuple[Read, Change]:
    options = Namespace(read=lambda: 0.5)

    def change(step: int) -> None:
        options.read = (lambda: 0.5) if step < 3 else (lambda: 1.5)

    return lambda: options.read(), change


def a_module_attribute() -> tuple[Read, Change]:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.beta = 0.5

        def forward(self) -> float:
            return self.beta

    scale = Scale()
    return lambda: scale(), lambda step: setattr(scale, "beta", 0.5 + step // 3)


def training_mode() -> tuple[Read, Change]:
    class Scale(nn.Module):
        def forward(self) -> float:
            return 2.0 if self.training else 1.0

    scale = Scale()
    return lambda: scale(), lambda step: scale.train(step < 3)


def a_property() -> tuple[Read, Change]:
    class Options:
        def __init__(self) -> None:
            self.step = 0

        @property
        def beta(self) -> float:
            return 0.5 + self.step

    options = Options()
    return lambda: options.beta, lambda step: setattr(options, "step", step // 3)


def a_handler() -> tuple[Read, Change]:
    handler = poutine.scale(scale=0.5)

    def read() -> Any:
        with handler:
            pyro.factor("more", torch.tensor(-1.0))
        return 1.0

    return read, lambda step: setattr(handler, "scale", 0.5 + step // 3)


NUMBERS = [
    a_closure,
    a_global,
    an_attribute,
    a_class_attribute,
    a_namespace,
    a_list,
    the_size_of_a_list,
    a_dictionary_in_a_dictionary,
    a_replaced_dictionary,
    a_default,
    a_function,
    a_module_attribute,
    training_mode,
    a_property,
    a_handler,
]


@pytest.mark.parametrize("place", NUMBERS, ids=lambda place: place.__name__)
def test_numbers_are_watched(place: Place) -> None:
    check_watched(place)


# --- tensors: changed in place or by assignment, they are inputs of one recording -------------


def a_tensor_in(place: str) -> tuple[Read, Change]:
    holders: dict[str, Any] = {
        "a namespace": Namespace(beta=torch.tensor(0.5)),
        "a module": nn.Module(),
        "a list": [torch.tensor(0.5)],
    }
    holders["a module"].register_buffer("beta", torch.tensor(0.5))
    holder = holders[place]
    if place == "a list":
        return lambda: holder[0], lambda step: holder.__setitem__(0, torch.tensor(0.5 + step))
    return lambda: holder.beta, lambda step: setattr(holder, "beta", torch.tensor(0.5 + step))


@pytest.mark.parametrize("place", ["a namespace", "a module", "a list"])
@pytest.mark.parametrize("in_place", [True, False])
def test_tensors_are_inputs(place: str, in_place: bool) -> None:
    def make() -> Training:
        read, assign = a_tensor_in(place)
        return training(model_of(read), (lambda step: read().add_(1)) if in_place else assign)

    assert same(make).num_recordings == 1


def test_a_tensor_in_a_tuple_is_an_input() -> None:
    """It cannot be put elsewhere while the step is recorded; its changes are seen all the same."""

    def make() -> Training:
        betas = (torch.tensor(0.5),)
        return training(model_of(lambda: betas[0]), lambda step: betas[0].add_(1))

    assert same(make).num_recordings == 1


def test_a_tensor_that_the_program_keeps() -> None:
    """It assigns a new one at each step, which the next step reads."""

    def make() -> Training:
        memory = Namespace(mean=torch.tensor(0.5))

        def model() -> None:
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
            memory.mean = 0.5 * memory.mean + z.detach().mean()
            pyro.factor("cost", -memory.mean * z)

        means.clear()
        return training(model, lambda step: means.append(float(memory.mean)))

    means: list[float] = []
    assert same(make).num_recordings == 1
    assert len(set(means)) > 4


def test_another_shape_or_dtype_is_recorded_anew() -> None:
    def make() -> Training:
        holder = Namespace(beta=torch.tensor(0.5))

        def change(step: int) -> None:
            if step == 3:
                holder.beta = torch.tensor([0.5, 1.0])

        return training(model_of(lambda: holder.beta.sum()), change)

    assert same(make, steps=10).num_recordings == 2


def test_replaced_parameters_are_trained() -> None:
    """A module whose weights were assigned anew, and values that were put into the store."""

    def make() -> Training:
        net = nn.Linear(1, 1)

        def guide() -> None:
            pyro.module("net", net, update_module_params=True)
            pyro.sample("z", dist.Bernoulli(logits=net(torch.ones(1)).squeeze(-1)))

        def change(step: int, optim: Any) -> None:
            if step == 3:
                pyro.get_param_store()["net$$$weight"] = torch.tensor([[2.0]])

        model = model_of(lambda: 1.0)
        return Training(model, guide, TraceEstimator_ELBO(RLOO(2)), between=change)

    same(make, steps=10)


def test_a_cleared_param_store() -> None:
    svi = train(lambda: training(model_of(lambda: 1.0)), compiled("replay")).svi
    pyro.clear_param_store()
    for _ in range(3):
        svi.step()
    logit = pyro.param("logit").detach()
    assert abs(float(logit) - 0.3) > 0.01
    assert svi.num_recordings == 2


def test_arguments_by_value() -> None:
    def make() -> Training:
        def model(beta: float, options: dict[str, Any]) -> None:
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
            pyro.factor("cost", -beta * options["power"] * z)

        made = training(model)
        made.arguments = lambda step: (0.5 + step // 4, {"power": 2, "x": torch.ones(step % 2 + 1)})
        return made

    assert same(make, steps=16).num_recordings == 8


# --- what is not recorded ---------------------------------------------------------------------


def test_a_branch_on_a_sample() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
        price = 2.0 if z > 0 else 1.0
        pyro.factor("cost", torch.tensor(-price))

    def make() -> Training:
        loss = TraceEstimator_ELBO(RLOO(2), worlds="sequential")
        return Training(model, guide, loss)

    runs_eager(make, "the step is not recorded.*reads the value of a tensor, at line .* of model()")


def test_a_number_that_the_program_keeps() -> None:
    def make() -> Training:
        counter = Namespace(steps=0)

        def read() -> float:
            counter.steps += 1
            return 0.1 * counter.steps

        return training(model_of(read), estimator=REINFORCE())

    runs_eager(make, r"counter\.steps")


@pytest.mark.parametrize("draw", [random.random, np.random.uniform])
def test_numbers_drawn_by_other_generators(draw: Callable[[], float]) -> None:
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002

    def restore() -> None:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002

    def make() -> Training:
        restore()
        return training(model_of(draw), estimator=REINFORCE())

    try:
        runs_eager(make, "draws from Python's or NumPy's generator")
    finally:
        restore()


def test_arguments_of_unknown_kind() -> None:
    def make() -> Training:
        made = training(model_of(lambda: 1.0))
        made.arguments = lambda step: (np.ones(3),)
        return made

    runs_eager(make, "an argument is a ndarray")


def test_arguments_that_want_a_gradient() -> None:
    weight = torch.tensor(1.0, requires_grad=True)
    model = model_of(lambda: 1.0)
    svi = CompiledSVI(model, guide, Adam({"lr": 0.1}), TraceEstimator_ELBO(), backend="replay")
    with one_warning("an argument requires a gradient"):
        for _ in range(3):
            svi.step(weight)
    assert svi.num_recordings == 0


def test_handlers_around_the_step() -> None:
    model = model_of(lambda: 1.0)
    svi = CompiledSVI(model, guide, Adam({"lr": 0.1}), TraceEstimator_ELBO(), backend="replay")
    with one_warning("there are handlers around the step"):
        for scale in (1.0, 2.0, 3.0):
            with poutine.scale(scale=scale):
                svi.step()
    assert svi.num_recordings == 0


def test_a_module_that_is_not_registered() -> None:
    net = nn.Linear(1, 1)
    svi = CompiledSVI(
        model_of(lambda: net(torch.ones(1)).sum()),
        guide,
        Adam({"lr": 0.1}),
        TraceEstimator_ELBO(RLOO(2)),
        backend="replay",
    )
    with one_warning(r"weight gets a gradient, and is not in the param store"):
        for _ in range(4):
            svi.step()


def test_a_number_of_many_values() -> None:
    def make() -> Training:
        options = Namespace(beta=0.0)
        return training(
            model_of(lambda: options.beta), lambda step: setattr(options, "beta", step / 10)
        )

    runs_eager(make, r"options\.beta has had more than 8 values.*Make a tensor of it", steps=24)


def test_a_cost_that_meets_other_sites() -> None:
    """A structure that changes with Python's state is recorded for each of its forms."""

    def make() -> Training:
        form = Namespace(long=False)

        def model() -> None:
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
            if form.long:
                w = pyro.param("w", torch.tensor(0.0))
                pyro.sample("y", dist.Normal(z + w, 1.0), obs=torch.tensor(1.0))
            pyro.factor("cost", -z)

        return training(model, lambda step: setattr(form, "long", step % 4 > 1))

    assert same(make, steps=16).num_recordings >= 2


def test_tensors_of_a_step_are_let_go() -> None:
    """Nothing of a recording stays in the program: what is fake would break a later use."""
    kept = Namespace(z=None)

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
        kept.z = z
        pyro.factor("cost", -z * x)

    svi = CompiledSVI(
        model, guide, Adam({"lr": 0.1}), TraceEstimator_ELBO(RLOO(2)), backend="replay"
    )
    for _ in range(3):
        svi.step(torch.tensor(1.0))
        assert type(kept.z) is Tensor
    assert svi.num_recordings == 1
