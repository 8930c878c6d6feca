"""The contract, for the discrete laws with a gradient, the relaxed ones, and the hard Concrete."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_nondiff.distributions import (
    ExponentialAnnealing,
    HardConcrete,
    RelaxedBernoulli,
    RelaxedOneHotCategorical,
    StraightThroughBernoulli,
    StraightThroughOneHotCategorical,
)
from pyro_nondiff.errors import NonDiffError

from .contract import (
    LOGITS,
    TEMPERATURES,
    All,
    Array,
    Continuous,
    LawContract,
    Mass,
    Mixed,
    Oracle,
    rounding,
    same_noise,
    support_grid,
)

TEMPERATURE = 0.7


def spread(count: int) -> Tensor:
    """Logits of ordinary size, none like another."""
    return 1.3 * torch.linspace(-1.3, 1.1, count).cos() - 0.6 * torch.linspace(0, 5, count).sin()


def probabilities(law: Any) -> Array:
    """The probabilities of a law, in float64."""
    found: Array = law.probs.detach().double().numpy()
    return found


class BernoulliLike(LawContract):
    """Laws with a logit a number."""

    outside: ClassVar = (float("nan"), 0.5, -1.0, 2.0)

    def parameters(self, batch: tuple[int, ...]) -> tuple[Tensor, ...]:
        return (spread(int(np.prod(batch))).reshape(batch),)

    def extremes(self, dtype: torch.dtype) -> Iterator[Any]:
        for temperature in TEMPERATURES:
            logits = torch.tensor(LOGITS, dtype=dtype, requires_grad=True)
            yield self.make(logits, temperature=temperature)

    def oracle(self, law: Any) -> Oracle | None:
        p = float(probabilities(law))
        return Mass(np.array([1 - p, p]))


class OneHotLike(LawContract):
    """Laws with four logits a number."""

    event_shape: ClassVar = (4,)
    outside: ClassVar = (float("nan"), 0.0, 0.25, 1.0, -1.0)

    def parameters(self, batch: tuple[int, ...]) -> tuple[Tensor, ...]:
        shape = (*batch, 4)
        return (spread(int(np.prod(shape))).reshape(shape),)

    def extremes(self, dtype: torch.dtype) -> Iterator[Any]:
        inf = torch.inf
        rows = [
            [0.0, 0.0, 0.0, 0.0],
            [5.0, -5.0, 0.0, 5.0],
            [17.0, -17.0, 0.0, 16.0],
            [90.0, -90.0, 0.0, 89.0],
            [-90.0, -90.0, -90.0, 90.0],
            [-inf, 0.0, 5.0, -inf],
            [-inf, -inf, -inf, 3.0],
            [-inf, 90.0, -90.0, 0.0],
        ]
        for temperature in TEMPERATURES:
            logits = torch.tensor(rows, dtype=dtype, requires_grad=True)
            yield self.make(logits, temperature=temperature)
            logits = torch.zeros(2, 50, dtype=dtype, requires_grad=True)  # many categories
            yield self.make(logits, temperature=temperature)
            logits = torch.ones(2, 1, dtype=dtype, requires_grad=True)  # and one alone
            yield self.make(logits, temperature=temperature)

    def oracle(self, law: Any) -> Oracle | None:
        return Mass(probabilities(law))


class HardLike(LawContract):
    """Laws whose value is a corner, with the discrete mass."""

    def test_value_is_hard_and_its_score_has_a_gradient(self) -> None:
        parameters = [p.requires_grad_() for p in self.parameters((3,))]
        law = self.make(*parameters)
        value = law.rsample((20,))
        assert torch.equal(value, value.round())
        torch.testing.assert_close(law.log_prob(value), plain_law(law).log_prob(value))
        (slope,) = torch.autograd.grad(self.law().log_prob(value).sum(), value)
        torch.testing.assert_close(slope, law.logits.expand_as(value))

    def test_divergence_from_itself_is_zero(self) -> None:
        """As an expectation too: no density is mistaken for the mass."""
        law = self.law()
        value = law.rsample((50,))
        gap = self.law().log_prob(value) - plain_law(law).log_prob(value)
        assert gap.abs().max() <= max(1e-6, rounding(gap.dtype))


class DiscreteLike(HardLike):
    """Discrete laws, and what follows from their mass exactly."""

    def test_mass_is_exact_and_sums_to_one(self) -> None:
        law = self.law()
        plain = plain_law(law)
        support = law.enumerate_support()
        score = law.log_prob(support)
        torch.testing.assert_close(score, plain.log_prob(support))
        torch.testing.assert_close(score.exp().sum(0), torch.ones(3))
        torch.testing.assert_close(law.entropy(), plain.entropy())
        torch.testing.assert_close(law.entropy(), -(score.exp() * score).sum(0))

    def test_divergence_is_exact(self) -> None:
        law, other = self.law(), self.make(*[p.flip(0) for p in self.parameters((3,))])
        support = law.enumerate_support()
        score = law.log_prob(support)
        exact = (score.exp() * (score - other.log_prob(support))).sum(0)
        torch.testing.assert_close(kl_divergence(law, other), exact)
        torch.testing.assert_close(kl_divergence(law, self.law()), torch.zeros(3))


def plain_law(law: Any) -> Any:
    """Pyro's own law of the same probabilities."""
    kind = dist.OneHotCategorical if law.event_dim else dist.Bernoulli
    return kind(logits=law.logits)


