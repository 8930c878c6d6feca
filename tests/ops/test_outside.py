"""external and cost: what lies outside the program."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.infer import TraceEstimator_ELBO
from pyro_nondiff.ops import cost, external

TABLE = np.array([3.0, 1.0, 2.0])


def look_up(choice: Tensor) -> float:
    return TABLE[choice.cpu().numpy().argmax()]


@pytest.mark.parametrize("batch", [(), (1,), (4, 2), (0,)])
def test_is_called_once_for_each_element_of_the_batch(batch: tuple[int, ...]) -> None:
    seen = []

    def fn(x: Tensor, factor: float) -> np.ndarray:
        seen.append(x)
        return x.cpu().numpy()[:2] * factor

    x = torch.randn(*batch, 3)
    found = external("e", fn, x, 2.0, event_dim=1, shape=(2,))
    assert torch.equal(found, 2 * x[..., :2])
    assert len(seen) == torch.Size(batch).numel()
    assert all(one.shape == (3,) and not one.requires_grad for one in seen)


def test_batches_of_the_arguments_are_broadcast() -> None:
    a, b = torch.randn(4, 1, 3), torch.randn(2)
    found = external("e", lambda a, b: float(a.sum() + b), a, b, event_dim=[1, 0])
    # three numbers are added in another order
    torch.testing.assert_close(found, a.sum(-1) + b)


def test_batched_function_is_called_once() -> None:
    seen = []

    def fn(x: Tensor) -> np.ndarray:
        seen.append(x.shape)
        return x.cpu().numpy().sum(1)

    x = torch.randn(4, 2, 3)
    found = external("e", fn, x, event_dim=1, batched=True)
    torch.testing.assert_close(found, x.sum(-1))  # order of the sum
    assert seen == [(8, 3)]


@pytest.mark.parametrize(
    ("answer", "dtype"),
    [
        (1.5, torch.float32),
        (np.float64(1.5), torch.float32),
        (np.array(1.5, dtype=np.float16), torch.float32),
        (torch.full((), 1.5, requires_grad=True, dtype=torch.float64), torch.float32),
        (3, torch.int64),
        (True, torch.bool),
    ],
)
def test_answer_becomes_a_tensor_without_gradient(answer: Any, dtype: torch.dtype) -> None:
    x = torch.zeros((), dtype=torch.float32, requires_grad=True)
    found = external("e", lambda x: answer, x)
    assert found.dtype == dtype
    assert not found.requires_grad
    assert found == torch.as_tensor(answer)


def test_what_is_written_to_the_answer_later_does_not_change_it() -> None:
    buffer = np.zeros(2)

    def fn(x: Tensor) -> np.ndarray:
        buffer[:] = x
        return buffer

    x = torch.randn(3, 2)
    assert torch.equal(external("e", fn, x, event_dim=1, shape=(2,)), x)


def raises(x: Tensor) -> float:
    return 1 / 0


@pytest.mark.parametrize(
    ("fn", "options", "message"),
    [
        (raises, {}, "op 'e': raises raised ZeroDivisionError: division by zero"),
        (lambda x: "five", {}, "op 'e': .lambda. gave str, which is no tensor"),
        (lambda x: None, {}, "gave NoneType"),
        (lambda x: float("nan"), {}, "op 'e' returned nan, at 2 of 2 places"),
        (lambda x: -float("inf"), {}, "returned -inf"),
        (lambda x: [1.0, 2.0], {}, r"returned shape \(2,\) where \(\) was expected"),
        (lambda x: x[0], {"batched": True}, r"returned shape \(\) where \(2,\) was"),
        (lambda x: 1.0, {"event_dim": 2}, r"event_dim is 2, but an argument has shape \(2,\)"),
        (lambda x: 1.0, {"event_dim": [0, 0]}, "event_dim has 2 entries for 1 arguments"),
    ],
)
def test_error_names_the_op(
    fn: Callable[[Tensor], Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(NonDiffError, match=message):
        external("e", fn, torch.zeros(2), **options)


def test_error_keeps_what_caused_it() -> None:
    with pytest.raises(NonDiffError) as caught:
        external("e", raises, torch.zeros(()))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_sites_inside_are_no_part_of_the_program() -> None:
    def fn() -> Tensor:
        return pyro.sample("inner", dist.Normal(0.0, 1.0))

    trace = poutine.trace(external).get_trace("e", fn)
    assert "inner" not in trace


@pytest.mark.parametrize("value", [2.0, 2, np.array([2.0]), torch.tensor([2.0])], ids=type)
def test_cost_is_a_factor(value: Any) -> None:
    trace = poutine.trace(cost).get_trace("c", value)
    trace.compute_log_prob()
    log_prob = trace.nodes["c"]["log_prob"]
    assert log_prob.sum() == -2
    assert log_prob.dtype == torch.get_default_dtype()


def test_cost_has_the_gradient_of_its_value() -> None:
    value = torch.tensor(2.0, requires_grad=True)
    (-poutine.trace(cost).get_trace("c", value).log_prob_sum()).backward()
    assert value.grad == 1


def test_cost_with_an_empty_stack_does_nothing() -> None:
    cost("c", 1.0)


@pytest.mark.parametrize("value", [float("nan"), np.array([1.0, np.inf]), "much"])
def test_cost_that_is_no_finite_number_is_refused(value: Any) -> None:
    with pytest.raises(NonDiffError, match="'c'"):
        cost("c", value)


def test_cost_is_the_same_in_pyro_s_objective_and_in_ours() -> None:
    def model() -> None:
        with pyro.plate("data", 2), poutine.scale(scale=3.0):
            z = pyro.sample("z", dist.OneHotCategorical(logits=torch.zeros(2, 3)))
            cost("c", external("e", look_up, z, event_dim=1))

    def guide() -> None:
        with pyro.plate("data", 2), poutine.scale(scale=3.0):
            certain = torch.tensor([[0.0, 99.0, 0.0], [0.0, 0.0, 99.0]])
            pyro.sample("z", dist.OneHotCategorical(logits=certain))

    expected = 3 * (1.0 + 2.0 + 2 * np.log(3))
    for elbo in (Trace_ELBO(), TraceEstimator_ELBO(), TraceEstimator_ELBO(num_particles=4)):
        # e^-99 is nothing beside 1; a sum of six terms, in the seven digits of float32
        assert elbo.loss(model, guide) == pytest.approx(expected, rel=1e-6)
