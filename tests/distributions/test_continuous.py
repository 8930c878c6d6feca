"""The contract for the continuous laws, and what is theirs alone."""

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_nondiff import noise
from pyro_nondiff.distributions import (
    Gamma,
    InverseCDFExponential,
    LogGamma,
    ScaleGamma,
    log_gamma,
)
from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.infer import TraceEstimator_ELBO, planner
from pyro_nondiff.noise import Request

from .contract import DTYPES, STEP, Continuous, LawContract, Oracle

CONCENTRATION = 2.5


exactly = pytest.mark.usefixtures("float64")


@pytest.fixture
def float64() -> Iterator[None]:
    """What is compared with a quadrature is computed in float64, whatever ``--dtype`` says."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def positive(batch: tuple[int, ...], low: float, high: float) -> Tensor:
    """Positive numbers of ordinary size, none like another."""
    return torch.linspace(low, high, int(np.prod(batch))).reshape(batch)


class PositiveLike(LawContract):
    """Laws of a positive number."""

    outside: ClassVar = (float("nan"), -1.0)

    def test_gradients_are_finite(self) -> None:  # type: ignore[override]
        """Of values and of densities, for each parameter."""
        for dtype in DTYPES:
            for parameters, law in self.ends(dtype):
                value = law.rsample((100,))
                total = value.float().mean() + law.log_prob(value).float().mean()
                for slope in torch.autograd.grad(total, parameters):
                    assert slope.isfinite().all(), law

    def extremes(self, dtype: torch.dtype) -> Iterator[Any]:
        return (law for _, law in self.ends(dtype))

    def ends(self, dtype: torch.dtype) -> Iterator[tuple[list[Tensor], Any]]:
        """Laws at the ends, with their parameters."""
        for each in self.end_points():
            parameters = [torch.tensor(p, dtype=dtype, requires_grad=True) for p in each]
            yield parameters, self.make(*parameters)

    def end_points(self) -> list[tuple[list[float], ...]]:
        return [([0.05, 1.0, 50.0],)]


class TestInverseCDFExponential(PositiveLike):
    def parameters(self, batch: tuple[int, ...]) -> tuple[Tensor, ...]:
        return (positive(batch, 0.7, 2.1),)

    def make(self, *parameters: Tensor, **options: Any) -> Any:
        return InverseCDFExponential(*parameters, **options)

    def oracle(self, law: Any) -> Oracle:
        return Continuous(scipy.stats.expon(scale=1 / law.rate.item()).cdf)

    def test_it_is_pyro_s_law_with_pyro_s_gradient(self) -> None:
        (rate,) = (p.requires_grad_() for p in self.parameters((3,)))
        law, other = self.make(rate), dist.Exponential(rate)
        value = law.rsample((20,))
        torch.testing.assert_close(law.log_prob(value), other.log_prob(value))
        slope = torch.autograd.grad(value.sum(), rate)[0]
        torch.testing.assert_close(slope, (-value / rate).sum(0))


class TestScaleGamma(PositiveLike):
    vmaps_samples: ClassVar = False  # torch has no batching rule for its Gamma numbers

    def parameters(self, batch: tuple[int, ...]) -> tuple[Tensor, ...]:
        return (positive(batch, 0.7, 2.1),)

    def make(self, *parameters: Tensor, **options: Any) -> Any:
        return ScaleGamma(CONCENTRATION, *parameters, **options)

    def oracle(self, law: Any) -> Oracle:
        return Continuous(scipy.stats.gamma(CONCENTRATION, scale=law.scale.item()).cdf)

    def noise_grid(self, law: Any) -> tuple[Tensor, Tensor]:
        t = torch.arange(-40, 10, STEP, dtype=torch.float64)
        return t.exp(), STEP * (CONCENTRATION * t - t.exp() - math.lgamma(CONCENTRATION)).exp()

    def test_a_learnt_concentration_is_refused(self) -> None:
        concentration = torch.tensor(2.0, requires_grad=True)
        with pytest.raises(NonDiffError, match="concentration requires a gradient"):
            ScaleGamma(concentration, 1.0)
        assert ScaleGamma(concentration.detach(), 1.0).concentration == 2


class GammaLike(PositiveLike):
    gradient: ClassVar[str]

    def parameters(self, batch: tuple[int, ...]) -> tuple[Tensor, ...]:
        return positive(batch, 1.7, 0.6), positive(batch, 0.7, 2.1)

    def make(self, *parameters: Tensor, **options: Any) -> Any:
        return Gamma(*parameters, self.gradient, **options)

    def oracle(self, law: Any) -> Oracle:
        rate = law.rate.item()
        return Continuous(scipy.stats.gamma(law.concentration.item(), scale=1 / rate).cdf)

    def end_points(self) -> list[tuple[list[float], ...]]:
        return [([0.5, 1.0, 20.0], [1.0, 0.2, 5.0])]

    @exactly
    @pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0, 60.0])
    def test_small_and_large_concentrations(self, alpha: float) -> None:
        """In two stages as the contract's own test, with its false-alarm rate of 1e-9."""
        law = self.make(torch.tensor(alpha), torch.tensor(1.0))
        cdf = scipy.stats.gamma(alpha).cdf
        for count, limit in ((5_000, 1e-3), (80_000, 1e-6)):
            if Continuous(cdf).p_value(law.sample((count,)).double().numpy()) >= limit:
                return
        pytest.fail("the draws do not follow the law")


