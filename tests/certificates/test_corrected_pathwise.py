r"""The pathwise gradient of accepted proposals, with the score that the path leaves out.

The noise is injected: every first proposal is accepted, and stands for the density of what is
accepted, :math:`\pi(\epsilon)`. In the logarithm :math:`y` of its value that is a log-Gamma
density, over which the trapezoid rule converges exponentially. Each node is an independent copy in
a plate. The uniform numbers of the boosts take a second dimension, or are held fixed: the estimate
is unbiased given them, too.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.testing.rejection_gamma import RejectionStandardGamma
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_nondiff import noise
from pyro_nondiff.distributions import Gamma
from pyro_nondiff.estimators import CorrectedPathwise, Pathwise
from pyro_nondiff.infer import TraceEstimator_ELBO, planner
from pyro_nondiff.noise import Request

from .test_counts import POWER, SHARE, SUSPICIOUS, WRONG

TOLERANCE = 1e-9
"""Less than 1e-13 of each density lies beyond the ends of its rule; sums have 4,000 terms."""

ALPHA, BETA = 0.7, 1.3
ACCEPTED = -1e6  # the logarithm of a uniform number that is below every bound


@pytest.fixture(autouse=True)
def no_world_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check replays every world alone."""
    monkeypatch.setattr(planner, "check_worlds", lambda pair, chunk: None)


def log_values(boosted: float, step: float) -> Tensor:
    """Nodes of the logarithm of a standard Gamma number of concentration ``boosted``."""
    return torch.arange(-34 / boosted, math.log(boosted + 45), step)


def weights(y: Tensor, boosted: Tensor, step: float) -> Tensor:
    """Their probabilities, with a gradient to the concentration."""
    return step * (boosted * y - y.exp() - torch.lgamma(boosted)).exp()


def proposals(y: Tensor, boosted: float) -> Tensor:
    """The proposals that make these values: Marsaglia and Tsang's map, turned round."""
    third = boosted - 1 / 3
    return ((y.exp() / third) ** (1 / 3) - 1) * math.sqrt(9 * third)


@dataclass
class Given:
    """A source of noise for one site: proposals, all accepted, and the boosts' logistic noise."""

    epsilon: Tensor
    boosts: Tensor
    _asked: list[str] = field(default_factory=list)

    def __call__(self, request: Request) -> Tensor:
        self._asked = [] if request.kind == "normal" else self._asked
        self._asked.append(request.kind)
        if request.kind == "normal":
            return self.epsilon.expand(request.shape)
        if len(self._asked) == 2:
            return torch.full(request.shape, ACCEPTED)
        return self.boosts.expand(request.shape)