class TestStraightThroughBernoulli(DiscreteLike, BernoulliLike):
    gradient = "reinmax"

    def make(self, *parameters: Tensor, **options: Any) -> Any:
        options = {"temperature": TEMPERATURE, "gradient": self.gradient, **options}
        return StraightThroughBernoulli(logits=parameters[0], **options)


class TestBernoulliIdentity(TestStraightThroughBernoulli):
    gradient = "identity"


class TestBernoulliSelected(TestStraightThroughBernoulli):
    gradient = "selected"


class TestBernoulliSoftmax(TestStraightThroughBernoulli):
    gradient = "softmax"


class TestBernoulliGumbel(TestStraightThroughBernoulli):
    gradient = "gumbel"


class TestBernoulliGumbelRao(TestStraightThroughBernoulli):
    gradient = "gumbel_rao"


class TestStraightThroughOneHotCategorical(DiscreteLike, OneHotLike):
    gradient = "reinmax"

    def make(self, *parameters: Tensor, **options: Any) -> Any:
        options = {"temperature": TEMPERATURE, "gradient": self.gradient, **options}
        return StraightThroughOneHotCategorical(logits=parameters[0], **options)


class TestOneHotIdentity(TestStraightThroughOneHotCategorical):
    gradient = "identity"


class TestOneHotSelected(TestStraightThroughOneHotCategorical):
    gradient = "selected"


class TestOneHotSoftmax(TestStraightThroughOneHotCategorical):
    gradient = "softmax"


class TestOneHotGumbel(TestStraightThroughOneHotCategorical):
    gradient = "gumbel"


class TestOneHotGumbelRao(TestStraightThroughOneHotCategorical):
    gradient = "gumbel_rao"


class TestBernoulliFromProbs(TestStraightThroughBernoulli):
    """Probabilities and a temperature for each number, in place of logits and one for all."""

    gradient = "gumbel"

    def parameters(self, batch: tuple[int, ...]) -> tuple[Tensor, ...]:
        (logits,) = super().parameters(batch)
        return logits.sigmoid(), temperatures(batch)

    def make(self, *parameters: Tensor, **options: Any) -> Any:
        options = {**with_temperature(parameters), "gradient": self.gradient, **options}
        return StraightThroughBernoulli(probs=parameters[0], **options)

    def extremes(self, dtype: torch.dtype) -> Iterator[Any]:
        for temperature in TEMPERATURES:
            probs = torch.tensor([0.01, 0.5, 0.99], dtype=dtype, requires_grad=True)
            yield self.make(probs, temperature=temperature)


class TestOneHotFromProbs(TestStraightThroughOneHotCategorical):
    """As for the Bernoulli law."""

    gradient = "gumbel"

    def parameters(self, batch: tuple[int, ...]) -> tuple[Tensor, ...]:
        (logits,) = super().parameters(batch)
        return logits.exp(), temperatures(batch)

    def make(self, *parameters: Tensor, **options: Any) -> Any:
        options = {**with_temperature(parameters), "gradient": self.gradient, **options}
        return StraightThroughOneHotCategorical(probs=parameters[0], **options)

    def extremes(self, dtype: torch.dtype) -> Iterator[Any]:
        for temperature in TEMPERATURES:
            probs = torch.tensor([[0.01, 0.5, 0.99]], dtype=dtype, requires_grad=True)
            yield self.make(probs, temperature=temperature)


def temperatures(batch: tuple[int, ...]) -> Tensor:
    """A temperature for each number of a batch."""
    return torch.linspace(0.7, 1.1, int(np.prod(batch))).reshape(batch)


def with_temperature(parameters: tuple[Tensor, ...]) -> dict[str, Any]:
    """The second parameter as an option, if there is one."""
    return {"temperature": parameters[1]} if len(parameters) > 1 else {}


class RelaxedLike(LawContract):
    """Laws of a simplex or an interval, with a temperature that is learnt."""

    def parameters(self, batch: tuple[int, ...]) -> tuple[Tensor, ...]:
        return (*super().parameters(batch), temperatures(batch))