class TestGammaImplicit(GammaLike):
    gradient: ClassVar = "implicit"
    vmaps_samples: ClassVar = False  # torch has no batching rule for its Gamma numbers


class TestGammaRejection(GammaLike):
    gradient: ClassVar = "rejection"

    def test_a_foreign_value_has_no_score(self) -> None:
        alpha = torch.tensor(1.3, requires_grad=True)
        law, other = Gamma(alpha, 1.0, "rejection"), Gamma(alpha, 1.0, "rejection")
        value = law.rsample()
        assert law.score_parts(value).score_function.requires_grad
        strangers = [value.clone(), value[None], torch.tensor(0.7), other.rsample()]
        for stranger in strangers:
            with pytest.raises(NonDiffError, match="only the tensor that the law drew"):
                law.score_parts(stranger)
        law.rsample()  # it remembers the last one alone
        with pytest.raises(NonDiffError, match="only the tensor that the law drew"):
            law.score_parts(value)

    def test_copies_do_not_hold_the_draw(self) -> None:
        alpha = torch.tensor(1.3, requires_grad=True)
        law = Gamma(alpha * 2, 1.0, "rejection", boost=3)
        value = law.rsample()
        plain = Gamma(torch.tensor(1.3), 1.0, "rejection", boost=3)
        plain.rsample()
        for other in (copy.copy(law), copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
            assert other._last is None
            assert (other.gradient, other.boost) == ("rejection", 3)
            with pytest.raises(NonDiffError, match="only the tensor"):
                other.score_parts(value)
        assert law.expand((2,)).boost == 3

    def test_no_value_is_waited_for(self) -> None:
        """All proposals are made at once, so a draw runs on the meta device."""
        law = Gamma(torch.ones(3, device="meta"), 1.0, "rejection", validate_args=False)
        assert law.rsample((2,)).shape == (2, 3)

    @exactly
    def test_when_all_proposals_are_rejected_it_is_the_middle(self) -> None:
        def source(request: Request) -> Tensor:
            # the first logistic noise is the proposals', and infinite means no acceptance
            return torch.full(request.shape, 40.0)

        law = Gamma(torch.tensor(1.0), 1.0, "rejection", boost=1)
        with noise.source(source):
            assert float(law.rsample()) == pytest.approx(2 - 1 / 3)


def test_bad_arguments_of_gamma() -> None:
    with pytest.raises(NonDiffError, match="'implicit' or 'rejection', found 'score'"):
        Gamma(1.0, 1.0, "score")
    with pytest.raises(NonDiffError, match="boost must be at least 1, found 0"):
        Gamma(1.0, 1.0, "rejection", boost=0)


# --- LogGamma ---------------------------------------------------------------------------------


class TestLogGamma(PositiveLike):
    outside: ClassVar = (float("nan"),)
    vmaps_samples: ClassVar = False  # torch has no batching rule for its Gamma numbers

    def parameters(self, batch: tuple[int, ...]) -> tuple[Tensor, ...]:
        return positive(batch, 1.7, 0.6), positive(batch, 0.7, 2.1)

    def make(self, *parameters: Tensor, **options: Any) -> Any:
        return LogGamma(*parameters, **options)

    def oracle(self, law: Any) -> Oracle:
        alpha, rate = law.concentration.item(), law.rate.item()
        return Continuous(scipy.stats.loggamma(alpha, loc=-math.log(rate)).cdf)

    def end_points(self) -> list[tuple[list[float], ...]]:
        return [([0.01, 1.0, 50.0], [1.0, 0.2, 5.0])]

    @exactly
    @pytest.mark.parametrize("alpha", [1e-4, 1e-2, 0.3, 5.0, 100.0])
    def test_density_is_scipy_s(self, alpha: float) -> None:
        law = self.make(torch.tensor(alpha).double(), torch.tensor(1.7).double())
        points = torch.linspace(-8, 5, 30).double()
        wanted = scipy.stats.loggamma(alpha, loc=-math.log(1.7)).logpdf(points.numpy())
        found = law.log_prob(points)
        torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=1e-10, atol=0)

    @exactly
    @pytest.mark.parametrize("alpha", [1e-4, 1e-2, 0.3, 5.0])
    def test_density_of_small_concentrations_integrates_to_one(self, alpha: float) -> None:
        law = self.make(torch.tensor(alpha).double(), torch.tensor(1.0).double())

        def density(y: float) -> float:
            return float(law.log_prob(torch.tensor(y).double()).exp())

        total = scipy.integrate.quad(density, -60, 10, limit=200, epsabs=1e-11)[0]
        # on the left exp(y) is below 1e-26, and the integral of alpha exp(alpha y) is known
        total += density(-60.0) / alpha
        assert total == pytest.approx(1, abs=1e-8)

    @exactly
    @pytest.mark.parametrize("alpha", [0.05, 0.7, 3.0])
    @pytest.mark.parametrize("power", [1, 2])
    def test_path_is_the_moments_derivative(self, alpha: float, power: int) -> None:
        r"""By quadrature over both noises: :math:`E[y] = \psi(\alpha)`, and its derivative."""
        found, slope = moment_and_slope(alpha, power)
        psi = [float(scipy.special.polygamma(n, alpha)) for n in range(3)]
        wanted = psi[0] if power == 1 else psi[1] + psi[0] ** 2
        derivative = psi[1] if power == 1 else psi[2] + 2 * psi[0] * psi[1]
        assert found == pytest.approx(wanted, rel=1e-9)
        assert slope == pytest.approx(derivative, rel=PATH)

    @exactly
    def test_moments_and_entropy(self) -> None:
        for alpha, rate in ((0.05, 1.0), (0.7, 2.0), (9.0, 0.3)):
            law = self.make(torch.tensor(alpha).double(), torch.tensor(rate).double())
            other = scipy.stats.loggamma(alpha, loc=-math.log(rate))
            assert float(law.mean) == pytest.approx(other.mean(), rel=1e-9)
            # torch's trigamma is right to 1e-9
            assert float(law.variance) == pytest.approx(other.var(), rel=1e-7)
            wanted = alpha + scipy.special.gammaln(alpha) - alpha * scipy.special.digamma(alpha)
            assert float(law.entropy()) == pytest.approx(wanted, rel=1e-9)

    @exactly
    def test_it_is_the_logarithm_of_a_gamma_number(self) -> None:
        law = self.make(torch.tensor(0.8).double(), torch.tensor(1.7).double())
        gamma = dist.Gamma(law.concentration, law.rate)
        y = law.sample((20,))
        torch.testing.assert_close(law.log_prob(y), gamma.log_prob(y.exp()) + y)


