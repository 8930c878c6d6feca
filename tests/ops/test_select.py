"""select: the chosen item alone, or the sum that the choice's weights make."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.handlers import ignore, randomize, soften, straight_through
from pyro_nondiff.ops import _mix, select

SCORES = torch.tensor([0.0, 2.0, 1.0])


def never() -> Any:
    raise AssertionError("an item that was not chosen has been called")


@pytest.mark.parametrize("event", [(), (4,), (4, 2)])
@pytest.mark.parametrize("batch", [(), (5,), (6, 1)])
@pytest.mark.parametrize("shared", [False, True], ids=["items a row", "items for all"])
def test_takes_the_item_in_each_row(
    batch: tuple[int, ...], event: tuple[int, ...], shared: bool
) -> None:
    scores = torch.randn(*batch, 3)
    items = torch.randn(*(() if shared else batch), 3, *event)
    found = select("v", scores, items, event_dim=len(event))
    assert found.shape == batch + event
    everyone = items.expand(*batch, 3, *event).reshape(-1, 3, *event)
    rows = scores.reshape(-1, 3).argmax(-1)
    expected = everyone[torch.arange(len(rows)), rows].reshape(batch + event)
    assert torch.equal(found, expected)


def test_items_may_have_a_batch_that_scores_have_not() -> None:
    items = torch.randn(7, 3, 2)
    assert torch.equal(select("v", SCORES, items, event_dim=1), items[:, 1])


@pytest.mark.parametrize("event", [(2,), (2, 3)])
@pytest.mark.parametrize("handler", [ignore(), soften()], ids=["hard", "soft"])
def test_rows_that_share_their_items_have_the_value_and_gradient_of_copies(
    handler: Any, event: tuple[int, ...]
) -> None:
    """As attention has it: in each of five worlds, four queries to each of two memories."""
    scores = torch.randn(5, 2, 4, 3)
    items = torch.randn(2, 1, 3, *event, requires_grad=True)
    copies = items.expand(5, 2, 4, 3, *event)
    with handler:
        found = select("v", scores, items, event_dim=len(event))
        expected = select("w", scores, copies, event_dim=len(event))
    # sums of the same products in another order
    torch.testing.assert_close(found, expected)
    weight = torch.randn(found.shape)
    gradients = [torch.autograd.grad((v * weight).sum(), items)[0] for v in (found, expected)]
    torch.testing.assert_close(*gradients)


def check_gradient_goes_to_the_chosen_item_alone() -> None:
    items = torch.randn(3, 2, requires_grad=True)
    scores = SCORES.clone().requires_grad_()
    value = select("v", scores, items, event_dim=1)
    to_items, to_scores = torch.autograd.grad(value.sum(), [items, scores], allow_unused=True)
    assert torch.equal(to_items, torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
    assert to_scores is None


def test_gradient_goes_to_the_chosen_item_alone() -> None:
    check_gradient_goes_to_the_chosen_item_alone()


def test_planted_gradient_to_all_items_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    take = _mix._take

    def leaky(weights: Tensor, items: Tensor, event_dim: int) -> Tensor:
        total = items.sum(-1 - event_dim)
        return take(weights, items, event_dim) + total - total.detach()

    monkeypatch.setattr(_mix, "_take", leaky)
    with pytest.raises(AssertionError):
        check_gradient_goes_to_the_chosen_item_alone()


def test_of_functions_the_chosen_one_alone_is_called() -> None:
    assert select("v", SCORES, [never, lambda: {"any": "kind"}, never]) == {"any": "kind"}
    with ignore():
        assert select("v", SCORES, [never, lambda: 3, never]) == 3
    with randomize():
        assert select("v", 1e6 * SCORES, [never, lambda: 3, never]) == 3


def test_of_tensors_and_functions_the_chosen_tensor_is_taken() -> None:
    item = torch.zeros(2)
    assert select("v", SCORES, [never, item, never]) is item


def test_a_batch_evaluates_what_some_row_chose() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [2.0, 0.0, 1.0]])
    a, b = torch.tensor([1.0, 2.0]), torch.randn(3, 2)
    found = select("v", scores, [a, never, lambda: b], event_dim=1)
    assert torch.equal(found, torch.stack([a, b[1], a]))


def test_a_batch_that_agrees_has_the_shape_of_a_batch() -> None:
    found = select("v", SCORES.expand(4, 3), [never, torch.ones(2), never], event_dim=1)
    assert found.shape == (4, 2)


@pytest.mark.parametrize("as_list", [False, True])
def test_straight_through_is_the_item_exactly_with_the_gradient_of_the_sum(as_list: bool) -> None:
    items = torch.tensor([0.1, 0.3, 1e9], requires_grad=True)
    scores = SCORES.clone().requires_grad_()
    given = [items[0], lambda: items[1], items[2]] if as_list else items
    with straight_through():
        value = select("v", scores, given)
    assert value == items[1]
    to_items, to_scores = torch.autograd.grad(value, [items, scores])
    assert torch.equal(to_items, torch.tensor([0.0, 1.0, 0.0]))
    p = scores.softmax(-1)
    # the same products in another order
    torch.testing.assert_close(to_scores, p * (items - p @ items))


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("event", [(), (4,), (4, 2)])
def test_soft_choice_is_the_sum_of_all_items(event: tuple[int, ...], as_list: bool) -> None:
    items = torch.randn(5, 3, *event)
    scores = torch.randn(6, 1, 3)
    given = [lambda k=k: items[:, k] for k in range(3)] if as_list else items
    with soften():
        found = select("v", scores, given, event_dim=len(event))
    weights = scores.softmax(-1).reshape(6, 1, 3, *(1 for _ in event))
    expected = (weights * items).sum(2)
    assert found.shape == (6, 5, *event)
    # sums of three products, in another order
    torch.testing.assert_close(found, expected)


def test_integer_items_are_taken_as_they_are_and_summed_as_floats() -> None:
    items = torch.tensor([1, 5, 3])
    assert select("v", SCORES, items).dtype == torch.int64
    with soften(1e-3):
        assert select("v", SCORES, items) == 5.0


@pytest.mark.parametrize(
    ("items", "event_dim", "message"),
    [
        (torch.zeros(4), 0, "op 'v': 3 scores choose along dimension -1 of items of shape .4,."),
        (torch.zeros(3, 2), 0, "of shape batch . .K,. . event"),
        (torch.zeros(3), 1, "choose along dimension -2"),
        ([torch.zeros(2)], 1, "op 'v': 3 scores choose from 1 items"),
        ([lambda: "a", lambda: 1.0, torch.zeros(2)], 1, "kinds .'Tensor', 'float', 'str'."),
        ([torch.zeros(2), torch.zeros(3), torch.zeros(2)], 1, "shapes ..2,., .3,., .2,.. have"),
        ([torch.zeros(2)] * 3, 2, "event_dim is 2, and items have shapes"),
    ],
)
def test_items_that_do_not_fit_are_refused(items: Any, event_dim: int, message: str) -> None:
    with soften(), pytest.raises(NonDiffError, match=message):
        select("v", SCORES, items, event_dim=event_dim)
