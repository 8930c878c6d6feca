"""The gradient of ``_chain.py`` as an expert writes it without a library, in two ways.

``by_site`` goes from site to site, as it must if the sites differ. ``at_once`` uses that they do
not: it draws one bit after the other, and computes all else for all sites together.
"""

from collections.abc import Callable
from itertools import product

import torch
from _by_hand import Gradients, bernoulli, leave_one_out
from torch import Tensor
from torch.distributions import Normal
from torch.testing import assert_close

Weigh = Callable[[Tensor], Tensor]
"""From the costs of a site in each sample, samples last, to what its scores are multiplied by."""

Estimate = Callable[[Tensor, list[Tensor], Callable[[int | slice], Weigh]], tuple[Tensor, ...]]
"""From weights, bits and what weighs the costs of sites to loss, gradient and costs."""


def draw(weights: Tensor, noise: Tensor) -> list[Tensor]:
    """Bits of each site, one a sample; ``noise`` is uniform, sites first."""
    z = torch.zeros_like(noise[0])
    bits = []
    for uniform, (slope, offset) in zip(noise, weights.unbind(1), strict=True):
        z = (uniform < (slope * z + offset).sigmoid()).to(noise.dtype)
        bits.append(z)
    return bits


def by_site(
    weights: Tensor, bits: list[Tensor], weigh: Callable[[int | slice], Weigh]
) -> tuple[Tensor, ...]:
    """One site after the other, and back."""
    z = torch.zeros_like(bits[0])
    terms, scores = [], []
    for new, (slope, offset) in zip(bits, weights.unbind(1), strict=True):
        logits = slope * z + offset
        terms.append(bernoulli(logits, new) - bernoulli(2 * z - 1, new))
        scores.append((new - logits.sigmoid(), z))
        z = new
    cost = _seen(z)
    costs, gradients = [], []
    for t in reversed(range(len(bits))):
        cost = cost + terms[t]
        score, before = scores[t]
        weighed = weigh(t)(cost) * score
        gradients.append(torch.stack([(weighed * before).sum(), weighed.sum()]))
        costs.append(cost.mean())
    gradient = torch.stack(gradients[::-1], 1)
    return cost.mean(), gradient, torch.stack(costs[::-1])


def at_once(
    weights: Tensor, bits: list[Tensor], weigh: Callable[[int | slice], Weigh]
) -> tuple[Tensor, ...]:
    """All sites together."""
    z = torch.stack(bits)
    before = torch.cat([torch.zeros_like(z[:1]), z[:-1]])
    slope, offset = weights.unsqueeze(-1)
    logits = slope * before + offset
    terms = bernoulli(logits, z) - bernoulli(2 * before - 1, z)
    costs = terms.sum(0) - terms.cumsum(0) + terms + _seen(z[-1])
    weighed = weigh(slice(None))(costs) * (z - logits.sigmoid())
    gradient = torch.stack([(weighed * before).sum(-1), weighed.sum(-1)])
    return costs[0].mean(), gradient, costs.mean(-1)


def _seen(z: Tensor) -> Tensor:
    return -Normal(z, 1.0, validate_args=False).log_prob(torch.ones_like(z))


def rloo(estimate: Estimate, num_samples: int) -> Gradients:
    """Weights to loss and gradient."""

    def gradients(weights: Tensor) -> tuple[Tensor, ...]:
        noise = torch.rand(weights.shape[1], num_samples, device=weights.device)
        return estimate(weights, draw(weights, noise), lambda sites: leave_one_out)[:2]

    return gradients


def reinforce(estimate: Estimate, decay: float) -> Gradients:
    """Weights and an average cost a site to loss, gradient, and new averages."""

    def gradients(weights: Tensor, average: Tensor) -> tuple[Tensor, ...]:
        noise = torch.rand(weights.shape[1], 1, device=weights.device)
        loss, gradient, costs = estimate(weights, draw(weights, noise), minus(average))
        return loss, gradient, average.lerp(costs, 1 - decay)

    return gradients


def minus(average: Tensor) -> Callable[[int | slice], Weigh]:
    """Takes each site's average from its costs."""
    return lambda sites: lambda costs: costs - average[sites, None].squeeze(0)


def check(estimate: Estimate, length: int = 5) -> None:
    """Compares expected gradients with the exact one, over all bits of one sample and of two.

    Raises:
        AssertionError: If one differs.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, length, generator=generator, dtype=torch.float64).requires_grad_()
    average = torch.randn(length, generator=generator, dtype=torch.float64)
    states = torch.tensor(list(product([0.0, 1.0], repeat=length)), dtype=torch.float64)
    bits = list(states.T)
    before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)
    log_q = bernoulli(weights[0] * before + weights[1], states).sum(1)
    log_p = bernoulli(2 * before - 1, states).sum(1) - _seen(states[:, -1])
    q = log_q.exp()
    (exact,) = torch.autograd.grad((q * (log_q - log_p)).sum(), weights)
    q = q.detach()
    with torch.no_grad():
        one = sum(
            q[i] * estimate(weights, [b[i : i + 1] for b in bits], minus(average))[1]
            for i in range(len(q))
        )
        two = sum(
            q[i] * q[j] * estimate(weights, [b[[i, j]] for b in bits], lambda s: leave_one_out)[1]
            for i in range(len(q))
            for j in range(len(q))
        )
        noise = torch.rand(length, 20000, generator=generator, dtype=torch.float64)
        drawn = torch.stack([b.mean() for b in draw(weights, noise)])
    assert_close(one, exact)
    assert_close(two, exact)
    assert_close(drawn, q @ states, rtol=0, atol=5 * 0.5 / 20000**0.5)