PATH = 1e-4
"""torch's derivative of a Gamma number is a rational approximation, with an error of up to 5e-4.
Its expectation was measured to be 2e-5 off at most."""


def moment_and_slope(alpha: float, power: int) -> tuple[float, float]:
    """A moment of a log-Gamma number and its derivative, through what the law draws."""
    leaf = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    s = torch.arange(-36 / (alpha + 1), math.log(alpha + 45), 0.2).double()
    t = torch.arange(-36, 36, 0.5).double()
    weight = 0.2 * ((alpha + 1) * s - s.exp() - math.lgamma(alpha + 1)).exp()
    uniform = 0.5 * t.sigmoid() * (-t).sigmoid()
    grid = torch.cartesian_prod(s, t)
    with noise.source(lambda r: grid[:, 0].exp() if r.kind == "gamma" else grid[:, 1]):
        y = LogGamma(leaf, torch.tensor(1.0).double()).rsample((len(grid),))
    total = ((weight.unsqueeze(-1) * uniform).flatten() * y**power).sum()
    return float(total.detach()), float(torch.autograd.grad(total, leaf)[0])


@pytest.mark.parametrize("alpha", [1e-4, 1e-3, 1e-2])
def test_log_gamma_lives_where_a_gamma_underflows(alpha: float) -> None:
    """In float32. A Gamma number of concentration 1e-3 is 0, or what stands for it, mostly."""
    leaf = torch.tensor(alpha, dtype=torch.float32, requires_grad=True)
    law = LogGamma(leaf, 1.0)
    y = law.rsample((10_000,))
    score = law.log_prob(y)
    slopes = torch.autograd.grad(y.sum() + score.sum(), leaf)[0]
    for found in (y, score, slopes):
        assert found.isfinite().all()
    assert y.unique().numel() > 9_900

    # the mean is -1 / alpha, and its deviation 1 / alpha: 6 of them
    assert float(y.detach().double().mean() * alpha + 1) == pytest.approx(
        0, abs=6 / 100 + 2 * alpha
    )

    gamma = dist.Gamma(leaf, 1.0)
    z = gamma.rsample((10_000,))
    smallest = float(z.detach().min())
    assert float((z == smallest).double().mean()) > (0.9 if alpha < 5e-3 else 0.3)
    slope = torch.autograd.grad(z.log().sum(), leaf)[0]
    assert not slope.isfinite() or float((slope / 10_000 * alpha**2 - 1).abs()) > 0.1