class TestRelaxedBernoulli(RelaxedLike, BernoulliLike):
    outside = (float("nan"), -0.5, 1.5)

    def make(self, *parameters: Tensor, **options: Any) -> Any:
        options = {**with_temperature(parameters), **options}
        return RelaxedBernoulli(logits=parameters[0], **options)

    def oracle(self, law: Any) -> Oracle:
        logit, temperature = law.logits.item(), law.temperature.item()
        cdf = scipy.stats.logistic.cdf
        return Continuous(lambda x: cdf(temperature * scipy.special.logit(x) - logit))

    def test_the_density_is_pyro_s(self) -> None:
        """Where Pyro's is sound: between the ends, in float64."""
        logits, temperature = (p.double() for p in self.parameters((3,)))
        law = self.make(logits, temperature)
        other = dist.RelaxedBernoulli(temperature, logits=logits)
        points = torch.linspace(0.01, 0.99, 20, dtype=torch.float64).unsqueeze(-1)
        torch.testing.assert_close(law.log_prob(points), other.log_prob(points))


class TestRelaxedOneHotCategorical(RelaxedLike, OneHotLike):
    outside = (float("nan"), 0.0, 0.5, -0.25)

    def make(self, *parameters: Tensor, **options: Any) -> Any:
        options = {**with_temperature(parameters), **options}
        return RelaxedOneHotCategorical(logits=parameters[0], **options)

    def oracle(self, law: Any) -> Oracle:
        """The nearest corner, and the logistic law of each two coordinates' log-ratio."""

        def ratio(k: int) -> Oracle:
            gap, temperature = float(law.logits[k] - law.logits[0]), law.temperature.item()
            law_of_gap = scipy.stats.logistic(gap / temperature, 1 / temperature)
            return Continuous(law_of_gap.cdf, lambda x: np.log(x[:, k] / x[:, 0]))

        return All((Mass(probabilities(law)), *(ratio(k) for k in range(1, 4))))

    def test_the_density_is_pyro_s(self) -> None:
        """Where Pyro's is sound: away from the corners, in float64."""
        logits, temperature = (p.double() for p in self.parameters((3,)))
        points = torch.randn(20, 3, 4, dtype=torch.float64).softmax(-1)
        found = self.make(logits, temperature).log_prob(points)
        for row in range(3):  # Pyro's takes one temperature for all
            other = dist.RelaxedOneHotCategorical(temperature[row], logits=logits[row])
            torch.testing.assert_close(found[:, row], other.log_prob(points[:, row]))

    def test_density_of_three_categories_integrates_to_one(self) -> None:
        """By the trapezoid rule in the two log-ratios, whose Jacobian is the coordinates' product.

        The density falls as exp(-|t| T) or faster: at T = 1 and |t| = 30 less than 1e-12 is left.
        """
        t = torch.arange(-30, 30, 0.25, dtype=torch.float64)
        grid = torch.cartesian_prod(t, t)
        points = torch.cat([grid, torch.zeros(len(grid), 1, dtype=torch.float64)], -1).softmax(-1)
        logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64)
        law = self.make(logits, temperature=1.0, validate_args=False)
        total = (law.log_prob(points).exp() * points.prod(-1)).sum() * 0.25**2
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-8)

    def test_many_categories_at_a_low_temperature(self) -> None:
        """Where 98.6 % of Pyro's densities are not finite."""
        law = self.make(torch.zeros(50, dtype=torch.float32), temperature=0.05)
        assert law.log_prob(law.sample((1000,))).isfinite().all()


class TestRelaxedBernoulliStraightThrough(RelaxedLike, HardLike, BernoulliLike):
    """A hard value, a relaxed gradient, and the discrete mass."""

    def make(self, *parameters: Tensor, **options: Any) -> Any:
        options = {**with_temperature(parameters), "straight_through": True, **options}
        return RelaxedBernoulli(logits=parameters[0], **options)


class TestRelaxedOneHotCategoricalStraightThrough(RelaxedLike, HardLike, OneHotLike):
    """As for the Bernoulli law."""

    def make(self, *parameters: Tensor, **options: Any) -> Any:
        options = {**with_temperature(parameters), "straight_through": True, **options}
        return RelaxedOneHotCategorical(logits=parameters[0], **options)


