"""With the noise given, an estimate is the paper's formula, written out longhand."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_nondiff import noise
from pyro_nondiff.estimators import (
    REINFORCE,
    RLOO,
    DisARM,
    Enumerate,
    MovingAverage,
    NeuralBaseline,
)
from pyro_nondiff.infer import TraceEstimator_ELBO
from pyro_nondiff.noise import Request

from . import programs
from .checks import elbo_of
from .programs import BERNOULLI

CLOSE = {"rtol": 0.0, "atol": 1e-12}
"""Two ways to sum a dozen float64 numbers of order 10."""

DATA = torch.tensor([0.8, -0.9, 1.7])
PRIOR = torch.tensor(0.3)


def logits() -> Tensor:
    """The guide's logits, one a plate element: of both signs."""
    return pyro.param("logits", torch.tensor([-0.4, 0.9, 0.2]))


def slope() -> Tensor:
    """The model's parameter."""
    return pyro.param("slope", torch.tensor(1.5))


def model() -> None:
    """A site in a plate, whose cost is not linear in it, under a scale."""
    with pyro.poutine.scale(scale=0.7), pyro.plate("data", 3):
        z = pyro.sample("z", dist.Bernoulli(logits=PRIOR))
        pyro.sample("x", dist.Normal(slope() * z, 1.3), obs=DATA)


def guide() -> None:
    """Its guide, with the same scale."""
    with pyro.poutine.scale(scale=0.7), pyro.plate("data", 3):
        pyro.sample("z", dist.Bernoulli(logits=logits()))


def cost(z: Tensor) -> Tensor:
    """The negative log-ratio of each element, scaled: what the site pays."""
    prior = z * PRIOR - torch.nn.functional.softplus(PRIOR)
    score = z * logits() - torch.nn.functional.softplus(logits())
    return (0.7 * (score - prior - dist.Normal(slope() * z, 1.3).log_prob(DATA))).detach()


def score(z: Tensor) -> Tensor:
    """The gradient of the log-probability for the logits."""
    return (z - logits().sigmoid()).detach()


def slope_gradient(z: Tensor) -> Tensor:
    """The gradient of the loss for the model's parameter, a world."""
    return (-0.7 * (DATA - slope() * z) * z / 1.3**2).sum(-1).detach()


def gradients(elbo: TraceEstimator_ELBO, given: Tensor) -> tuple[Tensor, Tensor]:
    """The estimate for logits and slope, with the noise given, ``(K, 3)``."""
    elbo.differentiable_loss(model, guide)  # what worlds there are is found out with other noise
    with noise.source(lambda request: given.reshape(request.shape)):
        loss = elbo.differentiable_loss(model, guide)
    found = torch.autograd.grad(loss, [logits(), slope()])
    return found[0], found[1]


def test_reinforce() -> None:
    for given in (torch.tensor([[0.1, 0.2, -3.0]]), torch.tensor([[1.1, -2.0, 0.4]])):
        z = (logits() + given > 0).double()[0]
        found = gradients(elbo_of(REINFORCE()), given)
        torch.testing.assert_close(found[0], cost(z) * score(z), **CLOSE)
        torch.testing.assert_close(found[1], slope_gradient(z), **CLOSE)


def test_particles_are_averaged() -> None:
    given = torch.tensor([[0.1, 0.2, -3.0], [1.1, -2.0, 0.4]])
    z = (logits() + given > 0).double()
    found = gradients(elbo_of(REINFORCE(), num_particles=2), given)
    torch.testing.assert_close(found[0], (cost(z) * score(z)).mean(0), **CLOSE)
    torch.testing.assert_close(found[1], slope_gradient(z).mean(0), **CLOSE)


def test_baseline_of_zero_is_no_baseline() -> None:
    given = torch.tensor([[1.1, -2.0, 0.4]])
    plain = gradients(elbo_of(REINFORCE()), given)
    pyro.clear_param_store()
    elbo = elbo_of(REINFORCE(MovingAverage()))
    elbo.differentiable_loss(model, guide)
    for buffer in elbo.states.buffers():
        buffer.zero_()
    with noise.source(lambda request: given.reshape(request.shape)):
        loss = elbo.differentiable_loss(model, guide)
    assert torch.equal(torch.autograd.grad(loss, logits())[0], plain[0])


