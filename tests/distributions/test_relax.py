"""Soft values and their conditional noise, at the ends of what floating point can hold."""

from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_nondiff import noise
from pyro_nondiff.distributions import (
    base_row,
    conditional,
    noise_kind,
    noise_shape,
    relax,
    relaxable,
    transport,
    wide_logits,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LOGITS = [0.0, 5.0, 10.0, 17.0, 30.0, 90.0]
TEMPERATURES = [1e-3, 0.1, 0.5, 1.0, 10.0]


def extremes(kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Draws of noise, among them the ends that its source can produce."""
    drawn = noise.draw(noise.Request("z", kind, shape, dtype, "cpu"))
    info = torch.finfo(drawn.dtype)
    ends = {
        "logistic": torch.tensor([info.eps / 2, 1 - info.eps / 2, 0.5], dtype=drawn.dtype).logit(),
        "gumbel": -torch.tensor([info.tiny, 100.0, 1.0], dtype=drawn.dtype).log(),
    }[kind]
    drawn.view(-1)[: 3 * 50] = ends.repeat(50)
    return drawn[torch.randperm(len(drawn))]


def laws(kind: str, dtype: torch.dtype, scale: float) -> list[Any]:
    if kind == "logistic":
        return [dist.Bernoulli(logits=torch.tensor([s * scale], dtype=dtype)) for s in (1, -1)]
    logits = torch.tensor([scale, 0.0, -scale, scale / 2], dtype=dtype)
    return [dist.OneHotCategorical(logits=logits)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["logistic", "gumbel"])
def test_everything_is_finite_and_on_the_right_side(kind: str, dtype: torch.dtype) -> None:
    """2 x 4 dtypes x 6 logits x 2 signs or 4 categories, 12,000 draws each: 1e6 numbers."""
    for scale in LOGITS:
        for law in laws(kind, dtype, scale):
            shape = (12_000, *noise_shape(law))
            u, v = extremes(kind, dtype, shape), extremes(kind, dtype, shape)
            value = transport(law, u)
            leaf = wide_logits(law).detach().expand(u.shape).requires_grad_()
            twin = conditional(law, leaf, value, v)
            assert twin.isfinite().all()
            if kind == "logistic":
                # 0 is the boundary itself: softplus underflows there, on neither side
                wrong = torch.where(value > 0, twin < 0, twin > 0)
            else:
                wrong = (twin * value).sum(-1) < twin.max(-1).values
            assert not wrong.any()
            for temperature in TEMPERATURES:
                for perturbed in (leaf + u, twin):
                    soft = relax(law, perturbed, torch.tensor(temperature, dtype=leaf.dtype))
                    (slope,) = torch.autograd.grad(soft.square().sum(), leaf, retain_graph=True)
                    assert soft.isfinite().all()
                    assert slope.isfinite().all()


def test_the_paper_s_formula_fails_where_ours_does_not() -> None:
    """The sweep can fail: log(v') - log(1 - v') of v' = v p + 1 - p is not finite at -20."""
    logit = torch.tensor(-20.0, dtype=torch.float32, requires_grad=True)
    v = torch.rand(1000, dtype=torch.float32)
    p = logit.sigmoid()
    u = v * p + (1 - p)
    z = logit + u.log() - (1 - u).log()
    (slope,) = torch.autograd.grad(z.sum(), logit)
    assert not (z.isfinite().all() and slope.isfinite())


def wrapped(base: Any) -> list[Any]:
    mask = torch.tensor([True, False, True])
    return [
        base,
        base.to_event(1),
        base.expand((2, 3)),
        base.mask(mask),
        base.mask(mask).to_event(1),
        base.expand((2, 3)).mask(mask).to_event(1),
    ]


BASES = [
    dist.Bernoulli(logits=torch.tensor([0.3, -1.0, 2.0])),
    dist.OneHotCategorical(logits=torch.randn(3, 4, generator=torch.Generator().manual_seed(0))),
]


@pytest.mark.parametrize("law", [law for base in BASES for law in wrapped(base)], ids=repr)
def test_wrapped_laws(law: Any) -> None:
    assert relaxable(law)
    kind = noise_kind(law)
    assert kind is not None
    shape = (5, *noise_shape(law))
    u = noise.draw(noise.Request("z", kind, shape, torch.get_default_dtype(), "cpu"))
    value = transport(law, u)
    assert value.shape == (5, *law.shape())
    twin = conditional(law, wide_logits(law), value, u.flip(0))
    soft = relax(law, twin, torch.tensor(1e-4))
    # at a temperature near 0 the soft value of the conditional draw is the hard value
    torch.testing.assert_close(soft.round(), value, rtol=0, atol=0)


@pytest.mark.parametrize("base", BASES, ids=["Bernoulli", "OneHotCategorical"])
def test_conditional_draws_have_the_law_of_the_perturbed_logits(base: Any) -> None:
    """Drawing (u, value) or (value, conditional) is the same: their means and spreads agree."""
    kind, n = noise_kind(base), 200_000
    assert kind is not None
    shape = (n, *noise_shape(base))
    u, v = (noise.draw(noise.Request("z", kind, shape, torch.float64, "cpu")) for _ in range(2))
    value = transport(base, u)
    first, second = wide_logits(base) + u, conditional(base, wide_logits(base), value, v)
    for power in (1, 2):
        a, b = (x**power * value for x in (first, second))
        error = ((a.var(0) + b.var(0)) / n).sqrt()
        # |z| < 5.5: 4e-8 for each of some thirty numbers
        assert ((a.mean(0) - b.mean(0)).abs() < 5.5 * error).all()
        # power: a shift of 0.05 would show at 5.5 standard errors or more
        assert power == 2 or (5.5 * error < 0.05).all()


@pytest.mark.parametrize(
    "law",
    [
        dist.Categorical(torch.ones(3)),
        dist.Poisson(3.0),
        dist.Normal(0.0, 1.0),
        dist.OneHotCategoricalStraightThrough(torch.ones(3)),
    ],
    ids=repr,
)
def test_laws_that_cannot_be_relaxed(law: Any) -> None:
    assert not relaxable(law)


def test_base_row() -> None:
    logits = torch.randn(5, 2, 3)
    law = dist.Bernoulli(logits=logits).to_event(1)
    row = base_row(law, 2)
    assert row.batch_shape == (1, 2)
    assert row.event_shape == (3,)
    torch.testing.assert_close(row.base_dist.logits, logits[:1], rtol=0, atol=0)
    assert base_row(law, 3) is law