@exactly
def test_log_gamma_without_the_uniform_s_path_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: the path through the power of the uniform number is dropped."""
    right = moment_and_slope(0.7, 1)[1]
    trigamma = float(scipy.special.polygamma(1, 0.7))
    assert right == pytest.approx(trigamma, rel=PATH)
    # what is left is the derivative of E[log g], at a concentration larger by 1
    monkeypatch.setattr(log_gamma, "logsigmoid", lambda noise: Constant(logsigmoid(noise)))
    wrong = moment_and_slope(0.7, 1)[1]
    assert wrong == pytest.approx(float(scipy.special.polygamma(1, 1.7)), rel=PATH)
    assert abs(wrong - trigamma) > 1


class Constant:
    """A number that is divided without a gradient to the divisor."""

    def __init__(self, number: Tensor) -> None:
        self.number = number

    def __truediv__(self, divisor: Tensor) -> Tensor:
        return self.number / divisor.detach()


# --- a learnt concentration, by quadrature over the noise ---------------------------------------


COUNTS = torch.tensor([2.0, 5.0, 1.0], dtype=torch.float64)
PRIOR = 1.5, 0.8
POSTERIOR = PRIOR[0] + float(COUNTS.sum()), PRIOR[1] + len(COUNTS)


class Noise(NamedTuple):
    """Nodes of a law's noise, side by side, and their probabilities."""

    source: Callable[[Request], Tensor]
    weights: Tensor


def log_nodes(alpha: float, step: float = 0.2) -> tuple[Tensor, Tensor]:
    """Logarithms of standard Gamma numbers, by the trapezoid rule, and their probabilities."""
    y = torch.arange(-36 / alpha, math.log(alpha + 45), step).double()
    return y, step * (alpha * y - y.exp() - math.lgamma(alpha)).exp()


def logistic_nodes() -> tuple[Tensor, Tensor]:
    t = torch.arange(-36, 36, 0.5).double()
    return t, 0.5 * t.sigmoid() * (-t).sigmoid()


def gamma_noise(alpha: float) -> Noise:
    y, weights = log_nodes(alpha)
    return Noise(lambda request: y.exp().expand(request.shape), weights)


def log_gamma_noise(alpha: float) -> Noise:
    (y, weights), (t, uniform) = log_nodes(alpha + 1), logistic_nodes()
    grid = torch.cartesian_prod(y, t)

    def source(request: Request) -> Tensor:
        return (grid[:, 0].exp() if request.kind == "gamma" else grid[:, 1]).expand(request.shape)

    return Noise(source, torch.outer(weights, uniform).flatten())


