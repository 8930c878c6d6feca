"""perturb: the mean of a hard answer over noise, and its gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_nondiff import noise
from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.handlers import perturb
from pyro_nondiff.ops import argmax, external, select, step

S = torch.tensor([0.0, 0.3, -0.2])
M = 20_000


def normal_quadrature(request: noise.Request) -> Tensor:
    """Midpoints of equal masses of the standard normal: a mean over them is an integral."""
    points = (torch.arange(M) + 0.5) / M
    return torch.special.ndtri(points).reshape(M, *(1,) * (len(request.shape) - 1))


def check_threshold_is_exact() -> None:
    r"""Over noise the step is :math:`\Phi(x / \sigma)`, and its slope the normal density."""
    x = torch.tensor(0.3, requires_grad=True)
    with noise.source(normal_quadrature), perturb(M, sigma=0.7):
        h = step("h", x)
    (slope,) = torch.autograd.grad(h, x)
    normal = torch.distributions.Normal(0.0, 1.0)
    # a step among M points of equal mass is off by at most one of them, 1 / M; times the largest
    # point, 4 / 0.7, for the slope
    torch.testing.assert_close(h.detach(), normal.cdf(x.detach() / 0.7), rtol=0, atol=1 / M)
    expected = normal.log_prob(x.detach() / 0.7).exp() / 0.7
    torch.testing.assert_close(slope, expected, rtol=0, atol=6 / M)


def test_threshold_is_exact() -> None:
    check_threshold_is_exact()


@pytest.mark.parametrize("wrong", [0.98, -1.0, 0.0])
def test_planted_wrong_noise_in_the_slope_is_caught(
    monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    mean = perturb.mean

    def planted(handler: Any, name: str, solve: Any, inputs: Any, event: Any) -> Tensor:
        scaled = [x.detach() + wrong * (x - x.detach()) for x in inputs]
        return mean(handler, name, solve, scaled, event)

    monkeypatch.setattr(perturb, "mean", planted)
    with pytest.raises(AssertionError):
        check_threshold_is_exact()


def moments(run: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The value and the Jacobian of a run with M draws."""
    x = S.clone().requires_grad_()
    value = run(x)
    rows = [torch.autograd.grad(v, x, retain_graph=True)[0] for v in value]
    return value.detach(), torch.stack(rows)


def test_choice_is_that_of_gumbel_noise_were_it_gumbel() -> None:
    """With Gumbel noise the mean is the softmax exactly: the paper's proposition 3.1."""

    def gumbel(request: noise.Request) -> Tensor:
        return -torch.empty(request.shape).exponential_().log()

    with noise.source(gumbel), perturb(M):
        z = argmax("z", S)
    # five standard errors of a probability over M draws
    torch.testing.assert_close(z, S.softmax(-1), rtol=0, atol=5 * 0.5 / M**0.5)


def test_jacobian_of_a_choice_is_the_derivative_of_its_mean() -> None:
    """By central differences, the noise the same."""
    fixed = torch.randn(400_000, 3)

    def same(request: noise.Request) -> Tensor:
        return fixed

    with noise.source(same), perturb(len(fixed)):
        _, jacobian = moments(lambda x: argmax("z", x))
        columns = []
        for k in range(3):
            shift = 0.25 * torch.eye(3)[k]
            up, down = argmax("z", S + shift), argmax("z", S - shift)
            columns.append((up - down) / 0.5)
    # Monte Carlo: an entry of y Z^T has standard deviation below 1, so five standard errors are
    # 5 / 632 = 0.008, and the same for the difference; a third derivative of at most 0.4 adds
    # 0.4 * 0.25^2 / 6 = 0.004.
    torch.testing.assert_close(jacobian, torch.stack(columns, 1), rtol=0, atol=0.02)
    assert jacobian.diagonal().min() > 0.1


def one_hot(x: Tensor) -> Tensor:
    return argmax("inner", x)


@pytest.mark.parametrize("batched", [False, True])
def test_solver_behind_external_is_served_like_a_choice(batched: bool) -> None:
    fixed = torch.randn(50, 3)
    with noise.source(lambda request: fixed), perturb(50):
        expected = moments(lambda x: argmax("z", x))
        options = {"event_dim": 1, "shape": (3,), "batched": batched}
        found = moments(lambda x: external("e", one_hot, x, **options))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_all_tensors_of_floats_are_perturbed_and_nothing_else() -> None:
    seen = []

    def fn(a: Tensor, b: Tensor, k: Tensor, word: str) -> Tensor:
        seen.append((a, b, k, word))
        return (a.sum() + b) * k

    a, b = torch.zeros(4, 3, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    k = torch.tensor(2)
    with perturb(5, sigma=0.1):
        value = external("e", fn, a, b, k, "word", event_dim=[1, 0, 0, 0])
    assert value.shape == (4,)
    assert len(seen) == 20
    assert all(one[0].shape == (3,) and one[2] == 2 and one[3] == "word" for one in seen)
    assert len({float(one[1]) for one in seen}) == 5  # b has no batch: its noise has none
    slopes = torch.autograd.grad(value.sum(), [a, b])
    assert [slope.shape for slope in slopes] == [(4, 3), ()]


def test_rows_of_a_batch_do_not_mix() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    with perturb(100):  # none of 100 draws takes the first of three but for 1e-18
        z = argmax("z", x)
    (slope,) = torch.autograd.grad(z[0, 0], x)
    assert slope[0].abs().max() > 0
    assert torch.equal(slope[1], torch.zeros(3))


def test_select_sums_by_the_mean_choice() -> None:
    items = torch.tensor([1.0, 2.0, 3.0])
    fixed = torch.randn(50, 3)
    with noise.source(lambda request: fixed), perturb(50):
        torch.testing.assert_close(select("v", S, items), argmax("z", S) @ items)


def test_noise_has_the_name_of_the_op() -> None:
    asked = []

    def source(request: noise.Request) -> Tensor:
        asked.append((request.site, request.kind, request.shape))
        return torch.zeros(request.shape)

    with noise.source(source), perturb(4):
        argmax("z", S)
    assert asked == [("z", "normal", (4, 3))]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_samples": 0}, "num_samples must be positive"), ({"sigma": -1.0}, "sigma must be")],
)
def test_arguments_that_are_not_positive_are_refused(
    options: dict[str, float], message: str
) -> None:
    with pytest.raises(NonDiffError, match=message):
        perturb(**options)


def test_external_without_floats_is_refused() -> None:
    with pytest.raises(NonDiffError, match="perturb: op 'e' has no argument that is a tensor"):
        perturb()(external)("e", float, 3)
