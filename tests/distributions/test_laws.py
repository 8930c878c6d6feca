"""Scores, and laws as maps of noise."""

from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_nondiff import noise
from pyro_nondiff.distributions import log_prob, noise_kind, noise_shape, transport

MASK = torch.tensor([True, False, True])


def test_score_is_not_masked() -> None:
    base = dist.Bernoulli(logits=torch.tensor([0.3, -1.0, 2.0]))
    value = torch.tensor([1.0, 0.0, 0.0])
    for law, dims in ((base.mask(MASK), 0), (base.mask(MASK).to_event(1), 1)):
        score, masked = log_prob(law, value)
        expected = base.log_prob(value)
        torch.testing.assert_close(score, expected.sum(-1) if dims else expected)
        torch.testing.assert_close(masked, law.log_prob(value))


LAWS = [
    dist.Bernoulli(logits=torch.tensor([0.3, -1.0, 2.0])),
    dist.Categorical(logits=torch.randn(3, 4, generator=torch.Generator().manual_seed(0))),
    dist.OneHotCategorical(logits=torch.randn(3, 4, generator=torch.Generator().manual_seed(0))),
    dist.Normal(torch.tensor([0.0, 1.0, 2.0]), 0.5),
    dist.LogNormal(torch.tensor([0.0, 1.0, 2.0]), 0.5),
    dist.MultivariateNormal(torch.zeros(3, 2), torch.eye(2)),
    dist.Poisson(torch.tensor([1.0, 2.0, 3.0])),
    dist.Gamma(torch.tensor([1.0, 2.0, 3.0]), 1.0),
]


@pytest.mark.parametrize("base", LAWS, ids=repr)
@pytest.mark.parametrize("wrapper", ["plain", "event", "expand", "mask", "all"])
def test_log_prob_and_transport_of_wrapped_laws(base: Any, wrapper: str) -> None:
    law = {
        "plain": lambda: base,
        "event": lambda: base.to_event(1),
        "expand": lambda: base.expand((2, 3)),
        "mask": lambda: base.mask(MASK),
        "all": lambda: base.expand((2, 3)).mask(MASK).to_event(1),
    }[wrapper]()
    value = law.sample((4,))
    torch.testing.assert_close(log_prob(law, value)[1], law.log_prob(value))
    kind = noise_kind(law)
    if kind is not None:
        shape = (4, *noise_shape(law))
        drawn = noise.draw(noise.Request("z", kind, shape, torch.float64, "cpu"))
        mapped = transport(law, drawn)
        assert mapped.shape == value.shape
        assert mapped.dtype == value.dtype
        assert law.log_prob(mapped).isfinite().all()


@pytest.mark.parametrize("worlds", [(), (2,), (2, 1)], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_score_of_bits_that_share_logits(worlds: tuple[int, ...], shared: bool) -> None:
    """Worlds and plate elements that share logits get torch's score and its gradient."""
    leaf = torch.tensor([[0.0, -3.0, 2.0, 30.0]], requires_grad=True)
    logits = leaf.expand(5, 4) if shared else leaf + torch.arange(5.0)[:, None]
    law = dist.Bernoulli(logits=logits).to_event(1)
    value = torch.bernoulli(torch.full((*worlds, 5, 4), 0.5))
    weights = torch.randn((*worlds, 5))
    found, expected = log_prob(law, value)[0], law.log_prob(value)
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad((weights * x).sum(), leaf)[0] for x in (found, expected)]
    torch.testing.assert_close(slopes[0], slopes[1])


def test_score_of_bits_in_half_precision_is_torchs() -> None:
    law = dist.Bernoulli(logits=torch.full((100,), 6.0, dtype=torch.float16)).to_event(1)
    value = torch.ones(100, dtype=torch.float16)
    assert torch.equal(log_prob(law, value)[0], law.log_prob(value))


def test_score_of_bits_is_a_laws_own() -> None:
    class Shifted(dist.Bernoulli):  # type: ignore[misc]
        def log_prob(self, value: Tensor) -> Tensor:
            return super().log_prob(value) + 1

    law = Shifted(logits=torch.zeros(3))
    value = torch.ones(3)
    assert torch.equal(log_prob(law, value)[0], law.log_prob(value))


def test_score_of_bits_validates_hard_values_alone() -> None:
    law = dist.Bernoulli(logits=torch.zeros(3), validate_args=True).to_event(1)
    half = torch.full((3,), 0.5)
    with pytest.raises(ValueError, match="support"):
        log_prob(law, half)
    assert log_prob(law, half, soft=True)[0].isfinite()


def test_one_hot_value_gets_a_gradient() -> None:
    law = dist.OneHotCategorical(logits=torch.tensor([0.3, -1.0, 2.0]))
    value = torch.tensor([0.0, 1.0, 0.0], requires_grad=True)
    (slope,) = torch.autograd.grad(log_prob(law, value)[0], value)
    torch.testing.assert_close(slope, law.logits)


def test_soft_scores_are_multilinear() -> None:
    """Equal at the corners, linear between them."""
    bernoulli = dist.Bernoulli(logits=torch.tensor(0.7))
    one_hot = dist.OneHotCategorical(logits=torch.tensor([0.3, -1.0, 2.0]))

    def at(law: Any, value: Tensor) -> Tensor:
        return log_prob(law, value, soft=True)[0]

    for law, corners in ((bernoulli, torch.tensor([0.0, 1.0])), (one_hot, torch.eye(3))):
        hard = torch.stack([law.log_prob(corner) for corner in corners])
        torch.testing.assert_close(torch.stack([at(law, corner) for corner in corners]), hard)
        between = 0.3 * corners[0] + 0.7 * corners[1]
        torch.testing.assert_close(at(law, between), 0.3 * hard[0] + 0.7 * hard[1])


@pytest.mark.parametrize("kind", ["logistic", "gumbel", "normal"])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_noise_is_finite_and_wide(kind: str, dtype: torch.dtype) -> None:
    drawn = noise.draw(noise.Request("z", kind, (100_000,), dtype, "cpu"))
    assert drawn.isfinite().all()
    assert drawn.dtype == torch.promote_types(dtype, torch.float32)


def test_logistic_noise_is_symmetric_at_its_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.float64):
        ends = []
        for u in (0.0, 1.0):
            monkeypatch.setattr(
                torch, "rand", lambda *_, u=u, **kw: torch.full((), u, dtype=kw["dtype"])
            )
            ends.append(noise.draw(noise.Request("z", "logistic", (), dtype, "cpu")))
        # -log(eps / 2) on both sides, but for the rounding of 1 - eps / 2
        torch.testing.assert_close(ends[0], -ends[1], rtol=1e-6, atol=0)


def test_a_source_is_put_back_after_an_error() -> None:
    request = noise.Request("z", "normal", (2,), torch.float64, "cpu")

    def failing() -> None:
        with noise.source(lambda request: torch.ones(request.shape)):
            assert torch.equal(noise.draw(request), torch.ones(2))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert not torch.equal(noise.draw(request), torch.ones(2))
