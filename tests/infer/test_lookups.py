"""Where a model looks a straight-through value up, a warning says so."""

import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_nondiff.diagnostics import find_lookups
from pyro_nondiff.distributions import StraightThroughOneHotCategorical
from pyro_nondiff.errors import NonDiffWarning
from pyro_nondiff.estimators import REBAR, RLOO, StraightThrough
from pyro_nondiff.infer import TraceEstimator_ELBO

pytestmark = pytest.mark.usefixtures("param_store")


class Table(dist.TorchDistribution):
    """A user's law that looks a one-hot value up."""

    support = dist.constraints.one_hot
    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, probs: Tensor) -> None:
        self.probs = probs
        super().__init__(probs.shape[:-1], probs.shape[-1:])

    def log_prob(self, value: Tensor) -> Tensor:
        return self.probs.log()[value.argmax(-1)]


def model_of(law: Any) -> Any:
    return lambda: pyro.sample("z", law(torch.tensor([0.7, 0.2, 0.1])))


def guide() -> None:
    pyro.sample("z", dist.OneHotCategorical(logits=pyro.param("logits", torch.zeros(3))))


def straight_through_guide() -> None:
    logits = pyro.param("logits", torch.zeros(3))
    pyro.sample("z", StraightThroughOneHotCategorical(logits=logits))


def test_engine_names_the_site_that_is_looked_up() -> None:
    elbo = TraceEstimator_ELBO(StraightThrough())
    with pytest.warns(NonDiffWarning, match="site 'z': the model's Table looks .* up"):
        elbo.loss_and_grads(model_of(Table), guide)


@pytest.mark.parametrize(
    ("law", "estimator"),
    [
        (dist.OneHotCategorical, StraightThrough()),
        (StraightThroughOneHotCategorical, StraightThrough()),
        (Table, RLOO()),
        (dist.OneHotCategorical, REBAR()),
    ],
)
def test_engine_says_nothing_where_all_is_well(law: Any, estimator: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TraceEstimator_ELBO(estimator).loss_and_grads(model_of(law), guide)


@pytest.mark.parametrize(
    ("law", "found"),
    [(dist.OneHotCategorical, 1), (StraightThroughOneHotCategorical, 0)],
)
def test_under_pyros_objectives_one_asks(law: Any, found: int) -> None:
    state = torch.get_rng_state()
    texts = find_lookups(model_of(law), straight_through_guide)
    assert len(texts) == found
    assert all("site 'z'" in text for text in texts)
    assert torch.equal(torch.get_rng_state(), state)
