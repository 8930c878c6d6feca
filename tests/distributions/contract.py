"""What every law of the library must do, as tests that a law's test class inherits.

A subclass says how to make the law, and what its values follow. Names that start with ``test_``
are the contract; all else is for a subclass to override.
"""

import copy
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from pyro_nondiff import noise
from pyro_nondiff.distributions import (
    core,
    dtype_and_device,
    log_prob,
    noise_concentration,
    noise_kind,
    noise_shape,
    transport,
)

BATCHES: list[tuple[int, ...]] = [(), (1,), (3,), (0,), (2, 0), (1, 2, 3)]
SAMPLES: list[tuple[int, ...]] = [(), (0,), (1,), (4, 2)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
TEMPERATURES = [1e-3, 0.05, 0.5, 1.0, 10.0]
LOGITS = [0.0, 5.0, -5.0, 17.0, -17.0, 90.0, -90.0]

FIRST_ALARM, LAST_ALARM = 1e-3, 1e-6
FIRST_SIZE, LAST_SIZE = 40_000, 160_000
"""A law is refused if the first draws have a p-value below 1e-3 *and* fresh ones, four times as
many, one below 1e-6. The two are independent, so a right law is refused with probability 1e-9.
A probability of 1/2 that is wrong by 0.014 is seen with probability 0.99: it is 5.6 standard errors
of the first draws away, and 11 of the others. So is a distribution function wrong by 0.017."""

QUADRATURE = 1e-8
"""In float64. The trapezoid rule converges exponentially; less than 1e-9 lies beyond its ends."""

Array = NDArray[np.float64]


class Oracle(ABC):
    """What draws of a law of one element follow."""

    @abstractmethod
    def p_value(self, draws: Array) -> float:
        """How probable draws at least as unusual are, by a test of goodness of fit.

        Arguments:
            draws: Of shape ``(n, *event_shape)``.
        """


@dataclass(frozen=True)
class Mass(Oracle):
    """Probabilities of 0, 1, ..., or of the corners of the simplex."""

    probabilities: Array

    def p_value(self, draws: Array) -> float:
        index = (draws.argmax(-1) if draws.ndim > 1 else draws).astype(int)
        return _chi_square(np.bincount(index, minlength=len(self.probabilities)), self)


@dataclass(frozen=True)
class Continuous(Oracle):
    """A distribution function, of a SciPy law or of one's own.

    ``statistic`` makes a number of a value with event dimensions.
    """

    cdf: Callable[[Array], Array]
    statistic: Callable[[Array], Array] = lambda draws: draws

    def p_value(self, draws: Array) -> float:
        return float(scipy.stats.kstest(self.statistic(draws), self.cdf).pvalue)


@dataclass(frozen=True)
class Mixed(Oracle):
    """Probabilities of 0, of what lies between, and of 1, with a distribution function there."""

    probabilities: Array
    cdf: Callable[[Array], Array]

    def p_value(self, draws: Array) -> float:
        ends = Mass(self.probabilities).p_value(np.sign(draws) + (draws == 1))
        inside = Continuous(self.cdf).p_value(draws[(draws > 0) & (draws < 1)])
        return min(1.0, 2 * min(ends, inside))


@dataclass(frozen=True)
class All(Oracle):
    """Several oracles at once, with Bonferroni's correction."""

    parts: tuple[Oracle, ...]

    def p_value(self, draws: Array) -> float:
        return min(1.0, len(self.parts) * min(part.p_value(draws) for part in self.parts))


def _chi_square(counts: Array, law: Mass) -> float:
    possible = law.probabilities > 0
    if counts[~possible].any():
        return 0.0
    if possible.sum() == 1:
        return 1.0
    expected = law.probabilities[possible] / law.probabilities[possible].sum() * counts.sum()
    return float(scipy.stats.chisquare(counts[possible], expected).pvalue)


def same_noise(draw: Callable[[], Tensor]) -> Tensor:
    """A draw that is the same at each call, whatever the law draws of."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return draw()


def rounding(dtype: torch.dtype) -> float:
    """What a sum of ten products may lose in a dtype, relative to the largest of them."""
    return 30 * torch.finfo(dtype).eps


class LawContract(ABC):
    """What every law must do.

    Class attributes:
        event_shape: Of the laws that :meth:`parameters` and :meth:`make` give.
        outside: Numbers that a value may not have.
        moved_values: Whether a copy of a value has a density; else it must be refused.
        vmaps_samples: Whether ``rsample`` is written for ``torch.func.vmap``.
    """

    event_shape: ClassVar[tuple[int, ...]] = ()
    outside: ClassVar[tuple[float, ...]] = (float("nan"),)
    moved_values: ClassVar[bool] = True
    vmaps_samples: ClassVar[bool] = True

    # What a subclass supplies.

    @abstractmethod
    def make(self, *parameters: Tensor, **options: Any) -> Any:
        """The law of some parameters; ``options`` go to its class."""

    @abstractmethod
    def parameters(self, batch: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Parameters of ordinary size, each with the batch shape in front."""

    @abstractmethod
    def oracle(self, law: Any) -> Oracle | None:
        """What draws of a law with an empty batch shape follow, if it is known."""

    @abstractmethod
    def extremes(self, dtype: torch.dtype) -> Iterator[Any]:
        """Laws at the ends of what their parameters may be, with a small batch shape."""

    # What may be overridden.

    def law(self, batch: tuple[int, ...] = (3,), **options: Any) -> Any:
        """A law with ordinary parameters."""
        return self.make(*self.parameters(batch), **options)

    def grids(self, law: Any) -> tuple[Tensor, Tensor] | None:
        """Points of the support of a law of one element, and weights of its integral.

        What has a probability of its own is a point of weight 1. None where quadrature is not
        cheap, or nothing is to be seen by it.
        """
        return support_grid(law.support) if not self.event_shape else None

    def noise_grid(self, law: Any) -> tuple[Tensor, Tensor] | None:
        """Points of the noise of a law of one element and their probabilities, if cheap."""
        return noise_grid(noise_kind(law)) if not self.event_shape else None

    def check_density(self, law: Any, moved: Callable[[Tensor], Tensor]) -> None:
        """Fails unless a value that was moved has the density that it had."""
        value = law.rsample((5,))
        expected, new = law.log_prob(value), moved(value)
        if new.shape != value.shape:
            expected = moved(expected)
        # one number of the value's dtype is exactly one of a wider dtype
        found = law.log_prob(new).to(expected.dtype)
        tolerance = rounding(value.dtype)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)

    # The contract.

    @pytest.mark.parametrize("batch", BATCHES, ids=str)
    @pytest.mark.parametrize("sample", SAMPLES, ids=str)
    def test_shapes(self, batch: tuple[int, ...], sample: tuple[int, ...]) -> None:
        law = self.law(batch)
        assert law.batch_shape == batch
        assert law.event_shape == self.event_shape
        assert law.shape(sample) == sample + batch + self.event_shape
        for value in (law.rsample(sample), law.sample(sample)):
            assert value.shape == sample + batch + self.event_shape
            assert value.dtype == dtype_and_device(law)[0] == torch.get_default_dtype()
            assert law.support.check(value).all()
            if self.moved_values:
                assert law.log_prob(value).shape == sample + batch
        assert not law.sample().requires_grad
        assert type(core(law.to_event(0))) is type(law)

    def test_a_gradient_reaches_every_parameter(self) -> None:
        parameters = [p.requires_grad_() for p in self.parameters((7,))]
        value = self.make(*parameters).rsample((50,))
        weights = torch.linspace(-1, 2, value[0].numel()).reshape(value[0].shape)
        for slope in torch.autograd.grad((value.square() * weights).sum(), parameters):
            assert slope.isfinite().all()
            assert slope.abs().max() > 0

    def test_non_contiguous_parameters(self) -> None:
        parameters = self.parameters((2, 3))
        turned = [p.transpose(0, 1).contiguous().transpose(0, 1) for p in parameters]
        strided = [torch.stack([p, p - 1], -1)[..., 0] for p in parameters]
        plain = same_noise(self.make(*parameters).rsample)
        for changed in (turned, strided):
            assert not all(p.is_contiguous() for p in changed)
            law = self.make(*changed)
            torch.testing.assert_close(same_noise(law.rsample), plain)

    @pytest.mark.parametrize("batch", [(), (1,), (3,)], ids=str)
    def test_expand(self, batch: tuple[int, ...]) -> None:
        """Values, gradients and densities are those of expanded parameters."""
        parameters = [p.requires_grad_() for p in self.parameters(batch)]
        shape = (2, *(batch if batch != (1,) else (3,)))
        event = [p.shape[len(batch) :] for p in parameters]
        pairs = zip(parameters, event, strict=True)
        expected = self.make(*[p.expand(shape + e) for p, e in pairs])
        law = self.make(*parameters).expand(torch.Size(shape))
        assert type(law) is type(expected)
        assert law.batch_shape == shape
        found = []
        for each in (law, expected):
            value = same_noise(lambda each=each: each.rsample((4,)))
            score = each.log_prob(value)
            weighted = (value * torch.linspace(0.5, 2, value.numel()).reshape(value.shape)).sum()
            slopes = torch.autograd.grad(weighted + score.sum(), parameters)
            found.append((value, score, *slopes))
        for a, b in zip(*found, strict=True):
            # sums over 24 numbers may come in another order
            torch.testing.assert_close(a, b, rtol=rounding(a.dtype), atol=rounding(a.dtype))
        again = law.expand(torch.Size((5, *shape)))
        assert again.rsample().shape == (5, *shape, *self.event_shape)

    def test_to_event_and_mask(self) -> None:
        law = self.law((2, 3))
        mask = torch.tensor([True, False, True])
        value = law.rsample()
        score = law.log_prob(value)
        for wrapped, expected in (
            (law.to_event(1), score.sum(-1)),
            (law.to_event(2), score.sum()),
            (law.mask(mask), score * mask),
            (law.mask(mask).to_event(1), (score * mask).sum(-1)),
            (law.mask(False), torch.zeros_like(score)),
        ):
            torch.testing.assert_close(wrapped.log_prob(value), expected)
            torch.testing.assert_close(log_prob(wrapped, value)[1], expected)
            assert wrapped.shape() == value.shape
            drawn = same_noise(wrapped.rsample)
            torch.testing.assert_close(drawn, same_noise(law.rsample), rtol=0, atol=0)

    @pytest.mark.parametrize(
        "move",
        [
            lambda x: x.clone(),
            lambda x: x.detach(),
            lambda x: x[2],
            lambda x: x[1:4],
            lambda x: x.contiguous().view(x.shape).squeeze(0),
            lambda x: x.to(torch.float64),
            lambda x: copy.deepcopy(x.detach()),
            lambda x: torch.stack(list(x)),
        ],
        ids=["clone", "detach", "index", "slice", "view", "to", "deepcopy", "stack"],
    )
    def test_moving_a_value_changes_no_density(self, move: Callable[[Tensor], Tensor]) -> None:
        self.check_density(self.law(), move)

    def test_half_a_value_of_a_discrete_law_is_the_same_value(self) -> None:
        law = self.law()
        if not law.support.is_discrete:
            pytest.skip("its values are rounded")
        self.check_density(law, lambda x: x.to(torch.bfloat16))

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, copy.copy, lambda law: pickle.loads(pickle.dumps(law))]
    )
    def test_copies_of_a_law(self, copied: Callable[[Any], Any]) -> None:
        law = self.law()
        value, other = same_noise(law.rsample), copied(law)
        again = same_noise(other.rsample)
        assert torch.equal(value, again)
        torch.testing.assert_close(other.log_prob(again), law.log_prob(value), rtol=0, atol=0)
        assert other.expand((2, 3)).batch_shape == (2, 3)

    def test_vmap_of_values_and_scores(self) -> None:
        """Over parameters and noise at once; the values are those of one law of a larger batch."""
        parameters = self.parameters((4, 3))
        law = self.make(*parameters)
        kind = noise_kind(law)
        if kind is None:
            pytest.skip("it is no map of noise")
        like = dtype_and_device(law)
        shape, needs = tuple(noise_shape(law)), noise_concentration(law)
        request = noise.Request("", kind, shape, *like, law=law, concentration=needs)
        drawn = noise.draw(request)

        def each(drawn: Tensor, *each: Tensor) -> tuple[Tensor, Tensor]:
            law = self.make(*each, validate_args=False)
            value = law.from_noise(drawn)
            return value, law.log_prob(value)

        # the conditional noise of gumbel_rao is drawn inside: it changes no value
        with noise.source(lambda request: torch.zeros(request.shape)):
            value, score = torch.func.vmap(each)(drawn, *parameters)
            expected = law.from_noise(drawn)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(score, law.log_prob(expected))

    def test_vmap_of_draws(self) -> None:
        if not self.vmaps_samples:
            pytest.skip("its draw is a loop")
        parameters = [p[:1].expand_as(p) for p in self.parameters((4, 3))]

        def draw(*each: Tensor) -> Tensor:
            found: Tensor = self.make(*each, validate_args=False).rsample((50,))
            return found

        value = torch.func.vmap(draw, randomness="different")(*parameters)
        assert value.shape == (4, 50, 3, *self.event_shape)
        assert not torch.equal(value[0], value[1])
        shared = torch.func.vmap(draw, randomness="same")(*parameters)
        torch.testing.assert_close(shared[0], shared[1], rtol=0, atol=0)

    def test_in_programs(self) -> None:
        """Under a plate, in a trace, replayed, scaled and masked."""
        law = self.law(())

        def program() -> Any:
            with pyro.plate("rows", 6, subsample_size=3), pyro.plate("columns", 2):
                return pyro.sample("z", law)

        trace = poutine.trace(program).get_trace()
        site = trace.nodes["z"]
        assert site["value"].shape == (2, 3, *self.event_shape)
        score = law.expand((2, 3)).log_prob(site["value"])
        torch.testing.assert_close(trace.log_prob_sum(), 2 * score.sum())
        replayed = poutine.trace(poutine.replay(program, trace=trace)).get_trace()
        assert replayed.nodes["z"]["value"] is site["value"]
        torch.testing.assert_close(replayed.log_prob_sum(), trace.log_prob_sum())
        masked = poutine.trace(poutine.replay(poutine.mask(program, mask=False), trace=trace))
        assert masked.get_trace().log_prob_sum() == 0

    def test_same_value_of_the_same_noise(self) -> None:
        """The engine's map of noise is the law's own, for half precision too."""
        for dtype in DTYPES:
            law = self.make(*[p.to(dtype) for p in self.parameters((3,))])
            kind = noise_kind(law)
            if kind is None:
                pytest.skip("it is no map of noise")
            shape, needs = (5, *noise_shape(law)), noise_concentration(law)
            request = noise.Request("", kind, shape, dtype, "cpu", law=law, concentration=needs)
            drawn = same_noise(lambda request=request: noise.draw(request))
            assert drawn.dtype == torch.promote_types(dtype, torch.float32)
            value = transport(law, drawn)
            assert value.dtype == dtype
            assert value.shape == (5, 3, *self.event_shape)
            with noise.source(lambda _, drawn=drawn: drawn):
                torch.testing.assert_close(law.rsample((5,)), value, rtol=0, atol=0)

    def test_bad_values_are_refused(self) -> None:
        for number in self.outside:
            value = torch.full(self.law(()).shape(), number)
            with pytest.raises(ValueError, match=r"[Ee]xpected value"):
                self.law((), validate_args=True).log_prob(value)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_density_is_finite_on_own_samples(self, dtype: torch.dtype) -> None:
        """None of them is refused by validation."""
        for law in self.extremes(dtype):
            value = law.rsample((100,))
            score = law.log_prob(value)
            assert value.isfinite().all(), law
            assert score.isfinite().all(), law
            assert score.dtype == dtype

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_gradients_are_finite(self, dtype: torch.dtype) -> None:
        for law in self.extremes(dtype):
            parameter = core(law).like
            assert parameter.requires_grad
            value = law.rsample((100,))
            (slope,) = torch.autograd.grad(value.float().square().sum(), parameter)
            assert slope.isfinite().all(), law

    def test_under_autocast(self) -> None:
        parameters = [p.float().requires_grad_() for p in self.parameters((3,))]
        law = self.make(*parameters)
        plain = same_noise(law.rsample)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            law = self.make(*parameters)
            value = same_noise(law.rsample)
            score = law.log_prob(value)
        assert value.dtype == plain.dtype == torch.float32
        torch.testing.assert_close(value, plain)
        expected = law.log_prob(value)
        torch.testing.assert_close(score, expected)

    def test_samples_follow_the_law(self) -> None:
        law = self.law(())
        oracle = self.oracle(law)
        if oracle is None:
            pytest.skip("it has no oracle")
        if p_value_of(oracle, law, FIRST_SIZE) < FIRST_ALARM:
            assert p_value_of(oracle, law, LAST_SIZE) >= LAST_ALARM

    def test_density_integrates_to_one(self) -> None:
        parameters = [p.double() for p in self.parameters(())]
        law = self.make(*parameters, validate_args=False)
        grid = self.grids(law)
        if grid is None:
            pytest.skip("it has no quadrature")
        points, weights = grid
        total = (law.log_prob(points).exp() * weights).sum()
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=QUADRATURE)

    def test_pathwise_gradient_is_that_of_the_density(self) -> None:
        r"""Of :math:`E[(z - 0.3)^2]`, over the noise on one side, and the density on the other.

        A map that does not belong to the density, or has another gradient, would differ.
        """
        parameters = [p.double().requires_grad_() for p in self.parameters(())]
        law = self.make(*parameters, validate_args=False)
        points, noises = self.grids(law), self.noise_grid(law)
        if points is None or noises is None or law.support.is_discrete:
            pytest.skip("it has no quadrature")
        scores = law.log_prob(points[0]).exp()
        exact = ((points[0] - 0.3).square() * scores * points[1]).sum()
        with noise.source(lambda request: noises[0].reshape(request.shape)):
            value = law.rsample((len(noises[0]),))
        found = ((value - 0.3).square() * noises[1]).sum()
        torch.testing.assert_close(found, exact, rtol=QUADRATURE, atol=QUADRATURE)
        slopes = (torch.autograd.grad(total, parameters) for total in (found, exact))
        for a, b in zip(*slopes, strict=True):
            torch.testing.assert_close(a, b, rtol=QUADRATURE, atol=QUADRATURE)