Costs = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """How the elements of a site are arranged: ``(copies, elements)``."""

    name: str
    elements: int = 1
    event: bool = False
    mask: str = "none"
    joined: bool = False
    particles: int = 1
    alpha: float = ALPHA

    @property
    def kept(self) -> Tensor:
        """Which elements are not masked."""
        number = torch.arange(self.elements)
        return (number == 0) | torch.tensor(self.mask == "none")

    def law(self, alpha: Tensor, beta: Tensor, boost: int) -> Any:
        law: Any = Gamma(alpha, beta, gradient="rejection", boost=boost)
        law = law.mask(self.kept) if self.mask == "law" else law
        return law.to_event(1) if self.event else law

    def pays(self, z: Tensor) -> Tensor:
        """The cost beside the site's own terms, of each element or of all together."""
        if self.event or self.joined:
            return (z.prod(-1, keepdim=True) - 1.0) ** 2 + 0.3 * z.sum(-1, keepdim=True)
        return (z - 1.0) ** 2

    def programs(self, shift: Tensor, boost: int) -> tuple[Callable[[], None], Callable[[], None]]:
        """A model and a guide; ``shift`` is added to both parameters of each copy."""
        count = shift.shape[1]

        def site(law: Any) -> Tensor:
            masked = poutine.mask(mask=self.kept) if self.mask == "poutine" else nullcontext()
            inner = nullcontext() if self.event else pyro.plate("data", self.elements, dim=-1)
            with inner, masked:
                return pyro.sample("z", law)

        def copies() -> Any:
            return pyro.plate("copies", count, dim=-1 if self.event else -2)

        def model() -> None:
            shape = (count, self.elements)
            prior: Any = dist.Gamma(torch.full(shape, 1.1), 0.8)
            prior = prior.mask(self.kept) if self.mask == "law" else prior
            with copies():
                z = site(prior.to_event(1) if self.event else prior)
                cost = self.pays(z)
                if self.event or self.joined:
                    pyro.factor("cost", -(cost.squeeze(-1) if self.event else cost))
                else:
                    with pyro.plate("data", self.elements, dim=-1):
                        pyro.factor("cost", -cost)

        def guide() -> None:
            alpha, beta = (self.alpha + shift[0]).unsqueeze(-1), (BETA + shift[1]).unsqueeze(-1)
            elements = torch.ones(self.elements)
            with copies():
                site(self.law(alpha * elements, beta * elements, boost))

        return model, guide

    def loss(self, z: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        """What each copy pays: longhand, ``(copies,)``."""
        ratio = dist.Gamma(alpha, beta).log_prob(z) - dist.Gamma(1.1, 0.8).log_prob(z)
        return (ratio * self.kept).sum(-1) + self.pays(z).sum(-1)


SCALAR = Case("scalar")
CASES = [
    SCALAR,
    Case("plate", elements=2),
    Case("joined", elements=2, joined=True),
    Case("event", elements=2, event=True),
    Case("masked-by-poutine", elements=2, joined=True, mask="poutine"),
    Case("masked-by-law", elements=2, mask="law"),
    Case("particles", particles=2),
    Case("particles-event-of-one", event=True, particles=2),
]


def estimates(case: Case, given: Given, count: int, boost: int) -> Tensor:
    """The estimate of each copy for both parameters, ``(2, copies)``."""
    shift = torch.zeros(2, count, requires_grad=True)
    elbo = TraceEstimator_ELBO(num_particles=case.particles, worlds="vectorized")
    pair = case.programs(shift, boost)
    elbo.unreduced(*pair)
    with noise.source(given):
        loss = elbo.differentiable_loss(*pair)
    return torch.autograd.grad(loss, shift)[0]


def check(found: Tensor, exact: Tensor) -> None:
    assert float(exact.abs().min()) > 1e-2, "a gradient of zero is estimated by anything"
    assert float((found - exact).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("boost", [1, 4])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exact_mean_given_the_boosts(case: Case, boost: int) -> None:
    """Two elements, or two particles, are the two dimensions of a grid."""
    step, number = 0.25, case.elements * case.particles
    y = log_values(ALPHA + boost, step)
    grid = torch.cartesian_prod(*[y] * number).reshape(-1, number)
    boosts = torch.linspace(-0.8, 1.1, boost)

    alpha = torch.tensor(ALPHA, requires_grad=True)
    beta = torch.tensor(BETA, requires_grad=True)
    # particles are averaged, so one of them says what the mean is
    own = torch.cartesian_prod(*[y] * case.elements).reshape(-1, case.elements)
    factor = (logsigmoid(boosts) / (alpha + torch.arange(boost))).sum()
    weight = weights(own, alpha + boost, step).prod(-1)
    exact = (weight * case.loss((own + factor).exp() / beta, alpha, beta)).sum()
    wanted = torch.stack(torch.autograd.grad(exact, [alpha, beta]))

    noises = proposals(grid, ALPHA + boost)
    if case.particles == 1:
        noises = noises.reshape(-1, case.elements)
    else:
        noises = noises.T.reshape(case.particles, -1, 1)
    shape = (boost, *[1] * noises.dim())
    found = estimates(case, Given(noises, boosts.reshape(shape)), len(grid), boost)
    weight = weights(grid, torch.tensor(ALPHA + boost), step).prod(-1)
    check((found * weight).sum(-1), wanted)


@pytest.mark.parametrize("alpha", [0.4, 0.7, 2.5])
def test_exact_mean_with_the_boost(alpha: float) -> None:
    """Proposal and uniform number, against the density of the value and nothing else."""
    case, step, rough = Case("", alpha=alpha), 0.25, 0.5
    y, t = log_values(alpha + 1, step), torch.arange(-34, 34, rough)
    grid = torch.cartesian_prod(y, t)
    given = Given(proposals(grid[:, :1], alpha + 1), grid[:, 1:].unsqueeze(0))
    found = estimates(case, given, len(grid), 1)
    uniform = rough * t.sigmoid() * (-t).sigmoid()
    weight = (weights(y, torch.tensor(alpha + 1), step).unsqueeze(-1) * uniform).flatten()

    parameters = [torch.tensor(value, requires_grad=True) for value in (alpha, BETA)]
    log_z = log_values(alpha, 0.05)
    density = weights(log_z + parameters[1].log(), parameters[0], 0.05)
    exact = (density * SCALAR.loss(log_z.exp().unsqueeze(-1), *parameters)).sum()
    check((found * weight).sum(-1), torch.stack(torch.autograd.grad(exact, parameters)))


def test_the_path_alone_is_biased() -> None:
    """So the exact means above see the correction."""
    y = log_values(ALPHA + 1, 0.25)
    weight = weights(y, torch.tensor(ALPHA + 1), 0.25)
    given = Given(proposals(y, ALPHA + 1).unsqueeze(-1), torch.zeros(1, 1, 1))
    right = estimates(SCALAR, given, len(y), 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pathwise, "specialise", lambda self, law: self)
        path = estimates(SCALAR, given, len(y), 1)
    gap = ((right - path) * weight).sum(-1)
    assert float(gap[0].abs()) > 0.01
    assert float(gap[1].abs()) < TOLERANCE  # the rate has no part in what is accepted


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("boost", [1, 4])
def test_formula(particles: int, boost: int) -> None:
    """Naesseth et al. (2017), equation 8, with the mean cost of the other particles taken off."""
    epsilon = torch.tensor([0.3, -1.1, 1.7, -0.2])[:particles]
    boosts = torch.linspace(-0.8, 1.1, boost)
    given = Given(epsilon.reshape(-1, 1, 1), boosts.reshape(-1, 1, 1, 1))
    if particles == 1:
        given = Given(epsilon.reshape(1, 1), boosts.reshape(-1, 1, 1))
    found = estimates(Case("", particles=particles), given, 1, boost)[:, 0]

    alpha = torch.tensor(ALPHA, requires_grad=True)
    beta = torch.tensor(BETA, requires_grad=True)
    third = alpha + boost - 1 / 3
    value = third * (1 + epsilon / (9 * third).sqrt()) ** 3
    z = value / beta
    for i, uniform in enumerate(boosts.sigmoid()):
        z = z * uniform ** (1 / (alpha + i))
    losses = SCALAR.loss(z.unsqueeze(-1), alpha, beta)
    slope = 3 * third * (1 + epsilon / (9 * third).sqrt()) ** 2 / (9 * third).sqrt()
    log_accepted = dist.Gamma(alpha + boost, 1.0).log_prob(value) + slope.log()
    wanted = torch.stack(torch.autograd.grad(losses.mean(), [alpha, beta], retain_graph=True))
    costs = losses.detach()
    if particles > 1:
        costs = (costs - costs.mean()) * particles / (particles - 1)
    score = torch.autograd.grad((costs * log_accepted).mean(), alpha)[0]
    wanted = wanted + torch.stack([score, torch.zeros(())])
    # numbers of order 10, in logarithms there and in powers here
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)


def test_the_larger_the_boost_the_smaller_the_correction() -> None:
    """Naesseth et al. (2017), figure 1: the score's variance falls with the boosts."""
    deviations = []
    for boost in (1, 2, 4, 10):
        y = log_values(ALPHA + boost, 0.1)
        law = Gamma(torch.tensor(ALPHA, requires_grad=True).expand(len(y)), 1.0, "rejection", boost)
        with noise.source(Given(proposals(y, ALPHA + boost), torch.zeros(1, 1))):
            value = law.rsample()
        score = law.score_parts(value).score_function
        slopes = torch.autograd.grad(score.sum(), law.concentration)[0]
        weight = weights(y, torch.tensor(ALPHA + boost), 0.1)
        assert float((slopes * weight).sum().abs()) <= TOLERANCE  # a score has mean 0
        deviations.append(float((slopes**2 * weight).sum().sqrt()))
    assert deviations == sorted(deviations, reverse=True)
    assert deviations[2] < deviations[0] / 5


# --- Pyro's rejection sampler -----------------------------------------------------------------

DRAWS = 200_000


def rejector_programs(case: Case, shift: Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """A site of Pyro's sampler, whose noise is its own."""
    count = len(shift)

    def site(law: Any) -> Tensor:
        if case.mask == "law":
            law = law.mask(case.kept)
        masked = poutine.mask(mask=case.kept) if case.mask == "poutine" else nullcontext()
        if case.event:
            return pyro.sample("z", law.to_event(1))
        with pyro.plate("data", case.elements, dim=-1), masked:
            return pyro.sample("z", law)

    def copies() -> Any:
        return pyro.plate("copies", count, dim=-1 if case.event else -2)

    def model() -> None:
        with copies():
            z = site(dist.Gamma(torch.full((count, case.elements), 1.1), 0.8))
            total = 0.1 * (z - 1.0) ** 2
            if case.event:
                pyro.factor("cost", -total.sum(-1))
            else:
                pyro.factor("cost", -total.sum(-1, keepdim=True))

    def guide() -> None:
        with copies():
            site(RejectionStandardGamma((1.6 + shift).unsqueeze(-1).repeat(1, case.elements)))

    return model, guide


def rejector_exact(case: Case) -> float:
    """In closed form; the elements are alike, and a masked one has no terms of its own."""
    alpha = torch.tensor(1.6, requires_grad=True)
    q, p = dist.Gamma(alpha, torch.tensor(1.0)), dist.Gamma(torch.tensor(1.1), torch.tensor(0.8))
    kl = torch.distributions.kl_divergence(q, p) * case.kept.sum()
    loss = kl + case.elements * 0.1 * (q.variance + (q.mean - 1.0) ** 2)
    return float(torch.autograd.grad(loss, alpha)[0])


@pytest.mark.parametrize(
    "case",
    [
        SCALAR,
        Case("event", elements=2, event=True),
        Case("masked-by-poutine", elements=2, mask="poutine"),
        Case("masked-by-law", elements=2, mask="law"),
        Case("particles", particles=4),
    ],
    ids=lambda case: case.name,
)
def test_pyro_s_sampler(case: Case) -> None:
    """By Monte Carlo, in two stages, with the power asserted: see ``test_counts``."""
    exact = rejector_exact(case)
    for stage, (count, limit) in enumerate([(DRAWS, SUSPICIOUS), (4 * DRAWS, WRONG)]):
        shift = torch.zeros(count, requires_grad=True)
        elbo = TraceEstimator_ELBO(num_particles=case.particles, worlds="vectorized")
        loss = elbo.differentiable_loss(*rejector_programs(case, shift))
        sample = torch.autograd.grad(loss, shift)[0]
        assert count >= POWER * (float(sample.std()) / (SHARE * exact)) ** 2
        z = (float(sample.mean()) - exact) / float(sample.std()) * math.sqrt(count)
        if abs(z) < limit:
            return
        assert stage == 0, f"z is {z}"


def test_pyro_s_sampler_is_seen_without_its_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pathwise, "specialise", lambda self, law: self)
    with pytest.raises(AssertionError, match="z is"):
        test_pyro_s_sampler(SCALAR)


def test_which_laws_are_corrected() -> None:
    alpha = torch.tensor(1.6)
    for law in (
        Gamma(alpha, 1.0, "rejection"),
        Gamma(alpha, 1.0, "rejection").expand([3]).to_event(1).mask(False),
        RejectionStandardGamma(alpha),
        RejectionStandardGamma(alpha).mask(True),
    ):
        assert isinstance(Pathwise().specialise(law), CorrectedPathwise)
    for law in (Gamma(alpha, 1.0), dist.Gamma(alpha, 1.0), dist.Normal(alpha, 1.0).to_event(0)):
        assert isinstance(Pathwise().specialise(law), Pathwise)