def test_moving_average() -> None:
    """Read before it is updated: each step takes off what the steps before it have left."""
    elbo, decay = elbo_of(REINFORCE(MovingAverage(decay=0.8))), 0.8
    rows = torch.tensor([[1.1, -2.0, 0.4], [0.1, 0.2, -3.0], [-0.5, -0.5, 2.0]])
    costs: list[Tensor] = []
    for given in rows:
        with noise.source(lambda request, given=given: given.reshape(request.shape)):
            loss = elbo.differentiable_loss(model, guide)
        z = (logits() + given > 0).double()
        ages = [decay ** (len(costs) - 1 - i) for i in range(len(costs))]
        weighted = sum(age * cost.mean() for age, cost in zip(ages, costs, strict=True))
        baseline = weighted / sum(ages) if costs else 0.0
        wanted = (cost(z) - baseline) * score(z)
        torch.testing.assert_close(torch.autograd.grad(loss, logits())[0], wanted, **CLOSE)
        costs.append(cost(z))


def test_moving_average_per_element() -> None:
    elbo = elbo_of(REINFORCE(MovingAverage(decay=0.8, per_element=True)))
    rows = torch.tensor([[1.1, -2.0, 0.4], [0.1, 0.2, -3.0]])
    for given in rows:
        with noise.source(lambda request, given=given: given.reshape(request.shape)):
            loss = elbo.differentiable_loss(model, guide)
    first, second = ((logits() + given > 0).double() for given in rows)
    wanted = (cost(second) - cost(first)) * score(second)
    torch.testing.assert_close(torch.autograd.grad(loss, logits())[0], wanted, **CLOSE)


def test_neural_baseline() -> None:
    """The baseline is the net's guess, and the net is fitted to the cost and nothing else is."""
    net = torch.nn.Linear(2, 1)
    data = torch.tensor([[0.3, -0.5], [1.0, 0.2], [-0.7, 0.4]])
    elbo, given = elbo_of(REINFORCE(NeuralBaseline(net, input=data))), torch.tensor([1.1, -2, 0.4])
    elbo.differentiable_loss(model, guide)
    with noise.source(lambda request: given.reshape(request.shape)):
        loss = elbo.differentiable_loss(model, guide)
    found = torch.autograd.grad(loss, [logits(), slope(), *net.parameters()])
    z = (logits() + given > 0).double()
    guess = net(data).squeeze(-1)
    fit = (cost(z) - guess).square().mean()
    torch.testing.assert_close(found[0], (cost(z) - guess.detach()) * score(z), **CLOSE)
    torch.testing.assert_close(found[1], slope_gradient(z), **CLOSE)
    wanted = torch.autograd.grad(fit, list(net.parameters()))
    torch.testing.assert_close(list(found[2:]), list(wanted), **CLOSE)


def test_sum_of_baselines() -> None:
    """The second is fitted to what the first leaves."""
    net, decay = torch.nn.Linear(1, 1), 0.8
    estimator = REINFORCE(MovingAverage(decay) + NeuralBaseline(net, input=torch.ones(1)))
    elbo = elbo_of(estimator)
    rows = torch.tensor([[1.1, -2.0, 0.4], [0.1, 0.2, -3.0]])
    for given in rows:
        with noise.source(lambda request, given=given: given.reshape(request.shape)):
            loss = elbo.differentiable_loss(model, guide)
    found = torch.autograd.grad(loss, [logits(), *net.parameters()])
    first, second = ((logits() + given > 0).double() for given in rows)
    guess = net(torch.ones(1))
    rest = cost(second) - cost(first).mean()
    torch.testing.assert_close(found[0], (rest - guess.detach()) * score(second), **CLOSE)
    wanted = torch.autograd.grad((rest - guess).square().mean(), list(net.parameters()))
    torch.testing.assert_close(list(found[1:]), list(wanted), **CLOSE)


@pytest.mark.parametrize("samples", [2, 3])
def test_rloo(samples: int) -> None:
    given = torch.tensor([[0.1, 0.2, -3.0], [1.1, -2.0, 0.4], [-0.5, -0.5, 2.0]])[:samples]
    z = (logits() + given > 0).double()
    f, terms = cost(z), []
    for k in range(samples):
        others = [f[j] for j in range(samples) if j != k]
        terms.append((f[k] - torch.stack(others).mean(0)) * score(z[k]))
    found = gradients(elbo_of(RLOO(samples)), given)
    torch.testing.assert_close(found[0], torch.stack(terms).mean(0), **CLOSE)
    torch.testing.assert_close(found[1], slope_gradient(z).mean(0), **CLOSE)


def test_disarm() -> None:
    """Also the model's gradient, which both rows enter alike."""
    given = torch.tensor([[0.1, 0.2, -3.0]])
    u = given.sigmoid()
    p = logits().sigmoid()
    z, partner = (u > 1 - p).double()[0], (u < p).double()[0]
    assert not torch.equal(z, partner)
    sign = (-1) ** partner * (z != partner)
    wanted = 0.5 * (cost(z) - cost(partner)) * sign * logits().abs().sigmoid()
    found = gradients(elbo_of(DisARM()), given)
    torch.testing.assert_close(found[0], wanted.detach(), **CLOSE)
    both = (slope_gradient(z) + slope_gradient(partner)) / 2
    torch.testing.assert_close(found[1], both, **CLOSE)


