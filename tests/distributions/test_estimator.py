"""``StraightThrough`` as an estimator: its expectation, through a whole ELBO, is the tabulated."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.estimators import StraightThrough
from pyro_nondiff.infer import TraceEstimator_ELBO, config_estimator
from pyro_nondiff.noise import Request
from pyro_nondiff.testing import Certificate, certify, certify_soft, quadrature

from .biases import CASES, DEGREES, GRADIENTS, NOISY, Case, bias_table

EXACT = 1e-9
"""As in ``test_biases``; the quadrature of ``certify_soft`` leaves out 1e-11."""

Program = Callable[[], None]


def programs(case: Case, degree: int) -> tuple[Program, Program]:
    """A guide with a case's factors, and a model whose prior is the guide's law as it is now.

    The log-ratio of the two is then zero, as is its slope in the values, and what is left of the
    ELBO is the case's cost.
    """

    def law(logits: Tensor) -> Any:
        return (
            dist.OneHotCategorical(logits=logits) if case.one_hot else dist.Bernoulli(logits=logits)
        )

    def run(parameters: dict[str, Tensor]) -> Tensor:
        values: list[Tensor] = []
        for index in range(len(case.sizes)):
            values.append(pyro.sample(f"z{index}", law(case.logits(parameters, values))))
        return case.base(values)

    def model() -> None:
        pyro.factor("cost", -(run(case.parameters) ** degree))

    def guide() -> None:
        run({name: pyro.param(name, value) for name, value in case.parameters.items()})

    return model, guide


@dataclass
class GridWithConditional(quadrature.Grid):
    """The nodes of the last site's noise, for the one conditional noise of ``gumbel_rao``."""

    _site: str = field(default="")

    def __call__(self, request: Request) -> Tensor:
        if request.role == "v" and request.site == "":
            return self._last[self._site].reshape(request.shape)
        self._site = request.site
        return super().__call__(request)


def certificate(
    case: Case, degree: int, estimator: StraightThrough, monkeypatch: pytest.MonkeyPatch
) -> Certificate:
    monkeypatch.setattr(quadrature, "Grid", GridWithConditional)
    elbo = TraceEstimator_ELBO(estimator, worlds="vectorized")
    model, guide = programs(case, degree)
    if estimator.gradient in NOISY:
        return certify_soft(elbo, model, guide, step=0.35, width=27.0)
    return certify(elbo, model, guide)


@pytest.mark.usefixtures("param_store")
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_expectation_is_the_tabulated_one(
    case: Case, gradient: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact gradient and bias, for a quadratic cost: through the engine, to what the table has."""
    temperature = 1.0 if gradient in ("identity", "selected") else 0.5
    estimator = StraightThrough(gradient, temperature, num_conditional=1)
    found = certificate(case, DEGREES["quadratic"], estimator, monkeypatch)
    for name in case.parameters:
        (row,) = (
            row
            for row in bias_table()
            if (row.factors, row.parameter, row.gradient) == (case.name, name, gradient)
            and (row.cost, row.temperature) == ("quadratic", temperature)
        )
        assert found.exact[name].reshape(-1).tolist() == pytest.approx(row.exact, abs=EXACT)
        assert found.mean[name].reshape(-1).tolist() == pytest.approx(row.mean, abs=EXACT)


@pytest.mark.usefixtures("param_store")
@pytest.mark.parametrize(
    ("gradient", "cost"), [("identity", "linear"), ("reinmax", "linear"), ("reinmax", "quadratic")]
)
@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.name)
def test_certificate_without_bias(
    case: Case, gradient: str, cost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = certificate(case, DEGREES[cost], StraightThrough(gradient), monkeypatch)
    assert found.bias <= EXACT


@pytest.mark.usefixtures("param_store")
def test_conditional_noises_change_no_value() -> None:
    model, guide = programs(CASES[1], 2)
    losses = []
    for count in (1, 5):
        elbo = TraceEstimator_ELBO(StraightThrough("gumbel_rao", num_conditional=count))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            losses.append(elbo.differentiable_loss(model, guide))
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.usefixtures("param_store")
def test_other_laws_are_refused() -> None:
    def program() -> None:
        pyro.sample("z", dist.Poisson(torch.tensor(2.0)))

    elbo = TraceEstimator_ELBO()
    guide = config_estimator(program, {"z": StraightThrough()})
    with pytest.raises(NonDiffError, match=r"'z'.*StraightThrough needs a Bernoulli or OneHot"):
        elbo.differentiable_loss(program, guide)