def p_value_of(oracle: Oracle, law: Any, count: int) -> float:
    """The p-value of fresh draws of a law."""
    return oracle.p_value(law.sample((count,)).double().numpy())


STEP = 0.02


def support_grid(support: Any) -> tuple[Tensor, Tensor] | None:
    """Points of the trapezoid rule on a support of one number, and their weights.

    In the variable ``t`` the support is the whole line, and the integrand is analytic there.
    """
    t = torch.arange(-60, 60, STEP, dtype=torch.float64)
    if support is constraints.unit_interval:
        t = t[(t > -34) & (t < 34)]
        return t.sigmoid(), STEP * t.sigmoid() * (-t).sigmoid()
    if support is constraints.positive or support is constraints.nonnegative:
        return t.exp(), STEP * t.exp()
    if support is constraints.real:
        return t, torch.full_like(t, STEP)
    return None


def noise_grid(kind: str | None) -> tuple[Tensor, Tensor] | None:
    """Points of the trapezoid rule for one number of noise, and their probabilities."""
    t = torch.arange(-40, 40, STEP, dtype=torch.float64)
    if kind == "logistic":
        return t, STEP * t.sigmoid() * (-t).sigmoid()
    if kind == "gumbel":
        return t, STEP * (-t - (-t).exp()).exp()
    if kind == "normal":
        return t, STEP * (-t.square() / 2).exp() / (2 * torch.pi) ** 0.5
    if kind == "exponential":
        return t.exp(), STEP * (t - t.exp()).exp()
    return None