def rejection_noise(alpha: float) -> Noise:
    """First proposals that are all accepted, and the one uniform number of ``boost=1``."""
    (y, weights), (t, uniform) = log_nodes(alpha + 1), logistic_nodes()
    third = alpha + 1 - 1 / 3
    grid = torch.cartesian_prod(((y.exp() / third) ** (1 / 3) - 1) * math.sqrt(9 * third), t)

    def source(request: Request) -> Tensor:
        if request.kind == "normal":
            return grid[:, 0].expand(request.shape)
        boosts = request.shape[0] == 1
        return grid[:, 1].expand(request.shape) if boosts else torch.full(request.shape, -1e6)

    return Noise(source, torch.outer(weights, uniform).flatten())


class Variant(NamedTuple):
    """A law of Gamma numbers, with or without a logarithm."""

    make: Callable[[Tensor, Tensor], Any]
    noise: Callable[[float], Noise]
    tolerance: float
    learnt: bool = True
    logarithm: bool = False


VARIANTS = {
    "implicit": Variant(lambda a, b: Gamma(a, b), gamma_noise, PATH),
    "rejection": Variant(lambda a, b: Gamma(a, b, "rejection", boost=1), rejection_noise, 1e-9),
    "log": Variant(LogGamma, log_gamma_noise, PATH, logarithm=True),
    "scale": Variant(lambda a, b: ScaleGamma(a.detach(), 1 / b), gamma_noise, 1e-9, learnt=False),
}


def mean_gradient(variant: Variant, alpha: float, beta: float, counts: Tensor) -> Tensor:
    """The mean gradient of the ELBO of counts with a Gamma rate, through the objective."""
    given = variant.noise(alpha)
    shift = torch.zeros(2, len(given.weights), dtype=torch.float64, requires_grad=True)
    one = torch.ones((), dtype=torch.float64)

    def model() -> None:
        with pyro.plate("copies", len(given.weights)):
            prior = (LogGamma if variant.logarithm else dist.Gamma)(PRIOR[0] * one, PRIOR[1] * one)
            z = pyro.sample("z", prior)
            log_rate = z if variant.logarithm else z.log()
            pyro.factor("counts", counts.sum() * log_rate - len(counts) * log_rate.exp())

    def guide() -> None:
        with pyro.plate("copies", len(given.weights)):
            pyro.sample("z", variant.make(alpha + shift[0], beta + shift[1]))

    elbo = TraceEstimator_ELBO(worlds="vectorized")
    with noise.source(given.source):
        loss = elbo.differentiable_loss(model, guide)
    gradient = torch.autograd.grad(loss, shift)[0]
    return (gradient * given.weights).sum(-1)


def exact(alpha: float, beta: float, counts: Tensor) -> Tensor:
    """The divergence from the posterior, differentiated in closed form, by SciPy."""
    shape, rate = PRIOR[0] + float(counts.sum()), PRIOR[1] + len(counts)
    trigamma = float(scipy.special.polygamma(1, alpha))
    by_alpha = (alpha - shape) * trigamma + (rate - beta) / beta
    by_beta = shape / beta - alpha * rate / beta**2
    return torch.tensor([by_alpha, by_beta], dtype=torch.float64)


@exactly
@pytest.mark.parametrize("name", VARIANTS)
def test_gradient_vanishes_at_the_posterior(
    name: str, param_store: object, no_world_check: None
) -> None:
    """Poisson counts with a Gamma rate: through the whole objective, by quadrature.

    At the posterior the cost does not depend on the value, so that torch's approximation of the
    path has no part in it.
    """
    found = mean_gradient(VARIANTS[name], *POSTERIOR, COUNTS)
    assert float(found.abs().max()) <= 1e-9


@exactly
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("start", [(0.4, 1.1), (3.0, 0.7)])
def test_gradient_elsewhere_is_that_of_the_divergence(
    name: str, start: tuple[float, float], param_store: object, no_world_check: None
) -> None:
    variant = VARIANTS[name]
    found, wanted = mean_gradient(variant, *start, COUNTS), exact(*start, COUNTS)
    assert float(wanted.abs().min()) > 0.1
    if not variant.learnt:
        found, wanted = found[1:], wanted[1:]
    torch.testing.assert_close(found, wanted, rtol=variant.tolerance, atol=0)


@pytest.fixture
def no_world_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check replays every world alone, which draws all nodes again."""
    monkeypatch.setattr(planner, "check_worlds", lambda pair, chunk: None)
