"""Places where programs keep numbers, all of which a compiled SVI watches."""

import collections
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_nondiff.estimators import REINFORCE, RLOO, NeuralBaseline
from pyro_nondiff.infer import ExpectedCost, no_guide
from pyro_nondiff.ops import cost, external
from tests.infer.reading_programs import (
    Change,
    Place,
    Read,
    check_watched,
    model_of,
    runs_eager,
    training,
)
from tests.infer.side_by_side import Training, compiled, same, train

pytestmark = pytest.mark.usefixtures("param_store")

settings = ModuleType("settings")
settings.__file__ = "settings.py"


def a_class() -> tuple[Read, Change]:
    class Options:
        beta = 0.5

    return lambda: Options.beta, lambda step: setattr(Options, "beta", 0.5 + step // 3)


def another_file() -> tuple[Read, Change]:
    settings.beta = 0.5  # type: ignore[attr-defined]
    return lambda: settings.beta, lambda step: setattr(settings, "beta", 0.5 + step // 3)


def slots() -> tuple[Read, Change]:
    @dataclass(slots=True)
    class Options:
        beta: float = 0.5

    options = Options()
    return lambda: options.beta, lambda step: setattr(options, "beta", 0.5 + step // 3)


def an_attribute_of_a_function() -> tuple[Read, Change]:
    def read() -> Any:
        return read.beta  # type: ignore[attr-defined]

    read.beta = 0.5  # type: ignore[attr-defined]
    return read, lambda step: setattr(read, "beta", 0.5 + step // 3)


def a_partial_function() -> tuple[Read, Change]:
    def scale(beta: float) -> float:
        return beta

    options = Namespace(read=partial(scale, 0.5))
    return lambda: options.read(), lambda step: setattr(
        options, "read", partial(scale, 0.5 + step // 3)
    )


def an_attribute_of_a_dictionary() -> tuple[Read, Change]:
    class Options(dict[str, float]):
        beta = 0.5

    options = Options()
    return lambda: options.beta, lambda step: setattr(options, "beta", 0.5 + step // 3)


def a_deque() -> tuple[Read, Change]:
    betas = collections.deque([0.5, 1.0, 2.0])
    return lambda: betas[0], lambda step: betas.rotate(1) if step % 3 == 0 else None


def a_set() -> tuple[Read, Change]:
    betas = {0.5}

    def change(step: int) -> None:
        betas.clear()
        betas.add(0.5 + step // 3)

    return lambda: sum(betas), change


def a_special_method() -> tuple[Read, Change]:
    beta = 0.5

    class Options:
        def __getitem__(self, name: str) -> float:
            return beta

    def change(step: int) -> None:
        nonlocal beta
        beta = 0.5 + step // 3

    options = Options()
    return lambda: options["beta"], change


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def a_new_layer() -> tuple[Read, Change]:
    net = nn.Sequential(Double())
    return lambda: net(torch.ones(())), lambda step: net.append(Double()) if step == 3 else None


def a_new_hook() -> tuple[Read, Change]:
    net = Double()

    def change(step: int) -> None:
        if step == 3:
            net.register_forward_hook(lambda module, args, found: 3 * found)

    return lambda: net(torch.ones(())), change


def a_new_buffer() -> tuple[Read, Change]:
    net = nn.Module()

    def change(step: int) -> None:
        if step == 3:
            net.register_buffer("beta", torch.tensor(2.0))

    return lambda: getattr(net, "beta", 0.5), change


NUMBERS = [
    a_class,
    another_file,
    slots,
    an_attribute_of_a_function,
    a_partial_function,
    an_attribute_of_a_dictionary,
    a_deque,
    a_set,
    a_special_method,
    a_new_layer,
    a_new_hook,
    a_new_buffer,
]


@pytest.mark.parametrize("place", NUMBERS, ids=lambda place: place.__name__)
def test_numbers_are_watched(place: Place) -> None:
    check_watched(place)


@pytest.mark.parametrize("bound", [False, True])
def test_functions_among_the_arguments(bound: bool) -> None:
    def make() -> Training:
        class Options:
            beta = 0.5

            def read(self) -> float:
                return self.beta

        options = Options()

        def model(read: Read) -> None:
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
            pyro.factor("cost", -read() * z)

        made = training(model, lambda step: setattr(options, "beta", 0.5 + step // 3))
        given = options.read if bound else lambda: options.beta
        made.arguments = lambda step: (given,)
        return made

    assert same(make, steps=12).num_recordings == 4


def test_functions_of_estimators() -> None:
    def make() -> Training:
        options = Namespace(beta=0.5)
        baseline = NeuralBaseline(nn.Linear(1, 1), input=lambda x: x * options.beta)
        made = training(
            model_of(lambda: 1.0),
            lambda step: setattr(options, "beta", 0.5 + step // 3),
            REINFORCE(baseline),
        )
        made.arguments = lambda step: (torch.ones(1),)
        return made

    assert same(make, steps=12).num_recordings == 4


def test_many_modules_do_not_hide_the_program() -> None:
    def make() -> Training:
        net = nn.Sequential(*[nn.Identity() for _ in range(1200)])
        options = Namespace(beta=0.5)
        return training(
            model_of(lambda: options.beta * net(torch.ones(()))),
            lambda step: setattr(options, "beta", 0.5 + step // 4),
        )

    assert same(make).num_recordings == 2


def test_more_than_can_be_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_nondiff.infer.capture.places._MOST", 20)
    runs_eager(lambda: training(model_of(lambda: 1.0)), "reaches more than .* things")


def test_what_an_external_op_calls_is_the_program_too() -> None:
    """An object with a method that is called from outside, and another that is the program."""

    class Shop:
        def __init__(self) -> None:
            self.scale = 1.0

        def price(self, item: Tensor) -> float:
            return float(item)

        def program(self) -> None:
            item = pyro.sample("item", dist.Categorical(logits=pyro.param("p", torch.zeros(3))))
            cost("price", external("price", self.price, item) * self.scale)

    def make() -> Training:
        shop = Shop()
        return Training(
            shop.program,
            no_guide,
            ExpectedCost(RLOO(3)),
            between=lambda step, optim: setattr(shop, "scale", 1.0 + step // 4),
        )

    assert same(make).num_recordings == 2


CALLS = 0


def test_a_refused_recording_changes_nothing() -> None:
    """The run that finds out that a step cannot be recorded does not count."""

    def make() -> Training:
        global CALLS
        CALLS = 0

        class Counter:
            calls = 0

        seen = collections.Counter(steps=1)

        def read() -> float:
            global CALLS
            CALLS += 1
            Counter.calls += 1
            return 0.1 * CALLS + 0.2 * Counter.calls + seen["steps"]

        return training(model_of(read), estimator=REINFORCE())

    runs_eager(make, "the step changes")


def test_counts_are_not_added_to() -> None:
    seen = collections.Counter(steps=1)
    svi = train(lambda: training(model_of(lambda: seen["steps"])), compiled("replay")).svi
    assert seen == {"steps": 1}
    assert svi.num_recordings == 1