class RelaxedDensity(RelaxedLike):
    """A hard value that is scored as the relaxed one behind it, and no other value."""

    moved_values = False

    def check_density(self, law: Any, moved: Callable[[Tensor], Tensor]) -> None:
        """Rather an error than another density."""
        value = law.rsample((5,))
        new = moved(value)
        if new is not value:
            with pytest.raises(NonDiffError, match="relaxed_density=True only a value as it was"):
                law.log_prob(new)

    def test_density_is_that_of_the_relaxed_law(self) -> None:
        law, soft = self.law(), self.make(*self.parameters((3,)), straight_through=False)
        value, soft_value = same_noise(law.rsample), same_noise(soft.rsample)
        torch.testing.assert_close(law.log_prob(value), soft.log_prob(soft_value))


class TestRelaxedBernoulliDensity(RelaxedDensity, BernoulliLike):
    def make(self, *parameters: Tensor, **options: Any) -> Any:
        options = {"straight_through": True, **with_temperature(parameters), **options}
        density = options["straight_through"]
        return RelaxedBernoulli(logits=parameters[0], relaxed_density=density or None, **options)


class TestRelaxedOneHotCategoricalDensity(RelaxedDensity, OneHotLike):
    def make(self, *parameters: Tensor, **options: Any) -> Any:
        options = {"straight_through": True, **with_temperature(parameters), **options}
        density = options["straight_through"] or None
        return RelaxedOneHotCategorical(logits=parameters[0], relaxed_density=density, **options)


class TestHardConcrete(RelaxedLike, BernoulliLike):
    outside = (float("nan"), -0.5, 1.5)

    def make(self, *parameters: Tensor, **options: Any) -> Any:
        options = {**with_temperature(parameters), **options}
        return HardConcrete(parameters[0], **options)

    def below(self, law: Any) -> Callable[[Any], Any]:
        """The probability of a stretched number below x, by SciPy."""
        (low, high), logit = law.stretch, law.logits.item()
        temperature = law.temperature.item()

        def cdf(x: Any) -> Any:
            at = scipy.special.logit((x - low) / (high - low))
            return scipy.stats.logistic.cdf(temperature * at - logit)

        return cdf

    def oracle(self, law: Any) -> Oracle:
        cdf = self.below(law)
        zero, one = cdf(0.0), 1 - cdf(1.0)
        between = 1 - zero - one
        return Mixed(np.array([zero, between, one]), lambda x: (cdf(x) - zero) / between)

    def grids(self, law: Any) -> tuple[Tensor, Tensor]:
        """The points 0 and 1 have probabilities of their own."""
        inside = support_grid(law.support)
        assert inside is not None
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        return torch.cat([inside[0], ends]), torch.cat([inside[1], torch.ones_like(ends)])

    def noise_grid(self, law: Any) -> tuple[Tensor, Tensor]:
        """Gauss-Legendre between the noises that make 0 and 1; beyond them values are constant."""
        (low, high), logit = law.stretch, law.logits.item()
        ends = scipy.special.logit((np.array([0.0, 1.0]) - low) / (high - low))
        a, b = law.temperature.item() * ends - logit
        nodes, weights = np.polynomial.legendre.leggauss(100)
        points = (a + b) / 2 + (b - a) / 2 * nodes
        density = scipy.stats.logistic.pdf(points) * (b - a) / 2 * weights
        beyond = scipy.stats.logistic.cdf(a), scipy.stats.logistic.sf(b)
        noises = np.concatenate([points, [a - 1, b + 1]])
        return torch.from_numpy(noises), torch.from_numpy(np.concatenate([density, beyond]))

    def test_closed_form_probabilities(self) -> None:
        law = self.make(*[p.double() for p in self.parameters(())])
        cdf = self.below(law)
        assert float(law.prob_zero) == pytest.approx(cdf(0.0), rel=1e-12)
        assert float(law.prob_nonzero) == pytest.approx(1 - cdf(0.0), rel=1e-12)
        assert float(law.prob_one) == pytest.approx(1 - cdf(1.0), rel=1e-12)

    def test_the_typical_value_is_that_of_no_noise(self) -> None:
        law = self.make(torch.tensor([-9.0, 0.0, 9.0]), temperature=1.0)
        torch.testing.assert_close(law.typical, torch.tensor([0.0, 0.5, 1.0]))


def test_a_schedule_is_shared_by_expanded_laws_and_copied_with_them() -> None:
    schedule = ExponentialAnnealing(1.0, 0.01, num_steps=2)
    law = RelaxedBernoulli(schedule, logits=torch.zeros(3))
    larger = law.expand((2, 3))
    before = larger.log_prob(torch.full((2, 3), 0.1))
    schedule.step()
    expected = RelaxedBernoulli(0.1, logits=torch.zeros(3)).log_prob(torch.full((2, 3), 0.1))
    # the schedule's number is a float32
    torch.testing.assert_close(
        larger.log_prob(torch.full((2, 3), 0.1)), expected, rtol=1e-6, atol=0
    )
    assert not torch.allclose(before, expected)
