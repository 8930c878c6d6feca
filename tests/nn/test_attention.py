"""Attention: scores by the papers' formulas, and an op that every handler and estimator serves."""

from collections.abc import Callable

import pyro
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.estimators import RLOO, AbstractEstimator, Enumerate
from pyro_nondiff.handlers import mode, randomize, soften
from pyro_nondiff.infer import ExpectedCost, no_guide
from pyro_nondiff.nn import AbstractAttention, AdditiveAttention, DotProductAttention
from pyro_nondiff.ops import cost
from pyro_nondiff.testing import exact_moments

BATCH, QUERIES, KEYS, SIZE = 2, 3, 4, 5
MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])[:, None]


@pytest.fixture(params=["additive", "dot product"])
def attention(request: pytest.FixtureRequest) -> AbstractAttention:
    if request.param == "additive":
        return AdditiveAttention(SIZE, SIZE, hidden_size=6)
    return DotProductAttention()


@pytest.fixture
def given() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values."""
    return (
        torch.randn(BATCH, QUERIES, SIZE),
        torch.randn(BATCH, KEYS, SIZE),
        torch.randn(BATCH, KEYS, 2),
    )


def test_additive_score_is_the_formula_of_the_paper() -> None:
    attention = AdditiveAttention(3, 5, hidden_size=6)
    queries, keys = torch.randn(BATCH, QUERIES, 3), torch.randn(BATCH, KEYS, 5)
    found = attention.scores(queries, keys)
    v, query, key = attention.score.weight[0], attention.query, attention.key
    for b, i, j in torch.cartesian_prod(*map(torch.arange, (BATCH, QUERIES, KEYS))):
        inner = query.weight @ queries[b, i] + key.weight @ keys[b, j] + query.bias
        # the same sums in another order
        torch.testing.assert_close(found[b, i, j], v @ inner.tanh())


def check_soft_dot_product_is_torchs(mask: Tensor) -> None:
    queries, keys, values = (torch.randn(BATCH, n, SIZE) for n in (QUERIES, KEYS, KEYS))
    with soften():
        found = DotProductAttention()("z", queries, keys, values, mask=mask)
    expected = scaled_dot_product_attention(queries, keys, values, attn_mask=MASK)
    # the same sums in another order
    torch.testing.assert_close(found, expected)


def test_soft_dot_product_is_torchs() -> None:
    check_soft_dot_product_is_torchs(MASK)


def test_planted_mask_of_the_padding_is_caught() -> None:
    with pytest.raises(AssertionError):
        check_soft_dot_product_is_torchs(~MASK)


def test_hard_attention_takes_the_value_of_the_best_key(
    attention: AbstractAttention, given: tuple[Tensor, Tensor, Tensor]
) -> None:
    queries, keys, values = given
    best = attention.pair_scores(queries, keys).argmax(-1)
    found = attention("z", queries, keys, values)
    for b in range(BATCH):
        assert torch.equal(found[b], values[b, best[b]])
    with mode(), randomize():
        drawn = attention("z", queries, keys, values)
    torch.testing.assert_close(drawn, found)  # a product with a one-hot vector


def test_keys_are_the_values_that_are_not_given(
    attention: AbstractAttention, given: tuple[Tensor, Tensor, Tensor]
) -> None:
    queries, keys, _ = given
    assert torch.equal(attention("z", queries, keys), attention("z", queries, keys, keys))


@pytest.mark.parametrize("handler", [soften(), randomize(), mode()], ids=["soft", "drawn", "hard"])
def test_padding_plays_no_part(
    attention: AbstractAttention,
    given: tuple[Tensor, Tensor, Tensor],
    handler: Callable[..., Callable[..., Tensor]],
) -> None:
    queries, keys, values = given
    keys, values = (x.masked_fill(~MASK[:, 0, :, None], 1e2) for x in (keys, values))
    keys.requires_grad_()
    with handler:
        found = attention("z", queries, keys, values, mask=MASK)
    assert found[1].abs().max() < 50
    if found.requires_grad:
        (gradient,) = torch.autograd.grad(found.sum(), keys)
        assert torch.equal(gradient[1, 2:], torch.zeros(2, SIZE))
        assert gradient[1, :2].abs().min() > 0


def test_a_query_that_may_choose_nothing_has_no_preference(attention: AbstractAttention) -> None:
    queries, keys = torch.randn(QUERIES, SIZE), torch.randn(KEYS, SIZE)
    scores = attention.scores(queries, keys, torch.zeros(1, KEYS, dtype=torch.bool))
    assert torch.equal(scores.softmax(-1), torch.full((QUERIES, KEYS), 1 / KEYS))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(KEYS), "DotProductAttention: mask must be boolean, .* found torch.float"),
        (torch.ones(BATCH, KEYS, dtype=torch.bool), "mask of shape .2, 4. does not broadcast"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask: Tensor, message: str) -> None:
    queries, keys = torch.randn(BATCH, QUERIES, SIZE), torch.randn(BATCH, KEYS, SIZE)
    with pytest.raises(NonDiffError, match=message):
        DotProductAttention()("z", queries, keys, mask=mask)


@pytest.mark.usefixtures("param_store")
@pytest.mark.parametrize("estimator", [Enumerate(), RLOO(2)], ids=repr)
def test_expected_cost_of_a_random_choice_has_its_exact_gradient(
    estimator: AbstractEstimator,
) -> None:
    if torch.get_default_dtype() != torch.float64:
        pytest.skip("an exact expectation is compared in float64")
    attention = AdditiveAttention(2, 2, hidden_size=3)
    queries, keys = torch.randn(2, 1, 2), torch.randn(2, 3, 2)
    mask = torch.tensor([[True, True, True], [True, False, True]])[:, None]

    def price(value: Tensor) -> Tensor:
        return (value.sin() + value.square()).sum(-1)

    @randomize()
    def program() -> None:
        pyro.module("attention", attention)
        with pyro.plate("batch", 2, dim=-2), pyro.plate("queries", 1, dim=-1):
            cost("price", price(attention("z", queries, keys, mask=mask)))

    mean, _, _ = exact_moments(ExpectedCost(estimator, worlds="vectorized"), program, no_guide)
    law = attention.scores(queries, keys, mask).softmax(-1)
    expected = (law * price(keys)[:, None]).sum()
    names, parameters = zip(*attention.named_parameters(), strict=True)
    gradients = torch.autograd.grad(expected, parameters)
    for name, gradient in zip(names, gradients, strict=True):
        found = next(value for key, value in mean.items() if key.endswith(name))
        assert (found - gradient).abs().max() < 1e-9  # the bound of DESIGN.md