def test_enumerate() -> None:
    """The sum over values, in the guide's and in the model's gradient, whatever the noise."""
    p = logits().sigmoid().detach()
    zero, one = torch.zeros(3), torch.ones(3)
    wanted = p * (1 - p) * (cost(one) - cost(zero))
    model = (p * (-0.7 * (DATA - slope()) / 1.3**2)).sum()
    for given in (torch.tensor([[0.1, 0.2, -3.0]]), torch.tensor([[1.1, -2.0, 0.4]])):
        found = gradients(elbo_of(Enumerate()), given)
        torch.testing.assert_close(found[0], wanted, **CLOSE)
        torch.testing.assert_close(found[1], model.detach(), **CLOSE)


def test_enumerate_several_bits() -> None:
    """All joint values of an event, of which a cost need not be a sum."""

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(logits=PRIOR).expand([3]).to_event(1))
        pyro.sample("x", dist.Normal(z.prod(-1) - z.sum(-1) ** 2, 1.3), obs=DATA[0])

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=logits()).to_event(1))

    z = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    q = (z * logits() - torch.nn.functional.softplus(logits())).sum(-1)
    prior = (z * PRIOR - torch.nn.functional.softplus(PRIOR)).sum(-1)
    observed = dist.Normal(z.prod(-1) - z.sum(-1) ** 2, 1.3).log_prob(DATA[0])
    wanted = torch.autograd.grad((q.exp() * (q - prior - observed)).sum(), logits())[0]
    loss = elbo_of(Enumerate()).differentiable_loss(model, guide)
    torch.testing.assert_close(torch.autograd.grad(loss, logits())[0], wanted, **CLOSE)


def test_pathwise() -> None:
    """The gradient through the value, whose entropy is differentiated too."""

    def model() -> None:
        u = pyro.sample("u", dist.Normal(0.3, 1.2))
        pyro.sample("x", dist.Normal(u**2, 1.3), obs=torch.tensor(0.8))

    def guide() -> None:
        a, s = programs.parameter("a", -0.4), programs.parameter("s", -0.2)
        pyro.sample("u", dist.Normal(a, s.exp()))

    given = torch.tensor(0.7)
    with noise.source(lambda request: given.reshape(request.shape)):
        loss = elbo_of(None).differentiable_loss(model, guide)
    a, s = pyro.param("a"), pyro.param("s")
    u = a + s.exp() * given
    entropy = s + 0.5 * given**2
    wanted = -(entropy + dist.Normal(0.3, 1.2).log_prob(u))
    wanted = wanted - dist.Normal(u**2, 1.3).log_prob(torch.tensor(0.8))
    torch.testing.assert_close(
        torch.autograd.grad(loss, [a, s]), torch.autograd.grad(wanted, [a, s]), **CLOSE
    )


@pytest.mark.parametrize(
    "estimator", [REINFORCE(), REINFORCE(MovingAverage()), RLOO(), DisARM(), Enumerate()], ids=repr
)
def test_all_ways_to_ask_agree(estimator: Any) -> None:
    """``loss_and_grads``, ``differentiable_loss``, ``unreduced`` and ``site_gradients``."""
    elbo = elbo_of(estimator)
    pair = programs.reversed_layers(BERNOULLI)
    elbo.differentiable_loss(*pair)
    learnt = {name: value.clone() for name, value in elbo.states.state_dict().items()}

    def given(request: Request) -> Tensor:
        row = torch.tensor([0.9, -1.2] if request.site == "z1" else [-0.3, 0.6])
        return row[: torch.Size(request.shape).numel()].reshape(request.shape)

    names = ["a", "b", "p"]
    with noise.source(given):
        step = elbo.unreduced(*pair)
        by_site = elbo.site_gradients(*pair)
        whole = elbo.differentiable_loss(*pair)
        elbo.states.load_state_dict(learnt)
        loss = elbo.loss_and_grads(*pair)
    parameters = [pyro.param(name).unconstrained() for name in names]
    wanted = [parameter.grad for parameter in parameters]
    found = torch.autograd.grad(whole, parameters)
    torch.testing.assert_close(list(found), wanted, **CLOSE)
    torch.testing.assert_close(whole.detach(), loss, **CLOSE)
    torch.testing.assert_close(step.loss.mean(), loss, **CLOSE)
    unreduced = torch.autograd.grad(step.surrogate.mean(), parameters)
    torch.testing.assert_close(list(unreduced), wanted, **CLOSE)
    # the logits of z1 are the parameter a, which z2's logits depend on too, by b + a z1
    assert set(by_site) == {"z1", "z2"}
    torch.testing.assert_close(by_site["z2"].sum(), wanted[1], **CLOSE)
